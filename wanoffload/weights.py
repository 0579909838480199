"""Where the weights of a model come from when it is wrapped: here, from its own tensors.

`wrapping` knows the way: images, slots, hooks, the engine, and back. A `Weights` knows the bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from wanoffload import host_memory, image
from wanoffload._C import HostBackend, HostImage, HostStore, Image, PiecesImage
from wanoffload.binding import Binding
from wanoffload.errors import OffloadError
from wanoffload.host_tiers import HostPlan
from wanoffload.image import ImageLayout, Lock, TensorSpec
from wanoffload.pack_choice import Cached
from wanoffload.units import Unit, tie_key

logger = logging.getLogger(__name__)

Identity = dict[str, Any]
Source = Image | Sequence[Tensor]
"""Where a unit's plain bytes can be had: an image to be read, or its tensors, in the order of its
layout."""

PACKED_NEED_A_CACHE = "packed blocks stand on disk in a cache file only: give cache=FILE"


class Weights(Protocol):
    """The weights of one model, while it is wrapped. Methods are called in this order, `write` or
    `in_files` once for each unit whose image is not there yet, and `undo` in place of what is left
    when something fails."""

    def why_not_in_files(self, unit: Unit, packed: bool) -> str | None:
        """What keeps the unit's image from standing in a file, as the disk tier needs it."""

    def cached(self, units: list[Unit], layouts: list[ImageLayout]) -> Cached | None:
        """How the images stand in a cache file, if one is there by now. Raises CacheFileError if it
        is another model's."""

    def identity(self, units: list[Unit], layouts: list[ImageLayout]) -> Identity:
        """What the bytes of the images depend on besides units and layouts, in terms of JSON."""

    def room(self, units: list[Unit], layouts: list[ImageLayout]) -> int:
        """Bytes of host memory that the images may take: what is to be had, what the weights give
        back on their way, less what the way needs."""

    def prepare(self, units: list[Unit], layouts: list[ImageLayout], plan: HostPlan) -> None:
        """Nothing is moved yet. Raises HostMemoryError if the host has too little for the plan."""

    def place_others(self, streamed: set[int]) -> None:
        """Brings to the device what is not streamed. `streamed`: ids of the parameters that are."""

    def write(self, unit: Unit, layout: ImageLayout, memory: HostImage, lock: Lock) -> None:
        """Fills a unit's image as `layout` says, and calls `lock` once its pages are there. One
        that is packed in the cache file is filled with what stands there."""

    def source(self, unit: Unit, layout: ImageLayout) -> Source | None:
        """Where the unit's plain bytes can be had without an image that `write` fills. None:
        nowhere. Keeps nothing alive: what the model holds must stay as it is."""

    def in_files(self, unit: Unit, layout: ImageLayout) -> Image:
        """The unit's image where it stands in files. Only if nothing keeps it from that."""

    def finish(self) -> None:
        """The model is wrapped: lets go of what only the way needed."""

    def undo(self, bound: list[Binding]) -> None:
        """Something failed. `bound`: those whose entries stand on their images already."""


