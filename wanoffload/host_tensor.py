"""The tensor that stands in a block's `_parameters` outside a forward.

It has real storage over the unit's host bytes, in memory or in a mapped file, so reads are true.
Reads and writes pass `__torch_dispatch__`. Before a read a file is looked at for changes, and what
is packed is unpacked. A write fences the engine first: bytes that a copy is reading are not changed
under it, what was prefetched from them is forgotten, and what stands in a file, or packed, comes
into memory as it is.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from wanoffload.errors import UnboundWeightError, WeightChangeError
from wanoffload.image import placed_like
from wanoffload.turns import Turn, all_of


class WeightGuard(Protocol):
    """What a host tensor asks before its bytes are used. One a unit."""

    name: str
    tensors: weakref.WeakValueDictionary[int, HostTensor]
    """Every host tensor of the unit that somebody holds, by its id."""
    turn: Turn
    """Held while the unit's host bytes are used or move."""

    def before_read(self) -> None:
        """The unit's host bytes are about to be read. Raises if they are not what they were."""

    def before_write(self) -> None:
        """The unit's host bytes are about to change; they may move to another place first."""

    def reader_in_forward(self) -> bool:
        """Whether this thread is inside a forward of the model."""


class Home(Protocol):
    """Where the bytes of one weight of a packed unit stand while they are needed. Guarded by its
    unit's turn, which is the guard's too."""

    @property
    def turn(self) -> Turn: ...

    def bring(self) -> None:
        """The weight is about to be read. Raises HostMemoryError, TransferError."""

    def bring_to_stay(self) -> None:
        """The unit is about to change, and from here on stands in memory as it is. Raises likewise.
        Does nothing if it does already."""

    def keep_for(self, *holders: object) -> None:
        """The weight's address was given out: it stays as long as one of these lives."""

    def lend(self) -> torch.UntypedStorage:
        """An ordinary storage; the weight stays as long as somebody has it."""

    def shell(self, plain: Tensor) -> Tensor:
        """What torch knows of a tensor of this weight; its bytes it can't get at."""

    def after_use(self) -> None:
        """The turn is over."""


class Holder:
    """Lives as long as a host tensor, or a view that was made of it."""


