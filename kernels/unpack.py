"""Unpacks a chunk of a packed image, on the device, into the plain image: `docs/packing.md`.

One program unpacks one block of a run, 16,384 plain bytes: of a plain run it copies them, of one
with exponent codes it unpacks eight tiles (`unpack_tiles.py` has the formula).

No chunk makes it read beyond `chunk_bytes` or write beyond `image_bytes`: a block whose run does
not lie within both is left alone, and so are escapes that lie outside of their section. Whether
what came out is right, a fingerprint of the image tells.

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

from .tile_format import CODE_BITS, GROUP_ORDER, load_bits
from .unpack_tiles import load_tiles, store_tiles, unpack_tiles

WARPS = 4
"""Each lane has two tiles' work at a time. Eight warps are slower by a twentieth on an H200."""


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
def _unpack_block(sections, image, tile, tiles, escape_count):  # type: ignore[no-untyped-def]
    """Eight tiles of a run, from `tile` on. Its sections lie within the chunk, its plain bytes,
    from `image` on, within the image. Everything is loaded before anything is stored."""
    signs = sections + (tiles + 4) // 4 * 16
    words = signs + 1024 * tiles
    escapes = words + 384 * tiles
    row = tl.arange(0, 128) // 32
    a_inside, b_inside = tile + row < tiles, tile + 4 + row < tiles
    ae, a0, a1, a2, am0, am1, am2, am3 = load_tiles(sections, signs, words, tile, a_inside)
    be, b0, b1, b2, bm0, bm1, bm2, bm3 = load_tiles(sections, signs, words, tile + 4, b_inside)
    q0, q1, q2, q3 = unpack_tiles(ae, a0, a1, a2, am0, am1, am2, am3, escapes, escape_count)
    r0, r1, r2, r3 = unpack_tiles(be, b0, b1, b2, bm0, bm1, bm2, bm3, escapes, escape_count)
    store_tiles(image, tile, a_inside, q0, q1, q2, q3)
    store_tiles(image, tile + 4, b_inside, r0, r1, r2, r3)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _field(pointer, known):  # type: ignore[no-untyped-def]
    """A u32 of a table."""
    return load_bits(pointer, known).to(tl.int64)


@triton.jit(do_not_specialize=["chunk_bytes", "image_bytes"])  # type: ignore[untyped-decorator, unused-ignore]
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
    weights: Tensor = bits16.transpose(1, 2).reshape(tiles, 1024).to(torch.int16)
    return weights
