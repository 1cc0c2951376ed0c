"""Folders and files that appear whole or not at all, and in nobody's way."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OF_A_STUDY = ("study.sqlite", "secret.key", "protocol.json", "report.html", "report.json")


def free(out: Path) -> None:
    """Check that a new folder can be made here.

    Raises:
        ValueError: something is there, or it is the folder that one stands in.
    """
    if not out.name or out.resolve() == Path.cwd():
        raise ValueError(f"--out {out} is the folder you are in: name one to make, such as runs/study")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: give another folder, or delete it if nobody has voted in it")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block ends well; otherwise nothing is left of it.

    `engine.checkpoint.whole_folder` replaces an older folder; this one never does: a study holds what people said.

    Raises:
        ValueError: see `free`.
    """
    free(out)
    with beside(out) as partial:
        partial.mkdir()
        yield partial
        if out.exists():  # empty
            out.rmdir()
        os.replace(partial, out)


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A path to write to, which becomes `out` when the block ends well, in the place of an older file.

    Raises:
        ValueError: a folder, or a place where a study keeps its own files.
    """
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file in it, such as {out / 'votes.csv'}")
    around = [out.resolve().parent, *out.resolve().parents]
    if out.name in OF_A_STUDY or any(_holds_a_study(folder) for folder in around):
        raise ValueError(f"--out {out} is where a study keeps its own files: give a path outside its folder")
    with beside(out) as partial:
        yield partial
        os.replace(partial, out)


def _holds_a_study(folder: Path) -> bool:
    """By its database, or by the protocol of one whose database is elsewhere."""
    return (folder / "images").is_dir() and any((folder / name).exists() for name in ("study.sqlite", "protocol.json"))


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A path on the disk of `out`, in a new folder with a name of its own, which is deleted at the end."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name[:80]}.", dir=out.parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder) / "partial"
