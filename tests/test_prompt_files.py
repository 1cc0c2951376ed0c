"""Prompts from files: what is written is read back, mistakes name their line, and nothing is left out in silence."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_pipe

from fewstep.data.prompt_files import Line, Policy, read, usable
from fewstep.models import sd3
from fewstep.recipes import material

TEXTS = st.lists(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).filter(str.strip), min_size=1, max_size=8)
FRESH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)


def texts_of(path: Path) -> list[str]:
    return [line.text for line in read(path)]


@FRESH
@given(TEXTS)
def test_tables_give_back_what_was_written(tmp_path: Path, texts: list[str]) -> None:
    stripped = [text.strip() for text in texts]
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with (tmp_path / f"p{suffix}").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([("id", "Caption"), *((i, text) for i, text in enumerate(texts))])
        assert texts_of(tmp_path / f"p{suffix}") == stripped
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"id": 1, "text": text}) for text in texts), encoding="utf-8")
    assert texts_of(tmp_path / "p.jsonl") == stripped
    (tmp_path / "plain.jsonl").write_text("\n".join(json.dumps(text) for text in texts), encoding="utf-8")
    assert texts_of(tmp_path / "plain.jsonl") == stripped


def test_parquet_gives_back_what_was_written(tmp_path: Path) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "prompt": ["a fox", None, " a cat "]}), tmp_path / "p.parquet")
    assert read(tmp_path / "p.parquet") == [Line("a fox", "p.parquet row 1"), Line("a cat", "p.parquet row 3")]
    parquet.write_table(pyarrow.table({"prompt": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(ValueError, match="n.parquet row 1: a prompt is a string, this is int"):
        read(tmp_path / "n.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match="broken.parquet is not a whole Parquet file"):
        read(tmp_path / "broken.parquet")


def test_text_is_one_prompt_a_line_and_says_where(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffone\n\n  zwölf Füchse \r\n", encoding="utf-8")
    assert read(tmp_path / "p.txt") == [Line("one", "p.txt line 1"), Line("zwölf Füchse", "p.txt line 3")]


def test_a_folder_of_images_with_captions(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.png").write_bytes(b"")
        (tmp_path / f"{name}.txt").write_text(f"picture\n{name}\n")
    assert read(tmp_path) == [Line("picture a", "a.txt"), Line("picture b", "b.txt")]
    (tmp_path / "c.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 3 images have no caption; write c.txt, or metadata.csv for all"):
        read(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "from the table"}))
    assert texts_of(tmp_path) == ["from the table"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "p.txt holds no prompt; write one a line"),
        ("p.txt", b"caf\xe9", "p.txt is not UTF-8 text"),
        ("p.doc", b"x", "prompts are read from .txt .*, not from .doc"),
        ("p.csv", b"", r"p.csv has no column of prompts: name one prompt or caption or text \(there are none\)"),
        ("p.csv", b"id,words\n1,x\n", r"p.csv has no column of prompts: .* \(there are id, words\)"),
        ("p.csv", b"id,prompt\n1,a\n2\n", "p.csv line 3 has 1 columns, prompts are in column 2"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ', "p.jsonl line 2: not JSON"),
        ("p.jsonl", b'{"words": "a"}', "p.jsonl line 1 has no column of prompts"),
        ("p.jsonl", b'{"prompt": 3}', "p.jsonl line 1: a prompt is a string, this is int"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none.txt does not exist; `prompts` takes .txt"):
        read(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="has no images; a folder of prompts holds images"):
        read(tmp_path)


LINES = [Line(text, f"line {i}") for i, text in enumerate(["a fox", "a cat", "a fox", "a very long story", "a dog"], start=1)]


def short(text: str) -> bool:
    return len(text) < 10


def test_every_prompt_that_is_left_out_or_cut_is_said() -> None:
    texts, said = usable(LINES, short, Policy())
    assert texts == ["a fox", "a cat", "a very long story", "a dog"]
    assert said == [
        "1 of 5 prompts stand there twice (line 3: 'a fox'): left out",
        "1 of 5 prompts are longer than any text encoder reads (line 4: 'a very long story'): cut",
    ]
    texts, said = usable(LINES, short, Policy(too_long="skip"))
    assert texts == ["a fox", "a cat", "a dog"] and said[1].endswith("left out")
    assert usable(LINES[:2], short, Policy()) == (["a fox", "a cat"], [])


def test_a_policy_can_refuse() -> None:
    with pytest.raises(ValueError, match="line 3: 'a fox'.*set prompt_policy.repeated=skip"):
        usable(LINES, short, Policy(repeated="refuse"))
    with pytest.raises(ValueError, match="line 4.*set prompt_policy.too_long=cut or skip"):
        usable(LINES, short, Policy(too_long="refuse"))
    with pytest.raises(ValueError, match="no prompt is left: 1 of 1 prompts are longer"):
        usable(LINES[3:4], short, Policy(too_long="skip"))


def test_a_prompt_is_too_long_when_no_encoder_reads_it_to_the_end(teacher_folder: Path) -> None:
    fits, clip = sd3.reads_to_the_end(teacher_folder, 4), tiny_pipe().tokenizer.model_max_length
    words = (clip - 2) * "a "
    assert fits("a circle") and fits(words) and not fits(words + "circle")
    assert sd3.reads_to_the_end(teacher_folder, clip + 1)(words + "circle")


def test_a_run_keeps_the_prompts_that_it_began_with(tmp_path: Path, teacher_folder: Path, capsys) -> None:
    from dataclasses import replace

    from tiny import tiny_recipe

    (tmp_path / "p.csv").write_text("prompt\na circle\na square\na circle\n")
    pipeline = replace(tiny_recipe(teacher_folder, 2), prompts=str(tmp_path / "p.csv"))
    assert material.own_prompts(pipeline, tmp_path) == ["a circle", "a square"]
    assert "prompts: 1 of 3 prompts stand there twice (p.csv line 4: 'a circle'): left out" in capsys.readouterr().err
    (tmp_path / "p.csv").unlink()
    assert material.own_prompts(pipeline, tmp_path) == ["a circle", "a square"] and not capsys.readouterr().err
