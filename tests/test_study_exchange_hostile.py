"""Files of votes that lie, burst or are cut are refused in one line, with nothing left; nothing is overwritten."""

from __future__ import annotations

import hashlib
import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from study_help import TEXTS, png, voted_study

from fewstep.evaluate.benchmark import digest
from fewstep.study import archive, exchange, rows, store


@pytest.fixture(scope="module")
def voted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return voted_study(tmp_path_factory.mktemp("study") / "voted", TEXTS)


def small_in_the_file(path: Path, count: int, row: dict[str, Any]) -> Path:
    """A Parquet file of equal rows, each text of which it holds once."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    zeros = pa.array(np.zeros(count, np.int8))
    columns = {name: pa.DictionaryArray.from_arrays(zeros, pa.array([value])) for name, value in row.items()}
    parquet.write_table(pa.table(columns), path, compression="zstd")
    return path


ARENA_ROW = {"model_a": "x" * 1000, "model_b": "y", "winner": "model_a"}


def test_a_small_file_of_millions_of_rows_is_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = small_in_the_file(tmp_path / "bomb.parquet", rows.MAX_ROWS + 1, ARENA_ROW)
    assert bomb.stat().st_size < 200_000
    monkeypatch.setattr(rows, "_cells", lambda *_: pytest.fail("rows were read"))
    with pytest.raises(ValueError, match="it holds 500,001 rows: no more than 500,000 are read"):
        exchange.import_(bomb, tmp_path / "s")
    monkeypatch.setattr(rows, "MAX_CELLS", 1000)
    with pytest.raises(ValueError, match="unpacks to"):
        exchange.import_(small_in_the_file(tmp_path / "wide.parquet", 10, ARENA_ROW), tmp_path / "s")


def test_equal_texts_of_a_parquet_file_are_one_in_memory(tmp_path: Path) -> None:
    with small_in_the_file(tmp_path / "many.parquet", 1000, ARENA_ROW | {"unknown": "z"}).open("rb") as file:
        read = list(rows.from_parquet(file)[0])
    assert len(read) == 1000 and len({id(r["model_a"]) for r in read}) == 1 and "unknown" not in read[0]


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.json", "x.zip"])
def test_each_row_is_checked_before_the_next_is_read_and_rows_are_counted(
    voted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    good = exchange.export(voted, tmp_path / name)
    monkeypatch.setattr(rows, "MAX_ROWS", 20)
    with pytest.raises(ValueError, match="more than 20 rows"):
        exchange.import_(good, tmp_path / "s")
    if name == "x.json":
        monkeypatch.setattr(rows, "MAX_WHOLE", 1000)
        with pytest.raises(ValueError, match="more than 0 MiB"):
            exchange.import_(good, tmp_path / "s")
        return
    later = {
        "x.csv": b"model_a,model_b,winner\nx,y,nobody\nx\n", "x.jsonl": b'{"model_a": 1}\n{{{',
        "x.zip": b"{}\n{{{",
    }[name]  # fmt: skip
    if name == "x.zip":
        rebuilt(good, tmp_path / "x.zip", lambda c: c.update({"votes.jsonl": later}))
    else:
        good.write_bytes(later)
    with pytest.raises(ValueError, match="row 1"):
        exchange.import_(good, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_lines_and_records_have_a_largest_size(voted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"model_a": "' + b"x" * rows.MAX_LINE + b'"}')
    with pytest.raises(ValueError, match="line 1 has more than 4 MiB"):
        exchange.import_(tmp_path / "x.jsonl", tmp_path / "s")
    for name in ("x.zip", "x.parquet"):
        exchange.export(voted, tmp_path / name)
    monkeypatch.setattr(rows, "MAX_WHOLE", 1000)
    for name, words in (("x.zip", "more than is allowed"), ("x.parquet", "record in its metadata has more than")):
        with pytest.raises(ValueError, match=words):
            exchange.import_(tmp_path / name, tmp_path / "s")


def rebuilt(source: Path, out: Path, change: Callable[[dict[str, bytes]], None], truthful: bool = True) -> Path:
    """A zip with other contents, and with a manifest that fits them if `truthful`."""
    with zipfile.ZipFile(source) as whole:
        contents = {name: whole.read(name) for name in whole.namelist()}
    change(contents)
    if truthful:
        contents.pop(archive.MANIFEST, None)
        files = {n: {"sha256": hashlib.sha256(c).hexdigest(), "size": len(c)} for n, c in contents.items()}
        contents[archive.MANIFEST] = json.dumps({"format": 1, "files": files}).encode()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as whole:
        for name, content in contents.items():
            whole.writestr(name, content)
    return out


def _other_votes(contents: dict[str, bytes]) -> None:
    contents["votes.jsonl"] = contents["votes.jsonl"].replace(b'"model_a"', b'"model_b"')


def _other_image(contents: dict[str, bytes]) -> None:
    contents[next(n for n in contents if n.startswith("images/"))] = png(99)


def _other_protocol(contents: dict[str, bytes]) -> None:
    record = json.loads(contents["study.json"])
    record["protocol"]["exclusion"] = {"min_votes": 9}
    contents["study.json"] = json.dumps(record).encode()


def _no_protocol(contents: dict[str, bytes]) -> None:
    record = json.loads(contents["study.json"])
    record["protocol"] = []
    contents["study.json"] = json.dumps({**record, "hash": digest([])}).encode()


def _record(contents: dict[str, bytes], **change: Any) -> None:
    contents["study.json"] = json.dumps({**json.loads(contents["study.json"]), **change}).encode()


def _picture_elsewhere(contents: dict[str, bytes]) -> None:
    pairs = json.loads(contents["study.json"])["pairs"]
    _record(contents, pairs=[{**p, "image_a": "/etc/private"} for p in pairs])


def _bad_rules(contents: dict[str, bytes]) -> None:
    protocol = {**json.loads(contents["study.json"])["protocol"], "exclusion": {"min_votes": "many"}}
    _record(contents, protocol=protocol, hash=digest(protocol))


def _pair_of_another(contents: dict[str, bytes]) -> None:
    contents["votes.jsonl"] = contents["votes.jsonl"].replace(b'"prompt": 0', b'"prompt": 3', 1)


@pytest.mark.parametrize(
    ("change", "truthful", "words"),
    [
        (lambda c: c.update({"../evil.txt": b"x"}), True, "does not belong"),
        (lambda c: c.update({"/etc/passwd": b"x"}), True, "does not belong"),
        (lambda c: c.update({"images/../../evil.png": b"x"}), True, "does not belong"),
        (lambda c: c.update({"images\\evil.png": b"x"}), True, "does not belong"),
        (lambda c: c.update({"images/sub/evil.png": b"x"}), True, "does not belong"),
        (lambda c: c.update({"study.sqlite": b"x"}), True, "does not belong"),
        (lambda c: c.update({"images/extra.png": png(1)}), True, "disagree about 'images/extra.png'"),
        (lambda c: c.pop("votes.jsonl"), True, "votes.jsonl is missing"),
        (lambda c: c.pop("manifest.json"), False, "manifest.json is missing"),
        (lambda c: c.pop("votes.csv"), False, "disagree about 'votes.csv'"),
        (_other_votes, False, "votes.jsonl does not have the hash"),
        (_other_image, True, "hash it was shown with"),
        (_other_protocol, True, "protocol in study.json does not have the hash"),
        (_no_protocol, True, "no protocol or title"),
        (lambda c: _record(c, pairs=None), True, "lists no pairs"),
        (_picture_elsewhere, True, "the id of no image"),
        (_bad_rules, True, "bad.zip: exclusion.min_votes must be a number"),
        (_pair_of_another, True, "not that of its pair"),
        (lambda c: c.update({"votes.jsonl": b"[" * 100_000}), True, "no JSON"),
        (lambda c: c.update({"votes.jsonl": b'{"model_a": NaN}'}), True, "no JSON"),
        (lambda c: c.update({"study.json": b"\xff\xfe"}), True, "no whole zip"),
        (lambda c: c.update({"manifest.json": b'{"format": 2}'}), False, "format 2"),
        (lambda c: c.update({"README.txt": b"0" * (40 << 20)}), True, "a bomb"),
    ],
)
def test_hostile_zips_are_refused_and_leave_nothing(
    voted: Path, tmp_path: Path, change: Callable[[dict[str, bytes]], None], truthful: bool, words: str
) -> None:
    exchange.export(voted, tmp_path / "good.zip")
    bad = rebuilt(tmp_path / "good.zip", tmp_path / "bad.zip", change, truthful)
    with pytest.raises(ValueError, match=words) as raised:
        exchange.import_(bad, tmp_path / "deep" / "out")
    assert "\n" not in str(raised.value)
    assert {p.name for p in tmp_path.rglob("*")} <= {"good.zip", "bad.zip", "deep"}


def test_links_doubles_and_cut_zips_are_refused(voted: Path, tmp_path: Path) -> None:
    good = exchange.export(voted, tmp_path / "good.zip")
    with zipfile.ZipFile(good) as whole:
        contents = {name: whole.read(name) for name in whole.namelist()}

    def written(*more: tuple[zipfile.ZipInfo, bytes]) -> Path:
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as whole, pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)
            for name, content in contents.items():
                if name not in {info.filename for info, _ in more} or len(more) > 1:
                    whole.writestr(name, content)
            for info, content in more:
                whole.writestr(info, content)
        return tmp_path / "bad.zip"

    link = zipfile.ZipInfo("README.txt")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(ValueError, match=r"README.txt is a link"):
        exchange.import_(written((link, b"/etc/passwd")), tmp_path / "out")
    plain = zipfile.ZipInfo("README.txt")
    with pytest.raises(ValueError, match=r"README.txt is in it twice"):
        exchange.import_(written((plain, b"x"), (plain, b"y")), tmp_path / "out")
    whole_bytes = good.read_bytes()
    for broken in (whole_bytes[: len(whole_bytes) // 2], b"PK\x03\x04 not a zip", b""):
        (tmp_path / "cut.zip").write_bytes(broken)
        with pytest.raises(ValueError, match="no whole zip"):
            exchange.import_(tmp_path / "cut.zip", tmp_path / "out")
    flipped = bytearray(whole_bytes)
    flipped[whole_bytes.index(b"\x89PNG") + 40] ^= 1
    (tmp_path / "cut.zip").write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match=r"no whole zip|hash"):
        exchange.import_(tmp_path / "cut.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", b"", "must have model_a"),
        ("x.csv", b"model_a,model_b,winner\nx,y\n", "line 2 has 2 cells"),
        ("x.csv", b"model_a,model_b,winner\n", "x.csv: it holds no votes"),
        ("x.csv", b"model_a,model_b,winner\nx,y,tie\nx,x,tie\n", "x.csv: row 2: 'x' against itself"),
        ("x.csv", b"model_a,model_b,winner\nx,y,left\n", "row 1: winner is 'left'"),
        ("x.csv", b"model_a,model_b,winner,seed\nx,y,tie,1.5\n", "column seed is '1.5', not a whole number"),
        ("x.csv", b"model_a,model_b,winner,zoomed\nx,y,tie,maybe\n", "not true or false"),
        ("x.csv", b'model_a,model_b,winner\n"x,y,tie\n', "line"),
        ("x.csv", b"\xff\xfe\x00", "no UTF-8"),
        ("x.csv", b"model_a,model_b,winner,at\nx,y,tie,yesterday\n", "at is 'yesterday'"),
        ("x.csv", b"model_a,model_b,winner,question\nx,y,tie,beauty\n", "question is 'beauty'"),
        ("x.csv", b"model_a,model_b,winner,pair_id,prompt\nx,y,tie,1,0\nx,z,tie,1,0\n", "pair 1 has two"),
        ("x.csv", b"model_a,model_b,winner,prompt,prompt_text\nx,y,tie,0,a\nx,y,tie,0,b\n", "prompt 0 has two texts"),
        ("x.csv", b"model_a,model_b,winner,vote_id\nx,y,tie,1\nx,y,tie,1\n", "one vote_id"),
        ("x.jsonl", b'{"model_a": "x"}\n', "column model_b is missing"),
        ("x.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("x.jsonl", b'{"model_a": 1, "model_b": "y", "winner": "tie"}', "column model_a is '1', not text"),
        ("x.jsonl", b'{"model_a": "x", "model_b": "\\ud800", "winner": "tie"}', "half a character"),
        ("x.jsonl", b'{"model_a": "x", "model_b": "y", "winner": "tie", "seed": 99999999999999999999}', "too large"),
        ("x.json", b'{"a": 1}', "not a JSON list"),
        ("x.json", b'[{"data": {}}]', "no Label Studio export"),
        ("x.parquet", b"PAR1 nothing PAR1", "no whole Parquet"),
        ("x.txt", b"", "must end in"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        exchange.import_(tmp_path / name, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_nothing_is_overwritten_and_nothing_half_written(voted: Path, tmp_path: Path) -> None:
    exchange.export(voted, tmp_path / "a.csv")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="is there already"):
        exchange.import_(tmp_path / "a.csv", tmp_path / "there")
    assert (tmp_path / "there" / "mine.txt").read_text() == "keep"
    with pytest.raises(ValueError, match="does not exist"):
        exchange.import_(tmp_path / "b.csv", tmp_path / "new")
    (tmp_path / "b.csv.partial").write_text("keep")
    exchange.export(voted, tmp_path / "b.csv")
    assert (tmp_path / "b.csv.partial").read_text() == "keep"
    (tmp_path / "dir.csv").mkdir()
    with pytest.raises(ValueError, match="is a folder: name a file"):
        exchange.export(voted, tmp_path / "dir.csv")
    with pytest.raises(ValueError, match="is the folder you are in"):
        exchange.import_(tmp_path / "a.csv", Path("."))
    exchange.import_(tmp_path / "a.csv", tmp_path / "study")
    before = (tmp_path / "study" / store.DATABASE).read_bytes()
    for bad in (tmp_path / "study" / "new.csv", tmp_path / "study" / store.DATABASE, tmp_path / store.SECRET):
        with pytest.raises(ValueError, match="keeps its own files"):
            exchange.export(voted, bad, "csv")
    assert (tmp_path / "study" / store.DATABASE).read_bytes() == before and not (tmp_path / store.SECRET).exists()
    with pytest.raises(ValueError, match="would hold zip: give it the name c.zip"):
        exchange.export(voted, tmp_path / "c.csv", "zip")


def test_a_zip_is_not_made_without_the_images_people_saw(tmp_path: Path) -> None:
    folder = voted_study(tmp_path / "s")
    image = next((folder / store.IMAGES).iterdir())
    image.write_bytes(png(1234))
    with pytest.raises(ValueError, match="not what people saw"):
        exchange.export(folder, tmp_path / "s.zip")
    assert not list(tmp_path.glob("s.zip*"))
