"""The bundled teacher before training: SD3.5's own classes, tiny, with tokenizers for the closed vocabulary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from string import ascii_lowercase

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from fewstep.worlds.shapes.grammar import MAX_WORDS, vocabulary

MAX_TOKENS = MAX_WORDS + 2
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Architecture:
    """Sizes of the bundled teacher. Joint attention runs over 16 image tokens and twice 12 text tokens.

    Attributes:
        width: transformer width; a multiple of 64. In a given time 128 learns more than 192 (docs/LOG.md, 2026-11-24).
        layers: joint blocks.
        dual_layers: how many of the first blocks have the second, image-only attention of SD3.5-Medium.
        clip_l_width, clip_g_width, t5_width: encoder widths; the first two must fit in the third.
        encoder_layers: of each encoder, at least 2 (SD3 reads the last but one).

    Raises:
        ValueError: sizes that no network can have, by their name.
    """

    width: int = 128
    layers: int = 6
    dual_layers: int = 2
    clip_l_width: int = 64
    clip_g_width: int = 128
    t5_width: int = 192
    encoder_layers: int = 2

    def __post_init__(self) -> None:
        sizes = {"width": 64, "clip_l_width": 32, "clip_g_width": 32, "t5_width": 32}  # widths of attention heads
        for name, head in sizes.items():
            size = getattr(self, name)
            if size < head or size % head:
                raise ValueError(f"{name} = {size}: give a multiple of {head}, which is the width of an attention head")
        if self.clip_l_width + self.clip_g_width > self.t5_width:
            both = self.clip_l_width + self.clip_g_width
            raise ValueError(f"clip_l_width + clip_g_width = {both} exceeds t5_width {self.t5_width}")
        if not 0 <= self.dual_layers <= self.layers or self.layers < 1:
            raise ValueError(f"dual_layers = {self.dual_layers}, layers = {self.layers}: give 0 to `layers`, and 1 or more")
        if self.encoder_layers < 2:
            raise ValueError(f"encoder_layers = {self.encoder_layers}: SD3 reads the last but one, give at least 2")


def clip_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer in which every word of the grammar is one token; other words fall apart into letters."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=EOS))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        # Letters that end a word would get numbers in an order that changes from process to process, and a training
        # that resumes would read other words.
        special_tokens=[BOS, EOS, *(f"{letter}</w>" for letter in ascii_lowercase)],
        vocab_size=2000,
        end_of_word_suffix="</w>",
        initial_alphabet=list(ascii_lowercase),
        show_progress=False,
    )
    letters = [" ".join(ascii_lowercase)]
    bpe.train_from_iterator([" ".join(vocabulary())] * 4 + letters, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=MAX_TOKENS)


def t5_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer in which every word of the grammar is one piece; other words fall apart into letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(f"▁{word}", -2.0) for word in vocabulary()]
    pieces += [(letter, -10.0) for letter in ascii_lowercase]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)


def t5_encoder(architecture: Architecture, vocabulary_size: int) -> T5EncoderModel:
    """An untrained T5 encoder that sees the order of words."""
    a = architecture
    config = T5Config(
        vocab_size=vocabulary_size,
        d_model=a.t5_width,
        d_kv=32,
        d_ff=2 * a.t5_width,
        num_layers=a.encoder_layers,
        num_heads=a.t5_width // 32,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=16,
    )
    encoder = T5EncoderModel(config)
    # A new T5 is almost blind to the order of words: its only sign of it starts at a standard deviation of 0.07, and a
    # caption's "A above B" was still read as "A, B, above" after 90,000 captions. With this it is read at once.
    order = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    torch.nn.init.normal_(order.weight, std=2.0)
    return encoder


def build(architecture: Architecture, vae: AutoencoderKL, seed: int) -> StableDiffusion3Pipeline:
    """An untrained pipeline around a trained autoencoder; weights are a function of `seed`."""
    a = architecture
    torch.manual_seed(seed)
    clip, t5 = clip_tokenizer(), t5_tokenizer()

    def clip_encoder(width: int) -> CLIPTextModelWithProjection:
        config = CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=a.encoder_layers,
            num_attention_heads=width // 32,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="gelu",
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
        return CLIPTextModelWithProjection(config)

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=a.layers,
        attention_head_dim=64,
        num_attention_heads=a.width // 64,
        joint_attention_dim=a.t5_width,
        caption_projection_dim=a.width,
        pooled_projection_dim=a.clip_l_width + a.clip_g_width,
        pos_embed_max_size=4,
        dual_attention_layers=tuple(range(a.dual_layers)),
        qk_norm="rms_norm",
    )
    for block in transformer.transformer_blocks:  # adaLN-zero, as DiT and SD3 start
        for norm in (block.norm1, block.norm1_context):
            torch.nn.init.zeros_(norm.linear.weight)
            torch.nn.init.zeros_(norm.linear.bias)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip_encoder(a.clip_l_width),
        tokenizer=clip,
        text_encoder_2=clip_encoder(a.clip_g_width),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(a, len(t5)),
        tokenizer_3=t5,
    )
