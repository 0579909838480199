"""Where the weights of a packed unit stand outside of its forward: unpacked when they are read,
dropped when nobody needs them.

The view has the addresses that the unit's host tensors have for their whole life, and no memory
where nothing was unpacked. It holds the packed bytes, so a weight that somebody kept is true even
when the model is gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from wanoffload import image
from wanoffload._C import HostBackend, HostStore, PackedImage
from wanoffload.errors import TransferError
from wanoffload.image import ImageLayout, placed_like
from wanoffload.recently_read import RecentlyRead
from wanoffload.turns import Turn


class PackedView:
    """A unit's plain image, of which any part may be missing. Its turn guards it.

    Invariant: what is not here can be unpacked from `packed`; while that is None, all is here.
    """

    def __init__(
        self, name: str, layout: ImageLayout, packed: PackedImage, recent: RecentlyRead
    ) -> None:
        self.name = name
        self.layout = layout
        self.packed: PackedImage | None = packed
        self.memory = HostStore(HostBackend()).allocate(layout.nbytes)
        self.turn = Turn()
        self._recent = recent
        self.nbytes = 0  # of what is here and could be dropped
        self._here: set[int] = set()  # numbers of weights
        self._holders: dict[int, list[weakref.ref[object]]] = {}
        self._lent: dict[int, StorageWeakRef] = {}
        self._shells: dict[int, torch.UntypedStorage] = {}

    def weight(self, number: int) -> PackedWeight | None:
        """None for a weight without bytes."""
        return PackedWeight(self, number) if self.layout.specs[number].nbytes else None

    @property
    def missing_bytes(self) -> int:
        """Of what is not here."""
        return self.layout.nbytes - self.nbytes if self.packed is not None else 0

    # Bringing. In the unit's turn.

    def bring(self, number: int) -> None:
        """Raises HostMemoryError if there is no room, TransferError if the bytes are spoilt."""
        if self.packed is None:
            return
        if number not in self._here:
            self._unpack(number, self.packed)
        self._recent.note(self)

    def bring_to_stay(self) -> None:
        """All is here from now on, and here alone: the packed bytes are let go."""
        if self.packed is None:
            return
        self._recent.make_room(self.missing_bytes, f"unpacking {self.name}")
        for number in range(len(self.layout.specs)):
            if number not in self._here:
                self._unpack(number, self.packed)
        self.packed = None
        self.nbytes = 0
        self._recent.forget(self)

    def is_packed_as(self, packed: PackedImage) -> None:
        """What is here also stands in these bytes, so it may be dropped."""
        self.packed = packed
        self.nbytes = self.layout.nbytes
        self._recent.note(self)

    def _unpack(self, number: int, packed: PackedImage) -> None:
        spec = self.layout.specs[number]
        name = f"{self.name}.{spec.name}"
        room = self._room(number)
        self._recent.make_room(room, f"unpacking {name}")
        try:
            # With the zeros behind it, for then its checksums are looked at.
            packed.unpack(spec.offset, room, self.memory.address + spec.offset)
        except TransferError as error:
            raise TransferError(f"{name} could not be unpacked: {error}") from error
        self._here.add(number)
        self.nbytes += room

    def _room(self, number: int) -> int:
        return image.aligned(self.layout.specs[number].nbytes)

    # Dropping.

    def after_use(self) -> None:
        """Whoever read it has what he wanted: what is too much may go."""
        self._recent.trim()

    def drop_unused(self) -> None:
        """Drops what nobody can be reading: unless the unit is in use, all but what is held."""
        with self.turn.if_free() as free:
            if free and self.packed is not None:
                self._drop([number for number in self._here if not self._is_held(number)])

    def _drop(self, numbers: list[int]) -> None:
        self._here.difference_update(numbers)
        self.nbytes -= sum(map(self._room, numbers))
        if not self._here:
            self.memory.drop(0, self.memory.nbytes)  # also the pages that weights share
            self._recent.forget(self)
            return
        for number in numbers:
            self.memory.drop(self.layout.specs[number].offset, self._room(number))

    # Holding: who has an address keeps the bytes there.

    def keep_for(self, number: int, holders: Iterable[object]) -> None:
        """The weight stays here as long as one of these lives."""
        living = [held for held in self._holders.get(number, []) if held() is not None]
        known = {id(held()) for held in living}
        new = [holder for holder in holders if id(holder) not in known]
        gone = self._recent.holder_is_gone
        self._holders[number] = living + [weakref.ref(holder, gone) for holder in new]

    def release(self, holders: Iterable[object]) -> None:
        """These don't keep anything here any more."""
        gone = {id(holder) for holder in holders}
        with self.turn:
            for number, held in self._holders.items():
                self._holders[number] = [one for one in held if id(one()) not in gone]

    def _is_held(self, number: int) -> bool:
        return any(holder() is not None for holder in self._holders.get(number, []))

    def lend(self, number: int) -> torch.UntypedStorage:
        """A storage over the weight, which stays here as long as anybody has the storage.

        The same one for all who ask meanwhile, so that ties are seen.
        """
        if (known := self._lent.get(number)) is not None:
            storage = torch.UntypedStorage._new_with_weak_ptr(known.cdata)
            if storage is not None:
                return storage
        window = self._window(number)
        self.keep_for(number, [window])
        storage = torch.frombuffer(window, dtype=torch.uint8).untyped_storage()
        self._lent[number] = StorageWeakRef(storage)
        return storage

    def shell(self, number: int, plain: Tensor) -> Tensor:
        """A tensor like `plain`, which is of the weight: torch lets nobody write to its address.

        So most of what goes past `HostTensor` is an error, and not what stands where nothing was
        unpacked. Not all: an ordinary tensor that takes the storage over (`x.data = weight`, where
        `weight.data` is meant) is read without a question.
        """
        if number not in self._shells:
            whole = torch.frombuffer(self._window(number), dtype=torch.uint8)
            torch._C._set_throw_on_mutable_data_ptr(whole)
            self._shells[number] = whole.untyped_storage()
        return placed_like(plain, self._shells[number])

    def _window(self, number: int) -> memoryview:
        """The weight's bytes. Who is made over it keeps it, and it keeps the memory."""
        spec = self.layout.specs[number]
        return memoryview(self.memory)[spec.offset : spec.offset + spec.nbytes]


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """One weight of a view: `wanoffload.host_tensor.Home`."""

    view: PackedView
    number: int

    @property
    def turn(self) -> Turn:
        return self.view.turn

    def bring(self) -> None:
        self.view.bring(self.number)

    def bring_to_stay(self) -> None:
        self.view.bring_to_stay()

    def keep_for(self, *holders: object) -> None:
        self.view.keep_for(self.number, holders)

    def lend(self) -> torch.UntypedStorage:
        return self.view.lend(self.number)

    def shell(self, plain: Tensor) -> Tensor:
        return self.view.shell(self.number, plain)

    def after_use(self) -> None:
        self.view.after_use()
