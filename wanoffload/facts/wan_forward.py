"""The forward of a Wan transformer, operation by operation, read off diffusers' modules.

n: tokens; m: rows of the modulation, 1 for all tokens or one for each (TI2V-5B); for the letters of
a `WanShape` see there.
"""

from __future__ import annotations

from wanoffload.facts.tally import BF16, FP32, Tally
from wanoffload.facts.wan_shape import TEXT_TOKENS, WanShape


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
