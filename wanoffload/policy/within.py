"""What stays on the device of a streamed DiT under `vram_budget`. Part of the cost model (`cost`).

The runtime chooses in the same way, by what its blocks really take (`wanoffload.residency`).
"""

from __future__ import annotations

from wanoffload.errors import WrapError
from wanoffload.facts.model import DitFacts, ModelFacts
from wanoffload.host_tiers import evenly
from wanoffload.policy import packed
from wanoffload.residency import ALIGN_BYTES, Residency, UnitBytes, allocated, choose, least


def share_of_one(facts: ModelFacts, budget: int) -> int:
    """What one of the DiTs may take of a budget for all: while it runs, the others have on the
    device what is not in their blocks."""
    others = [dit.other_bytes for dit in facts.dits]
    return budget - (sum(others) - max(others, default=0))


def residency(dit: DitFacts, share: float, prefetch: int, budget: int) -> Residency | None:
    """Of one DiT, a share of whose blocks is packed, within its part of the budget. None: the
    budget is too small."""
    try:
        return choose(_units(dit, share), budget, others=dit.other_bytes, prefetch=prefetch)
    except WrapError:
        return None


def least_bytes(dit: DitFacts, share: float, prefetch: int) -> int:
    """The smallest budget that is enough for the DiT."""
    return least(_units(dit, share), others=dit.other_bytes, prefetch=prefetch)


def kept_bytes(facts: ModelFacts, stay: list[Residency]) -> list[int]:
    """Of each DiT's blocks, what stays on the device while others run."""
    if len(stay) < len(facts.dits):
        return []
    return [
        residency.device_bytes - dit.other_bytes - _passing(residency)
        for residency, dit in zip(stay, facts.dits, strict=True)
    ]


def _passing(residency: Residency) -> int:
    """Device memory that units pass through."""
    slots = ALIGN_BYTES + residency.slots * residency.slot_bytes if residency.slots else 0
    staged = packed.STAGING_SLOTS * residency.staging_bytes
    return allocated(slots) + allocated(ALIGN_BYTES + staged if staged else 0)


def _units(dit: DitFacts, share: float) -> list[UnitBytes]:
    """Its blocks, in order, as they stand on the host."""
    count, total = len(dit.block_bytes), sum(dit.block_bytes)
    saved = dit.bf16_bytes * (1 - packed.RATIO) / total if total else 0.0
    coded = evenly(round(share * count), count)
    return [
        UnitBytes(size, round(size * (1 - saved)), packed=True)
        if number in coded
        else UnitBytes(size, size)
        for number, size in enumerate(dit.block_bytes)
    ]
