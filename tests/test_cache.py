"""What a run learns from, made beforehand: resumed, checked, mended, and taken up by the run; by another teacher, too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import HEADS, LOOKS, Call, tiny_pipe, tiny_recipe, tiny_teacher

from fewstep.data import shards, trajectories
from fewstep.engine import artifact
from fewstep.models import sd3
from fewstep.recipes import cache, execute, material, teacher
from fewstep.recipes.pipeline import Distillation
from fewstep.stages import distribution, evaluate, merge


def recipe(teacher_folder: Path, folder: Path, **changes: Any) -> Distillation:
    (folder / "prompts.txt").write_text("\n".join(f"picture {k}" for k in range(44)))
    return tiny_recipe(
        teacher_folder,
        2,
        prompts=str(folder / "prompts.txt"),
        distribution=distribution.Config(images=16, batch=4, proxy_updates=1, adversary=HEADS, health=LOOKS),
        merge=merge.Config(ratios=(0.5,), seeds=2),
        evaluate=evaluate.Config(benchmark="pictures", pictures=2, seeds=2, batch=4),
        **changes,
    )


def test_a_cache_is_what_the_run_would_make(teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = recipe(teacher_folder, tmp_path)
    manifest = cache.run(pipeline, tmp_path / "cached")
    told = json.loads(manifest.read_text())
    assert {name.partition("/")[0] for name in told} == set(cache.FOLDERS) and cache.check(tmp_path / "cached") == []
    execute.run(pipeline, tmp_path / "plain", "trajectory")
    for name in told:
        if not name.startswith("held_out"):
            assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "cached" / name).read_bytes()

    def closed(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is left to encode or to roll out")

    monkeypatch.setattr(sd3, "encode", closed)
    monkeypatch.setattr(shards, "write", closed)
    execute.run(pipeline, tmp_path / "cached", "trajectory")
    weights = [artifact.read(tmp_path / name / "02-trajectory").weights for name in ("plain", "cached")]
    assert weights[0] == weights[1]


def test_what_is_damaged_is_named_and_made_again(call: Call, teacher_folder: Path, tmp_path: Path) -> None:
    made = recipe(teacher_folder, tmp_path)
    cache.run(made, tmp_path / "c")
    told = json.loads((tmp_path / "c" / cache.MANIFEST).read_text())
    one, other = [name for name in told if name.startswith("trajectories")][0], [n for n in told if n.startswith("cond")][0]
    whole = (tmp_path / "c" / one).read_bytes()
    (tmp_path / "c" / one).write_bytes((tmp_path / "c" / one).read_bytes()[:-4] + b"abcd")
    (tmp_path / "c" / other).unlink()
    code, out, _ = call("cache", "shapes_2step", "--out", tmp_path / "c", "--check")
    assert code == 1 and f"{one} is damaged" in out and f"{other} is missing" in out and (tmp_path / "c" / one).exists()
    assert call("cache", "shapes_2step", "--out", tmp_path / "c", "--check", "--mend")[0] == 1
    cache.run(made, tmp_path / "c")
    assert cache.check(tmp_path / "c") == [] and (tmp_path / "c" / one).read_bytes() == whole
    code, _, err = call("cache", "shapes_2step", "--out", tmp_path / "none", "--check")
    assert code == 2 and "fewstep cache RECIPE" in err
    code, _, err = call("cache", "shapes_teacher")
    assert code == 2 and "nothing to cache" in err


def test_a_shard_cut_off_is_named(teacher_folder: Path, tmp_path: Path) -> None:
    pipeline = recipe(teacher_folder, tmp_path)
    cache.run(pipeline, tmp_path / "c")
    shard = next((tmp_path / "c" / "trajectories").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged .*delete it"):
        trajectories.read(tmp_path / "c" / "trajectories", pipeline.trajectory.trajectories, pipeline.grid)


def test_too_little_disk_is_refused_before_anything_is_made(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ValueError, match="of disk left"):
        cache.run(recipe(teacher_folder, tmp_path), tmp_path / "c")
    assert not (tmp_path / "c" / "trajectories").exists()


def test_another_teacher_makes_the_data(teacher_folder: Path, tmp_path: Path) -> None:
    """Trajectories are the other's, from the same noise; everything else stays the teacher's."""
    other = tiny_teacher(tmp_path / "other", seed=1)
    shutil.rmtree(other / "vae")
    shutil.copytree(teacher_folder / "vae", other / "vae")
    plain, by_other = (recipe(teacher_folder, tmp_path, data_teacher=name) for name in ("", str(other)))
    made = []
    for name, pipeline in (("a", plain), ("b", by_other)):
        cache.run(pipeline, tmp_path / name)
        made.append(material.stored(pipeline, tmp_path / name, teacher.open_for(pipeline, tmp_path / name)))
    assert torch.equal(made[0].x[:, 0], made[1].x[:, 0]) and not torch.equal(made[0].x[:, -1], made[1].x[:, -1])
    opened = teacher.open_for(plain, tmp_path / "a")
    velocity = teacher.velocity_of(other, plain.roles, opened.encode)
    trajectories.write(
        tmp_path / "own", velocity, opened.encode, lambda k: made[1].prompts[k], grid=plain.grid, latent_shape=opened.latent,
        count=6, substeps=1, solver="ab2", seed=plain.trajectory.seed,
    )  # fmt: skip
    assert torch.equal(trajectories.read(tmp_path / "own", 6, plain.grid).x, made[1].x)


def test_a_teacher_of_other_latents_makes_no_data(teacher_folder: Path, tmp_path: Path) -> None:
    pipe = tiny_pipe(seed=2)
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.add_(1.0)
    other = tmp_path / "other"
    artifact.write(other, artifact.read(teacher_folder), lambda at: sd3.save(pipe, at))
    with pytest.raises(ValueError, match="its autoencoder is another one"):
        execute.run(recipe(teacher_folder, tmp_path, data_teacher=str(other)), tmp_path / "c")
    with pytest.raises(ValueError, match="does not exist"):
        execute.run(recipe(teacher_folder, tmp_path, data_teacher=str(tmp_path / "none")), tmp_path / "c")
