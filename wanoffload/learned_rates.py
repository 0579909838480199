"""What a forward is up against, found out while it runs: how long its blocks compute, and how fast
bytes come to the device and are unpacked there.

So packed blocks are kept on the device where the link binds, and plain ones where it does not.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

import torch
from torch import Tensor

from wanoffload._C import Backend, HostImage, Image
from wanoffload.host_tensor import ordinary_tensors
from wanoffload.machine.clock import Run, Stamp, clock_of, seconds_between, stamp
from wanoffload.packing import stored_image
from wanoffload.residency import Rates

COPIED_BYTES = 64 << 20
ROUNDS = 4
"""Copies, of which the quickest counts."""
TINY_S = 1e-9
"""Less is not told from nothing."""
UNPACKED = 1.28
"""Bytes that unpacking gives in the time in which a copy within the device copies one. It reads and
writes 1.7, a copy 2, and is 1.09 times as quick (docs/results-packing-h100.md)."""
HELD_UP = 2.0
"""A block that takes so many times as long as most was held up by something else."""
MOST_UNPACKING = 0.5
"""Of a device's time: more is not believed."""


@dataclass(frozen=True)
class TimedForward:
    """Of one forward: `seconds` by unit, from when its weights were there; `span`, from the first
    one's beginning to the last one's end; plain bytes that were `unpacked` beside them."""

    seconds: dict[int, float]
    span: float
    unpacked: int

    def compute_s(self, plain_bytes: Sequence[int], decode_gb_per_s: float) -> float:
        """Of a whole forward without unpacking, whose share each block was lengthened by.

        `plain_bytes`: of each unit.
        """
        rates = [taken / max(plain_bytes[unit], 1) for unit, taken in self.seconds.items()]
        usual = [rate for rate in rates if rate <= HELD_UP * median(rates)]
        share = self.unpacked / (decode_gb_per_s * 1e9) / max(self.span, TINY_S)
        return fmean(usual) * sum(plain_bytes) * (1 - min(share, MOST_UNPACKING))


@dataclass
class _Stamps:
    """Of a forward: when each unit's weights were there, and when it had been computed, and when
    the first were and the last had."""

    begun: dict[int, Stamp] = field(default_factory=dict)
    ended: dict[int, Stamp] = field(default_factory=dict)
    first: Stamp | None = None
    last: Stamp | None = None
    unpacked: int = 0

    def read(self) -> TimedForward | None:
        """None as long as the device has not got that far, or where no unit was used."""
        seconds: dict[int, float] = {}
        for unit, end in self.ended.items():
            taken = seconds_between(self.begun[unit], end)
            if taken is None:
                return None
            seconds[unit] = taken
        if self.first is None or self.last is None:
            return None
        span = seconds_between(self.first, self.last)
        assert span is not None
        return TimedForward(seconds, span, self.unpacked)


class BlockTimes:
    """How long blocks compute, by the shapes of a forward's inputs.

    In the second forward in a row of the same shapes each is timed: from when its weights are
    there, so waiting does not count. On CUDA by events, recorded once; nothing waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.timing = False
        """Whether the blocks of this forward are timed."""
        self._device = device
        self._key: Hashable = None
        self._again = False
        self._now = _Stamps()
        self._stamps: dict[Hashable, _Stamps] = {}  # of the forwards that have not been read
        self._timed: dict[Hashable, TimedForward] = {}

    def begin_forward(self, key: Hashable) -> None:
        """A forward of these shapes begins."""
        self._again = key == self._key
        self._key = key
        self.timing = self._again and key not in self._stamps and key not in self._timed
        if self.timing:
            self._now = _Stamps()

    @property
    def again(self) -> bool:
        """Whether the forward before had the same shapes."""
        return self._again

    def come(self, unit: int) -> None:
        """The unit's weights are there."""
        now = self._now.begun[unit] = stamp(self._device)
        if self._now.first is None:
            self._now.first = now

    def used(self, unit: int) -> None:
        """It has been computed."""
        if unit in self._now.begun:
            self._now.last = self._now.ended[unit] = stamp(self._device)

    def end_forward(self, completed: bool, unpacked: int) -> None:
        """`unpacked`: plain bytes, beside its blocks. What a forward that broke off has of them is
        forgotten."""
        if self.timing and completed:
            self._now.unpacked = unpacked
            self._stamps[self._key] = self._now
        self.timing = False

    def timed(self, key: Hashable) -> TimedForward | None:
        """None as long as the device has not got that far."""
        if key in self._stamps and (found := self._stamps[key].read()) is not None:
            self._timed[key] = found
            del self._stamps[key]  # the events are not needed any more
        return self._timed.get(key)


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

    def of(self, forward: TimedForward, plain_bytes: Sequence[int]) -> Rates:
        """For others like it. `plain_bytes`: of each unit."""
        assert self._measured is not None
        return self.with_compute(forward.compute_s(plain_bytes, self._measured[1]))

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
        self._measured = (
            nbytes / over_link / 1e9,
            nbytes / within / 1e9 * UNPACKED,
        )

    def _quickest(self, run: Run) -> float:
        clock = clock_of(self._device)
        return max(min(clock.device_seconds(run, 1) for _ in range(ROUNDS)), TINY_S)


class ForwardRates:
    """What the forwards of one model are up against, told when those of some shapes come again."""

    def __init__(self, device: torch.device, backend: Backend) -> None:
        self.blocks = BlockTimes(device)
        self.learned = LearnedRates(device, backend)
        self._key: Hashable = None
        self._told: Hashable = None  # of these shapes
        self._timed: TimedForward | None = None  # of this forward's shapes

    def measure(self, images: Iterable[Image], memory: Tensor) -> None:
        """With the largest of these images that is page-locked, if there are both. Waits for the
        device. `memory`: nobody uses it; it is overwritten."""
        stored = [stored_image(each) for each in images]
        locked = [each for each in stored if isinstance(each, HostImage) and each.locked]
        largest = max(locked, key=lambda each: each.nbytes, default=None)
        if largest is not None and memory.numel():
            with ordinary_tensors():
                self.learned.measure(largest, memory)

    def begin_forward(self, key: Hashable) -> None:
        """A forward of these shapes begins."""
        self._key = key
        self.blocks.begin_forward(key)
        self._timed = self.blocks.timed(key)

    def news(self, plain_bytes: Sequence[int]) -> Rates | None:
        """The rates, if this forward's shapes come again and others were told of before.

        `plain_bytes`: of each unit.
        """
        ready = self.learned.known and self.blocks.again and self._key != self._told
        if not ready or self._timed is None:
            return None
        self._told = self._key
        return self.learned.of(self._timed, plain_bytes)
