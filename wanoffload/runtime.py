"""What happens while a wrapped model lives: its `Offloader`, and the slots it holds."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wanoffload import hooks, image, units
from wanoffload._C import (
    Backend,
    CudaBackend,
    HostBackend,
    Image,
    PackedImage,
    Prefetcher,
    fingerprint,
)
from wanoffload.binding import Binding
from wanoffload.errors import ConcurrentForwardError, MoveError, WrapError
from wanoffload.host_tensor import ordinary_tensors
from wanoffload.host_tiers import CHUNK_BYTES, DISK, PAGEABLE, PINNED, HostPlan
from wanoffload.recently_read import RecentlyRead
from wanoffload.step_time import StepTime

logger = logging.getLogger(__name__)

UNPACKED_UNITS = 2
"""So many stand unpacked on the host, besides those that somebody holds, when packed weights are
read; and so many more when they are written to."""
STAGING_SLOTS = 4
"""Packed chunks on the device at once: one is copied, one unpacked, two even that out. A chunk is
39.93 MB at most, where every weight of it escapes (docs/packing.md), and 23.7 as weights are."""


@dataclass(frozen=True)
class Stats:
    """What an offloader did and holds. Counts since `wrap` or the last `reset_stats()`; bytes now.

    `cold`: acquires that found nobody had fetched their block yet. `host_bytes`: of the images in
    host memory; `disk_bytes`: of those in files; `plain_bytes`: of all, as they would be if none
    was packed; `unpacked_bytes`: of host memory that packed weights take besides, because they
    were read; `locked_bytes`: page-locked, images and ring;
    `slot_bytes`: on the device, all slots; `ring_bytes`: of the pinned ring, 0 where every image is
    page-locked; `staging_bytes`: on the device, where packed chunks are unpacked from, 0 where
    nothing is packed. `slots`, `slot_bytes`, `ring_bytes` and `staging_bytes` are 0 while the
    offloader is paused. `packed_units`: blocks whose images are packed; bytes of them are packed
    bytes.
    `predicted_step_seconds`: of a denoising step,
    by the plan; `measured_step_seconds`: of the second step. None where nothing was predicted, or
    the device has not got that far.
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
    disk_bytes: int
    plain_bytes: int
    unpacked_bytes: int
    locked_bytes: int
    slot_bytes: int
    ring_bytes: int
    predicted_step_seconds: float | None = None
    measured_step_seconds: float | None = None
    packed_units: int = 0
    staging_bytes: int = 0