class HostTensor(torch.Tensor):
    """A view of host bytes that tells its unit before it is written to.

    Views of it (`detach()`, `.data`, slices) are host tensors of the same unit; results of
    computations are ordinary tensors. When it is written to, operands on another device are brought
    to the host, as `copy_` does, so that a LoRA whose adapters live on the device can be fused.

    Assigning (`weight.data = x`, `layer.weight = x`) changes the weight, not what was taken from it
    earlier: a tensor that somebody still holds keeps its values, as with ordinary parameters. A
    copy (`clone()`, `deepcopy`, pickling) is detached from the unit.
    """

    _plain: Tensor
    _guard_reference: weakref.ref[Any] | None
    _home: Home | None
    _holder: Holder

    # Subclasses are known by their dispatch alone; torch functions need no override.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def over(
        plain: Tensor,
        guard: WeightGuard | None,
        requires_grad: bool = False,
        *,
        home: Home | None = None,
        holder: Holder | None = None,
        base: Tensor | None = None,
    ) -> HostTensor:
        """Wraps an ordinary tensor; both share the memory. `holder`: of what it is a view of.
        `base`: what torch gets to see in place of `plain`; if None, what `home` says."""
        if base is None:
            base = plain
            if home is not None:
                with ordinary_tensors():
                    base = home.shell(plain)
        tensor = torch.Tensor._make_subclass(HostTensor, base, requires_grad)
        tensor._plain = plain
        tensor._guard_reference = None
        tensor._home = home
        tensor._holder = holder or Holder()
        if guard is not None:
            tensor._guard_reference = weakref.ref(guard)
            # This weak reference does one thing more: torch.utils.swap_tensors, which would put
            # another tensor into this very object where nobody could notice, refuses it.
            guard.tensors[id(tensor)] = tensor
        return tensor

    @staticmethod
    def parameter(
        plain: Tensor, guard: WeightGuard, requires_grad: bool, home: Home | None = None
    ) -> HostTensor:
        """As `over`, and an `nn.Parameter` for everyone who asks."""
        tensor = HostTensor.over(plain, guard, requires_grad, home=home)
        tensor._is_param = True  # what isinstance(_, nn.Parameter) looks at in a subclass
        return tensor

    @property
    def _guard(self) -> WeightGuard | None:
        return self._guard_reference() if self._guard_reference is not None else None

    @property
    def plain(self) -> Tensor:
        """The same memory as an ordinary tensor. Writing to it is not noticed."""
        return self._lent()

    @property
    def address(self) -> int:
        """Where it stands, to be compared with others: what is there is not looked at."""
        return self._plain.data_ptr()

    @property
    def data(self) -> Tensor:
        """As `Tensor.data`; what is written to it counts as written to this tensor.

        Of a packed unit it is unpacked, and stays so as long as somebody has it: it may become the
        data of an ordinary tensor.
        """
        if self._home is None:
            return self.detach()
        lent = self._lent().detach()
        return HostTensor.over(
            self._plain, self._guard, home=self._home, holder=self._holder, base=lent
        )

    @data.setter
    def data(self, value: Tensor) -> None:
        self.assign(value)

    def assign(self, value: Tensor) -> None:
        """Takes over the values of a tensor of the same shape and dtype, on any device.

        Raises WeightChangeError for any other: this tensor's place in memory is fixed.
        """
        self.check_fits(value)
        address = value.address if isinstance(value, HostTensor) else value.data_ptr()
        if address == self.address and value.stride() == self.stride():
            return
        guard = self._guard
        hosts = [self, value] if isinstance(value, HostTensor) else [self]
        with in_turn(hosts), ordinary_tensors():
            _before_write([self])
            if guard is not None:
                set_free([t for t in shares_memory_with(self, guard) if t is not self])
            self._plain.copy_(value.checked() if isinstance(value, HostTensor) else value)

    def check_fits(self, value: Tensor) -> None:
        """Raises WeightChangeError unless this tensor's place in memory can hold the value."""
        same = value.shape == self.shape and value.dtype == self.dtype
        if not same or value.device.type == "meta":
            name = self._guard.name if self._guard is not None else "a host tensor"
            raise WeightChangeError(
                f"{name}: a weight of {tuple(self.shape)} {self.dtype} can't become "
                f"{tuple(value.shape)} {value.dtype} on {value.device} while the model is "
                "wrapped. Call wanoffload.unwrap() first, change it, and wrap again."
            )

    def share_memory_(self) -> HostTensor:
        """Refused: torch would move these bytes, and the engine would go on reading the old."""
        raise WeightChangeError(
            "the weights of a wrapped model can't be moved to shared memory; call "
            "wanoffload.unwrap() first, or share a clone()"
        )

    def apply_(self, function: Callable[[Any], Any]) -> HostTensor:
        """As `Tensor.apply_`, which torch does without telling anybody."""
        with in_turn([self]), ordinary_tensors():
            _before_write([self])
            self._plain.apply_(function)
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _dispatch(func, args, kwargs or {})

    def checked(self) -> Tensor:
        """`plain`, about to be read, in its unit's turn. Raises TransferError if a file is not what
        it was, or packed bytes are spoilt; HostMemoryError if there is no room to unpack them."""
        if (guard := self._guard) is not None:
            guard.before_read()
        if self._home is not None:
            self._home.bring()
        return self._plain

    def _lent(self) -> Tensor:
        """An ordinary tensor over the same bytes, which stay as long as somebody has it."""
        with in_turn([self]):
            plain = self.checked()
            if self._home is None:
                return plain
            with ordinary_tensors():
                return placed_like(plain, self._home.lend())

    def data_ptr(self) -> int:
        """As `Tensor.data_ptr`. Of a packed unit, the bytes stay there as long as this tensor, or
        one that it is a view of, is alive; those of the model's own parameters until its next
        forward begins."""
        with in_turn([self]):
            plain = self.checked()
            if self._home is not None:
                self._home.keep_for(self, self._holder)
            return plain.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """As `Tensor.untyped_storage`, for reading: writes through it could not be noticed."""
        return self._lent().untyped_storage()

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        """As `Tensor.contiguous`. Of a packed unit, a view in place of this tensor itself: who asks
        it for its address keeps the weight unpacked as long as the view lives. So `save_pretrained`
        takes memory for one shard, not for all."""
        if self._home is None or isinstance(self, torch.nn.Parameter):
            return super().contiguous(memory_format=memory_format)
        if not self.is_contiguous(memory_format=memory_format) or self.requires_grad:
            return super().contiguous(memory_format=memory_format)
        return HostTensor.over(self._plain, self._guard, home=self._home)

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only array over the same memory: writes through numpy could not be noticed."""
        array = self._lent().detach().numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = np.asarray(self.numpy(), dtype=dtype)
        return array.copy() if copy else array

    def __dlpack__(self, **options: Any) -> Any:
        """As `Tensor.__dlpack__`, for reading."""
        if self.requires_grad:
            return super().__dlpack__(**options)  # refuses it
        return self._lent().__dlpack__(**options)

    def tolist(self) -> Any:
        with in_turn([self]):
            return self.checked().tolist()

    def _copied(self) -> Tensor:
        """An ordinary tensor with the values."""
        with in_turn([self]):
            return self._ordinary(self.checked().detach().clone())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = self._copied()
        copy: Tensor = memo[id(self)]
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._ordinary(self._lent()).__reduce_ex__(protocol)

    def _ordinary(self, plain: Tensor) -> Tensor:
        if isinstance(self, torch.nn.Parameter):
            return torch.nn.Parameter(plain, self.requires_grad)
        return plain

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with in_turn([self]):
            return f"HostTensor({self.checked()!r})"


def shares_memory_with(tensor: HostTensor, guard: WeightGuard) -> list[HostTensor]:
    """The unit's host tensors that stand on the same weight, `tensor` included."""
    memory = tensor._plain.untyped_storage().data_ptr()
    held = list(guard.tensors.values())
    return [t for t in held if t.numel() and t._plain.untyped_storage().data_ptr() == memory]


