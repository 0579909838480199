"""What stays on the device of a streamed DiT under `vram_budget`. Part of the cost model (`cost`).

The runtime chooses in the same way, by what its blocks really take (`wanoffload.residency`).
"""

from __future__ import annotations

from wanoffload.apart import PART
from wanoffload.errors import WrapError
from wanoffload.facts.model import DitFacts, ModelFacts
from wanoffload.host_tiers import evenly
from wanoffload.machine.hardware import Hardware
from wanoffload.policy import packed
from wanoffload.residency import (
    ALIGN_BYTES,
    Rates,
    Residency,
    UnitBytes,
    allocated,
    choose,
    least,
)
from wanoffload.ring_plan import Part, choose_parts, least_of_parts

_GB = 10**9


def others_beside(facts: ModelFacts) -> int:
    """What the other DiTs have on the device while one of them runs: all that is in no unit. As
    much as can be, whichever runs."""
    others = [dit.other_bytes for dit in facts.dits]
    return sum(others) - max(others, default=0)


def share_of_one(facts: ModelFacts, budget: int) -> int:
    """What one of the DiTs may take of a budget for all."""
    return budget - others_beside(facts)


def residency(
    dit: DitFacts,
    share: float,
    prefetch: int | None,
    budget: int | None,
    granularity: str,
    rates: Rates | None = None,
) -> Residency | None:
    """Of one DiT, a share of whose units is packed, within its part of the budget. None: the
    budget is too small. With rates, as it settles once the runtime has found them out."""
    try:
        if granularity == PART:
            parts, together = _parts(dit, share), dit.compiled
            return choose_parts(
                parts, budget, others=dit.other_bytes, prefetch=prefetch, together=together
            )
        units, others = _units(dit, share), dit.other_bytes
        return choose(units, budget, others=others, prefetch=prefetch, rates=rates)
    except WrapError:
        return None


def rates(compute_s: float, machine: Hardware) -> Rates:
    """What a forward that computes so long is up against."""
    assert machine.link_gb_per_s is not None
    return Rates(
        link_gb_per_s=machine.link_gb_per_s,
        decode_gb_per_s=1 / packed.seconds_to_decode(_GB, machine),
        compute_s=compute_s,
    )


def least_bytes(dit: DitFacts, share: float, prefetch: int | None, granularity: str) -> int:
    """The smallest budget that is enough for the DiT."""
    others = dit.other_bytes
    if granularity == PART:
        parts = _parts(dit, share)
        return least_of_parts(parts, others=others, prefetch=prefetch, together=dit.compiled)
    return least(_units(dit, share), others=others, prefetch=prefetch)


def blocks_ahead(dit: DitFacts, residency: Residency) -> int:
    """Of a DiT that streams in parts: as how many blocks ahead its copies hide behind compute.

    One part ahead is as good as a block. Of compiled blocks, another must be on its way as a whole.
    """
    blocks = [part.block for part in dit.parts]
    enough = max(map(blocks.count, set(blocks)), default=1) if dit.compiled else 1
    return 1 if residency.depth >= enough else 0


def known_in_parts(facts: ModelFacts) -> bool:
    """Whether it is known of which parts the blocks of the DiTs are."""
    return bool(facts.dits) and all(dit.parts for dit in facts.dits)


def streamed_bytes_on_device(facts: ModelFacts, prefetch: int | None, granularity: str) -> int:
    """What the DiTs take on the device while one of them streams, none of it packed, and nothing
    stays."""
    there = facts.streamed_in(granularity)
    taken = [residency(dit, 0.0, prefetch, None, granularity) for dit in there.dits]
    return others_beside(there) + max(each.device_bytes for each in taken if each is not None)


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
    staged = residency.staging_slots * residency.staging_bytes
    ring = ALIGN_BYTES + residency.ring_bytes if residency.ring_bytes else 0
    return allocated(slots) + allocated(ring) + allocated(ALIGN_BYTES + staged if staged else 0)


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


def _parts(dit: DitFacts, share: float) -> list[Part]:
    """Its parts, in order, as they stand on the host."""
    coded = evenly(round(share * len(dit.parts)), len(dit.parts))
    found = []
    for number, part in enumerate(dit.parts):
        saved = part.bf16_bytes * (1 - packed.RATIO) if number in coded else 0.0
        takes = UnitBytes(part.nbytes, round(part.nbytes - saved), packed=saved > 0)
        found.append(Part(takes, part.pieces, part.block))
    return found
