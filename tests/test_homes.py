"""Homes: units whose plain bytes, or packed ones, stay on the device once they have come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.packed_units import (
    Unit,
    packed_bytes,
    packed_unit,
    plain_unit,
    unpacking_backend,
    weights,
)
from wanoffload._C import (
    Backend,
    HostBackend,
    OffloadError,
    PackedImage,
    Prefetcher,
    TransferError,
    TransferTimeout,
    UsageError,
)
from wanoffload.device_memory import SlotMemory

TENSOR = 2048
CHUNK = 64 * TENSOR  # of the plain image: so many tensors are a chunk
STAGING_BYTES = CHUNK + 4096
LATE = 0.1  # seconds by which a stream is held up

# What stays: nothing, the plain bytes, or the packed bytes.
PASSES, LIVES, KEPT = "passes", "lives", "kept"


class Place:
    """Memory on the device for one unit's bytes, full of something else."""

    def __init__(self, device: str, nbytes: int) -> None:
        self.nbytes = nbytes
        self.memory = torch.full((max(nbytes, 1) + 256,), 0xD5, dtype=torch.uint8, device=device)
        self.offset = -self.memory.data_ptr() % 256

    @property
    def address(self) -> int:
        return self.memory.data_ptr() + self.offset

    @property
    def bytes(self) -> torch.Tensor:
        return self.memory[self.offset : self.offset + self.nbytes]


class Rig:
    """Units, their places on the device, and one engine after another over all that memory."""

    def __init__(
        self,
        units: Sequence[Unit],
        stays: Sequence[str],
        *,
        device: str = "cpu",
        backend: Backend | None = None,
        slots: int = 2,
        depth: int = 1,
        staging: int = 2,
        timeout_ms: int = 5000,
        ring_chunks: int = 3,
    ) -> None:
        self.device = device
        self.backend = backend or HostBackend()
        self.units = list(units)
        self.stays = list(stays)
        self.depth = depth
        self.timeout_ms = timeout_ms
        self.ring_chunks = ring_chunks
        largest = max(unit.plain.numel() for unit in units)
        self.memory = SlotMemory(slots, largest, torch.device(device))
        self.staging = SlotMemory(staging, STAGING_BYTES, torch.device(device))
        self.homes = [self.home_for(*pair) for pair in zip(self.units, self.stays, strict=True)]
        self.engine = self.new_engine()
        self.add_units([False] * len(self.units))

    def home_for(self, unit: Unit, stays: str) -> Place | None:
        if stays == PASSES:
            return None
        return Place(self.device, unit.image.nbytes if stays == KEPT else unit.plain.numel())

    def new_engine(self) -> Prefetcher:
        places = [home.memory for home in self.homes if home]
        engine = Prefetcher(
            self.backend,
            self.memory.addresses(),
            self.memory.slot_bytes,
            [self.memory.memory, self.staging.memory, *places],
            depth=self.depth,
            ring_chunks=self.ring_chunks,
            ring_chunk_bytes=10_000,
            threads=2,
            timeout_ms=self.timeout_ms,
            staging=self.staging.addresses(),
            staging_bytes=self.staging.slot_bytes,
        )
        engine.set_poison(0xEE)
        return engine

    def add_units(self, filled: Sequence[bool]) -> None:
        for unit, stays, home, full in zip(self.units, self.stays, self.homes, filled, strict=True):
            if home is None:
                self.engine.add_unit(unit.image)
            else:
                self.engine.add_unit(
                    unit.image,
                    home=[(home.address, home.nbytes)],
                    as_stored=stays == KEPT,
                    filled=full,
                )

    def reopen(self) -> list[bool]:
        """Closes the engine and makes another one; returns which homes it took over."""
        self.engine.close()
        filled = [self.engine.home_filled(unit) for unit in range(len(self.units))]
        self.engine = self.new_engine()
        self.add_units(filled)
        return filled

    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0

    def window(self, unit: int, slot: int) -> torch.Tensor:
        """Where the unit is to be read; asserts that it is where it should be."""
        nbytes = self.units[unit].plain.numel()
        if self.stays[unit] != LIVES:
            assert 0 <= slot < self.engine.slot_count
            return self.memory.window(slot, nbytes)
        before = sum(home is not None for home in self.homes[:unit])
        assert slot == self.engine.slot_count + before
        home = self.homes[unit]
        assert home is not None
        return home.bytes[:nbytes]

    def use(self, unit: int) -> torch.Tensor:
        slot, generation = self.engine.acquire(unit, self.stream())
        seen = self.window(unit, slot).clone()
        self.engine.release(unit, self.stream(), generation)
        return seen

    def check(self, unit: int) -> None:
        assert torch.equal(self.use(unit).cpu(), self.units[unit].plain)

    def check_all(self) -> None:
        for unit in range(len(self.units)):
            self.check(unit)

    def counts(self) -> tuple[int, int]:
        """Fetches and bytes fetched since the last call."""
        stats = self.engine.stats()
        self.engine.reset_stats()
        return stats.fetches, stats.bytes_fetched

    def hold_up(self, stream: int, seconds: float = LATE) -> None:
        """What is enqueued on a stream of the host backend from here on begins late."""
        nothing = torch.zeros(1)
        HostBackend(latency_us=seconds * 1e6).copy_to_device(
            nothing.data_ptr(), nothing.data_ptr(), 0, stream
        )