def set_free(tensors: list[HostTensor]) -> None:
    """Host tensors of one weight get a copy of its bytes of their own, and belong to no unit."""
    if not tensors:
        return
    with ordinary_tensors():
        move(tensors, tensors[0]._plain.untyped_storage().clone())
    for tensor in tensors:
        tensor._guard_reference = None
        tensor._home = None


def move(tensors: list[HostTensor], storage: torch.UntypedStorage) -> None:
    """Host tensors of one weight stand on another storage from here on, with the same bytes."""
    for tensor in tensors:
        moved = placed_like(tensor._plain, storage)
        torch.Tensor.data.__set__(tensor, moved)  # type: ignore[attr-defined]
        tensor._plain = moved


@contextmanager
def in_turn(hosts: Iterable[HostTensor]) -> Iterator[None]:
    """The units of these tensors are this thread's. Behind it, what was unpacked may be dropped."""
    hosts = list(hosts)
    homes = {id(t._home.turn): t._home for t in hosts if t._home is not None}
    guards = [guard for t in hosts if (guard := t._guard) is not None]
    try:
        with all_of([*(guard.turn for guard in guards), *(h.turn for h in homes.values())]):
            yield
    finally:
        for home in homes.values():
            home.after_use()


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Tensors made here are ordinary, also if the caller is in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _identity(value: Tensor) -> Tensor:
    return value


def _reduce_for_another_process(tensor: HostTensor) -> Any:
    """Sends a copy: torch moves what it sends to another process into shared memory."""
    return _identity, (tensor._copied(),)


ForkingPickler.register(HostTensor, _reduce_for_another_process)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that the operation's schema says it writes to."""
    values: list[Any] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        values.append(args[i] if i < len(args) else kwargs.get(argument.name))
    return _tensors(tuple(values), {})


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hosts = [t for t in _tensors(args, kwargs) if isinstance(t, HostTensor)]
    for tensor in hosts:
        guard = tensor._guard
        if guard is not None and guard.reader_in_forward():
            raise UnboundWeightError(
                f"{guard.name}: {func} read this block's weights during the model's forward, but "
                "outside the block's own forward, where they are not on the device"
            )
    written = [t for t in _written(func, args, kwargs) if isinstance(t, HostTensor)]
    if written and torch.Tag.inplace_view in func.tags:
        raise WeightChangeError(
            f"{func} would change the shape of an offloaded weight in place; "
            "call wanoffload.unwrap() first"
        )
    if func.overloadpacket is torch.ops.aten.set_:
        return _set(func, args, kwargs)
    with in_turn(hosts):
        _before_write(written)
        if not _looks_at_no_value(func):
            for tensor in hosts:
                tensor.checked()
        results = func(*_to_plain(args, bool(written)), **_to_plain(kwargs, bool(written)))
        return _from_plain(results, hosts, is_copy=func is torch.ops.aten.clone.default)


def _set(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An ordinary tensor comes to stand on a weight, which therefore stays where it is."""

    def lent(value: Any) -> Any:
        return value._lent() if isinstance(value, HostTensor) else value

    with ordinary_tensors():
        return func(*tree_map(lent, args), **tree_map(lent, kwargs))


def _before_write(tensors: list[HostTensor]) -> None:
    """In their units' turns."""
    for guard in {id(t._guard): t._guard for t in tensors}.values():
        if guard is not None:
            guard.before_write()
    for tensor in tensors:
        if tensor._home is not None:  # a unit whose model is gone has no guard
            tensor._home.bring_to_stay()


@functools.cache
def _looks_at_no_value(func: Any) -> bool:
    """Views, of which nothing is read, and what only asks where a tensor stands.

    In inference mode operations come here that are made of others, such as `reshape`: they say that
    they give a view, and copy where they can't.
    """
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    if func.is_view and not func.has_kernel_for_dispatch_key(composite):
        return True
    return func in (torch.ops.aten.is_pinned.default, torch.ops.aten.empty_like.default)


def _to_plain(values: Any, to_host: bool) -> Any:
    def plain(value: Any) -> Any:
        if isinstance(value, HostTensor):
            return value._plain
        if to_host and isinstance(value, Tensor) and value.device.type != "cpu":
            return value.cpu()
        return value

    return tree_map(plain, values)


def _from_plain(results: Any, hosts: list[HostTensor], is_copy: bool) -> Any:
    """Results that share a host tensor's memory become host tensors of its unit."""
    by_plain = {id(t._plain): t for t in hosts}
    by_memory = {t._plain.untyped_storage().data_ptr(): t for t in hosts if t.numel() > 0}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, HostTensor):
            return value
        if id(value) in by_plain:
            return by_plain[id(value)]
        if value.device.type != "cpu":
            return value
        owner = by_memory.get(value.untyped_storage().data_ptr()) if value.numel() > 0 else None
        if owner is not None:
            return HostTensor.over(value, owner._guard, home=owner._home, holder=owner._holder)
        return HostTensor.over(value, None) if is_copy else value

    return tree_map(wrapped, results)
