"""Packs the units of a model on the device, while it is wrapped.

A unit's plain bytes come into a slot, which nobody uses yet, are packed there into memory of
torch's, and go to the host as they will stay. Meanwhile the next unit's bytes come into the other
slot.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wanoffload import host_memory, image
from wanoffload._C import (
    Backend,
    BackendError,
    HostImage,
    HostMemoryError,
    HostStore,
    Image,
    PackingPlan,
    Uploader,
)
from wanoffload.device_memory import SlotMemory
from wanoffload.host_tiers import CHUNK_BYTES, RING_BYTES
from wanoffload.image import ImageLayout, Lock, leave_unlocked
from wanoffload.packing import Allocate, tensors_of
from wanoffload.units import Unit
from wanoffload.weights import Weights

logger = logging.getLogger(__name__)

BOUNCE_BYTES = 64 << 20
"""Of the page-locked memory through which packed bytes pass that are not page-locked themselves."""
SPARE = 0.02
"""By so much may a unit's packed image be larger than that of an earlier one, of its size."""


@dataclass
class _Coming:
    """A unit whose plain bytes are on their way into a slot. `source`: what is read for that, until
    it is there; None: torch copies them, in the stream's order."""

    window: Tensor
    source: Image | None


class DevicePacking:
    """`wanoffload.packing.Packing`, by the device's kernels. On torch's current stream.

    `todo`: the units that will be packed, in order. `slots`: free until `close`.
    """

    def __init__(
        self,
        weights: Weights,
        todo: Sequence[tuple[Unit, ImageLayout]],
        backend: Backend,
        device: torch.device,
        slots: SlotMemory,
    ) -> None:
        self._weights = weights
        self._todo = todo
        self._device = device
        self._backend = backend
        self._slots = slots
        self._ahead = min(2, slots.count) - 1  # units on their way beside the one that is packed
        self._store = HostStore(backend)
        self._bounce: HostImage | None = None
        self._coming: list[_Coming] = []
        self._begun = 0
        self._uploader: Uploader | None = None
        self._packed = torch.empty(0, dtype=torch.uint8, device=device)

    def pack(self, unit: Unit, layout: ImageLayout, allocate: Allocate, lock: Lock) -> HostImage:
        with self._on_device():
            if not self._coming:
                self._begin(may_copy=True)
            if self._ahead:
                self._begin(may_copy=False)
            plan, packed, sums = self._encode(layout, self._arrived())
            if not self._ahead:
                self._begin(may_copy=False)
            memory = allocate(plan.packed_bytes)
            memory.touch()
            lock(memory, True)
            self._bring_home(packed, memory)
            plan.write_heads(memory.address, [number % (1 << 64) for number in sums.tolist()])
            return memory

    def close(self) -> None:
        if self._uploader is not None:
            self._uploader.close()
        self._coming.clear()
        self._bounce = None
        self._let_go()

    def _on_device(self) -> AbstractContextManager[object]:
        """Kernels are launched on torch's current device."""
        return torch.cuda.device(self._device) if self._on_cuda else nullcontext()

    @property
    def _on_cuda(self) -> bool:
        return self._device.type == "cuda"

    # To the device.

    def _begin(self, may_copy: bool) -> None:
        """Has the next unit's bytes come into a slot. `may_copy`: also if that takes host memory,
        or the stream's time."""
        if self._begun == len(self._todo):
            return
        unit, layout = self._todo[self._begun]
        source = self._weights.source(unit, layout)
        if not isinstance(source, Image) and not may_copy:
            return
        window = self._slots.window(self._begun % (self._ahead + 1), layout.nbytes)
        self._begun += 1
        if source is None:
            source = self._plain_image(unit, layout)
        if isinstance(source, Image):
            self._transfers().start(source, window.data_ptr(), self._stream())
            self._coming.append(_Coming(window, source))
        else:
            window.zero_()
            for spec, tensor in zip(layout.specs, source, strict=True):
                image.device_view(spec, window, 0).copy_(tensor.detach())
            self._coming.append(_Coming(window, None))

    def _plain_image(self, unit: Unit, layout: ImageLayout) -> HostImage:
        host_memory.require(layout.nbytes, f"{unit.name}, while it is packed,")
        plain = self._store.allocate(layout.nbytes)
        self._weights.write(unit, layout, plain, leave_unlocked)
        return plain

    def _arrived(self) -> Tensor:
        """The oldest that is on its way; what is enqueued from here on finds it there."""
        coming = self._coming.pop(0)
        if coming.source is not None:
            self._transfers().wait(self._stream())
        return coming.window

    def _transfers(self) -> Uploader:
        if self._uploader is None:
            chunks = RING_BYTES // CHUNK_BYTES
            self._uploader = Uploader(
                self._backend, ring_chunks=chunks, ring_chunk_bytes=CHUNK_BYTES
            )
        return self._uploader

    def _stream(self) -> int:
        if not self._on_cuda:
            return 0
        return torch.cuda.current_stream(self._device).cuda_stream

    # There, and back.

    def _encode(self, layout: ImageLayout, plain: Tensor) -> tuple[PackingPlan, Tensor, Tensor]:
        """The plan; the packed bytes, zeros for heads, and each run's checksum, on the device."""
        from wanoffload.kernels.pack import tile_escapes, write_sections

        tensors = tensors_of(layout)
        tiles = tile_escapes(plain, tensors)
        escapes: Any = tiles.escapes.cpu().numpy()
        plan = PackingPlan(layout.nbytes, tensors, escapes)
        packed = self._room_for(plan.packed_bytes)
        return plan, packed, write_sections(plain, tiles, plan.runs, packed)

    def _room_for(self, nbytes: int) -> Tensor:
        """On the device, where every unit is packed: with an allocation of each unit's own size,
        the allocator would keep them all."""
        if self._packed.numel() < nbytes:
            self._let_go()
            enough = nbytes + int(nbytes * SPARE)
            self._packed = torch.empty(enough, dtype=torch.uint8, device=self._device)
        return self._packed[:nbytes]

    def _let_go(self) -> None:
        self._packed = torch.empty(0, dtype=torch.uint8, device=self._device)
        if self._on_cuda:
            torch.cuda.empty_cache()  # what was let go belongs to others now

    def _bring_home(self, packed: Tensor, memory: HostImage) -> None:
        """At the link's rate, whether the memory is page-locked or not."""
        if memory.locked or not self._on_cuda:
            _bytes_of(memory).copy_(packed)
        else:
            self._bring_through(self._page_locked(), packed, memory)

    def _bring_through(self, bounce: HostImage, packed: Tensor, memory: HostImage) -> None:
        for start in range(0, memory.nbytes, bounce.nbytes):
            piece = packed[start : start + bounce.nbytes]
            _bytes_of(bounce)[: piece.numel()].copy_(piece)
            memory.fill([(bounce.address, start, piece.numel())])

    def _page_locked(self) -> HostImage:
        """The bounce buffer; where the machine locks no more, it is as slow as other memory."""
        if self._bounce is None:
            self._bounce = self._store.allocate(BOUNCE_BYTES)
            try:
                self._bounce.lock()
            except (BackendError, HostMemoryError):
                logger.debug("packed bytes pass through memory that is not page-locked")
        return self._bounce


def _bytes_of(memory: HostImage) -> Tensor:
    return torch.frombuffer(memoryview(memory), dtype=torch.uint8)
