"""`enable` and `disable`: a plan, acted on over a whole diffusers pipeline, and taken back."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wanoffload import hooks, host_memory
from wanoffload.errors import PipelineError
from wanoffload.facts.model import ModelFacts
from wanoffload.host_tiers import AUTO, HostChoice
from wanoffload.loading.unread import Unread
from wanoffload.machine.hardware import Hardware
from wanoffload.pipelines.acting import Enabled, within
from wanoffload.pipelines.adopting import (
    blocks_ahead,
    find_wrapped,
    granularity,
    packed,
    why_not,
)
from wanoffload.pipelines.components import role
from wanoffload.pipelines.enabled_class import enabled_class, ordinary_class, state
from wanoffload.pipelines.tenancy import installed
from wanoffload.policy.choices import DIT
from wanoffload.runtime import Offloader
from wanoffload.units import foreign_hook
from wanoffload.workload import Workload
from wanoffload.wrapping import resolve_device

if TYPE_CHECKING:
    from wanoffload.policy.planning import Plan

logger = logging.getLogger(__name__)

DIT_NAME = "transformer"
ALONE = "_wanoffload_enabled"
"""Where a transformer that was enabled without a pipeline keeps what `enable` remembers."""


def enable(
    pipe: Any,
    mode: str = "auto",
    *,
    workload: Workload | None = None,
    hardware: Hardware | None = None,
    facts: ModelFacts | None = None,
    device: torch.device | str | int | None = None,
    host: str = AUTO,
    host_budget: int | str | None = None,
    **choices: Any,
) -> Any:
    """Plans how each component of a pipeline is run on this machine, and acts on it. In place.

    Afterwards `pipe(...)` just runs: components come to the device and go by themselves, and no
    `.to("cuda")` is needed, nor allowed.

    Args:
        pipe: a diffusers pipeline: Wan's, or another whose `transformer` is a diffusers one. Or a
            transformer alone: it is then decided at once, and one that is run as a whole comes to
            the device with its first forward and stays until `disable`. A transformer that is
            wrapped already keeps its images, where they are, and `verify` where the plan streams
            it, and its prefetch, as if `dit_offload_prefetch_size` had been chosen (of two that
            differ, the larger; 0 becomes 1), and stays packed or plain, and in blocks or parts, as
            if `pack` and `granularity` had been; where the plan does not stream it, it is
            unwrapped.
        mode, choices: as for `wanoffload.plan`.
        workload: what will be generated. If it is not given, what depends on it is decided at the
            first call of the pipeline, and again at a call of another size; only components whose
            treatment differs are then moved.
        hardware: the machine. Default: measured, `Hardware.probe()`.
        facts: of the model. Default: what is found by looking at the pipeline.
        device: where it computes. Default: the current CUDA device, else the CPU, where the same
            engine runs on threads.
        host: where the blocks of a streamed DiT stand on the host, as of `wrap`. What waits on the
            host as a whole is page-locked; blocks of a streamed encoder stand as with "auto".
        host_budget: bytes, or text such as "40GiB": what all components together may take of the
            host's memory; streamed DiTs share by their bytes what others leave. Default: what is to
            be had.

    Returns:
        The same pipeline.

    Raises:
        ValueError: a choice that can't be made; PipelineError, WrapError: a pipeline that can't be
            enabled as it is. They say what to do.
        DeviceMemoryError, HostMemoryError: nothing that is permitted fits.
        torch.OutOfMemoryError: the device's memory ended on the way. Whatever is raised, the
            pipeline is as it was.
    """
    target = resolve_device(device)
    choice = HostChoice.of(host, host_budget)
    if not isinstance(pipe, nn.Module):
        return enable_pipeline(pipe, mode, workload, hardware, facts, target, choice, choices)
    _check_module(pipe, target)
    modules = {DIT_NAME: pipe}
    machine = hardware or with_own_weights(Hardware.probe(target), modules.values())
    choices = with_choices_found(choices, modules)
    machine = within(machine, choice)
    enabled = Enabled(modules, facts or pipe, mode, machine, choices, target, choice)
    enabled.begin(workload)
    enabled.settle()
    pipe.__dict__[ALONE] = enabled
    return pipe


def enable_pipeline(
    pipe: Any,
    mode: str,
    workload: Workload | None,
    hardware: Hardware | None,
    facts: ModelFacts | None,
    device: torch.device,
    host: HostChoice,
    choices: dict[str, Any],
    unread: Mapping[str, Unread] = MappingProxyType({}),
) -> Any:
    """What `enable` does with a pipeline. Internal.

    `unread`: components of which only the description is there. Their weights are read.
    """
    _check(pipe, device)
    modules = _modules(pipe)
    machine = within(hardware or with_own_weights(Hardware.probe(device), modules.values()), host)
    choices = with_choices_found(choices, modules)
    enabled = Enabled(modules, facts or pipe, mode, machine, choices, device, host, unread)
    enabled.begin(workload)
    pipe.__dict__[hooks.ATTRIBUTE] = enabled
    ordinary: Any = type(pipe)
    object.__setattr__(pipe, "__class__", enabled_class(ordinary))
    return pipe


def disable(pipe: Any) -> Any:
    """Makes an enabled pipeline an ordinary one again, in place, on the CPU.

    Weights keep the values they have. A pipeline that is not enabled raises PipelineError.
    """
    _enabled(pipe).end()
    if isinstance(pipe, nn.Module):
        del pipe.__dict__[ALONE]
    else:
        # First, so that it is not ended twice: without its state the class is as its base.
        del pipe.__dict__[hooks.ATTRIBUTE]
        object.__setattr__(pipe, "__class__", ordinary_class(type(pipe)))
    return pipe


def plan_of(pipe: Any) -> Plan:
    """The plan by which an enabled pipeline runs now."""
    return _enabled(pipe).plan


def with_own_weights(machine: Hardware, modules: Iterable[nn.Module]) -> Hardware:
    """The machine with the room that these modules take now: it is theirs to be planned with.

    Weights that are mapped from a file give no host memory back when they move.
    """
    modules = list(modules)
    wrapped = [known.runtime for known in map(find_wrapped, modules) if known is not None]
    wrapped_here = [runtime for runtime in wrapped if runtime.device.type == "cuda"]
    slots = sum(runtime.memory.passing_bytes for runtime in wrapped_here)
    tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}.values()
    kept = host_memory.bytes_not_given_back(tensors)
    on_device = sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cuda")
    on_host = sum(tensor.nbytes for tensor in tensors) - kept - sum(map(_saved, wrapped))
    device, host = machine.device_memory, machine.host_memory
    return replace(
        machine,
        device_memory=None if device is None else int(device) + on_device + slots,
        host_memory=None if host is None else int(host) + on_host,
    )


def _saved(runtime: Offloader) -> int:
    """Bytes that packing saves: packed weights are as large as plain ones to who looks at them."""
    stats = runtime.stats()
    return stats.plain_bytes - stats.host_bytes - stats.disk_bytes


def with_choices_found(choices: dict[str, Any], modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """How transformers were wrapped counts as chosen, unless something else is chosen."""
    dits = [module for key, module in modules.items() if role(key) == DIT]
    found = {
        "dit_offload_prefetch_size": blocks_ahead(dits),
        "pack": packed(dits),
        "granularity": granularity(dits),
    }
    if choices.get("granularity") not in (None, found["granularity"]):
        del found["dit_offload_prefetch_size"]  # it counts something else
    kept = {
        name: value
        for name, value in found.items()
        if value is not None and choices.get(name) is None
    }
    for name, value in kept.items():
        logger.info("%s is %s: transformers were wrapped so", name, value)
    return {**choices, **kept}


def _modules(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's modules by name; one that has two names, under the first."""
    found: dict[str, nn.Module] = {}
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module) and all(component is not m for m in found.values()):
            found[name] = component
    return found


