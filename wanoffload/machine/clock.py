"""Seconds that work takes: on a device by its own timed events, on the host by its clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Run = Callable[[], object]


class Clock(Protocol):
    """Seconds that `count` calls take, on an idle device."""

    def device_seconds(self, run: Run, count: int) -> float:
        """From the first call's start to the last one's end on the device."""

    def host_seconds(self, run: Run, count: int) -> float:
        """Until the host has given everything to the device."""


class CudaClock:
    """Timed events on the device's current stream. Waits for the device before and after."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def device_seconds(self, run: Run, count: int) -> float:
        make_event: Any = torch.cuda.Event
        start, end = make_event(enable_timing=True), make_event(enable_timing=True)
        torch.cuda.synchronize(self._device)
        start.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def host_seconds(self, run: Run, count: int) -> float:
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        seconds = time.perf_counter() - start
        torch.cuda.synchronize(self._device)
        return seconds


class HostClock:
    """The host is the device, and is done when a call returns."""

    def device_seconds(self, run: Run, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            run()
        return time.perf_counter() - start

    def host_seconds(self, run: Run, count: int) -> float:
        return self.device_seconds(run, count)


def clock_of(device: torch.device) -> Clock:
    """The clock of a torch device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


Stamp = torch.cuda.Event | float
"""A moment: on CUDA a timed event, on the host what its clock says."""


def stamp(device: torch.device) -> Stamp:
    """When the device's current stream gets here. Nothing waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(first: Stamp, last: Stamp) -> float | None:
    """None as long as the device has not got to the last."""
    if isinstance(first, float) or isinstance(last, float):
        assert isinstance(first, float)
        assert isinstance(last, float)
        return last - first
    return float(first.elapsed_time(last)) / 1e3 if last.query() else None
