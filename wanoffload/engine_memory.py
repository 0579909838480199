"""All that one model's engine has of the device: what of it there is, and where a unit stands."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from wanoffload import image
from wanoffload._C import Image, PackedImage, fingerprint
from wanoffload.device_memory import Homes, Place, SlotMemory, Wanted, no_memory
from wanoffload.host_tensor import ordinary_tensors
from wanoffload.packing import largest_chunk
from wanoffload.residency import Residency, allocated

logger = logging.getLogger(__name__)


class EngineMemory:
    """Slots or a ring, staging memory, and homes, as a residency says.

    `residency`: what it is for; from the first `take` on. `images`, here: those of all units, in
    the order of their numbers. Nothing is taken or given back while an engine is open over it.
    """

    def __init__(self, device: torch.device, slots: SlotMemory) -> None:
        self.slots = slots
        self.ring = no_memory()
        self.staging = no_memory()
        self.homes = Homes(device)
        self.residency: Residency
        self._device = device

    def take(self, residency: Residency, images: Sequence[Image]) -> None:
        """What this residency needs; what is there stays, what is not needed is given back.

        Raises torch.OutOfMemoryError. What was taken until then is kept.
        """
        if self.keep_for(residency, images):  # a ceiling is one for what the allocator holds, too
            give_back_cached(self._device)
        with ordinary_tensors():
            self._make_slots(residency.slots, residency.slot_bytes)
            self._make_ring(residency.ring_bytes)
            self._make_staging(residency, images)
            self.homes.make(_homes_of(residency, images))
        logger.debug("%s", residency.sentence)

    def keep_for(self, residency: Residency, images: Sequence[Image]) -> bool:
        """It is for this residency from here on: gives homes back that are none in it. Whether
        there were some."""
        self.residency = residency
        return self.homes.keep_only(_homes_of(residency, images))

    def give_back(self, keep_homes: bool) -> None:
        """Slots, ring and staging memory; and the homes, unless they are to be kept."""
        self.slots = self.ring = self.staging = no_memory()
        if not keep_homes:
            self.homes.keep_only({})

    def _make_slots(self, count: int, slot_bytes: int) -> None:
        if (self.slots.count, self.slots.slot_bytes) != (count, slot_bytes):
            self.slots = no_memory()
            self.slots = SlotMemory(count, slot_bytes, self._device)

    def _make_ring(self, nbytes: int) -> None:
        if self.ring.slot_bytes != nbytes:
            self.ring = no_memory()
            self.ring = SlotMemory(1, nbytes, self._device) if nbytes else no_memory()

    def _make_staging(self, residency: Residency, images: Sequence[Image]) -> None:
        """For the largest chunk of what comes packed over the link: always, or to its home."""
        over_link = (each for n, each in enumerate(images) if n not in residency.kept_packed)
        nbytes = max(map(largest_chunk, over_link), default=0)
        count = residency.staging_slots if nbytes else 0
        if (self.staging.count, self.staging.slot_bytes) != (count, nbytes):
            self.staging = no_memory()
            self.staging = SlotMemory(count, nbytes, self._device) if count else no_memory()

    @property
    def nbytes(self) -> int:
        """Of all of it, as the allocator counts them."""
        return self.homes.nbytes + sum(
            allocated(each.nbytes) for each in (self.slots, self.ring, self.staging)
        )

    @property
    def passing_bytes(self) -> int:
        """Of what units pass through: slots, or the ring."""
        return self.slots.nbytes + self.ring.nbytes

    def tensors(self) -> list[Tensor]:
        """Whoever holds these holds all of it."""
        homes = [home.place.memory for home in self.homes.units.values()]
        return [self.slots.memory, self.ring.memory, self.staging.memory, *homes]

    # Where units stand.

    def place(self, unit: int, slot: int) -> Place:
        """Where a unit stands that the engine gave this slot for."""
        if slot < self.slots.count:
            return self.slots.place(slot)
        if (home := self.homes.get(unit)) is not None:
            return home.place.place(0)
        return self.place_in_ring(unit)

    def place_in_ring(self, unit: int) -> Place:
        return self.ring.places(self.residency.places[unit])

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is a view of it."""
        return self.slots.holds(tensor) or self.ring.holds(tensor) or self.homes.holds(tensor)

    def fits(self, unit: int, new: Image) -> bool:
        """Whether it is enough, as it is, for another image of a unit."""
        if unit in self.residency.kept_packed:  # its home has the size of its packed bytes
            return False
        if isinstance(new, PackedImage) and len(self.residency.places.get(unit, ())) > 1:
            return False  # packed bytes are unpacked to one run of addresses
        return largest_chunk(new) <= self.staging.slot_bytes

    def fingerprint(self, unit: int, slot: int, nbytes: int) -> int:
        """Of a unit's bytes, where it stands. Waits for the device."""
        return self.fingerprint_at(self.place(unit, slot), nbytes)

    def fingerprint_at(self, place: Place, nbytes: int) -> int:
        """Of an image's bytes at a place. Waits for the device."""
        window = place.window(nbytes)
        if self._device.type != "cuda":
            return fingerprint(window.data_ptr(), nbytes)
        from wanoffload.kernels.fingerprint import fingerprint as device_fingerprint

        return device_fingerprint(window)


def home_bytes(residency: Residency, images: Sequence[Image]) -> int:
    """Of the homes of a residency, as the allocator counts them."""
    wanted = _homes_of(residency, images).values()
    return sum(allocated(image.ALIGNMENT + each.nbytes) for each in wanted)


def give_back_cached(device: torch.device) -> None:
    """What torch's allocator keeps for later goes back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _homes_of(residency: Residency, images: Sequence[Image]) -> dict[int, Wanted]:
    plain = {n: Wanted(_plain_bytes(images[n]), False) for n in residency.resident}
    packed = {n: Wanted(images[n].nbytes, True) for n in residency.kept_packed}
    return plain | packed


def _plain_bytes(stored: Image) -> int:
    return stored.plain_bytes if isinstance(stored, PackedImage) else stored.nbytes
