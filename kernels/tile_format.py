"""What packing and unpacking kernels share: the layout of a tile of 1,024 weights.

Weight i of a tile belongs to group k, lane l, place j: i = 256 k + 8 l + j. A lane's codes of a
group are G, a nibble each: those of places 0, 2, 4, 6, then of 1, 3, 5, 7. `docs/packing.md`.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP_ORDER = (0, 2, 1, 3, 4, 6, 5, 7)
"""Places of a group's weights, in the order of their signs and mantissas."""
CODE_BITS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Where the code of each place begins in G."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def load_bits(pointers, mask):  # type: ignore[no-untyped-def]
    """Words of memory, int32 or int64, as unsigned ones; 0 where the mask is off."""
    word = tl.load(pointers, mask=mask, other=0)
    return word.to(tl.uint64 if word.dtype == tl.int64 else tl.uint32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def escaped_nibbles(codes):  # type: ignore[no-untyped-def]
    """1 in each nibble that is 7."""
    return codes & (codes >> 1) & (codes >> 2) & 0x11111111


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def sum_nibbles(escaped):  # type: ignore[no-untyped-def]
    """The sum of eight nibbles, at most 8."""
    return ((escaped * 0x11111111) >> 28).to(tl.int32)
