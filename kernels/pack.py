"""Packs a plain image on the device: `docs/packing.md` is the format, and has the encoder's rules.

In two steps, because sizes follow from how many weights of a tile escape:

    tiles  = tile_escapes(image, tensors)     base and escapes of every tile of 1,024 weights
    plan   = the runs, from tiles.escapes     on the host (`PackingPlan`)
    sums   = write_sections(image, tiles, runs, packed)

Each thread has 32 weights, lane l of a tile those of groups k = 0..3, places j = 0..7, and writes
what the same thread of the decoder reads. A run's checksum is the sum of the terms of
`fingerprint.py` over its words, at their places in the image.

Nothing here waits for the device. `csrc/packer.cpp` gives the same bytes on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_table import columns, most, owner
from .fingerprint import mix
from .tile_format import CODE_BITS, GROUP_ORDER, escaped_nibbles, load_bits, sum_nibbles
from .tiles import BLOCK_BYTES, Tiles, tile_escapes, tiles_reference

__all__ = ["Run", "Tiles", "sections_reference", "tile_escapes", "write_sections"]

Run = tuple[int, int, int, int, int, int]
"""Codec, where it begins in the plain image, bytes of it, where its sections begin in the packed
image, its first tile among all (-1: none), escapes. As `PackingPlan.runs` has them."""


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


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator, unused-ignore]
def _pack_kernel(image, packed, table, count, bases, before, checksums, MOST: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """One block of a run. `table`: int64[6, count], a column a run: its first block, codec, where
    it begins in the image, bytes of it, where its sections begin, its first tile among all."""
    block = tl.program_id(0)
    run = owner(table, count, block, MOST)
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
            columns(rows, image.device),
            len(rows),
            tiles.bases,
            before,
            checksums,
            MOST=most(len(rows)),
            num_warps=8,
        )
    return checksums


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
