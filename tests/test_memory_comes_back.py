"""What 50 models took of memory, page locks, mappings, files and threads is given back."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
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
"""After which malloc has made most of its arenas, one a thread."""


class Held(NamedTuple):
    """Of this process."""

    rss: int
    locked: int
    mappings: int
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
        mappings = len(Path("/proc/self/maps").read_text().splitlines())
        return Held(rss, locked, mappings, process.num_fds(), process.num_threads())


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
