"""Homes in pieces, which share memory: each unit is brought where another one was, as in a ring."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch

from tests.packed_units import Unit, packed_unit, plain_unit, unpacking_backend, weights
from wanoffload._C import (
    Backend,
    HostBackend,
    Image,
    OffloadError,
    Prefetcher,
    TransferTimeout,
    UsageError,
)
from wanoffload.device_memory import SlotMemory

CHUNK = 64 * 2048  # of a packed unit's plain image
STAGING_BYTES = CHUNK + 4096
SIZE = 30_000  # of most places: several chunks of the pinned ring
LATE = 0.1  # seconds by which a stream is held up
UNTOUCHED, POISON = 0xD5, 0xEE

# Offset and bytes of each piece, in the order of the unit's bytes.
Place = list[tuple[int, int]]


class Rig:
    """Units whose homes lie in one memory, and an engine."""

    def __init__(
        self,
        units: Sequence[Unit],
        places: Sequence[Place],
        *,
        device: str = "cpu",
        backend: Backend | None = None,
        depth: int = 0,
        least_stretch: int = 1,
        timeout_ms: int = 5000,
        ring_chunks: int = 3,
    ) -> None:
        self.device = device
        self.backend = backend or unpacking_backend(device)
        self.units = list(units)
        self.places = list(places)
        self.options: dict[str, Any] = {
            "depth": depth,
            "least_stretch": least_stretch,
            "timeout_ms": timeout_ms,
            "ring_chunks": ring_chunks,
        }
        self.nbytes = max(at + nbytes for place in places for at, nbytes in place)
        self.memory = torch.full((self.nbytes + 256,), UNTOUCHED, dtype=torch.uint8, device=device)
        self.lead = -self.memory.data_ptr() % 256
        self.staging = SlotMemory(2, STAGING_BYTES, torch.device(device))
        self.engine = self.new_engine()
        self.add_units([False] * len(self.units))

    def new_engine(self) -> Prefetcher:
        engine = Prefetcher(
            self.backend,
            [],
            0,
            [self.memory, self.staging.memory],
            ring_chunk_bytes=7000,
            threads=2,
            staging=self.staging.addresses(),
            staging_bytes=self.staging.slot_bytes,
            **self.options,
        )
        engine.set_poison(POISON)
        return engine

    def add_units(self, filled: Sequence[bool]) -> None:
        for unit, place, full in zip(self.units, self.places, filled, strict=True):
            self.engine.add_unit(unit.image, home=self.home(place), filled=full)

    def home(self, place: Place) -> list[tuple[int, int]]:
        begin = self.memory.data_ptr() + self.lead
        return [(begin + at, nbytes) for at, nbytes in place]

    def reopen(self) -> list[bool]:
        """Closes the engine and makes another one; returns which homes it took over."""
        self.engine.close()
        filled = [self.engine.home_filled(unit) for unit in range(len(self.units))]
        self.engine = self.new_engine()
        self.add_units(filled)
        return filled

    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0

    def bytes(self) -> torch.Tensor:
        """All of the memory that has places."""
        return self.memory[self.lead : self.lead + self.nbytes]

    def pieces(self, unit: int) -> list[torch.Tensor]:
        """Where the unit's bytes are to be read, in order."""
        left = self.units[unit].plain.numel()
        pieces = []
        for at, nbytes in self.places[unit]:
            now = min(left, nbytes)
            pieces.append(self.bytes()[at : at + now])
            left -= now
        return pieces

    def acquire(self, unit: int, stream: int) -> int:
        slot, generation = self.engine.acquire(unit, stream)
        assert slot == unit  # there are no other slots
        return generation

    def use(self, unit: int) -> torch.Tensor:
        generation = self.acquire(unit, self.stream())
        seen = torch.cat(self.pieces(unit))
        self.engine.release(unit, self.stream(), generation)
        return seen

    def check(self, unit: int) -> None:
        assert torch.equal(self.use(unit).cpu(), self.units[unit].plain), f"unit {unit}"

    def fetched(self) -> int:
        """Fetches since the last call."""
        fetches = self.engine.stats().fetches
        self.engine.reset_stats()
        return fetches

    def overwrite(self, unit: int) -> None:
        """New bytes where a plain unit's stand on the host."""
        self.units[unit].plain = weights(self.units[unit].plain.numel())
        torch.frombuffer(self.units[unit].memory, dtype=torch.uint8).copy_(self.units[unit].plain)


