"""Time on the compute stream: events on a GPU, the wall clock where a call does the work itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class Clock:
    """Marks on the device's compute stream and the milliseconds between them.

    On a GPU a mark is a timed event on the current stream: making one waits for nothing, reading
    one needs :meth:`synchronize` first. On the CPU it is the wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """Notes the point that the compute stream has reached."""
        if self.device.type != "cuda":
            return time.perf_counter()
        make_event: Any = torch.cuda.Event
        event = make_event(enable_timing=True)
        event.record()
        return event

    def synchronize(self) -> None:
        """Waits until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def between_ms(self, marks: Sequence[Any]) -> list[float]:
        """Milliseconds between neighbouring marks; all of them must have been reached."""
        pairs = pairwise(marks)
        if self.device.type != "cuda":
            return [(end - start) * 1e3 for start, end in pairs]
        return [float(start.elapsed_time(end)) for start, end in pairs]

    def timed(self, work: Callable[[], Result]) -> tuple[Result, float]:
        """What ``work`` returns, and its wall seconds with everything it gave the device."""
        self.synchronize()
        start = time.perf_counter()
        result = work()
        self.synchronize()
        return result, time.perf_counter() - start


def each_timed(works: Iterable[Callable[[], object]]) -> float:
    """Wall seconds to do them all, one after the other."""
    start = time.perf_counter()
    for work in works:
        work()
    return time.perf_counter() - start
