"""What 50 models took of memory, page locks, mappings, files and threads is given back."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

import wanoffload
from tests.small_models import MODELS, forward
from tests.test_checkpoint import save

KIND = MODELS["wan22_5b"]
CYCLES = 50
WARM_UP = 40
ARENA_BYTES = 64 << 20
"""glibc's malloc maps its arenas in pieces of this size, at multiples of it."""


class Held(NamedTuple):
    """Of this process."""

    rss: int
    locked: int
    mappings: int
    """Without malloc's arenas."""
    files: int
    threads: int

    @staticmethod
    def now() -> Held:
        gc.collect()
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        process = psutil.Process()
        rss = process.memory_info().rss
        locked = sum(int(status[key].split()[0]) << 10 for key in ("VmLck", "VmPin"))
        return Held(rss, locked, mappings(), process.num_fds(), process.num_threads())


def mappings() -> int:
    """Of this process, without what glibc's malloc mapped for its arenas: two each.

    How many there are is not ours: a thread that allocates while no other's is free gets a new one,
    up to 8 a core, which is never unmapped. mallopt can't forbid it here: the limit stays what it
    was once a process has had more than 8. An arena's piece is writable up to what is used of it,
    and then without access up to the next multiple of its size.
    """
    counted, begin, end, access = 0, 0, 0, ""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, now, _, _, inode, *_ = line.split(maxsplit=5)
        start, stop = (int(address, 16) for address in addresses.split("-"))
        piece = stop - ARENA_BYTES
        rest = now == "---p" and inode == "0" and stop % ARENA_BYTES == 0 and start == end
        if rest and access == "rw-p" and begin <= piece < start:
            counted -= begin == piece  # else its memory is one with that of the mapping before it
        else:
            counted += 1
        begin, end, access = start, stop, now
    return counted


def load(folder: Path, **options: Any) -> nn.Module:
    return wanoffload.load(WanTransformer3DModel, folder, torch_dtype=torch.bfloat16, **options)


def wrap(folder: Path, **options: Any) -> nn.Module:
    return wanoffload.wrap(KIND.make(), **options)


Make = Callable[..., nn.Module]
MADE: dict[str, tuple[Make, dict[str, Any]]] = {
    "pinned": (wrap, {"host": "pinned"}),
    "pageable": (wrap, {"host": "pageable"}),
    "disk": (load, {"host": "disk"}),
    "cache": (load, {"host": "disk", "cache": "blocks.cache"}),
    "share": (load, {"host": "auto", "share": f"test/memory-{os.getpid()}"}),
    "pinned packed": (wrap, {"host": "pinned", "pack": True}),
    "pageable packed": (load, {"host": "pageable", "pack": True}),
    "disk packed": (load, {"host": "disk", "cache": "packed.cache", "pack": True}),
}
ENDS: list[Callable[[nn.Module], object]] = [
    lambda model: wanoffload.offloader(model).close(),
    wanoffload.unwrap,
    lambda model: None,  # it is let go of as it is
]


@pytest.fixture
def _collected_quickly() -> Iterator[None]:
    """The collector looks only at what is made from here on."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_collected_quickly")
@pytest.mark.parametrize("made", MADE)
def test_fifty_models_leave_nothing(tmp_path: Path, made: str, device: str) -> None:
    make, options = MADE[made]
    if "cache" in options:
        options = {**options, "cache": tmp_path / options["cache"]}
    save(KIND.make(), tmp_path, "sharded")
    inputs = KIND.inputs(device)

    def cycle(number: int) -> None:
        model = make(tmp_path, device=device, **options)
        with torch.no_grad():
            forward(model, inputs)
            next(model.get_submodule("blocks.0").parameters()).add_(1)
            forward(model, inputs)
        ENDS[number % len(ENDS)](model)
        del model
        if number % len(ENDS) == len(ENDS) - 1:
            gc.collect()  # else models wait for the collector, now more of them and now fewer

    for number in range(WARM_UP):
        cycle(number)
    before, on_device = Held.now(), device_bytes()
    for number in range(CYCLES):
        cycle(number)
    after = Held.now()
    assert after.rss - before.rss < 8 << 20, (before, after)
    assert after.locked <= before.locked, (before, after)
    assert after.mappings - before.mappings < CYCLES, (before, after)
    assert (after.files, after.threads) == (before.files, before.threads)
    assert device_bytes() <= on_device


def device_bytes() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
