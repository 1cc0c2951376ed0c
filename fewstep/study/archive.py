"""A whole study in one zip, for strangers to analyse again without a network; reading one trusts nothing in it.

    manifest.json    sha256 and size of every other file
    study.json       what the study is: protocol, arms and how they were sampled, prompts, images, pairs
    votes.jsonl      one vote a line; votes.csv is the same for spreadsheets
    images/ID.png    what people saw
    report.html, report.json, README.txt

Names are an allow-list, so no entry can leave the folder; sizes are limited before anything is unpacked; every hash must fit.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.evaluate.benchmark import digest
from fewstep.study import report, rows
from fewstep.study.agreement import Vote
from fewstep.study.tables import IMAGE_ID

FORMAT = 1
MANIFEST, STUDY, VOTES, TABLE, README = "manifest.json", "study.json", "votes.jsonl", "votes.csv", "README.txt"
TEXTS = (STUDY, VOTES, TABLE, README, report.PAGE, report.NUMBERS)
IMAGE = re.compile(rf"images/({IMAGE_ID.pattern})\.png")
PNG = b"\x89PNG\r\n\x1a\n"
DATE = (1980, 1, 1, 0, 0, 0)  # the same study gives the same bytes
MAX_ENTRIES, MAX_IMAGE, MAX_TEXT, MAX_TOTAL = 1_000_000, 2**26, 2**30, 2**36
MAX_RATIO, MAX_IMAGE_RATIO, SMALL = 200, 20, 2**20  # of a size to what it takes in the zip, where it is not small
CHUNK = 2**20

HOW = """A study of images by people, made with fewstep.

  votes.csv, votes.jsonl   one vote a row: model_a, model_b, winner (model_a, model_b, tie, both_bad), then what may be alike:
                           prompt, annotator (a pseudonym), and the rest. Rows of kind "gold" have an objective answer
                           (gold_answer), rows of kind "repeat" ask somebody again with sides swapped: neither is in a rating.
                           In votes.csv a text that a spreadsheet could run as a formula has an apostrophe before it.
  study.json               protocol and its hash, arms, prompts, images (sha256), pairs.
  images/ID.png            what people saw.
  report.html              opens in any browser.

To analyse it again:

  pip install 'fewstep[web]'
  fewstep study import THIS.zip --out again
  fewstep study report again
"""


def write(path: Path, record: Mapping[str, Any], votes: Sequence[Vote], images: Path) -> None:
    """Write the zip.

    Args:
        path: file.
        record, votes: of the study.
        images: folder of its images.

    Raises:
        ValueError: an image of the record is missing or not the one that people saw.
    """
    data = report.build(record, votes)
    page = report.html(data, report.examples(record, votes, images, data))
    table = [rows.row(v) for v in votes]
    texts = {
        STUDY: json.dumps(record, indent=1, ensure_ascii=False), VOTES: rows.to_jsonl(table), TABLE: rows.to_csv(table),
        README: HOW, report.PAGE: page, report.NUMBERS: json.dumps(data, indent=1, allow_nan=False),
    }  # fmt: skip
    files: dict[str, dict[str, Any]] = {}
    with zipfile.ZipFile(path, "w") as whole:
        for name, text in texts.items():
            content = text.encode()
            _put(whole, name, content, zipfile.ZIP_DEFLATED)
            files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        for image in record["images"]:
            source = images / f"{image['id']}.png"
            content = source.read_bytes() if source.is_file() else b""
            found = hashlib.sha256(content).hexdigest()
            if found != image["sha256"]:
                raise ValueError(f"{source} is missing or not what people saw: put it back, or export votes alone as .csv")
            name = f"images/{image['id']}.png"
            _put(whole, name, content, zipfile.ZIP_STORED)
            files[name] = {"sha256": found, "size": len(content)}
        manifest = json.dumps({"format": FORMAT, "files": files}, indent=1)
        _put(whole, MANIFEST, manifest.encode(), zipfile.ZIP_DEFLATED)


def unpack(path: Path, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Check a zip and unpack its images; the report is not taken over, it is to be made again.

    Args:
        path: of the zip.
        folder: where `images/` is made.

    Returns:
        Record and votes.

    Raises:
        ValueError: no zip, damaged, too large, with entries that do not belong there, or with a hash that does not fit.
    """
    try:
        with zipfile.ZipFile(path) as whole:
            entries = _entries(whole, path.stat().st_size)
            files = _manifest(whole, entries)
            record = rows.whole(_checked(whole, entries, files, STUDY), STUDY)
            _checked(whole, entries, files, VOTES, keep=False)
            with whole.open(entries[VOTES]) as file:
                lines = rows.limited(rows.from_jsonl(file))
                votes = [rows.vote_of(line, f"{VOTES}, row {n}") for n, line in lines]
            _images(whole, entries, files, record, folder)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no whole zip ({type(error).__name__}: {str(error)[:120]})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if digest(record.get("protocol")) != record.get("hash"):
        raise ValueError(f"{path}: the protocol in {STUDY} does not have the hash it was written with")
    return record, votes