def _enabled(pipe: Any) -> Enabled:
    enabled = pipe.__dict__.get(ALONE) if isinstance(pipe, nn.Module) else state(pipe)
    if enabled is None:
        raise PipelineError(f"this {type(pipe).__name__} is not enabled: see wanoffload.enable()")
    return enabled


def _check(pipe: Any, device: torch.device) -> None:
    """Raises PipelineError for what can't be enabled. Looks only."""
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        raise PipelineError(
            f"enable() takes a diffusers pipeline, or a transformer, not a {type(pipe).__name__}"
        )
    name = type(pipe).__name__
    if state(pipe) is not None:
        raise PipelineError(f"this {name} is enabled already; call wanoffload.disable() first")
    if pipe._is_pipeline_device_mapped():
        raise PipelineError(
            f"this {name} was loaded with a device_map over several devices; load it without, or "
            "call pipe.reset_device_map() first"
        )
    for component, module in pipe.components.items():
        if isinstance(module, nn.Module):
            check_component(name, component, module, device)


def _check_module(module: nn.Module, device: torch.device) -> None:
    """The same for a transformer alone."""
    name = type(module).__name__
    if module.__dict__.get(ALONE) is not None:
        raise PipelineError(f"this {name} is enabled already; call wanoffload.disable() first")
    check_component(name, DIT_NAME, module, device)


def check_component(pipeline: str, name: str, component: nn.Module, device: torch.device) -> None:
    if installed(component) or component.__dict__.get(ALONE) is not None:
        raise PipelineError(
            f"{name} of this {pipeline} is enabled already, by itself or in another pipeline: "
            "this one runs with it as it is; or call wanoffload.disable() on the other first"
        )
    for module in component.modules():
        if (hook := foreign_hook(module)) is not None:
            raise PipelineError(
                f"{name} of this {pipeline} is offloaded already: it has {hook}. Load the pipeline "
                "without it, or take it out (pipe.remove_all_hooks() takes out accelerate's)."
            )
    if (reason := why_not(component, device, is_dit=role(name) == DIT)) is not None:
        raise PipelineError(
            f"{name} of this {pipeline} {reason}; call wanoffload.unwrap() on it first, and "
            "enable() decides how it is run"
        )
