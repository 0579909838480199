"""What brings units to the device: a prefetcher, from one pause to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wanoffload._C import Backend, CudaBackend, HostBackend, Image, PackedImage, Prefetcher
from wanoffload.engine_memory import EngineMemory
from wanoffload.host_tiers import CHUNK_BYTES
from wanoffload.residency import Residency

COUNTS = ("acquires", "cold", "fetches", "bytes_fetched", "invalidations", "failures")
"""What a prefetcher counts."""
FIRST_FILL_DEPTH = 2
"""Blocks on their way home ahead of the one that computes, where all stay on the device."""


def backend_for(device: torch.device) -> Backend:
    """The engine's backend for a torch device: CUDA through the driver, or threads of the host."""
    return CudaBackend(device.index) if device.type == "cuda" else HostBackend()


class Engine:
    """One model's prefetchers, one after the other, over the memory that each is given.

    `running`: the prefetcher may be used. Otherwise what changes on the host is noted at the homes
    that were kept, until one is opened over them. `prefetcher`: the last one that was opened.
    """

    def __init__(self, device: torch.device, backend: Backend, memory: EngineMemory) -> None:
        self.device = device
        self.backend = backend
        self.memory = memory
        self.prefetcher: Prefetcher  # made by open()
        self.running = False
        self._closed = True  # which may take longer than that it runs
        self._keeps: list[Tensor] = []
        self._poison: int | None = None
        self._can_unpack = False
        self._counted = dict.fromkeys(COUNTS, 0)  # by the prefetchers that were closed

    # From one pause to the next.

    def take_memory(self, residency: Residency, images: Sequence[Image]) -> None:
        """What it needs for these images, of all units. As `EngineMemory.take`."""
        if _any_packed(images):
            self._prepare_unpacking()  # first: it takes memory, too
        self.memory.take(residency, images)

    def open(self, images: Sequence[Image], order: Sequence[int], ring_chunks: int) -> None:
        """A prefetcher for these units, in this order of use, over the memory that was taken.

        `ring_chunks`: of the pinned ring.
        """
        memory = self.memory
        # The prefetcher keeps this list alive, and so the memory until it has closed.
        self._keeps = memory.tensors()
        self.prefetcher = Prefetcher(
            self.backend,
            memory.slots.addresses(),
            memory.slots.slot_bytes,
            self._keeps,
            depth=self._depth(len(images)),
            ring_chunks=ring_chunks,
            ring_chunk_bytes=CHUNK_BYTES,
            staging=memory.staging.addresses(),
            staging_bytes=memory.staging.slot_bytes,
        )
        self._closed = False
        self.prefetcher.set_poison(self._poison)
        for number, each in enumerate(images):
            self._add_unit(number, each)
        self.prefetcher.set_order(order)
        self.running = True

    def close(self, keep_homes: bool) -> None:
        """Waits for copies and readers, and gives the memory back; `keep_homes`: but for the homes.

        Idempotent. Raises TransferTimeout if a copy stalls, and can then be called again.
        """
        self.running = False
        if not self._closed:
            known = self.prefetcher.unit_count  # not all, if opening it failed
            self.prefetcher.close()
            self._closed = True
            for number, home in self.memory.homes.units.items():
                if number < known:
                    home.filled = not home.stale and self.prefetcher.home_filled(number)
            self._counted = self.counts()
            self.prefetcher.reset_stats()
        self._keeps.clear()
        self.memory.give_back(keep_homes)

    def _prepare_unpacking(self) -> None:
        """Gives the backend its kernel, once."""
        if isinstance(self.backend, CudaBackend) and not self._can_unpack:
            from wanoffload.kernels.unpack import compile_unpack

            kernel = compile_unpack(self.device)
            self.backend.load_unpack_kernel(
                kernel.cubin, kernel.name, kernel.threads, kernel.shared_bytes
            )
        self._can_unpack = True

    def _depth(self, count: int) -> int:
        residency = self.memory.residency
        if not residency.streamed_bytes and not residency.places:
            return min(max(FIRST_FILL_DEPTH, residency.depth), count)
        return min(residency.depth, count)

    def _add_unit(self, number: int, stored: Image) -> None:
        if (home := self.memory.homes.get(number)) is not None:
            self.prefetcher.add_unit(
                stored,
                home=home.place.place(0).ranges(),
                as_stored=home.wanted.as_stored,
                filled=home.filled,
            )
            home.stale = False
        elif number in self.memory.residency.places:
            place = self.memory.place_in_ring(number)
            self.prefetcher.add_unit(stored, home=place.ranges())
        else:
            self.prefetcher.add_unit(stored)

    # What changes on the host.

    def invalidate(self, unit: int) -> None:
        """The unit's bytes are about to change: no copy reads them from here on, and none counts
        that did."""
        if self.running:
            self.prefetcher.invalidate(unit)
        else:
            self.memory.homes.spoil(unit)

    def replace(self, unit: int, new: Image) -> None:
        """Another image stands in the place of the unit's from here on. It fits the memory."""
        if self.running:
            self.prefetcher.replace_unit(unit, new)
        else:
            self.memory.homes.spoil(unit)

    # Looking.

    def set_poison(self, value: int | None) -> None:
        """Overwrites each slot with this byte before a fill, from here on. None: it does not."""
        self._poison = value
        self.prefetcher.set_poison(value)

    def counts(self) -> dict[str, int]:
        """By all prefetchers together, since the first or the last `reset_counts`."""
        now = self.prefetcher.stats()
        return {name: before + getattr(now, name) for name, before in self._counted.items()}

    def reset_counts(self) -> None:
        self._counted = dict.fromkeys(COUNTS, 0)
        self.prefetcher.reset_stats()


def _any_packed(images: Sequence[Image]) -> bool:
    return any(isinstance(each, PackedImage) for each in images)
