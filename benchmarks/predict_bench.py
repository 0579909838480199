"""One model, run in every way that the planner compares: steps, memory, and the bits that come out.

The ways come one after the other, so that each has the device for itself: resident; from a copy in
host memory, streamed with each number of blocks ahead; and whole. The way of a whole DiT to the
device is timed alone. Once there its steps are those of a resident model: the ones of this run are
taken, and a forward shows that its output is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.contenders import Wanoffload
from benchmarks.harness import Session, Spread, code_fingerprint, peer_fingerprint, say
from benchmarks.models import ModelSpec, Size, build, copy_to_host
from benchmarks.predictions import (
    NAME,
    PLANS,
    STEPS_A_USE,
    Predicted,
    inputs_of_prediction,
    placement_of,
)
from benchmarks.step_meter import Outcome, StepMeter
from benchmarks.timing import Clock
from wanoffload import unwrap
from wanoffload.machine.hardware import Hardware
from wanoffload.pipelines.parking import Parked
from wanoffload.policy.cost import RESIDENT, WHOLE

Wanted = Mapping[Size, Sequence[str]]


def key_of(spec: ModelSpec, size: Size, plan: str) -> dict[str, Any]:
    """The key of a row."""
    return {"model": spec.name, "size": str(size), "plan": plan}


def fingerprint(session: Session, plan: str) -> str:
    """The code that a row is about; a resident model has none of ours."""
    if plan == RESIDENT:
        return peer_fingerprint()
    return code_fingerprint(session.options.label)


class PredictBench:
    """Measures what is wanted of one model and writes it down."""

    def __init__(
        self, session: Session, spec: ModelSpec, hardware: Hardware, wanted: Wanted
    ) -> None:
        self._session = session
        self._spec = spec
        self._hardware = hardware
        self._wanted = wanted
        self._device = session.device
        self._clock = Clock(session.device)
        self._meter = StepMeter(spec, session.device)
        self._resident: dict[Size, Outcome] = {}

    def run(self) -> None:
        """Everything that is wanted. Stops at the deadline, between two ways to run."""
        model = self._run_resident()
        for plan in PLANS[1:]:
            sizes = [size for size, plans in self._wanted.items() if plan in plans]
            if not sizes:
                continue
            if self._session.out_of_time():
                return
            say(f"{self._spec.name}: {plan}")
            if plan == WHOLE:
                self._run_whole(model, sizes)
            else:
                self._run_streamed(model, plan, sizes)

    def _run_resident(self) -> nn.Module:
        """Measures the model on the device, and gives back a copy in host memory."""
        say(f"{self._spec.name}: building it on {self._device}")
        self._meter.start()
        model = build(self._spec, self._device)
        self._meter.load_libraries(model)
        for size in self._wanted:
            self._resident[size] = self._meter.measure(size, model)
            self._record(size, RESIDENT, self._resident[size])
        return copy_to_host(self._spec, model)

    def _run_streamed(self, model: nn.Module, plan: str, sizes: Sequence[Size]) -> None:
        placement = placement_of(plan)
        assert placement.prefetch is not None
        contender = Wanoffload(placement.prefetch, pack=placement.packed > 0)
        self._meter.start()
        with streaming(model, contender, self._device):
            for size in sizes:
                outcome = self._meter.measure(size, model, lambda: contender.counters(model))
                self._record(size, plan, outcome)

    def _run_whole(self, model: nn.Module, sizes: Sequence[Size]) -> None:
        """Brings the model to the device once, and runs a forward of each size there."""
        with parked(model, self._device) as whole:
            self._meter.start()
            _, seconds = self._clock.timed(whole.bring_in)
            say(f"{self._spec.name}: brought to the device in {1e3 * seconds:.1f} ms")
            for size in sizes:
                outcome = self._meter.run_once(size, model)
                resident_ms = self._resident[size].step_ms
                outcome.step_ms = later(resident_ms, 1e3 * seconds / STEPS_A_USE)
                self._record(size, WHOLE, outcome, move_ms=1e3 * seconds)

    def _record(self, size: Size, plan: str, outcome: Outcome, **more: Any) -> None:
        if plan not in self._wanted[size]:
            return
        values = {
            "verified": outcome.equal and outcome.fetches_right,
            **outcome.as_json(),
            **more,
            **inputs_of_prediction(self._spec, size, self._hardware),
        }
        key = key_of(self._spec, size, plan)
        row = self._session.record(NAME, key, fingerprint(self._session, plan), values)
        predicted = Predicted.of(row)
        say(
            f"{size} {plan}: {predicted.measured_ms:.2f} ms, predicted {predicted.step_ms:.2f}; "
            f"{predicted.measured_peak / 1e9:.3f} GB, predicted "
            f"{predicted.candidate.device_peak_bytes / 1e9:.3f}; verified {row.verified}"
        )


def later(spread: Spread, added: float) -> Spread:
    """The same spread, each value greater by ``added``."""
    return Spread(spread.median + added, spread.min + added, spread.max + added, spread.count)


@contextmanager
def streaming(model: nn.Module, contender: Wanoffload, device: torch.device) -> Iterator[None]:
    """A model in host memory that is streamed while the body runs."""
    contender.apply(model, device)
    try:
        yield
    finally:
        unwrap(model)


@contextmanager
def parked(model: nn.Module, device: torch.device) -> Iterator[Parked]:
    """A model in host memory that waits in page-locked memory while the body runs."""
    whole = Parked(model, device)
    try:
        whole.park(lambda nbytes: None)
        yield whole
    finally:
        whole.give_up()
