"""What stays on the device under a budget, and what streams. Pure: from sizes and rates to a plan.

A unit is *resident* (plain, in a place of its own), *kept* packed (unpacked into a slot for each
use) or *streamed*. For every kind of unit - those with equal sizes are one - every number of
resident and of kept ones is looked at, with every depth. Which plans there are does not depend on
the budget, it only rules some out: so a larger budget never gives a slower plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import comb, prod
from typing import NamedTuple

from wanoffload.errors import WrapError
from wanoffload.policy.packed import CHUNK_BYTES, STAGING_SLOTS
from wanoffload.sizes import gb

ROUND_BYTES = 2 << 20
"""To a multiple of this torch's allocator rounds large allocations up."""
ALIGN_BYTES = 256
"""More than is needed, in each allocation, so that what stands in it can be aligned."""
DEFAULT_DEPTH = 2
DEPTHS = (1, 2, 0)
"""What is chosen from, the first where two are as good."""
AS_GOOD = 1.005
"""A plan that takes this much longer than the quickest is preferred if it takes less memory."""
MOST_PLANS = 3000
"""For each depth. Where there are more, similar kinds of units count as one."""

_SPREAD = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly however many there are
_GB = 1e9


@dataclass(frozen=True)
class UnitBytes:
    """What a unit takes.

    `plain`: in a slot. `stored`: as it stands on the host and crosses the link. `packed`: whether
    the stored bytes are packed (docs/packing.md).
    """

    plain: int
    stored: int
    packed: bool = False


@dataclass(frozen=True)
class Rates:
    """What a forward is up against.

    `decode_gb_per_s`: of output. `compute_s`: of a whole forward with everything resident.
    """

    link_gb_per_s: float
    decode_gb_per_s: float
    compute_s: float


@dataclass(frozen=True)
class Residency:
    """A plan. Units are named by their place in the order of use.

    Attributes:
        resident: stay on the device, plain, each in a place of its own.
        kept_packed: their stored bytes stay on the device; unpacked into a slot for each use.
        depth: so many units are fetched ahead (`prefetch`).
        slots: 0 when everything is resident.
        slot_bytes: of the largest unit that passes through slots.
        staging_bytes: of one staging slot; 0 if nothing packed is streamed.
        device_bytes: everything: others, slots, staging, residents, as the allocator counts it.
        streamed_bytes: over the link in each forward. 0 where all that pass have a slot each.
        decoded_bytes: plain bytes unpacked in each forward.
        seconds: of a forward, predicted; None without rates.
        sentence: the above for the log.
    """

    resident: frozenset[int]
    kept_packed: frozenset[int]
    depth: int
    slots: int
    slot_bytes: int
    staging_bytes: int
    device_bytes: int
    streamed_bytes: int
    decoded_bytes: int
    seconds: float | None
    sentence: str


def choose(
    units: Sequence[UnitBytes],
    budget: int | None,
    *,
    others: int,
    prefetch: int | None,
    rates: Rates | None = None,
    largest_chunk: int = CHUNK_BYTES,
) -> Residency:
    """The plan for these units, in the order in which they are used.

    If everything fits, everything is resident. Otherwise, with rates, the quickest plan, or of those
    about as quick the smallest; without, the one that streams least, then unpacks least.

    Args:
        budget: bytes that all of the weights may take on the device. None: everything streams.
        others: bytes of weights and buffers that are in no unit, as allocated.
        prefetch: the depth; None: the best of 0, 1 and 2. Without rates 0 only if nothing else fits.
        rates: of this machine, if known.
        largest_chunk: bytes of the largest packed chunk.

    Raises:
        WrapError: the budget is less than the least; names it.
    """
    planner = _Planner(tuple(units), others, largest_chunk, rates)
    if budget is None:
        return planner.plan("s" * len(units), DEFAULT_DEPTH if prefetch is None else prefetch)
    everything = planner.plan("r" * len(units), 0)
    if everything.device_bytes <= budget:
        return everything
    depths = DEPTHS if prefetch is None else (prefetch,)
    fitting = [size for size in planner.sizes(depths) if size.device_bytes <= budget]
    if not fitting:
        raise WrapError(_too_little(units, budget, others, prefetch, largest_chunk))
    return planner.best(fitting)


def least(
    units: Sequence[UnitBytes],
    *,
    others: int,
    prefetch: int | None,
    largest_chunk: int = CHUNK_BYTES,
) -> int:
    """Bytes of the smallest budget that `choose` accepts."""
    planner = _Planner(tuple(units), others, largest_chunk, None)
    depths = DEPTHS if prefetch is None else (prefetch,)
    everything = planner.plan("r" * len(units), 0).device_bytes
    return min([everything, *(size.device_bytes for size in planner.sizes(depths))])


