"""Steps of one model after the other, with the peak of the device's memory, and what comes out.

Cheaper than turns, for models of which a step takes seconds: one that has the device for itself is
warmed up, and then some steps are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import machine
from benchmarks.contenders import Counters
from benchmarks.harness import Spread
from benchmarks.models import Inputs, ModelSpec, Size, forward, make_inputs, model_bytes, step
from benchmarks.timing import Clock
from benchmarks.turns import FORWARDS_PER_STEP, fetches_are_right

MEASURED_S = 3.0  # about how long steps are measured; at least one is
MAX_STEPS = 8
LONG_S = 1.0  # beside a forward this long, what was fetched before its step is little


@dataclass
class Outcome:
    """What a model gave at one size: steps in ms, its device memory in bytes, right or not."""

    step_ms: Spread
    device_peak_allocated: int
    device_peak_reserved: int
    equal: bool
    fetches_right: bool = True

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


@dataclass
class _Steps:
    """What was run: all forwards, the times of the steps, and the outputs of the last one."""

    forwards: int
    step_ms: list[float]
    outputs: list[torch.Tensor]


def _uncounted() -> None:
    """A model that is not offloaded counts nothing."""


class StepMeter:
    """Measures models of one kind. The first, the resident one, says what is expected of all."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self._spec = spec
        self._device = device
        self._clock = Clock(device)
        self._blocks = model_bytes(spec).block_count
        self._peak = machine.DevicePeak(device)
        self._expected: dict[Size, list[torch.Tensor]] = {}  # in host memory

    def start(self) -> None:
        """A model is about to be made: what is on the device now is not its own."""
        machine.release_caches()
        clear_workspaces()
        self._peak = machine.DevicePeak.above_now(self._device)

    @torch.inference_mode()
    def load_libraries(self, model: nn.Module) -> None:
        """A small forward: what is loaded at the first use would look like a slow forward."""
        side = 4 * self._spec.spatial
        inputs = make_inputs(self._spec, Size(side, side, 1), self._device)
        forward(model, inputs, "cond")

    @torch.inference_mode()
    def measure(
        self,
        size: Size,
        model: nn.Module,
        counters: Callable[[], Counters | None] = _uncounted,
    ) -> Outcome:
        """Steps in a row, after a warm-up."""
        inputs = self._begin(size)
        before = counters()
        with self._peak.watch():
            steps = self._run(model, inputs)
        after = counters()
        fetched = True
        if before is not None and after is not None:
            fetched = fetches_are_right(before, after, steps.forwards, self._blocks)
        return self._outcome(Spread.of(steps.step_ms), self._equal(size, steps.outputs), fetched)

    @torch.inference_mode()
    def run_once(self, size: Size, model: nn.Module) -> Outcome:
        """One forward, without warm-up; its time, for two of them, is not one to go by."""
        inputs = self._begin(size)
        with self._peak.watch():
            output, seconds = self._clock.timed(lambda: forward(model, inputs, "uncond"))
        equal = torch.equal(output.cpu(), self._expected[size][-1])
        return self._outcome(Spread.of([2e3 * seconds]), equal, True)

    def _begin(self, size: Size) -> Inputs:
        machine.empty_caches()
        self._peak.restart()
        return make_inputs(self._spec, size, self._device)

    def _run(self, model: nn.Module, inputs: Inputs) -> _Steps:
        forwards, seconds = self._warm_up(model, inputs)
        count = max(1, min(MAX_STEPS, round(MEASURED_S / (FORWARDS_PER_STEP * seconds))))
        if seconds < LONG_S:  # what was fetched during the wait would make the first step quick
            forward(model, inputs, "uncond")
            forwards += 1
        marks = [self._clock.mark()]
        for _ in range(count):
            outputs = step(model, inputs)
            marks.append(self._clock.mark())
        self._clock.synchronize()
        forwards += FORWARDS_PER_STEP * count
        return _Steps(forwards, self._clock.between_ms(marks), outputs)

    def _warm_up(self, model: nn.Module, inputs: Inputs) -> tuple[int, float]:
        """Forwards that were run, and the seconds of the last one."""
        _, seconds = self._clock.timed(lambda: forward(model, inputs, "cond"))
        if seconds >= LONG_S:
            return 1, seconds
        _, seconds = self._clock.timed(lambda: forward(model, inputs, "cond"))
        return 2, seconds

    def _equal(self, size: Size, outputs: list[torch.Tensor]) -> bool:
        """Whether the outputs are the resident model's; of that one, whether they are numbers."""
        on_host = [output.cpu() for output in outputs]
        if size not in self._expected:
            self._expected[size] = on_host
            return all(bool(output.isfinite().all()) for output in on_host)
        return all(map(torch.equal, on_host, self._expected[size]))

    def _outcome(self, step_ms: Spread, equal: bool, fetches_right: bool) -> Outcome:
        peak = self._peak
        return Outcome(step_ms, peak.allocated, peak.reserved, equal, fetches_right)


def clear_workspaces() -> None:
    """Gives back the memory of cuBLAS, which torch takes at the first product and keeps."""
    bindings: Any = torch._C
    if hasattr(bindings, "_cuda_clearCublasWorkspaces"):
        bindings._cuda_clearCublasWorkspaces()