class LateReader:
    """A unit's reader on a stream of its own that begins late."""

    unfinished: ClassVar[list[LateReader]] = []  # and what they touch

    def __init__(self, rig: Rig, unit: int, seconds: float = 2 * LATE) -> None:
        self.backend = HostBackend()
        self.stream, self.event = self.backend.create_stream(), self.backend.create_event()
        self.wanted = rig.units[unit].plain
        generation = rig.acquire(unit, self.stream)
        hold_up(self.stream, seconds)
        pieces = rig.pieces(unit)
        self.seen = [torch.zeros_like(piece) for piece in pieces]
        self.memory = rig.memory
        self.unfinished.append(self)
        for seen, piece in zip(self.seen, pieces, strict=True):
            self.backend.copy_to_device(
                seen.data_ptr(), piece.data_ptr(), piece.numel(), self.stream
            )
        self.backend.record(self.event, self.stream)
        rig.engine.release(unit, self.stream, generation)

    def has_read(self) -> bool:
        return self.backend.is_complete(self.event)

    def check(self) -> None:
        self.backend.synchronize(self.event)
        assert torch.equal(torch.cat(self.seen), self.wanted)


@pytest.fixture(autouse=True)
def _readers_end() -> Iterator[None]:
    """Also those of a test that failed before it had waited for them."""
    yield
    while LateReader.unfinished:
        reader = LateReader.unfinished.pop()
        reader.backend.synchronize(reader.event)


def hold_up(stream: int, seconds: float = LATE) -> None:
    """What is enqueued on a stream of the host backend from here on begins late."""
    nothing = torch.zeros(1)
    HostBackend(latency_us=seconds * 1e6).copy_to_device(
        nothing.data_ptr(), nothing.data_ptr(), 0, stream
    )


def plain_units(
    sizes: Sequence[int], lock: bool = True, backend: Backend | None = None
) -> list[Unit]:
    backend = backend or HostBackend()
    return [plain_unit(backend, nbytes, lock=lock) for nbytes in sizes]


def ring(sizes: Sequence[int], nbytes: int) -> list[Place]:
    """One behind the other, the last bytes of the memory before its first."""
    places, at = [], 0
    for size in sizes:
        first = min(size, nbytes - at)
        places.append([(at, first)] + [(0, size - first)] * (size > first))
        at = (at + size) % nbytes
    return places


def overlap(one: Place, other: Place) -> bool:
    return any(
        max(a, b) < min(a + a_bytes, b + b_bytes) for a, a_bytes in one for b, b_bytes in other
    )


def random_place(nbytes: int, memory: int, count: int) -> Place:
    """So many pieces that have no byte in common, in any order."""
    ends = sorted(random.sample(range(1, nbytes), count - 1))
    sizes = [end - begin for begin, end in zip([0, *ends], [*ends, nbytes], strict=True)]
    gaps = sorted(random.randint(0, memory - nbytes) for _ in sizes)
    starts = [gap + sum(sizes[:i]) for i, gap in enumerate(gaps)]
    return random.sample(list(zip(starts, sizes, strict=True)), count)


