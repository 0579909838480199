"""Packs a plain image on the device: `docs/packing.md` is the format, and has the encoder's rules.

In two steps, because sizes follow from how many weights of a tile escape:

    tiles  = tile_escapes(image, tensors)     base and escapes of every tile of 1,024 weights
    plan   = the runs, from tiles.escapes     on the host (`PackingPlan`)
    sums   = write_sections(image, tiles, runs, packed)

Base of a tile: with N(e) weights of exponent e, that b of 0..248 with the largest
N(b) + ... + N(b + 6); of several, the lowest. The others escape.

Sections of a run: each thread has 32 weights, lane l of a tile those of groups k = 0..3, places
j = 0..7, and writes what the same thread of the decoder reads. A run's checksum is the sum of the
terms of `fingerprint.py` over its words, at their places in the image.

Nothing here waits for the device. `csrc/packer.cpp` gives the same bytes on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fingerprint import mix
from .unpack import CODE_BITS, GROUP_ORDER, escaped_nibbles, load_bits, sum_nibbles

TILE_BYTES = 2048
BLOCK_BYTES = 16_384

PackedTensor = tuple[int, int, bool]
"""Where a tensor begins in the plain image, its bytes, whether it is bf16."""
Run = tuple[int, int, int, int, int, int]
"""Codec, where it begins in the plain image, bytes of it, where its sections begin in the packed
image, its first tile among all (-1: none), escapes. As `PackingPlan.runs` has them."""


@dataclass(frozen=True)
class Tiles:
    """Of each whole tile of all bf16 tensors, in order, on the device."""

    bases: Tensor
    """int32."""
    escapes: Tensor
    """int32."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _owner(firsts, count, block, MOST: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Whose block it is: the last of those that begin at it or before. `firsts` is in order."""
    index = tl.arange(0, MOST)
    first = tl.load(firsts + index, mask=index < count, other=0)
    return tl.sum(((first <= block) & (index < count)).to(tl.int32), axis=0) - 1


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _best_base(exponents):  # type: ignore[no-untyped-def]
    """(base, escapes) of a tile. `exponents`: int32[1024]."""
    base = tl.arange(0, 256)
    upto = tl.cumsum(tl.histogram(exponents, 256), axis=0)
    last = tl.gather(upto, tl.minimum(base + 6, 255), axis=0)
    before = tl.where(base > 0, tl.gather(upto, tl.maximum(base - 1, 0), axis=0), 0)
    # The base is in the key upside down: the lowest of several wins.
    key = tl.max(tl.where(base <= 248, (last - before) * 256 + 255 - base, 0), axis=0)
    return 255 - key % 256, 1024 - key // 256


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _tile_kernel(image, table, count, bases, escapes, MOST: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Eight tiles of one tensor. `table`: int64[4, count], a column a tensor: its first block,
    where it begins in the image, its tiles, the tiles of the tensors before it."""
    block = tl.program_id(0)
    column = table + _owner(table, count, block, MOST)
    first = (block - tl.load(column)) * 8
    offset = tl.multiple_of(tl.load(column + count), 256)
    words = (image + offset).to(tl.pointer_type(tl.int16))
    tiles = tl.load(column + 2 * count)
    number = tl.load(column + 3 * count)
    for tile in range(8):
        if first + tile < tiles:
            place = (first + tile) * 1024 + tl.arange(0, 1024)
            weights = tl.load(words + place).to(tl.int32)
            base, escaped = _best_base((weights >> 7) & 0xFF)
            tl.store(bases + number + first + tile, base)
            tl.store(escapes + number + first + tile, escaped)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _mixed(word, place):  # type: ignore[no-untyped-def]
    """Terms of the fingerprint of words of 64 bits, at their places among such words."""
    low = mix(word.to(tl.uint32), (2 * place).to(tl.uint32))
    return low + mix((word >> 32).to(tl.uint32), (2 * place + 1).to(tl.uint32))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _copy_block(source, sections, nbytes, place):  # type: ignore[no-untyped-def]
    """Copies up to 16,384 bytes, a multiple of 256, from `place` on (in words of 64 bits) of the
    image; their part of the checksum."""
    word = tl.arange(0, 2048)
    inside = word < nbytes // 8
    bits = load_bits(source.to(tl.pointer_type(tl.int64)) + word, inside)
    out = sections.to(tl.pointer_type(tl.int64)) + word
    tl.store(out, bits.to(tl.int64, bitcast=True), mask=inside)
    return tl.sum(tl.where(inside, _mixed(bits, place + word), 0), axis=0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _codes(pair, base):  # type: ignore[no-untyped-def]
    """Codes of two weights, in the low bits of both halves."""
    low = tl.minimum(((pair >> 7) & 0xFF) - base, 7)
    return low | (tl.minimum(((pair >> 23) & 0xFF) - base, 7) << 16)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _marks(pair):  # type: ignore[no-untyped-def]
    """Sign and mantissa of two weights, in the low bytes of both halves."""
    return ((pair >> 8) & 0x00800080) | (pair & 0x007F007F)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store_escapes(out, rank, pair, escaped, i: tl.constexpr):  # type: ignore[no-untyped-def]
    """Exponents of places 2i and 2i + 1, where they escape; the rank of the next."""
    even = ((escaped >> (4 * i)) & 1).to(tl.int32)
    odd = ((escaped >> (4 * i + 16)) & 1).to(tl.int32)
    tl.store(out + rank, ((pair >> 7) & 0xFF).to(tl.uint8), mask=even == 1)
    tl.store(out + rank + even, ((pair >> 23) & 0xFF).to(tl.uint8), mask=odd == 1)
    return rank + even + odd


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _pack_group(low, high, base):  # type: ignore[no-untyped-def]
    """(codes, signs and mantissas) of a group's eight weights."""
    a, b = low.to(tl.uint32), (low >> 32).to(tl.uint32)
    c, d = high.to(tl.uint32), (high >> 32).to(tl.uint32)
    codes = _codes(a, base) | (_codes(b, base) << 4)
    codes |= (_codes(c, base) << 8) | (_codes(d, base) << 12)
    first = (_marks(a) | (_marks(b) << 8)).to(tl.uint64)
    second = (_marks(c) | (_marks(d) << 8)).to(tl.uint64)
    return codes, (first | (second << 32)).to(tl.int64, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store_group_escapes(out, rank, low, high, codes):  # type: ignore[no-untyped-def]
    escaped = escaped_nibbles(codes)
    rank = _store_escapes(out, rank, low.to(tl.uint32), escaped, 0)
    rank = _store_escapes(out, rank, (low >> 32).to(tl.uint32), escaped, 1)
    rank = _store_escapes(out, rank, high.to(tl.uint32), escaped, 2)
    return _store_escapes(out, rank, (high >> 32).to(tl.uint32), escaped, 3)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _pack_block(source, sections, tile, tiles, bases, before, place):  # type: ignore[no-untyped-def]
    """Eight tiles of a run, from `tile` on; their part of the checksum. `bases`, `before`: of the
    run's tiles. `source`: of the run's first tile, `place` of 64-bit words into the image."""
    thread = tl.arange(0, 256)
    row, lane = (tile + thread // 32).to(tl.int64), thread % 32
    inside = row < tiles
    base = load_bits(bases + row, inside)
    first = tl.load(before + row, mask=inside, other=0) - tl.load(before)
    at = 256 * row + 2 * lane
    word = source.to(tl.pointer_type(tl.int64)) + at
    l0, h0 = load_bits(word, inside), load_bits(word + 1, inside)
    l1, h1 = load_bits(word + 64, inside), load_bits(word + 65, inside)
    l2, h2 = load_bits(word + 128, inside), load_bits(word + 129, inside)
    l3, h3 = load_bits(word + 192, inside), load_bits(word + 193, inside)
    g0, m0 = _pack_group(l0, h0, base)
    g1, m1 = _pack_group(l1, h1, base)
    g2, m2 = _pack_group(l2, h2, base)
    g3, m3 = _pack_group(l3, h3, base)

    signs = sections + (tiles + 4) // 4 * 16
    mark = signs.to(tl.pointer_type(tl.int64)) + 128 * row + lane
    tl.store(mark, m0, mask=inside)
    tl.store(mark + 32, m1, mask=inside)
    tl.store(mark + 64, m2, mask=inside)
    tl.store(mark + 96, m3, mask=inside)
    code = (signs + 1024 * tiles).to(tl.pointer_type(tl.uint32)) + 96 * row + lane
    tl.store(code, g0 | ((g3 & 0x11111111) << 3), mask=inside)
    tl.store(code + 32, g1 | (((g3 >> 1) & 0x11111111) << 3), mask=inside)
    tl.store(code + 64, g2 | (((g3 >> 2) & 0x11111111) << 3), mask=inside)

    count = sum_nibbles(escaped_nibbles(g0)) + sum_nibbles(escaped_nibbles(g1))
    count += sum_nibbles(escaped_nibbles(g2)) + sum_nibbles(escaped_nibbles(g3))
    count = tl.where(inside, count, 0)
    upto = tl.reshape(tl.cumsum(tl.reshape(count, (8, 32)), axis=1), (256,))
    entry = sections.to(tl.pointer_type(tl.uint32)) + row
    tl.store(entry, first.to(tl.uint32) | (base << 24), mask=inside & (lane == 0))
    end = first + upto
    tl.store(entry + 1, end.to(tl.uint32), mask=(row == tiles - 1) & (lane == 31))
    escapes = signs + 1408 * tiles
    g0, g1 = tl.where(inside, g0, 0), tl.where(inside, g1, 0)
    g2, g3 = tl.where(inside, g2, 0), tl.where(inside, g3, 0)
    rank = _store_group_escapes(escapes, end - count, l0, h0, g0)
    rank = _store_group_escapes(escapes, rank, l1, h1, g1)
    rank = _store_group_escapes(escapes, rank, l2, h2, g2)
    _store_group_escapes(escapes, rank, l3, h3, g3)

    at += place
    mixed = _mixed(l0, at) + _mixed(h0, at + 1) + _mixed(l1, at + 64) + _mixed(h1, at + 65)
    mixed += _mixed(l2, at + 128) + _mixed(h2, at + 129)
    mixed += _mixed(l3, at + 192) + _mixed(h3, at + 193)
    return tl.sum(tl.where(inside, mixed, 0), axis=0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _pack_kernel(image, packed, table, count, bases, before, checksums, MOST: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """One block of a run. `table`: int64[6, count], a column a run: its first block, codec, where
    it begins in the image, bytes of it, where its sections begin, its first tile among all."""
    block = tl.program_id(0)
    run = _owner(table, count, block, MOST)
    column = table + run
    offset = (block - tl.load(column)) * 16384
    codec = tl.load(column + count)
    plain = tl.load(column + 2 * count)
    nbytes = tl.load(column + 3 * count)
    sections = packed + tl.load(column + 4 * count)
    source = image + plain
    if codec == 0:
        left = tl.minimum(nbytes - offset, 16384)
        part = _copy_block(source + offset, sections + offset, left, (plain + offset) // 8)
        tl.atomic_add(checksums + run, part, sem="relaxed")
    else:
        tile = tl.load(column + 5 * count)
        part = _pack_block(
            source,
            sections,
            offset // 2048,
            nbytes // 2048,
            bases + tile,
            before + tile,
            plain // 8,
        )
        tl.atomic_add(checksums + run, part, sem="relaxed")


def _columns(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """A table of the kernels: a row of `rows` is a column on the device."""
    return torch.tensor(rows, dtype=torch.int64).t().contiguous().to(device, non_blocking=True)


def _most(count: int) -> int:
    return max(triton.next_power_of_2(count), 32)


def tile_escapes(image: Tensor, tensors: Sequence[PackedTensor]) -> Tiles:
    """Looks at the tiles of a plain image: a contiguous uint8 tensor, at a multiple of 16.

    Runs on the current stream. Under TRITON_INTERPRET=1 it takes CPU tensors.
    """
    rows = []
    blocks = tiles = 0
    for offset, nbytes, bf16 in tensors:
        own = nbytes // TILE_BYTES if bf16 else 0
        if own:
            rows.append((blocks, offset, own, tiles))
        blocks += triton.cdiv(own * TILE_BYTES, BLOCK_BYTES)
        tiles += own
    bases = torch.empty(tiles, dtype=torch.int32, device=image.device)
    escapes = torch.empty_like(bases)
    if rows:
        _tile_kernel[(blocks,)](
            image, _columns(rows, image.device), len(rows), bases, escapes, MOST=_most(len(rows))
        )
    return Tiles(bases, escapes)


def write_sections(image: Tensor, tiles: Tiles, runs: Sequence[Run], packed: Tensor) -> Tensor:
    """Writes the sections of all runs, and zeros everywhere else: heads and tables are the plan's.

    `image`, `packed`: contiguous uint8 tensors, at multiples of 16, of the plan's sizes. Returns
    the runs' checksums (int64, on the device). Runs on the current stream.
    """
    rows = []
    blocks = 0
    for codec, offset, nbytes, sections, tile, _ in runs:
        rows.append((blocks, codec, offset, nbytes, sections, tile))
        blocks += triton.cdiv(nbytes, BLOCK_BYTES)
    packed.zero_()
    checksums = torch.zeros(len(rows), dtype=torch.int64, device=image.device)
    if rows:
        before = tiles.escapes.cumsum(0, dtype=torch.int64) - tiles.escapes
        _pack_kernel[(blocks,)](
            image,
            packed,
            _columns(rows, image.device),
            len(rows),
            tiles.bases,
            before,
            checksums,
            MOST=_most(len(rows)),
            num_warps=8,
        )
    return checksums


def tiles_reference(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(bases, escapes) of int16[tiles, 1024], in torch operations; for tests."""
    exponents = (weights >> 7 & 0xFF).to(torch.int64)
    counts = torch.zeros(weights.shape[0], 257, dtype=torch.int64, device=weights.device)
    counts[:, 1:].scatter_add_(1, exponents, torch.ones_like(exponents))
    upto = counts.cumsum(1)
    inside = upto[:, 7:256] - upto[:, :249]
    most = inside.amax(1)
    # Which of several largest ones argmax takes is not promised.
    bases = torch.arange(249, device=weights.device).where(inside == most[:, None], 249).amin(1)
    return bases, 1024 - most


def sections_reference(weights: Tensor) -> Tensor:
    """uint8: the sections of a run of int16[tiles, 1024], in torch operations; for tests."""
    tiles, device = weights.shape[0], weights.device
    bases, counts = tiles_reference(weights)
    exponents = (weights >> 7 & 0xFF).to(torch.int64)
    codes = exponents - bases[:, None]
    codes = codes.where((codes >= 0) & (codes < 7), 7).view(tiles, 4, 32, 8)
    groups = (codes << torch.tensor(CODE_BITS, device=device)).sum(3)
    words = torch.stack(
        [groups[:, p] | (((groups[:, 3] >> p) & 0x11111111) << 3) for p in range(3)], dim=1
    )
    table = torch.zeros(-(-(tiles + 1) // 4) * 4, dtype=torch.int64, device=device)
    table[1 : tiles + 1] = counts.cumsum(0)
    table[:tiles] |= bases << 24
    marks = ((weights >> 8) & 0x80 | weights & 0x7F).view(tiles, 4, 32, 8)[..., list(GROUP_ORDER)]
    escaped = (codes == 7).transpose(1, 2)
    escapes = exponents.view(tiles, 4, 32, 8).transpose(1, 2)[escaped]
    padding = torch.zeros(-escapes.numel() % 16, dtype=torch.uint8, device=device)
    parts = [
        _u32_bytes(table),
        marks.to(torch.uint8).flatten(),
        _u32_bytes(words),
        escapes.to(torch.uint8),
        padding,
    ]
    return torch.cat(parts)


def _u32_bytes(values: Tensor) -> Tensor:
    """int64 of 0 to 2^32 - 1 as bytes of 32-bit words."""
    return values.flatten().view(torch.int32)[::2].contiguous().view(torch.uint8)
