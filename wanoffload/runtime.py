"""What happens while a wrapped model lives: one `Offloader` a model, one `Binding` a block."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wanoffload import hooks, image, units
from wanoffload._C import Backend, CudaBackend, HostBackend, HostImage, Prefetcher, fingerprint
from wanoffload.errors import (
    ConcurrentForwardError,
    GradientError,
    MoveError,
    VerifyError,
    WeightChangeError,
)
from wanoffload.host_tensor import HostTensor, this_thread

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stats:
    """What an offloader did and holds. Counts since `wrap` or the last `reset_stats()`; bytes now.

    `cold`: acquires that found nobody had fetched their block yet. `host_bytes`: of all images;
    `locked_bytes`: page-locked, images and ring; `slot_bytes`: on the device, all slots;
    `ring_bytes`: of the pinned ring, 0 where every image is page-locked.
    """

    forwards: int
    acquires: int
    cold: int
    fetches: int
    bytes_fetched: int
    invalidations: int
    failures: int
    units: int
    slots: int
    host_bytes: int
    locked_bytes: int
    slot_bytes: int
    ring_bytes: int


def backend_for(device: torch.device) -> Backend:
    """The engine's backend for a torch device: CUDA through the driver, or threads of the host."""
    return CudaBackend(device.index) if device.type == "cuda" else HostBackend()


class SlotMemory:
    """The device slots: one allocation of torch's, so that `torch.cuda.memory_*` tells the truth.

    A unit's image starts at a multiple of 256 bytes, never at 0: the compiler treats views at the
    start of a storage apart from others, and would compile twice.
    """

    def __init__(self, count: int, slot_bytes: int, device: torch.device) -> None:
        self.count = count
        self.slot_bytes = slot_bytes
        self.lead = image.ALIGNMENT
        self.memory = torch.empty(self.lead + count * slot_bytes, dtype=torch.uint8, device=device)

    @property
    def nbytes(self) -> int:
        return self.memory.numel()

    def start(self, slot: int) -> int:
        """Where a slot begins in `memory`."""
        return self.lead + slot * self.slot_bytes

    def addresses(self) -> list[int]:
        return [self.memory.data_ptr() + self.start(slot) for slot in range(self.count)]

    def window(self, slot: int, nbytes: int) -> Tensor:
        return self.memory[self.start(slot) : self.start(slot) + nbytes]


class Structure:
    """What a block consisted of when last looked at, so that a change is seen quickly."""

    def __init__(self, block: nn.Module) -> None:
        modules = list(block.modules())
        self._children = [(module._modules, tuple(module._modules.values())) for module in modules]
        self._parameters = [(module._parameters, len(module._parameters)) for module in modules]

    def unchanged(self) -> bool:
        for modules, children in self._children:
            if tuple(modules.values()) != children:
                return False
        return all(len(parameters) == count for parameters, count in self._parameters)


