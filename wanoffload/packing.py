"""Packed images on the host: the encoder of the CPU."""

from __future__ import annotations

import torch

from wanoffload import host_memory
from wanoffload._C import HostImage, HostStore, Packer
from wanoffload.image import ImageLayout


def pack_on_host(layout: ImageLayout, plain: HostImage, store: HostStore) -> HostImage:
    """The packed image of a plain one, in memory of its exact size, by all cores."""
    tensors = [(s.offset, s.nbytes, s.dtype == torch.bfloat16) for s in layout.specs]
    packer = Packer(plain.address, plain.nbytes, tensors)
    host_memory.require(packer.packed_bytes, "a packed image")
    memory = store.allocate(packer.packed_bytes)
    packer.write(memory.address)
    return memory
