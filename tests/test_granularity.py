"""`granularity="auto"`: what a 14B is fetched in, by its budget. Nothing is allocated."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from wanoffload.granularity import granularity_for
from wanoffload.units import AUTO, BLOCK, PART

GB = 10**9


@functools.cache
def wan_14b() -> nn.Module:
    with torch.device("meta"):
        return WanTransformer3DModel(num_layers=40).to(torch.bfloat16)


@pytest.mark.parametrize("budget", [2, 4, 6, 8, 12, 16, 20, 24, 28])
def test_plain_parts_stream_less_than_plain_blocks_under_any_budget(budget: int) -> None:
    assert granularity_for(wan_14b(), AUTO, budget * GB, None, packed=False) == PART


@pytest.mark.parametrize("budget", [4, 6, 8, 12, 16, 20, 24, 28])
def test_packed_blocks_stay_packed_and_parts_can_not(budget: int) -> None:
    assert granularity_for(wan_14b(), AUTO, budget * GB, None, packed=True) == BLOCK


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("budget", "prefetch", "chosen"),
    [
        (None, None, BLOCK),
        (30 * GB, None, BLOCK),  # everything stays
        (19 * GB // 10, None, PART),  # nor are two packed blocks there at once
        (12 * GB // 10, None, PART),
        (2 * GB, 2, PART),  # blocks: too small
        (GB // 10, None, PART),  # which says what the least is
    ],
)
def test_what_is_taken_where_there_is_one_way(
    budget: int | None, prefetch: int | None, chosen: str, packed: bool
) -> None:
    assert granularity_for(wan_14b(), AUTO, budget, prefetch, packed) == chosen


def test_what_is_asked_for_is_taken() -> None:
    for asked in (BLOCK, PART):
        assert granularity_for(wan_14b(), asked, 2 * GB, None, packed=False) == asked


def test_a_compiled_block_is_fetched_as_a_whole() -> None:
    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=4)
    budget = 2 * GB
    assert granularity_for(model, AUTO, budget, None, packed=False) == PART
    model.blocks[0].compile(backend="eager")
    assert granularity_for(model, AUTO, budget, None, packed=False) == BLOCK
