"""Turns: some steps of one model in a row, timed on the compute stream and checked.

A card at its power limit slows down by about one per cent as it warms up, so who runs later looks
slower. Therefore every turn begins after the same idle moment, rounds are taken forth and back in
turn (see :func:`forth_and_back`), and a model is compared with the others round by round (see
:func:`beside`): over a pair of rounds all of them run, on average, at the same moment.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from benchmarks import machine
from benchmarks.contenders import Counters, Live
from benchmarks.harness import say
from benchmarks.models import Inputs, ModelBytes, forward, step
from benchmarks.timing import Clock

FORWARDS_PER_STEP = 2
MAX_STEPS = 12

Anyone = TypeVar("Anyone")


def forth_and_back(everyone: Sequence[Anyone], number: int) -> list[Anyone]:
    """The order of round ``number``: as given in even rounds, from the last on in odd ones."""
    return list(everyone) if number % 2 == 0 else list(reversed(everyone))


def beside(mine: Sequence[float], other: Sequence[float]) -> float:
    """How many times as long as ``other``, both given round by round: the mean of the ratios.

    Over an even number of rounds, forth and back, a steady drift cancels out.
    """
    return statistics.fmean(one / two for one, two in zip(mine, other, strict=True))


def compiled_graphs() -> int:
    """Graphs that the compiler has made so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@dataclass
class Turns:
    """What one model gave over all its turns, and how often its blocks were compiled.

    ``graphs`` counts those of the first two forwards, ``recompiled`` those that came later.
    ``step_ms`` are all steps, ``turn_ms`` the median of each turn. ``streamed``: bytes that each
    forward fetches; None: all blocks, wherever they stand.
    """

    steps: int
    equal: bool
    graphs: int = 0
    recompiled: int = 0
    fetches_right: bool = True
    bytes_per_step: float = 0.0
    streamed: int | None = None
    step_ms: list[float] = field(default_factory=list)
    turn_ms: list[float] = field(default_factory=list)

    def add_turn(self, step_ms: Sequence[float]) -> None:
        """Takes in the steps of one turn."""
        self.step_ms += step_ms
        self.turn_ms.append(statistics.median(step_ms))


class Measure:
    """Warms models up and gives them turns, all with the same inputs.

    The model that is warmed up first is the resident one: its output is what is expected of all.
    """

    def __init__(self, clock: Clock, inputs: Inputs, weights: ModelBytes) -> None:
        self._clock = clock
        self._inputs = inputs
        self._weights = weights
        self._expected: list[torch.Tensor] = []

    @torch.inference_mode()
    def warm_up(self, live: Live, turn_seconds: float, steps: int | None = None) -> Turns:
        """Both forwards once, from an empty cache: compiles, compares, finds the turns' length,
        if ``steps`` does not give it."""
        machine.empty_caches()
        live.peak.restart()
        graphs = compiled_graphs()
        with live.peak.watch():
            timed = [
                self._clock.timed(partial(forward, live.model, self._inputs, name))
                for name in self._inputs.texts
            ]
        outputs, seconds = [output for output, _ in timed], [each for _, each in timed]
        self._expected = self._expected or outputs
        if steps is None:
            steps = round(turn_seconds / (FORWARDS_PER_STEP * seconds[-1]))
            steps = max(1, min(MAX_STEPS, steps))
        say(f"{live.contender.name}: warm after {sum(seconds):.2f} s, {steps} steps a turn")
        return Turns(steps, self._as_expected(outputs), compiled_graphs() - graphs)

    @torch.inference_mode()
    def take(self, live: Live, turns: Turns) -> None:
        """One turn: steps without a wait in between.

        One forward goes before the first mark: what a contender has already fetched while others
        had their turn would make its first step look quicker than it is.
        """
        before, graphs = live.contender.counters(live.model), compiled_graphs()
        with live.peak.watch():
            forward(live.model, self._inputs, "uncond")
            marks = [self._clock.mark()]
            for _ in range(turns.steps):
                outputs = step(live.model, self._inputs)
                marks.append(self._clock.mark())
            self._clock.synchronize()
        turns.add_turn(self._clock.between_ms(marks))
        turns.equal &= self._as_expected(outputs)
        turns.recompiled += compiled_graphs() - graphs
        after = live.contender.counters(live.model)
        if before is not None and after is not None:
            self._check_fetches(before, after, turns)

    def _as_expected(self, outputs: Sequence[torch.Tensor]) -> bool:
        """Whether both forwards gave the resident model's bits; a not-a-number never does."""
        pairs = zip(outputs, self._expected, strict=True)
        return all(torch.equal(mine, other) for mine, other in pairs)

    def _check_fetches(self, before: Counters, after: Counters, turns: Turns) -> None:
        forwards = 1 + FORWARDS_PER_STEP * turns.steps
        blocks = self._weights.block_count
        turns.fetches_right &= fetches_are_right(before, after, forwards, blocks, turns.streamed)
        fetched = after.bytes_fetched - before.bytes_fetched
        turns.bytes_per_step = fetched / forwards * FORWARDS_PER_STEP


def fetches_are_right(
    before: Counters, after: Counters, forwards: int, blocks: int, streamed: int | None = None
) -> bool:
    """Whether every block, or part of it, was acquired in every forward, and its bytes came.

    An output can be right although the hooks are dead, if the weights happen to be elsewhere.
    Where all blocks were on the device before, nothing is acquired, nor may anything come.
    ``streamed``: bytes of each forward where some blocks stay on the device; None: all blocks'.
    """
    fetched = after.bytes_fetched - before.bytes_fetched
    acquired = after.acquires - before.acquires
    if before.at_home:
        return after.at_home and acquired == fetched == 0
    # Up to as much as the slots hold was there before, and is there ahead of time after; where
    # they hold everything, nothing has to come twice.
    each = after.host_bytes if streamed is None else streamed
    expected = forwards * each
    least = 0 if after.slot_bytes >= each else expected - after.slot_bytes
    right = acquired == forwards * max(blocks, after.units)
    return right and least <= fetched <= expected + after.slot_bytes
