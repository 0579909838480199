"""What packing on the device needs: tensors where they are, brought to the device one by one."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest
import torch

from tests.packed_units import in_memory, packed_unit
from wanoffload._C import (
    BackendError,
    ClosedError,
    CudaBackend,
    HostBackend,
    HostImage,
    HostStore,
    OffloadError,
    PiecesImage,
    TransferTimeout,
    Uploader,
    UsageError,
)

SIZE = 50_000
LATE = 0.1


def random_bytes(nbytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8)


def pieces_of(parts: Sequence[tuple[int, torch.Tensor]], nbytes: int) -> PiecesImage:
    return PiecesImage([(part.data_ptr(), at, part.numel()) for at, part in parts], nbytes)


def laid_out(parts: Sequence[tuple[int, torch.Tensor]], nbytes: int) -> torch.Tensor:
    whole = torch.zeros(nbytes, dtype=torch.uint8)
    for at, part in parts:
        whole[at : at + part.numel()] = part
    return whole


def seen_in(image: PiecesImage, offset: int, nbytes: int) -> torch.Tensor:
    """Reads a range into memory with guards around it."""
    place = torch.full((nbytes + 128,), 0xA5, dtype=torch.uint8)
    image.read(offset, nbytes, place.data_ptr() + 64)
    assert bool((place[:64] == 0xA5).all())
    assert bool((place[64 + nbytes :] == 0xA5).all())
    return place[64 : 64 + nbytes]


def test_pieces_read_as_one_image_with_zeros_between_them() -> None:
    chance = random.Random(5)
    for _ in range(200):
        parts, at = [], 0
        for _ in range(chance.randint(0, 6)):
            at += chance.choice([0, 0, 1, 200])
            parts.append((at, random_bytes(chance.choice([0, 1, 7, 300]))))
            at += parts[-1][1].numel()
        nbytes = at + chance.choice([0, 9])
        chance.shuffle(parts)
        image, whole = pieces_of(parts, nbytes), laid_out(parts, nbytes)
        assert torch.equal(seen_in(image, 0, nbytes), whole)
        offset = chance.randint(0, nbytes)
        count = chance.randint(0, nbytes - offset)
        assert torch.equal(seen_in(image, offset, count), whole[offset : offset + count])


def test_pieces_that_can_not_be_are_refused() -> None:
    part = random_bytes(50)
    with pytest.raises(UsageError, match="50 bytes at 60 does not fit an image of 100"):
        pieces_of([(60, part)], 100)
    with pytest.raises(UsageError, match="50 bytes at 49 overlaps"):
        pieces_of([(49, part), (0, part)], 100)


class Target:
    """Device memory, and the stream that computes there."""

    def __init__(self, device: str, count: int = 2) -> None:
        self.device = device
        self.backend = CudaBackend(0) if device == "cuda" else HostBackend()
        self.memory = torch.zeros(count, SIZE, dtype=torch.uint8, device=device)
        if device == "cuda":
            torch.cuda.synchronize()

    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0

    def uploader(self, **options: int) -> Uploader:
        given = {"ring_chunks": 3, "ring_chunk_bytes": 9000, "threads": 2, "timeout_ms": 5000}
        return Uploader(self.backend, **(given | options))

    def address(self, place: int) -> int:
        return self.memory[place].data_ptr()

    def hold_up(self, stream: int, seconds: float = LATE) -> None:
        nothing = torch.zeros(1)
        HostBackend(latency_us=seconds * 1e6).copy_to_device(
            nothing.data_ptr(), nothing.data_ptr(), 0, stream
        )


def test_images_of_every_kind_are_brought_one_after_the_other(device: str) -> None:
    target = Target(device)
    uploader = target.uploader()
    wanted = []
    seen = []
    keep: list[object] = []
    for nth in range(12):
        whole = random_bytes(SIZE)
        if nth % 3 == 0:
            keep.append(whole)
            uploader.start(pieces_of([(0, whole)], SIZE), target.address(nth % 2), target.stream())
        else:
            image = in_memory(target.backend, whole, lock=nth % 3 == 1)
            uploader.start(image, target.address(nth % 2), target.stream())
        wanted.append(whole)
        if nth > 0:  # the one before: this one is on its way meanwhile
            uploader.wait(target.stream())
            seen.append(target.memory[(nth - 1) % 2].clone())
    uploader.wait(target.stream())
    seen.append(target.memory[1].clone())
    for got, whole in zip(seen, wanted, strict=True):
        assert torch.equal(got.cpu(), whole)
    uploader.close()


def test_a_copy_waits_for_the_stream_that_reads_its_destination() -> None:
    for lock in (True, False):
        target = Target("cpu")
        uploader = target.uploader()
        reader = target.backend.create_stream()
        target.hold_up(reader)
        seen = torch.zeros(SIZE, dtype=torch.uint8)
        target.backend.copy_to_device(seen.data_ptr(), target.address(0), SIZE, reader)
        image = in_memory(target.backend, random_bytes(SIZE), lock)
        uploader.start(image, target.address(0), reader)
        uploader.wait(0)
        assert torch.equal(target.memory[0], torch.frombuffer(image, dtype=torch.uint8))
        assert bool((seen == 0).all())
        uploader.start(image, target.address(1), None)
        target.hold_up(reader)
        begin = time.monotonic()
        uploader.wait(0)
        assert time.monotonic() - begin < LATE / 2
        target.backend.destroy_stream(reader)


def test_the_stream_waits_for_the_last_byte() -> None:
    target = Target("cpu")
    target.backend = HostBackend(bytes_per_second=SIZE / LATE)
    uploader = target.uploader(ring_chunk_bytes=SIZE)
    image = in_memory(target.backend, random_bytes(SIZE), lock=False)
    uploader.start(image, target.address(0), None)
    uploader.wait(0)
    assert torch.equal(target.memory[0], torch.frombuffer(image, dtype=torch.uint8))


def test_what_fails_is_thrown_by_its_wait_and_the_next_image_arrives() -> None:
    for nth in range(1, 30):
        target = Target("cpu", count=3)
        backend = target.backend
        assert isinstance(backend, HostBackend)
        uploader = target.uploader()
        images = [in_memory(backend, random_bytes(SIZE), lock=k == 1) for k in range(3)]
        backend.fail_at(nth)
        failures = 0
        queued = []
        for k in range(3):
            try:
                uploader.start(images[k], target.address(k), None)
                queued.append(k)
            except BackendError:
                failures += 1
        for k in queued:
            try:
                uploader.wait(0)
                wanted = torch.frombuffer(images[k], dtype=torch.uint8)
                assert torch.equal(target.memory[k], wanted), f"call {nth}, image {k}"
            except BackendError:
                failures += 1
        assert failures <= 1
        with pytest.raises(UsageError, match=r"start\(\) comes first"):
            uploader.wait(0)
        backend.fail_at(0)
        uploader.start(images[0], target.address(1), None)
        uploader.wait(0)
        assert torch.equal(target.memory[1], torch.frombuffer(images[0], dtype=torch.uint8))


def test_nothing_is_written_any_more_when_a_failure_is_thrown() -> None:
    backend = HostBackend(latency_us=LATE * 1e6 / 4)
    target = Target("cpu")
    target.backend = backend
    uploader = target.uploader()
    image = in_memory(backend, random_bytes(SIZE), lock=False)
    backend.fail_at(7)  # in the middle: two events are made, then there are six copies
    uploader.start(image, target.address(0), None)
    with pytest.raises(BackendError, match="told to fail"):
        uploader.wait(0)
    before = target.memory.clone()
    assert bool((before[0] != 0).any())
    time.sleep(LATE)
    assert torch.equal(target.memory, before)


def test_an_upload_that_stalls_is_a_timeout() -> None:
    """With one chunk of the ring: the second waits for the first, which waits for the reader."""
    target = Target("cpu")
    uploader = target.uploader(ring_chunks=1, timeout_ms=60, threads=1)
    reader = target.backend.create_stream()
    target.hold_up(reader, 0.2)
    image = in_memory(target.backend, random_bytes(20_000), lock=False)
    uploader.start(image, target.address(0), reader)
    with pytest.raises(TransferTimeout, match="60 ms"):
        uploader.wait(0)
    time.sleep(0.2)
    uploader.close()
    target.backend.destroy_stream(reader)


def test_a_packed_image_is_refused() -> None:
    target = Target("cpu")
    uploader = target.uploader()
    with pytest.raises(UsageError, match="staging memory"):
        uploader.start(packed_unit(target.backend, 4096).image, target.address(0), None)


def test_a_closed_uploader_says_so_and_lets_go_of_everything() -> None:
    target = Target("cpu")
    backend = target.backend
    assert isinstance(backend, HostBackend)
    store = HostStore(backend)
    uploader = target.uploader()
    for _ in range(3):
        image: HostImage | None = store.allocate(SIZE)
        assert image is not None
        image.lock()
        uploader.start(image, target.address(0), None)
    uploader.close()
    uploader.close()
    image = None
    assert image is None
    assert store.mapped_bytes == 0
    assert backend.locked_bytes == 0
    with pytest.raises(ClosedError):
        uploader.start(store.allocate(1), target.address(0), None)


def test_what_was_queued_and_not_enqueued_when_it_was_closed_is_told() -> None:
    backend = HostBackend(latency_us=20_000)
    target = Target("cpu")
    target.backend = backend
    uploader = target.uploader(ring_chunks=1, threads=1)
    images = [in_memory(backend, random_bytes(SIZE), lock=False) for _ in range(2)]
    for k, image in enumerate(images):
        uploader.start(image, target.address(k), None)
    uploader.close()
    for _ in images:
        with pytest.raises(OffloadError, match="closed"):
            uploader.wait(0)
    before = target.memory.clone()
    time.sleep(LATE)
    assert torch.equal(target.memory, before)


def resident_pages(image: HostImage) -> int:
    """Of an image's mapping, by the system's own count."""
    inside = False
    with open("/proc/self/smaps", encoding="ascii") as maps:
        for line in maps:
            head = line.split()[0]
            if "-" in head and not head.endswith(":"):
                first, end = (int(edge, 16) for edge in head.split("-"))
                inside = first <= image.address < end
            elif inside and head == "Rss:":
                return int(line.split()[1]) // 4
    raise AssertionError("the image is not mapped")


@pytest.mark.parametrize(
    ("offset", "nbytes", "first", "end"),
    [
        (0, 40_000, 0, 40_000),  # the last page is no whole one, and goes too
        (0, 4096, 0, 4096),
        (1, 8191, 4096, 8192),
        (1, 8190, 4096, 4096),
        (4096, 4095, 4096, 4096),
        (36_864, 3136, 36_864, 40_000),
        (36_864, 3135, 0, 0),
        (0, 0, 0, 0),
        (40_000, 0, 0, 0),
    ],
)
def test_whole_pages_can_be_given_back_and_read_as_zeros(
    offset: int, nbytes: int, first: int, end: int
) -> None:
    image = HostStore(HostBackend(), huge_pages=False).allocate(40_000)
    memory = torch.frombuffer(image, dtype=torch.uint8)
    memory.fill_(7)
    before = resident_pages(image)
    image.drop(offset, nbytes)
    assert before - resident_pages(image) == -(-(end - first) // 4096)
    assert bool((memory[first:end] == 0).all())
    assert bool((memory[:first] == 7).all())
    assert bool((memory[end:] == 7).all())
    memory.fill_(9)
    assert bool((memory == 9).all())


def test_pages_that_a_copy_may_read_are_not_given_back() -> None:
    image = HostStore(HostBackend()).allocate(8192)
    image.lock()
    with pytest.raises(UsageError, match="page-locked"):
        image.drop(0, 4096)
    image.unlock()
    image.drop(0, 4096)
    for offset, nbytes in ((8193, 0), (4096, 4097)):
        with pytest.raises(UsageError, match="not in an image of 8192"):
            image.drop(offset, nbytes)
