"""The images of a model's units, brought to where they stand: one after the other, in order."""

from __future__ import annotations

import logging

import torch

from wanoffload import host_memory, image
from wanoffload._C import Backend, HostImage, HostMemoryError, HostStore, Image, PackedImage
from wanoffload.device_memory import SlotMemory
from wanoffload.host_tiers import AUTO, DISK, PINNED, HostChoice, HostPlan, with_sizes
from wanoffload.image import ImageLayout, leave_unlocked
from wanoffload.locking import Locking
from wanoffload.pack_choice import Cached
from wanoffload.packing import HEAD_BYTES, HostPacking, Packing, packed_size
from wanoffload.shared_arena import SharedArena
from wanoffload.sizes import gb
from wanoffload.units import Unit
from wanoffload.weights import Weights

logger = logging.getLogger(__name__)


class Placing:
    """One call of `wrap` or `load`: what stands where the plan says so far.

    `plan`: sizes of packed images are estimates until they are packed, and right once all are.
    """

    def __init__(
        self,
        weights: Weights,
        units: list[Unit],
        layouts: list[ImageLayout],
        plan: HostPlan,
        host: HostChoice,
        backend: Backend,
        store: HostStore,
        arena: SharedArena | None,
    ) -> None:
        self.plan = plan
        self._weights = weights
        self._units = units
        self._layouts = layouts
        self._host = host
        self._backend = backend
        self._store = store
        self._arena = arena
        self._locking = Locking(required=host.kind != AUTO)
        self._packing: Packing | None = None
        self._cached: Cached | None = None
        self._held = 0  # bytes of host memory, of the images that stand by now

    def prepare(self, device: torch.device, slots: SlotMemory) -> None:
        """The weights are prepared. `slots`: the device's, which nobody uses yet."""
        self._cached = self._weights.cached(self._units, self._layouts)
        if self._cached is not None:  # written meanwhile, perhaps
            self.plan = with_sizes(self.plan, self._cached.sizes)
        elif self.plan.packed:
            self._packing = self._make_packing(device, slots)

    def _make_packing(self, device: torch.device, slots: SlotMemory) -> Packing:
        numbers = [n for n in sorted(self.plan.packed) if n not in self.plan.shared]
        if device.type == "cuda":
            from wanoffload.device_packing import DevicePacking

            todo = [(self._units[n], self._layouts[n]) for n in numbers]
            return DevicePacking(self._weights, todo, self._backend, device, slots)
        return HostPacking(self._weights)

    def place(self, number: int) -> Image:
        """A unit's image, in memory or in files."""
        unit, layout = self._units[number], self._layouts[number]
        if self.plan.tiers[number] == DISK:
            return self._weights.in_files(unit, layout)
        if number in self.plan.shared:
            memory = self._shared(number)
        elif number in self.plan.packed and self._packing is not None:
            memory = self._packing.pack(
                unit, layout, lambda nbytes: self._new_memory(number, nbytes), self._lock(number)
            )
        else:
            memory = self._new_memory(number, self.plan.sizes[number])
            self._weights.write(unit, layout, memory, self._lock(number))
        return PackedImage(memory) if number in self.plan.packed else memory

    def check_locks(self) -> None:
        """Raises what has kept an image from being locked by now."""
        self._locking.raise_if_refused(wait=False)

    def finish(self) -> None:
        """All are placed: waits for the locks. Raises what kept an image from being locked."""
        self._locking.raise_if_refused(wait=True)
        self.close()
        self._tell_of_packing()

    def close(self) -> None:
        """Nothing of what the way needs is left, and no transfer reads the weights. Idempotent."""
        self._locking.close()
        if self._packing is not None:
            self._packing.close()
            self._packing = None

    def _lock(self, number: int) -> image.Lock:
        return self._locking.lock if self.plan.tiers[number] == PINNED else leave_unlocked

    def _new_memory(self, number: int, nbytes: int) -> HostImage:
        """Of this process, or in the arena that it fills."""
        self._take(number, nbytes)
        if self._arena is not None and not self._arena.filled:
            return self._arena.image(number, nbytes)
        host_memory.require(nbytes, f"the image of {self._units[number].name}")
        return self._store.allocate(nbytes)

    def _shared(self, number: int) -> HostImage:
        """What another process has filled."""
        assert self._arena is not None
        nbytes = self._layouts[number].nbytes
        if number in self.plan.packed:
            nbytes = packed_size(self._arena.first_bytes(number, HEAD_BYTES))
            self._resize(number, nbytes)
        memory = self._arena.image(number, nbytes)
        self._lock(number)(memory, False)
        return memory

    def _take(self, number: int, nbytes: int) -> None:
        """Raises HostMemoryError if a packed image turns out to be more than the budget has."""
        self._resize(number, nbytes)
        self._held += nbytes
        budget, need = self._host.budget, self._held + self.plan.ring_bytes
        if budget is not None and need > budget:
            raise HostMemoryError(
                f"{self._units[number].name} packs into {nbytes} bytes, more than was expected: "
                f"with it the {self.plan.called} take {gb(need)} of host memory ({need} bytes); "
                f"host_budget is {gb(budget)} ({budget} bytes): raise it"
                + ("" if self._host.kind == AUTO else ", or choose host='auto'")
            )

    def _resize(self, number: int, nbytes: int) -> None:
        sizes = list(self.plan.sizes)
        sizes[number] = nbytes
        self.plan = with_sizes(self.plan, sizes)

    def _tell_of_packing(self) -> None:
        packed = sum(self.plan.sizes[number] for number in self.plan.packed)
        plain = sum(self._layouts[number].nbytes for number in self.plan.packed)
        if plain:
            logger.info("packed: %s of %s (%.4f)", gb(packed), gb(plain), packed / plain)
