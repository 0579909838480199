"""What a forward is up against, found out while it runs: how long its blocks compute, and how fast
bytes come to the device and are unpacked there.

So packed blocks are kept on the device where the link binds, and plain ones where it does not.
"""

from __future__ import annotations

import time
from collections.abc import Hashable

import torch
from torch import Tensor

from wanoffload._C import Backend, HostImage
from wanoffload.machine.clock import Run, clock_of
from wanoffload.residency import Rates

COPIED_BYTES = 64 << 20
ROUNDS = 4
"""Copies, of which the quickest counts."""
TINY_S = 1e-9
"""Less is not told from nothing."""
UNPACK_TRAFFIC = 1.7
"""Bytes that unpacking reads and writes, for each it gives; a copy has 2 (docs/packing.md)."""

Stamp = torch.cuda.Event | float


class BlockTime:
    """How long a block computes, by the shapes of a forward's inputs.

    In the second forward in a row of the same shapes one block is timed: from when its weights are
    there, so waiting does not count. On CUDA by two events, recorded once; nothing waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.timed = -1  # the unit that is timed in this forward; -1: none
        self._device = device
        self._key: Hashable = None
        self._again = False
        self._stamps: dict[Hashable, list[Stamp]] = {}
        self._seconds: dict[Hashable, float] = {}

    def begin_forward(self, key: Hashable, unit: int) -> None:
        """A forward of these shapes begins; `unit` is the one to be timed, if one is."""
        self._again = key == self._key
        self._key = key
        self.timed = unit if self._again and key not in self._stamps else -1

    @property
    def again(self) -> bool:
        """Whether the forward before had the same shapes."""
        return self._again

    def stamp(self) -> None:
        """The unit that is timed has come, or has been used."""
        row = self._stamps.setdefault(self._key, [])
        row.append(self._now())
        if len(row) == 2:
            self.timed = -1

    def end_forward(self, completed: bool) -> None:
        """What a forward that broke off has of it is forgotten."""
        self.timed = -1
        if not completed or len(self._stamps.get(self._key, ())) != 2:
            self._stamps.pop(self._key, None)

    def seconds(self, key: Hashable) -> float | None:
        """Of the block that was timed; None as long as the device has not got that far."""
        if key not in self._seconds and (stamps := self._stamps.get(key)) is not None:
            first, last = stamps
            if isinstance(first, float) or isinstance(last, float):
                assert isinstance(first, float)
                assert isinstance(last, float)
                self._seconds[key] = last - first
            elif last.query():
                self._seconds[key] = first.elapsed_time(last) / 1e3
        return self._seconds.get(key)

    def _now(self) -> Stamp:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class LearnedRates:
    """Rates of this device, as a model's own bytes meet them. Measured once."""

    def __init__(self, device: torch.device, backend: Backend) -> None:
        self._device = device
        self._backend = backend
        self._measured: tuple[float, float] | None = None

    @property
    def known(self) -> bool:
        return self._measured is not None

    def with_compute(self, compute_s: float) -> Rates:
        """For a forward that computes so long."""
        assert self._measured is not None
        link, unpacking = self._measured
        return Rates(link_gb_per_s=link, decode_gb_per_s=unpacking, compute_s=compute_s)

    def measure(self, image: HostImage, memory: Tensor) -> None:
        """Waits for the device. `image`: bytes to be copied. `memory`: of the device, uint8, which
        nobody uses; it is overwritten."""
        nbytes = min(image.nbytes, COPIED_BYTES, memory.numel() // 2)
        there, beside = memory[:nbytes], memory[nbytes : 2 * nbytes]
        cuda = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device).cuda_stream if cuda else 0

        def copy() -> None:
            self._backend.copy_to_device(there.data_ptr(), image.address, nbytes, stream)

        over_link = self._quickest(copy)
        within = self._quickest(lambda: beside.copy_(there))
        self._measured = nbytes / over_link / 1e9, nbytes / within / 1e9 * 2 / UNPACK_TRAFFIC

    def _quickest(self, run: Run) -> float:
        clock = clock_of(self._device)
        return max(min(clock.device_seconds(run, 1) for _ in range(ROUNDS)), TINY_S)