class OwnTensors:
    """The tensors of the model itself, on the host or on a device. Undone, they are as they were.

    `move_others`: what is not streamed goes to the device; else it is left where it is.
    """

    def __init__(self, model: nn.Module, device: torch.device, move_others: bool) -> None:
        self._model = model
        self._device = device
        self._move_others = move_others
        self._moved: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self._came_from: list[list[torch.device]] = []  # for each unit, its tensors' devices

    def why_not_in_files(self, unit: Unit, packed: bool) -> str | None:
        if packed:
            return PACKED_NEED_A_CACHE
        return "the weights of this model are in memory, and in no file: give cache=FILE"

    def cached(self, units: list[Unit], layouts: list[ImageLayout]) -> None:
        """Nobody gave one."""

    def in_files(self, unit: Unit, layout: ImageLayout) -> NoReturn:
        raise AssertionError("they are in memory")

    def identity(self, units: list[Unit], layouts: list[ImageLayout]) -> Identity:
        """Fingerprints of the images, which are made for it one at a time."""
        host_memory.require(max(layout.nbytes for layout in layouts), "looking at a model's blocks")
        return {
            "fingerprints": [
                _fingerprint(unit, layout) for unit, layout in zip(units, layouts, strict=True)
            ]
        }

    def room(self, units: list[Unit], layouts: list[ImageLayout]) -> int:
        """Blocks on the host are moved one at a time, not copied."""
        given_back = sum(layout.nbytes for layout in layouts) - _kept(units)
        return host_memory.to_be_had() + given_back - max(layout.nbytes for layout in layouts)

    def prepare(self, units: list[Unit], layouts: list[ImageLayout], plan: HostPlan) -> None:
        """What is still to be taken: the images, less what the weights give back on their way."""
        self._came_from = [[group[0].tensor.device for group in unit.groups] for unit in units]
        total = sum(layout.nbytes for layout in layouts)
        in_memory = [number for number in range(len(units)) if plan.takes_memory(number)]
        moved = sum(layouts[number].nbytes for number in in_memory)
        given_back = moved - _kept([units[number] for number in in_memory])
        images = plan.host_bytes - plan.ring_bytes
        host_memory.require(
            max(0, images - given_back) + way_bytes(layouts, plan) + plan.ring_bytes,
            f"wrapping {type(self._model).__name__} ({len(units)} blocks of "
            f"{total / 1e9:.2f} GB in all, moved one at a time)",
        )

    def place_others(self, streamed: set[int]) -> None:
        """Other weights and all buffers. Ties stay ties."""
        if not self._move_others:
            return
        done: dict[object, Tensor] = {}
        for owner in self._model.modules():
            for key, parameter in owner._parameters.items():
                if parameter is None or id(parameter) in streamed:
                    continue
                if parameter.device != self._device:
                    self._moved.append((owner, key, parameter, parameter.data))
                    kin = tie_key(parameter)
                    if kin not in done:
                        done[kin] = parameter.data.to(self._device)
                    parameter.data = done[kin]
            for key, buffer in owner._buffers.items():
                if buffer is not None and buffer.device != self._device:
                    self._moved.append((owner, key, buffer, buffer))
                    owner._buffers[key] = buffer.to(self._device)

    def write(self, unit: Unit, layout: ImageLayout, memory: HostImage, lock: Lock) -> None:
        tensors = [group[0].tensor for group in unit.groups]
        image.write_image(memory, layout, tensors, lock)

    def source(self, unit: Unit, layout: ImageLayout) -> Source:
        tensors = [group[0].tensor for group in unit.groups]
        if not all(map(_is_as_laid_out, tensors, layout.specs)):
            return tensors
        pairs = zip(tensors, layout.specs, strict=True)
        pieces = [(tensor.data_ptr(), spec.offset, spec.nbytes) for tensor, spec in pairs]
        return PiecesImage(pieces, layout.nbytes)

    def finish(self) -> None:
        came_from = {device.type for devices in self._came_from for device in devices}
        if self._device.type == "cuda" and "cuda" in came_from:
            torch.cuda.empty_cache()  # the blocks' memory belongs to others now

    def undo(self, bound: list[Binding]) -> None:
        """What stands in a file and can't be brought back stays there, readable, and is told of:
        the error that led here is the one that counts."""
        for binding, devices in zip(bound, self._came_from, strict=False):
            binding.unlock()
            try:
                binding.give_back()
            except OffloadError as error:
                logger.error("%s stays where it is: %s", binding.name, error)
                continue
            for group, device in zip(binding.unit.groups, devices, strict=True):
                parameter = group[0].tensor
                parameter.data = parameter.data.to(device)
        for owner, key, tensor, data in reversed(self._moved):
            if key in owner._buffers:
                owner._buffers[key] = tensor
            else:
                tensor.data = data


def way_bytes(layouts: list[ImageLayout], plan: HostPlan) -> int:
    """Bytes of host memory beside the images, while a unit is moved: it is there twice, and once
    more while it is packed."""
    largest = max(layout.nbytes for layout in layouts)
    return largest * (2 if plan.packed else 1)


def _is_as_laid_out(tensor: Tensor, spec: TensorSpec) -> bool:
    """Whether the tensor's bytes stand on the host as they will in the image."""
    plain = tensor.device.type == "cpu" and not (tensor.is_conj() or tensor.is_neg())
    return plain and tensor.stride() == spec.stride


def _fingerprint(unit: Unit, layout: ImageLayout) -> int:
    """Of the unit's image as it will be."""
    memory = HostStore(HostBackend()).allocate(layout.nbytes)
    image.write_image(
        memory, layout, [group[0].tensor for group in unit.groups], image.leave_unlocked
    )
    return image.fingerprint_of(memory)


def _kept(units: list[Unit]) -> int:
    """Bytes of the units' tensors whose memory does not become free when they are let go."""
    tensors = [group[0].tensor for unit in units for group in unit.groups]
    return host_memory.bytes_not_given_back(tensors)
