"""Text encoders' forward passes for prompts that are new: what transformers' own look up and shape anew each time is left out.

Of a small encoder that is most of the time. The modules stay transformers' own, and up to rounding so do the results (tested).
Only encoders in float32 on a CPU are taken; others are run by their own `forward`.

Shapes: P prompts, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from fewstep.serve.products import Product, attend, gelu, joined, plain, product, rms_normed

OLD_EOS = 2  # of configurations from before it was told rightly: there the end is the token with the highest number
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")


def prepare(pipe: Any) -> SimpleNamespace:
    """A pipeline's tokenizers and text encoders for `sd3.encode`, those replaced by `Clip` and `T5` that they can stand for.

    `alone` says whether a prompt's condition is the same where it is encoded alone: the others' matrices are not turned round.

    On a CPU pooled features are projected prompt by prompt in either case: a batch gives no other numbers there than prompts.
    """
    names = ("tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer")
    found = SimpleNamespace(**{name: getattr(pipe, name) for name in names})
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(found, name)
        if fits(encoder, CLIPTextModelWithProjection):
            setattr(found, name, Clip(encoder))
        elif encoder is not None and encoder.device.type == "cpu":
            encoder.text_projection = RowByRow(encoder.text_projection)
    if fits(found.text_encoder_3, T5EncoderModel):
        found.text_encoder_3 = T5(found.text_encoder_3)
    encoders = (found.text_encoder, found.text_encoder_2, found.text_encoder_3)
    found.alone = all(isinstance(encoder, Clip | T5 | None) for encoder in encoders)
    return found


def fits(encoder: Any, kind: type[Any]) -> bool:
    """Whether an encoder is of a kind that is run here: in float32, not rounded, on a CPU."""
    if type(encoder) is not kind or encoder.device.type != "cpu" or encoder.dtype != torch.float32:
        return False
    matrices = [module for module in encoder.modules() if isinstance(module, nn.Linear)]
    return all(plain(matrix) and matrix.weight.dtype == torch.float32 for matrix in matrices)


class RowByRow(nn.Module):
    """A matrix that is given its rows one at a time, because its last bits depend on how many rows there are."""

    def __init__(self, matrix: Product) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        """(B, in) to (B, out)."""
        return torch.cat([self.matrix(row) for row in x.split(1)])


class Clip:
    """A CLIP text encoder with its projection, called as transformers' own is."""

    def __init__(self, encoder: CLIPTextModelWithProjection) -> None:
        self.config, self.device = encoder.config, encoder.device
        model = encoder.text_model
        self._tokens = model.embeddings.token_embedding.weight
        self._positions = model.embeddings.position_embedding.weight
        self._layers = [_clip_layer(layer) for layer in model.encoder.layers]
        self._last, self._project = model.final_layer_norm, RowByRow(product(encoder.text_projection))

    def __call__(self, ids: Tensor, output_hidden_states: bool = True) -> CLIPTextModelOutput:
        """Token ids (P, L): pooled and projected features (P, D'), and hidden states (P, L, D) around every layer."""
        x = F.embedding(ids, self._tokens) + self._positions[: ids.shape[1]]
        states = [x]
        for layer in self._layers:
            states.append(layer(states[-1]))
        eos = self.config.eos_token_id
        end = (ids if eos == OLD_EOS else (ids == eos).int()).argmax(-1)
        pooled = self._last(states[-1])[torch.arange(len(ids)), end]
        return CLIPTextModelOutput(text_embeds=self._project(pooled), hidden_states=tuple(states))


class T5:
    """A T5 encoder, called as transformers' own is."""

    def __init__(self, encoder: T5EncoderModel) -> None:
        self.config, self.device = encoder.config, encoder.device
        stack = encoder.encoder
        self._tokens, self._last = stack.embed_tokens.weight, stack.final_layer_norm
        self._bias_of = stack.block[0].layer[0].SelfAttention.compute_bias
        self._bias: Tensor | None = None
        self._layers = [_t5_layer(*block.layer) for block in stack.block]

    def __call__(self, ids: Tensor) -> BaseModelOutput:
        """Token ids (P, L) to features (P, L, D)."""
        x, length = F.embedding(ids, self._tokens), ids.shape[1]
        if self._bias is None or self._bias.shape[-1] != length:
            self._bias = self._bias_of(length, length)
        for layer in self._layers:
            x = layer(x, self._bias)
        return BaseModelOutput(last_hidden_state=_scaled(self._last, x))


def _clip_layer(layer: Any) -> Callable[[Tensor], Tensor]:
    attention, mlp = layer.self_attn, layer.mlp
    read, out = joined(attention.q_proj, attention.k_proj, attention.v_proj), product(attention.out_proj)
    up, down, act = product(mlp.fc1), product(mlp.fc2), mlp.activation_fn

    def run(x: Tensor) -> Tensor:
        q, k, v = _heads(read(layer.layer_norm1(x)), attention.num_heads)
        x = x + out(attend(q, k, v, is_causal=True))
        return x + down(act(up(layer.layer_norm2(x))))  # type: ignore[no-any-return]

    return run


def _t5_layer(first: Any, second: Any) -> Callable[[Tensor, Tensor], Tensor]:
    attention, feed = first.SelfAttention, second.DenseReluDense
    read, out, down = joined(attention.q, attention.k, attention.v), product(attention.o), product(feed.wo)
    gated = hasattr(feed, "wi_0")
    up = joined(feed.wi_0, feed.wi_1) if gated else product(feed.wi)
    act = gelu if attention.config.dense_act_fn in GELU_TANH else feed.act

    def run(x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = _heads(read(_scaled(first.layer_norm, x)), attention.n_heads)
        x = x + out(attend(q, k, v, attn_mask=bias, scale=1.0))
        wide = up(_scaled(second.layer_norm, x))
        if gated:
            gate, wide = wide.chunk(2, dim=-1)
            return x + down(act(gate) * wide)  # type: ignore[no-any-return]
        return x + down(act(wide))  # type: ignore[no-any-return]

    return run


def _scaled(norm: Any, x: Tensor) -> Tensor:
    """A norm of T5: no mean, no shift."""
    return rms_normed(x, norm.variance_epsilon) * norm.weight


def _heads(read: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(P, L, 3 A K) to queries, keys and values (P, A, L, K)."""
    q, k, v = read.view(*read.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v