class Binding(hooks.Attached):
    """One block: its image, its entries in `_parameters`, and what it holds now.

    Outside the block's forward the entries are host tensors over the image. During it they are
    views of the slot, made once for each slot.
    """

    def __init__(
        self,
        offloader: Offloader,
        unit: units.Unit,
        layout: image.ImageLayout,
        store_image: HostImage,
    ) -> None:
        self.offloader = offloader
        self.unit = unit
        self.name = unit.name
        self.layout = layout
        self.image = store_image
        self.index = -1  # in the engine
        self.weights: list[HostTensor] = []
        # (the _parameters of the owner, its key, the number of the weight), one an entry
        self._places: list[tuple[dict[str, Any], str, int]] = [
            (entry.owner._parameters, entry.key, number)
            for number, group in enumerate(unit.groups)
            for entry in group
        ]
        self._views: dict[int, list[nn.Parameter]] = {}
        self._held: tuple[int, int, int] | None = None  # slot, generation, stream
        self._direct = False  # entered without the model's forward
        self._structure: Structure | None = None
        self._fingerprint: int | None = None

    # Entries.

    def make_weights(self) -> None:
        """Points the entries at the image, which has been written. The old tensors go."""
        for group, spec in zip(self.unit.groups, self.layout.specs, strict=True):
            old = group[0].tensor
            plain = image.host_view(spec, self.image)
            self.weights.append(HostTensor.parameter(plain, self, old.requires_grad))
        self.show()

    def show(self) -> None:
        """Entries are the host tensors."""
        for parameters, key, number in self._places:
            parameters[key] = self.weights[number]

    def give_back(self) -> None:
        """Entries are ordinary parameters over the image's memory, which they keep alive.

        Entries that somebody replaced, and no forward has taken in, are left as they are.
        """
        plain = [nn.Parameter(w.plain, w.requires_grad) for w in self.weights]
        for parameters, key, number in self._places:
            if parameters.get(key) is self.weights[number]:
                parameters[key] = plain[number]

    def take_in_changes(self) -> None:
        """Looks for entries that were replaced, and for modules that came or went."""
        for parameters, key, number in self._places:
            if parameters.get(key) is not self.weights[number]:
                self._take_in(parameters, key, number)
        if self._structure is None or not self._structure.unchanged():
            self._take_in_structure()
            self._structure = Structure(self.unit.module)

    def _take_in(self, parameters: dict[str, Any], key: str, number: int) -> None:
        new = parameters.get(key)
        weight = self.weights[number]
        name = f"{self.name}.{self.layout.specs[number].name}"
        if new is None:
            raise WeightChangeError(
                f"{name} was removed while the model is wrapped. Call wanoffload.unwrap() before "
                "changing what a block consists of, and wrap again."
            )
        try:
            weight.assign(new)
        except WeightChangeError as error:
            raise WeightChangeError(f"{name} was replaced: {error}") from None
        weight.requires_grad_(new.requires_grad)
        parameters[key] = weight
        logger.debug("%s was replaced; its value was taken in", name)

    def _take_in_structure(self) -> None:
        """Moves what was added to the block (LoRA adapters, buffers) to the device, to stay."""
        device = self.offloader.device
        weights = {id(weight) for weight in self.weights}
        known = self.offloader.resident_ids
        for prefix, owner, in_adapter in _walk(self.unit.module):
            for key, parameter in owner._parameters.items():
                if parameter is None or id(parameter) in weights:
                    continue
                if not in_adapter and id(parameter) not in known:
                    raise WeightChangeError(
                        f"{self.name}.{prefix}{key} was added while the model is wrapped; it would "
                        f"stay on the device ({parameter.nbytes} bytes). Call wanoffload.unwrap() "
                        "first, change the model, and wrap again."
                    )
                if parameter.device != device:
                    parameter.data = parameter.data.to(device)
            for key, buffer in owner._buffers.items():
                if buffer is not None and buffer.device != device:
                    owner._buffers[key] = buffer.to(device)

    # The guard of the host tensors.

    def before_write(self) -> None:
        """Fences the engine: no copy reads the image from here on, and none counts that did."""
        self._fingerprint = None
        if self.index >= 0:
            self.offloader.invalidate(self.index)

    def reader_in_forward(self) -> bool:
        return self.offloader.in_forward()

    # A forward of the block.

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Brings the weights to the device (the stream waits, not the host), points at them."""
        offloader = self.offloader
        direct = offloader.begin_block(self.name)
        if self._held is not None:
            raise ConcurrentForwardError(f"{self.name} was called inside of its own forward")
        try:
            self._direct = direct
            if torch.is_grad_enabled():
                self._refuse_gradients(args, kwargs)
            self.take_in_changes()
            stream = offloader.compute_stream()
            slot, generation = offloader.acquire(self.index, stream)
            self._held = (slot, generation, stream)
            if offloader.verify:
                self._verify(slot, generation, "before use")
            views = self._views.get(slot) or self._make_views(slot)
            for parameters, key, number in self._places:
                parameters[key] = views[number]
        except BaseException:
            self.recover()
            if direct:
                offloader.end_block()
            raise

    def exit(self) -> None:
        """Points back at the host and lets the slot go once the stream has got this far."""
        direct = self._direct
        try:
            if self._held is not None and self.offloader.verify:
                slot, generation, _ = self._held
                self._verify(slot, generation, "after use")
        finally:
            self.recover()
            if direct:
                self.offloader.end_block()

    def recover(self) -> None:
        """Ends what an enter began, however far it came. Idempotent."""
        if self._held is None:
            return
        _, generation, stream = self._held
        self.show()
        self._held = None
        self.offloader.release(self.index, stream, generation)

    @property
    def held(self) -> bool:
        return self._held is not None

    def _make_views(self, slot: int) -> list[nn.Parameter]:
        memory = self.offloader.slots
        # Ordinary tensors, whatever mode the forward that needs them first is in.
        with torch.inference_mode(False), torch.no_grad():
            views = [
                nn.Parameter(
                    image.device_view(spec, memory.memory, memory.start(slot)), requires_grad=False
                )
                for spec in self.layout.specs
            ]
        self._views[slot] = views
        return views

    def _refuse_gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        advice = (
            "Streamed weights are overwritten after use, so gradients can't flow through them: "
            "run the model under torch.inference_mode() or torch.no_grad()."
        )
        for name, parameter in self.unit.module.named_parameters():
            if parameter.requires_grad:
                raise GradientError(
                    f"{self.name}.{name} requires grad and grad mode is on. {advice}"
                )
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.requires_grad:
                raise GradientError(f"an input of {self.name} requires grad. {advice}")

    def _verify(self, slot: int, generation: int, when: str) -> None:
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.image.address, self.image.nbytes)
        found = self.offloader.slot_fingerprint(slot, self.image.nbytes)
        if found != self._fingerprint:
            raise VerifyError(
                f"{self.name} in slot {slot}, generation {generation}, {when}: the device holds "
                f"other bytes than the host (fingerprint {found:#018x}, expected "
                f"{self._fingerprint:#018x}). The engine's last events:\n"
                f"{self.offloader.recent_events()}"
            )

    # Moving.

    @contextmanager
    def moving(self, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """The streamed weights are out of sight while `_apply` walks over the block."""
        self.offloader.check_move(fn)
        self.take_in_changes()
        for parameters, key, _ in self._places:
            parameters[key] = None
        try:
            yield
        finally:
            self.show()


def _walk(block: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """(prefix, module, whether it is part of an adapter layer such as PEFT's) of each module."""
    adapters: list[str] = []
    for name, module in block.named_modules():
        if "base_layer" in module._modules:
            adapters.append(f"{name}.")
        prefix = f"{name}." if name else ""
        yield prefix, module, any(prefix.startswith(adapter) for adapter in adapters)


class Offloader(hooks.Attached):
    """A wrapped model's runtime. Get it with `wanoffload.offloader(transformer)`.

    Forwards of the model run on one thread at a time, on any CUDA stream. Everything here may be
    called from any thread.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        backend: Backend,
        slots: SlotMemory,
        prefetch: int,
        verify: bool,
    ) -> None:
        self.device = device
        self.verify = verify
        self.slots = slots
        self.bindings: list[Binding] = []
        self.resident_ids: set[int] = set()
        self._backend = backend
        self._prefetcher = Prefetcher(
            backend, slots.addresses(), slots.slot_bytes, slots.memory, depth=prefetch
        )
        self._forwards = 0
        self._owner: dict[str, int] = {}  # "thread": the one inside a forward, if any
        self._sequence: list[int] | None = []  # units as called, until the order is known
        self._closed = False

    def add(self, binding: Binding) -> None:
        """Hands a block's image to the engine."""
        binding.index = self._prefetcher.add_unit(binding.image)
        self.bindings.append(binding)

    # The steady path.

    def compute_stream(self) -> int:
        """The stream on which torch computes now. On the host backend, the calling thread."""
        if self.device.type != "cuda":
            return 0
        return torch.cuda.current_stream(self.device).cuda_stream

    def acquire(self, index: int, stream: int) -> tuple[int, int]:
        if self._sequence is not None:
            self._sequence.append(index)
        return self._prefetcher.acquire(index, stream)

    def release(self, index: int, stream: int, generation: int) -> None:
        self._prefetcher.release(index, stream, generation)

    def invalidate(self, index: int) -> None:
        if not self._closed:
            self._prefetcher.invalidate(index)

    # Forwards.

    def in_forward(self) -> bool:
        """Whether the calling thread is inside a forward of this model."""
        return self._owner.get("thread") == this_thread()

    def _enter_thread(self, what: str) -> bool:
        """Makes this thread the one inside a forward; False if it was already."""
        me = this_thread()
        if self._owner.get("thread") == me:
            return False
        if self._owner.setdefault("thread", me) != me:
            raise ConcurrentForwardError(
                f"{what} was called by a second thread while a forward of the same model is "
                "running. Weights in slots belong to one forward at a time: take turns, or wrap a "
                "copy for each thread."
            )
        return True

    def begin_block(self, name: str) -> bool:
        """True if the block was called by itself, without the model's forward."""
        return self._enter_thread(name)

    def end_block(self) -> None:
        self._owner.pop("thread", None)

    def begin_forward(self) -> None:
        # False here means that an earlier forward of this thread ended without its ending.
        self._enter_thread("the model")
        self._recover()
        if self._sequence is not None:
            self._sequence.clear()

    def end_forward(self, completed: bool) -> None:
        try:
            self._recover()
            if completed:
                self._forwards += 1
                self._learn_order()
        finally:
            self._owner.pop("thread", None)

    def _recover(self) -> None:
        """Lets go of what a forward that ended early still held."""
        for binding in self.bindings:
            if binding.held:
                binding.recover()
        self._prefetcher.abandon(self.compute_stream())

    def _learn_order(self) -> None:
        """Takes over the order in which a whole forward called the blocks, if it was another."""
        if self._sequence is None or sorted(self._sequence) != list(range(len(self.bindings))):
            return
        if self._sequence != self._prefetcher.order():
            logger.debug("blocks are called in the order %s", self._sequence)
            self._prefetcher.set_order(self._sequence)
            self._prefetcher.prefetch()
        self._sequence = None

    def start(self) -> None:
        """Fetches the first blocks, so that the first forward finds them."""
        self._prefetcher.prefetch()

    # Moving the model.

    def check_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raises MoveError unless `fn` leaves tensors on the device as they are.

        `fn` is what `nn.Module._apply` is given by `.to()`, `.half()`, `.cuda()` and the others.
        """
        dtypes = {spec.dtype for binding in self.bindings for spec in binding.layout.specs}
        for dtype in sorted(dtypes, key=str):
            probe = torch.empty(0, dtype=dtype, device=self.device)
            moved = fn(probe)
            if moved.device == probe.device and moved.dtype == probe.dtype:
                continue
            raise MoveError(
                f"this model is wrapped for {self.device} and its weights keep their dtypes; it "
                f"can't be moved to {moved.device} or cast from {probe.dtype} to {moved.dtype}. "
                "Call wanoffload.unwrap(model) first, which gives an ordinary module."
            )

    @contextmanager
    def moving(self, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Refuses what can't be done before anything moves; each block then hides its weights."""
        self.check_move(fn)
        for binding in self.bindings:
            binding.take_in_changes()
        yield

    # Looking.

    def stats(self) -> Stats:
        """Counts since `wrap` or the last `reset_stats()`, and what is held now."""
        counted = self._prefetcher.stats()
        ring = self._prefetcher.ring_bytes
        locked = sum(b.image.nbytes for b in self.bindings if b.image.locked)
        return Stats(
            forwards=self._forwards,
            acquires=counted.acquires,
            cold=counted.cold,
            fetches=counted.fetches,
            bytes_fetched=counted.bytes_fetched,
            invalidations=counted.invalidations,
            failures=counted.failures,
            units=len(self.bindings),
            slots=self.slots.count,
            host_bytes=sum(b.image.nbytes for b in self.bindings),
            locked_bytes=locked + ring,
            slot_bytes=self.slots.nbytes,
            ring_bytes=ring,
        )

    def reset_stats(self) -> None:
        """Sets the counts of `stats()` to 0."""
        self._forwards = 0
        self._prefetcher.reset_stats()

    def recent_events(self) -> str:
        """The engine's last events, a line each, newest last."""
        return self._prefetcher.recent_events()

    @property
    def copy_stream(self) -> int:
        """The stream of the copies: on CUDA for `torch.cuda.ExternalStream`. For tests, traces."""
        return self._prefetcher.copy_stream

    def poison_slots(self, value: int | None = 0xFF) -> None:
        """Debug: from here on each slot is overwritten with this byte (0xFF: NaN) before a fill.

        A kernel that reads a slot too late, or a copy that comes too early, then shows in the
        output. Costs device bandwidth, no synchronization. None turns it off.
        """
        self._prefetcher.set_poison(value)

    def slot_fingerprint(self, slot: int, nbytes: int) -> int:
        """The fingerprint of the first bytes of a slot. Waits for the device."""
        window = self.slots.window(slot, nbytes)
        if self.device.type != "cuda":
            return fingerprint(window.data_ptr(), nbytes)
        from wanoffload.kernels.fingerprint import fingerprint as device_fingerprint

        return device_fingerprint(window)

    # The end.

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Ends streaming: waits for copies, frees slots, ring and page locks. Idempotent.

        The weights stay true and readable on the host; a forward of the model raises ClosedError
        until it is unwrapped and wrapped again.
        """
        if self._closed:
            return
        self._prefetcher.close()
        self._closed = True
        for binding in self.bindings:
            binding._views.clear()
            binding.image.unlock()
        self.slots = SlotMemory(0, 0, self.device)


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Tensors made here are ordinary, also if the caller is in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield
