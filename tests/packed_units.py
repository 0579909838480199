"""Packed units for tests of the engine: images of known bytes, and a backend that unpacks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wanoffload._C import (
    Backend,
    CudaBackend,
    FileImage,
    HostBackend,
    HostImage,
    HostStore,
    Image,
    PackedImage,
    Packer,
    SourceFile,
    fingerprint,
)

if TYPE_CHECKING:
    from wanoffload.kernels.unpack import UnpackKernel


@cache
def unpack_kernel() -> UnpackKernel:
    """The kernel that unpacks, compiled for the first GPU."""
    from wanoffload.kernels.unpack import compile_unpack

    return compile_unpack(torch.device("cuda", 0))


def unpacking_backend(device: str) -> Backend:
    """A backend of its own for a test, that can unpack."""
    if device != "cuda":
        return HostBackend()
    backend = CudaBackend(0)
    kernel = unpack_kernel()
    backend.load_unpack_kernel(kernel.cubin, kernel.name, kernel.threads, kernel.shared_bytes)
    return backend


@dataclass
class Unit:
    """A unit as the engine has it, where its bytes are stored, and what is to be seen in a slot."""

    image: Image
    plain: torch.Tensor
    stored: Image | None = None

    @property
    def memory(self) -> HostImage:
        assert isinstance(self.stored, HostImage)
        return self.stored


def weights(nbytes: int) -> torch.Tensor:
    """bf16 weights as bytes; a few of them with exponents far from the others'."""
    values = torch.randn(nbytes // 2) * 0.02
    values[::97] *= 1e30
    return values.to(torch.bfloat16).view(torch.uint8)


def packed_bytes(plain: torch.Tensor, tensor_bytes: int) -> torch.Tensor:
    """A plain image of weights, packed as tensors of this size. 64 tensors are a chunk."""
    tensors = [
        (at, min(tensor_bytes, plain.numel() - at), True)
        for at in range(0, plain.numel(), tensor_bytes)
    ]
    packer = Packer(plain.data_ptr(), plain.numel(), tensors)
    packed = torch.empty(packer.packed_bytes, dtype=torch.uint8)
    packer.write(packed.data_ptr())
    return packed


def in_memory(backend: Backend, content: torch.Tensor, lock: bool) -> HostImage:
    image = HostStore(backend).allocate(content.numel())
    image.fill([(content.data_ptr(), 0, content.numel())])
    if lock:
        image.lock()
    return image


def in_a_file(folder: Path, content: torch.Tensor, spoilt: int | None = None) -> FileImage:
    """Written as it is, with its fingerprint; a byte of it is changed then, perhaps."""
    path = folder / f"image-{len(list(folder.iterdir()))}"
    right = fingerprint(content.data_ptr(), content.numel())
    written = bytearray(content.numpy().tobytes())
    if spoilt is not None:
        written[spoilt] ^= 1
    path.write_bytes(written)
    return FileImage(
        [(SourceFile(str(path)), 0, content.numel(), 0)], content.numel(), fingerprint=right
    )


def plain_unit(backend: Backend, nbytes: int, lock: bool = True) -> Unit:
    plain = weights(nbytes)
    image = in_memory(backend, plain, lock)
    return Unit(image, plain, image)


def packed_unit(
    backend: Backend,
    nbytes: int,
    *,
    tensor_bytes: int = 2048,
    lock: bool = True,
    folder: Path | None = None,
) -> Unit:
    """`folder`: where its file is made; without one it stands in memory."""
    plain = weights(nbytes)
    packed = packed_bytes(plain, tensor_bytes)
    stored = in_memory(backend, packed, lock) if folder is None else in_a_file(folder, packed)
    return Unit(PackedImage(stored), plain, stored)
