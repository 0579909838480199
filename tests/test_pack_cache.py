"""Cache files with packed images: used as they are, or refused by name; never spoilt bytes."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

import wanoffload
from tests import plain_packing
from tests.small_models import MODELS, forward
from tests.test_cache_file import Parts, flip, largest_file, only
from tests.test_checkpoint import save
from tests.test_load import open_files
from tests.test_pack_option import assert_ordinary, assert_right
from wanoffload import packing
from wanoffload._C import PackedImage, fingerprint
from wanoffload.loading import cache_writer
from wanoffload.loading.cache_file import CacheFile
from wanoffload.loading.pack_report import report
from wanoffload.loading.packing import check, pack

KIND = MODELS["wan22_5b"]
BF16 = torch.bfloat16
TIERS = ["pinned", "pageable", "disk"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(KIND.make(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def cache(tmp_path: Path, folder: Path) -> Path:
    """A packed cache file, made of the checkpoint; its folder has nothing else in it."""
    (tmp_path / "cache").mkdir()
    pack(folder, tmp_path / "cache" / "file", torch_dtype=BF16)
    return tmp_path / "cache" / "file"


def load(folder: Path, cache: Path, **options: Any) -> nn.Module:
    options = {"torch_dtype": BF16, "device": "cpu", "cache": cache, **options}
    return wanoffload.load(WanTransformer3DModel, folder, **options)


def wrap(cache: Path, model: nn.Module | None = None, **options: Any) -> nn.Module:
    return wanoffload.wrap(model or KIND.make(), **{"device": "cpu", "cache": cache, **options})


@pytest.mark.parametrize("made", [load, "wrap"])
@pytest.mark.parametrize("pack", [None, True, "auto"])
@pytest.mark.parametrize("host", TIERS)
def test_a_packed_cache_file_is_used_packed(
    folder: Path, cache: Path, host: str, pack: Any, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is packed again."""
    monkeypatch.setattr(packing, "Packer", None)  # calling it would fail
    options = {"host": host, "pack": pack}
    model = load(folder, cache, **options) if made is load else wrap(cache, **options)
    assert_right(model)
    assert wanoffload.offloader(model).pack == 1.0
    assert_ordinary(wanoffload.unwrap(model))


def test_a_packed_file_is_the_one_that_load_writes_byte_for_byte(folder: Path, cache: Path) -> None:
    load(folder, cache.with_name("other"), pack=True)
    assert cache.read_bytes() == cache.with_name("other").read_bytes()


@pytest.mark.parametrize("host", TIERS)
def test_a_cache_file_of_the_other_kind_is_refused_by_name(
    folder: Path, cache: Path, host: str
) -> None:
    words = f"the cache file {cache} holds 3 of 3 packed images, and pack=False asks for plain"
    with pytest.raises(wanoffload.CacheFileError, match=words):
        load(folder, cache, pack=False, host=host)
    with pytest.raises(wanoffload.CacheFileError, match=words):
        wrap(cache, pack=False, host=host)
    plain = cache.with_name("plain")
    load(folder, plain)
    words = f"the cache file {plain} holds no packed images, and pack=True asks for packed"
    with pytest.raises(wanoffload.CacheFileError, match=words):
        load(folder, plain, pack=True, host=host)
    assert check(plain).units[0].packed is False


def test_a_plain_cache_file_is_written_as_it_always_was(folder: Path, cache: Path) -> None:
    plain = cache.with_name("plain")
    load(folder, plain)
    magic, version, nbytes, _ = struct.unpack_from("<8sQQQ", plain.read_bytes())
    assert (magic, version) == (b"\x93WOCACHE", 1)
    text = plain.read_bytes()[64 : 64 + nbytes]
    assert text[-1:] == b"}"
    (unit, *_) = json.loads(text)["units"]
    assert list(unit) == ["name", "offset", "nbytes", "checksum", "tensors"]


