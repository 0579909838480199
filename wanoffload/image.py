"""Images: a unit's tensors as one run of bytes, and views back into it.

An image is laid out once. Its bytes are then the same wherever they stand: in host memory, in the
pinned ring, in a device slot, later in a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from wanoffload._C import (
    FileImage,
    HostBackend,
    HostImage,
    HostStore,
    Image,
    PackedImage,
    fingerprint,
)

ALIGNMENT = 256
"""Bytes between which tensors start: what the strictest kernels (fp8, vectorised loads) ask for."""


Lock = Callable[[HostImage, bool], None]
"""lock(image, now): page-locks an image, or leaves it, as its tier asks. If not `now`, it may be
done beside what comes next."""


def leave_unlocked(image: HostImage, now: bool) -> None:
    """A `Lock` that leaves the image as it is."""


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor stands in an image."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ImageLayout:
    """The table of an image: its tensors in order, none overlapping, and its size in bytes."""

    specs: tuple[TensorSpec, ...]
    nbytes: int


def aligned(nbytes: int) -> int:
    """`nbytes`, rounded up to where the next tensor may start."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def lay_out(tensors: Iterable[tuple[str, Tensor]]) -> ImageLayout:
    """Places named tensors one after the other.

    Strides are kept wherever a tensor fills its memory without gaps (transposed, channels last);
    a tensor with gaps or repeats is stored densely, in the order of its strides.
    """
    specs = []
    offset = 0
    for name, tensor in tensors:
        stride = torch.empty_like(tensor, device="meta").stride()
        spec = TensorSpec(name, tensor.dtype, tensor.shape, stride, offset)
        specs.append(spec)
        offset += aligned(spec.nbytes)
    return ImageLayout(tuple(specs), offset)


def _typed(flat: Tensor, spec: TensorSpec) -> Tensor:
    return flat.view(spec.dtype).as_strided(spec.shape, spec.stride)


def device_view(spec: TensorSpec, memory: Tensor, start: int) -> Tensor:
    """The tensor inside `memory` (uint8, 1-d), where its image begins at byte `start`. No copy."""
    if spec.nbytes == 0:
        return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=memory.device)
    first = start + spec.offset
    return _typed(memory[first : first + spec.nbytes], spec)


class _Bytes:
    """Some of a tensor's bytes on a CUDA device, for `torch.as_tensor`, which keeps it alive."""

    def __init__(self, memory: Tensor, first: int, nbytes: int) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (memory.data_ptr() + first, False),
            "version": 3,
        }


def own_device_view(spec: TensorSpec, memory: Tensor, start: int) -> Tensor:
    """As `device_view`, with a storage of its own, which keeps `memory` alive. No copy.

    It begins `ALIGNMENT` bytes before the tensor, which are there: the compiler treats views at the
    start of a storage apart from others.
    """
    if spec.nbytes == 0:
        return device_view(spec, memory, start)
    first = start + spec.offset - ALIGNMENT
    nbytes = ALIGNMENT + spec.nbytes
    if memory.device.type == "cuda":
        window = torch.as_tensor(_Bytes(memory, first, nbytes), device=memory.device)
    else:
        window = torch.frombuffer(memory.numpy()[first : first + nbytes], dtype=torch.uint8)
    return _typed(window[ALIGNMENT:], spec)


def host_view(spec: TensorSpec, image: Image) -> Tensor:
    """The tensor over the image's host bytes, with a storage of its own. No copy.

    Its own storage, so that saving one tensor saves one tensor. It keeps the image alive. Of an
    image in files the bytes are mapped, and must not be written to.
    """
    if spec.nbytes == 0:
        return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device="cpu")
    if isinstance(image, FileImage):
        window = memoryview(image.view(spec.offset, spec.nbytes))
    else:
        assert isinstance(image, HostImage)
        window = memoryview(image)[spec.offset : spec.offset + spec.nbytes]
    return _typed(torch.frombuffer(window, dtype=torch.uint8), spec)


def placed_like(tensor: Tensor, storage: torch.UntypedStorage) -> Tensor:
    """The tensor that `tensor` is, over another storage in host memory. No copy."""
    placed = torch.empty(0, dtype=tensor.dtype, device="cpu").set_(
        storage, tensor.storage_offset(), tensor.shape, tensor.stride()
    )
    placed = placed.conj() if tensor.is_conj() else placed
    return torch._neg_view(placed) if tensor.is_neg() else placed


def fingerprint_of(image: Image) -> int:
    """The fingerprint of the image's plain bytes on the host. What stands in files is read for it;
    of a packed one it is known."""
    if isinstance(image, PackedImage):
        return image.plain_fingerprint
    if isinstance(image, HostImage):
        return fingerprint(image.address, image.nbytes)
    copy = HostStore(HostBackend()).allocate(image.nbytes)
    copy.copy_from(image)
    return fingerprint(copy.address, copy.nbytes)


def write_image(
    image: HostImage,
    layout: ImageLayout,
    tensors: list[Tensor],
    lock: Lock,
) -> None:
    """Copies the tensors into the image, which they fill as `layout` says, and calls `lock` on it.

    Tensors in host memory are copied by many threads, the first touch of the image's pages.
    Others (on a device, or with gaps) are copied by torch, from a device after locking, at the
    link's rate.
    """
    pieces = []
    others = []
    # Held to the end: resolving may make copies, and pieces are addresses.
    sources = [tensor.detach().resolve_conj().resolve_neg() for tensor in tensors]
    for spec, source in zip(layout.specs, sources, strict=True):
        if source.device.type == "cpu" and source.stride() == spec.stride:
            pieces.append((source.data_ptr(), spec.offset, spec.nbytes))
        else:
            others.append((spec, source))
    image.fill(pieces)
    lock(image, bool(others))
    for spec, source in others:
        host_view(spec, image).copy_(source)
