"""Wan's transformers in numbers: weights, work and activations, read off diffusers' modules.

d: width of a token; n: tokens; head: width of a head; f: width of the feed-forward; t: tokens of
text (512, padded always); m: rows of the modulation, 1 for all tokens or one for each (TI2V-5B).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from wanoffload.facts import DitFacts
from wanoffload.tally import BF16, FP32, Sizes, Tally, coefficients, dense, image_bytes

TEXT_TOKENS = 512
"""Wan's pipelines pad or cut the prompt to this length."""
IMAGE_TOKENS = 257
"""CLIP ViT-H at 224 x 224: 16 x 16 patches and one for all. FLF2V has two pictures: 514."""
CUBLAS_WORKSPACE_BYTES = 32 * 2**20
"""Torch takes this from its allocator for cuBLAS, on Hopper GPUs; elsewhere 8 MiB."""


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


def block_sizes(s: WanShape) -> Sizes:
    """Tensors of one block. In fp32: the modulation table, and norm2 (by diffusers' class)."""
    attention = [*dense(s.d, s.d) * 4, s.d * BF16, s.d * BF16]
    added = [*dense(s.added_dim, s.d) * 2, s.d * BF16] if s.added_dim is not None else []
    norm = [s.d * FP32] * 2 if s.cross_attn_norm else []
    feed_forward = [*dense(s.d, s.f), *dense(s.f, s.d)]
    return [6 * s.d * FP32, *attention, *attention, *added, *norm, *feed_forward]


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


# Work.


def modulated_norm(t: Tally, n: float, s: WanShape) -> None:
    """float(), layer norm, 1 + scale, times, plus, back to bf16."""
    m = n if s.token_timesteps else 1
    t.move(n * s.d, BF16, FP32)
    t.move(n * s.d, FP32, FP32)
    t.move(m * s.d, FP32, FP32)
    for _ in ("times 1 + scale", "plus shift"):
        t.move(n * s.d, FP32, FP32)
        t.also(m * s.d * FP32)
    t.move(n * s.d, FP32, BF16)


def rope(t: Tally, n: float, s: WanShape) -> None:
    """Rotates one of q and k: for each half of the result two products, a sum, a copy into place.

    A half is every other element: the memory moves both halves. Cosines and sines are shared by
    the heads.
    """
    for _ in ("even", "odd"):
        for _ in ("cos", "sin"):
            t.move(n * s.d / 2, 2 * BF16, FP32)
            t.also(n * s.head * FP32)
        t.move(n * s.d / 2, FP32, FP32, FP32)
        t.move(n * s.d / 2, FP32, 2 * BF16)


def self_attention(t: Tally, n: float, s: WanShape) -> None:
    for _ in "qkv":
        t.linear(n, s.d, s.d)
    for _ in "qk":
        t.move(n * s.d, BF16, BF16)
        rope(t, n, s)
    t.attend(n, n, s.d)
    t.linear(n, s.d, s.d)


def cross_attention(t: Tally, n: float, s: WanShape) -> None:
    """q of the tokens, k and v of the text; with added projections, of the picture too."""
    contexts = [(TEXT_TOKENS, s.d)]
    if s.added_dim is not None:
        contexts.append((s.context_image_tokens, s.added_dim))
    t.linear(n, s.d, s.d)
    t.move(n * s.d, BF16, BF16)
    for rows, width in contexts:
        t.linear(rows, width, s.d)
        t.linear(rows, width, s.d)
        t.move(rows * s.d, BF16, BF16)
        t.attend(n, rows, s.d)
    for _ in contexts[1:]:
        t.move(n * s.d, BF16, BF16, BF16)
    t.linear(n, s.d, s.d)


def block(t: Tally, n: float, s: WanShape) -> None:
    """One forward of WanTransformerBlock, in the order of its code."""
    m = n if s.token_timesteps else 1
    t.move(6 * m * s.d, BF16, FP32)
    t.move(6 * m * s.d, FP32, FP32)
    t.also(6 * s.d * FP32)
    modulated_norm(t, n, s)
    self_attention(t, n, s)
    t.move(n * s.d, BF16, FP32)
    t.move(n * s.d, BF16, FP32)
    t.also(m * s.d * FP32)
    t.move(n * s.d, FP32, FP32, FP32)
    t.move(n * s.d, FP32, BF16)
    if s.cross_attn_norm:
        t.move(n * s.d, FP32, FP32)
    t.move(n * s.d, BF16, FP32)
    t.move(n * s.d, FP32, BF16)
    cross_attention(t, n, s)
    t.move(n * s.d, BF16, BF16, BF16)
    modulated_norm(t, n, s)
    t.linear(n, s.d, s.f)
    t.move(n * s.f, BF16, BF16)
    t.linear(n, s.f, s.d)
    gated_residual(t, n, s, m)


