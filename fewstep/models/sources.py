"""Where models come from: a hub id, a diffusers folder, or a single file on top of one; safetensors only (D15)."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
PIPELINE = "StableDiffusion3Pipeline"
# A pipeline's own files; not the single files, half-precision copies and other formats that lie beside them.
WANTED = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]
UNWANTED = ["*/*.fp16*.safetensors", "text_encoders/*", "*/*.gguf"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def fetch(source: str) -> Path:
    """The diffusers folder of a source: a local folder as it is, a hub id from the hub's cache, downloaded if need be.

    Raises:
        ValueError: neither of them, a gated or unknown repository, or no network; says what to do.
    """
    local = Path(source)
    if local.is_dir():
        check(local)
        return local
    if local.is_file():
        raise ValueError(f"{source} is a file: give its folder, or `--base` with what the file lacks")
    if not HUB_ID.fullmatch(source):
        raise ValueError(f"{source} is neither a folder nor a hub id such as stabilityai/stable-diffusion-3.5-medium")
    page = f"https://huggingface.co/{source}"
    try:
        folder = Path(snapshot_download(source, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except GatedRepoError:
        raise ValueError(f"{source} is gated: accept its licence at {page}, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{source} is neither a folder here nor a model that you may see at {page}: check the name; for a private "
            "model `hf auth login`"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{source} is not a folder here and could not be downloaded ({said}). Download it where there is a network: "
            f"hf download {source} --local-dir DIR"
        ) from None
    check(folder)
    return folder


def check(folder: Path) -> None:
    """Whether a folder is a whole SD3 pipeline in safetensors.

    Raises:
        ValueError: names what is missing or of another kind.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        files = sorted(p.name for p in folder.glob("*.safetensors"))
        single = f"; {files[0]} in it is a single file: give it with --base" if files else ""
        raise ValueError(f"{folder} is not a diffusers pipeline folder: {index.name} is missing{single}")
    try:
        named = json.loads(index.read_text(encoding="utf-8"))
        class_name = named["_class_name"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is damaged ({error}): download the folder again") from None
    if class_name != PIPELINE:
        raise ValueError(f"{folder} holds a {class_name}; fewstep distils {PIPELINE}: SD3-Medium, SD3.5-Medium and -Large")
    for part in PARTS:
        if named.get(part, [None])[0] is None and part not in ("transformer", "vae"):
            continue  # a pipeline may go without an encoder
        if not (folder / part / "config.json").is_file():
            raise ValueError(f"{folder} is not whole: {part}/config.json is missing; download the folder again")
        if not any((folder / part).glob("*.safetensors")):
            pickles = sorted(p.name for p in (folder / part).iterdir() if p.suffix in (".bin", ".pt", ".ckpt"))
            other = f", only {pickles[0]}, a pickle, which may run code when opened" if pickles else ""
            raise ValueError(f"{folder}/{part} has no safetensors file{other}: download or save the model as safetensors")
        _check_shards(folder / part)


def _check_shards(part: Path) -> None:
    for index in part.glob("*.safetensors.index.json"):
        if ".fp16." in index.name:
            continue
        wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in wanted if not (part / name).is_file())
        if missing:
            raise ValueError(f"{part} is not whole: {missing[0]} of {len(wanted)} files is missing; download the folder again")


def link(folder: Path, target: Path, without: Collection[str] = (), copies: bool = False) -> None:
    """Fill `target` with a pipeline folder's own files: hard links where the disk allows, so that no space is spent.

    Args:
        folder: a folder that `check` passes.
        target: an existing folder.
        without: parts that are left out, because another version of them will lie there.
        copies: copy every file.
    """
    named = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    shutil.copyfile(folder / "model_index.json", target / "model_index.json")
    for part, made_by in named.items():
        if not isinstance(made_by, list) or made_by[0] is None or part in without or not (folder / part).is_dir():
            continue
        (target / part).mkdir()
        for file in sorted((folder / part).iterdir()):
            if file.is_file() and ".fp16" not in file.name and file.suffix in (".json", ".txt", ".model", ".safetensors"):
                (shutil.copyfile if copies else _link)(file.resolve(), target / part / file.name)  # the hub has symbolic links


def leave_out(folder: Path, parts: Collection[str]) -> None:
    """Say in a pipeline folder's index that it has no such parts, so that readers do not look for them."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index |= {part: [None, None] for part in parts if part in index}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # another disk, or one without hard links
        shutil.copyfile(file, target)
