"""Packing on the CPU: every bit comes back, and the bytes are those of the format."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import plain_packing
from tests.packed_images import gaussian, packed_bytes, plain_image, raw, stored, unpacked
from wanoffload._C import (
    FileImage,
    Image,
    PackedImage,
    Packer,
    PackingPlan,
    SourceFile,
    UsageError,
    fingerprint,
)

TILE = 1024
ALL_PATTERNS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
"""Every bf16 there is, by its bits."""


def check_round_trip(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    plain = plain_image(tensors)
    packed = packed_bytes(plain)
    assert torch.equal(unpacked(packed), plain.image)
    assert plain_packing.unpack(raw(packed)) == raw(plain.image)
    return packed


@pytest.mark.parametrize("weights", [0, 1, 127, 128, 1023, 1024, 1025, 2048, 5000, 40 * 1024 + 1])
def test_weights_of_any_number_come_back(weights: int) -> None:
    check_round_trip([gaussian(weights)])


def test_several_tensors_of_mixed_dtypes_come_back() -> None:
    check_round_trip(
        [
            torch.randn(3, 5),
            gaussian(50_000),
            torch.empty(0, dtype=torch.bfloat16),
            torch.randint(-100, 100, (777,), dtype=torch.int8),
            gaussian(1025, 5.0),
            gaussian(100_000, 1e-6),
            torch.randn(2_000_000),
        ]
    )


@st.composite
def tiles(draw: st.DrawFn) -> torch.Tensor:
    """One tile of weights as int16, of a kind that is hard somewhere."""
    kind = draw(st.sampled_from(["gaussian", "any", "zeros", "nan", "inf", "windows", "one off"]))
    bits = torch.randint(-(2**15), 2**15, (TILE,)).to(torch.int16)
    exponents = torch.zeros(TILE, dtype=torch.int16)
    if kind == "any":
        return bits
    if kind == "gaussian":
        return gaussian(TILE, draw(st.floats(1e-38, 1e38))).view(torch.int16)
    if kind == "nan":
        exponents[:] = 255
    elif kind == "inf":
        return torch.tensor([0x7F80, -128], dtype=torch.int16).repeat(TILE // 2)
    elif kind == "windows":  # as many weights in one window as in another
        low, high = draw(st.integers(0, 255)), draw(st.integers(0, 255))
        exponents[0::2], exponents[1::2] = low, high
    elif kind == "one off":
        exponents[:] = draw(st.integers(0, 255))
        exponents[draw(st.integers(0, TILE - 1))] = draw(st.integers(0, 255))
    return (bits & ~0x7F80) | (exponents << 7)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    if draw(st.sampled_from([True, True, True, False])):
        dtype = draw(st.sampled_from([torch.float32, torch.uint8, torch.float16]))
        return torch.randint(0, 256, (draw(st.integers(0, 99)) * 4,)).to(torch.uint8).view(dtype)
    weights = torch.cat(draw(st.lists(tiles(), min_size=1, max_size=4)))
    nbytes = draw(st.sampled_from([0, 1, TILE - 1, TILE, TILE + 1, 2 * TILE, weights.numel()]))
    return weights[:nbytes].view(torch.bfloat16)


@given(values=st.lists(tensors(), max_size=6), data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_mix_of_tensors_comes_back_whole_and_in_parts(
    values: list[torch.Tensor], data: st.DataObject
) -> None:
    plain = plain_image(values).image
    packed = check_round_trip(values)
    image = PackedImage(stored(packed))
    for _ in range(4):
        begin = data.draw(st.integers(0, plain.numel()))
        nbytes = data.draw(st.integers(0, plain.numel() - begin))
        out = torch.full((nbytes + 2,), 0x5A, dtype=torch.uint8)
        image.unpack(begin, nbytes, out.data_ptr() + 1)
        assert torch.equal(out[1:-1], plain[begin : begin + nbytes])
        assert out[0] == out[-1] == 0x5A


def check_tiles_come_back(weights: torch.Tensor, escapes: int) -> None:
    """`escapes`: at least so many weights must have been escapes, or it shows little."""
    plain = plain_image([weights])
    packer = Packer(plain.image.data_ptr(), plain.image.numel(), plain.tensors)
    assert all(run[0] == 1 for run in packer.plan.runs)
    assert sum(run[5] for run in packer.plan.runs) >= escapes
    assert torch.equal(unpacked(packed_bytes(plain)), plain.image)


@pytest.mark.parametrize("part", range(8))
def test_every_pattern_comes_back_from_every_place_of_a_tile(part: int) -> None:
    """Eight exponents a tile: seven with codes of their own, one that escapes."""
    patterns = ALL_PATTERNS.view(64, TILE)
    rounds = range(part * 128, part * 128 + 128)
    turned = torch.cat([patterns.roll(places, 1).view(-1) for places in rounds])
    check_tiles_come_back(turned, turned.numel() // 8)


@pytest.mark.parametrize("part", range(16))
def test_every_pattern_escapes_at_every_place_of_a_tile(part: int) -> None:
    """All exponents in each tile, so that nearly all escape; zeros beside them make it worth it."""
    patterns = ALL_PATTERNS.view(TILE, 64).t()
    zeros = torch.zeros(2 * 65_536, dtype=torch.int16)
    rounds = range(part * 64, part * 64 + 64)
    turned = [torch.cat([patterns.roll(places, 1).reshape(-1), zeros]) for places in rounds]
    check_tiles_come_back(torch.cat(turned), 64 * 65_536 * 9 // 10)


def test_gaussian_weights_take_0705_of_their_bytes() -> None:
    weights = torch.randn(512, 5120) * torch.rand(512, 1) * 0.1
    plain = plain_image([weights.to(torch.bfloat16)])
    packed = packed_bytes(plain)
    assert packed.numel() <= 0.705 * plain.image.numel()
    assert torch.equal(unpacked(packed), plain.image)


@given(weights=tiles())
@settings(max_examples=100, deadline=None)
def test_the_bytes_of_a_tile_are_those_of_the_format(weights: torch.Tensor) -> None:
    # Beside tiles that shrink well: a tensor that doesn't would stay plain.
    packed = raw(packed_bytes(plain_image([torch.cat([weights, *[weights * 0] * 9])])))
    (chunk,) = plain_packing.read_tables(packed).chunks
    (run,) = chunk.runs
    base, signs, codes, escapes = plain_packing.pack_tile(weights.numpy().view(np.uint16))
    sections = packed[chunk.offset + run.sections :]
    assert struct.unpack_from("<11I", sections) == (base << 24, *[len(escapes)] * 10)
    assert sections[48 : 48 + 1024] == signs
    assert sections[48 + 10 * 1024 :][:384] == codes
    assert sections[48 + 10 * 1408 :][: len(escapes)] == escapes
    assert not any(sections[48 + 10 * 1408 + len(escapes) :])
    assert run.escapes == len(escapes)


def test_checksums_add_up_to_the_fingerprint_of_the_plain_image() -> None:
    plain = plain_image([gaussian(3_000_000), torch.randn(1000)])
    packed = packed_bytes(plain)
    tables = plain_packing.read_tables(raw(packed))
    wanted = fingerprint(plain.image.data_ptr(), plain.image.numel())
    assert tables.fingerprint == PackedImage(stored(packed)).plain_fingerprint == wanted
    runs = [run for chunk in tables.chunks for run in chunk.runs]
    assert len(runs) == 4
    assert sum(run.checksum for run in runs) % 2**64 == wanted


def test_any_number_of_threads_gives_the_same_bytes() -> None:
    plain = plain_image([gaussian(5_000_000), torch.randn(3_000_000)])
    packed = packed_bytes(plain, threads=1)
    assert torch.equal(packed, packed_bytes(plain, threads=5))
    assert torch.equal(unpacked(packed, threads=1), unpacked(packed, threads=5))


def test_a_plan_made_from_escapes_alone_is_the_packers() -> None:
    plain = plain_image([gaussian(3000), torch.randn(3), gaussian(5_000_000), ALL_PATTERNS])
    escapes = [
        plain_packing.best_base(tile)[1]
        for offset, nbytes, bf16 in plain.tensors
        if bf16
        for tile in weights_of(plain.image, offset, nbytes).reshape(-1, TILE)
    ]
    size = plain.image.numel()
    packer = Packer(plain.image.data_ptr(), size, plain.tensors)
    for dtype in (np.uint16, np.uint32, np.int32):
        plan = PackingPlan(size, plain.tensors, np.array(escapes, dtype))
        assert plan.runs == packer.plan.runs
        assert plan.packed_bytes == packer.packed_bytes


def weights_of(image: torch.Tensor, offset: int, nbytes: int) -> plain_packing.Words:
    words = image.numpy()[offset : offset + nbytes].view(np.uint16)
    return words[: words.size // TILE * TILE]


def test_a_plan_writes_heads_and_nothing_else() -> None:
    plain = plain_image([gaussian(300_000), torch.randn(100)])
    packed = packed_bytes(plain)
    packer = Packer(plain.image.data_ptr(), plain.image.numel(), plain.tensors)
    tables = plain_packing.read_tables(raw(packed))
    heads = torch.full_like(packed, 0xA5)
    (chunk,) = tables.chunks
    packer.plan.write_heads(heads.data_ptr(), [run.checksum for run in chunk.runs])
    end = chunk.offset + 16 + 48 * len(chunk.runs)
    assert torch.equal(heads[:end], packed[:end])
    assert bool((heads[end:] == 0xA5).all())
    with pytest.raises(UsageError, match="one checksum for each of 3 runs, not 2"):
        packer.plan.write_heads(heads.data_ptr(), [1, 2])


def test_chunks_hold_at_most_64_runs_and_32_mib() -> None:
    small = [torch.randn(64)] * 100
    plain = plain_image([*small, torch.zeros(9 << 22, dtype=torch.uint8), *small])
    tables = plain_packing.read_tables(raw(packed_bytes(plain)))
    assert [len(chunk.runs) for chunk in tables.chunks] == [64, 43, 64, 38]
    assert sum(run.plain_bytes for run in tables.chunks[1].runs) <= 32 << 20
    assert torch.equal(unpacked(packed_bytes(plain)), plain.image)


def test_a_tensor_that_hardly_shrinks_stays_plain() -> None:
    plain = plain_image([ALL_PATTERNS[torch.randperm(65_536)], gaussian(65_536)])
    packer = Packer(plain.image.data_ptr(), plain.image.numel(), plain.tensors)
    assert [run[0] for run in packer.plan.runs] == [0, 1]


@pytest.mark.parametrize(("escapes", "codec"), [(4000, 1), (4304, 1), (4305, 0)])
def test_a_tensor_is_packed_up_to_0_9_of_its_bytes(escapes: int, codec: int) -> None:
    """10 tiles: 20,480 bytes, of which 0.9 are 18,432; 48 + 14,080 of them without escapes."""
    table = np.zeros(10, np.uint16)
    table[:5] = np.array([1000, 1000, 1000, 1000, escapes - 4000])
    plan = PackingPlan(20_480, [(0, 20_480, True)], table)
    assert [run[0] for run in plan.runs] == [codec]


def test_runs_are_cut_at_4_mib_and_tails_are_plain() -> None:
    """A tensor of 9,000 tiles and a half, and a gap of 5 MiB behind it."""
    plain = 9000 * 2048 + 1024 + (5 << 20)
    plan = PackingPlan(plain, [(0, 9000 * 2048 + 1024, True)], np.zeros(9000, np.int32))
    size = 4 << 20
    ends = [size, size, size, size, 808 * 2048, size, 1024 + (1 << 20)]
    assert [run[2] for run in plan.runs] == ends
    assert [run[0] for run in plan.runs] == [1, 1, 1, 1, 1, 0, 0]
    assert [run[4] for run in plan.runs] == [0, 2048, 4096, 6144, 8192, -1, -1]


def test_a_packed_image_is_stored_as_the_bytes_that_it_is(tmp_path: Path) -> None:
    plain = plain_image([gaussian(3_000_000), torch.randn(70_000)])
    packed = packed_bytes(plain)
    path = tmp_path / "packed"
    path.write_bytes(raw(packed))
    size = packed.numel()
    in_file = FileImage([(SourceFile(str(path)), 0, size, 0)], size)
    in_memory = stored(packed)
    in_memory.lock()
    images: list[Image] = [in_file, in_memory]
    for each in images:
        image = PackedImage(each)
        assert image.stored is each
        assert (image.nbytes, image.plain_bytes) == (size, plain.image.numel())
        assert image.locked == each.locked
        out = torch.zeros(1000, dtype=torch.uint8)
        image.read(77, 1000, out.data_ptr())
        assert torch.equal(out, packed[77:1077])
        whole = torch.zeros_like(plain.image)
        image.unpack(0, whole.numel(), whole.data_ptr())
        assert torch.equal(whole, plain.image)
        image.unpack(5_999_990, 20, out.data_ptr())
        assert torch.equal(out[:20], plain.image[5_999_990:6_000_010])


def test_bytes_that_are_not_there_cannot_be_unpacked() -> None:
    image = PackedImage(stored(packed_bytes(plain_image([gaussian(128)]))))
    out = torch.empty(256, dtype=torch.uint8)
    for offset, nbytes in [(255, 2), (257, 0), (2**64 - 1, 2)]:
        with pytest.raises(UsageError, match=f"{nbytes} bytes at {offset} are not in a plain"):
            image.unpack(offset, nbytes, out.data_ptr())


def test_an_image_that_changes_while_it_is_packed_is_refused() -> None:
    plain = plain_image([gaussian(50_000)])
    packer = Packer(plain.image.data_ptr(), plain.image.numel(), plain.tensors)
    plain.image[40_000:44_000] = 0xFF
    packed = torch.zeros(packer.packed_bytes, dtype=torch.uint8)
    with pytest.raises(UsageError, match="changed while it was packed"):
        packer.write(packed.data_ptr())


@pytest.mark.parametrize(
    ("nbytes", "tensors", "message"),
    [
        (255, [(0, 1, False)], "multiple of 256 bytes, not 255"),
        (256, [], "first byte"),
        (512, [(256, 1, False)], "first byte"),
        (512, [(0, 1, False), (255, 1, False)], "tensor 1 .* 256-byte aligned"),
        (512, [(0, 257, False), (256, 1, False)], "tensor 0 .* reaches into the next"),
        (512, [(0, 1, False), (1024, 0, False)], "tensor 1 .* beyond the image"),
        (768, [(0, 1, False), (512, 1, False), (256, 1, False)], "tensor 1 .* reaches"),
        (512, [(0, 1, False), (256, 257, False)], "tensor 1 .* beyond the image"),
        (256, [(0, 3, True)], "tensor 0 .* half a weight"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(
    nbytes: int, tensors: list[tuple[int, int, bool]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        PackingPlan(nbytes, tensors, np.zeros(0, np.uint16))


@pytest.mark.parametrize(
    ("escapes", "message"),
    [
        (np.zeros(1, np.uint16), "2 tiles are to be packed, and the escapes of 1 are known"),
        (np.zeros(3, np.uint16), "2 tiles are to be packed, and the escapes of 3 are known"),
        (np.array([0, 1025], np.uint16), "at most 1,024 escapes"),
        (np.array([-1, 0], np.int32), "at most 1,024 escapes"),
        (np.zeros(2, np.uint64), "16-bit or 32-bit"),
        (np.zeros((2, 1), np.uint16), "one row"),
    ],
)
def test_escapes_that_make_no_sense_are_refused(escapes: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PackingPlan(5120, [(0, 5000, True)], escapes)
