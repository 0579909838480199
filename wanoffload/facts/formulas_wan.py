"""Wan's transformer in numbers: weights, work and activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from wanoffload.facts.block_parts import BlockTensors, taken_apart
from wanoffload.facts.model import DitFacts
from wanoffload.facts.tally import BF16, FP32, BlockSizes, Sizes, Tally, coefficients
from wanoffload.facts.wan_forward import block, embed, head
from wanoffload.facts.wan_shape import TEXT_TOKENS, WanShape, block_sizes, outer_sizes, shape_of

CUBLAS_WORKSPACE_BYTES = 32 * 2**20
"""Torch takes this from its allocator for cuBLAS, on Hopper GPUs; elsewhere 8 MiB."""


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

    return make_facts(s, [block_sizes(s)] * s.layers, outer_sizes(s), forward)


def make_facts(
    s: WanShape,
    blocks: list[BlockSizes],
    outer: Sizes,
    forward: Callable[[Tally, int], None],
    beside: float = 0,
    fixed: float = 0,
) -> DitFacts:
    parts, loose = taken_apart(map(BlockTensors.of, blocks))
    return DitFacts(
        block_bytes=tuple(block.image_bytes for block in blocks),
        other_bytes=sum(outer),
        bf16_bytes=sum(block.bf16_bytes for block in blocks),
        parts=parts,
        loose_bytes=loose,
        activation_bytes_per_token=activation_per_token(s, beside),
        activation_bytes=activation_fixed(s) + fixed,
        **coefficients(forward),  # type: ignore[arg-type]  # kernels is the only int
    )
