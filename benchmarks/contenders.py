"""Ways to run a model whose weights stay on the host, all behind one small interface.

A contender takes a model in ordinary host memory and makes it run on the device, in place. The
resident model is the one they are all compared with; it is no contender here, but it has a name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from benchmarks import machine
from benchmarks.harness import code_fingerprint, peer_fingerprint
from benchmarks.models import ModelSpec
from benchmarks.timing import Clock

RESIDENT = "resident"
OURS = "wanoffload"
OURS_BY_TIER = (  # disk: only in the case loading
    f"{OURS}-pN",
    f"{OURS}-packed-pN",
    f"{OURS}-pageable-pN",
    f"{OURS}-packed-pageable-pN",
)
OURS_IN_PARTS = (f"{OURS}-parts", f"{OURS}-packed-parts")  # also with -pN
BLOCK, PART = "block", "part"
DIFFUSERS_LEVELS: dict[str, dict[str, Any]] = {
    "diffusers-block-stream": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "diffusers-leaf-stream": {"offload_type": "leaf_level"},
}


@dataclass(frozen=True)
class Counters:
    """What an offloader says it has done since it began, and what it holds.

    ``units``: what it streams, one for each block or more. ``at_home``: all of it is on the device
    and nothing is acquired.
    """

    acquires: int
    fetches: int
    bytes_fetched: int
    forwards: int
    host_bytes: int
    locked_bytes: int
    slot_bytes: int
    ring_bytes: int
    units: int
    at_home: bool = False


class Contender(Protocol):
    """A way to offload."""

    @property
    def name(self) -> str:
        """How the tables call it."""

    @property
    def needs_gpu(self) -> bool:
        """Whether it cannot run on the host alone."""

    def fingerprint(self, label: str | None) -> str:
        """The version of the code that is measured."""

    def apply(self, model: nn.Module, device: torch.device) -> None:
        """Makes a model in host memory run on ``device``, in place."""

    def counters(self, model: nn.Module) -> Counters | None:
        """What the offloader counts; None where it counts nothing."""

    def close(self, model: nn.Module) -> None:
        """Gives back what only the offloader holds. The model is not used afterwards."""


@dataclass(frozen=True)
class Wanoffload:
    """This project: blocks streamed from the host, ``prefetch`` blocks ahead.

    ``prefetch`` None: as many as the plan within ``vram_budget`` takes. ``host`` is the tier:
    page-locked or ordinary memory, or the checkpoint on disk. ``pack``: the blocks stand packed.
    ``granularity``: BLOCK, or PART: parts of blocks are streamed, and fetched ahead.
    """

    prefetch: int | None
    host: str = "pinned"
    pack: bool = False
    granularity: str = BLOCK
    needs_gpu: bool = False

    @property
    def name(self) -> str:
        """As ``wanoffload-p2``, ``wanoffload-packed-pageable-p2``, ``wanoffload-parts``."""
        form = "-packed" if self.pack else ""
        kind = "" if self.host == "pinned" else f"-{self.host}"
        unit = "-parts" if self.granularity == PART else ""
        ahead = "" if self.prefetch is None else f"-p{self.prefetch}"
        return f"{OURS}{form}{kind}{unit}{ahead}"

    def fingerprint(self, label: str | None) -> str:
        """A hash of the sources, or the label."""
        return code_fingerprint(label)

    def apply(self, model: nn.Module, device: torch.device) -> None:
        """Wraps the model."""
        import wanoffload

        wanoffload.wrap(
            model,
            prefetch=self.prefetch,
            device=device,
            granularity=self.granularity,
            host=self.host,
            pack=self.pack,
        )

    def load(
        self,
        cls: type[nn.Module],
        folder: Path,
        subfolder: str,
        device: torch.device,
        **options: Any,
    ) -> nn.Module:
        """Loads a checkpoint in bf16; ``options`` are further ones of ``wanoffload.load``."""
        import wanoffload

        return wanoffload.load(
            cls,
            folder,
            subfolder,
            torch_dtype=torch.bfloat16,
            prefetch=self.prefetch,
            device=device,
            granularity=self.granularity,
            host=self.host,
            pack=self.pack,
            **options,
        )

    def counters(self, model: nn.Module) -> Counters:
        """The offloader's statistics."""
        import wanoffload

        stats = wanoffload.offloader(model).stats()
        return Counters(**{name: getattr(stats, name) for name in Counters.__dataclass_fields__})

    def close(self, model: nn.Module) -> None:
        """Closes the offloader."""
        import wanoffload

        wanoffload.offloader(model).close()