def test_a_reader_can_be_written_from_the_words_of_the_format(cache: Path) -> None:
    """docs/cache-file.md and docs/packing.md, without this package."""
    content = cache.read_bytes()
    magic, version, json_bytes, file_bytes = struct.unpack_from("<8sQQQ", content)
    assert (magic, version, file_bytes) == (b"\x93WOCACHE", 2, len(content))
    text = content[64 : 64 + json_bytes]
    assert content[32:64] == hashlib.sha256(content[:32] + text).digest()
    images = -(-(64 + json_bytes) // 4096) * 4096
    found = {}
    for unit in json.loads(text)["units"]:
        assert unit["packed"] is True
        start = images + unit["offset"]
        assert start % 4096 == 0
        plain = plain_packing.unpack(content[start : start + unit["nbytes"]])
        assert len(plain) == unit["plain_nbytes"]
        for tensor in unit["tensors"]:
            dtype = getattr(torch, tensor["dtype"])
            flat = torch.frombuffer(bytearray(plain[tensor["offset"] :]), dtype=dtype)
            value = flat.as_strided(tensor["shape"], tensor["stride"])
            found[f"{unit['name']}.{tensor['name']}"] = value
    expected = KIND.make().state_dict()
    assert len(found) == 3 * 27
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_blocks_without_bf16_are_plain_in_a_packed_file(tmp_path: Path) -> None:
    parts = Parts(KIND.make())
    header = cache_writer.write_cache(
        tmp_path / "mixed", parts.identity, (), parts.units, parts.layouts, parts.fill, {0, 2}
    )
    assert [unit.packed for unit in header.units] == [True, False, True]
    assert CacheFile.open(tmp_path / "mixed").header == header
    assert check(tmp_path / "mixed") == header
    model = wrap(tmp_path / "mixed", host="disk")
    inputs = KIND.inputs()
    for _ in range(2):
        assert torch.equal(forward(model, inputs), forward(KIND.make(), inputs))
    assert wanoffload.offloader(model).stats().packed_units == 2


# What is spoilt, or another's


def test_other_weights_are_seen_without_unpacking(cache: Path, folder: Path) -> None:
    other = KIND.make(seed=5)
    with pytest.raises(wanoffload.CacheFileError, match=r"weights of blocks\.0 are others than"):
        wrap(cache, other)
    changed = KIND.make()
    with torch.no_grad():
        changed.blocks[2].ffn.net[2].weight[-1, -1] += 1
    with pytest.raises(wanoffload.CacheFileError, match=r"weights of blocks\.2 are others than"):
        wrap(cache, changed)
    assert torch.equal(changed.blocks[0].attn1.to_q.weight, KIND.make().blocks[0].attn1.to_q.weight)


def test_another_checkpoint_is_refused(cache: Path, tmp_path: Path) -> None:
    save(KIND.make(seed=5), tmp_path / "other")
    with pytest.raises(wanoffload.CacheFileError, match="holds other bytes than those it was made"):
        load(tmp_path / "other", cache)


def places(cache: Path) -> dict[str, int]:
    """Bytes of the file, in the second block's image."""
    unit = CacheFile.open(cache).header.units[1]
    return {
        "checksum of a run": unit.offset + 256 + 16 + 32,
        "codec of a run": unit.offset + 256 + 16,
        "body": unit.offset + unit.nbytes // 2,
        "end": unit.offset + unit.nbytes - 1,
        "fingerprint in the head": unit.offset + 32,
    }


PLACES = ["checksum of a run", "codec of a run", "body", "end", "fingerprint in the head"]


@pytest.mark.parametrize("host", TIERS)
@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_bit_never_reaches_a_forward(
    folder: Path, cache: Path, place: str, host: str
) -> None:
    flip(cache, places(cache)[place])
    gc.collect()
    before = open_files()
    with pytest.raises(wanoffload.TransferError, match=str(cache)):
        forward(load(folder, cache, host=host), KIND.inputs())
    gc.collect()
    assert open_files() == before


@pytest.mark.parametrize("host", TIERS)
@pytest.mark.parametrize("byte", [0, 8, 12, 16, 24], ids=["magic", "version", "n", "plain", "n"])
def test_a_spoilt_head_is_seen_as_it_is_loaded(
    folder: Path, cache: Path, byte: int, host: str
) -> None:
    flip(cache, CacheFile.open(cache).header.units[1].offset + byte)
    with pytest.raises(wanoffload.TransferError, match=r"blocks.1.*[Dd]elete the file"):
        load(folder, cache, host=host)


def test_a_flipped_bit_in_the_header_is_refused(folder: Path, cache: Path) -> None:
    flip(cache, 100)
    with pytest.raises(wanoffload.CacheFileError, match="its header is spoilt"):
        load(folder, cache)


def test_check_names_every_unit_that_is_not_what_was_written(cache: Path) -> None:
    assert check(cache).units[0].packed
    flip(cache, places(cache)["body"])
    with pytest.raises(wanoffload.CacheFileError, match=r"1 of 3 units are spoilt.*blocks.1"):
        check(cache)


def test_check_unpacks(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose every checksum is right, and that was not packed from the bytes it claims."""
    file = CacheFile.open(cache)
    units = list(file.header.units)
    flip(cache, units[2].offset + 32)  # the fingerprint in the head
    stored = torch.empty(units[2].nbytes, dtype=torch.uint8)
    content = cache.read_bytes()[units[2].offset :][: units[2].nbytes]
    stored.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    checksum = fingerprint(stored.data_ptr(), stored.numel())
    units[2] = dataclasses.replace(units[2], checksum=checksum)
    header = dataclasses.replace(file.header, units=tuple(units))
    with cache.open("r+b") as opened:
        opened.write(header.encode())
    with pytest.raises(wanoffload.CacheFileError, match=r"blocks\.2 can't be unpacked"):
        check(cache)


def test_a_file_that_unpacks_to_another_size_is_refused(folder: Path, cache: Path) -> None:
    file = CacheFile.open(cache)
    units = list(file.header.units)
    layout = dataclasses.replace(units[1].layout, nbytes=units[1].layout.nbytes + 256)
    units[1] = dataclasses.replace(units[1], layout=layout)
    CacheFile(cache, file._file, dataclasses.replace(file.header, units=tuple(units)))
    spoilt = CacheFile(cache, file._file, dataclasses.replace(file.header, units=tuple(units)))
    with pytest.raises(wanoffload.TransferError, match=r"blocks.1 .* it unpacks to 60672 bytes"):
        spoilt.image("blocks.1")


# Written


def test_a_writer_that_another_overtook_compares_with_what_that_wrote(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed where packed was asked for, or refused."""
    other = cache.with_name("other")
    real = cache_writer.CacheHeader.placed

    def placed(*arguments: Any) -> Any:
        monkeypatch.undo()
        load(folder, other)  # plain
        return real(*arguments)

    monkeypatch.setattr(cache_writer.CacheHeader, "placed", placed)
    with pytest.raises(wanoffload.CacheFileError, match=r"blocks\.0 is plain there, and asked for"):
        load(folder, other, pack=True)
    only(cache.parent, "file", "other")


def test_a_disk_that_is_full_leaves_nothing(folder: Path, cache: Path) -> None:
    with (
        largest_file(50_000),
        pytest.raises(wanoffload.CacheFileError, match="can't be written"),
    ):
        load(folder, cache.with_name("other"), pack=True)
    only(cache.parent, "file")


def test_space_is_looked_at_before(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 100_000

    monkeypatch.setattr(cache_writer.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(wanoffload.CacheFileError, match=r"takes about 0\.00 GB, and 0\.00 GB are"):
        load(folder, cache.with_name("other"), pack=True)
    Usage.free = 160_000  # enough for packed images, and not for plain ones
    load(folder, cache.with_name("other"), pack=True)
    with pytest.raises(wanoffload.CacheFileError, match=r"takes 0\.00 GB, and 0\.00 GB are"):
        load(folder, cache.with_name("plain"))


def test_a_header_is_as_long_as_was_planned_whatever_the_sizes_are() -> None:
    parts = Parts(KIND.make())
    header = cache_writer.CacheHeader.plan(parts.identity, parts.names, parts.layouts, {0, 1, 2})
    for size in (256, 2560, 60_416):
        placed = header.placed([size] * 3, [1, 2, 3])
        assert len(placed.encode()) == header.nbytes == placed.nbytes
        assert [unit.offset % 4096 for unit in placed.units] == [0, 0, 0]


# The report


def test_a_report_adds_up_to_the_packed_images(folder: Path, cache: Path) -> None:
    made = report(folder, torch_dtype=BF16)
    units = CacheFile.open(cache).header.units
    assert made.packed == sum(unit.nbytes for unit in units)
    assert made.plain == sum(unit.layout.nbytes for unit in units)
    assert sum(kind.plain for kind in made.kinds.values()) == made.plain
    heads = made.packed - sum(kind.packed for kind in made.kinds.values())
    assert 0 < heads < 3 * (256 + 16 + 64 * 48 + 512)
    assert {kind.count for kind in made.kinds.values()} == {3}
    assert made.kinds["scale_shift_table"].coded == 0
    q = made.kinds["attn1.to_q.weight"]
    assert q.coded == 3 * 2048  # two whole tiles of 48 x 48
    assert escapes_of(cache, "attn1.to_q.weight") == q.escapes
    text = made.as_text()
    assert f"ratio {made.packed / made.plain:.4f}" in text
    assert len(text.splitlines()) == 1 + 27 + 1


def escapes_of(cache: Path, name: str) -> int:
    """Counted from the file's tables."""
    total = 0
    content = cache.read_bytes()
    for unit in CacheFile.open(cache).header.units:
        (spec,) = [spec for spec in unit.layout.specs if spec.name == name]
        tables = plain_packing.read_tables(content[unit.offset :][: unit.nbytes])
        for chunk in tables.chunks:
            for run in chunk.runs:
                if spec.offset <= run.plain_offset < spec.offset + spec.nbytes:
                    total += run.escapes
    return total


def test_what_can_not_be_packed_is_refused_by_the_command(folder: Path, cache: Path) -> None:
    with pytest.raises(wanoffload.WrapError, match="nothing else is packed: ask for plain images"):
        pack(folder, cache.with_name("half"), torch_dtype=torch.float16)
    assert PackedImage is not None
    only(cache.parent, "file")
