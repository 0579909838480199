"""For tests of kernels: chunks with any codec, and a fence around the memory of the interpreter."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class ChunkRun:
    """A run of a chunk. `sections` on any device."""

    codec: int
    nbytes: int
    sections: torch.Tensor
    escapes: int = 0


def chunk_of(runs: Sequence[ChunkRun], first_byte: int = 0) -> tuple[torch.Tensor, int]:
    """(chunk, blocks). Its runs follow each other in the plain image, from `first_byte` on."""
    table = b""
    blocks, place, at = 0, first_byte, 16 + 48 * len(runs)
    for run in runs:
        table += struct.pack(
            "<IIQIIIIQQ", run.codec, blocks, place, run.nbytes, at, run.escapes, 0, 0, 0
        )
        blocks += -(-run.nbytes // 16384)
        place += run.nbytes
        at += run.sections.numel()
    padding = -at % 256
    head = struct.pack("<IIII", len(runs), blocks, at + padding, 0) + table
    parts = [torch.frombuffer(bytearray(head), dtype=torch.uint8).to(DEVICE)]
    parts += [run.sections.to(DEVICE) for run in runs]
    parts += [torch.zeros(padding, dtype=torch.uint8, device=DEVICE)]
    return torch.cat(parts), blocks


class Fence:
    """Fails on an access that is not aligned, or not within one of these tensors."""

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self.ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]

    def check(self, pointers: Any, mask: Any) -> None:
        size = np.uint64(max(pointers.get_element_ty().primitive_bitwidth // 8, 1))
        at = pointers.data[mask.data.astype(bool)].astype(np.uint64)
        assert not np.any(at % size), "an access is not aligned"
        inside = np.zeros(at.shape, bool)
        for begin, end in self.ranges:
            inside |= (at >= begin) & (at + size <= end)
        assert inside.all(), f"{(~inside).sum()} accesses of {size} bytes are outside"


@contextmanager
def fenced(*tensors: torch.Tensor) -> Iterator[None]:
    """Inside of it, a kernel in the interpreter may touch these tensors only.

    Kernels on a GPU are not watched here: compute-sanitizer does it.
    """
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    fence = Fence(tensors)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        fence.check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        fence.check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", checked_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", checked_store),
    ):
        yield
