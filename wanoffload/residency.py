"""What stays on the device under a budget, and what streams. Pure: from sizes and rates to a plan.

A unit is *resident* (plain, in a place of its own), *kept* packed (unpacked into a slot for each
use) or *streamed*. For every kind of unit - those with equal sizes are one - every number of
resident and of kept ones is looked at, with every depth. Which plans there are does not depend on
the budget, it only rules some out: so a larger budget never gives a slower plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, count, product
from math import inf, prod
from typing import TYPE_CHECKING, NamedTuple

from wanoffload.errors import WrapError
from wanoffload.sizes import gb
from wanoffload.staging import CHUNK_BYTES, STAGING_SLOTS

if TYPE_CHECKING:  # it looks at images, which are of torch
    from wanoffload.ring import Place

ROUND_BYTES = 2 << 20
"""To a multiple of this torch's allocator rounds large allocations up."""
ALIGN_BYTES = 256
"""More than is needed, in each allocation, so that what stands in it can be aligned."""
DEFAULT_DEPTH = 2
DEPTHS = (1, 2, 0)
"""What is chosen from, the first where two are as good."""
AS_GOOD = 1.002
"""A plan that takes this much longer than the quickest is preferred if it takes less memory."""
TIGHT = 1.005
"""With one staging slot a forward counts as so many times as long as it is timed: more than
AS_GOOD, so that it is taken where there is no room for more, and not to spare memory."""
MOST_PLANS = 1500
"""For each depth. Where there would be more, units of similar sizes count as one kind; where that
is not enough, only every second number of them is looked at, or third, and so on."""
PLACED = 48
"""Units placed in trying how those of one size stand best between those of others."""
STEPS = 160
"""Units timed, in several forwards. The second half tells a forward's time."""
TINY = 1e-9
"""Relative, of the rounding of sums of seconds."""

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
        staging_bytes: of one staging slot; 0 if nothing packed comes over the link, not even once.
        staging_slots: of so many bytes each. One where the budget has no room for more: then
            nothing is copied while a chunk is unpacked.
        device_bytes: everything: others, slots, staging, residents, as the allocator counts it.
        streamed_bytes: over the link in each forward. 0 where all that pass have a slot each; of
            parts, those that stand on bytes of others in the ring.
        decoded_bytes: plain bytes unpacked in each forward.
        seconds: of a forward, predicted; None without rates.
        sentence: the above for the log.
        ring_bytes: of the ring that parts of blocks pass through; 0 where blocks stream.
        places: where each part that streams stands in it.
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
    staging_slots: int = STAGING_SLOTS
    ring_bytes: int = 0
    places: Mapping[int, Place] = field(default_factory=dict)


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

    If everything fits, everything is resident. Otherwise, with rates, the quickest plan, or the
    smallest of those about as quick; without, the one that streams least, then unpacks least.

    Args:
        budget: bytes that all of the weights may take on the device. None: everything streams.
        others: bytes of weights and buffers that are in no unit, as allocated.
        prefetch: the depth. None: the best of 1 and 2, and of 0 if nothing streams, if nothing
            else fits or, with rates, if that is the quickest.
        rates: of this machine, if known.
        largest_chunk: bytes of the largest packed chunk.

    Raises:
        WrapError: the budget is less than the least; names it.
    """
    return _choose(_Planner(tuple(units), others, largest_chunk, rates), budget, prefetch)


@lru_cache(maxsize=64)  # a model that was paused asks again for what it had
def _choose(planner: _Planner, budget: int | None, prefetch: int | None) -> Residency:
    if budget is None:
        depth = DEFAULT_DEPTH if prefetch is None else prefetch
        return planner.plan(planner.streaming(depth), "no budget")
    said = f"budget {gb(budget)}"
    everything = planner.resident()
    if everything.device_bytes <= budget:
        return planner.plan(everything, said)
    fitting = list(planner.sizes(_depths(prefetch), budget))
    if not fitting:
        raise WrapError(_too_little(planner, budget, prefetch))
    return planner.plan(planner.best(fitting), said)


def forward_seconds(units: Sequence[UnitBytes], plan: Residency, rates: Rates) -> float:
    """Of a forward under a plan for these units, in steady state."""
    device = rates.compute_s + plan.decoded_bytes / (rates.decode_gb_per_s * _GB)
    link = plan.streamed_bytes / (rates.link_gb_per_s * _GB)
    if not plan.streamed_bytes:
        return device
    letters = "".join(
        "r" if number in plan.resident else "k" if number in plan.kept_packed else "s"
        for number in range(len(units))
    )
    staging = plan.staging_slots, plan.staging_bytes
    longer = TIGHT if plan.staging_slots == 1 else 1.0
    return longer * max(device, link, _steady(units, letters, plan.depth, staging, rates))


def least(
    units: Sequence[UnitBytes],
    *,
    others: int,
    prefetch: int | None,
    largest_chunk: int = CHUNK_BYTES,
) -> int:
    """Bytes of the smallest budget that `choose` accepts."""
    return _Planner(tuple(units), others, largest_chunk, None).least(prefetch)


def allocated(nbytes: int) -> int:
    """Bytes that the allocator takes for one allocation."""
    return -(-nbytes // ROUND_BYTES) * ROUND_BYTES


def _depths(prefetch: int | None) -> tuple[int, ...]:
    return DEPTHS if prefetch is None else (prefetch,)


def _too_little(planner: _Planner, budget: int, prefetch: int | None) -> str:
    need, least_of_all = planner.least(prefetch), planner.least(None)
    ahead = "" if prefetch is None else f" with prefetch={prefetch}"
    instead = (
        f", or prefetch=None: {least_of_all:,} bytes are enough" if least_of_all < need else ""
    )
    return (
        f"the weights take at least {need:,} bytes ({gb(need)}) of the device{ahead}; "
        f"vram_budget is {budget:,} bytes ({gb(budget)}): raise it{instead}"
    )


class _Kind(NamedTuple):
    """Units of which the first so many of `order` are resident, the next so many kept packed."""

    order: tuple[int, ...]
    may_keep: bool

    def counts(self, step: int) -> list[tuple[int, int]]:
        """(resident, kept) that are looked at: of none to all in such steps, and all."""
        ends = sorted({*range(0, len(self.order), step), len(self.order)})
        if not self.may_keep:
            return [(resident, 0) for resident in ends]
        return [
            (resident, held - resident) for resident in ends for held in ends if held >= resident
        ]


class _Share(NamedTuple):
    """How many units of each kind are resident and kept, and what that takes."""

    counts: tuple[tuple[int, int], ...]
    held: int  # bytes of resident and kept ones, as allocated
    passing: int  # how many pass through slots
    slot_bytes: int
    chunk_bytes: int  # stored bytes of the largest packed one that comes over the link, if once
    streamed: int
    decoded: int


class _Size(NamedTuple):
    """A plan before the units are spread. Sorted by memory. `tight`: with one staging slot."""

    device_bytes: int
    streamed: int
    decoded: int
    depth: int
    share: _Share
    kinds: tuple[_Kind, ...]
    tight: bool = False

    @property
    def staging_slots(self) -> int:
        return 1 if self.tight else STAGING_SLOTS

    @property
    def slots(self) -> int:
        return min(self.depth + 1, self.share.passing)


@dataclass(frozen=True)
class _Planner:
    units: tuple[UnitBytes, ...]
    others: int
    largest_chunk: int
    rates: Rates | None

    def resident(self) -> _Size:
        kinds = _largest_first(self.units)
        return self._size(_shares(self.units, kinds, 1)[-1], 0, kinds)

    def streaming(self, depth: int) -> _Size:
        kinds = _largest_first(self.units)
        return self._size(_shares(self.units, kinds, 1)[0], depth, kinds)

    def sizes(self, depths: Sequence[int], budget: float = inf) -> Iterator[_Size]:
        """Every plan that is looked at and fits."""
        for kinds in (_kinds(self.units), _largest_first(self.units)):
            for share in _shares(self.units, kinds, _step(kinds), budget - self.others):
                ways = (False, True) if self._staging(share) else (False,)
                for depth, tight in product(depths, ways):
                    size = self._size(share, depth, kinds, tight)
                    if size.device_bytes <= budget:
                        yield size

    def least(self, prefetch: int | None) -> int:
        sizes = (self.resident(), *self.sizes(_depths(prefetch)))
        return min(size.device_bytes for size in sizes)

    def best(self, sizes: Sequence[_Size]) -> _Size:
        if self.rates is None:
            return min(sizes, key=_streams_least)
        return self._smallest_quick(sizes)

    def _smallest_quick(self, sizes: Sequence[_Size]) -> _Size:
        """The bound rules out most before they are timed."""
        row = sorted((self._bound(size), size.streamed, size) for size in sizes)
        quickest = inf
        for bound, _, size in row:
            if bound * (1 + TINY) >= quickest:
                break
            quickest = min(quickest, self._seconds(size))
        limit = quickest * AS_GOOD
        as_good = sorted(size for bound, _, size in row if bound <= limit)
        return next(size for size in as_good if self._seconds(size) <= limit)

    def plan(self, size: _Size, budget: str) -> Residency:
        if self.rates is None:
            seconds, letters = None, _spread(self.units, size)
        else:
            seconds, letters = self._placed(size)
        return Residency(
            resident=frozenset(_places(letters, "r")),
            kept_packed=frozenset(_places(letters, "k")),
            depth=size.depth,
            slots=size.slots,
            slot_bytes=size.share.slot_bytes,
            staging_bytes=self._staging(size.share),
            staging_slots=size.staging_slots,
            device_bytes=size.device_bytes,
            streamed_bytes=size.streamed,
            decoded_bytes=size.decoded,
            seconds=seconds,
            sentence=f"{self._words(letters, size.slots)}; "
            f"{gb(size.device_bytes)} of the device, {budget}",
        )

    def _size(
        self, share: _Share, depth: int, kinds: tuple[_Kind, ...], tight: bool = False
    ) -> _Size:
        slots = min(depth + 1, share.passing)
        staging = self._staging(share) * (1 if tight else STAGING_SLOTS)
        moves = share.passing > slots
        return _Size(
            self.others
            + share.held
            + (allocated(ALIGN_BYTES + slots * share.slot_bytes) if slots else 0)
            + (allocated(ALIGN_BYTES + staging) if staging else 0),
            share.streamed if moves else 0,
            share.decoded if moves else 0,
            depth,
            share,
            kinds,
            tight,
        )

    def _staging(self, share: _Share) -> int:
        return min(share.chunk_bytes, self.largest_chunk)

    def _bound(self, size: _Size) -> float:
        """Seconds that a forward takes at least, however the units are spread."""
        assert self.rates is not None
        longer = TIGHT if size.tight and size.streamed else 1.0
        device = self.rates.compute_s + size.decoded / (self.rates.decode_gb_per_s * _GB)
        link = size.streamed / (self.rates.link_gb_per_s * _GB)
        return longer * max(device, link)

    def _seconds(self, size: _Size) -> float:
        return self._placed(size)[0]

    def _placed(self, size: _Size) -> tuple[float, str]:
        """Seconds of a forward, with letters for the units as they are placed best."""
        assert self.rates is not None
        bound = self._bound(size)
        if size.slots == size.share.passing or not size.streamed:
            return bound, _spread(self.units, size)
        staging = size.staging_slots, self._staging(size.share)
        longer = TIGHT if size.tight else 1.0
        turns = max(2, PLACED // len(self.units))
        rows = dict.fromkeys(_spread(self.units, size, turn) for turn in range(turns))
        return min(
            (max(bound, longer * _steady(self.units, row, size.depth, staging, self.rates)), row)
            for row in rows
        )

    def _words(self, letters: str, slots: int) -> str:
        resident = _places(letters, "r")
        kept = _places(letters, "k")
        streamed = len(letters) - len(resident) - len(kept)
        plain = gb(sum(self.units[unit].plain for unit in resident))
        words = f"{len(resident)} of {len(letters)} blocks resident ({plain})"
        if kept:
            words += f", {len(kept)} kept packed ({gb(sum(self.units[u].stored for u in kept))})"
        if streamed:
            words += f", {streamed} streamed"
        return words + (f" through {slots} slot{'s' * (slots > 1)}" if slots else "")


def _steady(
    units: Sequence[UnitBytes], letters: str, depth: int, staging: tuple[int, int], rates: Rates
) -> float:
    """Seconds of a forward among many.

    A copy waits for the copy before it and for a slot: `depth` streamed units before, that unit is
    the next to be used out of a slot (with depth 0 it is itself, once the one before it has been
    computed). Packed ones are copied ahead of that, into staging memory; with one slot of that
    the link waits while they are unpacked. Unpacking takes its time from compute. Compute is
    proportional to plain bytes. `staging`: how many slots, and the bytes of each.
    """
    slots, slot_bytes = staging
    plain = rates.compute_s / max(sum(unit.plain for unit in units), 1)
    unpack = 1 / (rates.decode_gb_per_s * _GB)
    copy = 1 / (rates.link_gb_per_s * _GB)
    steps = [
        (
            letter,
            plain * unit.plain,
            unpack * unit.plain if unit.packed and letter != "r" else 0.0,
            copy * unit.stored + (unpack * unit.plain if unit.packed and slots == 1 else 0.0),
            copy * slots * slot_bytes if unit.packed else 0.0,
        )
        for unit, letter in zip(units, letters, strict=True)
    ]
    ends = _ends(steps, depth)
    half = len(ends) // 2
    return (ends[-1] - ends[half - 1]) / (len(ends) - half)


def _ends(steps: Sequence[tuple[str, float, float, float, float]], depth: int) -> list[float]:
    now = link = used = 0.0
    free = deque([0.0] * depth, depth + 1)
    ends = []
    for _ in range(max(4, STEPS // len(steps))):
        for letter, compute, unpack, copy, ahead in steps:
            now += unpack
            if letter == "s":
                free.append(used)
                link = max(link, free[0] - ahead) + copy
                now = max(now, link)
            now += compute
            if letter != "r":
                used = now
        ends.append(now)
    return ends


def _spread(units: Sequence[UnitBytes], size: _Size, turn: int = 0) -> str:
    """A letter for each unit: resident, kept or streamed; those of equal sizes spread evenly."""
    letters = ["s"] * len(units)
    for kind, (resident, kept) in zip(size.kinds, size.share.counts, strict=True):
        for place, unit in enumerate(kind.order[: resident + kept]):
            letters[unit] = "r" if place < resident else "k"
    for number, members in enumerate(_equal(units)):
        row = [letters[unit] for unit in members]
        shift = (number + turn * (number + 1)) * _SPREAD % 1
        held = evenly(len(row) - row.count("s"), len(row), shift)
        packed = [held[at] for at in evenly(row.count("k"), len(held), turn * _SPREAD % 1)]
        for place, unit in enumerate(members):
            letters[unit] = "k" if place in packed else "r" if place in held else "s"
    return "".join(letters)


def _streams_least(size: _Size) -> tuple[bool, bool, int, int, int]:
    """What streams with depth 0 waits for the block before it: that is the last resort. One staging
    slot, for which the link waits, is the last but one."""
    alone, tight = size.depth == 0, size.tight
    streams = size.streamed > 0
    return streams and alone, streams and tight, size.streamed, size.decoded, size.device_bytes


def _equal(units: Sequence[UnitBytes]) -> list[list[int]]:
    """The numbers of units of equal sizes together, in the order of their sizes."""
    groups: dict[UnitBytes, list[int]] = {}
    for number, unit in enumerate(units):
        groups.setdefault(unit, []).append(number)
    return [groups[u] for u in sorted(groups, key=lambda u: (u.packed, u.plain, u.stored))]


def _kinds(units: Sequence[UnitBytes]) -> tuple[_Kind, ...]:
    """Units of equal sizes; if that makes too many plans, of similar ones."""
    kinds = [_kind(units, members) for members in _equal(units)]
    while _ways(kinds, 1) > MOST_PLANS:
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
    """All of them as one kind: without the largest the slots are smaller."""
    order = sorted(range(len(units)), key=lambda number: -units[number].plain)
    return (_Kind(tuple(order), may_keep=False),)


def _ways(kinds: Sequence[_Kind], step: int) -> int:
    return prod(len(kind.counts(step)) for kind in kinds)


def _step(kinds: Sequence[_Kind]) -> int:
    return next(step for step in count(1) if _ways(kinds, step) <= MOST_PLANS)


def _shares(
    units: Sequence[UnitBytes], kinds: Sequence[_Kind], step: int, room: float = inf
) -> list[_Share]:
    """Every combination of what may be done with each kind, in so many bytes."""
    shares = [_Share((), 0, 0, 0, 0, 0, 0)]
    for kind in kinds:
        more = _shares_of(units, kind, step)
        shares = [_joined(a, b) for a in shares for b in more if a.held + b.held <= room]
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


def _shares_of(units: Sequence[UnitBytes], kind: _Kind, step: int) -> list[_Share]:
    row = [units[number] for number in kind.order]
    plain = _sums(allocated(ALIGN_BYTES + unit.plain) for unit in row)
    packed = _sums(allocated(ALIGN_BYTES + unit.stored) for unit in row)
    streamed = _sums(unit.stored for unit in reversed(row))
    decoded = _sums(unit.plain if unit.packed else 0 for unit in reversed(row))
    slot = _largest(unit.plain for unit in reversed(row))
    staged = [unit.stored if unit.packed else 0 for unit in row]
    chunk, chunk_home = _largest(reversed(staged)), _largest(staged)
    return [
        _Share(
            ((resident, kept),),
            plain[resident] + packed[resident + kept] - packed[resident],
            len(row) - resident,
            slot[len(row) - resident],
            max(chunk[len(row) - resident - kept], chunk_home[resident]),
            streamed[len(row) - resident - kept],
            decoded[len(row) - resident],
        )
        for resident, kept in kind.counts(step)
    ]


def _sums(values: Iterable[int]) -> list[int]:
    """Of none, the first, the first two, and so on."""
    return list(accumulate(values, initial=0))


def _largest(values: Iterable[int]) -> list[int]:
    """Of none, the first, the first two, and so on."""
    return list(accumulate(values, max, initial=0))


def evenly(some: int, total: int, shift: float = 0) -> list[int]:
    """`some` of the numbers below `total`, evenly between the others."""
    return [int((step + shift) * total / some) for step in range(some)]


def _places(letters: str, letter: str) -> list[int]:
    return [place for place, own in enumerate(letters) if own == letter]
