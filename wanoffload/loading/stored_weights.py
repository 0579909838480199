"""The weights of a described model: read from its files, each once, to where it stays."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from wanoffload import host_memory, image
from wanoffload._C import (
    FileImage,
    HostBackend,
    HostImage,
    HostStore,
    SourceFile,
    TransferError,
)
from wanoffload.binding import Binding
from wanoffload.errors import CheckpointError
from wanoffload.host_tiers import HostPlan
from wanoffload.image import ImageLayout, Lock, TensorSpec
from wanoffload.loading.describing import Described, torch_dtype_of
from wanoffload.loading.header import read_header
from wanoffload.units import Unit
from wanoffload.weights import PACKED_NEED_A_CACHE, Identity

Extent = tuple[SourceFile, int, int, int]


class StoredWeights:
    """Blocks go straight into their images, all other weights to the device: `wanoffload.weights`.

    What is stored in another dtype passes through one buffer of host memory, of the size of the
    largest such tensor, and so do those that go to the device. Files are open from `prepare` to
    `finish` or `undo`; one that changes meanwhile is an error, from whichever read comes next.
    """

    def __init__(self, described: Described, device: torch.device) -> None:
        self._module = described.module
        self._stored = described.stored
        self._dtypes = described.dtypes
        self._device = device
        self._store = HostStore(HostBackend())
        self._buffer: HostImage | None = None
        self._files: dict[Path, SourceFile] = {}
        self._states: dict[Path, Identity] = {}
        self._direct = False  # the page cache has no room for the files beside the images

    def why_not_in_files(self, unit: Unit, packed: bool) -> str | None:
        if packed:
            return PACKED_NEED_A_CACHE
        for name in _names([unit]):
            if self._is_cast(name):
                return (
                    f"{name} is stored as {torch_dtype_of(self._stored[name])} and used as "
                    f"{self._dtypes[name]}, so the checkpoint itself can't be streamed: give "
                    "cache=FILE, which holds what is used"
                )
        return None

    def cached(self, units: list[Unit], layouts: list[ImageLayout]) -> None:
        """Nobody gave one."""

    def identity(self, units: list[Unit], layouts: list[ImageLayout]) -> Identity:
        """The files, by what tells one state of a file from another, and the place of each tensor.

        From here on a file that is replaced is an error.
        """
        self._states = {path: _state(path) for path in self._paths()}
        return {
            "files": {path.name: state for path, state in self._states.items()},
            "tensors": {
                name: [self._stored[name].file.name, self._stored[name].offset]
                for name in _names(units)
            },
            "stored": {name: self._stored[name].dtype for name in _names(units)},
        }

    def room(self, units: list[Unit], layouts: list[ImageLayout]) -> int:
        return host_memory.to_be_had() - self._beside(units)

    def prepare(self, units: list[Unit], layouts: list[ImageLayout], plan: HostPlan) -> None:
        """Opens the files, and raises HostMemoryError if the plan will not fit."""
        self._require_memory(units, layouts, plan)
        self.open_files()

    def open_files(self) -> None:
        """All that `write` and `in_files` need. `finish` closes them."""
        for path in self._paths():
            self._files[path] = SourceFile(str(path))
            self._check_same(path)

    def _check_same(self, path: Path) -> None:
        """The file that is open is the one whose header was read."""
        found = read_header(path)
        known = [tensor for tensor in self._stored.values() if tensor.file == path]
        replaced = path in self._states and self._states[path] != _state(path)
        if replaced or any(found.get(tensor.name) != tensor for tensor in known):
            raise CheckpointError(f"{path} was replaced while it was being loaded")

    def _require_memory(
        self, units: list[Unit], layouts: list[ImageLayout], plan: HostPlan
    ) -> None:
        total = sum(layout.nbytes for layout in layouts)
        packing = max(layout.nbytes for layout in layouts) if plan.packed else 0
        needed = plan.host_bytes + packing + self._beside(units)
        in_files = sum(path.stat().st_size for path in self._paths())
        self._direct = host_memory.to_be_had() < needed + in_files
        host_memory.require(
            needed,
            f"loading {type(self._module).__name__} ({len(units)} {plan.called} of "
            f"{total / 1e9:.2f} GB in all: {plan.sentence})",
        )

    def _beside(self, units: list[Unit]) -> int:
        """Bytes of host memory that the way needs besides images and ring."""
        streamed = set(_names(units))
        others = [name for name in self._stored if name not in streamed]
        through_buffer = [*others, *(name for name in streamed if self._is_cast(name))]
        buffer = max((self._stored[name].nbytes for name in through_buffer), default=0)
        resident = sum(self._bytes_of(name) for name in others)
        return buffer + (resident if self._device.type == "cpu" else 0)

    def place_others(self, streamed: set[int]) -> None:
        for prefix, owner in self._module.named_modules():
            dot = f"{prefix}." if prefix else ""
            for key, parameter in owner._parameters.items():
                if parameter is not None and id(parameter) not in streamed:
                    value = self._value(dot + key)
                    owner._parameters[key] = nn.Parameter(value, parameter.requires_grad)
            for key, buffer in owner._buffers.items():
                if buffer is None:
                    continue
                saved = key not in owner._non_persistent_buffers_set
                owner._buffers[key] = self._value(dot + key) if saved else buffer.to(self._device)

    def write(self, unit: Unit, layout: ImageLayout, memory: HostImage, lock: Lock) -> None:
        named = list(zip(_names([unit]), layout.specs, strict=True))
        self._fill(memory, [(name, spec) for name, spec in named if not self._is_cast(name)])
        for name, spec in named:
            if self._is_cast(name):
                image.host_view(spec, memory).copy_(self._in_buffer(name))
        lock(memory, False)

    def source(self, unit: Unit, layout: ImageLayout) -> FileImage | None:
        """In the files, unless something is cast."""
        cast = any(self._is_cast(name) for name in _names([unit]))
        return None if cast else self.in_files(unit, layout)

    def in_files(self, unit: Unit, layout: ImageLayout) -> FileImage:
        named = zip(_names([unit]), layout.specs, strict=True)
        return FileImage([self._extent(name, spec.offset) for name, spec in named], layout.nbytes)

    def finish(self) -> None:
        self._files.clear()
        self._buffer = None

    def undo(self, bound: list[Binding]) -> None:
        """The module, which nobody else has, is left without anything that holds memory."""
        self.finish()
        for binding in bound:
            binding.unlock()
        bound.clear()
        for owner in self._module.modules():
            owner._parameters.clear()
            owner._buffers.clear()

    # Bytes.

    def _paths(self) -> list[Path]:
        return sorted({tensor.file for tensor in self._stored.values()})

    def _is_cast(self, name: str) -> bool:
        return torch_dtype_of(self._stored[name]) != self._dtypes[name]

    def _bytes_of(self, name: str) -> int:
        """Bytes once loaded."""
        stored = self._stored[name]
        return stored.nbytes // torch_dtype_of(stored).itemsize * self._dtypes[name].itemsize

    def _value(self, name: str) -> Tensor:
        """A tensor on the device, in memory of its own."""
        stored = self._in_buffer(name).to(self._dtypes[name])  # on the host, as from_pretrained
        return torch.empty_like(stored, device=self._device).copy_(stored)

    def _in_buffer(self, name: str) -> Tensor:
        """The tensor as it is stored, until the next one is read."""
        stored = self._stored[name]
        dtype = torch_dtype_of(stored)
        if stored.nbytes == 0:
            return torch.empty(stored.shape, dtype=dtype)
        if self._buffer is None or self._buffer.nbytes < stored.nbytes:
            self._buffer = None  # first the old one goes
            self._buffer = self._store.allocate(stored.nbytes)
        whole = TensorSpec(name, dtype, torch.Size(stored.shape), _dense(stored.shape), 0)
        self._fill(self._buffer, [(name, whole)])
        return image.host_view(whole, self._buffer)

    def _fill(self, memory: HostImage, named: list[tuple[str, TensorSpec]]) -> None:
        """Reads tensors to their places, as they are stored."""
        try:
            memory.fill_from(
                [self._extent(name, spec.offset) for name, spec in named], direct=self._direct
            )
        except TransferError as error:
            names = named[0][0] if len(named) == 1 else f"{named[0][0]} to {named[-1][0]}"
            raise TransferError(f"{names} could not be read: {error}") from error

    def _extent(self, name: str, offset: int) -> Extent:
        stored = self._stored[name]
        return self._files[stored.file], stored.offset, stored.nbytes, offset


def _state(path: Path) -> Identity:
    found = path.stat()
    return {
        "device": found.st_dev,
        "inode": found.st_ino,
        "bytes": found.st_size,
        "modified_ns": found.st_mtime_ns,
    }


def _names(units: list[Unit]) -> list[str]:
    """Of the streamed tensors, as in the model's state_dict."""
    return [f"{unit.name}.{group[0].name}" for unit in units for group in unit.groups]


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
