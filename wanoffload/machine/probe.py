"""Looks at this machine: memory as it is now, rates as measured once and kept in a file."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from wanoffload import host_memory
from wanoffload.machine.clock import CudaClock
from wanoffload.machine.hardware import PLATFORMS, Hardware
from wanoffload.machine.rate_file import Machine, Rates, known_rates, rate_file
from wanoffload.machine.rates import Sizes, measure


def probe(device: torch.device | str | int | None = None, *, refresh: bool = False) -> Hardware:
    """What `Hardware.probe` does."""
    target = resolve_device(device)
    on_cuda = platform_of(target) == "cuda"
    rates = known_rates(machine_of(target), refresh, lambda: _measure(target)) if on_cuda else {}
    return Hardware(
        platform=platform_of(target),
        name=name_of(target),
        device_memory=free_device_bytes(target) if on_cuda else None,
        host_memory=host_memory.available_bytes(),
        **rates,
    )


def cached_at(device: torch.device | str | int | None = None) -> Path | None:
    """The file that holds this machine's rates; None where none are measured."""
    target = resolve_device(device)
    return rate_file(machine_of(target)) if platform_of(target) == "cuda" else None


def resolve_device(device: torch.device | str | int | None = None) -> torch.device:
    """The device that is meant, with its index; by itself torch's accelerator, else the CPU.

    Raises ValueError for a device that is not there.
    """
    try:
        target = torch.device(device) if device is not None else _own_device()
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{device!r} is not a device: {reason}") from None
    if target.type not in ("cpu", "cuda", *PLATFORMS):
        raise ValueError(f"nothing is known of device {target}: use a CUDA device or 'cpu'")
    if target.type == "cpu":
        return torch.device("cpu")
    return _present(target)


def _own_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None else torch.device("cpu")


def _present(target: torch.device) -> torch.device:
    module: Any = torch.get_device_module(target.type)
    count = module.device_count() if module.is_available() else 0
    if (target.index or 0) >= count:
        raise ValueError(f"there is no device {target}: torch sees {count} of type {target.type}")
    if target.type != "cuda":
        return target
    index = torch.cuda.current_device() if target.index is None else target.index
    return torch.device("cuda", index)


def platform_of(device: torch.device) -> str:
    """One of `wanoffload.hardware.PLATFORMS`; torch calls AMD's devices cuda too."""
    return "rocm" if device.type == "cuda" and torch.version.hip else device.type


def name_of(device: torch.device) -> str:
    """What the maker calls it; the processor, where there is no other device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name() if device.type == "cpu" else device.type


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def free_device_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device that this process can still take, now."""
    free, total = torch.cuda.mem_get_info(device)
    return takeable(
        free=free,
        total=total,
        reserved=torch.cuda.memory_reserved(device),
        allocated=torch.cuda.memory_allocated(device),
        fraction=torch.cuda.get_per_process_memory_fraction(device),
    )


def takeable(*, free: int, total: int, reserved: int, allocated: int, fraction: float) -> int:
    """What the driver has free and torch holds unused, under `set_per_process_memory_fraction`."""
    return max(0, min(free + reserved - allocated, int(fraction * total) - allocated))


def machine_of(device: torch.device) -> Machine:
    """What the rates of a CUDA device depend on: the card, its host, the software."""
    properties: Any = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "uuid": str(properties.uuid),
        "driver": _driver_version(),
        "torch": torch.__version__,
        "processor": processor_name(),
        "processors": os.cpu_count() or 0,
    }


def _driver_version() -> int:
    """The CUDA version that the driver is made for, as a number: 13000 is 13.0."""
    version = ctypes.c_int()
    result = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    assert result == 0, f"cuDriverGetVersion gave {result}"
    return version.value


def _measure(device: torch.device) -> Rates:
    with torch.cuda.device(device):
        rates = measure(device, CudaClock(device), Sizes.fitting(free_device_bytes(device)))
        torch.cuda.empty_cache()
    return rates
