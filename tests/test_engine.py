"""The engine alone: units of random bytes through slots of torch memory, on every backend."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import time
import weakref
from dataclasses import dataclass, field

import pytest
import torch

from wanoffload._C import (
    Backend,
    BackendError,
    ClosedError,
    CudaBackend,
    HostBackend,
    HostImage,
    HostStore,
    OffloadError,
    PinnedRing,
    Prefetcher,
    TransferError,
    TransferTimeout,
    UsageError,
)
from wanoffload.device_memory import SlotMemory

SIZE = 4096


@dataclass
class Rig:
    """An engine with `units` images of random bytes. Reads copy the slot, so that they are reads
    by the compute stream, in its order."""

    device: str
    units: int
    slots: int
    depth: int
    locked: bool = True
    backend: Backend = field(default_factory=HostBackend)
    sizes: list[int] | None = None

    def __post_init__(self) -> None:
        if self.device == "cuda":
            self.backend = CudaBackend(0)
        sizes = self.sizes or [SIZE] * self.units
        self.memory = SlotMemory(self.slots, max(sizes), torch.device(self.device))
        self.engine = Prefetcher(
            self.backend,
            self.memory.addresses(),
            self.memory.slot_bytes,
            self.memory.memory,
            depth=self.depth,
            ring_chunks=3,
            ring_chunk_bytes=1000,
            threads=2,
            timeout_ms=5000,
        )
        store = HostStore(self.backend)
        self.images: list[HostImage] = []
        for nbytes in sizes:
            image = store.allocate(nbytes)
            self.bytes_of(image).random_(0, 256)
            if self.locked:
                image.lock()
            self.images.append(image)
            self.engine.add_unit(image)

    @staticmethod
    def bytes_of(image: HostImage) -> torch.Tensor:
        if image.nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(image, dtype=torch.uint8)

    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0

    def use(self, unit: int) -> torch.Tensor:
        """Acquires, reads on the compute stream, releases. Returns what was read."""
        slot, generation = self.engine.acquire(unit, self.stream())
        seen = self.memory.window(slot, self.images[unit].nbytes).clone()
        self.engine.release(unit, self.stream(), generation)
        return seen

    def check(self, unit: int) -> None:
        assert torch.equal(self.use(unit).cpu(), self.bytes_of(self.images[unit]))


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("units", [1, 2, 3, 4, 7, 40, 41])
def test_any_number_of_units_passes_any_number_of_slots(
    device: str, units: int, slots: int, locked: bool
) -> None:
    """Bug 1: a ring whose size does not divide the number of blocks overwrote a live slot."""
    rig = Rig(device, units, slots, depth=slots - 1, locked=locked)
    for _ in range(3):
        for unit in range(units):
            rig.check(unit)
    stats = rig.engine.stats()
    assert stats.acquires == 3 * units
    expected = units if slots >= units else 3 * units + min(slots - 1, units - 1)
    assert stats.fetches == expected
    assert stats.bytes_fetched == expected * SIZE
    rig.engine.close()


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 50])
def test_depth_may_be_more_or_less_than_the_slots_allow(device: str, depth: int) -> None:
    for slots in (1, 2, 3, 6):
        rig = Rig(device, 5, slots, depth)
        for unit in [*range(5), *range(5)]:
            rig.check(unit)
        rig.engine.close()


def test_units_are_fetched_in_their_order_and_wrap_around() -> None:
    rig = Rig("cpu", 4, 3, depth=2)
    rig.engine.set_order([2, 0, 3, 1])
    rig.engine.prefetch()
    for unit in [2, 0, 3, 1, 2, 0, 3, 1]:
        rig.check(unit)
    fetched = [
        int(line.split()[3])
        for line in rig.engine.recent_events().splitlines()
        if " fetch unit" in line
    ]
    assert fetched == [2, 0, 3, 1, 2, 0, 3, 1, 2, 0]
    assert rig.engine.stats().cold == 0


def test_an_order_must_name_every_unit_once() -> None:
    rig = Rig("cpu", 3, 2, depth=1)
    for order in ([0, 1], [0, 1, 1], [0, 1, 3], [0, 1, 2, 0]):
        with pytest.raises(UsageError, match="every unit once"):
            rig.engine.set_order(order)
    assert rig.engine.order() == [0, 1, 2]


def test_the_bytes_fetched_are_those_of_the_moment(device: str) -> None:
    """Bug 5: weights updated on the host while a copy from the same bytes was in flight."""
    rig = Rig(device, 3, 2, depth=1)
    for unit in range(3):
        rig.check(unit)
    rig.engine.invalidate(0)  # it was prefetched for the next round
    rig.bytes_of(rig.images[0]).random_(0, 256)
    rig.check(0)
    stats = rig.engine.stats()
    assert (stats.invalidations, stats.cold) == (1, 2)


def test_invalidate_waits_for_the_copy_that_reads_the_bytes() -> None:
    backend = HostBackend(bytes_per_second=SIZE / 0.2)
    rig = Rig("cpu", 2, 2, depth=1, backend=backend)
    rig.engine.prefetch()
    begin = time.monotonic()
    rig.engine.invalidate(0)
    assert time.monotonic() - begin > 0.1


def test_a_slot_is_not_refilled_before_its_reader_has_finished() -> None:
    """The reader is a stream of its own, and behind: what it reads must be what it acquired."""
    slow = HostBackend(latency_us=3000)
    rig = Rig("cpu", 5, 2, depth=1, backend=slow)
    stream = slow.create_stream()
    event = slow.create_event()
    seen = [torch.zeros(SIZE, dtype=torch.uint8) for _ in range(10)]
    other = torch.zeros(1, dtype=torch.uint8)
    for i, unit in enumerate([*range(5), *range(5)]):
        slot, generation = rig.engine.acquire(unit, stream)
        source = rig.memory.window(slot, SIZE).data_ptr()
        for _ in range(4):  # other work first
            slow.copy_to_device(other.data_ptr(), seen[i].data_ptr(), 1, stream)
        slow.copy_to_device(seen[i].data_ptr(), source, SIZE, stream)
        rig.engine.release(unit, stream, generation)
    slow.record(event, stream)
    slow.synchronize(event)
    for i, unit in enumerate([*range(5), *range(5)]):
        assert torch.equal(seen[i], rig.bytes_of(rig.images[unit])), f"read {i} of unit {unit}"
    rig.engine.close()
    slow.destroy_event(event)
    slow.destroy_stream(stream)


@pytest.mark.gpu
@pytest.mark.parametrize("locked", [True, False])
def test_delays_on_either_stream_change_nothing(locked: bool) -> None:
    rig = Rig("cuda", 7, 3, depth=2, locked=locked, sizes=[1 << 20] * 7)
    rig.engine.set_poison(0xFF)
    copies = torch.cuda.ExternalStream(rig.engine.copy_stream)
    chance = random.Random(1)
    reads = []
    for unit in [*range(7)] * 6:
        if chance.random() < 0.4:
            torch.cuda._sleep(chance.randrange(2_000_000))
        if chance.random() < 0.4:
            with torch.cuda.stream(copies):
                torch.cuda._sleep(chance.randrange(2_000_000))
        slot, generation = rig.engine.acquire(unit, rig.stream())
        if chance.random() < 0.4:
            torch.cuda._sleep(chance.randrange(2_000_000))
        reads.append((unit, rig.memory.window(slot, 1 << 20).clone()))
        rig.engine.release(unit, rig.stream(), generation)
    for unit, seen in reads:
        assert torch.equal(seen.cpu(), rig.bytes_of(rig.images[unit]))


@pytest.mark.gpu
def test_readers_on_two_streams_are_both_waited_for() -> None:
    rig = Rig("cuda", 3, 2, depth=1, sizes=[1 << 20] * 3)
    rig.engine.set_poison(0xFF)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    reads = []
    for i, unit in enumerate([0, 1, 2] * 8):
        with torch.cuda.stream(streams[i % 2]):
            slot, generation = rig.engine.acquire(unit, streams[i % 2].cuda_stream)
            torch.cuda._sleep(1_000_000 * (i % 3))
            reads.append((unit, rig.memory.window(slot, 1 << 20).clone()))
            rig.engine.release(unit, streams[i % 2].cuda_stream, generation)
    torch.cuda.synchronize()
    for unit, seen in reads:
        assert torch.equal(seen.cpu(), rig.bytes_of(rig.images[unit]))


def test_units_of_different_sizes_and_none_share_the_slots(device: str) -> None:
    for locked in (True, False):
        rig = Rig(device, 5, 2, depth=1, locked=locked, sizes=[1000, 0, 4096, 1, 2500])
        for unit in [*range(5), *range(5)]:
            rig.check(unit)


def test_units_of_no_bytes_take_slots_of_no_bytes_as_others_take_theirs() -> None:
    counts = []
    for nbytes in (0, 1):
        rig = Rig("cpu", 8, 3, depth=5, sizes=[nbytes] * 8)
        for unit in [*range(8)] * 3:
            rig.check(unit)
        counts.append((rig.engine.stats().cold, rig.engine.stats().fetches))
    assert counts[0] == counts[1]
    assert counts[0][0] == 1


def test_a_slot_of_no_bytes_whose_fill_failed_is_nobody_s() -> None:
    for nth in range(1, 8):
        backend = HostBackend()
        rig = Rig("cpu", 2, 1, depth=0, sizes=[0, 0], backend=backend)
        rig.check(0)
        backend.fail_at(nth)
        failures = []
        for unit in (1, 0, 1):
            try:
                rig.check(unit)
            except OffloadError as error:
                failures.append(str(error))
        assert len(failures) <= 1, f"call {nth}"
        assert all("told to fail" in failure for failure in failures)


def test_skipped_units_are_not_waited_for() -> None:
    """Of the calls of the backend only a wait waits; there is one, for the unit itself."""
    backend = HostBackend()
    rig = Rig("cpu", 4, 3, depth=2, backend=backend)
    rig.check(0)  # units 1 and 2 are on their way
    calls, queries = backend.calls, backend.queries
    _, generation = rig.engine.acquire(0, 0)
    assert (backend.calls - calls, backend.queries - queries) == (1, 0)
    rig.engine.release(0, 0, generation)
    rig.check(3)


def test_a_failed_prefetch_is_thrown_by_the_acquire_that_needs_it_and_then_retried() -> None:
    for locked in (True, False):
        backend = HostBackend()
        rig = Rig("cpu", 3, 2, depth=1, backend=backend, locked=locked)
        for unit in (0, 1, 2, 0):  # by then each slot has had a reader
            rig.check(unit)
        time.sleep(0.1)  # unit 1 is on its way: let the engine's threads come to rest
        backend.fail_at(2)  # 1: the wait of the reader; 2: the fetch of unit 2 that follows
        _, generation = rig.engine.acquire(1, 0)
        time.sleep(0.1)
        rig.engine.release(1, 0, generation)
        with pytest.raises(TransferError, match="unit 2 could not be fetched") as error:
            rig.engine.acquire(2, 0)
        assert "last events" in str(error.value)
        rig.check(2)
        rig.check(0)


def test_after_a_failure_at_any_call_the_next_pass_is_right() -> None:
    for locked, nth in itertools.product((True, False), range(1, 40)):
        backend = HostBackend()
        rig = Rig("cpu", 4, 2, depth=1, backend=backend, locked=locked)
        backend.fail_at(nth)
        failures = []
        for unit in [*range(4), *range(4)]:
            try:
                rig.use(unit)
            except OffloadError as error:
                failures.append(str(error))
                rig.engine.abandon(0)
        assert len(failures) <= 1
        assert all("told to fail" in failure for failure in failures)
        for unit in range(4):
            rig.check(unit)
        rig.engine.close()


def test_too_many_units_at_once_is_an_error_that_counts_the_slots() -> None:
    rig = Rig("cpu", 3, 2, depth=1)
    held = [rig.engine.acquire(unit, 0) for unit in (0, 1)]
    with pytest.raises(UsageError, match="all 2 slots are in use"):
        rig.engine.acquire(2, 0)
    for unit, (_, generation) in enumerate(held):
        rig.engine.release(unit, 0, generation)
    rig.check(2)


def test_a_unit_in_use_can_not_be_invalidated_or_released_twice() -> None:
    rig = Rig("cpu", 3, 2, depth=1)
    _, generation = rig.engine.acquire(0, 0)
    with pytest.raises(UsageError, match="in use"):
        rig.engine.invalidate(0)
    rig.engine.release(0, 0, generation)
    with pytest.raises(UsageError, match="not acquired"):
        rig.engine.release(0, 0, generation)


def test_a_fetch_through_the_ring_that_stalls_is_a_timeout_with_the_last_events() -> None:
    backend = HostBackend(bytes_per_second=100)
    memory = SlotMemory(1, SIZE, torch.device("cpu"))
    engine = Prefetcher(
        backend,
        memory.addresses(),
        SIZE,
        memory.memory,
        depth=0,
        ring_chunks=2,
        ring_chunk_bytes=64,
        threads=1,
        timeout_ms=200,
    )
    image = HostStore(backend).allocate(256)
    engine.add_unit(image)
    with pytest.raises(TransferTimeout, match="200 ms") as error:
        engine.acquire(0, 0)
    assert "fetch unit 0 slot 0" in str(error.value)


def test_a_chunk_whose_copy_has_ended_is_the_next_to_be_used() -> None:
    """However large the ring, few of its chunks are in use while copies keep up."""
    backend = HostBackend()
    ring = PinnedRing(backend, 5, 4096)
    first, _ = ring.check_out()
    second, _ = ring.check_out()
    for chunk in (first, second):
        ring.send(chunk, 0)  # the calling thread: it is over at once
    assert ring.counts == (3, 0, 2)
    assert ring.check_out()[0] == second
    assert ring.counts == (4, 1, 0)
    assert ring.check_out()[0] == first


def test_the_ring_takes_several_threads_and_chunks_smaller_than_a_unit() -> None:
    rig = Rig("cpu", 6, 3, depth=2, locked=False, sizes=[12_345] * 6)
    for unit in [*range(6)] * 3:
        rig.check(unit)
    assert rig.engine.ring_bytes == 4096  # 3 chunks of 1000 bytes, in pages


def test_a_closed_engine_says_so() -> None:
    rig = Rig("cpu", 2, 2, depth=1)
    rig.engine.close()
    rig.engine.close()
    with pytest.raises(ClosedError, match="closed"):
        rig.engine.acquire(0, 0)


def test_closing_with_copies_under_way_waits_for_them() -> None:
    for locked in (True, False):
        backend = HostBackend(bytes_per_second=SIZE / 0.05)
        rig = Rig("cpu", 4, 3, depth=2, backend=backend, locked=locked)
        rig.engine.prefetch()
        rig.engine.close()
        rig.memory.memory.fill_(7)
        time.sleep(0.1)
        assert bool((rig.memory.memory == 7).all())


def test_the_slots_memory_lives_as_long_as_copies_into_it() -> None:
    """A dropped engine whose copies are under way: bug 2, device memory freed and used again."""
    backend = HostBackend(latency_us=100_000)
    rig = Rig("cpu", 3, 2, depth=1, backend=backend)
    rig.engine.prefetch()
    gone = weakref.ref(rig.memory.memory)
    engine = rig.engine
    del rig
    gc.collect()
    assert gone() is not None
    del engine
    gc.collect()
    assert gone() is None


def test_a_unit_larger_than_the_slots_is_refused() -> None:
    rig = Rig("cpu", 1, 1, depth=0)
    with pytest.raises(UsageError, match="in slots of"):
        rig.engine.add_unit(HostStore(rig.backend).allocate(SIZE + 1))


def test_many_threads_may_use_one_engine() -> None:
    rig = Rig("cpu", 6, 4, depth=1)
    wrong: list[str] = []

    def run(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(50):
            unit = chance.randrange(6)
            try:
                if not torch.equal(rig.use(unit), rig.bytes_of(rig.images[unit])):
                    wrong.append(f"unit {unit}")
            except OffloadError as error:
                wrong.append(str(error))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_host_backend_fails_at_the_call_it_was_told_to() -> None:
    backend = HostBackend()
    event = backend.create_event()
    backend.fail_at(2)
    backend.record(event, 0)
    with pytest.raises(BackendError, match="told to fail at call 3"):
        backend.wait(0, event)
    backend.wait(0, event)
    backend.destroy_event(event)
