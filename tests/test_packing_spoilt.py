"""Packed images that were spoilt: found, named, and never a harm."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.packed_images import gaussian, packed_bytes, plain_image, stored, unpacked
from wanoffload._C import PackedImage, TransferError, unpack_chunk

CHUNK = 256
"""Where the first chunk of a small packed image begins."""


def with_number(packed: torch.Tensor, at: int, value: int) -> torch.Tensor:
    """A copy with another 32-bit number at byte `at`."""
    spoilt = packed.clone()
    number = torch.frombuffer(bytearray(struct.pack("<I", value)), dtype=torch.uint8)
    assert not torch.equal(spoilt[at : at + 4], number)
    spoilt[at : at + 4] = number
    return spoilt


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 0, "no packed image"),
        (8, 2, "version 2"),
        (12, 0, "outside|can't have 200192"),
        (12, 2, "chunk 1 is not whole lines"),
        (12, 20_000, "can't have 20000 chunks"),
        (12, 2**32 - 1, "can't have 4294967295 chunks"),
        (16, 1, "multiple of 256"),
        (16, 256 * 14 - 256, "plain image can't have 3328"),
        (16, 2**24, "plain image can't have 16777216"),
        (20, 2**31, "plain image can't have"),
        (24, 256, "should have 256 bytes"),
        (40, 257, "chunk 0 is not whole lines"),
        (40, 0, "chunk 0 lies outside"),
        (40, 2**32 - 256, "chunk 0 lies outside"),
        (44, 1, "chunk 0 lies outside"),
        (48, 1, "chunk 0 is not whole lines"),
        (48, 0, "chunk 0 is not whole lines"),
        (48, 2**32 - 256, "chunk 0 lies outside"),
        (52, 0, "chunk 0 can't have 0 blocks"),
        (52, 16_385, "chunk 0 can't have 16385 blocks"),
    ],
)
def test_a_spoilt_head_is_refused(at: int, value: int, message: str) -> None:
    packed = packed_bytes(plain_image([gaussian(100_000)]))
    with pytest.raises(TransferError, match=message):
        PackedImage(stored(with_number(packed, at, value)))


@pytest.mark.parametrize("nbytes", [0, 1, 39, 40, 255, 256, 257])
def test_a_cut_image_is_refused(nbytes: int) -> None:
    packed = packed_bytes(plain_image([gaussian(100_000)]))
    with pytest.raises(TransferError, match=r"no packed image|should have"):
        PackedImage(stored(packed[:nbytes]))


RUN = CHUNK + 16
TAIL = RUN + 48
"""Runs of the image below: 4,096 bytes of codes, then a plain tail of 1,280 bytes, then 4,096."""


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (CHUNK, 0, "number of runs is not 1 to 64"),
        (CHUNK, 65, "number of runs is not 1 to 64"),
        (CHUNK + 4, 4, "blocks are miscounted"),
        (CHUNK + 8, 256, "size is not what it should be"),
        (CHUNK + 12, 1, "header is of a later version"),
        (RUN, 2, "codec that is not known"),
        (RUN + 4, 1, "blocks are miscounted"),
        (RUN + 8, 128, "outside of the plain image"),
        (RUN + 8, 2**32 - 256, "outside of the plain image"),
        (RUN + 8, 9216, "outside of the plain image"),
        (RUN + 12, 2**31, "outside of the plain image"),
        (RUN + 8, 256, "runs do not follow each other"),
        (RUN + 16, 0, "impossible size"),
        (RUN + 16, 4096 + 256, "impossible size"),
        (RUN + 16, 2**23, "impossible size"),
        (RUN + 20, 16, "sections lie outside"),
        (RUN + 20, 152, "sections lie outside"),
        (RUN + 20, 6000, "sections lie outside"),
        (RUN + 20, 2**32 - 16, "sections lie outside"),
        (RUN + 24, 2049, "more escapes than weights"),
        (RUN + 24, 2**32 - 1, "more escapes than weights"),
        (RUN + 28, 1, "run of a later version"),
        (RUN + 32, 0, "checksums are not those of the head"),
        (RUN + 36, 1, "checksums are not those of the head"),
        (RUN + 40, 1, "run of a later version"),
        (RUN + 44, 1, "run of a later version"),
        (TAIL + 8, 4096 + 256, "runs do not follow each other"),
        (TAIL + 16, 1280 + 128, "impossible size"),
        (TAIL + 24, 1, "more escapes than weights"),
    ],
)
def test_a_spoilt_table_is_named(at: int, value: int, message: str) -> None:
    tensors = [gaussian(2500), torch.randn(1024)]
    image = PackedImage(stored(with_number(packed_bytes(plain_image(tensors)), at, value)))
    out = torch.empty(1, dtype=torch.uint8)
    with pytest.raises(TransferError, match=message):
        image.unpack(0, 1, out.data_ptr())


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([(CHUNK, 64)], "table is cut off"),
        ([(RUN + 8, 256), (RUN + 16, 256)], "runs do not follow each other"),
        ([(RUN + 16, 256)], "runs do not cover"),
    ],
)
def test_a_chunk_with_an_absurd_table_is_named(
    numbers: list[tuple[int, int]], message: str
) -> None:
    packed = packed_bytes(plain_image([torch.randn(128)]))
    for at, value in numbers:
        packed = with_number(packed, at, value)
    image = PackedImage(stored(packed))
    out = torch.empty(1, dtype=torch.uint8)
    with pytest.raises(TransferError, match=message):
        image.unpack(0, 1, out.data_ptr())


def test_a_spoilt_weight_is_found_and_its_place_is_named() -> None:
    packed = packed_bytes(plain_image([gaussian(3_000_000)]))
    packed[3_000_000] ^= 1
    with pytest.raises(TransferError, match="the plain bytes 4194304 to 5998592 do not come out"):
        unpacked(packed)


SMALL = [gaussian(3000), torch.randn(300), gaussian(1024)]


@given(bit=st.integers(0, 8 * packed_bytes(plain_image(SMALL)).numel() - 1))
@settings(max_examples=2000, deadline=None)
def test_no_flipped_bit_gives_wrong_weights(bit: int) -> None:
    plain = plain_image(SMALL)
    packed = packed_bytes(plain, threads=1)
    packed[bit // 8] ^= 1 << bit % 8
    try:
        assert torch.equal(unpacked(packed, threads=1), plain.image)
    except TransferError:
        return
    chunk = packed[CHUNK:].clone()
    out = torch.zeros_like(plain.image)
    assert unpack_chunk(chunk.data_ptr(), chunk.numel(), out.data_ptr(), out.numel())


def test_a_spoilt_chunk_is_told_and_a_good_one_is_unpacked() -> None:
    plain = plain_image([gaussian(100_000), torch.randn(5)])
    chunk = packed_bytes(plain)[CHUNK:].clone()
    out = torch.full((plain.image.numel() + 1,), 0x5A, dtype=torch.uint8)
    nbytes = plain.image.numel()
    assert unpack_chunk(chunk.data_ptr(), chunk.numel(), out.data_ptr(), nbytes, threads=2)
    assert torch.equal(out[:-1], plain.image)
    assert not unpack_chunk(chunk.data_ptr(), chunk.numel() - 256, out.data_ptr(), nbytes)
    assert not unpack_chunk(chunk.data_ptr(), chunk.numel(), out.data_ptr(), nbytes - 256)
    chunk[50_000] ^= 4
    assert not unpack_chunk(chunk.data_ptr(), chunk.numel(), out.data_ptr(), nbytes)
    assert out[-1] == 0x5A
