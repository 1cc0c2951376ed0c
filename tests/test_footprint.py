"""The memory of inference: known counts, the arithmetic against files and tensors, and what each way to hold parts saves."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from fewstep.engine import artifact
from fewstep.models import architectures, canonical, eight_bit, sd3
from fewstep.recipes import footprint
from fewstep.recipes.footprint import CONTEXT, FORMATS, GIB, WAYS, Part, Row
from fewstep.worlds import shapes


@pytest.fixture(scope="module")
def medium() -> dict[str, Part]:
    return footprint.components("medium")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return footprint.table("medium")


@pytest.fixture(scope="module")
def bundled() -> dict[str, Part]:
    return footprint.components(shapes.STUDENT_4)


def test_counts_of_sd35_medium_are_the_known_ones(medium) -> None:
    transformer = medium["trunk"] + medium["adaLN"]
    assert transformer.numbers == 2_243_171_520 and transformer.weights == 2_222_456_832
    assert medium["adaLN"].numbers == 762_548_736
    assert medium["table"].numbers == 226_492_416 and medium["table, cropped"].numbers == 64 * 64 * 1536
    assert medium["decoder"].numbers == 49_545_475
    assert medium["decoder"].numbers + medium["encoder"].numbers == architectures.AUTOENCODER_WEIGHTS == 83_819_683
    linears = {"CLIP-L": 85_524_480, "CLIP-G": 630_784_000, "T5": 4_630_511_616}
    for name, numbers in zip(linears, architectures.ENCODER_WEIGHTS.values(), strict=True):
        assert (medium[name].numbers, medium[name].weights) == (numbers, linears[name])
    assert medium["T5"].numbers == 4_762_310_656


def test_counts_of_sd35_large() -> None:
    large = footprint.components("large")
    assert (large["trunk"] + large["adaLN"]).numbers == 8_056_627_520
    assert large["table"].numbers == 192 * 192 * 2432


@pytest.mark.parametrize(
    "form, transformer, t5, everything, without_t5, small, alone, freed",
    [
        ("16 bits", 4.18, 8.87, 15.15, 6.28, 5.81, 4.28, 2.86),
        ("int8 rows", 2.11, 4.56, 8.11, 3.55, 3.07, 2.22, 1.50),
        ("Q8_0", 2.24, 4.83, 8.54, 3.71, 3.24, 2.34, 1.59),
        ("Q6_K", 1.74, 3.78, 6.83, 3.05, 2.58, 1.84, 1.26),
        ("6-bit LUT", 1.59, 3.49, 6.35, 2.86, 2.39, 1.70, 1.16),
        ("Q4_0", 1.20, 2.67, 5.02, 2.35, 1.87, 1.31, 0.91),
    ],
)
def test_weights_are_those_that_were_counted_before(
    medium, form, transformer, t5, everything, without_t5, small, alone, freed
) -> None:
    """The arithmetic of an earlier count by another way; it took 6.01 and 6.56 bits where ours are exact."""

    def gib(*without: str, cropped: bool = False) -> float:
        return footprint.weights(medium, form, without, cropped) / GIB

    bits, encoders = FORMATS[form], footprint.ENCODERS
    assert (medium["trunk"] + medium["adaLN"]).bytes(bits) / GIB == pytest.approx(transformer, abs=0.01)
    assert medium["T5"].bytes(bits) / GIB == pytest.approx(t5, abs=0.01)
    assert gib() == pytest.approx(everything, abs=0.01)
    assert gib("T5") == pytest.approx(without_t5, abs=0.01)
    assert gib("T5", "encoder", cropped=True) == pytest.approx(small, abs=0.01)
    assert gib(*encoders, "encoder", cropped=True) == pytest.approx(alone, abs=0.01)
    assert gib(*encoders, "encoder", "adaLN", cropped=True) == pytest.approx(freed, abs=0.01)


def test_bits_of_the_formats() -> None:
    matrix = Part(1536 * 1536, 1536 * 1536, 1536, 1)
    each = {form: 8 * matrix.bytes(bits) / matrix.numbers for form, bits in FORMATS.items()}
    assert each["int8 rows"] == pytest.approx(8.01, abs=0.001) and each["6-bit LUT"] == pytest.approx(6.01, abs=0.002)
    assert each["16 bits"] == 16 and each["Q8_0"] == 8.5 and each["Q6_K"] == 6.5625 and each["Q4_0"] == 4.5
    assert Part(10, 0, 0, 0).bytes(FORMATS["Q4_0"]) == 20


def numbers(network: nn.Module) -> int:
    return sum(t.numel() * t.itemsize for t in (*network.parameters(), *network.buffers()))


def test_the_bundled_students_files_are_as_large_as_counted(bundled) -> None:
    """Transformer and autoencoder are stored in 16 bits, text encoders in 32."""

    def stored(folder: str) -> int:
        return sum(file.stat().st_size for file in (shapes.STUDENT_4 / folder).glob("*.safetensors"))

    sixteen = {name: part.bytes(FORMATS["16 bits"]) for name, part in bundled.items()}
    assert sixteen["trunk"] + sixteen["adaLN"] + sixteen["table"] == pytest.approx(stored("transformer"), rel=0.02)
    assert sixteen["encoder"] + sixteen["decoder"] == pytest.approx(stored("vae"), rel=0.02)
    for name, folder in zip(footprint.ENCODERS, sd3.ENCODERS, strict=True):
        assert 2 * sixteen[name] == pytest.approx(stored(folder), rel=0.02)


def test_the_bundled_students_tensors_are_as_large_as_counted(bundled) -> None:
    network = sd3.load(shapes.STUDENT_4, torch.bfloat16, ("vae", *sd3.ENCODERS)).transformer
    whole = bundled["trunk"] + bundled["adaLN"] + bundled["table"]
    assert whole.bytes(FORMATS["16 bits"]) == numbers(network)
    eight_bit.quantize(network)
    held = numbers(network) - sum(p.numel() * p.itemsize for p in network.parameters() if type(p) is not nn.Parameter)
    for module in network.modules():
        if isinstance(module, nn.Linear) and type(module.weight.data) is not torch.Tensor:
            held += sum(t.numel() * t.itemsize for t in (module.weight.data.qdata, module.weight.data.scale))
    assert whole.bytes(FORMATS["int8 rows"]) == pytest.approx(held, rel=0.02)


def test_the_cropped_table_is_canonicals() -> None:
    network = sd3.load(shapes.STUDENT_4, without=("vae", *sd3.ENCODERS)).transformer
    assert footprint.components(shapes.STUDENT_4)["table, cropped"].numbers == network.pos_embed.pos_embed.numel()
    assert canonical.cropped(network, 2).pos_embed.pos_embed.numel() == 2 * 2 * network.inner_dim


def test_what_passes_need_is_what_was_measured() -> None:
    """Measured at full size on a CPU in bfloat16: the transformer 0.18 GiB at 1024 pixels, decoding 2.00 and 0.51."""
    large, small = (footprint.activations("medium", size, of=("transformer", "decoder")) for size in (1024, 512))
    assert large["transformer"] / GIB == pytest.approx(0.18, abs=0.02)
    assert 0.04 <= small["transformer"] / GIB <= 0.09
    assert large["decoder"] / GIB == pytest.approx(2.00, abs=0.02) and small["decoder"] / GIB == pytest.approx(0.51, abs=0.02)


def test_two_blocks_need_what_all_of_them_need(monkeypatch) -> None:
    few = footprint.activations(shapes.STUDENT_4, 64, 12, of=("transformer",))
    build = footprint._transformer
    monkeypatch.setattr(footprint, "_transformer", lambda config, shallow: build(config, False))
    assert footprint.activations(shapes.STUDENT_4, 64, 12, of=("transformer",)) == few


def test_each_way_takes_no_more_than_the_one_before(rows) -> None:
    for size in (512, 1024):
        for t5 in (True, False):
            chosen = [row for row in rows if row.pixels == size and row.t5 == t5]
            assert [row.how for row in chosen] == list(WAYS[: 6 if size == 1024 else 5])
            for form in FORMATS:
                peaks = [row.peak[form] for row in chosen]
                assert peaks == sorted(peaks, reverse=True)


def test_peaks_by_hand(rows, medium) -> None:
    first = next(row for row in rows if row.pixels == 1024 and row.t5)
    assert first.peak["16 bits"] / GIB == pytest.approx(15.15 + 2.0 + 0.5, abs=0.02)
    last = [row for row in rows if row.pixels == 1024 and not row.t5][-1]
    trunk = medium["trunk"].bytes(FORMATS["Q4_0"]) + medium["table, cropped"].bytes(FORMATS["Q4_0"])
    assert last.fullest["Q4_0"] == "denoise"
    assert last.peak["Q4_0"] / GIB == pytest.approx((trunk + CONTEXT) / GIB + 0.167, abs=0.01)
    released = next(row for row in rows if row.pixels == 1024 and row.t5 and row.how == WAYS[1])
    assert released.fullest["16 bits"] == "encode" and released.fullest["Q4_0"] == "draw"


def test_the_printed_table(rows, medium) -> None:
    text = footprint.show(rows, medium)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "T5                       4,762,310,656" in text and "GiB at peak, 1024 pixels, without T5" in text
    told = footprint.readings(rows, medium)
    assert all(len(line) <= 128 for line in told.splitlines())
    assert "16 bits 15.15 (17.7) -> int8 rows 8.11" in told and "16 bits without T5 6.28 (8.8)" in told


def test_a_folder_is_enough_without_weights_and_without_encoders(tmp_path: Path) -> None:
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        shutil.copy(shapes.STUDENT_4 / part / "config.json", tmp_path / part)
    found = footprint.table(tmp_path)
    assert {row.pixels for row in found} == {64} and not any(row.t5 for row in found)
    assert "encode" not in found[1].fullest.values()
    assert "MiB at peak, 64 pixels, without T5" in footprint.show(found)
    whole = footprint.table(shapes.STUDENT_4, [32])
    assert {(row.pixels, row.t5) for row in whole} == {(32, True), (32, False)}
    assert whole[0].peak["16 bits"] > found[0].peak["16 bits"]
    record = dataclasses.replace(artifact.read(shapes.STUDENT_4), t5_tokens=0)
    (tmp_path / artifact.RECORD).write_text(json.dumps(dataclasses.asdict(record)))
    shutil.copytree(shapes.STUDENT_4 / "text_encoder_3", tmp_path / "text_encoder_3")
    assert not any(row.t5 for row in footprint.table(tmp_path, [64]))


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a pipeline folder, or one of medium, large"):
        footprint.components(tmp_path)
    for size in (8, 56, 128):
        with pytest.raises(ValueError, match="this network draws multiples of 16 up to 64"):
            footprint.table(shapes.STUDENT_4, [size])
