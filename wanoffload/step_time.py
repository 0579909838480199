"""How long a denoising step really takes, beside what was predicted."""

from __future__ import annotations

import logging

import torch

from wanoffload.machine.clock import Stamp, seconds_between, stamp

logger = logging.getLogger(__name__)

TOLERANCE = 0.1
"""A prediction that is further off than this part is worth a warning."""


class StepTime:
    """Times the second step of a generation: the first one finds cold caches and empty slots.

    From the start of the step's first forward to the end of its last. On CUDA by two timed events,
    recorded once; nothing waits for them. A generation that breaks off or ends before is forgotten.
    """

    def __init__(self, device: torch.device) -> None:
        self.predicted: float | None = None  # seconds; None: nothing is measured
        self._device = device
        self._forwards_per_step = 1
        self._done = 0  # whole forwards of this generation
        self._start: Stamp | None = None
        self._end: Stamp | None = None
        self._told = False

    def expect(self, seconds: float | None, forwards_per_step: int) -> None:
        """Starts anew, with another prediction. None: measure nothing."""
        self.predicted = seconds
        self._forwards_per_step = forwards_per_step
        self._told = False
        self._end = None
        self.restart()

    def restart(self) -> None:
        """The generation is over. What was measured stays."""
        if self._end is None:
            self._done = 0
            self._start = None

    def begin_forward(self) -> None:
        if self._measuring() and self._done == self._forwards_per_step:
            self._start = stamp(self._device)

    def end_forward(self, completed: bool) -> None:
        if not self._measuring():
            return
        if not completed:
            return self.restart()
        self._done += 1
        if self._done == 2 * self._forwards_per_step:
            self._end = stamp(self._device)

    def measured(self) -> float | None:
        """Seconds, once the device has got that far."""
        if self._start is None or self._end is None:
            return None
        return seconds_between(self._start, self._end)

    def tell(self) -> None:
        """Compares, in one line of the log, as soon as both are known."""
        measured = self.measured()
        if self._told or self.predicted is None or measured is None:
            return
        self._told = True
        off = measured / self.predicted - 1
        level = logging.WARNING if abs(off) > TOLERANCE else logging.INFO
        logger.log(
            level,
            "a step takes %.3f s; %.3f s were predicted (%+.1f %%)",
            measured,
            self.predicted,
            100 * off,
        )

    def _measuring(self) -> bool:
        return self.predicted is not None and self._end is None
