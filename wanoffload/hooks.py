"""Where the package stands in the way of a call: attributes of a module's instance.

`forward` (or, below the hooks of diffusers, the innermost forward), so that a block's weights are
fetched only if the block really runs; for a block that is compiled, the compiled call instead, so
that the compiler sees the block as it is; `_apply`, through which `.to()` and its kin go; and the
model's `state_dict` and `load_state_dict`, which are refused to other threads during a forward.

Each is a `functools.partial` over a function of this file and the module. Copies and pickles of the
module copy the partial with its module, and there the binding is gone (see `Attached`), so that a
copy is an ordinary module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from wanoffload.errors import WrapError

ATTRIBUTE = "_wanoffload"


class Attached:
    """What hangs at a module of a wrapped model. Copies and pickles of the module lose it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()


def _nothing() -> None:
    return None


class BlockBinding(Protocol):
    """What the hooks ask of a block's unit."""

    @property
    def aside(self) -> bool:
        """Whether calls go past it for now."""

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None: ...
    def own(self, output: Any) -> Any: ...
    def exit(self) -> None: ...
    def compiling(self) -> None: ...
    def compiled(self) -> None: ...
    def moving(self, fn: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]: ...


class ModelBinding(Protocol):
    """What the hooks ask of a model's offloader."""

    def begin_forward(self, model: nn.Module, inputs: Any) -> None: ...
    def end_forward(self, completed: bool) -> None: ...
    def refuse_other_thread(self, what: str) -> None: ...
    def moving(self, fn: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]: ...


def attached(module: nn.Module) -> Any:
    """The module's binding, or None."""
    return module.__dict__.get(ATTRIBUTE)


def install_on_block(block: nn.Module, binding: BlockBinding) -> None:
    """Puts the binding in the way of the block's forward, however the block is run."""
    block.__dict__[ATTRIBUTE] = binding
    block.__dict__["_apply"] = functools.partial(_apply, block)
    block.__dict__["compile"] = functools.partial(_compile, block)
    step_in(block)


def install_on_whole(block: nn.Module, binding: BlockBinding) -> None:
    """Puts the binding in the way of a block whose parts have bindings of their own: where it is
    compiled, of its compiled call."""
    block.__dict__[ATTRIBUTE] = binding
    block.__dict__["_apply"] = functools.partial(_apply, block)
    block.__dict__["compile"] = functools.partial(_compile, block)
    step_in_whole(block, binding)


def step_in(block: nn.Module) -> None:
    """The binding of a block is in the way of its calls."""
    if block._compiled_call_impl is not None:
        _hook_compiled_call(block)
    else:
        hook_forward(block, _block_forward)


def step_in_whole(block: nn.Module, binding: BlockBinding) -> None:
    """The same, of a block whose parts have bindings: after them."""
    if block._compiled_call_impl is not None:
        binding.compiled()
        _hook_compiled_call(block)


def is_in_place(module: nn.Module) -> bool:
    """Whether our hook is where it can be taken out: others have put nothing around it."""
    forward = _ForwardPlace(module).get()
    return _is_ours(module.__dict__.get("_compiled_call_impl")) or _is_ours(forward)


def step_aside(module: nn.Module) -> None:
    """The binding is in the way of calls no longer; of `.to()` and `compile()` it still is."""
    call = module.__dict__.get("_compiled_call_impl")
    if _is_ours(call):
        module._compiled_call_impl = call.args[1]
    unhook_forward(module)


def install_on_model(model: nn.Module, binding: ModelBinding) -> None:
    """Puts the binding in the way of the model's forward and of `.to()`."""
    _make_uncompiled()
    model.__dict__[ATTRIBUTE] = binding
    model.__dict__["_apply"] = functools.partial(_apply, model)
    model.__dict__["state_dict"] = functools.partial(_state_dict, model)
    model.__dict__["load_state_dict"] = functools.partial(_load_state_dict, model)
    hook_forward(model, _model_forward)


def remove(module: nn.Module) -> None:
    """Takes out what was installed on a block or model. Hooks of others stay as they are."""
    for name in ("_apply", "compile", "state_dict", "load_state_dict"):
        if _is_ours(module.__dict__.get(name)):
            del module.__dict__[name]
    step_aside(module)
    module.__dict__.pop(ATTRIBUTE, None)


_OURS: set[Any] = set()


def ours(function: Callable[..., Any]) -> Callable[..., Any]:
    _OURS.add(function)
    return function


def _is_ours(value: Any) -> TypeGuard[functools.partial[Any]]:
    return isinstance(value, functools.partial) and value.func in _OURS


class _ForwardPlace:
    """Where a module's innermost forward is kept: in its dictionary, or in diffusers' hooks.

    diffusers' HookRegistry keeps, for each hook, a reference to what the hook wraps; the first
    hook's reference is the innermost.
    """

    def __init__(self, module: nn.Module) -> None:
        registry = module.__dict__.get("_diffusers_hook")
        references = getattr(registry, "_fn_refs", None)
        self.module = module
        self.holder: Any = module
        self.name = "forward"
        if references:
            self.holder = references[0]
            if self.holder.original_forward is not None:
                self.name = "original_forward"

    def get(self) -> Callable[..., Any] | None:
        """The forward that somebody set; None for the class's own."""
        current: Callable[..., Any] | None = self.holder.__dict__.get(self.name)
        if getattr(current, "__func__", None) is type(self.module).forward:
            return None
        return current

    def set(self, forward: Callable[..., Any] | None) -> None:
        if forward is None and self.holder is self.module:
            self.module.__dict__.pop("forward", None)
        else:
            setattr(self.holder, self.name, forward or self.bound_class_forward())

    def bound_class_forward(self) -> Callable[..., Any]:
        method: Callable[..., Any] = type(self.module).forward.__get__(self.module)
        return method


