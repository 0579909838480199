"""The part ``steps``: one model a form, one budget after the other, beside the resident model.

With C the resident step, S the bytes that the budget's plan streams in a step and R the link's
rate, the floor is ``max(C, S / R)``. Every budget has its turn between two of the resident model,
whose mean is its C: so a card that slows down as it warms up does so on both sides.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import wanoffload
from benchmarks.budget import predicted
from benchmarks.budget.bench import FORMS, LEAST, BudgetBench, name_of, take_as_planned
from benchmarks.contenders import Live
from benchmarks.engine import Found
from benchmarks.harness import Spread, say
from benchmarks.loading.claims import AT_MOST, Claim
from benchmarks.models import Size, make_inputs
from benchmarks.packing.bench import as_json
from benchmarks.predict import known_hardware
from benchmarks.predictions import inputs_of_prediction
from benchmarks.turns import FORWARDS_PER_STEP, Measure, Turns
from wanoffload import Offloader, WrapError
from wanoffload.machine.hardware import Hardware

STEPS = {1: 3}  # of a turn, by frames
STEPS_OF_LONG = 2
STEPS_OF_RESIDENT = {1: 2}
BESIDE_FLOOR = 1.03
MONOTONE = 1.01
BESIDE_NO_BUDGET = 1.01


def steps(bench: BudgetBench) -> Found:
    """A row for each form, size and budget."""
    hardware = known_hardware(bench.device)
    for form in FORMS:
        for size in bench.sizes:
            if bench.session.out_of_time():
                return
            yield from _Sweep(bench, form, size, hardware).run()


@dataclass
class _Seen:
    """Steps under the budgets so far, as multiples of the resident model's."""

    no_budget: float | None = None
    smaller: float | None = None


