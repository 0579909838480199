"""What stays on the device where parts of blocks stream, and how large their ring is. Pure.

Blocks stay as a whole, evenly spaced, and of others their largest parts: of all ways to do that
within a budget, the one beside which least streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from wanoffload.errors import WrapError
from wanoffload.residency import ALIGN_BYTES, Residency, UnitBytes, allocated, evenly
from wanoffload.ring import Ring, cut, least_bytes, overwritten, ring_of
from wanoffload.sizes import gb
from wanoffload.staging import CHUNK_BYTES, STAGING_SLOTS

if TYPE_CHECKING:
    from wanoffload.image import ImageLayout
    from wanoffload.units import Unit

DEFAULT_AHEAD = 1
"""Parts that always have room beside the one in use. The ring is larger than these two by what the
ends of places cost, and that lets a part begin to come while the one before it waits."""


@dataclass(frozen=True)
class Part:
    """A part of a block: what it takes, the bytes of the pieces that it may be cut into, and the
    number of its block."""

    takes: UnitBytes
    pieces: tuple[int, ...]
    block: int


def parts_of(
    found: Sequence[Unit], layouts: Sequence[ImageLayout], takes: Sequence[UnitBytes]
) -> list[Part]:
    """The parts that these units are."""
    blocks = {id(unit.block): number for number, unit in enumerate(found)}
    return [
        Part(sizes, cut(spec.nbytes for spec in layout.specs), blocks[id(unit.block)])
        for unit, layout, sizes in zip(found, layouts, takes, strict=True)
    ]


def choose_parts(
    parts: Sequence[Part],
    budget: int | None,
    *,
    others: int,
    prefetch: int | None,
    order: Sequence[int] | None = None,
    together: bool = False,
    largest_chunk: int = CHUNK_BYTES,
) -> Residency:
    """The plan for these parts.

    Args:
        budget: bytes that all of the weights may take on the device. None: everything streams.
        others: bytes of weights and buffers that are in no part, as allocated.
        prefetch: so many parts have room beside the one in use; None: 1, or 0 if that does not fit.
        order: the numbers of the parts as they are used; None: as they are given.
        together: all parts of a block are used at once, as compiled ones are: there is room for
            a block, and with None for the next one.
        largest_chunk: bytes of the largest packed chunk.

    Raises:
        WrapError: the budget is less than the least; names it.
    """
    return _choose(_planner(parts, others, order, largest_chunk), budget, prefetch, together)


@lru_cache(maxsize=64)  # a model that was paused asks again for what it had
def _choose(
    planner: _Planner, budget: int | None, prefetch: int | None, together: bool
) -> Residency:
    aheads = planner.aheads(prefetch, together)
    if budget is None:
        return planner.plan(frozenset(), aheads[0], prefetch, "no budget")
    said = f"budget {gb(budget)}"
    if planner.bytes_with(everything := planner.everything, 0) <= budget:
        return planner.plan(everything, 0, prefetch, said)
    for ahead in aheads:
        if planner.bytes_with(frozenset(), ahead) <= budget:
            return planner.plan(planner.fitting(budget, ahead), ahead, prefetch, said)
    raise WrapError(_too_little(planner, budget, prefetch, together))


def least_of_parts(
    parts: Sequence[Part], *, others: int, prefetch: int | None, together: bool = False
) -> int:
    """Bytes of the smallest budget that `choose_parts` accepts."""
    return _planner(parts, others, None, CHUNK_BYTES).least(prefetch, together)


def _planner(
    parts: Sequence[Part], others: int, order: Sequence[int] | None, largest_chunk: int
) -> _Planner:
    return _Planner(tuple(parts), tuple(order or range(len(parts))), others, largest_chunk)


@lru_cache(maxsize=2)  # some megabytes each
def _choices(planner: _Planner, ahead: int) -> list[tuple[frozenset[int], int]]:
    """What may stay, and the bytes that it takes of the device at least."""
    return [(resident, planner.at_least(resident, ahead)) for resident in planner.choices()]


def _too_little(planner: _Planner, budget: int, prefetch: int | None, together: bool) -> str:
    need, least = (planner.least(asked, together) for asked in (prefetch, None))
    with_it = "" if prefetch is None else f" with prefetch={prefetch}"
    instead = f", or prefetch=None: {least:,} bytes are enough" if least < need else ""
    return (
        f"the weights take at least {need:,} bytes ({gb(need)}) of the device{with_it}, part by "
        f"part; vram_budget is {budget:,} bytes ({gb(budget)}): raise it{instead}"
    )


@dataclass(frozen=True)
class _Planner:
    parts: tuple[Part, ...]
    order: tuple[int, ...]
    others: int
    largest_chunk: int

    @property
    def everything(self) -> frozenset[int]:
        return frozenset(range(len(self.parts)))

    def aheads(self, prefetch: int | None, together: bool) -> list[int]:
        """What is looked at, the best first."""
        most = max(len(members) for members in self._blocks()) if together else 1
        if prefetch is not None:
            return [max(prefetch, most - 1)]
        if together:
            return sorted({2 * most - 1, most - 1}, reverse=True)
        return [DEFAULT_AHEAD, 0]

    def least(self, prefetch: int | None, together: bool) -> int:
        """Bytes of the smallest budget that is enough."""
        ahead = self.aheads(prefetch, together)[-1]
        return min(self.bytes_with(self.everything, 0), self.bytes_with(frozenset(), ahead))

    def _blocks(self) -> list[list[int]]:
        """The parts of each block, in the order of use."""
        blocks: dict[int, list[int]] = {}
        for number in self.order:
            blocks.setdefault(self.parts[number].block, []).append(number)
        return list(blocks.values())

    def ring(self, resident: frozenset[int], ahead: int) -> Ring:
        row = self._row(resident)
        return ring_of(row, ahead) if row else Ring(0, ())

    def _row(self, resident: frozenset[int]) -> tuple[tuple[int, ...], ...]:
        """The bytes of the pieces of what does not stay, in the order of use."""
        row = (self.parts[n] for n in self.order if n not in resident)
        # Packed bytes are unpacked to one run of addresses.
        return tuple((p.takes.plain,) if p.takes.packed else p.pieces for p in row)

    def bytes_with(self, resident: frozenset[int], ahead: int) -> int:
        """On the device, all together, as the allocator counts them."""
        return self._taken(resident, self.ring(resident, ahead).nbytes)

    def _taken(self, resident: frozenset[int], ring: int) -> int:
        staging = self.staging(resident)
        return (
            self.others
            + sum(self._home(n) for n in resident)
            + (allocated(ALIGN_BYTES + ring) if ring else 0)
            + (allocated(ALIGN_BYTES + STAGING_SLOTS * staging) if staging else 0)
        )

    def _home(self, number: int) -> int:
        return allocated(ALIGN_BYTES + self.parts[number].takes.plain)

    def staging(self, resident: frozenset[int]) -> int:
        """Of one slot; what is resident comes over the link, too, if only once."""
        packed = (part.takes.stored for part in self.parts if part.takes.packed)
        return min(max(packed, default=0), self.largest_chunk)

    def fitting(self, budget: int, ahead: int) -> frozenset[int]:
        """The parts that stay: of the choices that fit, those beside which least passes. The
        choices do not depend on the budget, so a larger one never has more pass."""
        return next(
            resident
            for resident, at_least in _choices(self, ahead)
            if at_least <= budget and self.bytes_with(resident, ahead) <= budget
        )

    def choices(self) -> list[frozenset[int]]:
        """What may stay, those first beside which least passes: any number of blocks, evenly
        spaced, with the largest part of any number of others, up to all: so the same share of every
        block, too. Without the largest parts the ring is smaller."""
        blocks = self._blocks()
        choices = []
        for some in range(len(blocks) + 1):
            whole = frozenset(n for at in evenly(some, len(blocks)) for n in blocks[at])
            rest = [block for block in blocks if whole.isdisjoint(block)]
            largest = [max(block, key=lambda n: self.parts[n].takes.plain) for block in rest]
            for more in range(len(largest) + 1):
                singles = evenly(more, len(largest), 0.5)
                choices.append(whole.union(largest[at] for at in singles))
        return sorted(choices, key=self._passing)

    def _passing(self, resident: frozenset[int]) -> int:
        """Bytes over the link, of the parts that do not stay."""
        return sum(p.takes.stored for n, p in enumerate(self.parts) if n not in resident)

    def at_least(self, resident: frozenset[int], ahead: int) -> int:
        """On the device, all together, if the ring were as small as can be."""
        row = self._row(resident)
        return self._taken(resident, least_bytes(row, ahead) if row else 0)

    def plan(
        self, resident: frozenset[int], ahead: int, prefetch: int | None, budget: str
    ) -> Residency:
        ring = self.ring(resident, ahead)
        streams = [n for n in self.order if n not in resident]
        nbytes = self.bytes_with(resident, ahead)
        places = dict(zip(streams, ring.places, strict=True))
        takes = [self.parts[n].takes for n in overwritten(places)]
        return Residency(
            resident=resident,
            kept_packed=frozenset(),
            depth=ahead if prefetch is None else prefetch,
            slots=0,
            slot_bytes=0,
            staging_bytes=self.staging(resident),
            device_bytes=nbytes,
            streamed_bytes=sum(each.stored for each in takes),
            decoded_bytes=sum(each.plain for each in takes if each.packed),
            seconds=None,
            sentence=f"{self._words(resident, ring)}; {gb(nbytes)} of the device, {budget}",
            ring_bytes=ring.nbytes,
            places=places,
        )

    def _words(self, resident: frozenset[int], ring: Ring) -> str:
        total = len(self.parts)
        plain = gb(sum(self.parts[n].takes.plain for n in resident))
        words = f"{len(resident)} of {total} parts of blocks resident ({plain})"
        if ring.nbytes:
            words += f", {total - len(resident)} streamed through a ring of {gb(ring.nbytes)}"
        return words
