"""Fingerprint of a run of bytes: does a slot hold what the host's image holds?

Formula, over 32-bit words w[i], all arithmetic modulo 2^32 but the sum, which is modulo 2^64:

    x = w[i] ^ (i * 0x9E3779B1)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x =  x ^ (x >> 16)
    fingerprint = sum of x over all i

Each word is mixed with its place, so words that changed places show; a changed word goes unnoticed
with a chance of 2^-32. The multipliers are those of the `lowbias32` integer hash. Not meant against
an adversary. `csrc/fingerprint.cpp` is the same for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def mix(word, place):  # type: ignore[no-untyped-def]
    """The term of each word, as int64. Words and their places: uint32."""
    x = word ^ (place * 0x9E3779B1)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return (x ^ (x >> 16)).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _fingerprint_kernel(words, sums, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Sums the mixed words of one block. `words`: int32[count]; `sums`: int64[programs]."""
    program = tl.program_id(0)
    place = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    word = tl.load(words + place, mask=inside, other=0).to(tl.uint32, bitcast=True)
    mixed = tl.where(inside, mix(word, place.to(tl.uint32)), 0)
    tl.store(sums + program, tl.sum(mixed, axis=0))


def fingerprint(memory: Tensor) -> int:
    """The fingerprint of a contiguous uint8 tensor on a device, an unsigned 64-bit number.

    `memory`: any number of bytes that is a multiple of 4, starting at a multiple of 4. Runs on the
    current stream and waits for the result. Under TRITON_INTERPRET=1 it takes CPU tensors.
    """
    words = memory.view(torch.int32)
    programs = max(triton.cdiv(words.numel(), BLOCK), 1)
    sums = torch.zeros(programs, dtype=torch.int64, device=memory.device)
    _fingerprint_kernel[(programs,)](words, sums, words.numel(), BLOCK=BLOCK)
    return int(sums.sum().item()) % 2**64


def fingerprint_reference(memory: Tensor) -> int:
    """The formula in torch operations, 64-bit and masked; for tests."""
    mask = 0xFFFFFFFF
    words = memory.view(torch.int32).to(torch.int64) & mask
    place = torch.arange(words.numel(), dtype=torch.int64, device=words.device) & mask
    # Products of two 32-bit numbers overflow int64 harmlessly: the low 32 bits are right.
    x = words ^ ((place * 0x9E3779B1) & mask)
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    x = x ^ (x >> 16)
    return int(x.sum().item()) % 2**64