def gated_residual(t: Tally, n: float, s: WanShape, m: float) -> None:
    """Both sides to fp32, times the gate, plus, back to bf16."""
    t.move(n * s.d, BF16, FP32)
    t.move(n * s.d, BF16, FP32)
    t.move(n * s.d, FP32, FP32)
    t.also(m * s.d * FP32)
    t.move(n * s.d, FP32, FP32, FP32)
    t.move(n * s.d, FP32, BF16)


def embed(t: Tally, n: float, s: WanShape) -> None:
    """Positions, patches, timestep, text and picture."""
    for _ in ("cos", "sin"):
        t.move(n * s.head, FP32)
    t.linear(n, s.in_channels * s.patch, s.d)
    _embed_timestep(t, n if s.token_timesteps else 1, s)
    t.linear(TEXT_TOKENS, s.text_dim, s.d)
    t.move(TEXT_TOKENS * s.d, BF16, BF16)
    t.linear(TEXT_TOKENS, s.d, s.d)
    if s.image_dim is not None:
        _embed_picture(t, s.context_image_tokens, s.image_dim, s.d)


def _embed_timestep(t: Tally, m: float, s: WanShape) -> None:
    """Frequencies (4 small kernels), 4 kernels of half the width, 2 concatenations, the layers."""
    t.kernels += 4
    for reads in (0, 1, 1, 1):
        t.move(m * s.freq_dim / 2, reads * FP32, FP32)
    for _ in ("sine and cosine", "flipped"):
        t.move(m * s.freq_dim, FP32, FP32)
    t.linear(m, s.freq_dim, s.d)
    t.move(m * s.d, FP32, FP32)
    t.linear(m, s.d, s.d)
    t.move(m * s.d, FP32, BF16)
    t.move(m * s.d, BF16, BF16)
    t.linear(m, s.d, 6 * s.d)


def _embed_picture(t: Tally, rows: int, width: int, d: int) -> None:
    for size in (width, d):
        t.move(rows * size, BF16, FP32)
        t.move(rows * size, FP32, FP32)
        t.move(rows * size, FP32, BF16)
    t.linear(rows, width, width)
    t.move(rows * width, BF16, BF16)
    t.linear(rows, width, d)
    t.move((rows + TEXT_TOKENS) * d, BF16, BF16)


def head(t: Tally, n: float, s: WanShape) -> None:
    """The last norm, the projection, and putting the patches together."""
    m = n if s.token_timesteps else 1
    t.move(2 * m * s.d, FP32)
    t.also(m * s.d * BF16 + 2 * s.d * FP32)
    modulated_norm(t, n, s)
    t.linear(n, s.d, s.out_channels * s.patch)
    t.move(n * s.out_channels * s.patch, BF16, BF16)


# Activations.


def activation_per_token(s: WanShape, beside: float = 0) -> float:
    """Bytes of each token at the peak; `beside`: what lives next to a block, in bytes of a d.

    The end of a block: its input, kept by the caller, its state, the last norm's output, the cross-
    attention's, the feed-forward's (10), state and product in fp32, with the sum or the feed-
    forward's output in fp32 (12). Or the feed-forward: the first four (8), and its hidden layer
    before and after GELU. With a timestep for each token: its embedding and projection (14) and the
    modulation in fp32 (24) on top; or, when that is made, state, embedding, and fp32 twice.
    Always there: cosines and sines in fp32, the latents in and out.
    """
    peak = max(22 * s.d, 8 * s.d + 4 * s.f)
    if s.token_timesteps:
        peak = max(peak + 38 * s.d, (2 + 14 + 48) * s.d)
    return peak + beside * s.d + 2 * s.head * FP32 + s.in_channels * s.patch * BF16


def activation_fixed(s: WanShape) -> float:
    """Text and picture as they come in and as embedded (the picture twice), cuBLAS' workspace."""
    text = TEXT_TOKENS * (s.text_dim + s.d) * BF16
    image = s.context_image_tokens * ((s.image_dim or 0) + 2 * s.d) * BF16
    return text + image + CUBLAS_WORKSPACE_BYTES


def wan_facts(config: Mapping[str, Any], token_timesteps: bool = False) -> DitFacts:
    """WanTransformer3DModel."""
    s = shape_of(config, token_timesteps)

    def forward(t: Tally, n: int) -> None:
        embed(t, n, s)
        t.move(n * s.d, BF16, BF16)
        for _ in range(s.layers):
            block(t, n, s)
        head(t, n, s)

    return make_facts(s, [image_bytes(block_sizes(s))] * s.layers, outer_sizes(s), forward)


def make_facts(
    s: WanShape,
    blocks: list[int],
    outer: Sizes,
    forward: Callable[[Tally, int], None],
    beside: float = 0,
    fixed: float = 0,
) -> DitFacts:
    return DitFacts(
        block_bytes=tuple(blocks),
        other_bytes=sum(outer),
        activation_bytes_per_token=activation_per_token(s, beside),
        activation_bytes=activation_fixed(s) + fixed,
        **coefficients(forward),  # type: ignore[arg-type]  # kernels is the only int
    )
