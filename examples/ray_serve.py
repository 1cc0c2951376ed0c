"""Serve the bundled student by Ray Serve, with two replicas; ask it at http://127.0.0.1:8188.

pip install 'fewstep[web,ray]'
python examples/ray_serve.py
"""

import os

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported

from ray import serve

from fewstep.serve.ray_app import deployment, start
from fewstep.serve.service import Settings

if __name__ == "__main__":
    start(port=8188)
    serve.run(deployment({"shapes-4step": "bundled"}, Settings(queue=32), replicas=2), blocking=True)
