"""Images that stand in files: read through the ring for each fetch, or once into host memory."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from wanoffload._C import (
    FileImage,
    HostBackend,
    HostStore,
    Image,
    Prefetcher,
    SourceFile,
    TransferError,
    UsageError,
    fingerprint,
)
from wanoffload.device_memory import SlotMemory

CHUNK = 128 << 10  # large enough to be read straight into the ring
PIECE = CHUNK - 4096  # of a file, in a chunk of whole blocks
EDGES = [edge + more for edge in (4096, PIECE, CHUNK) for more in (-1, 0, 1)]
SIZES = [0, 1, *EDGES, 3 * CHUNK + 5]
Extent = tuple[SourceFile, int, int, int]


def a_file(path: Path, nbytes: int) -> bytes:
    """Random bytes, written to `path`, and no longer in the page cache."""
    content = random.randbytes(nbytes)
    path.write_bytes(content)
    drop_from_page_cache(path)
    return content


def drop_from_page_cache(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_of(image: Image, offset: int = 0, nbytes: int | None = None) -> bytes:
    """Reads a range of an image into fresh memory with guards around it."""
    count = image.nbytes - offset if nbytes is None else nbytes
    place = torch.full((count + 128,), 0xA5, dtype=torch.uint8)
    image.read(offset, count, place.data_ptr() + 64)
    seen = bytes(place.numpy())
    assert seen[:64] == seen[-64:] == b"\xa5" * 64
    return seen[64:-64]


@dataclass
class LaidOut:
    """Where an image's bytes stand in files, and what they are."""

    extents: list[Extent]
    content: bytes

    def image(self) -> FileImage:
        return FileImage(self.extents, len(self.content))