def _put(whole: zipfile.ZipFile, name: str, content: bytes, how: int) -> None:
    entry = zipfile.ZipInfo(name, DATE)
    entry.compress_type, entry.external_attr = how, 0o644 << 16
    whole.writestr(entry, content)


def _entries(whole: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Entries by name, refused by what their headers say; `size` is the zip's own in bytes."""
    found: dict[str, zipfile.ZipInfo] = {}
    listed = whole.infolist()
    total = sum(e.file_size for e in listed)
    if len(listed) > MAX_ENTRIES or total > MAX_TOTAL:
        raise ValueError(f"it unpacks to more than {MAX_ENTRIES:,} files or {MAX_TOTAL >> 30} GiB")
    if total > SMALL and total > MAX_RATIO * size:  # entries may share their bytes
        raise ValueError(f"it unpacks to {total // max(1, size)} times its size: a bomb")
    for entry in listed:
        name, image = entry.orig_filename, IMAGE.fullmatch(entry.orig_filename)
        if name not in (MANIFEST, *TEXTS) and not image:
            raise ValueError(f"{name[:80]!r} does not belong into a study")
        mode = entry.external_attr >> 16
        if entry.is_dir() or (stat.S_IFMT(mode) and not stat.S_ISREG(mode)):
            raise ValueError(f"{name} is a link or no plain file")
        if entry.flag_bits & 1:
            raise ValueError(f"{name} is encrypted")
        if name in found:
            raise ValueError(f"{name} is in it twice")
        most = MAX_IMAGE if image else rows.MAX_WHOLE if name in (MANIFEST, STUDY) else MAX_TEXT
        if entry.file_size > most:
            raise ValueError(f"{name} unpacks to {entry.file_size >> 20} MiB, more than is allowed")
        ratio = MAX_IMAGE_RATIO if image else MAX_RATIO
        if entry.file_size > SMALL and entry.file_size > ratio * max(1, entry.compress_size):
            raise ValueError(f"{name} unpacks to {entry.file_size // max(1, entry.compress_size)} times its size: a bomb")
        found[name] = entry
    return found


def _manifest(whole: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo]) -> dict[str, str]:
    """sha256 by name, of exactly the other entries."""
    if MANIFEST not in entries:
        raise ValueError(f"{MANIFEST} is missing: it is no export of a study")
    told = rows.whole(_read(whole, entries[MANIFEST]), MANIFEST)
    if told.get("format") != FORMAT:
        raise ValueError(f"{MANIFEST} is of format {told.get('format')!r}, this version reads {FORMAT}")
    files = told.get("files")
    if not isinstance(files, dict) or not all(isinstance(f, dict) and isinstance(f.get("sha256"), str) for f in files.values()):
        raise ValueError(f"{MANIFEST} lists no hashes")
    differs = sorted(set(files) ^ (set(entries) - {MANIFEST}))
    if differs:
        raise ValueError(f"{MANIFEST} and the zip disagree about {differs[0][:80]!r}")
    return {name: f["sha256"] for name, f in files.items()}


def _chunks(whole: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """An entry's bytes, never more than its header says."""
    size = 0
    with whole.open(entry) as file:
        while chunk := file.read(CHUNK):
            size += len(chunk)
            if size > entry.file_size:
                raise ValueError(f"{entry.filename} is longer than its header says")
            yield chunk


def _read(whole: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    return b"".join(_chunks(whole, entry))


def _checked(
    whole: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], files: Mapping[str, str], name: str, keep: bool = True
) -> bytes:
    """Bytes of a text that has its hash; none are kept in memory without `keep`."""
    if name not in entries:
        raise ValueError(f"{name} is missing: it is no export of a study")
    found, parts = hashlib.sha256(), []
    for chunk in _chunks(whole, entries[name]):
        found.update(chunk)
        parts += [chunk] if keep else []
    if found.hexdigest() != files[name]:
        raise ValueError(f"{name} does not have the hash in {MANIFEST}: it was changed")
    return b"".join(parts)


def _images(
    whole: zipfile.ZipFile,
    entries: Mapping[str, zipfile.ZipInfo],
    files: Mapping[str, str],
    record: Mapping[str, Any],
    folder: Path,
) -> None:
    """Unpack the images that the record names, and no others."""
    listed = record.get("images")
    if not isinstance(listed, list) or not all(isinstance(i, dict) for i in listed):
        raise ValueError(f"{STUDY} lists no images")
    wanted = {f"images/{i.get('id')}.png": i.get("sha256") for i in listed}
    differs = sorted(set(wanted) ^ {name for name in entries if IMAGE.fullmatch(name)})
    if differs:
        raise ValueError(f"{STUDY} and the zip disagree about {differs[0][:80]!r}")
    (folder / "images").mkdir()
    for name, told in wanted.items():
        content = _read(whole, entries[name])
        found = hashlib.sha256(content).hexdigest()
        if found != told or found != files[name]:
            raise ValueError(f"{name} does not have the hash it was shown with: it was changed")
        if not content.startswith(PNG):
            raise ValueError(f"{name} is no PNG")
        (folder / name).write_bytes(content)