def make_world(rig_device: str, lock: bool, depth: int) -> tuple[Rig, list[set[int]]]:
    """Plain units in several pieces and packed ones, anywhere, and whom each of them ends."""
    backend = unpacking_backend(rig_device)
    memory = 6 * SIZE
    units, places = [], []
    for number in range(9):
        if number % 3 == 2:
            unit = packed_unit(backend, random.randrange(256, SIZE, 256), lock=lock)
            room = unit.plain.numel()
            places.append([(random.randrange(0, memory - room, 16), room)])
        else:
            unit = plain_unit(backend, random.randrange(2, 2 * SIZE, 2), lock=lock)
            room = unit.plain.numel() + random.choice([0, 100])
            places.append(random_place(room, memory, min(room, random.randint(1, 4))))
        units.append(unit)
    rig = Rig(
        units,
        places,
        device=rig_device,
        backend=backend,
        depth=depth,
        least_stretch=random.choice([1, 3000, 1 << 20]),
    )
    ends = [
        {i for i, other in enumerate(places) if i != n and overlap(place, other)}
        for n, place in enumerate(places)
    ]
    return rig, ends


@pytest.mark.parametrize("lock", [True, False])
def test_a_unit_brought_into_shared_memory_ends_what_was_there_and_nothing_else(
    device: str, lock: bool
) -> None:
    sizes = [SIZE, SIZE, SIZE]
    backend = unpacking_backend(device)
    places = [[(0, SIZE)], [(SIZE // 2, SIZE)], [(SIZE // 2 + SIZE, SIZE)]]
    rig = Rig(plain_units(sizes, lock, backend), places, device=device, backend=backend)
    counts = []
    for unit in (0, 2, 0, 1, 2, 1, 0, 0, 2, 1):
        rig.check(unit)
        counts.append(rig.fetched())
    assert counts == [1, 1, 0, 1, 0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("lock", [True, False])
@pytest.mark.parametrize("least_stretch", [1, 2000, 1 << 20])
def test_every_byte_lands_where_its_piece_was_said_to_be(
    device: str, lock: bool, least_stretch: int
) -> None:
    backend = unpacking_backend(device)
    places: list[Place] = [
        [(20_000, 11_000), (3, 1), (100, 9000), (40_000, 10_000)],
        [(25_000, 10_000), (9_050, 3000)],
        [(45_000, 1)],
        [(0, 9000)],
    ]
    rig = Rig(
        [plain_unit(backend, nbytes, lock=lock) for nbytes in (SIZE, 12_344, 0, 9000)],
        places,
        device=device,
        backend=backend,
        least_stretch=least_stretch,
    )
    wanted = torch.full((rig.nbytes,), UNTOUCHED, dtype=torch.uint8)
    for unit in (0, 1, 2, 3, 1, 0, 2, 1):
        fetches = rig.engine.stats().fetches
        rig.check(unit)
        if rig.engine.stats().fetches > fetches:
            put(wanted, rig.units[unit].plain, places[unit])
        assert torch.equal(rig.bytes().cpu(), wanted), f"unit {unit}"
    assert rig.fetched() == 7  # unit 3 has left unit 1 alone


def put(memory: torch.Tensor, plain: torch.Tensor, place: Place) -> None:
    """What a fill leaves in the memory."""
    room = torch.full((sum(nbytes for _, nbytes in place),), POISON, dtype=torch.uint8)
    room[: plain.numel()] = plain
    done = 0
    for at, nbytes in place:
        memory[at : at + nbytes] = room[done : done + nbytes]
        done += nbytes


@pytest.mark.parametrize("lock", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_units_used_in_any_order_come_again_just_when_others_took_their_memory(
    device: str, lock: bool, seed: int
) -> None:
    random.seed(seed)
    rig, ends = make_world(device, lock, depth=0)
    wanted = torch.full((rig.nbytes,), UNTOUCHED, dtype=torch.uint8)
    there: set[int] = set()
    for _ in range(40):
        unit = random.randrange(len(ends))
        rig.check(unit)
        assert rig.fetched() == (unit not in there), f"unit {unit}"
        if unit not in there:
            put(wanted, rig.units[unit].plain, rig.places[unit])
            there = (there - ends[unit]) | {unit}
        assert torch.equal(rig.bytes().cpu(), wanted)
    rig.engine.close()
    assert [rig.engine.home_filled(unit) for unit in range(len(ends))] == [
        unit in there for unit in range(len(ends))
    ]


@pytest.mark.parametrize("lock", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_units_that_are_fetched_ahead_skipped_and_used_out_of_order_are_right(
    device: str, lock: bool, seed: int
) -> None:
    random.seed(seed)
    rig, ends = make_world(device, lock, depth=random.randint(1, 4))
    rig.engine.prefetch()
    for _ in range(6):
        units = list(range(len(ends)))
        if random.random() < 0.3:
            random.shuffle(units)
        for unit in units:
            if random.random() < 0.8:
                rig.check(unit)
    rig.engine.close()


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
@pytest.mark.parametrize("lock", [True, False])
def test_a_ring_is_filled_ahead_of_its_use_and_each_unit_comes_once_in_a_pass(
    device: str, depth: int, lock: bool
) -> None:
    """Also one that has no room for as many units as the depth asks for."""
    backend = unpacking_backend(device)
    sizes = [SIZE, 20_000, SIZE, 7000, SIZE, SIZE]
    rig = Rig(
        plain_units(sizes, lock, backend),
        ring(sizes, 5 * SIZE // 2),
        device=device,
        backend=backend,
        depth=depth,
    )
    for _ in range(2):
        for unit in range(6):
            rig.check(unit)
    rig.engine.reset_stats()
    for _ in range(3):
        for unit in range(6):
            rig.check(unit)
    stats = rig.engine.stats()
    assert (stats.fetches, stats.bytes_fetched, stats.cold) == (18, 3 * sum(sizes), 0)


def two_beneath_one(lock: bool = True, **options: int) -> Rig:
    """Units 0 and 1 lie side by side; unit 2 takes the place of both."""
    places = [[(0, SIZE)], [(SIZE, SIZE)], [(0, 2 * SIZE)]]
    rig = Rig(plain_units([SIZE, SIZE, 2 * SIZE], lock), places, **options)  # type: ignore[arg-type]
    for unit in (0, 1):
        rig.check(unit)
    return rig


def fails(rig: Rig, unit: int, stream: int) -> bool:
    """Uses a unit, and says whether a call that was told to fail has done so."""
    try:
        rig.engine.release(unit, stream, rig.acquire(unit, stream))
    except OffloadError as error:
        if "told to fail" not in str(error):
            raise
        return True
    return False


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("lock", [True, False])
def test_a_fill_begins_in_the_stretch_that_is_free_while_another_is_still_read(lock: bool) -> None:
    rig = two_beneath_one(lock, ring_chunks=12)
    reader = LateReader(rig, 1, 1)
    stream = rig.backend.create_stream()
    generation = rig.acquire(2, stream)  # on that stream, so that the host does not wait
    plain = rig.units[2].plain
    wait_for(lambda: reader.has_read() or torch.equal(rig.bytes()[:SIZE], plain[:SIZE]))
    assert torch.equal(rig.bytes()[:SIZE], plain[:SIZE])
    assert torch.equal(rig.bytes()[SIZE:], rig.units[1].plain)
    assert not reader.has_read()
    rig.engine.release(2, stream, generation)
    reader.check()
    rig.check(2)
    assert rig.fetched() == 3
    rig.backend.destroy_stream(stream)


@pytest.mark.parametrize("lock", [True, False])
def test_stretches_that_are_too_small_wait_for_each_other_s_readers(lock: bool) -> None:
    rig = two_beneath_one(lock, least_stretch=SIZE + 1, ring_chunks=12)
    reader = LateReader(rig, 1)
    stream = rig.backend.create_stream()
    generation = rig.acquire(2, stream)
    time.sleep(LATE)
    begun = rig.bytes()[:SIZE].clone()
    assert not reader.has_read()
    assert torch.equal(begun, rig.units[0].plain)
    rig.engine.release(2, stream, generation)
    reader.check()
    rig.check(2)
    rig.backend.destroy_stream(stream)


@pytest.mark.parametrize("least_stretch", [1, 1 << 20])
@pytest.mark.parametrize("lock", [True, False])
@pytest.mark.parametrize("read_late", [[0], [1], [0, 1]])
def test_what_is_overwritten_has_been_read_whichever_reader_is_late(
    read_late: list[int], lock: bool, least_stretch: int
) -> None:
    rig = two_beneath_one(lock, least_stretch=least_stretch)
    readers = [LateReader(rig, unit) for unit in read_late]
    stream = rig.backend.create_stream()
    rig.engine.release(2, stream, rig.acquire(2, stream))
    for reader in readers:
        reader.check()
    rig.check(2)
    rig.backend.destroy_stream(stream)


@pytest.mark.parametrize("lock", [True, False])
def test_a_unit_s_readers_are_waited_for_by_all_who_take_a_part_of_its_place(lock: bool) -> None:
    rig = two_beneath_one(lock)
    reader = LateReader(rig, 2, 3 * LATE)
    streams = [rig.backend.create_stream() for _ in range(2)]
    for unit, stream in enumerate(streams):  # nothing waits in between
        rig.engine.release(unit, stream, rig.acquire(unit, stream))
    reader.check()
    for unit in (0, 1, 2):
        rig.check(unit)
    for stream in streams:
        rig.backend.destroy_stream(stream)


@pytest.mark.parametrize("lock", [True, False])
def test_two_readers_of_a_place_are_both_waited_for_by_who_takes_a_part_of_it(lock: bool) -> None:
    rig = two_beneath_one(lock)
    rig.check(2)
    readers = [LateReader(rig, 2, seconds) for seconds in (3 * LATE, LATE)]
    stream = rig.backend.create_stream()
    rig.engine.release(1, stream, rig.acquire(1, stream))
    for reader in readers:
        reader.check()
    rig.check(1)
    rig.backend.destroy_stream(stream)


@pytest.mark.parametrize("lock", [True, False])
def test_what_was_unpacked_there_and_never_read_comes_before_a_copy(lock: bool) -> None:
    backend = HostBackend()
    units = [packed_unit(backend, CHUNK, lock=lock), plain_unit(backend, SIZE, lock=lock)]
    rig = Rig(units, [[(0, CHUNK)], [(1000, SIZE)]], backend=backend, depth=1)
    for _ in range(2):
        hold_up(rig.engine.unpack_stream)
        rig.engine.set_order([0, 1])
        rig.engine.prefetch()
        wait_and_check(rig, 1)
        assert rig.fetched() == 3  # and unit 0 again, for next time
        rig.engine.invalidate(1)
        rig.engine.invalidate(0)


@pytest.mark.parametrize("lock", [True, False])
def test_the_next_fill_waits_for_the_readers_that_a_failed_one_has_not_waited_for(
    lock: bool,
) -> None:
    """At whatever call it failed; and who takes what a failed fill left of another's place."""
    failures = 0
    for nth, after in ((nth, after) for nth in range(1, 8) for after in (0, 1, 2)):
        rig = two_beneath_one(lock)
        assert isinstance(rig.backend, HostBackend)
        readers = [LateReader(rig, unit, LATE) for unit in (0, 1)]
        streams = [rig.backend.create_stream() for _ in range(2)]
        rig.backend.fail_at(nth)
        failures += fails(rig, 2, streams[0])
        rig.backend.fail_at(0)
        if after != 2:
            rig.engine.invalidate(after)
            rig.overwrite(after)
        rig.engine.release(after, streams[1], rig.acquire(after, streams[1]))
        for reader in readers:
            reader.check()
        for unit in (after, 0, 1, 2):
            rig.check(unit)
        rig.engine.close()
        for stream in streams:
            rig.backend.destroy_stream(stream)
    assert failures >= 9


def test_a_copy_comes_behind_what_a_failed_fill_has_not_come_behind() -> None:
    """Unpacked and never read; then a fill that failed before it wrote."""
    for nth in range(1, 6):
        backend = HostBackend()
        units = [packed_unit(backend, CHUNK), *plain_units([SIZE, SIZE - 2000])]
        places = [[(0, CHUNK)], [(0, SIZE)], [(1000, SIZE - 2000)]]
        rig = Rig(units, places, backend=backend, depth=1)
        hold_up(rig.engine.unpack_stream)
        rig.engine.prefetch()
        stream = backend.create_stream()
        backend.fail_at(nth)
        fails(rig, 1, stream)
        backend.fail_at(0)
        rig.engine.abandon(0)
        rig.engine.set_order([2, 1, 0])
        wait_and_check(rig, 2)
        rig.engine.close()
        backend.destroy_stream(stream)


def wait_and_check(rig: Rig, unit: int) -> None:
    """Reads the unit once all that was held up has had its time."""
    generation = rig.acquire(unit, 0)
    time.sleep(1.5 * LATE)
    assert torch.equal(torch.cat(rig.pieces(unit)), rig.units[unit].plain)
    rig.engine.release(unit, 0, generation)


def test_what_is_late_in_a_place_is_over_before_another_unit_is_brought_there() -> None:
    """Unit 0 is skipped while it comes through the ring; unit 1 would be copied at once."""
    backend = HostBackend(latency_us=20_000)
    units = [plain_unit(backend, 50_000, lock=False), plain_unit(backend, SIZE)]
    rig = Rig(units, [[(0, 50_000)], [(10_000, SIZE)]], backend=backend, depth=1, ring_chunks=1)
    rig.engine.prefetch()
    generation = rig.acquire(1, 0)
    time.sleep(3 * LATE)
    assert torch.equal(torch.cat(rig.pieces(1)), rig.units[1].plain)
    rig.engine.release(1, 0, generation)
    rig.check(0)


def test_a_unit_that_waits_too_long_for_another_s_memory_says_so_and_comes_later() -> None:
    backend = HostBackend(latency_us=20_000)
    units = [plain_unit(backend, 50_000, lock=False), plain_unit(backend, SIZE)]
    rig = Rig(
        units,
        [[(0, 50_000)], [(10_000, SIZE)]],
        backend=backend,
        depth=1,
        ring_chunks=1,
        timeout_ms=40,
    )
    rig.engine.prefetch()
    with pytest.raises(TransferTimeout, match="unit 1 could not be fetched"):
        rig.engine.acquire(1, 0)
    patiently(lambda: rig.check(1))
    patiently(lambda: rig.check(0))


def patiently(call: Callable[[], None]) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            return call()
        except TransferTimeout:
            assert time.monotonic() < deadline


@pytest.mark.parametrize("lock", [True, False])
def test_a_unit_in_use_whose_memory_another_one_wants_is_an_error_that_names_both(
    device: str, lock: bool
) -> None:
    backend = unpacking_backend(device)
    places = [[(0, SIZE)], [(SIZE // 2, SIZE)], [(SIZE, SIZE)]]
    rig = Rig(plain_units([SIZE] * 3, lock, backend), places, device=device, backend=backend)
    for unit in (0, 2):
        rig.check(unit)
    rig.fetched()
    generation = rig.acquire(0, rig.stream())
    for _ in range(2):
        with pytest.raises(UsageError, match=r"unit 1 was acquired while unit 0.* not released"):
            rig.engine.acquire(1, rig.stream())
        rig.check(0)
        rig.check(2)
    assert rig.fetched() == 0
    rig.engine.release(0, rig.stream(), generation)
    rig.check(1)
    assert rig.fetched() == 1
    rig.check(0)


def test_no_unit_is_fetched_ahead_into_memory_that_is_in_use() -> None:
    places = [[(0, SIZE)], [(SIZE // 2, SIZE)], [(SIZE, SIZE)]]
    rig = Rig(plain_units([SIZE] * 3), places, depth=2)
    generation = rig.acquire(0, 0)
    rig.engine.prefetch()
    assert torch.equal(torch.cat(rig.pieces(0)), rig.units[0].plain)
    assert rig.fetched() == 1
    rig.engine.release(0, 0, generation)
    assert rig.fetched() == 1  # unit 1; unit 2 would end it
    rig.check(1)
    stats = rig.engine.stats()
    assert (stats.failures, stats.cold, stats.fetches) == (0, 0, 2)


def test_a_failure_ahead_is_told_by_the_unit_that_needed_it_and_no_other() -> None:
    for nth in range(1, 30):
        sizes = [SIZE, 20_000, SIZE, 7000]
        backend = HostBackend()
        rig = Rig(
            plain_units(sizes, True, backend), ring(sizes, 2 * SIZE), backend=backend, depth=2
        )
        backend.fail_at(nth)
        failures = []
        for turn in range(3):
            for unit in range(4):
                try:
                    rig.check(unit)
                except OffloadError as error:
                    failures.append((turn, str(error)))
                    rig.engine.abandon(0)
            if turn == 0:
                backend.fail_at(0)
        assert len(failures) <= 1, f"call {nth}"
        assert all(turn < 2 and "told to fail" in error for turn, error in failures)
        rig.engine.close()


def test_a_change_of_a_unit_leaves_alone_who_has_its_memory_now() -> None:
    rig = two_beneath_one()
    rig.check(2)
    rig.check(1)
    rig.fetched()
    rig.engine.invalidate(0)
    rig.engine.invalidate(2)
    assert rig.engine.stats().invalidations == 0
    rig.overwrite(0)
    rig.check(1)
    assert rig.fetched() == 0
    rig.engine.invalidate(1)
    assert rig.engine.stats().invalidations == 1
    rig.overwrite(1)
    for unit in (1, 0, 2):
        rig.check(unit)
    assert rig.fetched() == 3


@pytest.mark.parametrize("lock", [True, False])
def test_images_of_another_kind_take_a_unit_s_place_in_shared_memory(
    device: str, lock: bool
) -> None:
    backend = unpacking_backend(device)
    units = plain_units([SIZE // 256 * 256] * 3, lock, backend)
    places = [[(0, SIZE)], [(SIZE // 2 // 16 * 16, SIZE)], [(SIZE, SIZE)]]
    rig = Rig(units, places, device=device, backend=backend, depth=1)
    for turn in range(9):
        for unit in range(3):
            rig.check(unit)
        changed = turn % 3
        make = packed_unit if turn % 2 == 0 else plain_unit
        rig.units[changed] = make(backend, 100 * 256, lock=lock)
        rig.engine.replace_unit(changed, rig.units[changed].image)
    for unit in range(3):
        rig.check(unit)
    rig.engine.close()


@pytest.mark.parametrize("lock", [True, False])
def test_closing_waits_for_readers_whose_memory_others_have_taken(lock: bool) -> None:
    rig = two_beneath_one(lock)
    reader = LateReader(rig, 1)
    stream = rig.backend.create_stream()
    rig.engine.release(2, stream, rig.acquire(2, stream))
    rig.engine.close()
    rig.memory.fill_(7)
    reader.check()
    time.sleep(LATE)
    assert bool((rig.memory == 7).all())
    rig.backend.destroy_stream(stream)


def test_another_engine_takes_over_what_was_brought_last() -> None:
    places = [[(0, SIZE)], [(SIZE, SIZE)], [(SIZE // 2, SIZE)], [(2 * SIZE, 10), (9, 3)]]
    rig = Rig(plain_units([SIZE, SIZE, SIZE, 12]), places)
    for unit in (1, 2, 0, 3):
        rig.check(unit)
    assert rig.reopen() == [False, False, False, True]
    rig.check(1)
    rig.check(0)
    assert rig.reopen() == [True, True, False, False]
    rig.check(0)
    rig.check(1)
    assert rig.fetched() == 0
    for unit in (2, 3, 0):
        rig.check(unit)
    assert rig.fetched() == 3


@pytest.mark.parametrize("first", [0, 1])
def test_where_packed_bytes_stay_no_other_home_is(first: int) -> None:
    backend = HostBackend()
    packed, plain = packed_unit(backend, CHUNK), plain_unit(backend, SIZE)
    engine = Prefetcher(backend, [1 << 20], CHUNK, None, depth=0)
    nbytes = packed.image.nbytes
    kinds: list[tuple[Image, dict[str, Any]]] = [
        (packed.image, {"home": [(256, nbytes)], "as_stored": True}),
        (plain.image, {"home": [(1 << 24, SIZE - 1), (255 + nbytes, 1)]}),
    ]
    image, options = kinds[first]
    engine.add_unit(image, **options)
    image, options = kinds[1 - first]
    with pytest.raises(UsageError, match="packed bytes stay shares no memory"):
        engine.add_unit(image, **options)
    assert engine.unit_count == 1
    image, options = kinds[first]
    nearly = {**options, "home": [(1 << 25, CHUNK)]}
    assert engine.add_unit(image, **nearly) == 1


def test_homes_that_can_not_be_are_refused_and_nothing_has_changed() -> None:
    backend = HostBackend()
    rig = Rig([*plain_units([SIZE]), packed_unit(backend, 4096)], [[(0, SIZE)], [(SIZE, 4096)]])
    plain, packed = (unit.image for unit in rig.units)
    at = rig.home([(0, 0)])[0][0]
    with pytest.raises(UsageError, match="packed unit has a home of one piece"):
        rig.engine.add_unit(packed, home=[(at, 2048), (at + 4096, 2048)])
    with pytest.raises(UsageError, match=rf"{SIZE} bytes in a home of {SIZE - 1}"):
        rig.engine.add_unit(plain, home=[(at, SIZE - 3), (at + SIZE, 2)])
    with pytest.raises(UsageError, match="begins at an address"):
        rig.engine.add_unit(plain, home=[(at, SIZE - 1), (0, 1)])
    with pytest.raises(UsageError, match="share no memory with each other"):
        rig.engine.add_unit(plain, home=[(at, SIZE - 1), (at + SIZE - 2, 1)])
    with pytest.raises(UsageError, match="begins at"):
        rig.engine.add_unit(packed, home=[(at + 8, 4096)])
    rig.check(0)
    with pytest.raises(UsageError, match="filled from the beginning"):
        rig.engine.add_unit(plain, home=[(at + 7 * SIZE, SIZE - 1), (at, 1)], filled=True)
    assert rig.engine.unit_count == 2
    rig.check(0)
    rig.check(1)
    assert rig.fetched() == 2


def test_a_packed_image_takes_no_place_of_several_pieces() -> None:
    rig = Rig(plain_units([SIZE]), [[(SIZE, SIZE - 5), (0, 5)]])
    rig.check(0)
    with pytest.raises(UsageError, match="packed unit has a home of one piece"):
        rig.engine.replace_unit(0, packed_unit(rig.backend, 4096).image)
    rig.check(0)
    assert rig.fetched() == 1


def test_a_unit_of_no_bytes_ends_what_was_in_its_place_and_one_without_a_byte_does_not() -> None:
    rig = Rig(plain_units([SIZE, 0, 0]), [[(0, SIZE)], [(100, 1)], [(200, 0)]])
    for unit, fetches in ((0, 1), (1, 1), (1, 0), (0, 1), (2, 1), (0, 0), (2, 0), (1, 1)):
        rig.check(unit)
        assert rig.fetched() == fetches