@pytest.fixture(params=["locked", "pageable", "file"])
def tier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def unit_of(tier: str, backend: Backend, nbytes: int, folder: Path) -> Unit:
    return packed_unit(
        backend, nbytes, lock=tier == "locked", folder=folder if tier == "file" else None
    )


def with_other_signs(unit: Unit) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain bytes whose packed ones lie as the unit's do, and these packed ones."""
    plain = unit.plain.clone()
    plain[1::2] ^= 0x80
    packed = packed_bytes(plain, TENSOR)
    assert packed.numel() == unit.memory.nbytes
    return plain, packed


def overwrite(unit: Unit) -> None:
    """New bytes where the unit's stood on the host, of the same lengths."""
    unit.plain, stored = (
        with_other_signs(unit)
        if isinstance(unit.image, PackedImage)
        else (weights(unit.plain.numel()),) * 2
    )
    torch.frombuffer(unit.memory, dtype=torch.uint8).copy_(stored)


def host_units(stays: str, count: int, chunks: int = 2, lock: bool = True) -> list[Unit]:
    backend = HostBackend()
    make = packed_unit if stays == KEPT else plain_unit
    return [make(backend, chunks * CHUNK, lock=lock) for _ in range(count)]


# What a reader sees, and a wait for it.
Read = tuple[torch.Tensor, Callable[[], None]]


def late_read(rig: Rig, unit: int, seconds: float = 3 * LATE, held: float = 0) -> Read:
    """A reader on a stream of its own that begins late. `held`: by so many seconds does what
    precedes it there, as unpacking the unit."""
    slow = HostBackend(latency_us=seconds * 1e6)
    stream, event = slow.create_stream(), slow.create_event()
    if held:
        rig.hold_up(stream, held)
    slot, generation = rig.engine.acquire(unit, stream)
    source = rig.window(unit, slot)
    seen = torch.zeros_like(source)
    slow.copy_to_device(seen.data_ptr(), source.data_ptr(), seen.numel(), stream)
    slow.record(event, stream)
    rig.engine.release(unit, stream, generation)
    return seen, lambda: slow.synchronize(event)


@pytest.mark.parametrize("stays", [LIVES, KEPT])
def test_a_unit_with_a_home_crosses_the_link_once(
    device: str, tier: str, stays: str, tmp_path: Path
) -> None:
    backend = unpacking_backend(device)
    sizes = [3 * CHUNK, 256, 0, CHUNK + 256, 2 * CHUNK]
    units = [unit_of(tier, backend, nbytes, tmp_path) for nbytes in sizes]
    rig = Rig(units, [stays] * 5, device=device, backend=backend)
    packed = sum(unit.image.nbytes for unit in units)
    for _ in range(2):
        rig.check_all()
    fetches, nbytes = rig.counts()
    assert nbytes == packed
    # A kept one is unpacked for each use, but for the one that the other slot still has.
    assert fetches == (5 if stays == LIVES else 5 + 5 + 3)
    for _ in range(2):
        rig.check_all()
    assert rig.engine.stats().cold == 0
    assert rig.counts() == (0 if stays == LIVES else 2 * 4, 0)
    rig.engine.close()
    assert all(rig.engine.home_filled(unit) for unit in range(5))