@dataclass
class _Sweep:
    """All budgets of one form at one size."""

    bench: BudgetBench
    form: str
    size: Size
    hardware: Hardware
    seen: _Seen = field(default_factory=_Seen)

    def run(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """No budget first, then the budgets from the smallest on."""
        bench = self.bench
        self.measure = Measure(
            bench.clock, make_inputs(bench.spec, self.size, bench.device), bench.bytes
        )
        steps = STEPS_OF_RESIDENT.get(self.size.frames, 1)
        self.resident = self.measure.warm_up(bench.resident, 0.0, steps)
        live = bench.live(self.form)
        offloader = wanoffload.offloader(live.model)
        self.measure.take(bench.resident, self.resident)
        try:
            for budget in (None, *bench.budgets(self.form, self.size)):
                key = {"form": self.form, "size": str(self.size), "budget": name_of(budget)}
                try:
                    offloader.set_budget(budget)
                except WrapError as error:
                    say(f"{name_of(budget)}: {error}")
                    yield key, _too_small(budget, error)
                    continue
                yield key, self._row(live, offloader, budget)
        finally:
            offloader.set_budget(None)

    def _row(self, live: Live, offloader: Offloader, budget: int | None) -> dict[str, Any]:
        gbps = [self.bench.link.measure()]
        mine = self._turn(live, offloader)
        gbps.append(self.bench.link.measure())
        self.measure.take(self.bench.resident, self.resident)
        values = {
            "verified": mine.equal and mine.fetches_right,
            "equal": mine.equal,
            "fetches_right": mine.fetches_right,
            "budget": budget,
            "too_small": None,
            **_times(mine, self.resident.turn_ms[-2:], Spread.of(gbps)),
            **_memory(live, offloader),
            **inputs_of_prediction(self.bench.spec, self.size, self.hardware),
        }
        values["claims"] = as_json(_claims(self.form, self.size, values, self.seen))
        self._remember(budget, values["x_resident"])
        self._tell(budget, values)
        return values

    def _turn(self, live: Live, offloader: Offloader) -> Turns:
        """Steps once what is to stay is there."""
        steps = STEPS.get(self.size.frames, STEPS_OF_LONG)
        for _ in range(2):  # what is found out in the first may change the plan
            turns = self.measure.warm_up(live, 0.0, steps)
        turns.streamed = offloader.residency.streamed_bytes
        take_as_planned(self.measure, live, turns)
        return turns

    def _remember(self, budget: int | None, x_resident: float) -> None:
        if budget is None:
            self.seen.no_budget = x_resident
        else:
            self.seen.smaller = x_resident

    def _tell(self, budget: int | None, values: dict[str, Any]) -> None:
        says = predicted.Predicted.of(self.bench.spec.name, self.form, values)
        say(
            f"{self.size} {self.form}, {name_of(budget)}: {values['step_ms']['median']:.1f} ms, "
            f"floor {values['floor_ms']:.1f}, predicted {says.step_ms:.1f}; "
            f"{values['device_bytes'] / 1e9:.3f} GB, predicted {says.device_bytes / 1e9:.3f}"
        )


def _too_small(budget: int | None, error: WrapError) -> dict[str, Any]:
    """A budget that this form can't keep is an answer, too."""
    return {"verified": True, "budget": budget, "too_small": str(error), "claims": []}


def _times(mine: Turns, resident_ms: list[float], gbps: Spread) -> dict[str, Any]:
    """In ms, of steps."""
    assert mine.streamed is not None
    resident = statistics.fmean(resident_ms)
    link_ms = FORWARDS_PER_STEP * mine.streamed / gbps.median / 1e6
    floor = max(resident, link_ms)
    return {
        "step_ms": Spread.of(mine.step_ms).as_json(),
        "resident_ms": resident,
        "link_gbps": gbps.as_json(),
        "link_ms": link_ms,
        "floor_ms": floor,
        "x_resident": mine.turn_ms[-1] / resident,
        "x_floor": mine.turn_ms[-1] / floor,
    }


def _memory(live: Live, offloader: Offloader) -> dict[str, Any]:
    """Bytes on the device: of the weights, at the peak above what stood there before, and as
    planned."""
    plan, stats = offloader.residency, offloader.stats()
    return {
        "device_bytes": stats.device_bytes,
        "device_peak_allocated": live.peak.allocated,
        "device_peak_reserved": live.peak.reserved,
        "plan": {
            "units": stats.units,
            "resident": stats.resident_units,
            "kept_packed": stats.kept_packed_units,
            "streamed": stats.units - stats.resident_units - stats.kept_packed_units,
            "depth": plan.depth,
            "slots": plan.slots,
            "slot_bytes": plan.slot_bytes,
            "staging_bytes": plan.staging_bytes,
            "device_bytes": plan.device_bytes,
            "streamed_bytes": plan.streamed_bytes,
            "decoded_bytes": plan.decoded_bytes,
        },
    }


def _claims(form: str, size: Size, values: dict[str, Any], seen: _Seen) -> list[Claim]:
    """What was measured beside the floor, the budget, and other budgets."""
    step_ms, floor = values["step_ms"]["median"], values["floor_ms"]
    claims = [Claim("step", step_ms, floor, "its floor, max(C, S / R)", "ms", BESIDE_FLOOR)]
    x_resident, budget = values["x_resident"], values["budget"]
    claims.append(_beside_resident(form, size, budget, values))
    if budget is None:
        return claims
    held = values["device_bytes"] / 1e9
    claims.append(Claim("weights on the device", held, budget / 1e9, "budget", "GB", 1.0, AT_MOST))
    others = (
        (seen.smaller, "the next smaller budget", MONOTONE),
        (seen.no_budget, "no budget", BESIDE_NO_BUDGET),
    )
    for other, name, bound in others:
        if other is not None:
            claims.append(Claim("step", x_resident, other, name, "x resident", bound))
    return claims


def _beside_resident(form: str, size: Size, budget: int | None, values: dict[str, Any]) -> Claim:
    """Asked of one budget: equal speed at the least memory."""
    least, asked = LEAST.get((form, size.frames), (None, None))
    resident = values["resident_ms"]
    bound = asked if budget is not None and budget == least else None
    return Claim("step", values["x_resident"] * resident, resident, "resident", "ms", bound)