def random_layout(chance: random.Random, files: list[tuple[SourceFile, bytes]]) -> LaidOut:
    """Extents of several files in any order, aligned or not, with and without gaps."""
    content = bytearray()
    extents: list[Extent] = []
    for _ in range(chance.randint(1, 12)):
        content += bytes(chance.choice([0, 0, 1, 200, 4096]))
        if chance.random() < 0.3:
            content += bytes(-len(content) % 4096)
        file, source = chance.choice(files)
        nbytes = chance.choice([0, 1, 300, 4096, 70_000, CHUNK, 2 * CHUNK + 11])
        start = chance.randint(0, len(source) - nbytes)
        start = chance.choice([start, start // 4096 * 4096])
        extents.append((file, start, nbytes, len(content)))
        content += source[start : start + nbytes]
    content += bytes(chance.choice([0, 5]))
    chance.shuffle(extents)
    return LaidOut(extents, bytes(content))


class Rig:
    """An engine on the host backend whose units are images of any kind."""

    def __init__(
        self, slots: int, depth: int, slot_bytes: int = 16 * CHUNK, chunk: int = CHUNK
    ) -> None:
        self.backend = HostBackend()
        self.memory = SlotMemory(slots, slot_bytes, torch.device("cpu"))
        self.engine = Prefetcher(
            self.backend,
            self.memory.addresses(),
            self.memory.slot_bytes,
            self.memory.memory,
            depth=depth,
            ring_chunks=4,
            ring_chunk_bytes=chunk,
            threads=3,
            timeout_ms=20_000,
        )
        self.engine.set_poison(0xEE)
        self.store = HostStore(self.backend)

    def use(self, unit: int, nbytes: int) -> bytes:
        slot, generation = self.engine.acquire(unit, 0)
        seen = bytes(self.memory.window(slot, nbytes).numpy())
        self.engine.release(unit, 0, generation)
        return seen

    def in_memory(self, content: bytes, lock: bool) -> Image:
        image = self.store.allocate(len(content))
        memoryview(image)[:] = content
        if lock:
            image.lock()
        return image


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def direct(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("start", [0, 8, 4096, 5000])
@pytest.mark.parametrize("shift", [0, 8, 4096])
def test_every_size_and_alignment_arrives_as_it_stands_in_the_file(
    tmp_path: Path, direct: bool, start: int, shift: int
) -> None:
    content = a_file(tmp_path / "f", start + max(SIZES))
    file = SourceFile(str(tmp_path / "f"), direct)
    was_direct = file.direct
    rig = Rig(slots=2, depth=1)
    wanted = [bytes(shift) + content[start : start + nbytes] for nbytes in SIZES]
    for whole in wanted:
        extents = [(file, start, len(whole) - shift, shift)]
        rig.engine.add_unit(FileImage(extents, len(whole)))
    for unit, whole in [*enumerate(wanted)] * 2:
        assert rig.use(unit, len(whole)) == whole
    assert file.direct == was_direct  # no read was refused
    rig.engine.close()


def test_images_of_many_extents_files_and_gaps_arrive(tmp_path: Path, direct: bool) -> None:
    chance = random.Random(3)
    files = []
    for name in ("a", "b", "c"):
        content = a_file(tmp_path / name, 5 * CHUNK + chance.randint(0, 9000))
        files.append((SourceFile(str(tmp_path / name), direct), content))
    was_direct = [file.direct for file, _ in files]
    for _ in range(30):
        laid_out = random_layout(chance, files)
        image, whole = laid_out.image(), laid_out.content
        assert bytes_of(image) == whole
        offset = chance.randint(0, len(whole))
        nbytes = chance.randint(0, len(whole) - offset)
        assert bytes_of(image, offset, nbytes) == whole[offset : offset + nbytes]
        filled = HostStore(HostBackend()).allocate(len(whole))
        filled.fill_from(laid_out.extents, direct=direct)
        filled.lock()
        assert bytes(memoryview(filled)) == whole
    assert [file.direct for file, _ in files] == was_direct  # no read was refused


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_pinned_pageable_and_file_units_share_one_order(tmp_path: Path, slots: int) -> None:
    chance = random.Random(slots)
    files = []
    for name, direct in (("a", True), ("b", False)):
        content = a_file(tmp_path / name, 4 * CHUNK)
        files.append((SourceFile(str(tmp_path / name), direct), content))
    rig = Rig(slots, depth=chance.randint(0, slots))
    wanted = []
    for unit in range(9):
        laid_out = random_layout(chance, files)
        wanted.append(laid_out.content)
        in_file = unit % 3 == 0
        rig.engine.add_unit(
            laid_out.image() if in_file else rig.in_memory(laid_out.content, unit % 3 == 1)
        )
    rig.engine.prefetch()
    for unit in [*range(9), *(chance.randrange(9) for _ in range(60))]:
        assert rig.use(unit, len(wanted[unit])) == wanted[unit]
    rig.engine.close()


def test_one_image_may_be_read_by_many_threads(tmp_path: Path, direct: bool) -> None:
    content = a_file(tmp_path / "f", 6 * CHUNK)
    file = SourceFile(str(tmp_path / "f"), direct)
    image = FileImage([(file, 17, 5 * CHUNK, 0)], 5 * CHUNK)
    seen: list[bytes] = []
    threads = [threading.Thread(target=lambda: seen.append(bytes_of(image))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [content[17 : 17 + 5 * CHUNK]] * 6


def test_what_stands_alike_is_read_straight_and_the_rest_through_a_buffer(tmp_path: Path) -> None:
    """Nine MiB: one read, or three through a buffer of four."""
    nbytes = 9 << 20
    content = a_file(tmp_path / "f", nbytes + 8)
    for start, reads in ((0, 1), (8, 3)):
        file = SourceFile(str(tmp_path / "f"), direct=True)
        if not file.direct:
            pytest.skip(f"this filesystem refuses O_DIRECT: {file.direct_refusal}")
        image = HostStore(HostBackend()).allocate(nbytes)
        FileImage([(file, start, nbytes, 0)], nbytes).read(0, nbytes, image.address)
        assert bytes(memoryview(image)) == content[start : start + nbytes]
        assert file.reads == reads


def test_the_ring_takes_whole_blocks_wherever_the_bytes_begin(tmp_path: Path) -> None:
    """Nine MiB in chunks of nine: two reads, not three through a buffer."""
    nbytes = 9 << 20
    content = a_file(tmp_path / "f", nbytes + 4101)
    rig = Rig(slots=1, depth=0, slot_bytes=nbytes, chunk=nbytes)
    for unit, start in enumerate((0, 8, 4095, 4101)):
        file = SourceFile(str(tmp_path / "f"), direct=True)
        if not file.direct:
            pytest.skip(f"this filesystem refuses O_DIRECT: {file.direct_refusal}")
        rig.engine.add_unit(FileImage([(file, start, nbytes, 0)], nbytes))
        assert rig.use(unit, nbytes) == content[start : start + nbytes]
        assert file.reads == 2
    rig.engine.close()


def test_a_unit_is_not_ready_before_its_slowest_chunk_is_there(tmp_path: Path) -> None:
    """The last chunk, of four bytes, is read long before the first one, of eight MiB."""
    chunk = 8 << 20
    nbytes = chunk - 4096 + 4
    content = a_file(tmp_path / "f", nbytes)
    for _ in range(10):
        drop_from_page_cache(tmp_path / "f")
        rig = Rig(slots=1, depth=0, slot_bytes=nbytes, chunk=chunk)
        extent = (SourceFile(str(tmp_path / "f")), 0, nbytes, 0)
        rig.engine.add_unit(FileImage([extent], nbytes))
        assert rig.use(0, nbytes) == content
        rig.engine.close()


def test_o_direct_refused_in_the_middle_changes_no_byte(tmp_path: Path) -> None:
    nbytes = 20 * CHUNK
    content = a_file(tmp_path / "f", nbytes + 100)
    for nth in range(1, 9):
        drop_from_page_cache(tmp_path / "f")  # where the last turn's buffered reads left it
        file = SourceFile(str(tmp_path / "f"), direct=True)
        file.fail_at(nth, errno.EINVAL if file.direct else 0)
        rig = Rig(slots=1, depth=0, slot_bytes=nbytes)
        rig.engine.add_unit(FileImage([(file, 100, nbytes, 0)], nbytes))
        assert rig.use(0, nbytes) == content[100:]
        assert not file.direct
        rig.engine.close()


def test_a_filesystem_without_o_direct_is_read_buffered_and_says_so(tmp_path: Path) -> None:
    refused = SourceFile("/proc/version", direct=True)
    assert not refused.direct
    assert refused.direct_refusal.startswith("open:")
    content = a_file(tmp_path / "f", 3 * CHUNK)
    file = SourceFile(str(tmp_path / "f"), direct=True)
    image = FileImage([(file, 5, 2 * CHUNK, 0)], 2 * CHUNK)
    if file.direct:  # else it was refused when it was opened
        file.fail_at(1, errno.EINVAL)
        assert image.direct
    assert bytes_of(image) == content[5 : 5 + 2 * CHUNK]
    assert not file.direct
    assert not image.direct
    assert "Invalid argument" in file.direct_refusal
    assert bytes_of(image) == content[5 : 5 + 2 * CHUNK]


def test_what_the_page_cache_holds_is_read_from_there(tmp_path: Path) -> None:
    """Nine MiB that stand unlike their place: one read, where O_DIRECT takes three."""
    nbytes = 9 << 20
    content = a_file(tmp_path / "f", nbytes + 8)
    assert (tmp_path / "f").read_bytes() == content
    file = SourceFile(str(tmp_path / "f"), direct=True)
    image = FileImage([(file, 8, nbytes, 0)], nbytes)
    assert bytes_of(image) == content[8:]
    assert file.reads == 1


def test_a_file_is_mapped_and_looked_at_for_changes(tmp_path: Path) -> None:
    content = a_file(tmp_path / "f", 3 * CHUNK)
    file = SourceFile(str(tmp_path / "f"))
    image = FileImage([(file, 5, CHUNK, 0), (file, 0, 100, CHUNK + 7)], CHUNK + 107)
    image.check()
    assert bytes(image.view(3, 1000)) == content[8:1008]
    assert bytes(image.view(CHUNK + 7, 100)) == content[:100]
    for offset, nbytes in ((CHUNK - 1, 2), (CHUNK, 1), (CHUNK + 100, 8)):
        with pytest.raises(UsageError, match="one extent"):
            image.view(offset, nbytes)
    os.truncate(tmp_path / "f", CHUNK)
    with pytest.raises(TransferError, match=rf"f, byte 5: the file has {CHUNK} bytes"):
        image.check()


def test_what_is_not_as_it_was_written_is_noticed_by_whoever_brings_it(tmp_path: Path) -> None:
    content = a_file(tmp_path / "f", 4096 + 5 * PIECE + 8)
    nbytes = len(content) - 4096
    whole = HostStore(HostBackend()).allocate(nbytes)
    whole.copy_from(FileImage([(SourceFile(str(tmp_path / "f")), 4096, nbytes, 0)], nbytes))
    right = fingerprint(whole.address, nbytes)

    def image_with(spoilt: int | None) -> FileImage:
        written = bytearray(content)
        if spoilt is not None:
            written[4096 + spoilt] ^= 1
        (tmp_path / "f").write_bytes(written)
        extent = (SourceFile(str(tmp_path / "f")), 4096, nbytes, 0)
        return FileImage([extent], nbytes, fingerprint=right)

    for spoilt in (None, 0, PIECE - 1, PIECE, nbytes - 1):
        rig = Rig(slots=1, depth=0, slot_bytes=nbytes)
        image = image_with(spoilt)
        rig.engine.add_unit(image)
        own = HostStore(HostBackend()).allocate(nbytes)
        for bring in (
            lambda: rig.use(0, nbytes),  # noqa: B023
            lambda: own.copy_from(image),  # noqa: B023
            image.check,
            lambda: rig.use(0, nbytes),  # noqa: B023
        ):
            if spoilt is None:
                bring()
                assert image.proven
            else:
                with pytest.raises(TransferError, match=r"f, byte 4096: .* checksum differs"):
                    bring()
                assert not image.proven
        rig.engine.close()


@pytest.mark.parametrize("nbytes", [3, 4096 * 3, CHUNK - 100, 2 * CHUNK])
def test_reads_that_come_back_short_are_continued(
    tmp_path: Path, direct: bool, nbytes: int
) -> None:
    content = a_file(tmp_path / "f", nbytes + 8)
    file = SourceFile(str(tmp_path / "f"), direct)
    was_direct = file.direct
    for start in (0, 8):
        for nth in (1, 2, 3):
            file.fail_at(nth, 0)
            assert (
                bytes_of(FileImage([(file, start, nbytes, 0)], nbytes))
                == (content[start : start + nbytes])
            )
    assert file.direct == was_direct  # no read was refused


def damaged_files(tmp_path: Path, direct: bool) -> tuple[Path, SourceFile, Rig]:
    """A unit of a file that opened well, and a rig that has read it once."""
    path = tmp_path / "model.safetensors"
    a_file(path, 3 * CHUNK)
    file = SourceFile(str(path), direct)
    rig = Rig(slots=1, depth=0)
    rig.engine.add_unit(FileImage([(file, 8, 2 * CHUNK, 0)], 2 * CHUNK))
    rig.engine.add_unit(rig.in_memory(b"other", lock=True))
    rig.use(0, 2 * CHUNK)
    rig.use(1, 5)
    time.sleep(0.02)  # the kernel's clock for files is coarse
    return path, file, rig


def test_a_file_truncated_after_it_was_opened_is_an_error_that_names_it(
    tmp_path: Path, direct: bool
) -> None:
    path, file, rig = damaged_files(tmp_path, direct)
    os.truncate(path, CHUNK + 100)
    with pytest.raises(TransferError, match=r"unit 0 .*model\.safetensors, byte \d+: .*it had"):
        rig.use(0, 2 * CHUNK)
    image = HostStore(HostBackend()).allocate(2 * CHUNK)
    with pytest.raises(TransferError, match=f"has {CHUNK + 100} bytes, it had {3 * CHUNK}"):
        image.fill_from([(file, 8, 2 * CHUNK, 0)], direct=direct)
    assert rig.use(1, 5) == b"other"


def test_a_file_written_to_after_it_was_opened_is_an_error(tmp_path: Path, direct: bool) -> None:
    path, _, rig = damaged_files(tmp_path, direct)
    with path.open("r+b") as file:
        file.write(b"!")
    with pytest.raises(TransferError, match="was written to after it was opened"):
        rig.use(0, 2 * CHUNK)


def test_a_file_replaced_by_rename_reads_as_the_one_that_was_opened(
    tmp_path: Path, direct: bool
) -> None:
    content = a_file(tmp_path / "f", 2 * CHUNK)
    file = SourceFile(str(tmp_path / "f"), direct)
    a_file(tmp_path / "new", CHUNK)
    os.replace(tmp_path / "new", tmp_path / "f")
    assert bytes_of(FileImage([(file, 0, 2 * CHUNK, 0)], 2 * CHUNK)) == content


def test_a_read_that_fails_is_thrown_by_the_acquire_that_needs_it_and_then_retried(
    tmp_path: Path, direct: bool
) -> None:
    nbytes = 5 * CHUNK
    content = a_file(tmp_path / "f", 3 * nbytes)
    file = SourceFile(str(tmp_path / "f"), direct)
    rig = Rig(slots=2, depth=1)
    for unit in range(3):
        rig.engine.add_unit(FileImage([(file, unit * nbytes, nbytes, 0)], nbytes))
    order = [0, 1, 2] * 2
    failures = []
    for nth in range(1, 40):
        file.fail_at(nth)
        for unit in order:
            try:
                rig.use(unit, nbytes)
            except TransferError as error:
                failures.append((unit, str(error)))
            assert rig.use(unit, nbytes) == content[unit * nbytes : (unit + 1) * nbytes]
    assert len(failures) > 10
    for unit, text in failures:
        assert f"unit {unit} could not be fetched" in text
        assert "/f, byte " in text
        assert "told to fail" in text
    rig.engine.close()


def test_a_fill_that_fails_is_thrown_and_another_one_is_right(tmp_path: Path, direct: bool) -> None:
    nbytes = 20 << 20
    content = a_file(tmp_path / "f", nbytes)
    file = SourceFile(str(tmp_path / "f"), direct)
    image = HostStore(HostBackend(), threads=3).allocate(nbytes)
    file.fail_at(3)
    with pytest.raises(TransferError, match="told to fail at read 3"):
        image.fill_from([(file, 0, nbytes, 0)], direct=direct)
    image.fill_from([(file, 0, nbytes, 0)], direct=direct)
    assert bytes(memoryview(image)) == content


def test_files_are_read_ahead_while_the_slot_they_are_for_is_still_being_read(
    tmp_path: Path,
) -> None:
    content = a_file(tmp_path / "f", 4 * PIECE)
    file = SourceFile(str(tmp_path / "f"), direct=False)
    rig = Rig(slots=1, depth=1, slot_bytes=2 * PIECE)
    for unit in range(2):
        rig.engine.add_unit(FileImage([(file, unit * 2 * PIECE, 2 * PIECE, 0)], 2 * PIECE))
    slow = HostBackend(latency_us=400_000)
    stream, event = slow.create_stream(), slow.create_event()
    slot, generation = rig.engine.acquire(0, stream)
    seen = torch.zeros(2 * PIECE, dtype=torch.uint8)
    source = rig.memory.window(slot, 2 * PIECE).data_ptr()
    slow.copy_to_device(seen.data_ptr(), source, 2 * PIECE, stream)
    slow.record(event, stream)
    rig.engine.release(0, stream, generation)
    deadline = time.monotonic() + 0.3
    while file.reads < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert file.reads == 4
    assert not slow.is_complete(event)
    assert rig.use(1, 2 * PIECE) == content[2 * PIECE :]
    assert bytes(seen.numpy()) == content[: 2 * PIECE]
    rig.engine.close()
    slow.destroy_event(event)
    slow.destroy_stream(stream)


def test_a_unit_that_is_fetched_already_can_be_replaced(tmp_path: Path) -> None:
    """Any tier by any other, and what was prefetched of the old one is not used."""
    content = a_file(tmp_path / "f", 4 * CHUNK)
    file = SourceFile(str(tmp_path / "f"), direct=True)
    rig = Rig(slots=3, depth=2)
    wanted = [b"zero", b"one", b"two"]
    for whole in wanted:
        rig.engine.add_unit(rig.in_memory(whole, lock=True))
    for turn in range(12):
        for unit in range(3):
            assert rig.use(unit, len(wanted[unit])) == wanted[unit]
        unit = turn % 3
        wanted[unit] = content[turn : turn + 2 * CHUNK + turn]
        if turn % 4 == 0:
            rig.engine.replace_unit(unit, rig.in_memory(wanted[unit], lock=turn % 8 == 0))
        else:
            nbytes = len(wanted[unit])
            rig.engine.replace_unit(unit, FileImage([(file, turn, nbytes, 0)], nbytes))
    assert rig.engine.stats().invalidations > 3
    rig.engine.close()


def test_an_image_that_was_replaced_is_let_go(tmp_path: Path) -> None:
    a_file(tmp_path / "f", CHUNK)
    file = SourceFile(str(tmp_path / "f"), direct=False)
    rig = Rig(slots=2, depth=1)
    for _ in range(2):
        rig.engine.add_unit(rig.in_memory(bytes(4096), lock=True))
    rig.use(0, 4096)
    rig.engine.replace_unit(0, FileImage([(file, 0, CHUNK, 0)], CHUNK))
    assert rig.store.mapped_bytes == rig.store.locked_bytes == 4096


def test_a_refused_replacement_leaves_the_unit_as_it_was() -> None:
    rig = Rig(slots=2, depth=1, slot_bytes=4096)
    for whole in (b"zero", b"one"):
        rig.engine.add_unit(rig.in_memory(whole, lock=True))
    with pytest.raises(UsageError, match="in slots of"):
        rig.engine.replace_unit(0, rig.in_memory(bytes(4097), lock=True))
    _, generation = rig.engine.acquire(0, 0)
    with pytest.raises(UsageError, match="in use"):
        rig.engine.replace_unit(0, rig.in_memory(b"new", lock=True))
    rig.engine.release(0, 0, generation)
    assert rig.use(0, 4) == b"zero"


def test_extents_that_can_not_be_are_refused(tmp_path: Path) -> None:
    a_file(tmp_path / "f", 100)
    file = SourceFile(str(tmp_path / "f"), direct=False)
    with pytest.raises(UsageError, match="50 bytes at 60 does not fit an image of 100"):
        FileImage([(file, 0, 50, 60)], 100)
    with pytest.raises(UsageError, match="20 bytes at 40 overlaps"):
        FileImage([(file, 0, 50, 0), (file, 0, 20, 40)], 100)
    with pytest.raises(TransferError, match=r"f has 100 bytes; 50 at 51 are not there"):
        FileImage([(file, 51, 50, 0)], 100)
    with pytest.raises(UsageError, match="are not in an image of 100"):
        FileImage([(file, 0, 100, 0)], 100).read(90, 11, 0)


def test_what_is_no_file_can_not_be_opened(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"nothing could not be opened: No such file"):
        SourceFile(str(tmp_path / "nothing"))
    with pytest.raises(TransferError, match="is not a regular file"):
        SourceFile(str(tmp_path), direct=False)


def test_files_are_closed_with_the_last_image_of_theirs(tmp_path: Path, direct: bool) -> None:
    a_file(tmp_path / "f", CHUNK)
    before = len(os.listdir("/proc/self/fd"))
    file = SourceFile(str(tmp_path / "f"), direct)
    image: FileImage | None = FileImage([(file, 0, CHUNK, 0)], CHUNK)
    del file
    assert len(os.listdir("/proc/self/fd")) > before
    image = None
    assert image is None
    assert len(os.listdir("/proc/self/fd")) == before
