"""The class that an enabled pipeline has: its own, with the size read from each call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from wanoffload import hooks
from wanoffload.errors import PipelineError
from wanoffload.pipelines.acting import Enabled
from wanoffload.workload import Workload

_REFUSED = (
    "enable_group_offload",
    "enable_model_cpu_offload",
    "enable_sequential_cpu_offload",
    "remove_all_hooks",
    "reset_device_map",
)


def state(pipe: Any) -> Enabled | None:
    """What `enable` keeps at a pipeline; None if it is not enabled."""
    found = getattr(pipe, "__dict__", {}).get(hooks.ATTRIBUTE)
    return found if isinstance(found, Enabled) else None


@functools.cache
def enabled_class(base: Any) -> type[Any]:
    """A subclass of a pipeline's class, with the same names, so that what is saved is the same.

    An instance without the state of `enable` (loaded through the class of an enabled one) is as one
    of the base.
    """

    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        enabled = state(self)
        if enabled is None:
            return base.__call__(self, *args, **kwargs)
        bound = inspect.signature(base.__call__).bind(self, *args, **kwargs)
        bound.apply_defaults()
        enabled.before_call(self, workload_of(self, bound.arguments))
        try:
            return base.__call__(self, *args, **kwargs)
        finally:
            enabled.after_call()

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        enabled = state(self)
        if enabled is None:
            return base.to(self, *args, **kwargs)
        _check_move(self, enabled, args, kwargs)
        return self

    def execution_device(self: Any) -> Any:
        enabled = state(self)
        return base._execution_device.fget(self) if enabled is None else enabled.device

    def reduce(self: Any, protocol: Any) -> Any:
        entries = {k: v for k, v in self.__dict__.items() if k != hooks.ATTRIBUTE}
        return _blank, (base,), entries

    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {
        "__call__": call,
        "to": to,
        "_execution_device": property(execution_device),
        "__reduce_ex__": reduce,
    }
    refused = {name: _refusal(base, name) for name in _REFUSED if hasattr(base, name)}
    return type(base.__name__, (base,), {**names, **own, **refused})


def _blank(kind: type[Any]) -> Any:
    """What a copy of an enabled pipeline begins as."""
    return object.__new__(kind)


def ordinary_class(enabled: type[Any]) -> type[Any]:
    """The class that an enabled pipeline had before."""
    base: type[Any] = enabled.__bases__[0]
    return base


def _refusal(base: type[Any], name: str) -> Any:
    original = getattr(base, name)

    @functools.wraps(original)
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        if state(self) is None:
            return original(self, *args, **kwargs)
        raise PipelineError(
            f"{name}() would move the weights that wanoffload moves; call wanoffload.disable(pipe) "
            "first"
        )

    return refuse


def _check_move(
    pipe: Any, enabled: Enabled, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raises PipelineError unless `pipe.to(...)` asks for what is."""
    asked = [*args, kwargs.get("device"), kwargs.get("dtype")]
    for wish in asked:
        if wish is None:
            continue
        if isinstance(wish, torch.dtype):
            same = all(m.dtype == wish for m in pipe.components.values() if _has_dtype(m))
        else:
            same = _same_device(torch.device(wish), enabled.device)
        if not same:
            raise PipelineError(
                f"this {type(pipe).__name__} is enabled on {enabled.device} and its weights keep "
                f"their dtypes; it can't be moved or cast to {wish}. Call wanoffload.disable(pipe) "
                "first."
            )


def _has_dtype(component: Any) -> bool:
    return isinstance(component, nn.Module) and hasattr(component, "dtype")


def _same_device(asked: torch.device, device: torch.device) -> bool:
    return asked.type == device.type and asked.index in (None, device.index)


def workload_of(pipe: Any, arguments: Mapping[str, Any]) -> Workload | None:
    """What a call generates, from its arguments; None if its size can't be told beforehand."""
    try:
        return Workload(
            height=_side(pipe, arguments, "height"),
            width=_side(pipe, arguments, "width"),
            frames=_frames(arguments),
            steps=_steps(arguments),
            guidance=_guidance(arguments),
            videos=_videos(arguments),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _side(pipe: Any, arguments: Mapping[str, Any], name: str) -> int:
    side = arguments[name]
    if side is None:  # Qwen-Image's pipelines
        side = pipe.default_sample_size * pipe.vae_scale_factor
    return int(side)


def _frames(arguments: Mapping[str, Any]) -> int:
    for name in ("num_frames", "segment_frame_length"):
        if name in arguments:
            return int(arguments[name])
    if "video" in arguments:
        raise KeyError("num_frames")  # as many as the video has
    return 1


def _steps(arguments: Mapping[str, Any]) -> int:
    sigmas = arguments.get("sigmas")
    return int(arguments["num_inference_steps"]) if sigmas is None else len(sigmas)


def _guidance(arguments: Mapping[str, Any]) -> float:
    """Above 1 where a step takes two forwards."""
    if "true_cfg_scale" not in arguments:
        return float(arguments["guidance_scale"])
    negative = ("negative_prompt", "negative_prompt_embeds")
    given = any(arguments.get(name) is not None for name in negative)
    return float(arguments["true_cfg_scale"]) if given else 1.0


def _videos(arguments: Mapping[str, Any]) -> int:
    """Prompts, times the videos or images for each."""
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    prompts = len(prompt) if isinstance(prompt, list) else 1 if embeds is None else len(embeds)
    for name in ("num_videos_per_prompt", "num_images_per_prompt"):
        if arguments.get(name) is not None:
            return prompts * int(arguments[name])
    return prompts
