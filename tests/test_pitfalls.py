"""Traps of other libraries that docs/deploy.md names: what it recommends instead is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from tiny import tiny_pipe

from fewstep.models import sd3, widths

IDS = torch.tensor([[5, 9, 3, 1, 0, 0, 0, 0]])


@pytest.mark.parametrize("whole", [True, False], ids=["block level", "leaf level of its stack"])
def test_t5_offloaded_to_disk_as_recommended_is_exact(tmp_path: Path, whole: bool) -> None:
    t5 = tiny_pipe().text_encoder_3
    with torch.no_grad():
        exact = t5(IDS)[0]
    at = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu"), "offload_to_disk_path": str(tmp_path)}
    if whole:
        apply_group_offloading(t5, offload_type="block_level", num_blocks_per_group=1, **at)
    else:  # its table has two names in the model and one here: under two, it is saved empty
        apply_group_offloading(t5.encoder, offload_type="leaf_level", **at)
    with torch.no_grad():
        assert torch.equal(t5(IDS)[0], exact)


def test_layerwise_casting_reaches_the_modulations_only_if_it_is_told() -> None:
    def share(patterns: tuple[str, ...] | None) -> float:
        network = tiny_pipe().transformer
        if patterns is not None:
            network._skip_layerwise_casting_patterns = patterns
        own = ("^proj_out$", "time_text_embed", "context_embedder")  # which are added to the class's, not put in their place
        network.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32, skip_modules_pattern=own)
        modules = dict(network.named_modules())
        cast = [modules[name].weight.dtype == torch.float8_e4m3fn for name in widths.matrices(network) if ".norm1" in name]
        return sum(cast) / len(cast)

    assert share(("pos_embed", "norm_q", "norm_k")) == 1
    assert share(None) == 0, "diffusers now casts adaLN: docs/deploy.md need not warn any more"


def test_a_pipeline_without_t5_opens_only_if_told(tmp_path: Path) -> None:
    pipe = tiny_pipe()
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError):
        type(pipe).from_pretrained(tmp_path)
    assert sd3.absent(tmp_path) == ["text_encoder_3", "tokenizer_3"]
    assert sd3.load(tmp_path).text_encoder_3 is None
