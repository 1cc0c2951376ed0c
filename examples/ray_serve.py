"""Serve the bundled student by Ray Serve, with two replicas; ask it at http://127.0.0.1:8188.

pip install 'fewstep[web,ray]'
python examples/ray_serve.py
"""

from fewstep.serve.ray_app import deployment, start
from fewstep.serve.service import LOOPBACK, Settings

if __name__ == "__main__":
    start(port=8188)  # before Ray is imported: it tells it to report nothing and to keep to this machine
    from ray import serve

    settings = Settings(queue=32, hosts=LOOPBACK)  # answers to this machine's own names alone, as no key is asked for
    serve.run(deployment({"shapes-4step": "bundled"}, settings, replicas=2), blocking=True)
