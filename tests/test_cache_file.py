"""The cache file by itself: what is written is what is read, and nothing else is believed."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wanoffload
from tests.small_models import MODELS
from tests.test_checkpoint import save
from wanoffload import host_memory, image
from wanoffload._C import HostBackend, HostImage, HostStore
from wanoffload.image import ImageLayout
from wanoffload.loading import cache_identity, cache_writer
from wanoffload.loading.cache_file import CacheFile
from wanoffload.loading.cache_header import START_BYTES, CacheHeader
from wanoffload.loading.cache_identity import identity_of, sources_of
from wanoffload.loading.cache_writer import Fill, write_cache
from wanoffload.units import Unit, find_units

KIND = MODELS["animate"]  # blocks of two kinds
ADVICE = "delete the file to have it written anew"


class Parts:
    """What a writer is given of a model in memory."""

    def __init__(self, model: nn.Module, files: tuple[Path, ...] = ()) -> None:
        self.files = files
        self.identity = identity_of(model, files)
        self.units = find_units(model)
        self.names = [unit.name for unit in self.units]
        self.layouts = [
            image.lay_out((group[0].name, group[0].tensor) for group in unit.groups)
            for unit in self.units
        ]

    def fill(self, unit: Unit, layout: ImageLayout, memory: HostImage) -> None:
        tensors = [group[0].tensor for group in unit.groups]
        image.write_image(memory, layout, tensors, image.leave_unlocked)

    def write(self, path: Path, fill: Fill | None = None) -> CacheHeader:
        fill = fill or self.fill
        return write_cache(path, self.identity, self.files, self.units, self.layouts, fill)

    def images(self) -> dict[str, bytes]:
        """As they stand in memory."""
        store = HostStore(HostBackend())
        found = {}
        for unit, layout in zip(self.units, self.layouts, strict=True):
            memory = store.allocate(layout.nbytes)
            self.fill(unit, layout, memory)
            found[unit.name] = bytes(memoryview(memory))
        return found


@pytest.fixture
def parts() -> Parts:
    return Parts(KIND.make())


@pytest.fixture
def path(tmp_path: Path, parts: Parts) -> Path:
    """A cache file of the model."""
    path = tmp_path / "animate.cache"
    parts.write(path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(wanoffload.CacheFileError) as caught:
        CacheFile.open(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def flip(path: Path, byte: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 1 << bit]))


# What is written is what is read.


def test_images_are_read_as_they_stand_in_memory(parts: Parts, path: Path) -> None:
    cache = CacheFile.open(path)
    expected = parts.images()
    assert list(cache.units) == list(expected)
    store = HostStore(HostBackend())
    for name, content in expected.items():
        memory = store.allocate(len(content))
        cache.fill(name, memory)
        assert bytes(memoryview(memory)) == content
        assert cache.units[name].offset % 4096 == 0
        place = torch.empty(len(content), dtype=torch.uint8)
        cache.image(name).read(0, len(content), place.data_ptr())
        assert place.numpy().tobytes() == content
    cache.check_model(parts.identity, parts.names, parts.layouts)


def test_what_a_writer_returns_is_what_a_reader_finds(parts: Parts, tmp_path: Path) -> None:
    header = parts.write(tmp_path / "a")
    assert CacheFile.open(tmp_path / "a").header == header
    assert os.path.getsize(tmp_path / "a") == header.file_bytes


def test_a_reader_can_be_written_from_the_words_of_the_format(path: Path) -> None:
    """docs/cache-file.md, in so many lines, without this package."""
    content = path.read_bytes()
    magic, version, json_bytes, file_bytes = struct.unpack_from("<8sQQQ", content)
    assert (magic, version, file_bytes) == (b"\x93WOCACHE", 1, len(content))
    text = content[64 : 64 + json_bytes]
    assert content[32:64] == hashlib.sha256(content[:32] + text).digest()
    header = json.loads(text)
    images = -(-(64 + json_bytes) // 4096) * 4096
    found = {}
    for unit in header["units"]:
        for tensor in unit["tensors"]:
            dtype = getattr(torch, tensor["dtype"])
            start = images + unit["offset"] + tensor["offset"]
            count = torch.Size(tensor["shape"]).numel()
            flat = torch.frombuffer(bytearray(content), dtype=dtype, count=count, offset=start)
            value = flat.as_strided(tensor["shape"], tensor["stride"])
            found[f"{unit['name']}.{tensor['name']}"] = value
        image_bytes = content[images + unit["offset"] :][: unit["nbytes"]]
        assert int(unit["checksum"], 16) == fingerprint_by_the_words(image_bytes)
    state = KIND.make().state_dict()
    assert len(found) > 100
    for name, value in found.items():
        assert value.dtype == state[name].dtype
        assert torch.equal(value, state[name]), name
    assert header["model"] == "WanAnimateTransformer3DModel"
    assert header["sources"] == []


def fingerprint_by_the_words(content: bytes) -> int:
    words = torch.frombuffer(bytearray(content), dtype=torch.uint32).to(torch.int64)
    low = 0xFFFFFFFF
    x = words ^ (torch.arange(len(words)) * 0x9E3779B1 & low)

    def times(value: torch.Tensor, factor: int) -> torch.Tensor:
        """Modulo 2^32, of numbers whose product has more than 63 bits."""
        high = (value >> 16) * factor & 0xFFFF
        return ((high << 16) + (value & 0xFFFF) * factor) & low

    x = times(x ^ (x >> 16), 0x7FEB352D)
    x = times(x ^ (x >> 15), 0x846CA68B)
    return int((x ^ (x >> 16)).sum()) % (1 << 64)


def test_tensors_of_every_dtype_and_stride_come_back(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Module()])
            values = {
                "turned": torch.randn(5, 3).t(),
                "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
                "float8": torch.randn(7).to(torch.float8_e4m3fn),
                "whole": torch.arange(3),
                "truth": torch.tensor([True, False]),
                "complex": torch.randn(3, dtype=torch.complex64),
                "nothing": torch.empty(0, 4),
                "number": torch.tensor(2.5, dtype=torch.float64),
            }
            for name, value in values.items():
                weight = nn.Parameter(value, requires_grad=False)
                self.blocks[0].register_parameter(name, weight)

    parts = Parts(Odd())
    parts.write(tmp_path / "odd")
    cache = CacheFile.open(tmp_path / "odd")
    cache.check_model(parts.identity, parts.names, parts.layouts)
    (unit,) = cache.units.values()
    memory = HostStore(HostBackend()).allocate(unit.layout.nbytes)
    cache.fill("blocks.0", memory)
    for spec, group in zip(unit.layout.specs, parts.units[0].groups, strict=True):
        value = image.host_view(spec, memory)
        assert value.stride() == group[0].tensor.stride()
        assert torch.equal(value, group[0].tensor)


# What is not believed.


def test_what_is_no_cache_file_is_refused(tmp_path: Path, path: Path) -> None:
    other = tmp_path / "other"
    for content in (b"", b"\x93WOCACH", bytes(64), b"GIF89a" + bytes(10_000)):
        other.write_bytes(content)
        assert "it is no cache file of wanoffload" in refusal(other)
    assert "not a regular file" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "none")


def test_a_file_of_another_version_of_the_format_is_refused(path: Path) -> None:
    flip(path, 8, bit=1)
    message = refusal(path)
    assert "it is of version 3 of the format, not of version 1" in message
    assert ADVICE in message


def test_a_truncated_file_is_refused_wherever_it_ends(path: Path) -> None:
    whole = path.stat().st_size
    header = CacheFile.open(path).header.nbytes
    for size in (whole - 1, whole - 4096, header + 1, header):
        os.truncate(path, size)
        assert f"it has {size} bytes, and was written with {whole}" in refusal(path)
    for size in (header - 4096, 65, 64):
        os.truncate(path, size)
        assert "cut short" in refusal(path)
    os.truncate(path, 63)
    assert "it is no cache file" in refusal(path)


def test_a_file_that_grew_is_refused(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")
    assert "and was written with" in refusal(path)


def test_any_flipped_bit_of_the_header_is_refused(path: Path) -> None:
    (length,) = struct.unpack_from("<Q", path.read_bytes(), 16)
    places = [*range(START_BYTES), *range(START_BYTES, START_BYTES + length, 997)]
    for bit, byte in enumerate([*places, START_BYTES + length - 1]):
        flip(path, byte, bit % 8)
        refusal(path)
        flip(path, byte, bit % 8)
    CacheFile.open(path)


def with_json(path: Path, change: Callable[[Any], None]) -> None:
    """Another JSON, with a right checksum."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content, 16)
    rows = json.loads(content[64 : 64 + length])
    change(rows)
    text = json.dumps(rows, separators=(",", ":")).encode()
    assert len(text) <= length
    text += b" " * (length - len(text))
    start = content[:32]
    path.write_bytes(start + hashlib.sha256(start + text).digest() + text + content[64 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.pop("units"),
        lambda rows: rows["units"][0].update(offset=1),
        lambda rows: rows["units"][-1].update(offset=244 * 4096),
        lambda rows: rows["units"][1].update(offset=-4096),
        lambda rows: rows["units"][1]["tensors"][0].update(dtype="nn"),
        lambda rows: rows.update(sources=7),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(path: Path, change: Callable[[Any], None]) -> None:
    with_json(path, change)
    assert "its header makes no sense" in refusal(path)


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_flipped_bit_in_an_image_is_found_and_the_unit_named(path: Path, number: int) -> None:
    unit = list(CacheFile.open(path).units.values())[number]
    store = HostStore(HostBackend())
    for byte in (0, 1000, unit.layout.nbytes - 1):
        flip(path, unit.offset + byte, bit=byte % 8)
        cache = CacheFile.open(path)
        with pytest.raises(wanoffload.TransferError, match=f"^{unit.name} can't be taken") as got:
            cache.fill(unit.name, store.allocate(unit.layout.nbytes))
        assert str(path) in str(got.value)
        assert "checksum differs" in str(got.value)
        assert "Delete the file" in str(got.value)
        flip(path, unit.offset + byte, bit=byte % 8)
    for name, other in CacheFile.open(path).units.items():
        CacheFile.open(path).fill(name, store.allocate(other.layout.nbytes))


# Whose it is.


def other_model(path: Path, other: Parts) -> str:
    with pytest.raises(wanoffload.CacheFileError) as caught:
        CacheFile.open(path).check_model(other.identity, other.names, other.layouts)
    assert str(path) in str(caught.value)
    assert ADVICE in str(caught.value)
    return str(caught.value)


def test_a_file_of_another_class_or_config_is_refused(parts: Parts, path: Path) -> None:
    message = other_model(path, Parts(MODELS["wan21_i2v"].make()))
    assert "it is of a WanAnimateTransformer3DModel, and this is a WanTransformer3DModel" in message
    changed = KIND.make()
    changed.register_to_config(eps=0.5)
    assert "with another config" in other_model(path, Parts(changed))
    changed = KIND.make()
    changed.register_to_config(_name_or_path="elsewhere")
    again = Parts(changed)
    CacheFile.open(path).check_model(again.identity, again.names, again.layouts)


def test_a_file_with_other_tensors_is_refused(parts: Parts, path: Path) -> None:
    def changed(**changes: Any) -> Parts:
        other = Parts(KIND.make())
        first, *rest = other.layouts
        spec = dataclasses.replace(first.specs[0], **changes)
        other.layouts = [dataclasses.replace(first, specs=(spec, *first.specs[1:])), *rest]
        return other

    (name,) = {spec.name for spec in parts.layouts[0].specs[:1]}
    assert f"blocks.0: {name} has dtype torch.float32 there, and torch.float16 here" in other_model(
        path, changed(dtype=torch.float16)
    )
    assert "shape (1, 6, 48) there, and (1, 5) here" in other_model(
        path, changed(shape=torch.Size((1, 5)))
    )
    assert "stride" in other_model(path, changed(stride=(1, 1, 1)))
    assert "offset 0 there, and 256 here" in other_model(path, changed(offset=256))
    assert f"the file has {name} where the model has x" in other_model(path, changed(name="x"))
    other = Parts(KIND.make())
    first = other.layouts[0]
    other.layouts[0] = dataclasses.replace(first, nbytes=first.nbytes + 256)
    assert f"blocks.0: it takes {first.nbytes} bytes there, and" in other_model(path, other)
    count = len(first.specs)
    other.layouts[0] = dataclasses.replace(first, specs=first.specs[:-1])
    message = f"blocks.0: it holds {count} tensors there, and {count - 1} here"
    assert message in other_model(path, other)


def test_a_file_with_other_units_is_refused(parts: Parts, path: Path) -> None:
    fewer = Parts(KIND.make())
    fewer.names, fewer.layouts = fewer.names[:-1], fewer.layouts[:-1]
    assert f"only the file has a unit {parts.names[-1]}" in other_model(path, fewer)
    more = Parts(KIND.make())
    more.names, more.layouts = [*more.names, "blocks.9"], [*more.layouts, more.layouts[0]]
    assert "only the model has a unit blocks.9" in other_model(path, more)


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, ...]:
    save(KIND.make(), tmp_path, "sharded")
    return tuple(sorted((tmp_path / "transformer").glob("*.safetensors")))


@pytest.fixture
def made_of_shards(tmp_path: Path, shards: tuple[Path, ...]) -> CacheFile:
    Parts(KIND.make(), shards).write(tmp_path / "shards.cache")
    return CacheFile.open(tmp_path / "shards.cache")


def test_sources_are_known_by_all_that_is_noted_of_them(
    shards: tuple[Path, ...], made_of_shards: CacheFile
) -> None:
    assert len(shards) > 3
    assert made_of_shards.is_of(sources_of(reversed(shards)))
    assert not made_of_shards.is_of(())  # a model in memory
    os.utime(shards[1])
    assert not made_of_shards.is_of(sources_of(shards))
    with pytest.raises(wanoffload.CacheFileError, match=r"it was made of .*00004-of-"):
        made_of_shards.is_of(sources_of(shards[:2]))


def test_a_source_of_another_size_is_refused(
    shards: tuple[Path, ...], made_of_shards: CacheFile
) -> None:
    size = shards[0].stat().st_size
    os.truncate(shards[0], size - 1)
    with pytest.raises(
        wanoffload.CacheFileError, match=f"had {size} bytes, and has {size - 1} now"
    ):
        made_of_shards.is_of(sources_of(shards))


def test_other_weights_are_told_apart_although_names_sizes_and_times_are_the_same(
    tmp_path: Path, shards: tuple[Path, ...], made_of_shards: CacheFile
) -> None:
    """The second expert of an archive that keeps no times."""
    save(KIND.make(seed=1), tmp_path / "second", "sharded")
    seconds = sorted((tmp_path / "second").rglob("*.safetensors"))
    for first, second in zip(shards, seconds, strict=True):
        status = first.stat()
        os.utime(second, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (first.name, status.st_size) == (second.name, second.stat().st_size)
    with pytest.raises(wanoffload.CacheFileError, match="holds other bytes"):
        made_of_shards.is_of(sources_of(seconds))


def test_samples_are_spread_over_the_whole_of_a_large_source(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    header = b'{"x":"' + b" " * 100 + b'"}'
    size = 8 + len(header) + 10 * cache_identity.SAMPLES * cache_identity.SAMPLE_BYTES
    with file.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(size)
    (before,) = sources_of([file])
    piece = (size - 8 - len(header) - 4096) // 63
    start = 8 + len(header)
    noticed = {}
    for byte in (0, 50, start, start + piece, start + 20 * piece + 4000, size - 1, start + 5000):
        flip(file, byte)
        noticed[byte] = sources_of([file])[0].digest != before.digest
        flip(file, byte)
    assert noticed.pop(start + 5000) is False  # between samples: the time tells
    assert all(noticed.values()), noticed
    assert sources_of([file])[0].digest == before.digest


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(wanoffload.CheckpointError, match=r"none.safetensors can't be read"):
        sources_of([tmp_path / "none.safetensors"])


# Writing, and what goes wrong there.


def only(folder: Path, *names: str) -> None:
    assert sorted(file.name for file in folder.iterdir()) == sorted(names)


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """No file may grow beyond, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("nbytes", [1, 100_000, 4095, -1])
def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, parts: Parts, nbytes: int) -> None:
    size = parts.write(tmp_path / "whole").file_bytes
    (tmp_path / "whole").unlink()
    with (
        largest_file(nbytes % size),
        pytest.raises(wanoffload.CacheFileError, match=r"can't be written: .*File too large"),
    ):
        parts.write(tmp_path / "a")
    only(tmp_path)


def test_too_little_space_is_an_error_with_numbers_before_a_byte_is_written(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = parts.write(tmp_path / "a").file_bytes
    usage = shutil.disk_usage(tmp_path)._replace(free=size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(wanoffload.CacheFileError, match=r"takes 0.00 GB, and 0.00 GB are free"):
        parts.write(tmp_path / "b", fill=lambda *_: pytest.fail("a unit was read"))
    only(tmp_path, "a")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
    parts.write(tmp_path / "b")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, parts: Parts) -> None:
    with pytest.raises(wanoffload.CacheFileError, match=r"no/a can't be written"):
        parts.write(tmp_path / "no" / "a")
    only(tmp_path)
    (tmp_path / "no").write_text("a file")
    with pytest.raises(wanoffload.CacheFileError, match=r"no/a can't be written: .*Not a direct"):
        parts.write(tmp_path / "no" / "a")


@pytest.mark.parametrize("error", [KeyboardInterrupt, wanoffload.TransferError])
def test_an_end_in_the_middle_leaves_nothing(
    tmp_path: Path, parts: Parts, error: type[BaseException]
) -> None:
    def fill(unit: Unit, layout: ImageLayout, memory: HostImage) -> None:
        if unit is parts.units[3]:
            assert len(list(tmp_path.glob("a.*.tmp"))) == 1
            raise error("now")
        parts.fill(unit, layout, memory)

    (tmp_path / "b").write_text("another")
    with pytest.raises(error, match="now"):
        parts.write(tmp_path / "a", fill)
    only(tmp_path, "b")


def test_sources_that_change_while_they_are_read_are_noticed(
    tmp_path: Path, shards: tuple[Path, ...]
) -> None:
    parts = Parts(KIND.make(), shards)

    def fill(unit: Unit, layout: ImageLayout, memory: HostImage) -> None:
        parts.fill(unit, layout, memory)
        os.utime(shards[0])

    with pytest.raises(wanoffload.CacheFileError, match="changed while"):
        parts.write(tmp_path / "a", fill)
    only(tmp_path, "transformer")


def test_what_somebody_else_wrote_meanwhile_stays(tmp_path: Path, parts: Parts) -> None:
    path = tmp_path / "a"

    def fill(unit: Unit, layout: ImageLayout, memory: HostImage) -> None:
        parts.fill(unit, layout, memory)
        path.write_text("somebody else's")

    parts.write(path, fill)
    assert path.read_text() == "somebody else's"
    only(tmp_path, "a")


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path: Path, parts: Parts) -> None:
    path = tmp_path / "a"
    together = threading.Barrier(6)
    headers = []

    def write() -> None:
        together.wait()
        headers.append(parts.write(path))

    threads = [threading.Thread(target=write) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    only(tmp_path, "a")
    cache = CacheFile.open(path)
    assert headers == [cache.header] * 6
    store = HostStore(HostBackend())
    for name, content in parts.images().items():
        memory = store.allocate(len(content))
        cache.fill(name, memory)
        assert bytes(memoryview(memory)) == content


def test_a_writer_that_is_killed_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from tests.test_cache_file import KIND, Parts
parts = Parts(KIND.make())
def fill(unit, layout, memory):
    if unit is parts.units[2]:
        os.kill(os.getpid(), signal.SIGKILL)
    parts.fill(unit, layout, memory)
parts.write(Path({str(tmp_path / "a")!r}), fill)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    (left,) = tmp_path.iterdir()
    assert left.match("a.*.tmp")
    Parts(KIND.make()).write(tmp_path / "a")
    CacheFile.open(tmp_path / "a")


def test_what_the_system_writes_in_part_is_written_on() -> None:
    class Slow(io.BytesIO):
        def write(self, content: Any) -> int:
            return super().write(content[:1000])

    file = Slow(bytes(9000))
    cache_writer._write_at(file, 4096, memoryview(b"x" * 3500))
    assert file.getvalue() == bytes(4096) + b"x" * 3500 + bytes(9000 - 4096 - 3500)


def test_a_link_to_another_disk_stays_a_link(tmp_path: Path, parts: Parts) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "disk" / "real")
    parts.write(tmp_path / "a")
    only(tmp_path / "disk", "real")
    assert (tmp_path / "a").is_symlink()
    CacheFile.open(tmp_path / "a")


def test_others_may_read_it_as_the_users_mask_says(tmp_path: Path, parts: Parts) -> None:
    before = os.umask(0o027)
    try:
        parts.write(tmp_path / "a")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_writing_takes_the_memory_of_one_unit(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = HostStore(HostBackend())
    seen: list[int] = []

    def fill(unit: Unit, layout: ImageLayout, memory: HostImage) -> None:
        parts.fill(unit, layout, memory)
        seen.append(store.mapped_bytes - memory.nbytes)

    needed: list[int] = []
    monkeypatch.setattr(cache_writer, "HostStore", lambda _: store)
    monkeypatch.setattr(host_memory, "require", lambda nbytes, _: needed.append(nbytes))
    parts.write(tmp_path / "a", fill)
    assert len(seen) == 6
    assert max(seen) < 4096
    assert store.mapped_bytes == 0
    assert needed == [max(layout.nbytes for layout in parts.layouts)]


def test_a_bar_counts_the_bytes_that_were_written(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Any] = []

    class Bar(cache_writer.tqdm):  # type: ignore[name-defined, misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            bars.append(self)

    monkeypatch.setattr(cache_writer, "tqdm", Bar)
    parts.write(tmp_path / "a")
    (bar,) = bars
    nbytes = sum(layout.nbytes for layout in parts.layouts)
    assert (bar.desc, bar.unit, bar.total, bar.n) == ("write cache", "B", nbytes, nbytes)
