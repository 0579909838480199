"""The parts ``link`` and ``locking``: host memory, how fast it is made and how fast it is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import machine
from benchmarks.engine import Found, backend_for, is_small
from benchmarks.harness import Session, Spread
from benchmarks.link import LinkProbe
from benchmarks.timing import each_timed

if TYPE_CHECKING:
    from wanoffload import _C

MIB = 1 << 20
REPEATS = 5
LOCKING_REPEATS = 3


def link(session: Session) -> Found:
    """Rate of copies to the device, for each size and kind of memory."""
    sizes = (1, 2) if is_small(session) else (1, 4, 16, 64, 256, 1024)
    for memory, make in _host_memories(session.device).items():
        for mebibytes in sizes:
            size = mebibytes * MIB
            probe = LinkProbe(session.device, make(size))
            copies = max(2, min(100, 2048 // mebibytes // 2))
            rates = [probe.measure(copies) for _ in range(REPEATS)]
            values = {"gbps": Spread.of(rates).as_json(), "verified": probe.verified()}
            yield {"memory": memory, "mib": mebibytes}, values
            del probe
            machine.release_caches()


def _host_memories(device: torch.device) -> dict[str, Callable[[int], torch.Tensor]]:
    """Ways to get host memory, as tensors of bytes."""

    def ordinary(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def torch_locked(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def image(size: int) -> torch.Tensor:
        made = _store(device, huge_pages=True).allocate(size)
        made.touch()
        made.lock()
        return tensor_over(made)

    kinds: dict[str, Callable[[int], torch.Tensor]] = {"image, page-locked": image}
    if device.type == "cuda":
        kinds["torch, page-locked"] = torch_locked
    return {**kinds, "ordinary": ordinary}


def _store(device: torch.device, *, huge_pages: bool) -> _C.HostStore:
    from wanoffload import _C

    return _C.HostStore(backend_for(device), huge_pages=huge_pages)


def tensor_over(image: _C.HostImage) -> torch.Tensor:
    """The bytes of an image as a tensor; the tensor keeps the image alive."""
    return torch.frombuffer(memoryview(image), dtype=torch.uint8)


def locking(session: Session) -> Found:
    """GB/s to make host memory present and page-lock it, on memory the machine already has."""
    size, count = (MIB, 2) if is_small(session) else (512 * MIB, 8)
    source = torch.arange(size // 8).view(torch.uint8)
    torch.empty(2 * size * count, dtype=torch.uint8).fill_(1)
    for huge_pages in (True, False):
        pages = "huge pages" if huge_pages else "plain pages"
        runs = [_lock_images(session, size, count, huge_pages) for _ in range(LOCKING_REPEATS)]
        yield {"method": f"map, touch, register; {pages}"}, _rates(runs, size * count)
        runs = [_fill_images(session, source, count, huge_pages) for _ in range(LOCKING_REPEATS)]
        yield {"method": f"map, copy in, register; {pages}"}, _rates(runs, size * count)
    if session.device.type == "cuda":
        runs = [_lock_by_torch(source, count) for _ in range(LOCKING_REPEATS)]
        yield {"method": "torch.empty(pin_memory=True)"}, _rates(runs, size * count)


def _rates(runs: Sequence[tuple[dict[str, float], bool]], size: int) -> dict[str, Any]:
    """Seconds of each stage of each run as GB/s, and of all stages together."""
    values: dict[str, Any] = {"verified": all(verified for _, verified in runs)}
    for stage in runs[0][0]:
        rates = [size / seconds[stage] / 1e9 for seconds, _ in runs]
        values[f"{stage}_gbps"] = Spread.of(rates).as_json()
    together = [size / sum(seconds.values()) / 1e9 for seconds, _ in runs]
    values["together_gbps"] = Spread.of(together).as_json()
    return values


def _lock_images(
    session: Session, size: int, count: int, huge_pages: bool
) -> tuple[dict[str, float], bool]:
    store = _store(session.device, huge_pages=huge_pages)
    images = [store.allocate(size) for _ in range(count)]
    seconds = {
        "touch": each_timed(image.touch for image in images),
        "register": each_timed(image.lock for image in images),
    }
    exact = store.locked_bytes == size * count
    zeroed = not any(bool(tensor_over(image)[::4096].any()) for image in images)
    return seconds, exact and zeroed and all(image.locked for image in images)


def _fill_images(
    session: Session, source: torch.Tensor, count: int, huge_pages: bool
) -> tuple[dict[str, float], bool]:
    store = _store(session.device, huge_pages=huge_pages)
    size = source.nbytes
    piece = (source.data_ptr(), 0, size)
    images = [store.allocate(size) for _ in range(count)]
    seconds = {
        "copy_in": each_timed(partial(image.fill, [piece]) for image in images),
        "register": each_timed(image.lock for image in images),
    }
    equal = all(torch.equal(tensor_over(image), source) for image in images)
    return seconds, equal and all(image.locked for image in images)


def _lock_by_torch(source: torch.Tensor, count: int) -> tuple[dict[str, float], bool]:
    machine.release_caches()
    tensors: list[torch.Tensor] = []

    def lock() -> None:
        tensors.append(torch.empty(source.shape, dtype=torch.uint8, pin_memory=True))

    seconds = {"register": each_timed([lock] * count)}
    tensors[-1].copy_(source)
    equal = torch.equal(tensors[-1], source)
    return seconds, equal and all(tensor.is_pinned() for tensor in tensors)
