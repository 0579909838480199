"""Packed images on the host: what can be packed, what that takes, and the encoder of the CPU.

docs/packing.md is the format.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from wanoffload import host_memory, image
from wanoffload._C import HostBackend, HostImage, HostStore, Image, PackedImage, Packer
from wanoffload.errors import TransferError
from wanoffload.image import ImageLayout, Lock, TensorSpec, leave_unlocked
from wanoffload.units import Unit

if TYPE_CHECKING:
    from wanoffload.weights import Weights

TILE_BYTES = 2048
RUN_BYTES = 4 << 20
ESTIMATED_RATIO = 0.72
"""Of a tensor of bf16, packed, to itself: weights as they are trained, and drawn from a normal
distribution, take 0.70 to 0.71; a few exact zeros, tails and heads a little more."""
_HEAD = struct.Struct("<8sIIQQ")
HEAD_BYTES = _HEAD.size
_A_RUN_AND_ITS_CHUNK = 16 + 48 + 16 + 256  # in the head and in the chunk, with what is rounded up

Allocate = Callable[[int], HostImage]
"""Gives new memory of so many bytes. Raises HostMemoryError."""


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
    """The packed image of a plain one, in memory of its exact size, by all cores.

    Raises HostMemoryError if there is too little.
    """

    def allocate(nbytes: int) -> HostImage:
        host_memory.require(nbytes, "a packed image")
        return store.allocate(nbytes)

    return pack_into(layout, plain, allocate)


def pack_into(layout: ImageLayout, plain: HostImage, allocate: Allocate) -> HostImage:
    """The same, in memory that `allocate` gives: once, when the size is known."""
    packer = Packer(plain.address, plain.nbytes, tensors_of(layout))
    memory = allocate(packer.packed_bytes)
    packer.write(memory.address)
    return memory


def packed_size(head: bytes) -> int:
    """Bytes of the packed image that begins with these HEAD_BYTES."""
    magic, _, _, _, nbytes = _HEAD.unpack(head)
    if magic != b"WOPACKED":
        raise TransferError("these bytes are no packed image")
    return int(nbytes)


def stored_image(stored: Image) -> Image:
    """What an image's bytes stand in: of a packed one, what is below it."""
    return stored.stored if isinstance(stored, PackedImage) else stored


def largest_chunk(stored: Image) -> int:
    """Bytes of the staging memory that an image needs at once; 0: it is not packed."""
    return stored.largest_chunk if isinstance(stored, PackedImage) else 0


class Packing(Protocol):
    """Packs the units of a model, in order. One thread."""

    def pack(self, unit: Unit, layout: ImageLayout, allocate: Allocate, lock: Lock) -> HostImage:
        """The unit's packed image, in memory that `allocate` gives. Calls `lock` on it."""

    def close(self) -> None:
        """Ends what was begun: nothing reads the weights any more. Idempotent."""


class HostPacking:
    """By the CPU's cores, each unit from a plain image that lives as long as that takes."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._store = HostStore(HostBackend())

    def pack(self, unit: Unit, layout: ImageLayout, allocate: Allocate, lock: Lock) -> HostImage:
        memory = pack_into(layout, self._plain(unit, layout), allocate)
        lock(memory, False)
        return memory

    def close(self) -> None:
        """Nothing is held between units."""

    def _plain(self, unit: Unit, layout: ImageLayout) -> HostImage:
        host_memory.require(layout.nbytes, f"{unit.name}, while it is packed,")
        plain = self._store.allocate(layout.nbytes)  # a new one: between its tensors are zeros
        self._weights.write(unit, layout, plain, leave_unlocked)
        return plain


def _is_bf16(spec: TensorSpec) -> bool:
    return spec.dtype == torch.bfloat16
