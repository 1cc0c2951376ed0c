"""ImageReward (Xu et al. 2023) as a sidecar: a BLIP that was trained on human preferences. Higher is better, about -2 to 2.

Written from the interface of image-reward 1.5; NOT RUN by fewstep's authors, who have no such environment. Check it first:
`fewstep doctor --eval --sidecar "..."`. It reads 35 tokens of a prompt and no more. Code and weights: Apache-2.0.

    python3.10 -m venv envs/image_reward
    envs/image_reward/bin/pip install image-reward "transformers<4.40" torch torchvision
    envs/image_reward/bin/python examples/sidecars/image_reward.py --download
"""

import argparse

from speaking import offline, serve


def opened(weights):
    """Load the network; returns the answer to a request."""
    import ImageReward

    model = ImageReward.load(weights)

    def answer(asked):
        import torch

        with torch.no_grad():
            return {"score": float(model.score(asked["prompt"], asked["file"]))}

    return answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="ImageReward as a sidecar of fewstep")
    parser.add_argument("--weights", default="ImageReward-v1.0", help="its name, or a file")
    parser.add_argument("--download", action="store_true", help="let it fetch its weights (1.8 GB) from the hub")
    chosen = parser.parse_args()
    offline(chosen.download)
    serve(
        "image_reward",
        "1",
        ["file", "prompt"],
        lambda: opened(chosen.weights),
        ["image-reward", "transformers", "torch"],
        'pip install image-reward "transformers<4.40" torch torchvision',
        weights=chosen.weights,
    )
