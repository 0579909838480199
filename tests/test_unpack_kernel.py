"""The kernel that unpacks a chunk: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from tests import plain_packing
from tests.kernel_chunks import DEVICE, ChunkRun, chunk_of, fenced
from tests.test_packing import ALL_PATTERNS, gaussian, packed_bytes, plain_image

pack = pytest.importorskip("wanoffload.kernels.pack")
tile_kernel = pytest.importorskip("wanoffload.kernels.tiles")
unpack = pytest.importorskip("wanoffload.kernels.unpack")

AROUND = 4096
"""Bytes on both sides of what a kernel may touch."""


class Surrounded:
    """Memory on the device with random bytes on both sides."""

    def __init__(self, inner: torch.Tensor) -> None:
        nbytes = inner.numel() + 2 * AROUND
        self.whole = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=DEVICE)
        self.inner = self.whole[AROUND:-AROUND]
        self.inner.copy_(inner)
        self.sides = self._sides()

    def _sides(self) -> torch.Tensor:
        return torch.cat([self.whole[:AROUND], self.whole[-AROUND:]])

    def check(self) -> None:
        assert torch.equal(self._sides(), self.sides), "bytes beside it have changed"


def unpack_chunk(chunk: torch.Tensor, image: torch.Tensor, blocks: int) -> None:
    """Into an image on the device, watching what is touched."""
    held, target = Surrounded(chunk), Surrounded(image)
    with fenced(held.inner, target.inner):
        unpack.unpack_chunk(held.inner, target.inner, blocks)
    held.check()
    target.check()
    image.copy_(target.inner)


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """The plain image, chunk after chunk."""
    tables = plain_packing.read_tables(packed.numpy().tobytes())
    image = torch.full((tables.plain_bytes,), 0x5A, dtype=torch.uint8, device=DEVICE)
    for entry in tables.chunks:
        unpack_chunk(packed[entry.offset : entry.offset + entry.nbytes], image, entry.blocks)
    return image.cpu()


def check_round_trip(tensors: Sequence[torch.Tensor]) -> None:
    plain = plain_image(tensors)
    assert torch.equal(unpacked(packed_bytes(plain)), plain.image)


def coded(weights: torch.Tensor) -> ChunkRun:
    """A coded run of int16[tiles, 1024], however badly it shrinks."""
    _, escapes = tile_kernel.tiles_reference(weights)
    return ChunkRun(1, 2 * weights.numel(), pack.sections_reference(weights), int(escapes.sum()))


def check_coded(weights: torch.Tensor) -> None:
    plain = weights.contiguous().view(-1).view(torch.uint8)
    chunk, blocks = chunk_of([coded(part) for part in weights.to(DEVICE).split(2048)])
    image = torch.full(plain.shape, 0x5A, dtype=torch.uint8, device=DEVICE)
    unpack_chunk(chunk, image, blocks)
    assert torch.equal(image, plain.to(DEVICE))


@pytest.mark.parametrize("weights", [1, 128, 1023, 1024, 1025, 4 * 1024, 5 * 1024, 9 * 1024 + 1])
def test_weights_of_any_number_come_back(weights: int) -> None:
    check_round_trip([gaussian(weights)])


def test_several_runs_of_a_chunk_come_back() -> None:
    check_round_trip(
        [
            torch.randn(3, 5),
            gaussian(3 * 1024 + 77),
            torch.empty(0, dtype=torch.bfloat16),
            torch.randint(-100, 100, (16384 + 777,), dtype=torch.int8),
            gaussian(9 * 1024, 5.0),
            torch.zeros(2048, dtype=torch.bfloat16),
        ]
    )


def test_the_33rd_and_the_64th_run_of_a_chunk_come_back() -> None:
    check_round_trip([torch.full((64,), i, dtype=torch.int32) for i in range(65)])


def test_lanes_with_no_escapes_and_with_32_come_back() -> None:
    tiles = torch.stack([gaussian(1024).view(torch.int16) for _ in range(8)])
    for i in range(4):
        tiles[i, i :: 8 * (i + 1)] = 0x7F80
    tiles[4, 256:512] = 0
    tiles[5] = ALL_PATTERNS[torch.randperm(65_536)[:1024]]
    tiles[6].view(4, 32, 8)[:, 17] = 0
    check_coded(tiles)


def test_bases_at_both_ends_come_back() -> None:
    """Exponents 0 to 6, and 248 to 254 with 255 among the escapes: infinities and NaNs."""
    low, high = torch.randint(0, 7, (1024,)), torch.randint(248, 256, (1024,))
    noise = torch.randint(0, 128, (2, 1024)) | (torch.randint(-1, 1, (2, 1024)) << 15)
    check_coded(((torch.stack([low, high]) << 7) | noise).to(torch.int16))


def test_all_patterns_come_back() -> None:
    check_coded(ALL_PATTERNS[torch.randperm(65_536)].view(64, 1024))


@pytest.mark.gpu
def test_all_patterns_come_back_at_each_place_of_a_tile() -> None:
    tile = torch.arange(65_536, dtype=torch.int32, device=DEVICE)[:, None]
    place = torch.arange(1024, dtype=torch.int32, device=DEVICE)
    for part in (tile + 64 * place).to(torch.int16).split(16_384):
        check_coded(part)


@pytest.mark.gpu
def test_a_pattern_among_gaussian_weights_comes_back_at_each_place_of_a_tile() -> None:
    weights = gaussian(65_536 * 1024).view(65_536, 1024).view(torch.int16)
    for shift in (0, 1):
        tile = torch.arange(65_536)
        weights[tile, (tile + shift * (tile >> 10)) % 1024] = ALL_PATTERNS
    for part in weights.split(16_384):
        check_coded(part)


@pytest.mark.gpu
def test_many_weights_of_mixed_tensors_come_back() -> None:
    weights = torch.randn(5120, 5120) * torch.rand(5120, 1) * 0.1
    check_round_trip([weights.to(torch.bfloat16), torch.randn(1_000_003), gaussian(12_345_678)])


def test_the_reference_reads_what_the_kernel_reads() -> None:
    weights = torch.stack([gaussian(1024).view(torch.int16), ALL_PATTERNS[::64]])
    assert torch.equal(unpack.unpack_reference(pack.sections_reference(weights), 2), weights)


# Chunks that are not what they should be. One has a coded run of three tiles and a plain one.

CODED_BYTES, PLAIN_BYTES = 3 * 2048, 16384 + 512
SMALL_BYTES = 256 + CODED_BYTES + PLAIN_BYTES
FIELDS = {"runs": (0, 4)}
for _name, _at, _size in [
    ("codec", 0, 4),
    ("first_block", 4, 4),
    ("plain_offset", 8, 8),
    ("plain_bytes", 16, 4),
    ("sections", 20, 4),
    ("escapes", 24, 4),
]:
    FIELDS[f"{_name} of run 0"] = (16 + _at, _size)
    FIELDS[f"{_name} of run 1"] = (64 + _at, _size)
FIELDS["table entry 0"] = (112, 4)
FIELDS["table entry 2"] = (120, 4)


@dataclass
class Small:
    chunk: torch.Tensor
    blocks: int
    coded: torch.Tensor
    """What comes out at byte 256 of the image: of the coded run."""
    plain: torch.Tensor
    """And behind it, of the plain one."""


def small() -> Small:
    weights = torch.cat([gaussian(2048).view(torch.int16), ALL_PATTERNS[::64]]).view(3, 1024)
    plain = torch.randint(0, 256, (PLAIN_BYTES,), dtype=torch.uint8)
    chunk, blocks = chunk_of([coded(weights), ChunkRun(0, PLAIN_BYTES, plain)], first_byte=256)
    return Small(chunk, blocks, weights.view(-1).view(torch.uint8), plain)


def after_unpacking(chunk: torch.Tensor, blocks: int, nbytes: int = SMALL_BYTES) -> torch.Tensor:
    """An image that was all 0x5A."""
    image = torch.full((nbytes,), 0x5A, dtype=torch.uint8, device=DEVICE)
    unpack_chunk(chunk, image, blocks)
    return image.cpu()


def with_field(chunk: torch.Tensor, at: int, size: int, value: int) -> torch.Tensor:
    spoilt = chunk.clone()
    field = struct.pack("<Q", value % 2**64)[:size]
    spoilt[at : at + size] = torch.frombuffer(bytearray(field), dtype=torch.uint8).to(DEVICE)
    return spoilt


def field_of(chunk: torch.Tensor, at: int, size: int) -> int:
    return int.from_bytes(bytes(chunk[at : at + size].tolist()), "little")


def test_a_chunk_writes_its_runs_and_nothing_else() -> None:
    given = small()
    image = after_unpacking(given.chunk, given.blocks)
    assert torch.equal(image[256:], torch.cat([given.coded, given.plain]))
    assert (image[:256] == 0x5A).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="the fence is the interpreter's")
def test_the_fence_sees_an_access_beside_the_memory() -> None:
    given, image = small(), torch.zeros(SMALL_BYTES, dtype=torch.uint8)
    chunk = given.chunk
    for held, written in ((chunk[:-512], image), (chunk, image[:-16]), (chunk, image[264:])):
        with pytest.raises(Exception, match="are outside"), fenced(held, written):
            unpack.unpack_chunk(chunk, image, given.blocks)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_any_value_keeps_the_kernel_within_its_memory(name: str) -> None:
    given, (at, size) = small(), FIELDS[name]
    true, top = field_of(given.chunk, at, size), 2 ** (8 * size)
    values = {
        0,
        1,
        7,
        8,
        16,
        63,
        65,
        255,
        256,
        2048,
        4096,
        top // 2,
        top - 1,
        top - 256,
        top - 2048,
    }
    values |= {true + step for step in (-16, 1, 16, 256, 2048, 4096)} | {true << 16}
    tried = sorted(values) if DEVICE == "cuda" else random.Random(at).sample(sorted(values), 6)
    for value in tried:
        after_unpacking(with_field(given.chunk, at, size, value), given.blocks)


def test_flipped_bits_keep_the_kernel_within_its_memory() -> None:
    given, rng = small(), random.Random(3)
    for i in range(12 if DEVICE == "cpu" else 3000):
        spoilt = given.chunk.clone()
        for _ in range(1 + i % 3):
            at = rng.randrange(160) if i % 4 else rng.randrange(spoilt.numel())
            spoilt[at] ^= 1 << rng.randrange(8)
        after_unpacking(spoilt, given.blocks)


def test_random_bytes_keep_the_kernel_within_its_memory() -> None:
    for nbytes in (0, 8, 16, 48, 256, 4096):
        chunk = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=DEVICE)
        after_unpacking(chunk, 3)
        if nbytes >= 16:
            after_unpacking(with_field(chunk, 0, 4, 2), 3)


@pytest.mark.parametrize("cut", [1, 16, 256, 4096, 17_500, "to its header", "to 100 bytes"])
def test_a_cut_chunk_is_not_read_beyond_its_end(cut: int | str) -> None:
    given = small()
    keep = {"to its header": 16, "to 100 bytes": 100}.get(str(cut)) or given.chunk.numel() - int(
        cut
    )
    image = after_unpacking(given.chunk[:keep], given.blocks)
    coded = image[256 : 256 + CODED_BYTES]
    # A run that lies within the chunk comes out nevertheless, one that doesn't is left.
    if keep >= given.chunk.numel() - 4096:
        assert torch.equal(coded, given.coded)
    else:
        assert (coded == 0x5A).all()
    if keep < given.chunk.numel() - 256:
        assert (image[256 + CODED_BYTES :] == 0x5A).all()


@pytest.mark.parametrize("short", [1, 256, 16_384, 18_000, SMALL_BYTES - 256, SMALL_BYTES])
def test_a_short_image_is_not_written_beyond_its_end(short: int) -> None:
    given = small()
    image = after_unpacking(given.chunk, given.blocks, SMALL_BYTES - short)
    assert (image[256 + CODED_BYTES :] == 0x5A).all()
    if short < PLAIN_BYTES:
        assert torch.equal(image[256 : 256 + CODED_BYTES], given.coded)
    else:
        assert (image == 0x5A).all()


def test_a_codec_of_later_versions_writes_nothing() -> None:
    given = small()
    chunk = with_field(with_field(given.chunk, 16, 4, 2), 64, 4, 2**31)
    assert (after_unpacking(chunk, given.blocks) == 0x5A).all()


def test_a_chunk_of_65_runs_writes_nothing() -> None:
    run = ChunkRun(0, 256, torch.zeros(256, dtype=torch.uint8))
    for runs, value in ((64, 0), (65, 0x5A)):
        chunk, blocks = chunk_of([run] * runs)
        assert (after_unpacking(chunk, blocks, 256 * runs) == value).all()


def test_more_blocks_than_a_chunk_has_write_nothing_more() -> None:
    given = small()
    wanted = after_unpacking(given.chunk, given.blocks, SMALL_BYTES + 65_536)
    more = after_unpacking(given.chunk, given.blocks + 3, SMALL_BYTES + 65_536)
    assert torch.equal(more, wanted)


COMPILE = r"""
import re
from wanoffload.kernels import unpack

kernel = unpack.compile_for(90)
assert kernel.cubin.startswith(b"\x7fELF")
ptx = unpack.compiled_for(90).asm["ptx"]
assert f".visible .entry {kernel.name}(" in ptx
assert f".reqntid {kernel.threads}" in ptx
assert len(re.findall(r"\.param \.u64 ", ptx)) == 6, ptx[:2000]
assert (kernel.shared_bytes, "shared" in ptx) == (0, False)
assert ptx.count("st.global.v2.b64") + ptx.count("st.global.v4.b32") == 8 + 8, "not 16 bytes each"
"""


def test_it_compiles_for_a_gpu_that_is_not_there() -> None:
    """With four parameters of ours and the two of Triton; nothing passes through shared memory."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
