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
    assert seen[inference.OURS] == seen[inference.STOCK] and len(set(seen[inference.OURS])) == 2 * 5, "each turn is two calls"
    assert set(seen[inference.OURS_KNOWN]) == set(seen[inference.STOCK_KNOWN]) == {seen[inference.OURS][1]}


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
        "fresh": {
            "fewstep generate, batch 1": {"seconds": 5.5, "peak_mib": 800.0},
            "engine alone, batch 1": {"seconds": 2.5, "peak_mib": 700.0},
            "stock script, batch 1": {"seconds": 2.0, "peak_mib": 700.4},
        },
    }
    page, tables = tmp_path / "inference.md", load("inference_table")
    page.write_text(f"before\n{tables.BEGIN}\nstale\n{tables.END}\nafter\n")
    inference.write(record, page)
    inference.write(record, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert "| stock, 4 steps | 100.0 (100.0 to 100.0) | 2.00 (2.00 to 2.00) | 3.00 (3.00 to 3.00) | 10.0 |" in text
    assert "| engine alone, batch 1 | 2.5 | 700 |" in text and text.count("a processor") == 1
    assert "| batch of 1: at least 1.3 times as fast as stock, 4 steps | 3.00 | pass |" in text
    assert "cold start: under 5 s | 5.5 s (stock script 2.0 s) | **fail** |" in text
    assert "the engine takes no more memory than stock | 700 of 700 MiB | pass |" in text
    assert "`fewstep generate` takes no more memory than stock | 800 of 700 MiB | **fail** |" in text


def test_cold_processes_are_timed_and_their_own_memory_is_taken(inference: ModuleType) -> None:
    hoard = np.ones(2**27)  # 1 GiB of the process that starts them is not theirs
    for who in (inference.COMMAND, inference.SCRIPT):
        found = inference.fresh(who, 1, 1)
        assert 100 < found["peak_mib"] < hoard.nbytes / 2**20 and found["seconds"] > 0


def test_the_stock_script_is_given_none_of_our_imports(inference: ModuleType) -> None:
    assert "fewstep" not in inference.ALONE[inference.SCRIPT]


def test_a_full_size_run_of_a_tiny_network_takes_the_same_path(inference: ModuleType, monkeypatch) -> None:
    monkeypatch.setattr(inference, "STEPS", 2)
    monkeypatch.setattr(inference, "_matrix_rate", lambda device: 1.0)
    monkeypatch.setattr(inference.torch, "bfloat16", inference.torch.float32)  # the tests are held to AVX2
    found = inference.full_size("tiny", 64, "cpu")
    assert set(found["ms"]) == {"ours, 4 steps", "stock, 4 steps", "stock, 28 guided steps"}
    assert found["share_of_matrix_rate"] == pytest.approx(4 * found["forward_tflop"] / (found["denoise_ms"] / 1000), rel=1e-6)

