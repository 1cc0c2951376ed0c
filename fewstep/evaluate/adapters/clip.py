"""Scores that read images, or prompts and images, by a CLIP: CLIPScore, PickScore, HPSv2.1, and LAION's aesthetic score.

They are one network with different weights, preprocessing and scale; each is named with all three, because papers differ in
them. Everything runs in float32 (upstream HPSv2 computes in float16 on a GPU: differences of about 1e-3).

clip_score  100 max(0, cos), as torchmetrics reports it (Hessel et al. 2021 scale by 2.5). By default CLIP ViT-L/14 of OpenAI.
pick_score  exp(logit_scale) cos by a tuned CLIP ViT-H/14 (Kirstain et al. 2023): the logits, not their softmax.
hps_v2.1    cos by a tuned CLIP ViT-H/14 (Wu et al. 2023), longer side to 224 with black bars.
aesthetic   five linear layers upon the normalised image embedding of OpenAI's CLIP ViT-L/14 (LAION's
            improved-aesthetic-predictor), about 1 to 10. It reads no prompt.
clip        that embedding, normalised: features for CMMD and the like.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.evaluate.adapters import open_clip, tiny
from fewstep.evaluate.adapters.parts import (
    BATCH,
    CLIP_MEAN,
    CLIP_STD,
    Adapter,
    Found,
    Measure,
    Pixels,
    Source,
    barred,
    cropped,
    device,
    in_batches,
    model_folder,
    snapshot,
    weights_file,
)

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
NETWORK = ("config.json", "model.safetensors")
LARGE = Source("openai/clip-vit-large-patch14", (*NETWORK, *TOKENIZER), "MIT (code); the card asks for research use")
PICK = Source("yuvalkirstain/PickScore_v1", (*NETWORK, *TOKENIZER), "MIT (repository)")
WORDS = Source("openai/clip-vit-large-patch14", TOKENIZER, "MIT")
CONVERT = "python examples/convert_pt.py FILE {path}"
HPS = f"hf download xswu/HPSv2 HPS_v2.1_compressed.pt (Apache-2.0), then {CONVERT}"
HEAD = (
    "Get sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor (Apache-2.0), then "
    + CONVERT
)
WIDTHS = (1024, 128, 64, 16, 1)  # of the aesthetic head
NAMED = 3  # prompts that a warning lists


def embed_images(model: Any, pixels: Tensor) -> Tensor:
    """Normalised embeddings (N, D) of prepared images (N, 3, H, W)."""
    found: Tensor = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    return torch.nn.functional.normalize(found, dim=-1)


def embed_texts(model: Any, tokens: Tensor) -> Tensor:
    """Normalised embeddings (N, D) of token ids (N, L); padding comes after the end and is not seen (attention is causal)."""
    found: Tensor = model.text_projection(model.text_model(input_ids=tokens).pooler_output)
    return torch.nn.functional.normalize(found, dim=-1)


class Cut(UserWarning):
    """Prompts whose ends are not scored.

    Attributes:
        lengths: tokens of each such prompt.
        limit: tokens that the network reads.
    """

    def __init__(self, lengths: Mapping[str, int], prompts: int, limit: int) -> None:
        few = "; ".join(f"{text[:60]!r} ({length} tokens)" for text, length in list(lengths.items())[:NAMED])
        more = f" and {len(lengths) - NAMED} more" if len(lengths) > NAMED else ""
        said = f"{len(lengths)} of {prompts} prompts are longer than the {limit} tokens that CLIP reads"
        super().__init__(f"{said}; their ends do not count: {few}{more}")
        self.lengths, self.limit = dict(lengths), limit


def together(cuts: Sequence[Cut], prompts: int) -> list[str]:
    """The warnings of many calls as one, about so many prompts; none if there are none."""
    lengths = {text: length for cut in cuts for text, length in cut.lengths.items()}
    return [str(Cut(lengths, prompts, cuts[0].limit))] if cuts else []


def tokens_of(tokenizer: Any, prompts: Sequence[str], limit: int) -> Tensor:
    """Token ids (N, L), L at most `limit`; the warning `Cut` names the prompts that are cut."""
    lengths = [len(ids) for ids in tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]]
    cut = {text: length for text, length in zip(prompts, lengths, strict=True) if length > limit}
    if cut:
        warnings.warn(Cut(cut, len(set(prompts)), limit), stacklevel=3)
    found = tokenizer(list(prompts), padding="longest", truncation=True, max_length=limit, return_tensors="pt")
    ids: Tensor = found["input_ids"]
    return ids


def cosines(model: Any, tokenizer: Any, prepare: Any) -> Measure:
    """Cosine of the embeddings of each image and its own prompt, (N,) float64 in [-1, 1]."""
    model.to(device())

    def measure(images: Sequence[Pixels], prompts: Sequence[str]) -> Tensor:
        read = tokens_of(tokenizer, prompts, model.config.text_config.max_position_embeddings)
        with torch.no_grad():
            texts = [embed_texts(model, ids.to(device())).cpu() for ids in read.split(BATCH)]
        seen = in_batches(images, prepare, lambda pixels: embed_images(model, pixels))
        return (seen.double() * torch.cat(texts).double()).sum(-1)

    return measure


def clipscore(model: Any, tokenizer: Any) -> Measure:
    """100 max(0, cos)."""
    cosine = cosines(model, tokenizer, _cropped_for(model))
    return lambda images, prompts: 100 * cosine(images, prompts).clamp_min(0)


def pickscore(model: Any, tokenizer: Any) -> Measure:
    """exp(logit_scale) cos."""
    cosine, scale = cosines(model, tokenizer, _cropped_for(model)), float(model.logit_scale.double().exp())
    return lambda images, prompts: scale * cosine(images, prompts)


def hps(model: Any, tokenizer: Any) -> Measure:
    """Cosine, of images that are seen whole."""
    size = model.config.vision_config.image_size
    return cosines(model, tokenizer, lambda image: barred(image, size, CLIP_MEAN, CLIP_STD))


def features(model: Any) -> Measure:
    """Normalised image embeddings (N, D); prompts are not read."""
    prepare = _cropped_for(model)
    model.to(device())
    return lambda images, _: in_batches(images, prepare, lambda pixels: embed_images(model, pixels))


def aesthetic(model: Any, head: Mapping[str, Tensor]) -> Measure:
    """What the linear layers of a head say of image embeddings, (N,) float64.

    Raises:
        ValueError: a head of another architecture, or for another CLIP.
    """
    names = sorted({name.rpartition(".")[0] for name in head}, key=lambda name: int(name.rpartition(".")[2]))
    width, shapes = model.config.projection_dim, []
    for wide in WIDTHS:
        shapes.append((wide, width))
        width = wide
    if [tuple(head[f"{name}.weight"].shape) for name in names] != shapes:
        raise ValueError(f"aesthetic: the head's layers are {[tuple(head[f'{n}.weight'].shape) for n in names]}, not {shapes}: "
                         "give the head of LAION's sac+logos+ava1-l14-linearMSE, and CLIP ViT-L/14 of OpenAI")
    layers = [(head[f"{name}.weight"].double(), head[f"{name}.bias"].double()) for name in names]
    embed = features(model)

    def measure(images: Sequence[Pixels], prompts: Sequence[str]) -> Tensor:
        value = embed(images, prompts).double()
        for weight, bias in layers:
            value = value @ weight.T + bias
        return value[:, 0]

    return measure


def _cropped_for(model: Any) -> Any:
    size = model.config.vision_config.image_size
    return lambda image: cropped(image, size, size, CLIP_MEAN, CLIP_STD)


def _model(folder: Path) -> Any:
    from transformers import CLIPModel

    opened = CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    return opened.eval().requires_grad_(False)


def _tokenizer(folder: Path | None) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _words(folder: Path, what: str) -> Path:
    """The folder of a tokenizer: the network's own, or that of OpenAI's CLIP, which all of these networks share."""
    own = (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
    return folder if own else snapshot(WORDS, what)


def _find(source: Source, what: str) -> Any:
    def find(named: Path | str | None) -> Found:
        folder = model_folder(source, named, what)
        return Found(folder, _words(folder, what))

    return find


def _find_hps(named: Path | str | None) -> Found:
    file = weights_file(named, "hps_v2.1", HPS)
    return Found(file, _words(file.parent, "hps_v2.1"))


def _find_aesthetic(named: Path | str | None) -> Found:
    if named is not None and Path(named).is_dir():
        head = weights_file(Path(named) / "head.safetensors", "aesthetic", HEAD)
        return Found(model_folder(LARGE, named, "aesthetic"), head=head)
    head = weights_file(named, "aesthetic", HEAD)
    return Found(snapshot(LARGE, "aesthetic"), head=head)


def _load_hps(found: Found) -> Measure:
    from safetensors.torch import load_file

    tokenizer = _tokenizer(found.tokenizer)
    return hps(open_clip.build(load_file(found.model), 16, 16, tokenizer.eos_token_id), tokenizer)


def _load_aesthetic(found: Found) -> Measure:
    from safetensors.torch import load_file

    return aesthetic(_model(found.model), load_file(str(found.head)))


CROP = "shorter side to 224 by Pillow's bicubic, centre crop"
ADAPTERS = (
    Adapter(
        name="clip_score",
        kind="pair",
        about={"scale": "100 max(0, cos)", "preprocessing": CROP},
        licence=LARGE.licence,
        find=_find(LARGE, "clip_score"),
        load=lambda found: clipscore(_model(found.model), _tokenizer(found.tokenizer)),
        tiny=lambda: clipscore(*tiny.clip()),
    ),
    Adapter(
        name="pick_score",
        kind="pair",
        about={"scale": "exp(logit_scale) cos", "preprocessing": CROP},
        licence=PICK.licence,
        find=_find(PICK, "pick_score"),
        load=lambda found: pickscore(_model(found.model), _tokenizer(found.tokenizer)),
        tiny=lambda: pickscore(*tiny.clip()),
    ),
    Adapter(
        name="hps_v2.1",
        kind="pair",
        about={"scale": "cos", "preprocessing": "longer side to 224 by bicubic on floats with antialiasing, black bars"},
        licence="Apache-2.0",
        find=_find_hps,
        load=_load_hps,
        tiny=lambda: hps(*tiny.clip()),
    ),
    Adapter(
        name="aesthetic",
        kind="image",
        about={"scale": "about 1 to 10", "preprocessing": CROP},
        licence="Apache-2.0 (head); " + LARGE.licence,
        find=_find_aesthetic,
        load=_load_aesthetic,
        tiny=lambda: aesthetic(tiny.clip()[0], tiny.head(WIDTHS)),
    ),
    Adapter(
        name="clip",
        kind="features",
        about={"scale": "unit length", "preprocessing": CROP},
        licence=LARGE.licence,
        find=lambda named: Found(model_folder(LARGE, named, "clip")),
        load=lambda found: features(_model(found.model)),
        tiny=lambda: features(tiny.clip()[0]),
    ),
)
