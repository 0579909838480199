"""Unpacks a chunk of a packed image, on the device, into the plain image: `docs/packing.md`.

One program unpacks one block of 16,384 plain bytes: eight tiles of 1,024 weights, a warp each.
Lane l of a warp has the 32 weights of groups k = 0..3, places j = 0..7: it loads three words of
codes and four times eight bytes of signs and mantissas, each beside its neighbours', and stores
four times 16 bytes. With G the eight codes of a group, a nibble each, and `base` of the tile:

    exponent of a place = base + its nibble of G, if that is below 7
                        = escapes[first + escapes of the lanes before + of the places before]

Both are bytes chosen by nibbles, four places at a time: from the eight bytes base..base + 6 by G,
from the group's next eight escapes by how many of the places before escape.

No chunk makes it read beyond `chunk_bytes` or write beyond `image_bytes`: a block whose run does
not lie within both is left alone, and so are escapes that lie outside of their section. Whether
what came out is right, a fingerprint of the image tells.

Shapes are one-dimensional, a lane an element, so that nothing passes through shared memory: of
two-dimensional ones some of Triton's versions lay out each load as they like.
`csrc/unpacker.cpp` is the same on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WARPS = 4
"""Each lane has two tiles' work at a time. Eight warps are slower by a twentieth on an H200."""

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@dataclass(frozen=True)
class UnpackKernel:
    """Machine code of the kernel, for cuLaunchKernel: a program a block, `threads` each.

    Its parameters are the addresses of the chunk and of the image (both multiples of 16), the
    bytes of both (64-bit), and two null pointers: Triton (3.6 to 3.9) appends scratch memory, of
    which none is needed.
    """

    cubin: bytes
    name: str
    threads: int
    shared_bytes: int


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def load_bits(pointers, mask):  # type: ignore[no-untyped-def]
    """Words of memory, int32 or int64, as unsigned ones; 0 where the mask is off."""
    word = tl.load(pointers, mask=mask, other=0)
    return word.to(tl.uint64 if word.dtype == tl.int64 else tl.uint32, bitcast=True)


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
def _runs_begun(words, run, runs, block, chunk_bytes):  # type: ignore[no-untyped-def]
    """How many of these 32 runs begin at the block or before it."""
    first = tl.load(words + 5 + 12 * run, mask=64 + 48 * run <= chunk_bytes, other=0)
    return tl.sum(((first <= block) & (run < runs)).to(tl.int32), axis=0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _find_run(words, block, chunk_bytes):  # type: ignore[no-untyped-def]
    """The run that has the block; negative if the table does not lie within the chunk."""
    runs = tl.load(words, mask=chunk_bytes >= 16, other=0)
    run = tl.arange(0, 32)
    begun = _runs_begun(words, run, runs, block, chunk_bytes)
    begun += _runs_begun(words, run + 32, runs, block, chunk_bytes)
    known = (runs <= 64) & (16 + 48 * runs.to(tl.int64) <= chunk_bytes)
    return tl.where(known, begun, 0) - 1


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _copy_block(source, image, nbytes):  # type: ignore[no-untyped-def]
    """Copies up to 16,384 bytes, a multiple of 256."""
    place = tl.arange(0, 2048)
    inside = place < nbytes // 256 * 32
    word = tl.load(source.to(tl.pointer_type(tl.int64)) + place, mask=inside)
    tl.store(image.to(tl.pointer_type(tl.int64)) + place, word, mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def escaped_nibbles(codes):  # type: ignore[no-untyped-def]
    """1 in each nibble that is 7."""
    return codes & (codes >> 1) & (codes >> 2) & 0x11111111


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def sum_nibbles(escaped):  # type: ignore[no-untyped-def]
    """The sum of eight nibbles, at most 8."""
    return ((escaped * 0x11111111) >> 28).to(tl.int32)


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
def _load_tiles(sections, signs, words, tile, inside):  # type: ignore[no-untyped-def]
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
def _unpack_tiles(entry, w0, w1, w2, m0, m1, m2, m3, escapes, escape_count):  # type: ignore[no-untyped-def]
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
def _store_tiles(image, tile, inside, q0, q1, q2, q3):  # type: ignore[no-untyped-def]
    thread = tl.arange(0, 128)[:, None]
    half = tl.arange(0, 2)[None, :]
    out = (image + 2048 * tile).to(tl.pointer_type(tl.int64))
    out += 256 * (thread // 32) + 2 * (thread % 32) + half
    mask = inside[:, None] & (half >= 0)
    tl.store(out, q0, mask=mask)
    tl.store(out + 64, q1, mask=mask)
    tl.store(out + 128, q2, mask=mask)
    tl.store(out + 192, q3, mask=mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _unpack_block(sections, image, tile, tiles, escape_count):  # type: ignore[no-untyped-def]
    """Eight tiles of a run, from `tile` on. Its sections lie within the chunk, its plain bytes,
    from `image` on, within the image. Everything is loaded before anything is stored."""
    signs = sections + (tiles + 4) // 4 * 16
    words = signs + 1024 * tiles
    escapes = words + 384 * tiles
    row = tl.arange(0, 128) // 32
    a_inside, b_inside = tile + row < tiles, tile + 4 + row < tiles
    ae, a0, a1, a2, am0, am1, am2, am3 = _load_tiles(sections, signs, words, tile, a_inside)
    be, b0, b1, b2, bm0, bm1, bm2, bm3 = _load_tiles(sections, signs, words, tile + 4, b_inside)
    q0, q1, q2, q3 = _unpack_tiles(ae, a0, a1, a2, am0, am1, am2, am3, escapes, escape_count)
    r0, r1, r2, r3 = _unpack_tiles(be, b0, b1, b2, bm0, bm1, bm2, bm3, escapes, escape_count)
    _store_tiles(image, tile, a_inside, q0, q1, q2, q3)
    _store_tiles(image, tile + 4, b_inside, r0, r1, r2, r3)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _field(pointer, known):  # type: ignore[no-untyped-def]
    """A u32 of a table."""
    return load_bits(pointer, known).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def unpack_kernel(chunk, image, chunk_bytes: tl.int64, image_bytes: tl.int64):  # type: ignore[no-untyped-def]
    """Unpacks one block of a chunk. `chunk`, `image`: uint8, at multiples of 16."""
    block = tl.program_id(0)
    words = chunk.to(tl.pointer_type(tl.int32))
    run = _find_run(words, block, chunk_bytes)
    known = run >= 0
    entry = words + 4 + 12 * run
    codec = _field(entry, known)
    offset = (block - _field(entry + 1, known)) * 16384
    plain = tl.load((entry + 2).to(tl.pointer_type(tl.int64)), mask=known, other=-1)
    nbytes = _field(entry + 4, known)
    at = _field(entry + 5, known)
    escapes = _field(entry + 6, known)
    fits = (plain >= 0) & (plain <= image_bytes - nbytes) & (plain % 256 == 0)
    fits = fits & (offset >= 0) & (offset < nbytes) & (at % 16 == 0)
    plain = tl.multiple_of(plain, 256)
    at = tl.multiple_of(at, 16)
    if fits:
        if codec == 0:
            if at + nbytes <= chunk_bytes:
                _copy_block(chunk + at + offset, image + plain + offset, nbytes - offset)
        elif codec == 1:
            tiles = nbytes // 2048
            end = at + (tiles + 4) // 4 * 16 + 1408 * tiles + (escapes + 15) // 16 * 16
            if (end <= chunk_bytes) & (nbytes % 2048 == 0):
                _unpack_block(chunk + at, image + plain, offset // 2048, tiles, escapes)


def unpack_chunk(chunk: Tensor, image: Tensor, blocks: int) -> None:
    """Unpacks a chunk that has this many blocks into its places of a plain image.

    Both are contiguous uint8 tensors of one device, at multiples of 16; runs on the current stream
    and waits for nothing. Under TRITON_INTERPRET=1 it takes CPU tensors.
    """
    unpack_kernel[(blocks,)](chunk, image, chunk.numel(), image.numel(), num_warps=WARPS)


def compiled_for(capability: int) -> Any:
    """Triton's result for a CUDA device of this compute capability (90: 9.0), there or not."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: Triton compiles nothing; unset it")
    source = ASTSource(
        unpack_kernel,
        signature={"chunk": "*u8", "image": "*u8", "chunk_bytes": "i64", "image_bytes": "i64"},
        attrs={(i,): [["tt.divisibility", 16]] for i in (0, 1)},
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": WARPS})


def compile_for(capability: int) -> UnpackKernel:
    """Compiles for any device of this compute capability."""
    compiled = compiled_for(capability)
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise RuntimeError(f"Triton {triton.__version__} wants scratch memory for unpacking")
    return UnpackKernel(compiled.asm["cubin"], metadata.name, 32 * WARPS, metadata.shared)


def compile_unpack(device: torch.device) -> UnpackKernel:
    """Compiles for this CUDA device. Triton keeps what it compiled on disk."""
    major, minor = torch.cuda.get_device_capability(device)
    return compile_for(10 * major + minor)


GROUP_ORDER = (0, 2, 1, 3, 4, 6, 5, 7)
"""Places of a group's weights, in the order of their signs and mantissas."""
CODE_BITS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Where the code of each place begins in G."""


def unpack_reference(sections: Tensor, tiles: int) -> Tensor:
    """int16[tiles, 1024] from the sections of a run, in torch operations; for tests."""
    table_bytes = -(-(4 * tiles + 4) // 16) * 16
    rest = sections.numel() - table_bytes - 1408 * tiles
    _, signs, codes, escapes = sections.split([table_bytes, 1024 * tiles, 384 * tiles, rest])
    base = (sections[: 4 * tiles].view(torch.int32) >> 24 & 0xFF).view(tiles, 1, 1, 1)
    words = codes.view(torch.int32).view(tiles, 3, 32).to(torch.int64)
    last = sum(((words[:, p] >> 3) & 0x11111111) << p for p in range(3))
    groups = torch.stack([*(words & 0x77777777).unbind(1), torch.as_tensor(last)], dim=2)
    bits = torch.tensor(CODE_BITS, device=sections.device)
    code = (groups[..., None] >> bits) & 7  # of tile, lane, group, place: the order of escapes
    exponent = base + code
    exponent[code == 7] = escapes[: int((code == 7).sum())].to(torch.int64)
    marks = signs.view(tiles, 4, 32, 8)[..., list(GROUP_ORDER)].transpose(1, 2).to(torch.int64)
    bits16 = ((marks & 0x80) << 8) | (exponent << 7) | (marks & 0x7F)
    return bits16.transpose(1, 2).reshape(tiles, 1024).to(torch.int16)
