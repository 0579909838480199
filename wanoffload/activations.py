"""What activations leave of the device: the ceiling of `vram_budget="auto"`, forward by forward.

What a forward of some shapes takes besides weights is seen in its first run: by how much torch's
allocator has grown then. It is seen as *reserved*, so fragments count. That run finds no more
blocks on the device than it must, unless one of larger inputs has been seen.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from wanoffload.budget import free_bytes

RESERVE_BYTES = 512 << 20
"""Left free for libraries and others."""
MARGIN = 0.02
"""Of what a forward was seen to take, for fragments that fall otherwise."""


class DeviceMemory(Protocol):
    """The device as torch's allocator has it."""

    def free(self) -> int:
        """Bytes that could be allocated: free, or kept for later by the allocator."""

    def reserved(self) -> int:
        """Bytes that the allocator holds."""

    def allocated(self) -> int:
        """Bytes of these that tensors have."""

    def tidy(self) -> None:
        """What the allocator keeps for later goes back to the device."""


class TorchMemory:
    """`DeviceMemory` of a torch device. On the CPU nothing counts as taken."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"

    def free(self) -> int:
        return free_bytes(self._device)

    def reserved(self) -> int:
        return torch.cuda.memory_reserved(self._device) if self._cuda else 0

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._cuda else 0

    def tidy(self) -> None:
        if self._cuda:
            torch.cuda.empty_cache()


class Activations:
    """What forwards take, by the shapes of their inputs. One thread at a time.

    A forward calls `room`, then `begin` once the weights are as they will be, then `end`.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._takes: dict[Hashable, int] = {}
        self._sizes: dict[Hashable, list[int]] = {}
        self._key: Hashable = None
        self._again = False  # the forward before had the same shapes
        self._began_with = 0
        self._ran_out = 0  # bytes that turned out to be missing

    def room(self, args: Any, held: int) -> int | None:
        """Bytes that weights may take in the forward of these inputs. None: nothing is known of it.

        `held`: what they take now.
        """
        key, sizes = shapes(args)
        self._again = key == self._key
        self._key = key
        self._sizes[key] = sizes
        if key not in self._takes:
            self._memory.tidy()  # so that what is reserved behind it is this forward's
        takes = self._expected(key)
        if takes is None:
            return None
        left = self._memory.free() + held - round(takes * (1 + MARGIN))
        return max(0, left - RESERVE_BYTES - self._ran_out)

    @property
    def again(self) -> bool:
        """Whether the forward before had the same shapes: only then is it worth to bring more."""
        return self._again

    def tidy(self) -> None:
        """What weights gave back is there for others."""
        self._memory.tidy()

    def begin(self) -> None:
        """The weights are there."""
        self._began_with = self._memory.allocated()

    def end(self, completed: bool) -> None:
        """The forward is over."""
        if completed and self._key not in self._takes:
            self._takes[self._key] = max(0, self._memory.reserved() - self._began_with)

    def ran_out(self, nbytes: int) -> None:
        """There was too little memory in the middle of a forward: from here on so much more is left
        free, and these shapes are looked at again."""
        self._ran_out += nbytes
        self._takes.pop(self._key, None)

    def _expected(self, key: Hashable) -> int | None:
        """What it took; else what one took whose inputs were at least as large, each of them."""
        if key in self._takes:
            return self._takes[key]
        larger = [
            takes
            for known, takes in self._takes.items()
            if _at_least(self._sizes[known], self._sizes[key])
        ]
        return min(larger, default=None)


def shapes(args: Any) -> tuple[Hashable, list[int]]:
    """What tells forwards apart, and the elements of each input."""
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    key = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
    return key, [tensor.numel() for tensor in tensors]


def _at_least(sizes: list[int], others: list[int]) -> bool:
    """Whether each is as large as its counterpart. A prompt can be larger than all latents are: the
    largest input alone tells nothing."""
    return len(sizes) == len(others) and all(a >= b for a, b in zip(sizes, others, strict=True))
