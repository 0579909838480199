"""Packing on the CPU: every bit comes back, the bytes are those of the format, spoilt ones show."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests import plain_packing
from wanoffload._C import (
    HostBackend,
    HostImage,
    HostStore,
    PackedImage,
    Packer,
    PackingPlan,
    TransferError,
    UsageError,
    fingerprint,
)

TILE = 1024
ALL_PATTERNS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


@dataclass
class Plain:
    """A plain image of these tensors, and the table that the packer wants."""

    image: torch.Tensor
    tensors: list[tuple[int, int, bool]]


def plain_image(tensors: Sequence[torch.Tensor]) -> Plain:
    """Tensors, of any dtype (int16 stands for bf16), at multiples of 256, zeros between them."""
    table = []
    parts = []
    offset = 0
    for tensor in tensors:
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        bf16 = tensor.dtype in (torch.bfloat16, torch.int16)
        table.append((offset, raw.numel(), bf16))
        parts += [raw, torch.zeros(-raw.numel() % 256, dtype=torch.uint8)]
        offset += -(-raw.numel() // 256) * 256
    image = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
    return Plain(image, table)


def packed_bytes(plain: Plain, threads: int = 2) -> torch.Tensor:
    packer = Packer(plain.image.data_ptr(), plain.image.numel(), plain.tensors, threads)
    packed = torch.full((packer.packed_bytes,), 0xA5, dtype=torch.uint8)
    packer.write(packed.data_ptr())
    return packed


def stored(packed: torch.Tensor) -> HostImage:
    image = HostStore(HostBackend()).allocate(packed.numel())
    image.fill([(packed.data_ptr(), 0, packed.numel())])
    return image


def unpacked(packed: torch.Tensor, threads: int = 2) -> torch.Tensor:
    image = PackedImage(stored(packed))
    out = torch.full((image.plain_bytes,), 0x5A, dtype=torch.uint8)
    image.unpack(0, image.plain_bytes, out.data_ptr(), threads)
    return out


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.numpy().tobytes())


def gaussian(weights: int, scale: float = 0.02) -> torch.Tensor:
    return (torch.randn(weights) * scale).to(torch.bfloat16)


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


def test_all_patterns_come_back() -> None:
    plain = plain_image([ALL_PATTERNS[torch.randperm(65_536)]])
    assert torch.equal(unpacked(packed_bytes(plain)), plain.image)


def test_gaussian_weights_take_0705_of_their_bytes() -> None:
    weights = torch.randn(512, 5120) * torch.rand(512, 1) * 0.1
    plain = plain_image([weights.to(torch.bfloat16)])
    packed = packed_bytes(plain)
    assert packed.numel() <= 0.705 * plain.image.numel()
    assert torch.equal(unpacked(packed), plain.image)


def test_the_bytes_of_a_tile_are_those_of_the_format() -> None:
    for weights in [gaussian(TILE), ALL_PATTERNS[torch.randperm(65_536)[:TILE]]]:
        words = weights.view(torch.int16)
        # Beside a tile that shrinks well: a tensor that doesn't would stay plain.
        packed = raw(packed_bytes(plain_image([torch.cat([words, *[words * 0] * 9])])))
        (chunk,) = plain_packing.read_tables(packed).chunks
        (run,) = chunk.runs
        base, signs, codes, escapes = plain_packing.pack_tile(words.numpy().view(np.uint16))
        sections = packed[chunk.offset + run.sections :]
        assert struct.unpack_from("<2I", sections) == (base << 24, len(escapes))
        assert sections[48 : 48 + 1024] == signs
        assert sections[48 + 10 * 1024 :][:384] == codes
        assert sections[48 + 10 * 1408 :][: len(escapes)] == escapes
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


def test_a_tensor_that_hardly_shrinks_stays_plain() -> None:
    patterns = ALL_PATTERNS[torch.randperm(65_536)]
    plain = plain_image([patterns, gaussian(65_536)])
    codecs = [run[0] for run in Packer(plain.image.data_ptr(), *size_and_table(plain)).plan.runs]
    assert codecs == [0, 1]


def size_and_table(plain: Plain) -> tuple[int, list[tuple[int, int, bool]]]:
    return plain.image.numel(), plain.tensors


@pytest.mark.parametrize(("escapes", "codec"), [(4000, 1), (4304, 1), (4305, 0)])
def test_a_tensor_is_packed_up_to_0_9_of_its_bytes(escapes: int, codec: int) -> None:
    """10 tiles: 20,480 bytes, of which 0.9 are 18,432; 48 + 14,080 of them without escapes."""
    table = np.zeros(10, np.uint16)
    table[:5] = np.array([1000, 1000, 1000, 1000, escapes - 4000])
    plan = PackingPlan(20_480, [(0, 20_480, True)], table)
    assert [run[0] for run in plan.runs] == [codec]


def test_a_spoilt_head_is_refused() -> None:
    packed = packed_bytes(plain_image([gaussian(100_000)]))
    for byte, value, message in [
        (0, 0, "no packed image"),
        (8, 2, "version 2"),
        (14, 2, "chunks"),
        (16, 1, "multiple of 256"),
        (18, 9, "plain image can't have"),
        (24, 255, "should have"),
        (40, 1, "256 bytes"),
        (41, 0, "outside"),
        (48, 1, "256 bytes"),
        (51, 9, "outside"),
        (55, 9, "blocks"),
    ]:
        spoilt = packed.clone()
        assert spoilt[byte] != value
        spoilt[byte] = value
        with pytest.raises(TransferError, match=message):
            PackedImage(stored(spoilt))


@pytest.mark.parametrize("nbytes", [0, 1, 39, 40, 255, 256, 257])
def test_a_cut_head_is_refused(nbytes: int) -> None:
    packed = packed_bytes(plain_image([gaussian(100_000)]))
    with pytest.raises(TransferError, match=r"no packed image|should have"):
        PackedImage(stored(packed[:nbytes]))


def test_a_spoilt_weight_is_found_and_its_place_is_named() -> None:
    packed = packed_bytes(plain_image([gaussian(3_000_000)]))
    packed[3_000_000] ^= 1
    with pytest.raises(TransferError, match="the plain bytes 4194304 to 5998592 do not come out"):
        unpacked(packed)


def test_bytes_that_are_not_there_cannot_be_unpacked() -> None:
    image = PackedImage(stored(packed_bytes(plain_image([gaussian(128)]))))
    out = torch.empty(256, dtype=torch.uint8)
    with pytest.raises(UsageError, match="2 bytes at 255 are not in a plain image of 256"):
        image.unpack(255, 2, out.data_ptr())


@pytest.mark.parametrize(
    ("nbytes", "tensors", "message"),
    [
        (255, [(0, 1, False)], "multiple of 256 bytes, not 255"),
        (256, [], "first byte"),
        (512, [(256, 1, False)], "first byte"),
        (512, [(0, 1, False), (255, 1, False)], "tensor 1 .* 256-byte aligned"),
        (512, [(0, 257, False), (256, 1, False)], "tensor 0 .* reaches into the next"),
        (512, [(0, 1, False), (1024, 0, False)], "tensor 0|tensor 1"),
        (512, [(0, 1, False), (256, 257, False)], "tensor 1 .* reaches"),
        (256, [(0, 3, True)], "tensor 0 .* half a weight"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(
    nbytes: int, tensors: list[tuple[int, int, bool]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        PackingPlan(nbytes, tensors, np.zeros(0, np.uint16))
