"""The link between host and device: how fast one block's bytes come over it."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.timing import Clock


def _own_stream(device: torch.device) -> Any:
    make_stream: Any = torch.cuda.Stream
    return make_stream(device) if device.type == "cuda" else None


class LinkProbe:
    """Copies of one size from the host into device memory, timed on a stream of their own.

    Args:
        device: where the bytes go; on the CPU the copy is one in memory.
        host: the bytes to be copied, in whatever memory; overwritten with random ones.
    """

    def __init__(self, device: torch.device, host: torch.Tensor) -> None:
        self._host = host
        self._source = torch.randint(0, 256, host.shape, dtype=torch.uint8, device=device)
        self._host.copy_(self._source)
        self._target = torch.zeros_like(self._source)
        self._stream = _own_stream(device)
        self._clock = Clock(device)
        self.measure(1)
        if not self.verified():
            raise RuntimeError("the link's probe copied wrong bytes")

    @classmethod
    def page_locked(cls, device: torch.device, size: int) -> LinkProbe:
        """A probe of ``size`` bytes in memory that torch has page-locked."""
        locked = device.type == "cuda"
        return cls(device, torch.empty(size, dtype=torch.uint8, pin_memory=locked))

    def verified(self) -> bool:
        """Whether the bytes that arrived are those that were sent."""
        return torch.equal(self._target, self._source)

    def measure(self, copies: int = 6) -> float:
        """GB/s over ``copies`` copies in a row. Waits for the device before and after."""
        self._clock.synchronize()
        with torch.cuda.stream(self._stream):
            marks = [self._clock.mark()]
            for _ in range(copies):
                self._target.copy_(self._host, non_blocking=True)
            marks.append(self._clock.mark())
        self._clock.synchronize()
        (milliseconds,) = self._clock.between_ms(marks)
        return copies * self._host.nbytes / milliseconds / 1e6