@pytest.mark.parametrize("lock", [True, False])
def test_plain_units_live_at_home_without_a_slot_or_staging_memory(device: str, lock: bool) -> None:
    backend = unpacking_backend(device)
    units = [plain_unit(backend, nbytes, lock=lock) for nbytes in (5000, 2, 70_000)]
    rig = Rig(units, [LIVES] * 3, device=device, backend=backend, slots=0, staging=0)
    for _ in range(3):
        rig.check_all()
    assert rig.engine.slot_count == 0
    assert rig.counts() == (3, 75_002)
    rig.engine.close()


def test_packed_units_that_are_all_kept_need_no_staging_memory(device: str) -> None:
    backend = unpacking_backend(device)
    units = [packed_unit(backend, chunks * CHUNK) for chunks in (1, 3, 2)]
    rig = Rig(units, [KEPT] * 3, device=device, backend=backend, staging=0)
    for _ in range(3):
        rig.check_all()
    assert rig.counts() == (3 + 3 + 2 + 1, sum(unit.image.nbytes for unit in units))
    rig.engine.close()


def test_units_that_pass_live_at_home_and_are_kept_go_through_one_engine(
    device: str, tier: str, tmp_path: Path
) -> None:
    backend = unpacking_backend(device)
    stays = [PASSES, LIVES, KEPT] * 3
    units = [unit_of(tier, backend, 2 * CHUNK, tmp_path) for _ in stays]
    rig = Rig(units, stays, device=device, backend=backend, slots=2)
    passing = sum(
        unit.image.nbytes for unit, how in zip(units, stays, strict=True) if how == PASSES
    )
    for _ in range(2):
        rig.check_all()
    rig.counts()
    for _ in range(3):
        rig.check_all()
    assert rig.counts() == (3 * 6, 3 * passing)
    rig.engine.close()


def test_two_streams_read_a_home_and_both_are_waited_for() -> None:
    rig = Rig(host_units(LIVES, 2), [LIVES] * 2, slots=0)
    old = rig.units[0].plain
    reads = [late_read(rig, 0, seconds) for seconds in (LATE, 3 * LATE)]
    assert rig.counts() == (2, 2 * old.numel())
    rig.units[0] = plain_unit(rig.backend, old.numel() - 256)
    rig.engine.replace_unit(0, rig.units[0].image)
    rig.check(0)
    for seen, wait in reads:
        wait()
        assert torch.equal(seen, old)


@pytest.mark.parametrize("stays", [LIVES, KEPT])
def test_closing_waits_for_the_readers_of_a_home(stays: str) -> None:
    rig = Rig(host_units(stays, 2), [stays] * 2)
    reads = late_read(rig, 0), late_read(rig, 1, 0, held=LATE)
    rig.engine.close()
    for home in rig.homes:
        assert home is not None
        home.memory.fill_(7)
    rig.memory.memory.fill_(7)
    time.sleep(1.5 * LATE)
    for unit, (seen, _) in zip(rig.units, reads, strict=True):
        assert torch.equal(seen, unit.plain)
    assert bool((rig.memory.memory == 7).all())


@pytest.mark.parametrize("stays", [LIVES, KEPT])
@pytest.mark.parametrize("lock", [True, False])
def test_a_home_is_filled_anew_when_the_host_s_bytes_have_changed(stays: str, lock: bool) -> None:
    rig = Rig(host_units(stays, 3, lock=lock), [stays] * 3)
    for _ in range(2):
        rig.check_all()
    rig.counts()
    rig.engine.invalidate(1)
    assert rig.engine.stats().invalidations == 1
    overwrite(rig.units[1])
    rig.check_all()
    fetches, nbytes = rig.counts()
    assert nbytes == rig.units[1].image.nbytes
    assert fetches == 1 if stays == LIVES else fetches <= 4
    rig.check_all()
    assert rig.counts() == (0 if stays == LIVES else 2, 0)


def test_a_kept_unit_that_is_in_no_slot_is_forgotten_at_home_and_that_counts() -> None:
    rig = Rig(host_units(KEPT, 3), [KEPT] * 3, slots=1, depth=0)
    rig.check_all()
    rig.counts()
    rig.engine.invalidate(0)
    assert rig.engine.stats().invalidations == 1
    overwrite(rig.units[0])
    rig.check(0)
    assert rig.engine.stats().cold == 1
    assert rig.counts() == (2, rig.units[0].image.nbytes)


