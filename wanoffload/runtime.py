"""What happens while a wrapped model lives: its `Offloader`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from wanoffload import hooks, units
from wanoffload._C import Backend, Image, PackedImage
from wanoffload.activations import Activations, TorchMemory, shapes
from wanoffload.at_home import AtHome
from wanoffload.binding import Binding
from wanoffload.budget import Budget
from wanoffload.device_memory import SlotMemory
from wanoffload.engine import Engine
from wanoffload.engine_memory import EngineMemory
from wanoffload.errors import ClosedError, ConcurrentForwardError, MoveError, WrapError
from wanoffload.forward_thread import ForwardThread
from wanoffload.host_tiers import DISK, PAGEABLE, PINNED, HostPlan
from wanoffload.learned_rates import ForwardRates
from wanoffload.recently_read import UNPACKED_UNITS, RecentlyRead
from wanoffload.residency import Rates, Residency, allocated
from wanoffload.residency_planner import ResidencyPlanner
from wanoffload.stats import Stats
from wanoffload.step_time import StepTime
from wanoffload.streaming import Streaming
from wanoffload.together import Together
from wanoffload.written_units import WrittenUnits

logger = logging.getLogger(__name__)


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
        planner: ResidencyPlanner,
        host_plan: HostPlan,
        verify: bool,
        budget: Budget,
    ) -> None:
        self.device = device
        self.verify = verify
        self.host_plan = host_plan
        self.pack = 0.0
        self._rates = ForwardRates(device, backend)
        self.memory = EngineMemory(device, slots)
        self.engine = Engine(device, backend, self.memory)
        self.streaming = Streaming(self.engine, planner, self._rates)
        self.home = AtHome(self)
        self.bindings: list[Binding] = []
        self.together: list[Together] = []
        self.residents: set[tuple[int, str]] = set()  # (id of owner, key) of weights that stay
        self.moving_all = False
        self.thread = ForwardThread()
        self.before_forward: Callable[[], None] | None = None
        """Called at the beginning of every forward of the model, before anything is brought."""
        self.recently_read = RecentlyRead(UNPACKED_UNITS * slots.slot_bytes)
        self.written = WrittenUnits(UNPACKED_UNITS)
        self._budget = budget
        self._activations = self._watch(budget)
        self._forwards = 0
        self._step_time = StepTime(device)
        self._sequence: list[int] = []  # units as this forward called them
        self._closed = False
        self._process = os.getpid()

    def connect(self, bindings: list[Binding]) -> None:
        """Makes the engine and hands it the images of all blocks, in the order of their use."""
        self.bindings = bindings
        for number, binding in enumerate(bindings):
            binding.index = number
        self.streaming.connect(bindings, self.host_plan.ring_chunks, self._budget.nbytes)
        if self._budget.nbytes is not None:
            logger.info("%s", self.residency.sentence)

    # The steady path.

    def compute_stream(self) -> int:
        """The stream on which torch computes now. On the host backend, the calling thread."""
        if self.device.type != "cuda":
            return 0
        return torch.cuda.current_stream(self.device).cuda_stream

    def acquire(self, index: int, stream: int) -> tuple[int, int]:
        self._sequence.append(index)
        acquired = self.engine.prefetcher.acquire(index, stream)
        self.home.came.add(index)
        if self._rates.blocks.timing:
            self._rates.blocks.come(index)
        return acquired

    def release(self, index: int, stream: int, generation: int) -> None:
        if self._rates.blocks.timing:
            self._rates.blocks.used(index)
        self.engine.prefetcher.release(index, stream, generation)

    @property
    def tiers(self) -> list[str]:
        """Where each block's image stands: "pinned", "pageable" or "disk"."""
        return [binding.tier for binding in self.bindings]

    def replace(self, index: int, new: Image) -> None:
        """Another image stands in the place of a block's from here on.

        Not inside of a block. One that is packed into larger chunks than the staging memory holds
        ends the engine, until the next forward makes one with more.
        """
        self.home.came.discard(index)
        if self.engine.running and not self.memory.fits(index, new):
            self._pause(keep_homes=True)
        self.engine.replace(index, new)

    # Parts of compiled blocks.

    def use_together(self) -> None:
        """From here on all parts of a block are used at once: one is being compiled. The next
        forward has room for that. Raises WrapError, and nothing has changed, if the budget is too
        small; ConcurrentForwardError during a forward."""
        if self.streaming.planner.compiled or self._closed:
            return
        planner = replace(self.streaming.planner, compiled=True)
        if not self._budget.auto:
            planner.choose(self.bindings, self._budget.nbytes, self.streaming.order)
        self.pause(keep_residents=True)
        self.streaming.planner = planner

    # Forwards.

    def in_forward(self) -> bool:
        """Whether the calling thread is inside a forward of this model."""
        return self.thread.is_this()

    def begin_block(self, name: str) -> bool:
        """True if the block was called by itself, without the model's forward."""
        if not self.thread.enter(name):
            return False
        try:
            self.resume()
        except BaseException:
            self.thread.leave()
            raise
        return True

    def end_block(self) -> None:
        self._sequence.clear()
        self.thread.leave()

    def refuse_other_thread(self, what: str) -> None:
        """Raises ConcurrentForwardError while another thread is inside a forward."""
        self.thread.refuse_others(what)

    def begin_forward(self, model: nn.Module, inputs: Any) -> None:
        if (hook := units.foreign_hook(model)) is not None:
            raise WrapError(
                f"{hook} was put on a wrapped model; it moves the same weights. Call "
                "wanoffload.unwrap() before offloading the model in another way."
            )
        # False here means that an earlier forward of this thread ended without its ending.
        self.thread.enter("the model")
        if os.getpid() != self._process:
            raise WrapError(
                "this model was wrapped before the process was forked; streams and page locks "
                "don't follow. Wrap it in the process that runs it."
            )
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise WrapError("a wrapped model can't be traced: call wanoffload.unwrap() first")
        if self.before_forward is not None:
            self.before_forward()
        self.home.leave_if_incomplete()
        self.home.came.clear()
        self.written.settle()
        self._drop_read()
        if self._activations is not None:
            self._leave_room(self._activations, inputs)
        if not self.home.there:
            if self.streaming.depends_on_rates(self._budget.nbytes):
                self._look_at_rates(inputs)
            self.resume()
            self._recover()
        self._sequence.clear()
        self._step_time.begin_forward()
        if self._activations is not None:
            self._activations.begin()

    def _drop_read(self) -> None:
        """What of packed units was read stands unpacked no longer."""
        if self.recently_read.nbytes:
            for binding in self.bindings:
                binding.let_addresses_go()
            self.recently_read.drop_all()

    def _leave_room(self, activations: Activations, inputs: Any) -> None:
        """The weights' ceiling is what the activations of these inputs leave."""
        room = activations.room(inputs, self.device_bytes)
        self._budget = replace(self._budget, nbytes=room)
        if self.paused:
            return
        too_much = self.memory.homes.nbytes > 0 and (room is None or room < self.device_bytes)
        # What a plan leaves unused, or could not have, is no reason for another.
        used = max(self.device_bytes, self.streaming.made_for)
        enough = room is not None and room >= used + allocated(self.streaming.largest)
        more = enough and activations.again and len(self.residency.resident) < len(self.bindings)
        if too_much or more:
            self._recover()
            self._pause(keep_homes=True)
            if too_much:
                self.streaming.keep_homes_of(self.streaming.choose_within(room))
                activations.tidy()

    def _look_at_rates(self, inputs: Any) -> None:
        """Once it is known how long a forward of these inputs computes, and it comes again, blocks
        stay on the device as is quickest for it."""
        key, _ = shapes(inputs)
        self._rates.begin_forward(key)
        if self.paused or self.streaming.short:
            return
        rates = self._rates.news([binding.layout.nbytes for binding in self.bindings])
        if rates is not None and self.streaming.learn(rates, self._budget.nbytes):
            self._recover()
            self._pause(keep_homes=True)

    def end_forward(self, completed: bool) -> None:
        if not self.in_forward():
            return  # it never began
        try:
            if not self.home.there:
                self._rates.blocks.end_forward(completed, self.streaming.unpacked_beside)
                self._recover()
            self._step_time.end_forward(completed)
            if self._activations is not None:
                self._look_at_activations(self._activations, completed)
            if completed:
                self._forwards += 1
            if completed and not self.home.there:
                self._learn_order()
                self._go_home()
        finally:
            self.thread.leave()

    def _look_at_activations(self, activations: Activations, completed: bool) -> None:
        if isinstance(sys.exc_info()[1], torch.OutOfMemoryError):
            activations.ran_out(allocated(self.streaming.largest))
        activations.end(completed)

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
        self.engine.prefetcher.abandon(self.compute_stream())

    def _learn_order(self) -> None:
        """Takes over the order in which a whole forward called the blocks, if it was another."""
        if self._sequence == self.streaming.order:
            return
        if sorted(self._sequence) == sorted(self.streaming.order):
            logger.debug("blocks are called in the order %s", self._sequence)
            self.streaming.order = list(self._sequence)
            if self.residency.places:  # these follow the order
                return self._pause(keep_homes=True)
            self.engine.prefetcher.set_order(self.streaming.order)
            self.engine.prefetcher.prefetch()

    # Where all stay on the device.

    @property
    def at_home(self) -> bool:
        """Whether the blocks are ordinary modules now: all stay on the device, and have come. Their
        parameters are on the device also outside of a forward, and no hook of a block runs."""
        return self.home.there

    def _go_home(self) -> None:
        """Behind a forward."""
        everything = len(self.residency.resident) == len(self.bindings)
        if everything and not self.paused and not self.verify:
            self.home.go()

    def leave_home(self, why: str) -> None:
        """The host's images are the truth again, and blocks are fetched, if that was not so. Raises
        ConcurrentForwardError, which says why it was to be, during a forward."""
        if self.home.any:
            with self.thread.between_forwards(why, "do it afterwards"):
                self.home.leave()

    def start(self) -> None:
        """Fetches the first blocks, so that the first forward finds them."""
        self.engine.prefetcher.prefetch()

    # Pausing.

    @property
    def paused(self) -> bool:
        """Whether the next forward has to take slots first. Not so once closed."""
        return not self.engine.running and not self._closed

    @property
    def residency(self) -> Residency:
        """What stays on the device, and how the rest streams."""
        return self.streaming.residency

    @property
    def budget(self) -> Budget:
        """What the weights may take on the device."""
        return self._budget

    @property
    def prefetch(self) -> int | None:
        """Blocks that are fetched ahead, as asked for; None: as the budget's plan has it."""
        return self.streaming.planner.prefetch

    @property
    def granularity(self) -> str:
        """What is fetched at once: "block" or "part"."""
        return self.streaming.planner.granularity

    def pause(self, keep_residents: bool = False) -> None:
        """Gives the device's memory and the pinned ring back until the next forward. Idempotent.

        `keep_residents`: but for the blocks that stay on the device.

        Ends prefetching, and waits on the host for the copies in flight and for what the device
        still reads from the slots. The weights stay page-locked, true and writable. The next
        forward takes new slots (and staging memory) by itself, and finds its first block cold.
        Raises ConcurrentForwardError during a forward, TransferTimeout if a copy stalls (it can
        then be called again). Does nothing once closed.
        """
        if self._closed:
            return
        with self.thread.between_forwards("pause()", "pause it afterwards"):
            self._pause(keep_homes=keep_residents)

    def _pause(self, keep_homes: bool = False) -> None:
        self.home.leave()
        self.home.came.clear()
        self._step_time.restart()
        self.streaming.let_go(keep_homes)

    def set_prefetch(self, prefetch: int | None) -> None:
        """Another number of blocks ahead, and of slots, from the next forward on. Pauses."""
        self.pause()
        self.streaming.planner = replace(self.streaming.planner, prefetch=prefetch)

    def set_budget(self, vram_budget: int | str | float | None) -> None:
        """Another ceiling for what the weights take on the device; as of `wrap`.

        Blocks that stay on the device under both ceilings are not moved: what is new comes with the
        next forward, what is too much is given back now. Waits for the device. Raises WrapError for
        a budget that is too small, ConcurrentForwardError during a forward, torch.OutOfMemoryError
        if the device has less; the ceiling is then what it was.
        """
        if self._closed:
            raise ClosedError(
                "this model's offloader is closed: unwrap the model and wrap it again"
            )
        budget = Budget.of(vram_budget, self.device, self.device_bytes)
        self.streaming.choose(budget.nbytes)
        with self.thread.between_forwards("set_budget()", "set it afterwards"):
            before, self._budget = self._budget, budget
            try:
                self._rebuild()
                self._activations = self._watch(budget)
                logger.info("%s", self.residency.sentence)
            except BaseException:
                self._budget = before
                raise

    def _rebuild(self) -> None:
        """Another engine, with what the budget says now; a paused one is made when it is used."""
        paused = self.paused
        self.home.leave()  # which may end the engine
        if paused:
            self.streaming.keep_homes_of(self.streaming.choose(self._budget.nbytes))
            return
        self._pause(keep_homes=True)
        self.resume(exactly=True)

    def resume(self, exactly: bool = False) -> None:
        """New slots and a new engine, with the same units in the same order, if it was paused.

        Raises torch.OutOfMemoryError if there is too little for the slots, and is paused then.
        `exactly`: also if there is too little for what the budget would have stay on the device;
        else less stays.
        """
        if not self.paused:
            return
        ceiling, streaming = self._budget.nbytes, self.streaming
        choose = streaming.choose_within if self._budget.auto else streaming.choose
        streaming.make(choose(ceiling), ceiling, exactly)
        self.engine.prefetcher.prefetch()

    def _watch(self, budget: Budget) -> Activations | None:
        """Who finds out what an automatic budget is."""
        return Activations(TorchMemory(self.device)) if budget.auto else None

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
        """Refuses what can't be done before anything moves; each block then hides its weights,
        unless it is at home, and they may be seen."""
        self.check_move(fn)
        for binding in self.bindings:
            if not binding.aside:
                binding.take_in_changes()
        self.moving_all = True
        try:
            yield
        finally:
            self.moving_all = False

    # Looking.

    def stats(self) -> Stats:
        """Counts since `wrap` or the last `reset_stats()`, and what is held now."""
        self._step_time.tell()
        ring = self.engine.prefetcher.ring_bytes
        in_tier = dict.fromkeys((PINNED, PAGEABLE, DISK), 0)
        for binding in self.bindings:
            in_tier[binding.tier] += binding.image.nbytes
        return Stats(
            forwards=self._forwards,
            **self.engine.counts(),
            units=len(self.bindings),
            slots=self.memory.slots.count,
            host_bytes=in_tier[PINNED] + in_tier[PAGEABLE],
            disk_bytes=in_tier[DISK],
            plain_bytes=sum(binding.layout.nbytes for binding in self.bindings),
            unpacked_bytes=self.recently_read.nbytes,
            locked_bytes=in_tier[PINNED] + ring,
            slot_bytes=self.memory.passing_bytes,
            ring_bytes=ring,
            predicted_step_seconds=self._step_time.predicted,
            measured_step_seconds=self._step_time.measured(),
            packed_units=sum(isinstance(binding.image, PackedImage) for binding in self.bindings),
            staging_bytes=self.memory.staging.nbytes,
            resident_units=sum(not h.wanted.as_stored for h in self.memory.homes.units.values()),
            kept_packed_units=sum(h.wanted.as_stored for h in self.memory.homes.units.values()),
            resident_bytes=sum(home.place.nbytes for home in self.memory.homes.units.values()),
            device_bytes=self.device_bytes,
            at_home=self.at_home,
        )

    @property
    def device_bytes(self) -> int:
        """Of all weights on the device, now, as the allocator counts them."""
        return self.streaming.device_bytes

    def expect(
        self, step_seconds: float | None, forwards_per_step: int, rates: Rates | None = None
    ) -> None:
        """What a denoising step should take; the second step from here on is measured. `rates`:
        what its forwards should be up against, until that is found out; between forwards."""
        self._step_time.expect(step_seconds, forwards_per_step)
        if rates is not None and self.streaming.depends_on_rates(self._budget.nbytes):
            worth_it = self.streaming.learn(rates, self._budget.nbytes)
            if worth_it and not self.paused:
                self._pause(keep_homes=True)

    def reset_stats(self) -> None:
        """Sets the counts of `stats()` to 0."""
        self._forwards = 0
        self.engine.reset_counts()

    def recent_events(self) -> str:
        """The engine's last events, a line each, newest last."""
        return self.engine.prefetcher.recent_events()

    @property
    def copy_stream(self) -> int:
        """The stream of the copies: on CUDA for `torch.cuda.ExternalStream`. For tests, traces."""
        return self.engine.prefetcher.copy_stream

    def poison_slots(self, value: int | None = 0xFF) -> None:
        """Debug: from here on each slot is overwritten with this byte (0xFF: NaN) before a fill.

        A kernel that reads a slot too late, or a copy that comes too early, then shows in the
        output. Costs device bandwidth, no synchronization. None turns it off.
        """
        self.engine.set_poison(value)

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
        if self.thread.is_any():
            raise ConcurrentForwardError("a forward of this model is running: close it afterwards")
        self.home.leave()
        self.streaming.let_go(keep_homes=False)
        self._closed = True
        for binding in self.bindings:
            binding.close()
