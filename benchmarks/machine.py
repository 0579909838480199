"""What the machine is, and the memory of the host and the device as the system counts it."""

from __future__ import annotations

import gc
import os
import platform
import re
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import say

STATUS = Path("/proc/self/status")
SMAPS = Path("/proc/self/smaps_rollup")
MEMINFO = Path("/proc/meminfo")
CLEAR_REFS = Path("/proc/self/clear_refs")
CLEAR_PEAK = "5"  # documented in proc(5): resets VmHWM


def describe(device: torch.device) -> str:
    """The machine in one line: processor or GPU, cores, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    cores = os.cpu_count() or 1
    return f"{name}, {cores} cores, torch {torch.__version__}, diffusers {version('diffusers')}"


def slug(device: torch.device) -> str:
    """A file name for the results of this machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return re.sub(r"[^a-z0-9]+", "-", f"{name}-{os.cpu_count()}".lower()).strip("-")


def _field_bytes(path: Path, name: str) -> int:
    """A field given in kB in one of the system's status files; 0 where there is none."""
    if not path.exists():
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def rss_bytes() -> int:
    """Bytes of this process in memory now."""
    return _field_bytes(STATUS, "VmRSS")


def host_used_bytes() -> int:
    """Bytes in use on the whole machine, without what the system would give back when asked."""
    return _field_bytes(MEMINFO, "MemTotal") - _field_bytes(MEMINFO, "MemAvailable")


@dataclass(frozen=True)
class ProcessBytes:
    """Memory of this process. `anon` and `shmem` are its own, `file` are pages of mapped files."""

    anon: int
    shmem: int
    file: int

    @classmethod
    def now(cls) -> ProcessBytes:
        """As the system counts it."""
        return cls(*(_field_bytes(STATUS, f"Rss{kind}") for kind in ("Anon", "Shmem", "File")))

    @property
    def own(self) -> int:
        """What nobody could take back by dropping files."""
        return self.anon + self.shmem


def shared_out_bytes() -> int:
    """This process's memory with what several processes map counted in parts (Pss)."""
    return _field_bytes(SMAPS, "Pss")


def touch_once(size: int) -> float:
    """Has the system give this process ``size`` bytes once, and gives them back; seconds."""
    say(f"touching {size / 1e9:.1f} GB of host memory")
    start = time.perf_counter()
    torch.empty(size, dtype=torch.uint8).fill_(1)
    release_caches()
    seconds = time.perf_counter() - start
    say(f"touched at {size / seconds / 1e9:.1f} GB/s")
    return seconds


def driver_used_bytes(device: torch.device) -> int:
    """Bytes the driver says are taken on the device: weights, caches, the context, others' too."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def torch_locked_bytes() -> int:
    """Bytes page-locked by torch's own allocator, in use or kept, as rounded by it."""
    stats = torch.cuda.host_memory_stats()
    names = ("allocated_bytes.current", "reserved_bytes.current")  # by version of torch
    return max(int(stats.get(name, 0)) for name in names)


def release_caches() -> None:
    """Gives back what nobody uses: cycles, then what torch keeps for later."""
    gc.collect()
    empty_caches()


def empty_caches() -> None:
    """Gives back what torch keeps for later: device memory and page-locked memory."""
    if not torch.cuda.is_available():
        return
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    bindings: Any = torch._C
    for name in ("_accelerator_emptyHostCache", "_host_emptyCache"):  # by version of torch
        if hasattr(bindings, name):
            getattr(bindings, name)()
            break


@dataclass
class DevicePeak:
    """The peak of one model's device memory, where other models stand on the same device.

    ``base`` is what belongs to others; ``own`` what the model holds when nothing runs. Both are
    pairs: bytes in use, and bytes taken from the driver.
    """

    device: torch.device
    base: tuple[int, int] = (0, 0)
    own: tuple[int, int] = (0, 0)
    allocated: int = 0
    reserved: int = 0

    @classmethod
    def above_now(cls, device: torch.device) -> DevicePeak:
        """A peak for a model that is about to be made: what is there now belongs to others."""
        empty_caches()
        return cls(device, base=device_bytes(device))

    def settle(self) -> None:
        """The model is there now: notes what it holds."""
        empty_caches()
        allocated, reserved = device_bytes(self.device)
        self.own = allocated - self.base[0], reserved - self.base[1]

    def other_came(self, other: DevicePeak) -> None:
        """Another model was made after this one."""
        self.base = self.base[0] + other.own[0], self.base[1] + other.own[1]

    def other_left(self, other: DevicePeak) -> None:
        """A model that was made after this one is gone."""
        self.base = self.base[0] - other.own[0], self.base[1] - other.own[1]

    def restart(self) -> None:
        """Forgets the peak seen so far."""
        self.allocated = self.reserved = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Takes in the highest values while the body runs. Does not wait for the device."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        allocated = torch.cuda.max_memory_allocated(self.device)
        reserved = torch.cuda.max_memory_reserved(self.device)
        self.allocated = max(self.allocated, allocated - self.base[0])
        self.reserved = max(self.reserved, reserved - self.base[1])


def device_bytes(device: torch.device) -> tuple[int, int]:
    """Device memory of torch's allocator: in use, and taken from the driver."""
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)


@dataclass
class HostPeak:
    """The highest ``VmRSS`` while something ran, and how it was learned.

    ``own_bytes``: the highest of what is not pages of mapped files, always by samples.
    """

    peak_bytes: int = 0
    method: str = ""
    own_bytes: int = 0


@contextmanager
def watch_rss(period_s: float = 0.005) -> Iterator[HostPeak]:
    """Finds the peak of this process's memory while the body runs.

    The kernel's own high-water mark is cleared first where it lets us; samples are taken besides,
    for systems where it does not. Where neither is there, the peak since the process began.
    """
    peak = HostPeak()
    cleared = _clear_peak()
    stop = threading.Event()
    samples = [_sampled()]
    sampler = threading.Thread(target=_sample, args=(samples, stop, period_s), daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        stop.set()
        sampler.join()
        samples.append(_sampled())
        peak.peak_bytes = max(rss for rss, _ in samples)
        peak.own_bytes = max(own for _, own in samples)
        peak.method = "samples"
        if cleared:
            peak.peak_bytes = max(peak.peak_bytes, _field_bytes(STATUS, "VmHWM"))
            peak.method = "VmHWM"
        elif peak.peak_bytes == 0:
            peak.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            peak.method = "ru_maxrss"


def _clear_peak() -> bool:
    before = _field_bytes(STATUS, "VmHWM")
    try:
        CLEAR_REFS.write_text(CLEAR_PEAK)
    except OSError:
        return False
    return 0 < _field_bytes(STATUS, "VmHWM") <= before


def _sampled() -> tuple[int, int]:
    """In memory now, and how much of it is the process's own."""
    return rss_bytes(), ProcessBytes.now().own


def _sample(samples: list[tuple[int, int]], stop: threading.Event, period_s: float) -> None:
    while not stop.wait(period_s):
        samples.append(_sampled())