def test_what_is_unpacked_from_a_home_is_what_it_held_when_the_unit_was_acquired() -> None:
    """The host's bytes change while the reader's stream has yet to unpack what is in the home."""
    rig = Rig(host_units(KEPT, 2), [KEPT] * 2, slots=1, depth=0)
    rig.check_all()
    old = rig.units[0].plain
    seen, wait = late_read(rig, 0, held=LATE)
    rig.engine.invalidate(0)
    overwrite(rig.units[0])
    rig.check(0)
    wait()
    assert torch.equal(seen, old)


def test_a_packed_home_is_read_behind_its_copy_and_copied_into_behind_its_readers() -> None:
    rig = Rig(host_units(KEPT, 3), [KEPT] * 3)
    for turn in range(3):
        rig.hold_up(rig.engine.copy_stream)
        rig.check_all()
        old = rig.units[turn].plain
        seen, wait = late_read(rig, turn, 0, held=LATE)
        rig.engine.invalidate(turn)
        overwrite(rig.units[turn])
        rig.check(turn)
        wait()
        assert torch.equal(seen, old)
    rig.check_all()


def test_a_slot_is_not_filled_before_it_was_unpacked_to_and_read() -> None:
    """By whom it was unpacked on its own stream, the only one that knows."""
    rig = Rig(host_units(KEPT, 3), [KEPT, PASSES, PASSES], slots=1, depth=0)
    rig.check_all()
    for _ in range(3):
        seen, wait = late_read(rig, 0, 0, held=LATE)
        rig.check(1)
        rig.check(2)
        wait()
        assert torch.equal(seen, rig.units[0].plain)


def test_a_slot_is_not_filled_before_an_unpacking_that_failed_half_way_is_over() -> None:
    """What had been launched of it still writes."""
    backend = HostBackend()
    units = [packed_unit(backend, 3 * CHUNK) for _ in range(2)]
    rig = Rig(units, [KEPT, PASSES], backend=backend, slots=1, depth=0)
    rig.check_all()
    stream = backend.create_stream()
    rig.engine.abandon(0)
    calls = backend.calls
    _, generation = rig.engine.acquire(0, stream)
    rig.engine.release(0, stream, generation)
    whole = backend.calls - calls
    failed = 0
    for nth in range(1, whole + 1):
        rig.check(1)
        rig.hold_up(stream)
        backend.fail_at(nth)
        try:
            _, generation = rig.engine.acquire(0, stream)
            rig.engine.release(0, stream, generation)
        except OffloadError:
            failed += 1
        backend.fail_at(0)
        rig.engine.abandon(stream)
        slot, generation = rig.engine.acquire(1, 0)  # comes behind it
        time.sleep(1.5 * LATE)
        assert torch.equal(rig.window(1, slot), rig.units[1].plain)
        rig.engine.release(1, 0, generation)
    assert failed > 5


@pytest.mark.parametrize("stays", [LIVES, KEPT])
def test_an_invalidate_that_is_refused_or_late_leaves_the_unit_right(stays: str) -> None:
    rig = Rig(host_units(stays, 2), [stays] * 2)
    for _ in range(2):
        rig.check_all()
    rig.counts()
    _, generation = rig.engine.acquire(1, 0)
    for call in (
        lambda: rig.engine.invalidate(1),
        lambda: rig.engine.replace_unit(1, rig.units[1].image),
    ):
        with pytest.raises(UsageError, match="unit 1 is in use"):
            call()
    rig.engine.release(1, 0, generation)
    for _ in range(2):
        rig.check_all()
    assert rig.counts()[1] == 0
    rig.engine.close()
    assert rig.engine.home_filled(1)


def patiently(call: Callable[[int], object]) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            call(0)
            return
        except TransferTimeout:
            assert time.monotonic() < deadline


@pytest.mark.parametrize("stays", [LIVES, KEPT])
def test_a_unit_comes_again_and_is_right_when_its_invalidate_has_timed_out(stays: str) -> None:
    """Its home is still being filled through the ring, chunk after chunk, when it is due again."""
    slow = HostBackend(latency_us=10_000)
    units = host_units(stays, 1, lock=False)
    rig = Rig(units, [stays], backend=slow, slots=1, depth=0, timeout_ms=40, ring_chunks=1)
    for call in (rig.use, rig.engine.invalidate, rig.use, rig.engine.invalidate, rig.use):
        with pytest.raises(TransferTimeout):
            call(0)
    patiently(rig.check)
    # The fill that was forgotten was over before the one that was read.
    assert rig.counts()[1] == 2 * units[0].image.nbytes


