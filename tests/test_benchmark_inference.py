"""`benchmarks/inference.py`: contenders draw the same images, ratios are of the same rounds, and its tables are its figures."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from test_benchmarks import load

from fewstep import noise
from fewstep.data import prompts


@pytest.fixture(scope="module")
def inference() -> ModuleType:
    return load("inference")


@pytest.fixture(scope="module")
def calls(inference: ModuleType) -> dict[str, object]:
    return inference.contenders(False)


def test_ours_and_stock_draw_the_same_images(inference: ModuleType, calls) -> None:
    texts = prompts.reported(None, 2)
    latents = noise.normal((16, 8, 8), seed=0, index=range(2), step=0)
    ours = np.stack([one.image for one in calls[inference.OURS](texts, latents)]).astype(float)
    stock, known = calls[inference.STOCK](texts, latents), calls[inference.STOCK_KNOWN](texts, latents)
    assert np.abs(ours - 255 * stock).max() <= 1 and np.array_equal(stock, known)
    assert stock.std() > 0.05
    guided, its_known = calls[inference.GUIDED](texts, latents), calls[inference.GUIDED_KNOWN](texts, latents)
    assert np.array_equal(guided, its_known) and np.abs(guided - stock).max() > 0.1


def test_every_contender_runs_in_every_round_on_the_same_prompts(inference: ModuleType) -> None:
    seen: dict[str, list[tuple[str, ...]]] = {}

    def runner(name: str):
        return lambda texts, latents: seen.setdefault(name, []).append((*texts, str(float(latents.sum()))))

    names = (inference.OURS, inference.STOCK, inference.OURS_KNOWN, inference.STOCK_KNOWN)
    seconds = inference.race({name: runner(name) for name in names}, 2, 3)
    for held in seconds:
        assert {name: len(taken) for name, taken in held.items()} == dict.fromkeys(names, 3)
    assert seen[inference.OURS] == seen[inference.STOCK] and len(set(seen[inference.OURS])) == 5
    assert set(seen[inference.OURS_KNOWN]) == set(seen[inference.STOCK_KNOWN]) == {seen[inference.OURS][0]}


def test_ratios_are_taken_round_by_round(inference: ModuleType) -> None:
    seconds = {inference.OURS: [1.0, 2.0, 4.0], inference.STOCK: [2.0, 6.0, 16.0]}
    found = inference.figures(inference.Taken(seconds, {name: [1.0, 1.0, 2.0] for name in seconds}), 8)
    assert found[inference.STOCK]["times_ours_of_processor"] == {"p5": 1.0, "p50": 1.0, "p95": 1.0}
    assert found[inference.STOCK]["times_ours"]["p50"] == 3.0 and found[inference.STOCK]["ms"]["p50"] == 6000.0
    assert found[inference.OURS]["images_a_second"] == 4.0


def test_the_tables_are_written_between_their_marks(inference: ModuleType, tmp_path: Path) -> None:
    clock, processor = {inference.OURS: [0.05] * 2, inference.STOCK: [0.1] * 2}, {inference.OURS: [1], inference.STOCK: [3]}
    rows = inference.figures(inference.Taken(clock, processor), 1)
    record = {
        "hardware": {"device": "a processor", "threads": 1, "torch": "2"},
        "load_before": [0.5, 0, 0],
        "rounds": 2,
        "dtype": "float32",
        "batches": {"1": rows},
        "fresh": {"ours, batch 1": {"to_first_image_s": 2.5, "open_s": 0.5, "peak_mib": 700.0}},
    }
    page = tmp_path / "inference.md"
    page.write_text(f"before\n{inference.BEGIN}\nold\n{inference.END}\nafter\n")
    inference.write(record, page)
    inference.write(record, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| stock, 4 steps | 100.0 (100.0 to 100.0) | 2.00 (2.00 to 2.00) | 3.00 (3.00 to 3.00) | 10.0 |" in text
    assert "| ours, batch 1 | 2.5 | 0.5 | 700 |" in text and text.count("a processor") == 1


def test_the_first_image_is_timed_and_the_most_memory_taken(inference: ModuleType) -> None:
    found = {who: inference.first_image(who) for who in ("ours", "stock")}
    for figures in found.values():
        assert figures["peak_mib"] > 100 and 0 < figures["fourth_s"] and 0 < figures["open_s"]


def test_a_full_size_run_of_a_tiny_network_takes_the_same_path(inference: ModuleType, monkeypatch) -> None:
    monkeypatch.setattr(inference, "STEPS", 2)
    monkeypatch.setattr(inference, "_matrix_rate", lambda device: 1.0)
    monkeypatch.setattr(inference.torch, "bfloat16", inference.torch.float32)  # the tests are held to AVX2
    found = inference.full_size("tiny", 64, "cpu")
    assert set(found["ms"]) == {"ours, 4 steps", "stock, 4 steps", "stock, 28 guided steps"}
    assert found["share_of_matrix_rate"] == pytest.approx(4 * found["forward_tflop"] / (found["denoise_ms"] / 1000), rel=1e-6)

