"""What the command line does, a function for each command: heavy imports happen inside them."""

from __future__ import annotations

import os
import warnings


def prepare() -> None:
    """All cores, or as many as OMP_NUM_THREADS says; no advice of libraries that a user cannot act on."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass.*")  # peft's merging, which is not used
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    from fewstep.engine import ranks

    if hasattr(os, "sched_getaffinity") and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    ranks.begin()