def test_a_home_is_not_filled_again_before_it_was_unpacked_whatever_timed_out() -> None:
    rig = Rig(host_units(KEPT, 1), [KEPT], slots=2, depth=0, timeout_ms=20)
    rig.check(0)
    rig.engine.invalidate(0)
    for _ in range(3):
        rig.hold_up(rig.engine.copy_stream)
        seen, wait = late_read(rig, 0, 0, held=LATE)
        with pytest.raises(TransferTimeout):
            rig.engine.invalidate(0)
        patiently(rig.check)
        wait()
        assert torch.equal(seen, rig.units[0].plain)
        patiently(rig.engine.invalidate)


@pytest.mark.parametrize("stays", [PASSES, LIVES, KEPT])
def test_another_image_takes_the_place_of_one_with_a_home(stays: str) -> None:
    backend = HostBackend()
    units = [packed_unit(backend, 2 * CHUNK) for _ in range(3)]
    rig = Rig(units, [stays] * 3, backend=backend)
    kinds = [packed_unit] if stays == KEPT else [plain_unit, packed_unit]
    for turn in range(8):
        rig.check_all()
        unit = turn % 3
        make = kinds[turn % len(kinds)]
        # Half as large, so that its packed bytes fit as well.
        rig.units[unit] = make(backend, CHUNK, lock=turn % 4 < 2)
        rig.engine.replace_unit(unit, rig.units[unit].image)
        rig.counts()
        rig.check(unit)
        fetched = rig.counts()[1]
        if stays != PASSES:
            assert fetched == rig.units[unit].image.nbytes
    rig.engine.close()


def engine(slots: Sequence[int], slot_bytes: int, **options: object) -> Prefetcher:
    return Prefetcher(HostBackend(), slots, slot_bytes, None, depth=0, **options)  # type: ignore[arg-type]


def test_what_does_not_fit_its_home_is_refused_and_the_error_has_the_numbers() -> None:
    backend = HostBackend()
    plain, packed = plain_unit(backend, 4096).image, packed_unit(backend, CHUNK).image
    assert isinstance(packed, PackedImage)
    size = packed.nbytes
    staging = {"staging": [256, 512], "staging_bytes": packed.largest_chunk}

    with pytest.raises(UsageError, match="a unit of 4096 bytes in a home of 4095"):
        engine([], 0).add_unit(plain, home=[(256, 4095)])
    with pytest.raises(UsageError, match=f"a unit of {CHUNK} bytes in a home of {CHUNK - 1}"):
        engine([], 0, **staging).add_unit(packed, home=[(256, CHUNK - 1)])
    with pytest.raises(UsageError, match=f"a unit of {size} bytes in a home of {size - 1}"):
        engine([256], CHUNK, **staging).add_unit(packed, home=[(256, size - 1)], as_stored=True)
    with pytest.raises(UsageError, match=f"a unit of {CHUNK} bytes in slots of {CHUNK - 1}"):
        engine([256], CHUNK - 1, **staging).add_unit(packed, home=[(256, size)], as_stored=True)
    with pytest.raises(UsageError, match="there must be a slot"):
        engine([], 0, **staging).add_unit(packed, home=[(256, size)], as_stored=True)
    with pytest.raises(UsageError, match="there must be a slot"):
        engine([], 0).add_unit(plain)
    with pytest.raises(UsageError, match="is not packed"):
        engine([256], 4096).add_unit(plain, home=[(256, 4096)], as_stored=True)


def test_a_packed_unit_s_home_is_aligned_and_has_what_unpacks_it() -> None:
    packed = packed_unit(HostBackend(), CHUNK).image
    assert isinstance(packed, PackedImage)
    size = packed.nbytes
    with pytest.raises(UsageError, match="place of a packed image begins at 8"):
        engine([8], CHUNK).add_unit(packed, home=[(256, size)], as_stored=True)
    with pytest.raises(UsageError, match="place of packed bytes begins at 264"):
        engine([256], CHUNK).add_unit(packed, home=[(264, size)], as_stored=True)
    for home in ({}, {"home": [(256, CHUNK)]}):
        with pytest.raises(UsageError, match=rf"staging memory .* {packed.largest_chunk} bytes"):
            engine([256], CHUNK).add_unit(packed, **home)


