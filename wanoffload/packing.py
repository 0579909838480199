"""Packed images on the host: what can be packed, what that takes, and the encoder of the CPU.

docs/packing.md is the format.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from wanoffload import host_memory, image
from wanoffload._C import HostBackend, HostImage, HostStore, Packer
from wanoffload.image import ImageLayout, TensorSpec
from wanoffload.units import Unit

TILE_BYTES = 2048
RUN_BYTES = 4 << 20
ESTIMATED_RATIO = 0.72
"""Of a tensor of bf16, packed, to itself: weights as they are trained, and drawn from a normal
distribution, take 0.70 to 0.71; a few exact zeros, tails and heads a little more."""
_A_RUN_AND_ITS_CHUNK = 16 + 48 + 16 + 256  # in the head and in the chunk, with what is rounded up

Allocate = Callable[[int], HostImage]
"""Gives new memory of so many bytes. Raises HostMemoryError."""
PlainFill = Callable[[Unit, ImageLayout, HostImage], None]
"""Writes the tensors of a unit to their places in a new image."""


def packs(layout: ImageLayout) -> bool:
    """Whether something of an image can be packed: a tensor of bf16 with a whole tile."""
    return any(_is_bf16(spec) and spec.nbytes >= TILE_BYTES for spec in layout.specs)


def tensors_of(layout: ImageLayout) -> list[tuple[int, int, bool]]:
    """(offset, bytes, whether they are bf16) of each tensor, for an encoder."""
    return [(spec.offset, spec.nbytes, _is_bf16(spec)) for spec in layout.specs]


def estimated_bytes(layout: ImageLayout) -> int:
    """About what the packed image takes, where only packing tells."""
    coded = sum(spec.nbytes for spec in layout.specs if _is_bf16(spec))
    return image.aligned(layout.nbytes - coded + int(coded * ESTIMATED_RATIO))


def most_bytes(layout: ImageLayout) -> int:
    """What the packed image takes at most: a tensor that would not shrink stays plain in it."""
    runs = sum(2 + spec.nbytes // RUN_BYTES for spec in layout.specs)
    return image.aligned(layout.nbytes + runs * _A_RUN_AND_ITS_CHUNK + 512)


def pack_on_host(layout: ImageLayout, plain: HostImage, store: HostStore) -> HostImage:
    """The packed image of a plain one, in memory of its exact size, by all cores."""
    return pack_into(layout, plain, store.allocate)


def pack_into(layout: ImageLayout, plain: HostImage, allocate: Allocate) -> HostImage:
    """The same, in memory that `allocate` gives: once, when the size is known."""
    packer = Packer(plain.address, plain.nbytes, tensors_of(layout))
    memory = allocate(packer.packed_bytes)
    packer.write(memory.address)
    return memory


class HostPacking:
    """Packs units one at a time, each from a plain image that lives as long as that takes."""

    def __init__(self, fill: PlainFill) -> None:
        self._fill = fill
        self._store = HostStore(HostBackend())

    def pack(self, unit: Unit, layout: ImageLayout, allocate: Allocate) -> HostImage:
        """The unit's packed image, in memory that `allocate` gives."""
        host_memory.require(layout.nbytes, f"{unit.name}, while it is packed,")
        plain = self._store.allocate(layout.nbytes)  # a new one: between its tensors are zeros
        self._fill(unit, layout, plain)
        return pack_into(layout, plain, allocate)

    def close(self) -> None:
        """Nothing is held between units."""


def _is_bf16(spec: TensorSpec) -> bool:
    return spec.dtype == torch.bfloat16
