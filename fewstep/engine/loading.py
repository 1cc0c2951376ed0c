"""How a process that has just started loads its libraries."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def libraries() -> Iterator[None]:
    """What imports in this block make is searched for garbage once, and then never again: it stays to the process's end.

    Torch, diffusers and transformers make a million objects. Looking through them again and again, while they are imported,
    when a model has been opened and at the end, takes a third of a command that draws one image. A process that has torch
    already, such as a user's own, is left as it is.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.collect()  # once: 7 MiB of what imports leave behind
        gc.freeze()
        gc.enable()
