"""A Wan transformer's sizes, and the bytes of its tensors, read off diffusers' modules.

d: width of a token; head: width of a head; f: width of the feed-forward; patch: latents of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wanoffload.facts.tally import BF16, FP32, BlockSizes, Sizes, dense

TEXT_TOKENS = 512
"""Wan's pipelines pad or cut the prompt to this length."""
IMAGE_TOKENS = 257
"""CLIP ViT-H at 224 x 224: 16 x 16 patches and one for all. FLF2V has two pictures: 514."""


@dataclass(frozen=True)
class WanShape:
    """The fields of a Wan transformer's config that decide sizes, under shorter names."""

    d: int
    head: int
    f: int
    layers: int
    in_channels: int
    out_channels: int
    patch: int
    text_dim: int
    freq_dim: int
    cross_attn_norm: bool
    image_dim: int | None
    added_dim: int | None
    pos_embed: int | None
    token_timesteps: bool = False

    @property
    def context_image_tokens(self) -> int:
        return 0 if self.image_dim is None else self.pos_embed or IMAGE_TOKENS


DEFAULTS: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
"""Of diffusers' classes, for fields that a config leaves out."""


def shape_of(config: Mapping[str, Any], token_timesteps: bool = False) -> WanShape:
    get = {**DEFAULTS, **config}
    in_channels = get["in_channels"]
    return WanShape(
        d=get["num_attention_heads"] * get["attention_head_dim"],
        head=get["attention_head_dim"],
        f=get["ffn_dim"],
        layers=get["num_layers"],
        in_channels=in_channels,
        out_channels=get["out_channels"] or in_channels,
        patch=math.prod(get["patch_size"]),
        text_dim=get["text_dim"],
        freq_dim=get["freq_dim"],
        cross_attn_norm=get["cross_attn_norm"],
        image_dim=get["image_dim"],
        added_dim=get["added_kv_proj_dim"],
        pos_embed=get["pos_embed_seq_len"],
        token_timesteps=token_timesteps,
    )


# Weights.


def block_sizes(s: WanShape) -> BlockSizes:
    """Tensors of one block. In fp32: the modulation table, and norm2 (by diffusers' class)."""
    attention = [*dense(s.d, s.d) * 4, s.d * BF16, s.d * BF16]
    added = [*dense(s.added_dim, s.d) * 2, s.d * BF16] if s.added_dim is not None else []
    norm = [s.d * FP32] * 2 if s.cross_attn_norm else []
    feed_forward = [*dense(s.d, s.f), *dense(s.f, s.d)]
    called = [attention, [*attention, *added], feed_forward]
    return BlockSizes(called, [6 * s.d * FP32, *norm])


def outer_sizes(s: WanShape) -> Sizes:
    """Tensors outside the blocks. The time embedder, the table and the norms are in fp32."""
    sizes = [
        *dense(s.in_channels * s.patch, s.d),
        *dense(s.freq_dim, s.d, each=FP32),
        *dense(s.d, s.d, each=FP32),
        *dense(s.d, 6 * s.d),
        *dense(s.text_dim, s.d),
        *dense(s.d, s.d),
        *dense(s.d, s.out_channels * s.patch),
        2 * s.d * FP32,
    ]
    if s.image_dim is not None:
        sizes += [s.image_dim * FP32] * 2 + [s.d * FP32] * 2
        sizes += [*dense(s.image_dim, s.image_dim), *dense(s.image_dim, s.d)]
        sizes += [(s.pos_embed or 0) * s.image_dim * BF16]
    return sizes
