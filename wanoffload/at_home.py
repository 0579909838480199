"""A model all of whose blocks are on the device: while that lasts, they are ordinary modules.

Nothing is left to be fetched, so no hook of a block is in the way of its calls, and entries are
parameters over the homes, also outside of a forward. What is written to them is written on the
device; fingerprints tell of which units, and the host's images get those values before a model
streams again, is unwrapped or closed. A home that somebody else still sees then, through a tensor
that was kept, is left to them: it is not filled again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from wanoffload import hooks
from wanoffload.errors import WrapError
from wanoffload.host_tensor import ordinary_tensors

if TYPE_CHECKING:
    from wanoffload.binding import Binding
    from wanoffload.runtime import Offloader

logger = logging.getLogger(__name__)


@dataclass
class _Unit:
    """One unit at home.

    Attributes:
        values: of its weights, over the home, each with a storage of its own.
        parameters: the same; somebody may have made them stand elsewhere.
        fingerprint: of what both home and host have; None: the host's is being written.
        addresses: where the values stand.
        unhooked: our hook could be taken out.
        coming_back: the host gets its values now. Guarded by the unit's turn.
    """

    values: list[Tensor]
    parameters: list[nn.Parameter]
    fingerprint: int | None
    addresses: list[int] = field(init=False)
    unhooked: bool = False
    coming_back: bool = False

    def __post_init__(self) -> None:
        self.addresses = [value.data_ptr() for value in self.values]

    def ours(self) -> list[object]:
        """The parameters; in the place of one that stands elsewhere (its `.data` was set),
        something that nobody has."""
        row = zip(self.parameters, self.values, self.addresses, strict=True)
        return [p if _same(p, value, address) else object() for p, value, address in row]

    def storages(self) -> list[StorageWeakRef]:
        """Of what stands over the home: expired once nobody sees it any more."""
        return [StorageWeakRef(v.untyped_storage()) for v in self.values if v.numel()]


class AtHome:
    """Whether a model's blocks are ordinary modules now, and the way there and back.

    `there`: all are. `came`: the units whose bytes are in their homes since this forward began, as
    the host has them.
    """

    def __init__(self, offloader: Offloader) -> None:
        self.there = False
        self.came: set[int] = set()
        self._offloader = offloader
        self._units: dict[int, _Unit] = {}
        self._alone: dict[int, list[StorageWeakRef]] = {}  # of units that have left alone

    def has(self, index: int) -> bool:
        """Whether a unit is at home."""
        return index in self._units

    @property
    def any(self) -> bool:
        """Whether some unit is: others may have left alone, or a way home or back was cut short."""
        return bool(self._units)

    def go(self) -> None:
        """All that the model streams has come to its homes, and nothing of it is in use. Waits for
        the device. If somebody has replaced a weight meanwhile, it is left for the next forward."""
        bindings = self._offloader.bindings
        if len(self.came) < len(bindings) or not all(binding.shows() for binding in bindings):
            return
        self._wait()
        units = {binding.index: self._came_home(binding) for binding in bindings}
        try:
            for binding in bindings:
                binding.exchange(binding.weights, units[binding.index].parameters)
            self._units = units
            for binding in bindings:
                units[binding.index].unhooked = hooks.is_in_place(binding.unit.module)
                hooks.step_aside(binding.unit.module)
            for whole in self._offloader.together:
                hooks.step_aside(whole.block)
            self.there = True
        except BaseException:
            self._units = units
            self._step_in(bindings)
            raise
        logger.debug("all %d units are on the device: no hook runs", len(bindings))

    def leave(self) -> None:
        """Entries are the host tensors again, with the values that they have on the device, and
        hooks are in the way. Idempotent. Waits for the device. Where somebody still sees a home,
        the engine ends, and that home is theirs.

        Raises WrapError if a weight has a gradient, HostMemoryError if there is too little memory
        to take in what was written; then they are at home, as they were.
        """
        if not self._units and not self._alone:
            return
        bindings = [b for b in self._offloader.bindings if b.index in self._units]
        for binding in bindings:
            _refuse_gradients(binding)
        self._wait()
        for binding in bindings:
            with binding.turn:
                self.bring_back(binding)
        seen = {**self._alone, **{n: unit.storages() for n, unit in self._units.items()}}
        self._step_in(bindings)
        self._alone = seen  # until the homes that are still seen are given away
        self._give_away(n for n, refs in seen.items() if not all(ref.expired() for ref in refs))
        self._alone = {}

    def leave_if_incomplete(self) -> None:
        """Before a forward: all go if one had to, or if going or leaving was interrupted."""
        if not self.there:
            self.leave()

    def leave_alone(self, binding: Binding) -> None:
        """One unit leaves: a host tensor of it, which somebody has kept, is about to be written to.
        In its turn. Raises as `leave`."""
        unit = self._units.get(binding.index)
        if unit is None or unit.coming_back:
            return
        with self._offloader.thread.between_forwards("a weight was written to", "do it afterwards"):
            _refuse_gradients(binding)
            self.bring_back(binding)
            self._alone[binding.index] = unit.storages()
            self._step_in([binding])

    def bring_back(self, binding: Binding) -> None:
        """The host has a unit's values as they are on the device, if it is at home. In its turn."""
        unit = self._units.get(binding.index)
        if unit is None or unit.coming_back:
            return
        fingerprint = self._fingerprint(binding)
        if fingerprint == unit.fingerprint:
            return
        unit.fingerprint = None  # should it end half-way
        try:
            unit.coming_back = True
            binding.write(unit.values)
        finally:
            unit.coming_back = False
        unit.fingerprint = fingerprint

    def _came_home(self, binding: Binding) -> _Unit:
        place = self._offloader.memory.homes[binding.index].place.place(0)
        with ordinary_tensors():
            values = [place.own_view(spec) for spec in binding.layout.specs]
            parameters = [
                nn.Parameter(value, requires_grad=weight.requires_grad)
                for value, weight in zip(values, binding.weights, strict=True)
            ]
        return _Unit(values, parameters, self._fingerprint(binding))

    def _step_in(self, bindings: list[Binding]) -> None:
        """What somebody replaced stays, for the next forward to take in. May be done again, should
        it be interrupted."""
        self.there = False
        blocks = set()
        for binding in bindings:
            unit = self._units[binding.index]
            for weight, parameter in zip(binding.weights, unit.parameters, strict=True):
                if weight.requires_grad != parameter.requires_grad:
                    weight.requires_grad_(parameter.requires_grad)
            binding.exchange(unit.ours(), binding.weights)
            if unit.unhooked:
                hooks.step_in(binding.unit.module)
            blocks.add(id(binding.unit.block))
        for whole in self._offloader.together:
            if id(whole.block) in blocks:
                hooks.step_in_whole(whole.block, whole)
        for binding in bindings:
            self._units.pop(binding.index, None)

    def _give_away(self, units: Iterable[int]) -> None:
        """These homes belong to others from here on."""
        seen = list(units)
        if seen:
            self._offloader.streaming.let_go(keep_homes=True)
            self._offloader.memory.homes.let_go(seen)

    def _fingerprint(self, binding: Binding) -> int:
        memory = self._offloader.memory
        home = memory.homes[binding.index].place.place(0)
        return memory.fingerprint_at(home, binding.layout.nbytes)

    def _wait(self) -> None:
        if self._offloader.device.type == "cuda":
            torch.cuda.synchronize(self._offloader.device)


def _refuse_gradients(binding: Binding) -> None:
    for name, tensor in binding.entries():
        if tensor is not None and tensor.grad is not None:
            raise WrapError(
                f"{name} has a gradient, which would be lost: the model is about to stream again. "
                "Call zero_grad(set_to_none=True) first."
            )


def _same(tensor: Tensor, other: Tensor, address: int) -> bool:
    """Whether it stands at this address, and is seen as the other."""
    return (
        tensor.device == other.device
        and tensor.data_ptr() == address
        and tensor.dtype == other.dtype
        and tensor.shape == other.shape
        and tensor.stride() == other.stride()
    )
