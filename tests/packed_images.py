"""Plain images, packed on the CPU, for whoever tests packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from wanoffload._C import HostBackend, HostImage, HostStore, PackedImage, Packer


@dataclass
class Plain:
    """A plain image of these tensors, and the table that the packer wants."""

    image: torch.Tensor
    tensors: list[tuple[int, int, bool]]


def plain_image(tensors: Sequence[torch.Tensor]) -> Plain:
    """Tensors, of any dtype (int16 stands for bf16), at multiples of 256, zeros between them."""
    table = []
    parts = []
    offset = 0
    for tensor in tensors:
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        bf16 = tensor.dtype in (torch.bfloat16, torch.int16)
        table.append((offset, raw.numel(), bf16))
        parts += [raw, torch.zeros(-raw.numel() % 256, dtype=torch.uint8)]
        offset += -(-raw.numel() // 256) * 256
    image = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
    return Plain(image, table)


def packed_bytes(plain: Plain, threads: int = 2) -> torch.Tensor:
    packer = Packer(plain.image.data_ptr(), plain.image.numel(), plain.tensors, threads)
    packed = torch.full((packer.packed_bytes,), 0xA5, dtype=torch.uint8)
    packer.write(packed.data_ptr())
    return packed


def stored(packed: torch.Tensor) -> HostImage:
    image = HostStore(HostBackend()).allocate(packed.numel())
    image.fill([(packed.data_ptr(), 0, packed.numel())])
    return image


def unpacked(packed: torch.Tensor, threads: int = 2) -> torch.Tensor:
    image = PackedImage(stored(packed))
    out = torch.full((image.plain_bytes,), 0x5A, dtype=torch.uint8)
    image.unpack(0, image.plain_bytes, out.data_ptr(), threads)
    return out


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.numpy().tobytes())


def gaussian(weights: int, scale: float = 0.02) -> torch.Tensor:
    return (torch.randn(weights) * scale).to(torch.bfloat16)
