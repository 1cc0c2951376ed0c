"""Weights from a pickle (.pt, .pth, .bin) into safetensors, which is all that fewstep reads.

    python examples/convert_pt.py HPS_v2.1_compressed.pt hpsv2.1.safetensors

The pickle is read with weights_only=True, which allows tensors and refuses code. "state_dict" inside is unwrapped, "module."
in front of names is taken away, and tensors that share memory are written apart. Where the name ends in eight digits of a
sha256, as torch.hub names files, they are compared with the file.
"""

import argparse
import hashlib
import os
import re
from pathlib import Path

import torch
from safetensors.torch import save_file


def convert(source: Path, target: Path) -> tuple[int, str]:
    """Write `target`; returns the number of tensors, and the sha256 of the source.

    Raises:
        ValueError: the source is not what its name says, holds no tensors, or more than tensors.
    """
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    named = re.search(r"-([0-9a-f]{8})\.(?:pt|pth)$", source.name)
    if named and not digest.startswith(named[1]):
        raise ValueError(f"{source} has the sha256 {digest[:8]}..., not {named[1]}...: it is damaged, download it again")
    held = torch.load(source, map_location="cpu", weights_only=True)
    held = held.get("state_dict", held) if isinstance(held, dict) else {}
    tensors = {str(k).removeprefix("module."): v.detach().clone().contiguous() for k, v in held.items() if torch.is_tensor(v)}
    left = [k for k, v in held.items() if not torch.is_tensor(v)]
    if not tensors or left:
        raise ValueError(f"{source} holds {len(tensors)} tensors and {left[:3]}: it is not a file of weights alone")
    partial = target.with_name(target.name + ".partial")
    save_file(tensors, partial, metadata={"sha256_of_source": digest})
    os.replace(partial, target)
    return len(tensors), digest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    chosen = parser.parse_args()
    if chosen.target.suffix != ".safetensors":
        parser.error("the target's name must end in .safetensors")
    try:
        count, found = convert(chosen.source, chosen.target)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{chosen.target}: {count} tensors of {chosen.source.name} (sha256 {found})")
