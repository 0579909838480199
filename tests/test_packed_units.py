"""Packed units through the engine: copied as they are, unpacked on the device into the slots."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.packed_units import (
    Unit,
    in_a_file,
    in_memory,
    packed_bytes,
    packed_unit,
    plain_unit,
    unpack_kernel,
    unpacking_backend,
    weights,
)
from wanoffload._C import (
    Backend,
    BackendError,
    CudaBackend,
    HostBackend,
    PackedImage,
    Prefetcher,
    TransferError,
    UsageError,
)
from wanoffload.device_memory import SlotMemory

TENSOR = 2048
CHUNK = 64 * TENSOR  # of the plain image: so many tensors are a chunk
STAGING_BYTES = CHUNK + 4096
LATE = 0.1  # seconds by which a stream is held up


class Rig:
    """An engine with these units, poison in everything before it is filled."""

    def __init__(
        self,
        device: str,
        backend: Backend,
        units: Sequence[Unit],
        *,
        slots: int = 2,
        depth: int = 1,
        staging: int = 2,
        ring_chunk_bytes: int = 10_000,
    ) -> None:
        self.device = device
        self.backend = backend
        self.units = list(units)
        largest = max(unit.plain.numel() for unit in units)
        self.memory = SlotMemory(slots, largest, torch.device(device))
        self.staging = SlotMemory(staging, STAGING_BYTES, torch.device(device))
        self.engine = Prefetcher(
            backend,
            self.memory.addresses(),
            self.memory.slot_bytes,
            [self.memory.memory, self.staging.memory],
            depth=depth,
            ring_chunks=3,
            ring_chunk_bytes=ring_chunk_bytes,
            threads=2,
            timeout_ms=5000,
            staging=self.staging.addresses(),
            staging_bytes=self.staging.slot_bytes,
        )
        self.engine.set_poison(0xEE)
        for unit in units:
            self.engine.add_unit(unit.image)

    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0

    def use(self, unit: int) -> torch.Tensor:
        """Acquires, reads on the compute stream, releases. Returns what was read."""
        slot, generation = self.engine.acquire(unit, self.stream())
        seen = self.memory.window(slot, self.units[unit].plain.numel()).clone()
        self.engine.release(unit, self.stream(), generation)
        return seen

    def check(self, unit: int) -> None:
        assert torch.equal(self.use(unit).cpu(), self.units[unit].plain)

    def hold_up(self, stream: int) -> None:
        """What is enqueued on a stream of the host backend from here on begins late."""
        nothing = torch.zeros(1)
        HostBackend(latency_us=LATE * 1e6).copy_to_device(
            nothing.data_ptr(), nothing.data_ptr(), 0, stream
        )


def host_rig(units: int = 3, chunks: int = 5, lock: bool = True, **options: int) -> Rig:
    backend = HostBackend()
    made = [packed_unit(backend, chunks * CHUNK, lock=lock) for _ in range(units)]
    return Rig("cpu", backend, made, **options)


@pytest.fixture(params=["locked", "pageable", "file"])
def tier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def unit_of(tier: str, backend: Backend, nbytes: int, folder: Path) -> Unit:
    return packed_unit(
        backend, nbytes, lock=tier == "locked", folder=folder if tier == "file" else None
    )


@pytest.mark.parametrize("ring_chunk_bytes", [4096, 128 << 10])
def test_packed_units_arrive_unpacked_from_every_tier(
    device: str, tier: str, ring_chunk_bytes: int, tmp_path: Path
) -> None:
    backend = unpacking_backend(device)
    sizes = [5 * CHUNK, 256, CHUNK, 0, CHUNK + 256, 3 * CHUNK - 256, 9 * CHUNK]
    units = [unit_of(tier, backend, nbytes, tmp_path) for nbytes in sizes]
    rig = Rig(device, backend, units, ring_chunk_bytes=ring_chunk_bytes)
    for _ in range(3):
        for unit in range(len(units)):
            rig.check(unit)
    stats = rig.engine.stats()
    assert stats.fetches == 3 * len(units) + 1
    packed = sum(unit.image.nbytes for unit in units)
    assert stats.bytes_fetched == 3 * packed + units[0].image.nbytes
    assert packed < 0.8 * sum(sizes)
    rig.engine.close()


def test_one_large_chunk_arrives(device: str) -> None:
    """Runs of 4 MiB, as real weights have them."""
    backend = unpacking_backend(device)
    plain = weights(9 << 20)
    packed = packed_bytes(plain, 9 << 20)
    image = PackedImage(in_memory(backend, packed, lock=True))
    memory = SlotMemory(1, plain.numel(), torch.device(device))
    staging = SlotMemory(2, image.largest_chunk, torch.device(device))
    engine = Prefetcher(
        backend,
        memory.addresses(),
        memory.slot_bytes,
        [memory.memory, staging.memory],
        depth=0,
        staging=staging.addresses(),
        staging_bytes=staging.slot_bytes,
    )
    engine.add_unit(image)
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    engine.acquire(0, stream)
    assert torch.equal(memory.window(0, plain.numel()).cpu(), plain)
    engine.close()


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_packed_and_plain_units_pass_the_same_slots_in_any_order(
    device: str, slots: int, tmp_path: Path
) -> None:
    chance = random.Random(slots)
    backend = unpacking_backend(device)
    units = []
    for nth in range(9):
        nbytes = chance.randint(0, 4 * CHUNK // 256) * 256
        if nth % 2 == 0:
            tier = chance.choice(["locked", "pageable", "file"])
            units.append(unit_of(tier, backend, nbytes, tmp_path))
        else:
            units.append(plain_unit(backend, nbytes, lock=chance.random() < 0.5))
    rig = Rig(device, backend, units, slots=slots, depth=2)
    for _ in range(12):
        for unit in range(9):
            if chance.random() < 0.6:
                rig.check(unit)
    rig.engine.close()


def test_a_chunk_waits_for_its_copy() -> None:
    rig = host_rig()
    rig.check(0)  # there are whole chunks of other units in the staging slots
    rig.hold_up(rig.engine.copy_stream)
    rig.check(2)
    rig.check(0)


def test_a_staging_slot_is_copied_into_when_it_is_unpacked() -> None:
    rig = host_rig()
    rig.hold_up(rig.engine.unpack_stream)
    rig.check(0)


def test_a_unit_is_ready_behind_its_last_chunk() -> None:
    rig = host_rig(chunks=2)
    for unit in (0, 1, 2):
        rig.hold_up(rig.engine.unpack_stream)
        rig.check(unit)


def slow_reader(rig: Rig, unit: int) -> tuple[HostBackend, int, torch.Tensor]:
    """A reader that has the unit and begins late: its backend, an event behind it, what it sees."""
    slow = HostBackend(latency_us=5 * LATE * 1e6)
    stream, event = slow.create_stream(), slow.create_event()
    slot, generation = rig.engine.acquire(unit, stream)
    seen = torch.zeros_like(rig.units[unit].plain)
    source = rig.memory.window(slot, seen.numel()).data_ptr()
    slow.copy_to_device(seen.data_ptr(), source, seen.numel(), stream)
    slow.record(event, stream)
    rig.engine.release(unit, stream, generation)
    return slow, event, seen


@pytest.mark.parametrize("lock", [True, False])
def test_chunks_are_copied_ahead_of_a_slot_that_is_still_being_read(lock: bool) -> None:
    rig = host_rig(units=2, chunks=2, lock=lock, slots=1)
    slow, event, seen = slow_reader(rig, 0)  # unit 1 is on its way into the same slot
    stored = torch.frombuffer(rig.units[1].memory, dtype=torch.uint8)
    chunks = struct.unpack_from("<QIIQII", bytes(stored[:96].numpy()), 40)
    wanted = [stored[at : at + nbytes] for at, nbytes in (chunks[:2], chunks[3:5])]
    staged = False
    while not staged and not slow.is_complete(event):
        windows = [rig.staging.window(slot, STAGING_BYTES).clone() for slot in (0, 1)]
        staged = all(
            any(torch.equal(window[: chunk.numel()], chunk) for window in windows)
            for chunk in wanted
        )
    assert staged
    slow.synchronize(event)
    assert torch.equal(seen, rig.units[0].plain)
    rig.check(1)


@pytest.mark.parametrize("first", ["packed", "plain"])
def test_a_fill_that_nobody_read_comes_before_the_next_one_whichever_ways_they_go(
    first: str,
) -> None:
    backend = HostBackend()
    packed, plain = packed_unit(backend, 2 * CHUNK), plain_unit(backend, 2 * CHUNK)
    units = [packed, plain] if first == "packed" else [plain, packed]
    rig = Rig("cpu", backend, units, slots=1)
    for stream in (rig.engine.unpack_stream, rig.engine.copy_stream):
        rig.hold_up(stream)
    rig.engine.prefetch()  # of unit 0, into the only slot
    slot, generation = rig.engine.acquire(1, 0)
    time.sleep(2 * LATE)  # for what comes too late
    assert torch.equal(rig.memory.window(slot, 2 * CHUNK), units[1].plain)
    rig.engine.release(1, 0, generation)


def test_a_fill_that_failed_comes_before_the_next_one_too() -> None:
    """Some of its chunks may be on their way when another one can't be enqueued."""
    for nth in range(1, 20):
        backend = HostBackend()
        units = [packed_unit(backend, 2 * CHUNK), plain_unit(backend, 2 * CHUNK)]
        rig = Rig("cpu", backend, units, slots=1)
        rig.hold_up(rig.engine.unpack_stream)
        backend.fail_at(nth)
        rig.engine.prefetch()
        backend.fail_at(0)
        slot, generation = rig.engine.acquire(1, 0)
        time.sleep(1.5 * LATE)
        assert torch.equal(rig.memory.window(slot, 2 * CHUNK), units[1].plain), f"call {nth}"
        rig.engine.release(1, 0, generation)