def allocated(nbytes: int) -> int:
    """Bytes that the allocator takes for one allocation."""
    return -(-nbytes // ROUND_BYTES) * ROUND_BYTES


def _too_little(
    units: Sequence[UnitBytes], budget: int, others: int, prefetch: int | None, largest_chunk: int
) -> str:
    need = least(units, others=others, prefetch=prefetch, largest_chunk=largest_chunk)
    least_of_all = least(units, others=others, prefetch=None, largest_chunk=largest_chunk)
    ahead = "" if prefetch is None else f" with prefetch={prefetch}"
    return (
        f"the weights need at least {need:,} bytes ({gb(need)}) of the device{ahead}; "
        f"vram_budget is {budget:,} bytes ({gb(budget)}): raise it"
        + (f", or leave prefetch out ({least_of_all:,} bytes)" if least_of_all < need else "")
    )


class _Kind(NamedTuple):
    """Units of which the first so many of `order` are resident, the next so many kept packed."""

    order: tuple[int, ...]
    may_keep: bool

    @property
    def ways(self) -> int:
        return comb(len(self.order) + 2, 2) if self.may_keep else len(self.order) + 1


class _Share(NamedTuple):
    """How many units of each kind are resident and kept, and what that takes."""

    counts: tuple[tuple[int, int], ...]
    held: int  # bytes of resident and kept ones, as allocated
    passing: int  # how many pass through slots
    slot_bytes: int
    chunk_bytes: int  # stored bytes of the largest packed one that is streamed
    streamed: int
    decoded: int


class _Size(NamedTuple):
    """A plan before the units are spread."""

    device_bytes: int
    streamed: int
    decoded: int
    depth: int
    counts: tuple[tuple[int, int], ...]
    kinds: tuple[_Kind, ...]


@dataclass(frozen=True)
class _Planner:
    units: tuple[UnitBytes, ...]
    others: int
    largest_chunk: int
    rates: Rates | None

    def sizes(self, depths: Sequence[int]) -> Iterator[_Size]:
        """Every plan that is looked at, the same whatever the budget."""
        for kinds in (_kinds(self.units), _largest_first(self.units)):
            for share in _shares(self.units, kinds):
                for depth in depths:
                    yield self._size(share, depth, kinds)

    def best(self, sizes: Sequence[_Size]) -> Residency:
        if self.rates is None:
            size = min(sizes, key=_streams_least)
        else:
            limit = AS_GOOD * min(self._bound(size) for size in sizes)
            size = min(s for s in sizes if self._bound(s) <= limit)
        return self.plan(self._spread(size), size.depth)

    def _size(self, share: _Share, depth: int, kinds: tuple[_Kind, ...]) -> _Size:
        slots = min(depth + 1, share.passing)
        moves = share.passing > slots
        return _Size(
            self._device_bytes(share.held, slots, share.slot_bytes, share.chunk_bytes),
            share.streamed if moves else 0,
            share.decoded if moves else 0,
            depth,
            share.counts,
            kinds,
        )

    def _device_bytes(self, held: int, slots: int, slot_bytes: int, chunk_bytes: int) -> int:
        staging = min(chunk_bytes, self.largest_chunk)
        return (
            self.others
            + held
            + (allocated(ALIGN_BYTES + slots * slot_bytes) if slots else 0)
            + (allocated(ALIGN_BYTES + STAGING_SLOTS * staging) if staging else 0)
        )

    def _bound(self, size: _Size) -> float:
        """Seconds that a forward takes at least, however the units are spread."""
        rates = self.rates
        assert rates is not None
        device = rates.compute_s + size.decoded / (rates.decode_gb_per_s * _GB)
        link = size.streamed / (rates.link_gb_per_s * _GB)
        return max(device, link) if size.depth else device + link

    def _spread(self, size: _Size) -> str:
        """A letter for each unit: resident, kept, streamed. Those of equal sizes change places."""
        letters = ["s"] * len(self.units)
        for kind, (resident, kept) in zip(size.kinds, size.counts, strict=True):
            for place, unit in enumerate(kind.order[: resident + kept]):
                letters[unit] = "r" if place < resident else "k"
        equal = _equal(self.units)
        for number, members in enumerate(equal):
            row = sorted(letters[unit] for unit in members)
            held = _evenly(len(row) - row.count("s"), len(row), number / len(equal))
            kept = {held[place] for place in _evenly(row.count("k"), len(held))}
            for place, unit in enumerate(members):
                letters[unit] = "k" if place in kept else "r" if place in held else "s"
        return "".join(letters)

    def plan(self, letters: str, depth: int) -> Residency:
        units = self.units
        resident, kept, streamed = (
            [unit for unit, own in zip(units, letters, strict=True) if own == letter]
            for letter in "rks"
        )
        share = _Share(
            (),
            sum(allocated(ALIGN_BYTES + unit.plain) for unit in resident)
            + sum(allocated(ALIGN_BYTES + unit.stored) for unit in kept),
            len(kept) + len(streamed),
            max((unit.plain for unit in kept + streamed), default=0),
            max((unit.stored for unit in streamed if unit.packed), default=0),
            sum(unit.stored for unit in streamed),
            sum(unit.plain for unit in kept + streamed if unit.packed),
        )
        size = self._size(share, depth, ())
        return Residency(
            resident=_places(letters, "r"),
            kept_packed=_places(letters, "k"),
            depth=depth,
            slots=min(depth + 1, share.passing),
            slot_bytes=share.slot_bytes,
            staging_bytes=min(share.chunk_bytes, self.largest_chunk),
            device_bytes=size.device_bytes,
            streamed_bytes=size.streamed,
            decoded_bytes=size.decoded,
            seconds=None if self.rates is None else self._bound(size),
            sentence="",
        )


def _streams_least(size: _Size) -> tuple[bool, int, int, int]:
    """Nothing overlaps with depth 0: that is the last resort, whatever it streams."""
    idles = size.depth == 0 and size.streamed > 0
    return idles, size.streamed, size.decoded, size.device_bytes


def _equal(units: Sequence[UnitBytes]) -> list[list[int]]:
    """The numbers of units that are the same in size, by size."""
    groups: dict[UnitBytes, list[int]] = {}
    for number, unit in enumerate(units):
        groups.setdefault(unit, []).append(number)
    return [groups[u] for u in sorted(groups, key=lambda u: (u.packed, u.plain, u.stored))]


def _kinds(units: Sequence[UnitBytes]) -> tuple[_Kind, ...]:
    """Units of equal sizes; where that makes too many plans, of neighbouring sizes."""
    kinds = [_kind(units, members) for members in _equal(units)]
    while prod(kind.ways for kind in kinds) > MOST_PLANS:
        alike = [n for n in range(1, len(kinds)) if kinds[n].may_keep == kinds[n - 1].may_keep]
        if not alike:
            break
        n = min(alike, key=lambda n: len(kinds[n].order) + len(kinds[n - 1].order))
        kinds[n - 1 : n + 1] = [_kind(units, kinds[n - 1].order + kinds[n].order)]
    return tuple(kinds)


def _kind(units: Sequence[UnitBytes], members: Sequence[int]) -> _Kind:
    """In such an order that the first few, however many, are spread evenly."""
    row = sorted(members)
    order = sorted(range(len(row)), key=lambda place: place * _SPREAD % 1)
    return _Kind(tuple(row[place] for place in order), units[row[0]].packed)


def _largest_first(units: Sequence[UnitBytes]) -> tuple[_Kind, ...]:
    """All of them as one kind: the fewer pass through slots, the smaller are the slots."""
    order = sorted(range(len(units)), key=lambda number: -units[number].plain)
    return (_Kind(tuple(order), may_keep=False),)


def _shares(units: Sequence[UnitBytes], kinds: Sequence[_Kind]) -> list[_Share]:
    """Every combination of what may be done with each kind."""
    shares = [_Share((), 0, 0, 0, 0, 0, 0)]
    for kind in kinds:
        more = _shares_of(units, kind)
        shares = [_joined(a, b) for a in shares for b in more]
    return shares


def _joined(a: _Share, b: _Share) -> _Share:
    return _Share(
        a.counts + b.counts,
        a.held + b.held,
        a.passing + b.passing,
        a.slot_bytes if a.slot_bytes > b.slot_bytes else b.slot_bytes,
        a.chunk_bytes if a.chunk_bytes > b.chunk_bytes else b.chunk_bytes,
        a.streamed + b.streamed,
        a.decoded + b.decoded,
    )


def _shares_of(units: Sequence[UnitBytes], kind: _Kind) -> list[_Share]:
    row = [units[number] for number in kind.order]
    plain_held = _sums(allocated(ALIGN_BYTES + unit.plain) for unit in row)
    packed_held = _sums(allocated(ALIGN_BYTES + unit.stored) for unit in row)
    stored = _sums(unit.stored for unit in row)
    decoded = _sums(unit.plain if unit.packed else 0 for unit in row)
    largest = _largest_from(unit.plain for unit in row)
    chunk = _largest_from(unit.stored if unit.packed else 0 for unit in row)
    total = len(row)
    return [
        _Share(
            ((r, held - r),),
            plain_held[r] + packed_held[held] - packed_held[r],
            total - r,
            largest[r],
            chunk[held],
            stored[total] - stored[held],
            decoded[total] - decoded[r],
        )
        for r in range(total + 1)
        for held in range(r, (total if kind.may_keep else r) + 1)
    ]


def _sums(values: Iterable[int]) -> list[int]:
    """Of none, the first, the first two, and so on."""
    return list(accumulate(values, initial=0))


def _largest_from(values: Iterable[int]) -> list[int]:
    """Of all, all but the first, and so on; of none 0."""
    return list(accumulate(reversed(list(values)), max, initial=0))[::-1]


def _evenly(count: int, total: int, shift: float = 0) -> list[int]:
    """`count` of the numbers below `total`, evenly between the others."""
    return [int((step + shift) * total / count) for step in range(count)]


def _places(letters: str, letter: str) -> frozenset[int]:
    return frozenset(place for place, own in enumerate(letters) if own == letter)
