"""HPSv3 (Ma et al. 2025) as a sidecar: a Qwen2-VL of 7B that was trained on human preferences. Higher is better.

Written from the interface of hpsv3 1.0; NOT RUN by fewstep's authors, who have no such environment. Check it first:
`fewstep doctor --eval --sidecar "..."`. It wants a GPU of 24 GB. Code: MIT; see the card for the weights.

    python3.10 -m venv envs/hpsv3
    envs/hpsv3/bin/pip install hpsv3
    envs/hpsv3/bin/python examples/sidecars/hpsv3.py --download
"""

import argparse

from speaking import offline, serve


def opened(options):
    """Load the network; returns the answer to a request: the mean of the predicted preference, and its deviation."""
    import torch
    from hpsv3 import HPSv3RewardInferencer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = HPSv3RewardInferencer(checkpoint_path=options.checkpoint, device=device)

    def answer(asked):  # by name: the order of these two has changed between versions
        found = model.reward(prompts=[asked["prompt"]], image_paths=[asked["file"]])[0]
        mean, deviation = (float(v) for v in found.flatten()[:2])
        return {"score": mean, "sigma": deviation}

    return answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="HPSv3 as a sidecar of fewstep")
    parser.add_argument("--checkpoint", default=None, help="HPSv3.safetensors; by default that of the hub's cache")
    parser.add_argument("--download", action="store_true", help="let it fetch MizzenAI/HPSv3 and Qwen2-VL from the hub")
    chosen = parser.parse_args()
    offline(chosen.download)
    serve(
        "hpsv3",
        "1",
        ["file", "prompt"],
        lambda: opened(chosen),
        ["hpsv3", "transformers", "torch"],
        "pip install hpsv3",
        weights=chosen.checkpoint or "MizzenAI/HPSv3",
    )