@pytest.mark.parametrize("lock", [True, False])
def test_whatever_call_fails_the_next_pass_is_right(lock: bool) -> None:
    """With two staging slots: a slot that is lost would be missed at once."""
    rig = host_rig(units=3, chunks=3, lock=lock)
    backend = rig.backend
    assert isinstance(backend, HostBackend)
    failures: list[str] = []
    for nth in range(1, 70):
        backend.fail_at(nth)
        for unit in range(3):
            try:
                rig.check(unit)
            except (TransferError, BackendError) as error:
                failures.append(str(error))
                rig.engine.abandon(0)
        backend.fail_at(0)
        for unit in range(3):
            rig.engine.invalidate(unit)  # forgets a prefetch that failed
            rig.check(unit)
    assert len(failures) > 20
    assert all("told to fail" in failure for failure in failures)
    rig.engine.close()


def test_spoilt_packed_bytes_are_an_error_of_the_acquire_that_needs_them() -> None:
    rig = host_rig(units=3, chunks=3)
    rig.check(0)
    rig.engine.invalidate(1)
    stored = torch.frombuffer(rig.units[1].memory, dtype=torch.uint8)
    chunk = struct.unpack_from("<Q", bytes(stored[:64].numpy()), 40 + 16)[0]
    stored[chunk] ^= 0x10  # the number of its runs
    rig.check(0)  # unit 1 is brought behind it
    for _ in range(2):
        with pytest.raises(TransferError, match=r"unit 1 could not be fetched .* spoilt"):
            rig.engine.acquire(1, 0)
    rig.check(2)
    stored[chunk] ^= 0x10
    rig.check(1)
    assert rig.engine.stats().failures == 2


