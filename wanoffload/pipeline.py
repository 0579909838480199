"""`enable` and `disable`: a plan, acted on over a whole diffusers pipeline, and taken back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from wanoffload import hooks
from wanoffload.acting import Enabled
from wanoffload.enabled_class import enabled_class, ordinary_class, state
from wanoffload.errors import PipelineError
from wanoffload.facts import ModelFacts
from wanoffload.hardware import Hardware
from wanoffload.units import foreign_hook
from wanoffload.workload import Workload

if TYPE_CHECKING:
    from wanoffload.policy import Plan


def enable(
    pipe: Any,
    mode: str = "auto",
    *,
    workload: Workload | None = None,
    hardware: Hardware | None = None,
    facts: ModelFacts | None = None,
    **choices: Any,
) -> Any:
    """Plans how each component of a pipeline is run on this machine, and acts on it. In place.

    Afterwards `pipe(...)` just runs: components come to the device and go by themselves, and no
    `.to("cuda")` is needed, nor allowed. They run on the current CUDA device; on a machine without
    one, on the CPU, by the same engine.

    Args:
        pipe: a diffusers pipeline: Wan's, or another whose `transformer` is a diffusers one.
        mode, choices: as for `wanoffload.plan`.
        workload: what will be generated. If it is not given, what depends on it is decided at the
            first call of the pipeline, and again at a call of another size; only components whose
            treatment differs are then moved.
        hardware: the machine. Default: measured, `Hardware.probe()`.
        facts: of the model. Default: what is found by looking at the pipeline.

    Returns:
        The same pipeline.

    Raises:
        ValueError: a choice that can't be made; PipelineError, WrapError: a pipeline that can't be
            enabled as it is. They say what to do.
        DeviceMemoryError, HostMemoryError: nothing that is permitted fits.
        torch.OutOfMemoryError: the device's memory ended on the way. Whatever is raised, the
            pipeline is as it was.
    """
    _check(pipe)
    enabled = Enabled(pipe, facts or pipe, mode, hardware or Hardware.probe(), choices)
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
    object.__setattr__(pipe, "__class__", ordinary_class(type(pipe)))
    del pipe.__dict__[hooks.ATTRIBUTE]
    return pipe


def plan_of(pipe: Any) -> Plan:
    """The plan by which an enabled pipeline runs now."""
    return _enabled(pipe).plan


def _enabled(pipe: Any) -> Enabled:
    enabled = state(pipe)
    if enabled is None:
        raise PipelineError(f"this {type(pipe).__name__} is not enabled: see wanoffload.enable()")
    return enabled


def _check(pipe: Any) -> None:
    """Raises PipelineError for what can't be enabled. Looks only."""
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        raise PipelineError(
            f"enable() takes a diffusers pipeline, not a {type(pipe).__name__}; for a transformer "
            "alone there is wanoffload.wrap()"
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
            _check_component(name, component, module)


def _check_component(pipeline: str, name: str, component: nn.Module) -> None:
    for module in component.modules():
        if (hook := foreign_hook(module)) is not None:
            raise PipelineError(
                f"{name} of this {pipeline} is offloaded already: it has {hook}. Load the pipeline "
                "without it, or take it out (pipe.remove_all_hooks() takes out accelerate's)."
            )
        if hooks.attached(module) is not None:
            raise PipelineError(
                f"{name} of this {pipeline} is wrapped already; call wanoffload.unwrap() on it "
                "first, and enable() decides how it is run"
            )
