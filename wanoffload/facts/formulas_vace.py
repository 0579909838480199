"""VACE in numbers: Wan's transformer, and blocks that compute its hints beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wanoffload.facts.formulas_wan import make_facts
from wanoffload.facts.model import DitFacts
from wanoffload.facts.tally import BF16, BlockSizes, Tally, dense
from wanoffload.facts.wan_forward import block, embed, head
from wanoffload.facts.wan_shape import WanShape, block_sizes, outer_sizes, shape_of

DEFAULTS: dict[str, Any] = {
    "vace_layers": [0, 5, 10, 15, 20, 25, 30, 35],
    "vace_in_channels": 96,
}
"""Of diffusers' class, for fields that a config leaves out."""


def vace_facts(config: Mapping[str, Any]) -> DitFacts:
    """WanVACETransformer3DModel. Its `vace_blocks` run first."""
    s = shape_of(config)
    get = {**DEFAULTS, **config}
    hints, channels = len(get["vace_layers"]), get["vace_in_channels"]

    def forward(t: Tally, n: int) -> None:
        embed(t, n, s)
        t.linear(n, channels * s.patch, s.d)
        t.kernels += 1  # the padding, which is empty
        t.move(n * s.d, BF16, BF16)
        for index in range(hints):
            _hint(t, n, s, first=index == 0)
        for _ in range(s.layers):
            block(t, n, s)
        for _ in range(hints):
            t.move(n * s.d, BF16, BF16)
            t.move(n * s.d, BF16, BF16, BF16)
        head(t, n, s)

    outer = [*outer_sizes(s), *dense(channels * s.patch, s.d)]
    # Beside an ordinary block stand all hints, the state of the blocks that made them, the input.
    beside = BF16 * (hints + 1 + channels * s.patch / s.d)
    return make_facts(s, _blocks(s, hints), outer, forward, beside=beside)


def _blocks(s: WanShape, hints: int) -> list[BlockSizes]:
    """The first block with hints projects what comes in, all project what goes out."""
    plain, projection = block_sizes(s), dense(s.d, s.d)
    with_one = BlockSizes([*plain.called, projection], plain.fp32)
    with_two = BlockSizes([projection, *plain.called, projection], plain.fp32)
    vace = [with_two if index == 0 else with_one for index in range(hints)]
    return vace + [plain] * s.layers


def _hint(t: Tally, n: float, s: WanShape, first: bool) -> None:
    """One forward of WanVACETransformerBlock."""
    if first:
        t.linear(n, s.d, s.d)
        t.move(n * s.d, BF16, BF16, BF16)
    block(t, n, s)
    t.linear(n, s.d, s.d)