_COUNTS = ("acquires", "cold", "fetches", "bytes_fetched", "invalidations", "failures")


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

    def addresses(self) -> list[int]:
        return [self.memory.data_ptr() + self.start(slot) for slot in range(self.count)]

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is a view of the slots."""
        if tensor.device != self.memory.device or tensor.layout != torch.strided:
            return False
        return tensor.untyped_storage().data_ptr() == self._storage

    def window(self, slot: int, nbytes: int) -> Tensor:
        return self.memory[self.start(slot) : self.start(slot) + nbytes]


def _no_memory() -> SlotMemory:
    return SlotMemory(0, 0, torch.device("cpu"))


def _largest_chunk(image: Image) -> int:
    """Bytes of the staging memory that the image needs at once; 0: it is not packed."""
    return image.largest_chunk if isinstance(image, PackedImage) else 0


class Offloader(hooks.Attached):
    """A wrapped model's runtime. Get it with `wanoffload.offloader(transformer)`.

    `pack`: the share of the blocks that was packed; 1.0: all that could be.

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
        host_plan: HostPlan,
        verify: bool,
    ) -> None:
        self.device = device
        self.verify = verify
        self.host_plan = host_plan
        self.pack = 0.0
        self.slots = slots
        self.staging = _no_memory()
        self.bindings: list[Binding] = []
        self.residents: set[tuple[int, str]] = set()  # (id of owner, key) of weights that stay
        self.moving_all = False
        self.before_forward: Callable[[], None] | None = None
        """Called at the beginning of every forward of the model, before anything is brought."""
        self._backend = backend
        self.recently_read = RecentlyRead(UNPACKED_UNITS * slots.slot_bytes)
        self._written: dict[int, Binding] = {}  # not packed again yet, the latest last
        self._prefetch = prefetch
        self._slot_count = slots.count
        self._slot_bytes = slots.slot_bytes
        self._poison: int | None = None
        self._slot_owner: list[Tensor] = []
        self._prefetcher: Prefetcher  # made by connect()
        self._connected = False
        self._can_unpack = False
        self._forwards = 0
        self._past = dict.fromkeys(_COUNTS, 0)  # counts of the engines before the last pause
        self._step_time = StepTime(device)
        self._owner: dict[str, int] = {}  # "thread": the one inside a forward, if any
        self._sequence: list[int] = []  # units as this forward called them
        self._order: list[int] = []  # the engine's
        self._closed = False
        self._paused = False
        self._process = os.getpid()

    def connect(self, bindings: list[Binding]) -> None:
        """Makes the engine and hands it the images of all blocks, in the order of their use."""
        self.bindings = bindings
        self._order = list(range(len(bindings)))
        self._make_engine()

    def _make_engine(self) -> None:
        """An engine over the slots, and over staging memory where something is packed."""
        self.staging = self._make_staging()
        # The engine keeps this list alive, and so the memory until it has closed.
        self._slot_owner = [self.slots.memory, self.staging.memory]
        self._prefetcher = Prefetcher(
            self._backend,
            self.slots.addresses(),
            self.slots.slot_bytes,
            self._slot_owner,
            depth=self._prefetch,
            ring_chunks=self.host_plan.ring_chunks,
            ring_chunk_bytes=CHUNK_BYTES,
            staging=self.staging.addresses(),
            staging_bytes=self.staging.slot_bytes,
        )
        self._connected = True
        self._prefetcher.set_poison(self._poison)
        for binding in self.bindings:
            binding.index = self._prefetcher.add_unit(binding.image)
        self._prefetcher.set_order(self._order)

    def _make_staging(self) -> SlotMemory:
        """For the largest chunk of what is packed now."""
        largest = max((_largest_chunk(binding.image) for binding in self.bindings), default=0)
        if largest == 0:
            return _no_memory()
        self._prepare_unpacking()
        with ordinary_tensors():
            return SlotMemory(STAGING_SLOTS, largest, self.device)

    def _prepare_unpacking(self) -> None:
        """Gives the backend its kernel, once."""
        if isinstance(self._backend, CudaBackend) and not self._can_unpack:
            from wanoffload.kernels.unpack import compile_unpack

            kernel = compile_unpack(self.device)
            self._backend.load_unpack_kernel(
                kernel.cubin, kernel.name, kernel.threads, kernel.shared_bytes
            )
        self._can_unpack = True

    # The steady path.

    def compute_stream(self) -> int:
        """The stream on which torch computes now. On the host backend, the calling thread."""
        if self.device.type != "cuda":
            return 0
        return torch.cuda.current_stream(self.device).cuda_stream

    def acquire(self, index: int, stream: int) -> tuple[int, int]:
        self._sequence.append(index)
        return self._prefetcher.acquire(index, stream)

    def release(self, index: int, stream: int, generation: int) -> None:
        self._prefetcher.release(index, stream, generation)

    @property
    def tiers(self) -> list[str]:
        """Where each block's image stands: "pinned", "pageable" or "disk"."""
        return [binding.tier for binding in self.bindings]

    def replace(self, index: int, image: Image) -> None:
        """Another image stands in the place of a block's from here on.

        Not inside of a block. One that is packed into larger chunks than the staging memory holds
        ends the engine, until the next forward makes one with more.
        """
        if self._closed or self._paused:
            return
        if _largest_chunk(image) > self.staging.slot_bytes:
            self._pause()
        else:
            self._prefetcher.replace_unit(index, image)

    def invalidate(self, index: int) -> None:
        if not self._closed and not self._paused:
            self._prefetcher.invalidate(index)

    # Packed units, between forwards.

    def was_written(self, binding: Binding) -> None:
        """A packed unit stands as it is now; so that few do, one that was written to before is
        packed again, if nobody uses it."""
        self._written.pop(id(binding), None)
        self._written[id(binding)] = binding
        for other in list(self._written.values())[:-UNPACKED_UNITS]:
            with other.turn.if_free() as free:
                if free and other.pack_again():
                    self._written.pop(id(other), None)

    def stays_plain(self, binding: Binding) -> None:
        """The unit is not to be packed again."""
        self._written.pop(id(binding), None)

    def _settle_packed(self) -> None:
        """What was written to is packed again, and what was read is dropped."""
        for binding in list(self._written.values()):
            binding.settle()
            if binding.packed:
                self._written.pop(id(binding), None)
        if self.recently_read.nbytes:
            for binding in self.bindings:
                binding.let_addresses_go()
            self.recently_read.drop_all()

    # Forwards.

    def in_forward(self) -> bool:
        """Whether the calling thread is inside a forward of this model."""
        return self._owner.get("thread") == threading.get_ident()

    def _enter_thread(self, what: str) -> bool:
        """Makes this thread the one inside a forward; False if it was already."""
        me = threading.get_ident()
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
        if not self._enter_thread(name):
            return False
        try:
            self.resume()
        except BaseException:
            self._leave_thread()
            raise
        return True

    def end_block(self) -> None:
        self._sequence.clear()
        self._leave_thread()

    def _leave_thread(self) -> None:
        if self.in_forward():
            self._owner.pop("thread", None)

    def refuse_other_thread(self, what: str) -> None:
        """Raises ConcurrentForwardError while another thread is inside a forward."""
        if self._owner and not self.in_forward():
            raise ConcurrentForwardError(
                f"{what} while another thread runs a forward of the model, whose weights stand in "
                "the slots in part; wait until the forward has ended"
            )

    def begin_forward(self, model: nn.Module) -> None:
        if (hook := units.foreign_hook(model)) is not None:
            raise WrapError(
                f"{hook} was put on a wrapped model; it moves the same weights. Call "
                "wanoffload.unwrap() before offloading the model in another way."
            )
        # False here means that an earlier forward of this thread ended without its ending.
        self._enter_thread("the model")
        if os.getpid() != self._process:
            raise WrapError(
                "this model was wrapped before the process was forked; streams and page locks "
                "don't follow. Wrap it in the process that runs it."
            )
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise WrapError("a wrapped model can't be traced: call wanoffload.unwrap() first")
        if self.before_forward is not None:
            self.before_forward()
        self._settle_packed()
        self.resume()
        self._recover()
        self._sequence.clear()
        self._step_time.begin_forward()

    def end_forward(self, completed: bool) -> None:
        if not self.in_forward():
            return  # it never began
        try:
            self._recover()
            self._step_time.end_forward(completed)
            if completed:
                self._forwards += 1
                self._learn_order()
        finally:
            self._leave_thread()

    def forget_forward(self) -> None:
        """Ends a forward of this thread that was interrupted while it ended, if there is one.

        For callers who know that this thread is not inside of one.
        """
        if self.in_forward():
            self.end_forward(completed=False)

    def _recover(self) -> None:
        """Lets go of what a forward that ended early still held."""
        for binding in self.bindings:
            if binding.held:
                binding.recover()
        self._prefetcher.abandon(self.compute_stream())

    def _learn_order(self) -> None:
        """Takes over the order in which a whole forward called the blocks, if it was another."""
        if self._sequence == self._order:
            return
        if sorted(self._sequence) == sorted(self._order):
            logger.debug("blocks are called in the order %s", self._sequence)
            self._order = list(self._sequence)
            self._prefetcher.set_order(self._order)
            self._prefetcher.prefetch()

    def start(self) -> None:
        """Fetches the first blocks, so that the first forward finds them."""
        self._prefetcher.prefetch()

    # Pausing.

    @property
    def paused(self) -> bool:
        return self._paused

    @property
    def backend(self) -> Backend:
        """The engine's; what is page-locked for it is locked through it."""
        return self._backend

    @property
    def prefetch(self) -> int:
        """Blocks that are fetched ahead."""
        return self._prefetch

    def pause(self) -> None:
        """Gives the device's memory and the pinned ring back until the next forward. Idempotent.

        Ends prefetching, and waits on the host for the copies in flight and for what the device
        still reads from the slots. The weights stay page-locked, true and writable. The next
        forward takes new slots (and staging memory) by itself, and finds its first block cold.
        Raises
        ConcurrentForwardError during a forward, TransferTimeout if a copy stalls (it can then be
        called again). Does nothing once closed.
        """
        if self._closed:
            return
        if not self._enter_thread("pause()"):
            raise ConcurrentForwardError("a forward of this model is running: pause it afterwards")
        try:
            self._pause()
        finally:
            self._leave_thread()

    def _pause(self) -> None:
        self._paused = True
        self._step_time.restart()
        self._let_slots_go()

    def set_prefetch(self, prefetch: int) -> None:
        """Another number of blocks ahead, and of slots, from the next forward on. Pauses."""
        self.pause()
        self._prefetch = min(prefetch, len(self.bindings))
        self._slot_count = min(prefetch + 1, len(self.bindings))

    def _let_slots_go(self) -> None:
        if self._connected:
            self._prefetcher.close()
        for binding in self.bindings:
            binding.forget_views()
        self._slot_owner.clear()
        self.slots = self.staging = _no_memory()

    def resume(self) -> None:
        """New slots and a new engine, with the same units in the same order, if it was paused."""
        if not self._paused or self._closed:
            return
        self._let_slots_go()  # what a pause that stalled left
        with ordinary_tensors():
            self.slots = SlotMemory(self._slot_count, self._slot_bytes, self.device)
        for name in _COUNTS:
            self._past[name] += getattr(self._prefetcher.stats(), name)
        self._prefetcher.reset_stats()
        self._make_engine()
        self._paused = False
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
        self.moving_all = True
        try:
            yield
        finally:
            self.moving_all = False

    # Looking.

    def stats(self) -> Stats:
        """Counts since `wrap` or the last `reset_stats()`, and what is held now."""
        counted = self._prefetcher.stats()
        counts = {name: self._past[name] + getattr(counted, name) for name in _COUNTS}
        self._step_time.tell()
        ring = self._prefetcher.ring_bytes
        in_tier = dict.fromkeys((PINNED, PAGEABLE, DISK), 0)
        for binding in self.bindings:
            in_tier[binding.tier] += binding.image.nbytes
        return Stats(
            forwards=self._forwards,
            **counts,
            units=len(self.bindings),
            slots=self.slots.count,
            host_bytes=in_tier[PINNED] + in_tier[PAGEABLE],
            disk_bytes=in_tier[DISK],
            plain_bytes=sum(binding.layout.nbytes for binding in self.bindings),
            unpacked_bytes=self.recently_read.nbytes,
            locked_bytes=in_tier[PINNED] + ring,
            slot_bytes=self.slots.nbytes,
            ring_bytes=ring,
            predicted_step_seconds=self._step_time.predicted,
            measured_step_seconds=self._step_time.measured(),
            packed_units=sum(isinstance(binding.image, PackedImage) for binding in self.bindings),
            staging_bytes=self.staging.nbytes,
        )

    def expect(self, step_seconds: float | None, forwards_per_step: int) -> None:
        """What a denoising step should take; the second step from here on is measured."""
        self._step_time.expect(step_seconds, forwards_per_step)

    def reset_stats(self) -> None:
        """Sets the counts of `stats()` to 0."""
        self._forwards = 0
        self._past = dict.fromkeys(_COUNTS, 0)
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
        self._poison = value
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
        if self._owner:
            raise ConcurrentForwardError("a forward of this model is running: close it afterwards")
        self._let_slots_go()
        self._closed = True
        for binding in self.bindings:
            binding.close()
