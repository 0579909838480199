"""Looks at the tiles of a plain image: the first of two steps of packing on the device.

Base of a tile: with N(e) weights of exponent e, that b of 0..248 with the largest
N(b) + ... + N(b + 6); of several, the lowest. The other weights escape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_table import columns, most, owner

TILE_BYTES = 2048
BLOCK_BYTES = 16_384

PackedTensor = tuple[int, int, bool]
"""Where a tensor begins in the plain image, its bytes, whether it is bf16."""


@dataclass(frozen=True)
class Tiles:
    """Of each whole tile of all bf16 tensors, in order, on the device."""

    bases: Tensor
    """int32."""
    escapes: Tensor
    """int32."""


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


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator, unused-ignore]
def _tile_kernel(image, table, count, bases, escapes, MOST: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Eight tiles of one tensor. `table`: int64[4, count], a column a tensor: its first block,
    where it begins in the image, its tiles, the tiles of the tensors before it."""
    block = tl.program_id(0)
    column = table + owner(table, count, block, MOST)
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
            image, columns(rows, image.device), len(rows), bases, escapes, MOST=most(len(rows))
        )
    return Tiles(bases, escapes)


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
