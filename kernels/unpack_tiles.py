"""Unpacks tiles, on the device: the part of `unpack.py` that knows nothing of runs and chunks.

Lane l of a warp has the 32 weights of groups k = 0..3, places j = 0..7: it loads three words of
codes and four times eight bytes of signs and mantissas, each beside its neighbours', and stores
four times 16 bytes. With G the eight codes of a group, a nibble each, and `base` of the tile:

    exponent of a place = base + its nibble of G, if that is below 7
                        = escapes[first + escapes of the lanes before + of the places before]

Both are bytes chosen by nibbles, four places at a time: from the eight bytes base..base + 6 by G,
from the group's next eight escapes by how many of the places before escape.

Shapes are one-dimensional, a lane an element, so that nothing passes through shared memory: of
two-dimensional ones some of Triton's versions lay out each load as they like.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile_format import escaped_nibbles, load_bits, sum_nibbles

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _choose_bytes(low, high, selector):  # type: ignore[no-untyped-def]
    """Four bytes out of the eight of (low, high), by the low four nibbles of `selector`: 0 to 7
    for a byte, 8 more for its sign bit eight times. One instruction; the interpreter has none."""
    if INTERPRETED:
        place = tl.arange(0, 4)[None, :].to(tl.uint32)
        nibble = (selector[:, None] >> (4 * place)) & 15
        both = (low.to(tl.uint64) | (high.to(tl.uint64) << 32))[:, None]
        byte = ((both >> ((nibble & 7) * 8)) & 0xFF).to(tl.uint32)
        byte = tl.where(nibble > 7, (byte >> 7) * 255, byte)
        return tl.sum(byte << (8 * place), axis=1)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [low, high, selector],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _next_escapes(escapes, rank, count):  # type: ignore[no-untyped-def]
    """(low, high): the `count` bytes (at most 8) from `rank` on, out of up to three words."""
    word = escapes.to(tl.pointer_type(tl.int32)) + (rank >> 2)
    end = (rank & 3) + count
    shift = ((rank & 3) * 8).to(tl.uint64)
    first = load_bits(word, count > 0).to(tl.uint64)
    second = load_bits(word + 1, end > 4).to(tl.uint64)
    third = load_bits(word + 2, end > 8).to(tl.uint64)
    low = (first | (second << 32)) >> shift
    high = (second | (third << 32)) >> shift
    return low.to(tl.uint32), high.to(tl.uint32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _pair(even, odd, marks, selector: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two weights: their exponents, chosen from those of even and of odd places, and their signs
    and mantissas, which are where they belong."""
    exponents = _choose_bytes(even, odd, tl.full(even.shape, selector, tl.uint32))
    return (((exponents << 7) & 0x7F807F80) | marks).to(tl.uint64)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _unpack_group(codes, marks, base, escapes, rank, fits):  # type: ignore[no-untyped-def]
    """[..., 2] words of 64 bits: the eight weights of a group. Nibbles of `codes`: the even
    places, then the odd ones. Bytes of `marks`: places 0, 2, 1, 3, 4, 6, 5, 7."""
    escaped = escaped_nibbles(codes)
    low, high = _next_escapes(escapes, rank, tl.where(fits, sum_nibbles(escaped), 0))
    # How many of the places before escape; within a pair of places, the even one is first.
    evens = escaped & 0xFFFF
    pairs_before = ((evens + (escaped >> 16)) * 0x1110) & 0xFFFF
    before = pairs_before * 0x10001 + (evens << 16)
    # A mask of bytes: the sign of byte 1 where a place escapes, else byte 0.
    masks = escaped * 9
    zero = tl.zeros(codes.shape, tl.uint32)
    sign = zero + 0x8000
    # No byte carries into the next: a base is at most 248. The escapes' byte is 0.
    known_low = base * 0x01010101 + 0x03020100
    known_high = base * 0x00010101 + 0x00060504
    even = _choose_bytes(known_low, known_high, codes)
    even |= _choose_bytes(low, high, before) & _choose_bytes(sign, zero, masks)
    odd = _choose_bytes(known_low, known_high, codes >> 16)
    odd |= _choose_bytes(low, high, before >> 16) & _choose_bytes(sign, zero, masks >> 16)
    m0, m1 = marks.to(tl.uint32), (marks >> 32).to(tl.uint32)
    a = _pair(even, odd, ((m0 & 0x00800080) << 8) | (m0 & 0x007F007F), 0x4400)
    b = _pair(even, odd, (m0 & 0x80008000) | ((m0 >> 8) & 0x007F007F), 0x5511)
    c = _pair(even, odd, ((m1 & 0x00800080) << 8) | (m1 & 0x007F007F), 0x6622)
    d = _pair(even, odd, (m1 & 0x80008000) | ((m1 >> 8) & 0x007F007F), 0x7733)
    return tl.join(a | (b << 32), c | (d << 32)).to(tl.int64, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def load_tiles(sections, signs, words, tile, inside):  # type: ignore[no-untyped-def]
    """Of four tiles, from `tile` on: entries of the table, words of codes, signs and mantissas."""
    thread = tl.arange(0, 128)
    row, lane = thread // 32, thread % 32
    entry = sections.to(tl.pointer_type(tl.int32)) + tile + row
    word = (words + 384 * tile).to(tl.pointer_type(tl.int32)) + 96 * row + lane
    mark = (signs + 1024 * tile).to(tl.pointer_type(tl.int64)) + 128 * row + lane
    w0, w1 = load_bits(word, inside), load_bits(word + 32, inside)
    w2, m0 = load_bits(word + 64, inside), load_bits(mark, inside)
    m1, m2 = load_bits(mark + 32, inside), load_bits(mark + 64, inside)
    return load_bits(entry, inside), w0, w1, w2, m0, m1, m2, load_bits(mark + 96, inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def unpack_tiles(entry, w0, w1, w2, m0, m1, m2, m3, escapes, escape_count):  # type: ignore[no-untyped-def]
    """Four tiles: the weights of each lane's four groups."""
    g0, g1, g2 = w0 & 0x77777777, w1 & 0x77777777, w2 & 0x77777777
    g3 = ((w0 >> 3) & 0x11111111) | ((w1 >> 2) & 0x22222222) | ((w2 >> 1) & 0x44444444)
    n0, n1 = sum_nibbles(escaped_nibbles(g0)), sum_nibbles(escaped_nibbles(g1))
    n2, n3 = sum_nibbles(escaped_nibbles(g2)), sum_nibbles(escaped_nibbles(g3))
    count = n0 + n1 + n2 + n3
    upto = tl.reshape(tl.cumsum(tl.reshape(count, (4, 32)), axis=1), (128,))
    end = (entry & 0xFFFFFF).to(tl.int32) + upto
    rank = end - count
    fits = end <= escape_count
    base = entry >> 24
    q0 = _unpack_group(g0, m0, base, escapes, rank, fits)
    q1 = _unpack_group(g1, m1, base, escapes, rank + n0, fits)
    q2 = _unpack_group(g2, m2, base, escapes, rank + n0 + n1, fits)
    return q0, q1, q2, _unpack_group(g3, m3, base, escapes, end - n3, fits)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def store_tiles(image, tile, inside, q0, q1, q2, q3):  # type: ignore[no-untyped-def]
    thread = tl.arange(0, 128)[:, None]
    half = tl.arange(0, 2)[None, :]
    out = (image + 2048 * tile).to(tl.pointer_type(tl.int64))
    out += 256 * (thread // 32) + 2 * (thread % 32) + half
    mask = inside[:, None] & (half >= 0)
    tl.store(out, q0, mask=mask)
    tl.store(out + 64, q1, mask=mask)
    tl.store(out + 128, q2, mask=mask)
    tl.store(out + 192, q3, mask=mask)
