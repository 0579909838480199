"""One block of a wrapped model: its image, its entries in `_parameters`, what it holds now."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from wanoffload import hooks, host_memory, image, packing, units
from wanoffload._C import FileImage, HostBackend, HostImage, HostStore, Image, PackedImage
from wanoffload.errors import (
    BackendError,
    ConcurrentForwardError,
    GradientError,
    HostMemoryError,
    VerifyError,
    WeightChangeError,
)
from wanoffload.host_tensor import (
    HostTensor,
    in_turn,
    move,
    ordinary_tensors,
    set_free,
    shares_memory_with,
)
from wanoffload.host_tiers import DISK, PAGEABLE, PINNED
from wanoffload.packed_view import PackedView
from wanoffload.turns import Turn

if TYPE_CHECKING:
    from wanoffload.runtime import Offloader

logger = logging.getLogger(__name__)


class Structure:
    """What a block consisted of when last looked at, so that a change is seen quickly."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        modules = list(block.modules())
        self._children = [(module._modules, tuple(module._modules.values())) for module in modules]
        self._parameters = [(module._parameters, len(module._parameters)) for module in modules]

    def unchanged(self, block: nn.Module) -> bool:
        if block is not self._block:
            return False
        for modules, children in self._children:
            if tuple(modules.values()) != children:
                return False
        return all(len(parameters) == count for parameters, count in self._parameters)


