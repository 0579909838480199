"""Which run or tensor a program's block belongs to: a table on the device, a column for each.

The first row of a table says where each one's blocks begin, in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def owner(firsts, count, block, MOST: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Whose block it is: the last of those that begin at it or before. `firsts` is in order."""
    index = tl.arange(0, MOST)
    first = tl.load(firsts + index, mask=index < count, other=0)
    return tl.sum(((first <= block) & (index < count)).to(tl.int32), axis=0) - 1


def columns(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 on the device: a row of `rows` is a column."""
    return torch.tensor(rows, dtype=torch.int64).t().contiguous().to(device, non_blocking=True)


def most(count: int) -> int:
    """How many columns a kernel looks at: few different numbers, since it is compiled for each."""
    return max(int(triton.next_power_of_2(count)), 32)