@pytest.mark.parametrize("spoilt", [0, 1])
def test_packed_bytes_of_a_file_are_proved_by_the_first_fetch(tmp_path: Path, spoilt: int) -> None:
    backend = HostBackend()
    plain = weights(3 * CHUNK)
    packed = packed_bytes(plain, TENSOR)
    stored = in_a_file(tmp_path, packed, spoilt=packed.numel() - 300 if spoilt else None)
    rig = Rig("cpu", backend, [Unit(PackedImage(stored), plain)], slots=1)
    if spoilt:
        with pytest.raises(TransferError, match="checksum differs"):
            rig.use(0)
        assert not stored.proven
    else:
        rig.check(0)
        assert stored.proven


def test_a_chunk_costs_six_calls_and_the_host_never_waits() -> None:
    for chunks in (1, 4):
        rig = host_rig(units=3, chunks=chunks, slots=2, depth=1)
        rig.engine.set_poison(None)
        backend = rig.backend
        assert isinstance(backend, HostBackend)
        for unit in (0, 1, 2):
            rig.check(unit)
        calls, queries = backend.calls, backend.queries
        for unit in (0, 1, 2):
            rig.check(unit)
        assert (backend.calls - calls) / 3 == 4 + 6 * chunks
        assert backend.queries == queries


def test_closing_waits_for_what_is_unpacked() -> None:
    rig = host_rig()
    rig.hold_up(rig.engine.unpack_stream)
    rig.engine.prefetch()
    rig.engine.close()
    for memory in (rig.memory.memory, rig.staging.memory):
        memory.fill_(7)
    time.sleep(1.5 * LATE)
    for memory in (rig.memory.memory, rig.staging.memory):
        assert bool((memory == 7).all())


