"""`granularity="auto"`: whether blocks or their parts are fetched, by what each would take."""

from __future__ import annotations

from torch import nn

from wanoffload import image, residency
from wanoffload.device_memory import as_allocated
from wanoffload.errors import WrapError
from wanoffload.image import ImageLayout
from wanoffload.packing import estimated_bytes, packs
from wanoffload.residency import Residency, UnitBytes
from wanoffload.ring_plan import choose_parts, parts_of
from wanoffload.units import AUTO, BLOCK, PART, Unit, any_compiled, find_units, tie_key

WORTH_PARTS = 0.98
"""Parts are fetched if of what blocks would bring over the link they bring at most this share:
their steps take up to 1.007 times as long where both bring the same."""


def granularity_for(
    module: nn.Module, asked: str, budget: int | None, prefetch: int | None, packed: bool
) -> str:
    """What a unit is.

    With "auto" a part of a block, where the budget has no room for a block that is fetched beside
    the one in use, or more of the model stays because a ring of parts is smaller than two slots.
    Blocks that are compiled are used as a whole anyway.

    Args:
        budget: bytes that all of the weights may take on the device. None: blocks.
        prefetch: as of `wrap`.
        packed: whether units will be packed, if they can be.
    """
    if asked != AUTO:
        return asked
    blocks = find_units(module)
    if budget is None or any_compiled(blocks):
        return BLOCK
    try:
        whole = residency.choose(
            _sizes(blocks, packed),
            budget,
            others=bytes_of_others(module, blocks),
            prefetch=prefetch,
        )
    except WrapError:
        return PART
    if not whole.streamed_bytes:
        return BLOCK
    if whole.depth == 0 and prefetch != 0:
        return PART
    parts = _in_parts(module, budget, prefetch, packed)
    if parts is None or parts.streamed_bytes > whole.streamed_bytes * WORTH_PARTS:
        return BLOCK
    return PART


def lay_out(units: list[Unit]) -> list[ImageLayout]:
    """The images of these units."""
    return [
        image.lay_out((group[0].name, group[0].tensor) for group in unit.groups) for unit in units
    ]


def bytes_of_others(module: nn.Module, units: list[Unit]) -> int:
    """What stays on the device besides units, as the allocator counts it."""
    streamed = {id(entry.tensor) for unit in units for group in unit.groups for entry in group}
    tensors = [*module.parameters(), *module.buffers()]
    others = {tie_key(t): t.nbytes for t in tensors if id(t) not in streamed}
    return sum(as_allocated(nbytes) for nbytes in others.values())


def _in_parts(
    module: nn.Module, budget: int, prefetch: int | None, packed: bool
) -> Residency | None:
    """The plan for parts of blocks; None if the budget is too small for it."""
    units = find_units(module, PART)
    others = bytes_of_others(module, units)
    parts = parts_of(units, lay_out(units), _sizes(units, packed))
    try:
        return choose_parts(parts, budget, others=others, prefetch=prefetch)
    except WrapError:
        return None


def _sizes(units: list[Unit], packed: bool) -> list[UnitBytes]:
    return [
        UnitBytes(layout.nbytes, estimated_bytes(layout), True)
        if packed and packs(layout)
        else UnitBytes(layout.nbytes, layout.nbytes)
        for layout in lay_out(units)
    ]
