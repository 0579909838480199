"""Where the weights of a model come from when it is wrapped: here, from its own tensors.

`wrapping` knows the way: images, slots, hooks, the engine, and back. A `Weights` knows the bytes.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from wanoffload import host_memory, image
from wanoffload._C import HostImage
from wanoffload.binding import Binding
from wanoffload.image import ImageLayout
from wanoffload.units import Unit, tie_key


class Weights(Protocol):
    """The weights of one model, while it is wrapped. Methods are called in this order, once each
    but `write`, and `undo` in place of what is left when something fails."""

    def prepare(self, units: list[Unit], layouts: list[ImageLayout]) -> None:
        """Nothing is moved yet. Raises HostMemoryError if the host has too little for the rest."""

    def place_others(self, streamed: set[int]) -> None:
        """Brings to the device what is not streamed. `streamed`: ids of the parameters that are."""

    def write(self, unit: Unit, layout: ImageLayout, memory: HostImage, lock: bool) -> None:
        """Fills a unit's image as `layout` says, and page-locks it if `lock`."""

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

    def prepare(self, units: list[Unit], layouts: list[ImageLayout]) -> None:
        """What is still to be taken: blocks on the host are moved one at a time, not copied."""
        tensors = [group[0].tensor for unit in units for group in unit.groups]
        added = host_memory.bytes_not_given_back(tensors)
        largest = max(layout.nbytes for layout in layouts)
        total = sum(layout.nbytes for layout in layouts)
        host_memory.require(
            added + largest,
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

    def write(self, unit: Unit, layout: ImageLayout, memory: HostImage, lock: bool) -> None:
        tensors = [group[0].tensor for group in unit.groups]
        self._came_from.append([tensor.device for tensor in tensors])
        image.write_image(memory, layout, tensors, lock)

    def finish(self) -> None:
        came_from = {device.type for devices in self._came_from for device in devices}
        if self._device.type == "cuda" and "cuda" in came_from:
            torch.cuda.empty_cache()  # the blocks' memory belongs to others now

    def undo(self, bound: list[Binding]) -> None:
        for binding, devices in zip(bound, self._came_from, strict=False):
            binding.image.unlock()
            binding.give_back()
            for group, device in zip(binding.unit.groups, devices, strict=True):
                parameter = group[0].tensor
                parameter.data = parameter.data.to(device)
        for owner, key, tensor, data in reversed(self._moved):
            if key in owner._buffers:
                owner._buffers[key] = tensor
            else:
                tensor.data = data