@pytest.mark.parametrize("stays", [LIVES, KEPT])
def test_an_image_that_does_not_fit_the_home_takes_no_other_s_place(stays: str) -> None:
    rig = Rig(host_units(stays, 2, chunks=1), [stays] * 2)
    rig.check_all()
    other = host_units(stays, 1, chunks=2)[0].image
    home = rig.homes[0]
    assert home is not None
    with pytest.raises(UsageError, match=rf"in a home of {home.nbytes}"):
        rig.engine.replace_unit(0, other)
    if stays == KEPT:
        with pytest.raises(UsageError, match="not packed"):
            rig.engine.replace_unit(0, plain_unit(rig.backend, 256).image)
    rig.counts()
    rig.check_all()
    assert rig.counts()[1] == 0


@pytest.mark.parametrize("lock", [True, False])
@pytest.mark.parametrize("stays", [LIVES, KEPT])
def test_another_engine_takes_over_the_homes_that_are_filled(stays: str, lock: bool) -> None:
    rig = Rig(host_units(stays, 4, lock=lock), [stays] * 4, slots=1, depth=0)
    for unit in (0, 2):
        rig.check(unit)
    assert not rig.engine.home_filled(0)  # not closed yet
    assert rig.reopen() == [True, False, True, False]
    for _ in range(2):
        rig.check_all()
    unpacked = 8 if stays == KEPT else 0
    assert rig.counts() == (2 + unpacked, sum(rig.units[i].image.nbytes for i in (1, 3)))
    rig.engine.invalidate(2)
    overwrite(rig.units[2])
    assert rig.reopen() == [True, True, False, True]
    rig.check_all()
    assert rig.counts()[1] == rig.units[2].image.nbytes
    rig.engine.close()


def test_a_kernel_that_still_reads_a_home_sees_its_bytes_when_another_engine_has_it() -> None:
    rig = Rig(host_units(LIVES, 2), [LIVES] * 2, slots=0)
    old = rig.units[0].plain
    seen, wait = late_read(rig, 0)
    assert rig.reopen() == [True, True]
    rig.units[0] = plain_unit(rig.backend, old.numel())
    rig.engine.replace_unit(0, rig.units[0].image)
    rig.check_all()
    wait()
    assert torch.equal(seen, old)


def test_taking_over_a_home_costs_an_event_that_is_recorded() -> None:
    """Rule 1: a reader may wait for `ready` only behind its record."""
    backend = HostBackend()
    unit = plain_unit(backend, 4096)
    costs = []
    for filled in (False, True):
        rig = Rig([unit], [LIVES], backend=backend, slots=0, staging=0, depth=0)
        home = Place("cpu", 4096)
        home.bytes.copy_(unit.plain)
        calls = backend.calls
        rig.engine.add_unit(unit.image, home=[(home.address, 4096)], filled=filled)
        costs.append(backend.calls - calls)
        _, generation = rig.engine.acquire(1, 0)
        rig.engine.release(1, 0, generation)
        assert rig.engine.stats().fetches == (0 if filled else 1)
    assert costs == [1, 2]


def test_a_unit_that_could_not_be_added_is_not_there_and_can_be_added_again() -> None:
    backend = HostBackend()
    unit = plain_unit(backend, 4096)
    rig = Rig([unit], [LIVES], backend=backend, slots=0, staging=0, depth=0)
    home = Place("cpu", 4096)
    home.bytes.copy_(unit.plain)
    for nth in (1, 2):
        backend.fail_at(nth)
        with pytest.raises(OffloadError, match="told to fail"):
            rig.engine.add_unit(unit.image, home=[(home.address, 4096)], filled=True)
        assert rig.engine.unit_count == 1
        assert rig.engine.order() == [0]
    assert rig.engine.add_unit(unit.image, home=[(home.address, 4096)], filled=True) == 1
    slot, generation = rig.engine.acquire(1, 0)
    assert slot == 1
    rig.engine.release(1, 0, generation)
    assert rig.counts() == (0, 0)
    rig.engine.close()
    assert rig.engine.home_filled(1)


