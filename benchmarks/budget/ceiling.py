"""The part ``ceiling``: many forwards of mixed shapes, and the most that was reserved meanwhile.

A budget is what weights may take; activations come on top, and what torch's allocator reserves for
them besides: as much as for the resident model in the same forwards. With ``vram_budget="auto"``
little of the device is left, so that what stays on it has to give way to the larger shapes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import wanoffload
from benchmarks import machine
from benchmarks.budget.bench import GB, BudgetBench, name_of, toy_budgets
from benchmarks.contenders import Live
from benchmarks.engine import Found, is_small
from benchmarks.harness import say
from benchmarks.loading.claims import Claim
from benchmarks.models import SEED, Inputs, Size, forward, make_inputs
from benchmarks.packing.bench import PACKED, as_json
from wanoffload.budget import AUTO

FORWARDS = 200
BUDGET = 8 * GB
LEFT_TO_AUTO = 20 * GB  # and what the model's slots have by then
MARGIN = 1.02
SIDES = ((480, 832), (256, 448))
TOY_SIDES = ((32, 48), (16, 32))
FRAMES = (1, 5, 17)


def ceiling(bench: BudgetBench) -> Found:
    """A row for the budget and one for the automatic one; the resident model runs first."""
    if bench.session.out_of_time():
        return
    mixed = _Mixed(bench, bench.session.options.forwards)
    resident = mixed.run(bench.resident)
    activations = resident.reserved - bench.resident.peak.own[1]
    live = bench.live(PACKED)
    offloader = wanoffload.offloader(live.model)
    budget = toy_budgets(offloader)[2] if is_small(bench.session) else BUDGET
    try:
        offloader.set_budget(budget)
        ran = mixed.run(live)
        claims = _claims(ran, budget, activations) if bench.device.type == "cuda" else []
        more = {"budget": budget, "activations": activations, "claims": as_json(claims)}
        yield {"budget": name_of(budget)}, {**ran.as_json(), **more}

        if bench.session.out_of_time():
            return
        offloader.set_budget(AUTO)
        with _little_left(bench, live) as left:
            ran = mixed.run(live)
        more = {"budget": None, "left": left, "activations": activations, "claims": []}
        yield {"budget": AUTO}, {**ran.as_json(), **more}
    finally:
        offloader.set_budget(None)


def _claims(ran: _Ran, budget: int, activations: int) -> list[Claim]:
    allowed, what = (budget + activations) / 1e9, "budget and the resident model's activations"
    return [Claim("reserved, the most", ran.reserved / 1e9, allowed, what, "GB", MARGIN)]


@dataclass
class _Ran:
    """What all the forwards gave. `reserved` and `allocated`: the most, above what stood there
    before the model was made. `stayed`: the least and the most blocks on the device after a
    forward. `retries`: times that torch's allocator gave back what it had kept, for want of
    memory."""

    forwards: int = 0
    wrong: int = 0
    out_of_memory: int = 0
    retries: int = 0
    seconds: float = 0.0
    reserved: int = 0
    allocated: int = 0
    device_bytes: int = 0
    stayed: list[int] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        right = self.forwards > 0 and not self.wrong and not self.out_of_memory
        values = {
            **vars(self),
            "stayed": [min(self.stayed, default=0), max(self.stayed, default=0)],
        }
        return {"verified": right, **values}


class _Mixed:
    """The same forwards, of shapes in the same random order, for everyone."""

    def __init__(self, bench: BudgetBench, forwards: int) -> None:
        self._bench = bench
        sides = TOY_SIDES if is_small(bench.session) else SIDES
        sizes = [Size(*side, frames) for side in sides for frames in FRAMES]
        self._order = random.Random(SEED).choices(sizes, k=forwards)
        self._inputs: dict[Size, Inputs] = {
            size: make_inputs(bench.spec, size, bench.device) for size in sizes
        }
        self._expected: dict[Size, torch.Tensor] = {}

    def run(self, live: Live) -> _Ran:
        """All forwards. The first model that runs says what is expected of the others."""
        name = live.contender.name
        say(f"{name}: {len(self._order)} forwards of {len(self._inputs)} shapes")
        machine.empty_caches()
        live.peak.restart()
        ran = _Ran()
        retries = _retries()
        with live.peak.watch():
            _, ran.seconds = self._bench.clock.timed(lambda: self._run_all(live, ran))
        ran.retries = _retries() - retries
        ran.reserved, ran.allocated = live.peak.reserved, live.peak.allocated
        say(f"{name}: {ran.seconds:.1f} s, {ran.reserved / 1e9:.3f} GB reserved, {ran.wrong} wrong")
        return ran

    def _run_all(self, live: Live, ran: _Ran) -> None:
        for size in self._order:
            try:
                self._run_one(live, size, ran)
            except torch.OutOfMemoryError as error:  # the row says so
                ran.out_of_memory += 1
                say(f"{size}: {error}")

    @torch.inference_mode()
    def _run_one(self, live: Live, size: Size, ran: _Ran) -> None:
        output = forward(live.model, self._inputs[size], "cond")
        ran.forwards += 1
        if live is self._bench.resident:
            self._expected.setdefault(size, output)
        ran.wrong += not torch.equal(output, self._expected[size])
        if live is not self._bench.resident:
            stats = wanoffload.offloader(live.model).stats()
            ran.stayed.append(stats.resident_units + stats.kept_packed_units)
            ran.device_bytes = max(ran.device_bytes, stats.device_bytes)


def _retries() -> int:
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))


@contextmanager
def _little_left(bench: BudgetBench, live: Live) -> Iterator[int | None]:
    """Takes the device's memory but for LEFT_TO_AUTO, while the body runs. None: it is not
    counted."""
    if bench.device.type != "cuda":
        yield None
        return
    ballast = machine.DevicePeak.above_now(bench.device)
    free, _ = torch.cuda.mem_get_info(bench.device)
    taken = torch.empty(max(0, free - LEFT_TO_AUTO), dtype=torch.uint8, device=bench.device)
    ballast.settle()
    live.peak.other_came(ballast)
    try:
        yield free - taken.nbytes
    finally:
        live.peak.other_left(ballast)
        del taken
        machine.empty_caches()