def test_a_unit_can_change_between_packed_and_plain(device: str) -> None:
    backend = unpacking_backend(device)
    units = [packed_unit(backend, 3 * CHUNK) for _ in range(3)]
    rig = Rig(device, backend, units)
    for turn in range(8):
        for unit in range(3):
            rig.check(unit)
        lock = turn % 4 < 2
        make = packed_unit if turn % 2 else plain_unit
        rig.units[turn % 3] = make(backend, 3 * CHUNK, lock=lock)
        rig.engine.replace_unit(turn % 3, rig.units[turn % 3].image)
    rig.engine.close()


def engine_without_staging(slot_bytes: int, slot: int, **options: object) -> Prefetcher:
    return Prefetcher(HostBackend(), [slot], slot_bytes, None, depth=0, **options)  # type: ignore[arg-type]


def test_what_a_packed_unit_misses_is_named() -> None:
    backend = HostBackend()
    unit = packed_unit(backend, CHUNK)
    image = unit.image
    assert isinstance(image, PackedImage)
    with pytest.raises(UsageError, match=rf"needs staging memory .* {image.largest_chunk} bytes"):
        engine_without_staging(CHUNK, 256).add_unit(image)
    small = {"staging": [256, 512], "staging_bytes": 256}
    with pytest.raises(UsageError, match=rf"chunk of {image.largest_chunk} .* have 256"):
        engine_without_staging(CHUNK, 256, **small).add_unit(image)
    with pytest.raises(UsageError, match=f"{CHUNK} bytes in slots of {CHUNK - 1}"):
        engine_without_staging(CHUNK - 1, 256).add_unit(image)
    with pytest.raises(UsageError, match="staging slot begins at 264"):
        engine_without_staging(CHUNK, 256, staging=[256, 264], staging_bytes=CHUNK)
    enough = {"staging": [256, 512], "staging_bytes": image.largest_chunk}
    with pytest.raises(UsageError, match="place of a packed image begins at 8"):
        engine_without_staging(CHUNK, 8, **enough).add_unit(image)


def test_there_is_no_unpack_stream_without_staging() -> None:
    assert engine_without_staging(CHUNK, 256).unpack_stream == 0
    assert host_rig().engine.unpack_stream != 0


@pytest.mark.gpu
def test_a_backend_without_the_kernel_says_so() -> None:
    backend = CudaBackend(0)
    rig = Rig("cuda", backend, [packed_unit(backend, CHUNK)], slots=1, depth=0)
    with pytest.raises(TransferError, match="load_unpack_kernel"):
        rig.use(0)


@pytest.mark.gpu
def test_what_is_no_kernel_is_refused_and_the_one_that_was_loaded_stays() -> None:
    backend = unpacking_backend("cuda")
    assert isinstance(backend, CudaBackend)
    with pytest.raises(BackendError, match="cuModuleLoadData"):
        backend.load_unpack_kernel(b"nothing to run", "unpack", 128, 0)
    with pytest.raises(BackendError, match="cuModuleGetFunction"):
        backend.load_unpack_kernel(unpack_kernel().cubin, "nobody", 128, 0)
    Rig("cuda", backend, [packed_unit(backend, CHUNK)], slots=1, depth=0).check(0)


@pytest.mark.gpu
@pytest.mark.parametrize("lock", [True, False])
@pytest.mark.parametrize("staging", [2, 4])
def test_delays_on_any_stream_change_nothing(lock: bool, staging: int) -> None:
    backend = unpacking_backend("cuda")
    units = [packed_unit(backend, 9 * CHUNK, lock=lock) for _ in range(4)]
    units += [plain_unit(backend, 9 * CHUNK, lock=not lock) for _ in range(3)]
    rig = Rig("cuda", backend, units, slots=3, depth=2, staging=staging)
    streams = [
        torch.cuda.ExternalStream(stream)
        for stream in (rig.engine.copy_stream, rig.engine.unpack_stream)
    ]
    chance = random.Random(staging)
    reads = []
    for _ in range(6):
        order = chance.sample(range(7), 5)
        for unit in order:
            for stream in (*streams, torch.cuda.current_stream()):
                if chance.random() < 0.3:
                    with torch.cuda.stream(stream):
                        torch.cuda._sleep(chance.randrange(2_000_000))
            slot, generation = rig.engine.acquire(unit, rig.stream())
            if chance.random() < 0.4:
                torch.cuda._sleep(chance.randrange(2_000_000))
            reads.append((unit, rig.memory.window(slot, 9 * CHUNK).clone()))
            rig.engine.release(unit, rig.stream(), generation)
    for unit, seen in reads:
        assert torch.equal(seen.cpu(), units[unit].plain)
    rig.engine.close()