@pytest.mark.parametrize("stays", [LIVES, KEPT])
@pytest.mark.parametrize("lock", [True, False])
def test_a_home_whose_fill_failed_is_not_filled(stays: str, lock: bool) -> None:
    """At whatever call, with the error thrown or left to the acquire that does not come."""
    failures = []
    for nth in range(1, 12):
        rig = Rig(host_units(stays, 1, lock=lock), [stays], slots=1)
        assert isinstance(rig.backend, HostBackend)
        rig.backend.fail_at(nth)
        try:
            rig.use(0)
        except OffloadError as error:
            failures.append(str(error))
        rig.backend.fail_at(0)
        filled = rig.reopen()[0]
        home = rig.homes[0]
        assert home is not None
        wanted = (
            torch.frombuffer(rig.units[0].memory, dtype=torch.uint8)
            if stays == KEPT
            else rig.units[0].plain
        )
        assert torch.equal(home.bytes, wanted) or not filled, f"call {nth}"
        rig.check(0)
        assert rig.counts()[1] == (0 if filled else rig.units[0].image.nbytes)
        rig.engine.close()
    assert len(failures) >= 4
    assert all("told to fail" in failure for failure in failures)


@pytest.mark.parametrize("stays", [LIVES, KEPT])
def test_a_home_whose_fill_was_interrupted_by_the_close_is_not_filled(stays: str) -> None:
    backend = HostBackend(bytes_per_second=CHUNK / 0.2)
    units = host_units(stays, 3, lock=False)
    rig = Rig(units, [stays] * 3, backend=backend, depth=2)
    rig.engine.prefetch()
    time.sleep(0.02)
    rig.engine.close()
    filled = [rig.engine.home_filled(unit) for unit in range(3)]
    assert filled == [False] * 3


def test_no_other_unit_than_one_that_was_added_can_be_asked_for() -> None:
    rig = Rig(host_units(LIVES, 2), [LIVES, PASSES])
    for _ in range(2):
        for unit in (-1, 2, 1 << 20):
            with pytest.raises(UsageError, match=f"there is no unit {unit}"):
                rig.engine.home_filled(unit)
        assert rig.engine.home_filled(1) is False
        rig.engine.close()


def fetched_behind(rig: Rig, unit: int) -> list[int]:
    """The units whose fetch the acquire of this one starts."""
    _, generation = rig.engine.acquire(unit, 0)
    lines = rig.engine.recent_events().splitlines()
    rig.engine.release(unit, 0, generation)
    acquire = max(i for i, line in enumerate(lines) if f" acquire unit {unit} " in line)
    return [int(line.split()[3]) for line in lines[acquire + 1 :]]


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_depth_counts_the_units_that_are_to_come(depth: int) -> None:
    """Over the link. Those at home are there; where packed bytes are there, its reader unpacks."""
    stays = [PASSES, LIVES, LIVES, KEPT, LIVES, PASSES, KEPT]
    units = [packed_unit(HostBackend(), CHUNK) for _ in stays]
    rig = Rig(units, stays, slots=4, depth=depth)
    for _ in range(2):
        rig.check_all()
    for unit in (0, 5):
        rig.engine.invalidate(unit)
        rig.engine.replace_unit(unit, units[unit].image)
    for unit in (3, 6):
        rig.engine.invalidate(unit)
    assert fetched_behind(rig, 4) == [5, 6, 0, 3][:depth]


def test_unpacking_leaves_what_is_on_its_way_in_its_slot() -> None:
    stays = [KEPT, KEPT, PASSES, KEPT]
    rig = Rig([packed_unit(HostBackend(), CHUNK) for _ in stays], stays, slots=2, depth=1)
    for _ in range(2):
        rig.check_all()
    rig.counts()
    for _ in range(2):
        rig.check_all()
    assert rig.engine.stats().cold == 0
    assert rig.counts() == (2 * 4, 2 * rig.units[2].image.nbytes)
    rig.engine.invalidate(2)
    assert fetched_behind(rig, 0) == [2]


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_unit_that_has_left_its_home_is_to_come_again(depth: int) -> None:
    rig = Rig(host_units(LIVES, 6), [LIVES] * 6, slots=0, depth=depth)
    rig.check_all()
    for unit in (0, 2, 5):
        rig.engine.invalidate(unit)
    assert fetched_behind(rig, 1) == [2, 5, 0][:depth]


@pytest.mark.parametrize("stays", [LIVES, KEPT])
def test_one_unit_alone_is_fetched_once(stays: str) -> None:
    for depth in (0, 1, 5):
        rig = Rig(host_units(stays, 1), [stays], slots=1, depth=depth)
        for _ in range(3):
            rig.check(0)
        assert rig.counts() == (1 if stays == LIVES else 2, rig.units[0].image.nbytes)
        rig.engine.close()


