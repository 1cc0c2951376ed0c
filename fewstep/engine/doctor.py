"""What a machine can do, and what is wrong with it: every finding that needs a hand comes with the command that mends it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch
from huggingface_hub import get_token
from packaging.requirements import Requirement

from fewstep.engine.precision import fast_dtype

GIB = 2**30
MEMORY, DISK = 6 * GIB, 2 * GIB  # what `fewstep demo` needs
GATED = "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium"
State = Literal["ok", "note", "FAIL"]


class Finding(NamedTuple):
    """One line of the doctor's.

    Attributes:
        state: "ok"; "note", which hinders only what it names; or "FAIL", which hinders everything.
        what: what was looked at.
        found: what it is.
        fix: the command or change that mends it; empty where nothing is to be mended.
    """

    state: State
    what: str
    found: str
    fix: str = ""


def environment() -> Iterator[Finding]:
    """Python, required libraries at versions that work, and extras."""
    yield Finding("ok", "Python", platform.python_version())
    for text in importlib.metadata.requires("fewstep") or []:
        requirement = Requirement(text)
        extra = re.search(r"extra == ['\"](\w+)['\"]", text)
        if requirement.name == "fewstep" or extra and extra[1] == "dev":
            continue
        yield installed(requirement, extra[1] if extra else "")


def installed(requirement: Requirement, extra: str = "") -> Finding:
    """Whether a library is there in a version that works; those of an extra are only noted."""
    bad: State = "note" if extra else "FAIL"
    fix = f"pip install 'fewstep[{extra}]'" if extra else f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(bad, requirement.name, f"missing{f' (extra {extra})' if extra else ''}", fix)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(bad, requirement.name, f"{version}, {requirement.specifier} is needed", fix)
    return Finding("ok", requirement.name, version)


def accelerators() -> Iterator[Finding]:
    """The build of torch, GPUs with their memory, and the CPU's fast type."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"
    if build == "CPU" and shutil.which("nvidia-smi"):
        fix = "install the CUDA build: pytorch.org, Get started, shows the command"
        yield Finding("note", "torch build", "CPU, although this machine has an NVIDIA driver", fix)
    elif build != "CPU" and not torch.cuda.is_available():
        fix = "nvidia-smi shows driver and GPUs; most often the driver is older than the build needs"
        yield Finding("note", "torch build", f"{build}, but no GPU answers", fix)
    else:
        yield Finding("ok", "torch build", build)
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        yield Finding("ok", f"GPU {number}", f"{about.name}, {about.total_memory / GIB:.0f} GiB")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    compute = "float32" if fast_dtype() is None else "bfloat16"
    yield Finding("ok", "CPU", f"{torch.backends.cpu.get_cpu_capability()}, {cores} cores, networks compute in {compute}")
    threads = torch.get_num_threads()
    if threads > cores:
        yield Finding("note", "threads", f"{threads} on {cores} cores wait for each other", f"export OMP_NUM_THREADS={cores}")


def room(out: Path) -> Iterator[Finding]:
    """Memory, and disk space where runs are written."""
    memory = psutil.virtual_memory()
    enough = memory.available >= MEMORY
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    fix = "" if enough else f"close other programs: a demo takes up to {MEMORY / GIB:.0f} GiB"
    yield Finding("ok" if enough else "note", "memory", found, fix)
    there = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"fewstep")
    except OSError as error:
        fix = "give commands an --out that you may write to"
        yield Finding("FAIL", "disk", f"{there} cannot be written ({error.strerror})", fix)
        return
    free = shutil.disk_usage(there).free
    enough = free >= DISK
    fix = "" if enough else f"free some space, or give commands an --out elsewhere: a demo takes up to {DISK / GIB:.0f} GiB"
    yield Finding("ok" if enough else "FAIL", "disk", f"{free / GIB:.1f} GiB free in {there}", fix)


def hub() -> Iterator[Finding]:
    """Whether a Hugging Face token is here. Nothing is asked over the network."""
    if get_token():
        yield Finding("ok", "hub login", "a token is here (not tried: the doctor stays offline)")
    else:
        fix = f"accept the licence at {GATED}, then: hf auth login"
        yield Finding("note", "hub login", "none; only gated models such as SD3.5 need one", fix)


def guarded(check: Callable[[], Iterator[Finding]], what: str) -> Iterator[Finding]:
    """The findings of a check; one that breaks is a finding itself and does not end the others."""
    try:
        yield from check()
    except Exception as error:  # whatever is broken here is what the user wants to know
        if os.environ.get("FEWSTEP_DEBUG"):
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        yield Finding("FAIL", what, said, "FEWSTEP_DEBUG=1 shows where: please report it")


def say(finding: Finding, color: bool) -> str:
    """A finding as one or two lines, green, yellow or red on a terminal."""
    code = {"ok": "32", "note": "33", "FAIL": "31"}[finding.state]
    mark = f"\033[{code}m{finding.state:<4}\033[0m" if color else f"{finding.state:<4}"
    fix = f"\n      fix: {finding.fix}" if finding.fix else ""
    return f"{mark}  {finding.what:<15} {finding.found}{fix}"