def hook_forward(module: nn.Module, function: Callable[..., Any]) -> None:
    unhook_forward(module)  # what a copy of a wrapped module was born with
    place = _ForwardPlace(module)
    inner = place.get()
    hook = functools.partial(function, module, inner)
    # As diffusers does: signatures are looked up through __wrapped__.
    place.set(functools.update_wrapper(hook, inner or place.bound_class_forward()))


def unhook_forward(module: nn.Module) -> None:
    place = _ForwardPlace(module)
    current = place.get()
    if current is not None and _is_ours(current):
        place.set(current.args[1])
        _forget(module.__dict__.get("forward"), current)


def _forget(outer: Any, ours: Any) -> None:
    """Hooks that were put around ours name it as what they wrap: from now on, what ours wraps."""
    while outer is not None:
        wraps: Any = getattr(outer, "__wrapped__", None)
        if wraps is ours:
            outer.__wrapped__ = ours.__wrapped__
        outer = wraps


def call_inner(module: nn.Module, inner: Callable[..., Any] | None, args: Any, kwargs: Any) -> Any:
    if inner is not None:
        return inner(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


@ours
def _block_forward(block: nn.Module, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
    binding: BlockBinding | None = block.__dict__.get(ATTRIBUTE)
    if binding is None or binding.aside:  # what others have put around it can't be taken out
        return call_inner(block, inner, args, kwargs)
    binding.enter(args, kwargs)
    try:
        return binding.own(call_inner(block, inner, args, kwargs))
    finally:
        binding.exit()


@ours
def _model_forward(model: nn.Module, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_dynamo_compiling():
        # torch.compile around the whole model: blocks must be fetched between graphs, so this
        # forward runs eagerly (with fullgraph=True the compiler says why it can't).
        return _uncompiled(model, inner, *args, **kwargs)  # type: ignore[misc]
    if torch.compiler.is_exporting():  # after the other: torch 2.11 compiles this to True
        raise WrapError("a wrapped model can't be exported: call wanoffload.unwrap() first")
    binding: ModelBinding | None = model.__dict__.get(ATTRIBUTE)
    if binding is None:
        return call_inner(model, inner, args, kwargs)
    completed = False
    try:
        binding.begin_forward(model, (args, kwargs))
        output = call_inner(model, inner, args, kwargs)
        completed = True
        return output
    finally:
        binding.end_forward(completed)


# _model_forward behind a wall for the compiler. Made when a model is first wrapped: making it
# imports the compiler, which takes seconds.
_uncompiled: Callable[..., Any] | None = None


def _make_uncompiled() -> None:
    global _uncompiled
    _uncompiled = _uncompiled or torch.compiler.disable(
        _model_forward,
        reason="wanoffload streams the weights of this model block by block: compile its blocks, "
        "with transformer.compile_repeated_blocks(fullgraph=True), and not the whole model",
    )


def _hook_compiled_call(block: nn.Module) -> None:
    compiled = block._compiled_call_impl
    if _is_ours(compiled):
        return
    block._compiled_call_impl = functools.partial(_compiled_call, block, compiled)


@ours
def _compiled_call(block: nn.Module, compiled: Any, /, *args: Any, **kwargs: Any) -> Any:
    binding: BlockBinding | None = block.__dict__.get(ATTRIBUTE)
    if binding is None or binding.aside:
        return compiled(*args, **kwargs)
    binding.enter(args, kwargs)
    try:
        return binding.own(compiled(*args, **kwargs))
    finally:
        binding.exit()


@ours
def _compile(block: nn.Module, /, *args: Any, **kwargs: Any) -> None:
    """Takes the place of `block.compile`: the fetch moves from inside the call to around it."""
    binding: BlockBinding | None = attached(block)
    if binding is None:
        return type(block).compile(block, *args, **kwargs)
    binding.compiling()
    type(block).compile(block, *args, **kwargs)  # if it fails, all is as it was
    unhook_forward(block)
    binding.compiled()
    _hook_compiled_call(block)
    return None


@ours
def _state_dict(model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of `model.state_dict`: not while another thread's blocks are in slots."""
    if (binding := attached(model)) is not None:
        binding.refuse_other_thread("state_dict() was called")
    return type(model).state_dict(model, *args, **kwargs)


@ours
def _load_state_dict(model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of `model.load_state_dict`, likewise."""
    if (binding := attached(model)) is not None:
        binding.refuse_other_thread("load_state_dict() was called")
    return type(model).load_state_dict(model, *args, **kwargs)


@ours
def _apply(module: nn.Module, /, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Takes the place of `module._apply`: streamed weights stay where they are."""
    binding: BlockBinding | ModelBinding | None = attached(module)
    with binding.moving(fn) if binding is not None else nullcontext():
        moved: nn.Module = type(module)._apply(module, fn, recurse)
    return moved