class Binding(hooks.Attached):
    """One block: its image, its entries in `_parameters`, and what it holds now.

    Outside the block's forward the entries are host tensors over the image. During it they are
    views of the slot, made once for each slot.

    An image in files, or one that other processes share, is not this model's to change: before the
    first write it is brought into own memory, and every host tensor with it.

    Over a packed image the host tensors stand in a view, into which they are unpacked when they are
    read. Before the first write all are, and the view is the unit's image: plain, pageable. It is
    packed again before the unit is next fetched, or when too many units are like that.
    """

    def __init__(
        self,
        offloader: Offloader,
        unit: units.Unit,
        layout: image.ImageLayout,
        store_image: Image,
    ) -> None:
        self.offloader = offloader
        self.unit = unit
        self.name = unit.name
        self.layout = layout
        self.image = store_image
        self.index = -1  # in the engine
        self.weights: list[HostTensor] = []
        self.tensors: weakref.WeakValueDictionary[int, HostTensor] = weakref.WeakValueDictionary()
        self.view: PackedView | None = None
        if isinstance(store_image, PackedImage):
            self.view = PackedView(self.name, layout, store_image, offloader.recently_read)
        self.turn = self.view.turn if self.view is not None else Turn()
        # (the _parameters of the owner, its key, the number of the weight), one an entry
        self._places: list[tuple[dict[str, Any], str, int]] = [
            (entry.owner._parameters, entry.key, number)
            for number, group in enumerate(unit.groups)
            for entry in group
        ]
        self._views: dict[int, list[nn.Parameter]] = {}
        self._held: tuple[int, int, int] | None = None  # slot, generation, stream
        self._direct = False  # entered without the model's forward
        self._structure: Structure | None = None
        self._hangs: tuple[nn.Module, str] | None = None  # where in its block a part stands
        if unit.module is not unit.block:
            self._hangs = units.place_below_adapters(unit.block, unit.module)
        self._fingerprint: int | None = None
        self._spoilt = False  # the slot was found to hold other bytes
        self._outdated = False  # the engine has packed bytes of before a write
        self._was_packed = (0, False)  # the bytes that it took, and whether they were page-locked

    # Entries.

    def make_weights(self) -> None:
        """Points the entries at the image, which has been written. The old tensors go."""
        self.weights = [
            self._weight(number, group[0].tensor.requires_grad)
            for number, group in enumerate(self.unit.groups)
        ]
        self.show()

    def _weight(self, number: int, requires_grad: bool) -> HostTensor:
        """A new host tensor over a weight's place."""
        if self.view is None:
            plain = image.host_view(self.layout.specs[number], self.image)
            return HostTensor.parameter(plain, self, requires_grad)
        plain = image.host_view(self.layout.specs[number], self.view.memory)
        return HostTensor.parameter(plain, self, requires_grad, self.view.weight(number))

    def show(self) -> None:
        """Entries are the host tensors."""
        for parameters, key, number in self._places:
            parameters[key] = self.weights[number]

    def shows(self) -> bool:
        """Whether all entries are the host tensors: nobody has put another one there."""
        return all(parameters.get(key) is self.weights[n] for parameters, key, n in self._places)

    def entries(self) -> Iterator[tuple[str, Tensor | None]]:
        """(name, what stands there) of each entry."""
        for parameters, key, number in self._places:
            yield f"{self.name}.{self.layout.specs[number].name}", parameters.get(key)

    def exchange(self, old: Sequence[object], new: Sequence[Tensor]) -> None:
        """Entries that are `old`, weight by weight, become `new`; any others are left as they
        are."""
        for parameters, key, number in self._places:
            if parameters.get(key) is old[number]:
                parameters[key] = new[number]

    def write(self, values: Sequence[Tensor]) -> None:
        """The weights get these values, on any device, of their shapes and dtypes. As any write;
        between forwards or before one has brought anything. Raises as `take_ownership`."""
        with in_turn(self.weights), ordinary_tensors():
            self.before_write()
            for weight, value in zip(self.weights, values, strict=True):
                weight.checked().copy_(value)

    def give_back(self) -> None:
        """Entries are ordinary parameters over the image's memory, which they keep alive.

        Entries that somebody replaced, and no forward has taken in, are left as they are. What is
        not in own memory is brought there first.
        """
        self.take_ownership()
        self.offloader.written.forget(self)
        if plain := [nn.Parameter(w.plain, w.requires_grad) for w in self.weights]:
            self.exchange(self.weights, plain)  # not so if making them was interrupted
        self.index = -1  # what is still held is written to like any other tensor

    def forget_views(self) -> None:
        """The slots are going: lets go of the views into them."""
        self._views.clear()

    def unlock(self) -> None:
        """The image is no longer page-locked."""
        if isinstance(self.stored, HostImage):
            self.stored.unlock()

    def close(self) -> None:
        """The image is ordinary memory from here on; the slots' views are let go."""
        self.forget_views()
        self.unlock()

    @property
    def packed(self) -> bool:
        """Whether the image is packed, now."""
        return isinstance(self.image, PackedImage)

    @property
    def stored(self) -> Image:
        """The image's bytes, packed or not, where they stand: in memory or in files."""
        return self.image.stored if isinstance(self.image, PackedImage) else self.image

    @property
    def tier(self) -> str:
        """Where the image stands: "pinned", "pageable" or "disk"."""
        if isinstance(self.stored, FileImage):
            return DISK
        return PINNED if self.stored.locked else PAGEABLE

    @property
    def owned(self) -> bool:
        """Whether the image is this model's own memory, and plain, so that it may be changed."""
        return isinstance(self.image, HostImage) and not self.image.shared

    @property
    def owning_takes(self) -> int:
        """Bytes of host memory that `take_ownership` needs."""
        if self.owned:
            return 0
        return self.view.missing_bytes if self.view is not None else self.layout.nbytes

    @property
    def owning_gives(self) -> int:
        """Bytes of host memory that become free behind it, once the engine has let go of them."""
        stored = self.stored
        own = self.packed and isinstance(stored, HostImage) and not stored.shared
        return stored.nbytes if own else 0

    def take_ownership(self) -> None:
        """Brings the image into own memory, plain, if it is not there; the engine is fenced.

        Raises HostMemoryError, or TransferError if it can't be read; nothing has changed then.
        """
        with self.turn:
            if not self.owned:
                self._bring_into_memory()

    def _bring_into_memory(self) -> None:
        if self.view is not None:
            self._unpack_to_stay(self.view)
            return
        host_memory.require(self.layout.nbytes, f"bringing {self.name} into memory, to change it,")
        if isinstance(self.image, HostImage):
            self._leave_the_others(self.image)
        else:
            self._move_to(HostStore(HostBackend()).allocate(self.layout.nbytes))
        logger.info("%s was brought into own memory (%d bytes)", self.name, self.image.nbytes)

    def _leave_the_others(self, shared: HostImage) -> None:
        """The bytes move below the address where they stand."""
        if self.index >= 0:
            self.offloader.engine.invalidate(self.index)
        try:
            shared.make_own()
        except (BackendError, HostMemoryError) as error:
            if shared.shared:
                raise
            logger.warning("%s could not be page-locked again: %s", self.name, error)
            if self.index >= 0:
                self.offloader.replace(self.index, shared)  # it goes through the ring now

    def _unpack_to_stay(self, view: PackedView) -> None:
        """The view is the image. The engine is told when the unit is next fetched: `settle`."""
        view.bring_to_stay()
        try:
            if self.index >= 0:
                self.offloader.engine.invalidate(self.index)
        except BaseException:
            assert isinstance(self.image, PackedImage)
            view.is_packed_as(self.image)
            raise
        self._was_packed = self.image.nbytes, self.tier == PINNED
        self._outdated = True  # first: whatever interrupts this, the unit is settled before its use
        self.image = view.memory

    def settle(self) -> None:
        """The engine gets the weights as they are: packed again if they were packed, or plain if
        there is no memory for that. The unit must not be fetched before."""
        with self.turn:
            if not self.pack_again() and self._outdated:
                self.offloader.replace(self.index, self.image)
                self._outdated = False

    def pack_again(self) -> bool:
        """Packs the weights that were written to, and hands them to the engine.

        False if there is too little memory: the unit stays as it is, plain and true.
        """
        if self.view is None or self.packed:
            return True
        try:
            packed = PackedImage(self._packed_anew(self.view))
        except HostMemoryError as error:
            logger.warning("%s stays unpacked: %s", self.name, error)
            return False
        self.offloader.replace(self.index, packed)
        self.image = packed
        self.view.is_packed_as(packed)
        self._outdated = False
        return True

    def _packed_anew(self, view: PackedView) -> HostImage:
        nbytes, locked = self._was_packed
        host_memory.require(nbytes, f"packing {self.name} again")
        store = HostStore(self.offloader.engine.backend)
        stored = packing.pack_on_host(self.layout, view.memory, store)
        if locked and not self.offloader.closed:
            try:
                stored.lock()
            except (BackendError, HostMemoryError) as error:
                logger.warning("%s could not be page-locked again: %s", self.name, error)
        return stored

    def _move_to(self, own: HostImage) -> None:
        own.copy_from(self.image)
        if self.index >= 0:
            self.offloader.replace(self.index, own)
        self.image = own
        with ordinary_tensors():
            for weight, spec in zip(self.weights, self.layout.specs, strict=True):
                if spec.nbytes > 0:
                    storage = image.host_view(spec, own).untyped_storage()
                    move(shares_memory_with(weight, self), storage)

    def take_in_changes(self) -> None:
        """Looks for entries that were replaced, and for modules that came or went."""
        for parameters, key, number in self._places:
            if parameters.get(key) is not self.weights[number]:
                self._take_in(number)
        top = self._top()
        if self._structure is None or not self._structure.unchanged(top):
            self._take_in_structure(top)
            self._structure = Structure(top)

    def _top(self) -> nn.Module:
        """The module, with the adapters that came to stand around it."""
        if self._hangs is None:
            return self.unit.module
        parent, key = self._hangs
        below = top = parent._modules.get(key)
        while below is not None and below is not self.unit.module:
            below = below._modules.get(units.BASE_LAYER)
        return self.unit.module if top is None or below is None else top

    def _take_in(self, number: int) -> None:
        """Copies the value of a replaced entry into the image, under a host tensor of its own.

        Whoever holds the old host tensor, or a view of it, keeps the old values.
        """
        name = f"{self.name}.{self.layout.specs[number].name}"
        new = self._replacement(number, name)
        try:
            self.weights[number].check_fits(new)
        except WeightChangeError as error:
            raise WeightChangeError(f"{name} was replaced: {error}") from None
        hosts = [t for t in (self.weights[number], new) if isinstance(t, HostTensor)]
        with in_turn(hosts), ordinary_tensors():
            self.before_write()
            weight = self._weight(number, new.requires_grad)
            self.weights[number] = weight
            for parameters, key, which in self._places:
                if which == number:
                    parameters[key] = weight
            set_free([t for t in shares_memory_with(weight, self) if t is not weight])
            weight.checked().copy_(new.checked() if isinstance(new, HostTensor) else new)
        logger.debug("%s was replaced; its value was taken in", name)

    def _replacement(self, number: int, name: str) -> Tensor:
        """What stands in all places of a weight now."""
        places = [(parameters, key) for parameters, key, n in self._places if n == number]
        found = [parameters.get(key) for parameters, key in places]
        if any(tensor is None for tensor in found):
            raise WeightChangeError(
                f"{name} was removed while the model is wrapped. Call wanoffload.unwrap() before "
                "changing what a block consists of, and wrap again."
            )
        if any(tensor is not found[0] for tensor in found):
            raise WeightChangeError(
                f"{name} stood in {len(found)} places of the block and was replaced in some of "
                "them, or by different tensors. Call wanoffload.unwrap() before untying weights, "
                "and wrap again."
            )
        new = found[0]
        assert isinstance(new, Tensor)
        return new

    def _take_in_structure(self, top: nn.Module) -> None:
        """Moves what was added to the block (LoRA adapters, buffers) to the device, to stay."""
        device = self.offloader.device
        weights = {id(weight) for weight in self.weights}
        known = self.offloader.residents
        for prefix, owner, in_adapter in _walk(top):
            for key, parameter in owner._parameters.items():
                if parameter is None or id(parameter) in weights:
                    continue
                if not in_adapter and (id(owner), key) not in known:
                    raise WeightChangeError(
                        f"{self.name}.{prefix}{key} was added while the model is wrapped; it would "
                        f"stay on the device ({parameter.nbytes} bytes). Call wanoffload.unwrap() "
                        "first, change the model, and wrap again."
                    )
                if parameter.device != device:
                    with ordinary_tensors():  # it may be written to outside of inference mode
                        parameter.data = parameter.data.to(device)
            for key, buffer in owner._buffers.items():
                if buffer is not None and buffer.device != device:
                    with ordinary_tensors():
                        owner._buffers[key] = buffer.to(device)

    # The guard of the host tensors.

    def before_read(self) -> None:
        """Raises TransferError if the image stands in a file that is not what it was. Of a packed
        one it is found when it is unpacked. What was written on the device is here, too."""
        self.offloader.home.bring_back(self)
        if isinstance(self.image, FileImage):
            self.image.check()

    def before_write(self) -> None:
        """Fences the engine: no copy reads the image from here on, and none counts that did."""
        self.offloader.refuse_other_thread(f"{self.name} was written to")
        self.offloader.home.leave_alone(self)
        self.offloader.home.came.discard(self.index)
        with self.turn:
            self._fingerprint = None
            if not self.owned:
                self.take_ownership()  # which fences it too
            elif self.index >= 0:
                self.offloader.engine.invalidate(self.index)
            if self.view is not None and self.index >= 0:
                self.offloader.written.add(self, pack_others=not self.offloader.home.any)

    def let_addresses_go(self) -> None:
        """What was given out of the model's own parameters' addresses holds no longer."""
        if self.view is not None:
            self.view.release([*self.weights, *(weight._holder for weight in self.weights)])

    def reader_in_forward(self) -> bool:
        return self.offloader.in_forward()

    # A forward of the block.

    @property
    def aside(self) -> bool:
        """Whether it is an ordinary block now, with its weights on the device."""
        return self.offloader.home.has(self.index)

    def compiling(self) -> None:
        """It is about to be compiled."""
        self.offloader.leave_home("compile() was called")

    def compiled(self) -> None:
        """It is fetched in front of the compiled call from here on: nothing is to be done."""

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Brings the weights to the device (the stream waits, not the host), points at them."""
        self.begin(args, kwargs)
        self.bring()

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What comes before: looks whether it may be, and takes in what was changed. That can end
        the engine, so where parts are used together all of them begin before one is brought."""
        direct = self.offloader.begin_block(self.name)
        if self._held is not None and not direct:
            raise ConcurrentForwardError(f"{self.name} was called inside of its own forward")
        try:
            self.recover()  # what an interrupted call of this block alone may have left
            self._direct = direct
            if torch.is_grad_enabled():
                self._refuse_gradients(args, kwargs)
            self.take_in_changes()
            if self._outdated:
                self.settle()
        except BaseException:
            self._end()
            raise

    def bring(self) -> None:
        """The rest of enter."""
        offloader = self.offloader
        try:
            if offloader.paused:  # what was packed anew did not fit the engine's memory
                offloader.resume()
            stream = offloader.compute_stream()
            slot, generation = offloader.acquire(self.index, stream)
            self._held = (slot, generation, stream)
            if offloader.verify:
                self._verify(slot, generation, "before use")
            views = self._views.get(slot) or self._make_views(slot)
            for parameters, key, number in self._places:
                parameters[key] = views[number]
        except BaseException:
            self._end()
            raise

    def exit(self) -> None:
        """Points back at the host and lets the slot go once the stream has got this far."""
        try:
            if self._held is not None and self.offloader.verify:
                slot, generation, _ = self._held
                self._verify(slot, generation, "after use")
        finally:
            self._end()

    def _end(self) -> None:
        """However far it came."""
        direct, self._direct = self._direct, False
        self.recover()
        if direct:
            self.offloader.end_block()

    def recover(self) -> None:
        """Ends what an enter began, however far it came. Idempotent."""
        if self._held is None:
            return
        _, generation, stream = self._held
        self.show()
        self._held = None
        self.offloader.release(self.index, stream, generation)
        if self._spoilt:
            self._spoilt = False
            self.offloader.engine.invalidate(self.index)

    def own(self, output: Any) -> Any:
        """The block's output, with a copy in place of any tensor that is part of the slot."""
        if type(output) in (tuple, list):
            return type(output)(self.own(part) for part in output)
        if isinstance(output, Tensor) and self.offloader.memory.holds(output):
            return output.clone()
        return output

    @property
    def held(self) -> bool:
        return self._held is not None

    def _make_views(self, slot: int) -> list[nn.Parameter]:
        place = self.offloader.memory.place(self.index, slot)
        # Ordinary tensors, whatever mode the forward that needs them first is in.
        with ordinary_tensors():
            views = [
                nn.Parameter(place.view(spec), requires_grad=weight.requires_grad)
                for spec, weight in zip(self.layout.specs, self.weights, strict=True)
            ]
        self._views[slot] = views
        return views

    def _refuse_gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        advice = (
            "Streamed weights are overwritten after use, so gradients can't flow through them: "
            "run the model under torch.inference_mode() or torch.no_grad()."
        )
        for name, parameter in self.unit.module.named_parameters():
            if parameter.requires_grad:
                raise GradientError(
                    f"{self.name}.{name} requires grad and grad mode is on. {advice}"
                )
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.requires_grad:
                raise GradientError(f"an input of {self.name} requires grad. {advice}")

    def _verify(self, slot: int, generation: int, when: str) -> None:
        if self._fingerprint is None:
            self._fingerprint = image.fingerprint_of(self.image)
        found = self.offloader.memory.fingerprint(self.index, slot, self.layout.nbytes)
        if found != self._fingerprint:
            self._spoilt = True
            raise VerifyError(
                f"{self.name} in slot {slot}, generation {generation}, {when}: the device holds "
                f"other bytes than the host (fingerprint {found:#018x}, expected "
                f"{self._fingerprint:#018x}). The engine's last events:\n"
                f"{self.offloader.recent_events()}"
            )

    # Moving.

    @contextmanager
    def moving(self, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """The streamed weights are out of sight while `_apply` walks over the block."""
        if not self.offloader.moving_all:  # the whole model was looked at already
            self.offloader.check_move(fn)
            if not self.aside:
                self.take_in_changes()
        if self.aside:
            yield
            return
        for parameters, key, _ in self._places:
            parameters[key] = None
        try:
            yield
        finally:
            self.show()


def _walk(block: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """(prefix, module, whether it is part of an adapter layer such as PEFT's) of each module."""
    adapters: list[str] = []
    for name, module in block.named_modules():
        if units.BASE_LAYER in module._modules:
            adapters.append(f"{name}." if name else "")
        prefix = f"{name}." if name else ""
        yield prefix, module, any(prefix.startswith(adapter) for adapter in adapters)
