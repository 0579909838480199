"""Coarse offload: weights live on the host, and stand on the device only while they are used.

Going to the device is one large copy for each image of page-locked host memory; going home is
letting the device's copy go. The `.data` of the module's own Parameters and buffers is swapped, so
their identity stays, and what is added or replaced between uses is simply found there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wanoffload import host_memory, image
from wanoffload._C import HostImage, HostStore
from wanoffload.engine import backend_for
from wanoffload.host_tensor import HostTensor, ordinary_tensors
from wanoffload.units import tie_key

IMAGE_BYTES = 1 << 30
"""An image ends where it would be larger; while parking, the peak is the weights and one image."""

Progress = Callable[[int], object]


@dataclass(frozen=True)
class ParkedImage:
    """Tensors that go to the device in one copy. `homes`: their views of the host's bytes."""

    layout: image.ImageLayout
    memory: HostImage
    homes: tuple[Tensor, ...]

    def bytes(self) -> Tensor:
        return torch.frombuffer(memoryview(self.memory), dtype=torch.uint8)


class Brought:
    """A run of bytes on the device, and sums by which a write to it shows later.

    Word i counts in sum i % LANES. A tensor of up to 256 bytes shows any change; a larger one, any
    but those that leave all sums as they are, as an exchange of two rows may.
    """

    LANES = image.ALIGNMENT // 8

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.before: Tensor | None = None  # the sums, once the bytes are there

    def sums(self) -> Tensor:
        words = self.memory.view(torch.int64)
        return words.view(words.numel() // self.LANES, self.LANES).sum(0)


def _written(brought: list[Brought]) -> set[int]:
    """Addresses of the memory whose bytes are others now. Waits for what the stream does there."""
    known = [(b, b.before) for b in brought if b.before is not None]
    changed = [True] * len(known)
    if known:
        try:
            before, now = [sums for _, sums in known], [b.sums() for b, _ in known]
            changed = (torch.stack(before) != torch.stack(now)).any(1).tolist()
        except torch.OutOfMemoryError:
            pass  # all is taken home, which is right in any case
    return {b.memory.data_ptr() for (b, _), is_so in zip(known, changed, strict=True) if is_so}


@dataclass(frozen=True)
class Away:
    """A tensor of the module whose bytes stand on the device now."""

    tensor: Tensor
    home: Tensor
    copy: Tensor
    version: int

    def replaced(self) -> bool:
        return not _same_memory(self.tensor, self.copy)

    def written(self, memory: set[int]) -> bool:
        """`memory`: addresses of what was found written, as by `.data`, which does not count."""
        storage = self.copy.untyped_storage().data_ptr()
        return self.tensor._version != self.version or storage in memory


class Parked:
    """The weights and buffers of a module, at home on the host: all but those that are streamed.

    Between uses the module's tensors are host tensors, true and writable. In use they are on the
    device. What is written to them there is taken home, also if it was written through `.data`,
    which torch does not count: see `Brought`. Used by one thread at a time.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device
        self.bytes_brought = 0
        self._images: list[ParkedImage] = []
        self._places: dict[int, tuple[int, int]] = {}  # address of a home: its image, its number
        self._away: list[Away] = []
        self._brought: list[Brought] = []
        self._stream: torch.cuda.Stream | None = None  # where the copies were enqueued
        self._arrived: torch.cuda.Event | None = None

    # Parking.

    def park(self, progress: Progress) -> None:
        """Moves the tensors into page-locked images. Raises HostMemoryError.

        If it raises, `give_up()` makes the module ordinary again.
        """
        with ordinary_tensors():
            tensors = self.tensors()
            added = host_memory.bytes_not_given_back(tensors)
            largest = min(IMAGE_BYTES, sum(tensor.nbytes for tensor in tensors))
            host_memory.require(added + largest, f"parking {type(self.module).__name__}")
            store = HostStore(backend_for(self.device))
            for kin in _runs(_by_memory(tensors)):
                self._park(store, kin)
                progress(self._images[-1].layout.nbytes)

    def _park(self, store: HostStore, kin: list[list[Tensor]]) -> None:
        firsts = [group[0] for group in kin]
        layout = image.lay_out((str(i), tensor) for i, tensor in enumerate(firsts))
        memory = store.allocate(layout.nbytes)
        image.write_image(memory, layout, firsts, lambda image, _: image.lock())
        homes = tuple(image.host_view(spec, memory) for spec in layout.specs)
        for number, (home, group) in enumerate(zip(homes, kin, strict=True)):
            self._places[home.data_ptr()] = (len(self._images), number)
            for tensor in group:
                tensor.data = home
        self._images.append(ParkedImage(layout, memory, homes))

    def give_up(self) -> None:
        """The module is ordinary again, on the host, in the memory where it is."""
        self.send_home()
        for parked in self._images:
            parked.memory.unlock()
        self._images.clear()
        self._places.clear()

    def tensors(self) -> list[Tensor]:
        """The module's parameters and buffers as they stand there now, each once.

        Those that were born in inference mode, whose data can't be swapped, are replaced first.
        """
        found: dict[int, Tensor] = {}
        for owner in self.module.modules():
            for entries in (owner._parameters, owner._buffers):
                for key, tensor in entries.items():
                    if tensor is None or isinstance(tensor, HostTensor):
                        continue
                    if id(tensor) not in found:
                        found[id(tensor)] = _swappable(tensor)
                    entries[key] = found[id(tensor)]  # type: ignore[assignment]
        return list(found.values())

    # Using.

    @property
    def in_use(self) -> bool:
        return bool(self._away)

    def bring_in(self) -> None:
        """The tensors stand on the device. If there is no room for all, none does."""
        with ordinary_tensors():
            try:
                self._bring_in()
            except BaseException:
                self.send_home()
                raise

    def _bring_in(self) -> None:
        assert not self._away
        copies: dict[object, Tensor] = {}
        images: dict[int, Tensor] = {}  # number of an image: its bytes on the device
        for tensor in self.tensors():
            if tensor.device.type != "cpu":
                continue  # somebody put it there
            kin = tie_key(tensor)
            if kin not in copies:
                copies[kin] = self._copy(tensor, images)
            home = tensor.data
            tensor.data = copies[kin]
            self._away.append(Away(tensor, home, copies[kin], tensor._version))
        if self.device.type == "cuda":
            self._stream = torch.cuda.current_stream(self.device)
            self._arrived = self._stream.record_event()

    def _copy(self, tensor: Tensor, images: dict[int, Tensor]) -> Tensor:
        """The tensor on the device: a view of its image there, or, if it has none, a copy alone."""
        number, which = self._places.get(tensor.data_ptr(), (-1, -1))
        if number < 0 or not _same_memory(tensor, self._images[number].homes[which]):
            return self._copy_alone(tensor)
        parked = self._images[number]
        if number not in images:
            images[number] = self._memory_for(parked.layout)
            images[number][image.ALIGNMENT :].copy_(parked.bytes(), non_blocking=True)
            self._note_sums()
        return image.device_view(parked.layout.specs[which], images[number], image.ALIGNMENT)

    def _copy_alone(self, tensor: Tensor) -> Tensor:
        layout = image.lay_out([("alone", tensor)])
        memory = self._memory_for(layout)
        copy = image.device_view(layout.specs[0], memory, image.ALIGNMENT).copy_(tensor.data)
        self._note_sums()
        return copy

    def _memory_for(self, layout: image.ImageLayout) -> Tensor:
        # Nothing starts at 0: the compiler treats such views apart, see SlotMemory.
        nbytes = image.ALIGNMENT + layout.nbytes
        self._brought.append(Brought(torch.empty(nbytes, dtype=torch.uint8, device=self.device)))
        self.bytes_brought += layout.nbytes
        return self._brought[-1].memory

    def _note_sums(self) -> None:
        self._brought[-1].before = self._brought[-1].sums()

    def use_here(self) -> None:
        """The current stream reads what was brought, maybe on another one."""
        if self._arrived is None:
            return
        stream = torch.cuda.current_stream(self.device)
        if stream != self._stream:
            stream.wait_event(self._arrived)
            for brought in self._brought:
                brought.memory.record_stream(stream)

    def send_home(self) -> None:
        """The tensors stand on the host, the device's memory is free. Idempotent.

        Waits on the host for the copies to the device, whose source may be written to from here on,
        and for what the current stream does with them there.
        """
        with ordinary_tensors():
            if self._brought and self.device.type == "cuda":
                (self._arrived or torch.cuda.current_stream(self.device)).synchronize()
            written = _written(self._brought)
            while self._away:
                self._send_home(self._away[-1], written)
                self._away.pop()
            for tensor in self.tensors():
                if tensor.device.type != "cpu":
                    tensor.data = tensor.data.to("cpu")
            self._brought.clear()
            self._stream = self._arrived = None

    @staticmethod
    def _send_home(away: Away, written: set[int]) -> None:
        if away.replaced():
            return  # its new value goes the way of all that somebody put on the device
        if away.written(written):
            away.home.copy_(away.tensor.data)
        away.tensor.data = away.home


def _swappable(tensor: Tensor) -> Tensor:
    """The tensor, or an ordinary one in place of one that was born in inference mode."""
    if not tensor.is_inference():
        return tensor
    ordinary = tensor.detach().clone()
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(ordinary, tensor.requires_grad) if is_parameter else ordinary


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return tie_key(one) == tie_key(other) if one.numel() else one.device == other.device


def _by_memory(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Tensors with bytes; those that are the same memory seen in the same way together."""
    kin: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.nbytes:
            kin.setdefault(tie_key(tensor), []).append(tensor)
    return list(kin.values())


def _runs(kin: list[list[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """Groups of at most IMAGE_BYTES each, or of one tensor that is larger."""
    run: list[list[Tensor]] = []
    held = 0
    for group in kin:
        nbytes = image.aligned(group[0].nbytes)
        if run and held + nbytes > IMAGE_BYTES:
            yield run
            run, held = [], 0
        run.append(group)
        held += nbytes
    if run:
        yield run
