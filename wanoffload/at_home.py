"""A model all of whose blocks are on the device: while that lasts, they are ordinary modules.

Nothing is left to be fetched, so no hook of a block is in the way of its calls, and entries are
parameters over the homes, also outside of a forward. What is written to them is written on the
device; fingerprints tell of which units, and the host's images get those values before a model
streams again, is moved, unwrapped or closed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wanoffload import hooks
from wanoffload.errors import WrapError
from wanoffload.host_tensor import ordinary_tensors

if TYPE_CHECKING:
    from wanoffload.binding import Binding
    from wanoffload.runtime import Offloader

logger = logging.getLogger(__name__)


@dataclass
class _Unit:
    """One unit at home. `values`: of its weights, over the home; `parameters` may be made to stand
    elsewhere. `fingerprint`: of what the host has, too. `unhooked`: our hook could be taken out."""

    values: list[Tensor]
    parameters: list[nn.Parameter]
    fingerprint: int
    unhooked: bool = False

    def intact(self) -> list[bool]:
        """Of which weights the parameter still stands over the home (`.data` was not set)."""
        return [_same(p, v) for p, v in zip(self.parameters, self.values, strict=True)]


class AtHome:
    """Whether a model's blocks are ordinary modules now, and the way there and back.

    `there`: they are, but for units that were written to on the host since then.
    """

    def __init__(self, offloader: Offloader) -> None:
        self.there = False
        self._offloader = offloader
        self._units: dict[int, _Unit] = {}
        self._bringing_back = False

    def has(self, index: int) -> bool:
        """Whether a unit is at home."""
        return index in self._units

    def go(self) -> None:
        """All that the model streams has come to its homes, and nothing of it is in use. Waits for
        the device. If somebody has replaced a weight meanwhile, it is left for the next forward."""
        bindings = self._offloader.bindings
        if not all(binding.shows() for binding in bindings):
            return
        self._wait()
        self._units = {binding.index: self._came(binding) for binding in bindings}
        for binding in bindings:
            unit = self._units[binding.index]
            binding.exchange(binding.weights, unit.parameters)
            unit.unhooked = hooks.step_aside(binding.unit.module)
        for whole in self._offloader.together:
            hooks.step_aside(whole.block)
        self.there = True
        logger.debug("all %d units are on the device: no hook runs", len(bindings))

    def leave(self) -> None:
        """Entries are the host tensors again, with the values that they have on the device, and
        hooks are in the way. Idempotent. Waits for the device.

        Raises WrapError if a weight has a gradient, HostMemoryError if there is too little memory
        to take in what was written; then they are at home, as they were.
        """
        if not self.there or self._bringing_back:
            return
        bindings = [b for b in self._offloader.bindings if b.index in self._units]
        for binding in bindings:
            self._refuse_gradients(binding)
        self._wait()
        for binding in bindings:
            with binding.turn:
                self.bring_back(binding)
        for binding in bindings:
            self._step_in(binding)
        for whole in self._offloader.together:
            hooks.step_in_whole(whole.block, whole)
        self.there = False

    def leave_if_written_on_host(self) -> None:
        """Before a forward: all go if one had to."""
        if self.there and len(self._units) < len(self._offloader.bindings):
            self.leave()

    def leave_alone(self, binding: Binding) -> None:
        """One unit leaves: a host tensor of it, which somebody has kept, is about to be written to.
        In its turn. Raises as `leave`."""
        if binding.index in self._units and not self._bringing_back:
            with self._offloader.thread.between_forwards("a weight was written to", "do it behind"):
                self._refuse_gradients(binding)
                self.bring_back(binding)
                self._step_in(binding)

    def bring_back(self, binding: Binding) -> None:
        """The host has a unit's values as they are on the device, if it is at home. In its turn."""
        unit = self._units.get(binding.index)
        if unit is None or self._bringing_back:
            return
        fingerprint = self._fingerprint(binding)
        if fingerprint == unit.fingerprint:
            return
        self._bringing_back = True
        try:
            binding.write(unit.values)
        finally:
            self._bringing_back = False
        unit.fingerprint = fingerprint

    def _came(self, binding: Binding) -> _Unit:
        place = self._offloader.memory.homes[binding.index].place.place(0)
        with ordinary_tensors():
            values = [place.own_view(spec) for spec in binding.layout.specs]
            parameters = [
                nn.Parameter(value, requires_grad=weight.requires_grad)
                for value, weight in zip(values, binding.weights, strict=True)
            ]
        return _Unit(values, parameters, self._fingerprint(binding))

    def _step_in(self, binding: Binding) -> None:
        """What somebody replaced stays, for the next forward to take in."""
        unit = self._units.pop(binding.index)
        ours: list[object] = [
            parameter if intact else None
            for parameter, intact in zip(unit.parameters, unit.intact(), strict=True)
        ]
        for weight, parameter in zip(binding.weights, unit.parameters, strict=True):
            if weight.requires_grad != parameter.requires_grad:
                weight.requires_grad_(parameter.requires_grad)
        binding.exchange(ours, binding.weights)
        if unit.unhooked:
            hooks.step_in(binding.unit.module)

    def _refuse_gradients(self, binding: Binding) -> None:
        for spec, parameter in zip(
            binding.layout.specs, self._units[binding.index].parameters, strict=True
        ):
            if parameter.grad is not None:
                raise WrapError(
                    f"{binding.name}.{spec.name} has a gradient, which would be lost: the model is "
                    "about to stream again. Call zero_grad(set_to_none=True) first."
                )

    def _fingerprint(self, binding: Binding) -> int:
        memory = self._offloader.memory
        home = memory.homes[binding.index].place.place(0)
        return memory.fingerprint_at(home, binding.layout.nbytes)

    def _wait(self) -> None:
        if self._offloader.device.type == "cuda":
            torch.cuda.synchronize(self._offloader.device)


def _same(tensor: Tensor, other: Tensor) -> bool:
    """Whether they are the same memory seen in the same way."""
    return (
        tensor.device == other.device
        and tensor.data_ptr() == other.data_ptr()
        and tensor.dtype == other.dtype
        and tensor.shape == other.shape
        and tensor.stride() == other.stride()
    )
