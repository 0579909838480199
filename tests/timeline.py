"""When the copies, the unpacking and the compute of a plan take place, in steady state. Pure.

One link copies streamed units in the order of use, whichever forward they belong to. One device
computes units in order and unpacks packed ones in order. It does one thing at a time and unpacking
goes first: a unit's compute is lengthened by all the unpacking done meanwhile, and what is unpacked
while the device would have waited costs nothing.

- There are `depth` slots for what is fetched ahead and one for what is in use. A copy starts when
  the copy before it has ended and a slot is free: when the unit `depth` streamed units before is
  the next to be used out of a slot. Kept units do not count: they are unpacked into the slot that
  is free when the unit used before them, out of a slot, has been computed.
- The host runs ahead of the device and costs nothing.
- A packed unit's copy runs ahead of its slot by the staging memory. Its unpacking starts when the
  slot is free and so late that it ends no sooner than the copy (chunks follow each other closely).
  With one staging slot nothing is copied while a chunk is unpacked.
- A resident unit needs nothing.
- With depth 0 a unit's slot is free when the unit used before it, out of a slot, has been computed.
- Where there is a slot for each unit that passes through them, all stay, and nothing moves.

A unit's share of the compute is its share of the plain bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from wanoffload.residency import Rates, UnitBytes

GB = 1e9


@dataclass
class Assignment:
    """Of a plan, what the timeline depends on. One letter for each unit: r, k or s."""

    letters: str
    depth: int
    staging_bytes: int = 0  # of all the staging slots together
    staging_slots: int = 3

    @property
    def passing(self) -> list[int]:
        return [unit for unit, letter in enumerate(self.letters) if letter != "r"]

    @property
    def slots(self) -> int:
        return min(self.depth + 1, len(self.passing))


@dataclass(order=True)
class _Unpacking:
    arrival: float
    place: int  # in the endless row of units that are used out of slots
    work: float


@dataclass
class _Device:
    """One processor; `queue`, a heap, holds the unpacking that is known of."""

    now: float = 0.0
    queue: list[_Unpacking] = field(default_factory=list)
    unpacked: set[int] = field(default_factory=set)

    def compute(self, work: float) -> None:
        while self.queue and self.queue[0].arrival < self.now + work:
            work -= max(self.queue[0].arrival - self.now, 0.0)
            self.unpack()
        self.now += work

    def unpack(self) -> None:
        job = heappop(self.queue)
        self.now = max(self.now, job.arrival) + job.work
        self.unpacked.add(job.place)

    def wait_unpacked(self, place: int) -> None:
        while place not in self.unpacked:
            self.unpack()

    def wait(self, until: float) -> None:
        while self.queue and self.queue[0].arrival < until:
            self.unpack()
        self.now = max(self.now, until)


@dataclass
class _Traffic:
    """What comes into slots. `ends`: when the units used out of slots so far had been computed."""

    units: Sequence[UnitBytes]
    plan: Assignment
    rates: Rates
    device: _Device
    ends: list[float] = field(default_factory=list)
    link: float = 0.0
    asked: int = 0  # how many streamed units
    kept: int = -1  # the place of the last kept one that was asked for
    arrived: dict[int, float] = field(default_factory=dict)  # by place; of plain ones

    def ask(self) -> None:
        """For whatever has a slot by now, or will have before the next unit is used out of one."""
        place = len(self.ends)
        if self.plan.letters[self._number(place)] == "k" and self.kept < place:
            self._unpack(place, self._end(place - 1))
            self.kept = place
        while self._gate() < place:
            self._fetch(self._streamed_place(self.asked), self._end(self._gate()))
            self.asked += 1

    def wait(self) -> None:
        place = len(self.ends)
        if self.units[self._number(place)].packed:
            self.device.wait_unpacked(place)
        else:
            self.device.wait(self.arrived[place])

    def _fetch(self, place: int, free: float) -> None:
        unit = self.units[self._number(place)]
        copy = _copy(unit, self.rates)
        if not unit.packed:
            self.link = self.arrived[place] = max(self.link, free) + copy
            return
        ahead = self.plan.staging_bytes / (self.rates.link_gb_per_s * GB)
        if self.plan.staging_slots == 1:
            copy += _unpack(unit, self.rates)
        self.link = max(self.link, free - ahead) + copy
        self._unpack(place, max(free, self.link - _unpack(unit, self.rates)))

    def _unpack(self, place: int, arrival: float) -> None:
        work = _unpack(self.units[self._number(place)], self.rates)
        heappush(self.device.queue, _Unpacking(arrival, place, work))

    def _number(self, place: int) -> int:
        return self.plan.passing[place % len(self.plan.passing)]

    def _gate(self) -> int:
        """The place whose unit's end frees a slot for the streamed unit that is next."""
        if "s" not in self.plan.letters:
            return len(self.ends)  # never
        return self._streamed_place(self.asked - self.plan.depth) - 1

    def _streamed_place(self, count: int) -> int:
        """Of the streamed unit with this number in the endless row."""
        row = [at for at, unit in enumerate(self.plan.passing) if self.plan.letters[unit] == "s"]
        return count // len(row) * len(self.plan.passing) + row[count % len(row)]

    def _end(self, place: int) -> float:
        return self.ends[place] if place >= 0 else 0.0


def seconds(units: Sequence[UnitBytes], plan: Assignment, rates: Rates, forwards: int = 0) -> float:
    """Of a forward: the mean over the second half of so many."""
    forwards = forwards or max(8, 240 // len(units))
    row = ends(units, plan, rates, forwards)
    half = forwards // 2
    return (row[-1] - row[half - 1]) / (forwards - half)


def ends(units: Sequence[UnitBytes], plan: Assignment, rates: Rates, forwards: int) -> list[float]:
    """When each of the forwards ends, from a cold start."""
    whole = sum(unit.plain for unit in units)
    work = [rates.compute_s * unit.plain / whole for unit in units]
    stay = len(plan.passing) <= plan.slots
    if stay:
        return [(number + 1) * rates.compute_s for number in range(forwards)]
    return _overlapped(units, plan, rates, work, forwards)


def _overlapped(
    units: Sequence[UnitBytes], plan: Assignment, rates: Rates, work: list[float], forwards: int
) -> list[float]:
    device = _Device()
    traffic = _Traffic(units, plan, rates, device)
    row = []
    for _ in range(forwards):
        for number, letter in enumerate(plan.letters):
            traffic.ask()
            if letter == "r":
                device.compute(work[number])
                continue
            traffic.wait()
            device.compute(work[number])
            traffic.ends.append(device.now)
        row.append(device.now)
    return row


def _copy(unit: UnitBytes, rates: Rates) -> float:
    return unit.stored / (rates.link_gb_per_s * GB)


def _unpack(unit: UnitBytes, rates: Rates) -> float:
    return unit.plain / (rates.decode_gb_per_s * GB) if unit.packed else 0.0
