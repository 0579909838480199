"""Who stands on the device: components of a pipeline take turns, one tenant at a time.

A component's root has a hook in accelerate's protocol (`_hf_hook`, with `execution_device`,
`pre_forward`, `post_forward`, `detach_hook`), which is what diffusers asks for the device of its
inputs and calls before `vae.encode` and `vae.decode`. The forward itself is hooked below the hooks
of others, as blocks are (see `hooks`), so that these can come and go in any order, and so that the
tenant also goes home when the forward fails.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from wanoffload import hooks
from wanoffload.errors import MoveError
from wanoffload.pipelines.parking import Parked
from wanoffload.runtime import Offloader

HF_HOOK = "_hf_hook"
_OWN_ENTRIES = (HF_HOOK, "__reduce_ex__", "_apply")


class Tenant(Protocol):
    def arrive(self) -> None: ...
    def leave(self) -> None: ...


class Floor(hooks.Attached):
    """The device memory that the components of one pipeline take in turns."""

    def __init__(self) -> None:
        self.tenant: Tenant | None = None
        self.residents: Offloader | None = None
        """Of whom blocks stayed here when it went home."""
        self._settled = False  # the tenant is there, all of it

    def enter(self, tenant: Tenant) -> None:
        """Brings a tenant in; whoever stands there goes home first. Nothing if it is there.

        One that was interrupted on its way, in or out, is sent home before anything else.
        """
        if self.tenant is tenant and self._settled:
            return
        self.clear()
        self.tenant = tenant
        try:
            tenant.arrive()
            self._settled = True
        except BaseException:
            self.clear()
            raise

    def clear(self) -> None:
        """Sends the tenant home, if there is one."""
        self._settled = False
        if self.tenant is not None:
            self.tenant.leave()
            self.tenant = None


class StreamedTenant:
    """A streamed DiT: its slots come with its forward, and go when another tenant comes.

    What it has on the device by a budget that was given stays there, from call to call, until
    another DiT comes: one budget is for both. Not so, without `residents_stay`, where others need
    the room.
    """

    def __init__(self, floor: Floor, runtime: Offloader, residents_stay: bool) -> None:
        self.floor = floor
        self.runtime = runtime
        self._residents_stay = residents_stay

    def arrive(self) -> None:
        """The offloader resumes by itself. Another's blocks make room."""
        other = self.floor.residents
        if other is not None and other is not self.runtime and other.memory.homes.units:
            other.forget_forward()  # one that was interrupted: this thread is in another's
            other.pause()
        self.floor.residents = self.runtime

    def leave(self) -> None:
        if self.runtime.paused and self.runtime.in_forward():
            return  # interrupted on its way in: it has taken nothing yet
        given = self.runtime.budget.nbytes is not None and not self.runtime.budget.auto
        self.runtime.pause(keep_residents=given and self._residents_stay)


class ComponentHook(hooks.Attached):
    """The tenant that is a component's parked weights, and a streamed part of it, if any.

    `stays`: it goes home when another tenant comes (DiTs, VAE), not at the end of each forward.
    """

    no_grad = False  # what accelerate asks of a hook

    def __init__(
        self, floor: Floor, parked: Parked, streamed: Offloader | None, stays: bool
    ) -> None:
        self.floor = floor
        self.parked = parked
        self.streamed = streamed
        self.stays = stays
        # Moving weights is nothing for a compiler to trace.
        self._enter = torch.compiler.disable(floor.enter)
        self._clear = torch.compiler.disable(floor.clear)

    @property
    def execution_device(self) -> torch.device:
        return self.parked.device

    # As a tenant.

    def arrive(self) -> None:
        self.parked.bring_in()

    def leave(self) -> None:
        try:
            self.parked.send_home()
        finally:
            if self.streamed is not None:
                self.streamed.pause()

    # As a hook.

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Weights and inputs stand on the device."""
        self._enter(self)
        self.parked.use_here()
        device = self.execution_device
        moved: tuple[Any, Any] = tree_map_only(Tensor, lambda t: t.to(device), (args, kwargs))
        return moved

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if not self.stays:
            if self.streamed is not None:
                self.streamed.forget_forward()  # this module's is over, and so is its part's
            self._clear()
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Somebody else takes the hook out: the weights go home, and forwards run as they are."""
        if self.floor.tenant is self:
            self.floor.clear()
        return module


def install(module: nn.Module, hook: ComponentHook) -> None:
    """Puts the hook in the way of a component's forward. Copies of the module lose it."""
    module.__dict__[HF_HOOK] = hook
    module.__dict__["__reduce_ex__"] = functools.partial(_reduce, module)
    module.__dict__["_apply"] = functools.partial(_component_apply, module)
    hooks.hook_forward(module, _component_forward)


def installed(module: nn.Module) -> bool:
    """Whether the component has such a hook."""
    return isinstance(module.__dict__.get(HF_HOOK), ComponentHook)


def uninstall(module: nn.Module) -> None:
    """Takes out what was installed; hooks of others stay."""
    hooks.unhook_forward(module)
    if installed(module):
        for name in _OWN_ENTRIES:
            module.__dict__.pop(name, None)


@hooks.ours
def _component_forward(module: nn.Module, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
    hook = module.__dict__.get(HF_HOOK)
    if not isinstance(hook, ComponentHook):
        return hooks.call_inner(module, inner, args, kwargs)
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    try:
        output = hooks.call_inner(module, inner, args, kwargs)
    finally:
        hook.post_forward(module, None)
    return output


@hooks.ours
def _component_apply(module: nn.Module, /, fn: Any, recurse: bool = True) -> nn.Module:
    """Takes the place of `_apply` (`.to()`, `.half()`): refused before a part of it is changed."""
    hook = module.__dict__.get(HF_HOOK)
    if isinstance(hook, ComponentHook) and hook.streamed is not None:
        try:
            hook.streamed.check_move(fn)
        except MoveError:
            raise MoveError(
                f"this {type(module).__name__} is part of an enabled pipeline, and its blocks are "
                "streamed: it can't be moved to another device or cast. Call "
                "wanoffload.disable(pipe) first."
            ) from None
    changed: nn.Module = type(module)._apply(module, fn, recurse)
    return changed


def _reduce(module: nn.Module, protocol: Any) -> tuple[Callable[..., Any], Any, dict[str, Any]]:
    """Copies and pickles are ordinary modules: without the hook, and without this function."""
    state = {key: value for key, value in module.__dict__.items() if key not in _OWN_ENTRIES}
    return copyreg.__newobj__, (type(module),), state  # type: ignore[attr-defined]
