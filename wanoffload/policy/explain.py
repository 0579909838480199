"""A plan in words and as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from wanoffload.policy.cost import RESIDENT, STREAM, WHOLE, Placement
from wanoffload.sizes import gb

if TYPE_CHECKING:
    from wanoffload.policy.compare import Considered
    from wanoffload.policy.planning import Plan

CHOICES = (
    "dit_layerwise_offload",
    "dit_cpu_offload",
    "dit_offload_prefetch_size",
    "layerwise_offload_components",
    "text_encoder_cpu_offload",
    "image_encoder_cpu_offload",
    "vae_cpu_offload",
    "use_fsdp_inference",
    "vram_budget",
)
PREDICTIONS = ("step_seconds", "start_seconds", "device_peak_bytes", "host_locked_bytes")


def text(plan: Plan) -> str:
    """Several lines: what it is about, the decision in a sentence, choices with rules, numbers."""
    return "\n".join(
        [
            _subject(plan),
            _sentence(plan),
            *(f"! {message}" for message in plan.messages),
            "",
            *_table([(f"{n} = {_value(plan, n)}", plan.reasons[n]) for n in CHOICES]),
            *_predictions(plan),
            *_considered(plan),
        ]
    )


def as_dict(plan: Plan) -> dict[str, Any]:
    """Choices, reasons, predictions, messages and candidates; values that JSON can hold."""
    return {
        "model": plan.facts.name,
        "mode": plan.mode,
        "workload": asdict(plan.workload) if plan.workload else None,
        "hardware": asdict(plan.hardware) if plan.hardware else None,
        "summary": _sentence(plan),
        "choices": {name: getattr(plan, name) for name in CHOICES},
        "reasons": dict(plan.reasons),
        "predictions": {name: getattr(plan, name) for name in PREDICTIONS},
        "fits": plan.fits,
        "messages": list(plan.messages),
        "considered": [
            {**asdict(each.candidate), "obstacle": each.obstacle} for each in plan.considered
        ],
    }


def taken(plan: Plan) -> Placement:
    """How the plan runs the DiT."""
    if plan.dit_layerwise_offload:
        return Placement(STREAM, plan.dit_offload_prefetch_size)
    return Placement(WHOLE if plan.dit_cpu_offload else RESIDENT)


def _subject(plan: Plan) -> str:
    what = [plan.facts.name or plan.facts.family, f"mode {plan.mode}"]
    what.append(f"{plan.workload}, {plan.workload.steps} steps" if plan.workload else "any size")
    hardware = plan.hardware
    if hardware is None:
        what.append("an unknown machine with CUDA: the base rules alone decide")
    else:
        memory = hardware.device_memory
        free = f"{gb(int(memory))} of device memory" if memory is not None else "no limit given"
        what.append(f"{hardware.name or hardware.platform}, {free}")
    return "; ".join(what)


def _sentence(plan: Plan) -> str:
    if plan.use_fsdp_inference:
        return "The DiT is left to its caller, who shards it."
    how = {
        RESIDENT: "stays on the device",
        WHOLE: "waits on the host and is on the device while it runs",
        STREAM: f"is streamed block by block, {plan.dit_offload_prefetch_size} ahead",
    }[taken(plan).kind]
    others = [name for name in plan.layerwise_offload_components if name != "dit"]
    beside = f"; offloaded beside it: {', '.join(others)}" if others else ""
    failed = "" if plan.fits else " This does not fit."
    return f"The DiT {how}{beside}.{failed}"


def _value(plan: Plan, name: str) -> str:
    value = getattr(plan, name)
    if isinstance(value, list):
        return "[" + ", ".join(value) + "]"
    return gb(value) if name == "vram_budget" and value is not None else str(value)


def _table(rows: list[tuple[str, str]]) -> Iterator[str]:
    width = max(len(left) for left, _ in rows)
    for left, right in rows:
        yield f"  {left:<{width}}  {right}"


def _predictions(plan: Plan) -> list[str]:
    parts = []
    if plan.step_seconds is not None:
        parts.append(f"{plan.step_seconds:.3g} s a step")
    if plan.device_peak_bytes is not None:
        parts.append(f"{gb(plan.device_peak_bytes)} of device memory at the peak")
    if plan.host_locked_bytes is not None:
        parts.append(f"{gb(plan.host_locked_bytes)} of host memory page-locked")
    if plan.start_seconds is not None:
        parts.append(f"{plan.start_seconds:.2g} s to set up")
    return ["", "Predicted: " + ", ".join(parts) + "."] if parts else []


def _considered(plan: Plan) -> list[str]:
    if len(plan.considered) < 2:
        return []
    rows = [(str(each.candidate.placement), _row(plan, each)) for each in plan.considered]
    return ["", "Considered:", *_table(rows)]


def _row(plan: Plan, each: Considered) -> str:
    candidate = each.candidate
    time = f"{candidate.step_seconds:.3g} s a step, " if candidate.step_seconds else ""
    verdict = each.obstacle or ("taken" if candidate.placement == taken(plan) else "fits")
    return f"{time}{gb(candidate.device_peak_bytes)} at the peak: {verdict}"
