"""The machine: memory and rates, as written by hand or as measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wanoffload.sizes import parse_bytes

if TYPE_CHECKING:
    import torch

PLATFORMS = ("cuda", "cpu", "rocm", "npu", "mps", "xpu")
_SIZES = ("device_memory", "host_memory")
RATES = (
    "link_gb_per_s",
    "pageable_gb_per_s",
    "matmul_tflops",
    "attention_tflops",
    "device_gb_per_s",
    "launch_us",
)


@dataclass(frozen=True)
class Hardware:
    """A machine. None means unknown. Sizes may be written as text ("24GiB"); they become bytes.

    `device_memory`: bytes of device memory that this process can take. `host_memory`: bytes of host
    memory that it can take, weights included, under the limits of its cgroup. Rates in GB (10^9
    bytes) a second: `link_gb_per_s` from page-locked and `pageable_gb_per_s` from ordinary host
    memory to the device, `device_gb_per_s` memory traffic of elementwise kernels. `matmul_tflops`
    and `attention_tflops`: achieved, in bf16, not of a data sheet. `launch_us`: host time to launch
    one kernel from Python.
    """

    device_memory: int | str | None = None
    host_memory: int | str | None = None
    link_gb_per_s: float | None = None
    platform: str = "cuda"
    pageable_gb_per_s: float | None = None
    matmul_tflops: float | None = None
    attention_tflops: float | None = None
    device_gb_per_s: float | None = None
    launch_us: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.platform not in PLATFORMS:
            raise ValueError(f"platform is one of {', '.join(PLATFORMS)}, not {self.platform!r}")
        for name in _SIZES:
            size = getattr(self, name)
            if size is not None:
                object.__setattr__(self, name, parse_bytes(size, f"Hardware.{name}"))
        for name in RATES:
            rate = getattr(self, name)
            number = not isinstance(rate, bool) and isinstance(rate, int | float)
            if rate is not None and (not number or not 0 < rate < math.inf):
                raise ValueError(f"Hardware.{name} is a number above 0, not {rate!r}")

    @classmethod
    def probe(
        cls, device: torch.device | str | int | None = None, *, refresh: bool = False
    ) -> Hardware:
        """This machine: memory as it is at this moment, and rates as measured on it.

        Rates are measured once, in less than three seconds and with at most 0.6 GB of device
        memory, on the caller's stream, and kept in the user's cache folder ($XDG_CACHE_HOME, else
        ~/.cache) for this card, driver, version of torch and processor; a busy device gives low
        ones. `device_memory`: what is free, what torch's allocator holds unused, and no more than
        `torch.cuda.set_per_process_memory_fraction` leaves. Without CUDA nothing is measured:
        rates and device memory are None.

        Args:
            device: default: torch's current CUDA device, else its accelerator, else the CPU.
            refresh: measure again, whatever is kept.

        Raises:
            ValueError: there is no such device.
            OffloadError: less than 70 MB of device memory are free.
        """
        from wanoffload.machine.probe import probe  # loads torch

        return probe(device, refresh=refresh)