@dataclass(frozen=True)
class DiffusersGroupOffload:
    """diffusers' group offloading with a copy stream, in the quicker of its settings."""

    name: str
    needs_gpu: bool = True

    def fingerprint(self, label: str | None) -> str:
        """The versions of torch and diffusers; the label is about our code only."""
        return peer_fingerprint()

    def apply(self, model: nn.Module, device: torch.device) -> None:
        """Enables group offloading."""
        transformer: Any = model
        transformer.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            use_stream=True,
            record_stream=True,
            **DIFFUSERS_LEVELS[self.name],
        )

    def counters(self, model: nn.Module) -> None:
        """diffusers does not count."""

    def close(self, model: nn.Module) -> None:
        """Nothing but the model holds the memory."""


def by_name(name: str) -> Contender:
    """The contender that the command line calls ``name``."""
    ours = re.fullmatch(rf"{OURS}(-packed)?(?:-(pageable|disk))?(?=-p)(-parts)?(?:-p(\d+))?", name)
    if ours is not None:
        packed, host, parts, prefetch = ours.groups()
        return Wanoffload(
            int(prefetch) if prefetch else None,
            host or "pinned",
            packed is not None,
            PART if parts else BLOCK,
        )
    if name in DIFFUSERS_LEVELS:
        return DiffusersGroupOffload(name)
    known = ", ".join((RESIDENT, *OURS_BY_TIER, *OURS_IN_PARTS, *DIFFUSERS_LEVELS))
    raise ValueError(f"no contender is called {name!r}; there are {known}")


def names_for(spec: ModelSpec, device: torch.device, compiled: bool) -> list[str]:
    """The contenders measured when none is named.

    diffusers' hooks and compiled blocks without graph breaks exclude each other, and its streams
    need a GPU.
    """
    ours = [Wanoffload(prefetch).name for prefetch in spec.prefetches]
    peers = [] if compiled or device.type != "cuda" else list(DIFFUSERS_LEVELS)
    return [RESIDENT, *ours, *peers]


@dataclass
class Live:
    """A contender that is set up: its model, and what setting it up cost."""

    contender: Contender
    model: nn.Module
    setup_s: float
    host_rss_bytes: int
    host_used_bytes: int
    torch_locked_bytes: int
    peak: machine.DevicePeak

    @property
    def locked_bytes(self) -> int:
        """Host bytes page-locked for this model, by torch's allocator or by our arena."""
        counters = self.contender.counters(self.model)
        return self.torch_locked_bytes + (counters.locked_bytes if counters else 0)


@dataclass(frozen=True)
class _HostMemory:
    rss: int
    used: int
    locked: int

    @classmethod
    def now(cls) -> _HostMemory:
        machine.release_caches()
        return cls(machine.rss_bytes(), machine.host_used_bytes(), machine.torch_locked_bytes())


def set_up(contender: Contender, source: SourceModel, device: torch.device) -> Live:
    """Gets a model in host memory from ``source`` and makes it run on ``device``."""
    before = _HostMemory.now()
    peak = machine.DevicePeak.above_now(device)
    model = source()
    machine.empty_caches()
    _, seconds = Clock(device).timed(lambda: contender.apply(model, device))
    after = _HostMemory.now()
    peak.settle()
    return Live(
        contender,
        model,
        seconds,
        after.rss - before.rss,
        after.used - before.used,
        after.locked - before.locked,
        peak,
    )


def tear_down(live: Live) -> None:
    """Closes a contender and gives its memory back to the system."""
    live.contender.close(live.model)
    del live.model
    machine.release_caches()


class SourceModel(Protocol):
    """Makes a model in ordinary host memory."""

    def __call__(self) -> nn.Module:
        """A fresh one at each call."""
