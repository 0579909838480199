"""The tensor that stands in a block's `_parameters` outside a forward.

It has real storage over the unit's host bytes, so reads need nothing special and are true. Writes
pass `__torch_dispatch__`, which fences the engine first: bytes that a copy is reading are not
changed under it, and what was prefetched from them is forgotten.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from wanoffload.errors import UnboundWeightError, WeightChangeError


class WeightGuard(Protocol):
    """What a host tensor asks before its bytes are used. One a unit."""

    name: str

    def before_write(self) -> None:
        """The unit's host bytes are about to change."""

    def reader_in_forward(self) -> bool:
        """Whether this thread is inside a forward of the model."""


class HostTensor(torch.Tensor):
    """A view of host bytes that tells its unit before it is written to.

    Views of it (`detach()`, `.data`, slices) are host tensors of the same unit; results of
    computations are ordinary tensors. When it is written to, operands on another device are brought
    to the host, as `copy_` does, so that a LoRA whose adapters live on the device can be fused.

    A copy (`clone()`, `deepcopy`, pickling) is detached from the unit.
    """

    _plain: Tensor
    _guard: WeightGuard | None
    _unswappable: weakref.ref[HostTensor]

    # Subclasses are known by their dispatch alone; torch functions need no override.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def over(plain: Tensor, guard: WeightGuard | None, requires_grad: bool = False) -> HostTensor:
        """Wraps an ordinary tensor; both share the memory."""
        tensor = torch.Tensor._make_subclass(HostTensor, plain, requires_grad)
        tensor._plain = plain
        tensor._guard = guard
        return tensor

    @staticmethod
    def parameter(plain: Tensor, guard: WeightGuard, requires_grad: bool) -> HostTensor:
        """As `over`, and an `nn.Parameter` for everyone who asks."""
        tensor = HostTensor.over(plain, guard, requires_grad)
        tensor._is_param = True  # what isinstance(_, nn.Parameter) looks at in a subclass
        # torch.utils.swap_tensors, which would put another tensor into this very object where no
        # forward could notice, refuses tensors that have a weak reference.
        tensor._unswappable = weakref.ref(tensor)
        return tensor

    @property
    def plain(self) -> Tensor:
        """The same memory as an ordinary tensor. Writing to it is not noticed."""
        return self._plain

    @property
    def data(self) -> Tensor:
        """As `Tensor.data`; what is written to it counts as written to this tensor."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self.assign(value)

    def assign(self, value: Tensor) -> None:
        """Takes over the values of a tensor of the same shape and dtype, on any device.

        Raises WeightChangeError for any other: this tensor's place in memory is fixed.
        """
        source = (value._plain if isinstance(value, HostTensor) else value).detach()
        same = source.shape == self.shape and source.dtype == self.dtype
        if same and source.data_ptr() == self.data_ptr() and source.stride() == self.stride():
            return
        if not same or source.device.type == "meta":
            name = self._guard.name if self._guard is not None else "a host tensor"
            raise WeightChangeError(
                f"{name}: a weight of {tuple(self.shape)} {self.dtype} can't become "
                f"{tuple(source.shape)} {source.dtype} on {source.device} while the model is "
                "wrapped. Call wanoffload.unwrap() first, change it, and wrap again."
            )
        if self._guard is not None:
            self._guard.before_write()
        with torch.no_grad():
            self._plain.copy_(source)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _dispatch(func, args, kwargs or {})

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only array over the same memory: writes through numpy could not be noticed."""
        array = self._plain.detach().numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, dtype: Any = None) -> Any:
        return np.asarray(self.numpy(), dtype=dtype)

    def tolist(self) -> Any:
        return self._plain.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = self._ordinary(self._plain.detach().clone())
        copy: Tensor = memo[id(self)]
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._ordinary(self._plain).__reduce_ex__(protocol)

    def _ordinary(self, plain: Tensor) -> Tensor:
        if isinstance(self, torch.nn.Parameter):
            return torch.nn.Parameter(plain, self.requires_grad)
        return plain

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"HostTensor({self._plain!r})"


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda x: found.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
    return found


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
    for guard in {id(t._guard): t._guard for t in written}.values():
        if guard is not None:
            guard.before_write()
    results = func(*_to_plain(args, bool(written)), **_to_plain(kwargs, bool(written)))
    return _from_plain(results, hosts, is_copy=func is torch.ops.aten.clone.default)


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
            return HostTensor.over(value, owner._guard)
        return HostTensor.over(value, None) if is_copy else value

    return tree_map(wrapped, results)
