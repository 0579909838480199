"""A plan in words and as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from wanoffload.apart import PART
from wanoffload.policy.choices import AUXILIARY
from wanoffload.policy.cost import RESIDENT, STREAM, WHOLE, Placement
from wanoffload.policy.forms import UNITS
from wanoffload.policy.rules import most_units
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
    "pack",
    "granularity",
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
            *_forms(plan),
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
        "pack_share": plan.pack_share,
        "predictions": {name: getattr(plan, name) for name in PREDICTIONS},
        "fits": plan.fits,
        "messages": list(plan.messages),
        "forms": _as_values(plan.forms),
        "considered": _as_values(plan.considered),
    }


def _as_values(found: Iterable[Considered]) -> list[dict[str, Any]]:
    return [{**asdict(each.candidate), "obstacle": each.obstacle} for each in found]


def taken(plan: Plan) -> Placement:
    """How the plan runs the DiT."""
    if plan.dit_layerwise_offload:
        ahead, share = plan.dit_offload_prefetch_size, plan.pack_share or 0.0
        return Placement(STREAM, ahead, share, plan.granularity)
    return Placement(WHOLE if plan.dit_cpu_offload else RESIDENT)


def _subject(plan: Plan) -> str:
    what = [plan.facts.name or plan.facts.family, f"mode {plan.mode}"]
    what.append(f"{plan.workload}, {plan.workload.steps} steps" if plan.workload else "any size")
    hardware = plan.hardware
    if hardware is None:
        alone = ": the base rules alone decide" if plan.vram_budget is None else ""
        what.append(f"an unknown machine with CUDA{alone}")
    else:
        memory = hardware.device_memory
        free = f"{gb(int(memory))} of device memory" if memory is not None else "no limit given"
        what.append(f"{hardware.name or hardware.platform}, {free}")
    return "; ".join(what)


def _sentence(plan: Plan) -> str:
    others = [name for name in AUXILIARY if _offloaded(plan, name)]
    beside = f"; offloaded beside it: {', '.join(others)}" if others else ""
    failed = "" if plan.fits else " This does not fit."
    return f"{_of_the_dit(plan)}{beside}.{failed}"


def _of_the_dit(plan: Plan) -> str:
    if not plan.facts.dits:
        return "There is no DiT"
    if plan.use_fsdp_inference:
        return "The DiT is left to its caller, who shards it"
    if plan.facts.sharded:
        return "The DiT is sharded already, and is left as it is"
    how = {
        RESIDENT: "stays on the device",
        WHOLE: "waits on the host and is on the device while it runs",
        STREAM: _streamed_how(plan),
    }
    form = f", {form_name(plan, plan.pack_share)}" if plan.pack_share else ""
    return f"The DiT {how[taken(plan).kind]}{form}{_staying(plan)}"


def _streamed_how(plan: Plan) -> str:
    ahead = plan.dit_offload_prefetch_size
    how = "in parts of its blocks" if plan.granularity == PART else "block by block"
    return f"is streamed {how}" + (f", {ahead} ahead" if ahead is not None else "")


def _staying(plan: Plan) -> str:
    """What stays on the device under a budget."""
    placement = taken(plan)
    found = (c.candidate for c in plan.considered if c.candidate.placement == placement)
    candidate = next(found, None)
    if candidate is None or not candidate.staying_units:
        return ""
    kept = candidate.kept_packed_units
    packed = f", {kept} of them packed" if kept else ""
    until = "" if plan.residents_stay else ", while it runs"
    units, name = most_units(plan.facts, plan.granularity), UNITS[plan.granularity]
    return f"; {candidate.staying_units} of {units} {name} stay on the device{packed}{until}"


def form_name(plan: Plan, share: float) -> str:
    """How blocks stand on the host, of which this share is packed."""
    if not share:
        return "plain"
    units, name = most_units(plan.facts, plan.granularity), UNITS[plan.granularity]
    return "packed" if share == 1 else f"{round(share * units)} of {units} {name} packed"


def _offloaded(plan: Plan, name: str) -> bool:
    """Whether a component that is there leaves the device, block by block or as a whole."""
    chosen = name in plan.layerwise_offload_components or getattr(plan, f"{name}_cpu_offload")
    return getattr(plan.facts, name) is not None and chosen


def _value(plan: Plan, name: str) -> str:
    value = getattr(plan, name)
    if isinstance(value, list):
        return "[" + ", ".join(value) + "]"
    return gb(value) if name == "vram_budget" and isinstance(value, int) else str(value)


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
    locked = plan.host_locked_bytes
    if locked is not None:
        held = f"{gb(locked)} of host memory" if locked else "nothing"
        parts.append(f"{held} page-locked")
    if plan.start_seconds is not None:
        parts.append(f"{plan.start_seconds:.2g} s to set up")
    return ["", "Predicted: " + ", ".join(parts) + "."] if parts else []


def _forms(plan: Plan) -> list[str]:
    """The plan with plain blocks and with packed ones."""
    if not plan.forms:
        return []
    rows = [
        (form_name(plan, each.candidate.placement.packed), _form(plan, each)) for each in plan.forms
    ]
    return ["", "Plain or packed:", *_table(rows)]


def _form(plan: Plan, each: Considered) -> str:
    candidate = each.candidate
    parts = [f"{gb(candidate.link_bytes)} over the link a forward"]
    if candidate.step_seconds is not None:
        parts.append(f"{candidate.step_seconds:.4g} s a step")
    parts.append(f"{gb(candidate.host_locked_bytes)} page-locked")
    if candidate.staying_units:
        units = UNITS[candidate.placement.granularity]
        parts.append(f"{candidate.staying_units} {units} stay on the device")
    if candidate.staging_bytes:
        parts.append(f"{gb(candidate.staging_bytes)} of staging on the device")
    is_taken = candidate.placement == taken(plan)
    verdict = each.obstacle or ("taken" if is_taken else "fits")
    return f"{', '.join(parts)}: {verdict}"


def _considered(plan: Plan) -> list[str]:
    if len(plan.considered) < 2:
        return []
    rows = [(str(each.candidate.placement), _row(plan, each)) for each in plan.considered]
    return ["", "Considered:", *_table(rows)]


def _row(plan: Plan, each: Considered) -> str:
    candidate = each.candidate
    time = f"{candidate.step_seconds:.3g} s a step, " if candidate.step_seconds else ""
    what = "at the peak" if plan.workload else "of weights"
    return f"{time}{gb(candidate.device_peak_bytes)} {what}: {each.obstacle or _fits(plan, each)}"


def _fits(plan: Plan, each: Considered) -> str:
    if each.candidate.placement == taken(plan):
        return "taken"
    kept = plan.reasons["dit_layerwise_offload"].startswith("rule 1")
    return "fits, but rule 1 rules it out" if kept and _streamed(each) else "fits"


def _streamed(each: Considered) -> bool:
    return each.candidate.placement.kind == STREAM
