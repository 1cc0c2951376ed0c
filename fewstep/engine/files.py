"""Files that appear whole or not at all, and in nobody's way: programs that write one file never take each other's half."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A path on the disk of `target`, in a new folder with a name of its own, which is deleted at the end.

    A program that is killed leaves that folder, whose name begins with a dot; nothing reads it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name[:40]}.", dir=target.parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder) / "partial"


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes `target` when the block ends well, in the place of an older file.

    `engine.checkpoint.whole_folder` does the same for folders.

    Raises:
        OSError: the disk is full, or the folder cannot be written; an older file is as it was.
    """
    with beside(target) as partial:
        yield partial
        os.replace(partial, target)


def write(target: Path, content: str | bytes) -> None:
    """Store a file, whole or not at all; text as UTF-8. The folder is made if missing.

    Raises:
        OSError: as `whole_file`.
    """
    with whole_file(target) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
