"""What a forward is up against, found out while it runs: how long its blocks compute, and how fast
bytes come to the device and are unpacked there.

So packed blocks are kept on the device where the link binds, and plain ones where it does not.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from wanoffload._C import Backend, HostImage, Image
from wanoffload.host_tensor import ordinary_tensors
from wanoffload.machine.clock import Run, Stamp, clock_of, seconds_between, stamp
from wanoffload.packing import stored_image
from wanoffload.residency import Rates
from wanoffload.staging import BESIDE_COMPUTE

COPIED_BYTES = 64 << 20
ROUNDS = 4
"""Copies, of which the quickest counts."""
TINY_S = 1e-9
"""Less is not told from nothing."""
UNPACKED = 1.28
"""Bytes that unpacking gives in the time in which a copy within the device copies one. It reads and
writes 1.7, a copy 2, and is 1.09 times as quick (docs/results-packing-h100.md)."""


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
        self._begun: dict[int, Stamp] = {}
        self._stamps: dict[Hashable, dict[int, tuple[Stamp, Stamp]]] = {}
        self._seconds: dict[Hashable, dict[int, float]] = {}

    def begin_forward(self, key: Hashable) -> None:
        """A forward of these shapes begins."""
        self._again = key == self._key
        self._key = key
        self.timing = self._again and key not in self._stamps
        if self.timing:
            self._begun = {}
            self._stamps[key] = {}

    @property
    def again(self) -> bool:
        """Whether the forward before had the same shapes."""
        return self._again

    def come(self, unit: int) -> None:
        """The unit's weights are there."""
        self._begun[unit] = stamp(self._device)

    def used(self, unit: int) -> None:
        """It has been computed."""
        if unit in self._begun:
            self._stamps[self._key][unit] = self._begun[unit], stamp(self._device)

    def end_forward(self, completed: bool) -> None:
        """What a forward that broke off has of them is forgotten."""
        if self.timing and not completed:
            del self._stamps[self._key]
        self.timing = False

    def seconds(self, key: Hashable) -> dict[int, float]:
        """By unit; empty as long as the device has not got that far."""
        stamps = {} if self.timing else self._stamps.get(key, {})
        found = {unit: seconds_between(*row) for unit, row in stamps.items()}
        known = {unit: seconds for unit, seconds in found.items() if seconds is not None}
        if known and len(known) == len(found):
            self._seconds[key] = known
            self._stamps[key] = {}  # their events are not needed any more
        return self._seconds.get(key, {})


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
        self._measured = (
            nbytes / over_link / 1e9 * BESIDE_COMPUTE,
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
        self._seconds: dict[int, float] = {}  # of this forward's blocks, as far as they are known

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
        self._seconds = self.blocks.seconds(key)

    def news(self, plain_bytes: Sequence[int]) -> Rates | None:
        """The rates, if this forward's shapes come again and others were told of before.

        `plain_bytes`: of each unit.
        """
        ready = self.learned.known and self.blocks.again and self._seconds
        if not ready or self._key == self._told:
            return None
        self._told = self._key
        # Unpacking makes some blocks take longer; it is counted apart.
        fastest = min(time / max(plain_bytes[unit], 1) for unit, time in self._seconds.items())
        return self.learned.with_compute(fastest * sum(plain_bytes))
