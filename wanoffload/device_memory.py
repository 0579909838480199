"""What an engine may have of the device: slots, or a ring, through which units pass, and homes,
where some stay.

All of it is torch's, so that `torch.cuda.memory_*` tells the truth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wanoffload import image, ring
from wanoffload.residency import allocated

SMALL_BYTES = 1 << 20
"""Below, torch's allocator rounds up to SMALL_STEP; from there on, see `residency.allocated`."""
SMALL_STEP = 512


def as_allocated(nbytes: int) -> int:
    """What torch's allocator takes for a tensor of any size."""
    return -(-nbytes // SMALL_STEP) * SMALL_STEP if nbytes < SMALL_BYTES else allocated(nbytes)


@dataclass(frozen=True)
class Place:
    """Where a unit's image stands on the device: `pieces` are (where in the image, where in
    `memory`, bytes), in order."""

    memory: Tensor
    pieces: tuple[tuple[int, int, int], ...]

    def view(self, spec: image.TensorSpec) -> Tensor:
        """One of the image's tensors. No copy."""
        for offset, start, nbytes in self.pieces:
            if offset <= spec.offset and spec.offset + spec.nbytes <= offset + nbytes:
                return image.device_view(spec, self.memory, start - offset)
        raise AssertionError(f"{spec.name} does not stand in one piece")

    def own_view(self, spec: image.TensorSpec) -> Tensor:
        """The same, with a storage of its own, so that saving one tensor saves one tensor; it keeps
        the memory alive. Of a place in one piece."""
        ((_, start, _),) = self.pieces
        return image.own_device_view(spec, self.memory, start)

    def window(self, nbytes: int) -> Tensor:
        """The first bytes of the image. A copy, if they stand in more than one piece."""
        parts = [self.memory[start : start + size] for _, start, size in self.pieces]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole[:nbytes]

    def ranges(self) -> list[tuple[int, int]]:
        """(address, bytes) of the pieces."""
        return [(self.memory.data_ptr() + start, nbytes) for _, start, nbytes in self.pieces]


class SlotMemory:
    """Equal slots in one allocation.

    A unit's image starts at a multiple of 256 bytes, never at 0: the compiler treats views at the
    start of a storage apart from others, and would compile twice.
    """

    def __init__(self, count: int, slot_bytes: int, device: torch.device) -> None:
        self.count = count
        self.slot_bytes = slot_bytes
        self.lead = image.ALIGNMENT
        nbytes = self.lead + count * slot_bytes if count else 0
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._storage = self.memory.untyped_storage().data_ptr()
        if device.type == "cuda":
            # The allocator may hand out memory that queued kernels still use, in the order of
            # their stream; copies come on another one.
            torch.cuda.current_stream(device).synchronize()

    @property
    def nbytes(self) -> int:
        return self.memory.numel()

    def start(self, slot: int) -> int:
        """Where a slot begins in `memory`."""
        return self.lead + slot * self.slot_bytes

    def place(self, slot: int) -> Place:
        """A whole slot."""
        return Place(self.memory, ((0, self.start(slot), self.slot_bytes),))

    def places(self, pieces: Iterable[ring.Piece]) -> Place:
        """Pieces of the first slot, which is a ring."""
        lead = self.start(0)
        return Place(self.memory, tuple((p.offset, lead + p.start, p.nbytes) for p in pieces))

    def addresses(self) -> list[int]:
        return [self.memory.data_ptr() + self.start(slot) for slot in range(self.count)]

    @property
    def storage(self) -> int:
        """The address of the memory, by which views of it are known."""
        return self._storage

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is a view of the slots."""
        if tensor.device != self.memory.device or tensor.layout != torch.strided:
            return False
        return tensor.untyped_storage().data_ptr() == self._storage

    def window(self, slot: int, nbytes: int) -> Tensor:
        return self.memory[self.start(slot) : self.start(slot) + nbytes]


def no_memory() -> SlotMemory:
    return SlotMemory(0, 0, torch.device("cpu"))


@dataclass(frozen=True)
class Wanted:
    """What is to stay on the device of a unit: `nbytes`, plain, or (`as_stored`) packed."""

    nbytes: int
    as_stored: bool


@dataclass
class Home:
    """Where one unit's bytes stay.

    Of a paused model: `filled`, they are there; `stale`, the host's were changed since the pause.
    """

    wanted: Wanted
    place: SlotMemory
    filled: bool = False
    stale: bool = False


class Homes:
    """The homes of one model's units, by their numbers; one allocation each, given back alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._homes: dict[int, Home] = {}
        self._storages: set[int] = set()

    def __getitem__(self, unit: int) -> Home:
        return self._homes[unit]

    def get(self, unit: int) -> Home | None:
        return self._homes.get(unit)

    @property
    def nbytes(self) -> int:
        """As the allocator counts them."""
        return sum(allocated(home.place.nbytes) for home in self._homes.values())

    @property
    def units(self) -> dict[int, Home]:
        return self._homes

    def keep_only(self, wanted: Mapping[int, Wanted]) -> bool:
        """Lets go of what is not wanted, or is wanted in another way; whether there was something.
        No engine uses them."""
        others = [unit for unit, home in self._homes.items() if wanted.get(unit) != home.wanted]
        for unit in others:
            self._storages.remove(self._homes.pop(unit).place.storage)
        return bool(others)

    def let_go(self, units: Iterable[int]) -> None:
        """Homes of these units are no longer its own: their memory lives as long as others hold it.
        No engine uses them."""
        for unit in units:
            if (home := self._homes.pop(unit, None)) is not None:
                self._storages.remove(home.place.storage)

    def make(self, wanted: Mapping[int, Wanted]) -> None:
        """Allocates what is missing, in the order of the units. Raises torch.OutOfMemoryError; what
        was allocated until then stays."""
        for unit in sorted(wanted.keys() - self._homes.keys()):
            place = SlotMemory(1, wanted[unit].nbytes, self._device)
            self._homes[unit] = Home(wanted[unit], place)
            self._storages.add(place.storage)

    def spoil(self, unit: int) -> None:
        """The unit's bytes on the host are others now, and no engine was told."""
        if (home := self._homes.get(unit)) is not None:
            home.filled, home.stale = False, True

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is a view of a home. On the path of each block, so all at once."""
        if not self._storages or tensor.layout != torch.strided or tensor.device != self._device:
            return False
        return tensor.untyped_storage().data_ptr() in self._storages
