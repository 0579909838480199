"""How fast a device computes and how fast bytes come to it: each rate is work over seconds.

The work is a Wan block's: the feed-forward product and the attention of a 14B model, elementwise
traffic, copies as the engine makes them, launches from Python. Timing stands behind `Clock`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from wanoffload._C import HostStore
from wanoffload.engine import backend_for
from wanoffload.errors import OffloadError
from wanoffload.machine.clock import Clock, Run

HEADS, HEAD_SIZE = 40, 128
LAUNCHES = 300
"""Fewer than a device queues, or the host would wait for it."""
COMPUTE_S, TRAFFIC_S = 0.2, 0.05
"""How long a kernel is repeated, first to let clocks and power settle and then to be timed."""


@dataclass(frozen=True)
class Sizes:
    """How much work. Each kind holds at most `peak_bytes` of device memory, one kind at a time."""

    copy_bytes: int = 64 << 20
    rows: int = 4096
    inner: int = 5120
    columns: int = 13824
    tokens: int = 8192
    traffic_bytes: int = 512 << 20

    @property
    def peak_bytes(self) -> int:
        product = self.rows * self.inner + self.inner * self.columns + self.rows * self.columns
        attention = 4 * self.tokens * HEADS * HEAD_SIZE
        return max(self.copy_bytes, 2 * product, 2 * attention, self.traffic_bytes)

    @classmethod
    def fitting(cls, free_bytes: int) -> Sizes:
        """The full sizes, a half, ... or a sixteenth of them: what fits into half of what is free.

        Raises OffloadError where not even the smallest fits.
        """
        for part in (1, 2, 4, 8, 16):
            full = cls()
            sizes = cls(
                copy_bytes=full.copy_bytes // part,
                rows=full.rows // part,
                columns=full.columns // part,
                tokens=full.tokens // part,
                traffic_bytes=full.traffic_bytes // part,
            )
            if 2 * sizes.peak_bytes <= free_bytes:
                return sizes
        raise OffloadError(
            f"measuring the device needs {2 * sizes.peak_bytes / 1e6:.0f} MB of its memory, but "
            f"{free_bytes / 1e6:.0f} MB are free: free some, or describe the machine by hand, with "
            "Hardware(...)"
        )


def measure(device: torch.device, clock: Clock, sizes: Sizes) -> dict[str, float]:
    """The rates of `wanoffload.Hardware`, by name. Leaves torch's global random numbers alone."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Random, because a product of zeros takes less power, and so less time."""
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    with torch.inference_mode():
        return {
            **_copies(device, clock, sizes),
            "matmul_tflops": _matmul(clock, sizes, random) / 1e12,
            "attention_tflops": _attention(clock, sizes, random) / 1e12,
            "device_gb_per_s": _traffic(clock, sizes, random) / 1e9,
            "launch_us": _launch(clock, random) * 1e6,
        }


def _copies(device: torch.device, clock: Clock, sizes: Sizes) -> dict[str, float]:
    """Of the engine's own host memory, first as it is and then page-locked."""
    backend = backend_for(device)
    image = HostStore(backend).allocate(sizes.copy_bytes)
    image.touch()
    target = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0

    def copy() -> None:
        backend.copy_to_device(target.data_ptr(), image.address, image.nbytes, stream)

    pageable = _best(clock, copy, rounds=2, count=2)
    image.lock()
    link = _best(clock, copy, rounds=4, count=4)
    return {
        "link_gb_per_s": sizes.copy_bytes / link / 1e9,
        "pageable_gb_per_s": sizes.copy_bytes / pageable / 1e9,
    }


def _matmul(clock: Clock, sizes: Sizes, random: Callable[..., Tensor]) -> float:
    """FLOPs a second of a feed-forward's first product."""
    x, weight = random(sizes.rows, sizes.inner), random(sizes.columns, sizes.inner)
    seconds = _sustained(clock, lambda: functional.linear(x, weight), COMPUTE_S)
    return 2 * sizes.rows * sizes.inner * sizes.columns / seconds


def _attention(clock: Clock, sizes: Sizes, random: Callable[..., Tensor]) -> float:
    """FLOPs a second of self-attention, in the layout that a projection leaves."""
    query, key, value = (
        random(1, sizes.tokens, HEADS, HEAD_SIZE).transpose(1, 2) for _ in range(3)
    )
    seconds = _sustained(
        clock, lambda: functional.scaled_dot_product_attention(query, key, value), COMPUTE_S
    )
    return 4 * sizes.tokens**2 * HEADS * HEAD_SIZE / seconds


def _traffic(clock: Clock, sizes: Sizes, random: Callable[..., Tensor]) -> float:
    """Bytes read and written a second by a multiply-add of two fp32 tensors, into the first."""
    numel = sizes.traffic_bytes // 8
    x, y = (random(numel, dtype=torch.float32) for _ in range(2))
    seconds = _sustained(clock, lambda: torch.add(x, y, alpha=1e-6, out=x), TRAFFIC_S)
    return 3 * 4 * numel / seconds


def _launch(clock: Clock, random: Callable[..., Tensor]) -> float:
    """Host seconds of one operation on one number."""
    x = random(1)
    batches = [clock.host_seconds(lambda: torch.add(x, 1), LAUNCHES) for _ in range(7)]
    return statistics.median(batches[2:]) / LAUNCHES  # the first two warm up


def _best(clock: Clock, run: Run, *, rounds: int, count: int) -> float:
    """Seconds of one call in the fastest round, after one that is not counted."""
    clock.device_seconds(run, 1)
    return min(clock.device_seconds(run, count) for _ in range(rounds)) / count


def _sustained(clock: Clock, run: Run, warm_s: float) -> float:
    """Seconds of one call among many, when it has been running for `warm_s` seconds."""
    clock.device_seconds(run, 1)  # loads the kernel
    once = clock.device_seconds(run, 1)
    count = round(warm_s / once)
    if count < 2:  # so slow that one call is long enough
        return once
    clock.device_seconds(run, count)
    return clock.device_seconds(run, count) / count