def test_neither_prefetch_nor_release_waits_for_a_home_that_comes_through_the_ring() -> None:
    """Rule 3: acquire alone may wait, for the unit that it is asked for."""
    backend = HostBackend(bytes_per_second=CHUNK / 0.5)
    rig = Rig(host_units(KEPT, 4, lock=False), [KEPT] * 4, backend=backend, slots=2, depth=2)
    begin = time.monotonic()
    rig.engine.prefetch()
    assert time.monotonic() - begin < 0.4
    rig.check(0)
    rig.check_all()
    assert rig.counts()[1] == sum(unit.image.nbytes for unit in rig.units)
    rig.engine.close()


def test_a_slot_is_not_given_to_a_unit_behind_one_whose_home_is_late() -> None:
    """Else what came to the slot is thrown away, and comes over the link again."""
    units = host_units(KEPT, 3, lock=False)
    rig = Rig(units, [KEPT, PASSES, PASSES], slots=1, depth=2, ring_chunks=1)
    rig.hold_up(rig.engine.copy_stream)
    rig.engine.prefetch()
    for _ in range(2):
        rig.check_all()
    once, *each = (unit.image.nbytes for unit in units)
    assert rig.counts()[1] == once + 2 * sum(each)


def test_after_a_failure_at_any_call_every_pass_but_the_next_is_quiet() -> None:
    """What failed is told once, by the acquire that needs it, not later."""
    for nth in range(1, 60):
        backend = HostBackend()
        units = [packed_unit(backend, CHUNK) for _ in range(4)]
        rig = Rig(units, [KEPT, LIVES, KEPT, PASSES], backend=backend, slots=1)
        backend.fail_at(nth)
        failures = []
        for turn in range(5):
            for unit in range(4):
                try:
                    rig.check(unit)
                except OffloadError as error:
                    failures.append((turn, str(error)))
                    rig.engine.abandon(0)
            if turn == 0:
                backend.fail_at(0)
        assert len(failures) <= 1, f"call {nth}"
        for turn, error in failures:
            assert turn < 2, f"call {nth}"
            assert "told to fail" in error
        rig.engine.close()


def test_a_packed_home_that_is_spoilt_on_the_device_is_filled_anew() -> None:
    rig = Rig(host_units(KEPT, 3), [KEPT] * 3, slots=1, depth=0)
    rig.check_all()
    home = rig.homes[1]
    assert home is not None
    home.bytes[256] ^= 0x40  # of the header of its first chunk
    rig.counts()
    with pytest.raises(TransferError, match=r"unit 1 could not be fetched .* spoilt"):
        rig.engine.acquire(1, 0)
    rig.check(1)
    assert rig.counts()[1] == rig.units[1].image.nbytes
    home.bytes[256] ^= 0x40
    rig.check(0)
    with pytest.raises(TransferError, match="spoilt"):
        rig.engine.acquire(1, 0)
    rig.engine.close()
    assert [rig.engine.home_filled(unit) for unit in range(3)] == [True, False, True]


def test_spoilt_packed_bytes_of_a_host_are_told_until_they_are_right() -> None:
    for stays in (LIVES, KEPT):
        rig = Rig([packed_unit(HostBackend(), CHUNK) for _ in range(2)], [stays] * 2)
        stored = torch.frombuffer(rig.units[1].memory, dtype=torch.uint8)
        stored[256] ^= 0x40
        rig.check(0)
        for _ in range(2):
            with pytest.raises(TransferError, match=r"unit 1 could not be fetched .* spoilt"):
                rig.engine.acquire(1, 0)
        rig.engine.invalidate(1)
        stored[256] ^= 0x40
        rig.check(1)
        rig.engine.close()


def test_an_abandoned_forward_gives_homes_back() -> None:
    rig = Rig(host_units(LIVES, 2), [LIVES, LIVES], slots=0)
    for unit in (0, 1, 0):
        rig.engine.acquire(unit, 0)
    rig.engine.abandon(0)
    for unit in (0, 1):
        rig.engine.invalidate(unit)
        overwrite(rig.units[unit])
    rig.check_all()
    assert rig.counts()[0] == 4


@pytest.mark.parametrize("home", [{"as_stored": True}, {"filled": True}])
def test_a_home_without_an_address_is_refused(home: dict[str, Any]) -> None:
    rig = Rig(host_units(PASSES, 1), [PASSES], slots=1)
    with pytest.raises(UsageError, match="address"):
        rig.engine.add_unit(rig.units[0].image, **home)
    assert rig.engine.unit_count == 1
