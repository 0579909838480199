"""One model's engine, made with as much on the device as a ceiling allows and the device has."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from wanoffload._C import Image
from wanoffload.binding import Binding
from wanoffload.engine import Engine
from wanoffload.engine_memory import give_back_cached, home_bytes
from wanoffload.learned_rates import ForwardRates
from wanoffload.residency import Rates, Residency
from wanoffload.residency_planner import ResidencyPlanner

logger = logging.getLogger(__name__)

WORTH_MOVING = 1.02
"""A plan is given up for another if forwards take this much longer under it."""


class Streaming:
    """Makes the engine for a ceiling, by what the units take then; lets it go, for another.

    A ceiling is what all weights may take on the device, in bytes; None: none stays.

    Attributes:
        planner, order: who chooses what stays, and in which order units are used. Others may be
            put here; they count when an engine is made next.
        made_for: the ceiling that the engine was made for; 0: none, or it is the first.
        short: the device had less.
    """

    def __init__(self, engine: Engine, planner: ResidencyPlanner, rates: ForwardRates) -> None:
        self.planner = planner
        self.order: list[int] = []
        self.made_for = 0
        self.short = False
        self._engine = engine
        self._memory = engine.memory
        self._rates = rates
        self._bindings: list[Binding] = []
        self._ring_chunks = 0

    def connect(self, bindings: list[Binding], ring_chunks: int, ceiling: int | None) -> None:
        """Makes the first engine. Raises WrapError if the ceiling is too small,
        torch.OutOfMemoryError if the device has less.

        `bindings`: the model's own list. `ring_chunks`: of the pinned ring.
        """
        self._bindings = bindings
        self._ring_chunks = ring_chunks
        self.order = list(range(len(bindings)))
        self._engine.take_memory(self.choose(ceiling), self._images())
        self._open(ceiling)

    def choose(self, ceiling: int | None) -> Residency:
        """What stays. Raises WrapError if the ceiling is too small."""
        return self.planner.choose(self._bindings, ceiling, self.order)

    def choose_within(self, ceiling: int | None) -> Residency:
        """What stays; where the ceiling is too small, nothing."""
        return self.planner.choose_within(self._bindings, ceiling, self.order)

    def make(self, residency: Residency, ceiling: int | None, exactly: bool) -> None:
        """An engine for what was chosen, in the place of the one before.

        Raises torch.OutOfMemoryError if there is too little for slots, or, `exactly`, for what
        stays; there is no engine then. Otherwise less stays.
        """
        self.let_go(keep_homes=True)  # what one that stalled left
        self.made_for = ceiling or 0
        self.short = False
        self._take_what_is_there(residency, exactly)
        self._open(ceiling)

    def let_go(self, keep_homes: bool) -> None:
        """There is no engine, and no memory for one, `keep_homes`: but for the homes. Waits for
        copies and readers. Idempotent. Raises TransferTimeout if a copy stalls; call it again."""
        self._engine.close(keep_homes)
        for binding in self._bindings:
            binding.forget_views()

    def keep_homes_of(self, residency: Residency) -> None:
        """The next engine is for this residency: homes that it has not are given back now. There is
        no engine."""
        self._memory.keep_for(residency, self._images())

    def depends_on_rates(self, ceiling: int | None) -> bool:
        """Whether it depends on rates what stays."""
        return self.planner.depends_on_rates(self._bindings, ceiling)

    def learn(self, rates: Rates, ceiling: int | None) -> bool:
        """What stays is chosen by these rates from here on. Whether forwards would be so much
        shorter that another engine is worth it."""
        self.planner = replace(self.planner, rates=rates)
        now = self.planner.seconds(self._bindings, self.residency)
        best = self.planner.seconds(self._bindings, self.choose_within(ceiling))
        logger.debug(
            "a forward computes %.4f s; %.4f s as planned, %.4f at best", rates.compute_s, now, best
        )
        return now > best * WORTH_MOVING

    @property
    def residency(self) -> Residency:
        """What stays now, or will with the next engine."""
        return self._memory.residency

    @property
    def unpacked_beside(self) -> int:
        """Plain bytes that are unpacked in a forward while blocks compute: of what comes packed
        over the link. What stays packed is unpacked before its block, and what has one slot for
        itself behind the block before."""
        residency = self.residency
        if not residency.streamed_bytes or not (residency.depth or residency.resident):
            return 0
        there = residency.resident | residency.kept_packed
        passing = (b for number, b in enumerate(self._bindings) if number not in there)
        return sum(binding.layout.nbytes for binding in passing if binding.packed)

    @property
    def device_bytes(self) -> int:
        """Of all weights on the device, now, as the allocator counts them."""
        return self.planner.others + self._memory.nbytes

    @property
    def largest(self) -> int:
        """Bytes of the largest unit, plain."""
        return max(binding.layout.nbytes for binding in self._bindings)

    def _images(self) -> list[Image]:
        return [binding.image for binding in self._bindings]

    def _open(self, ceiling: int | None) -> None:
        images = self._images()
        if self.depends_on_rates(ceiling) and not self._rates.learned.known:
            self._rates.measure(images, self._memory.slots.memory)
        self._engine.open(images, self.order, self._ring_chunks)

    def _take_what_is_there(self, residency: Residency, exactly: bool) -> None:
        images = self._images()
        try:
            self._engine.take_memory(residency, images)
        except torch.OutOfMemoryError:
            had = self._memory.homes.nbytes
            self.let_go(keep_homes=False)
            give_back_cached(self._engine.device)
            if exactly or not had:
                raise
            # Less by what could not be had, and by one block more, for others.
            less = residency.device_bytes - home_bytes(residency, images) + had - self.largest
            self.short = True
            logger.warning("the device has too little memory for %s", residency.sentence)
            self._take_what_is_there(self.choose_within(less), exactly)
