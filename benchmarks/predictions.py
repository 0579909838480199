"""What the planner says about rows of the case ``predict``: plain values, no GPU.

Rows hold what was measured and what was known of machine and workload, not what was predicted: that
is computed from them with the cost model as it is now. So a change of it can be judged offline.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.harness import Row
from benchmarks.models import MODELS, ModelSpec, Size
from wanoffload.facts.formulas import dit_facts
from wanoffload.facts.model import WAN, ModelFacts
from wanoffload.machine.hardware import Hardware
from wanoffload.policy import cost, explain
from wanoffload.policy import planning as policy
from wanoffload.policy.cost import RESIDENT, STREAM, WHOLE, Around, Candidate, Placement
from wanoffload.policy.planning import Plan
from wanoffload.sizes import gb
from wanoffload.workload import Workload

NAME = "predict"
STEPS_A_USE = 4  # steps over which a whole DiT's way to the device is spread
STREAMED, PACKED = "streamed-p", "-packed"
PLANS = (
    RESIDENT,
    f"{STREAMED}1",
    f"{STREAMED}2",
    f"{STREAMED}1{PACKED}",
    f"{STREAMED}2{PACKED}",
    WHOLE,
)
CARDS = ("24GiB", "48GiB", "80GiB")
STEP_TOLERANCE = 0.10
PEAK_TOLERANCE = 0.05
LOSS_TOLERANCE = 0.02


def plan_name(placement: Placement) -> str:
    """How rows and tables call a placement."""
    if placement.kind != STREAM:
        return placement.kind
    some = f"-{100 * placement.packed:.3g}%" if placement.packed < 1 else ""
    return f"{STREAMED}{placement.prefetch}{PACKED + some if placement.packed else ''}"


def placement_of(name: str) -> Placement:
    """The placement that rows and tables call ``name``."""
    if name.startswith(STREAMED):
        prefetch, form, _ = name.removeprefix(STREAMED).partition(PACKED)
        return Placement(STREAM, int(prefetch), 1.0 if form else 0.0)
    return Placement(name)


def facts_of(spec: ModelSpec) -> ModelFacts:
    """A pipeline of which nothing but the transformer is there."""
    config = {"_class_name": "WanTransformer3DModel", **spec.config}
    return ModelFacts(
        name=spec.name,
        family=WAN,
        dits=(dit_facts(config, spec.expand_timesteps),),
        temporal_factor=spec.temporal,
        pixels_per_token=2 * spec.spatial,
    )


def workload_of(size: Size) -> Workload:
    """A short generation of a size, with guidance."""
    return Workload(size.height, size.width, size.frames, steps=STEPS_A_USE, guidance=5.0)


def inputs_of_prediction(spec: ModelSpec, size: Size, hardware: Hardware) -> dict[str, Any]:
    """What a row holds beside what was measured."""
    return {
        "tokens": spec.tokens(size),
        "workload": asdict(workload_of(size)),
        "hardware": asdict(hardware),
    }


@dataclass(frozen=True)
class Predicted:
    """A row and what the cost model says about it now; times in ms."""

    row: Row
    facts: ModelFacts
    workload: Workload
    hardware: Hardware
    candidate: Candidate

    @classmethod
    def of(cls, row: Row) -> Predicted:
        """The prediction for a row."""
        facts = facts_of(MODELS[row.key["model"]])
        workload = Workload(**row.values["workload"])
        hardware = Hardware(**row.values["hardware"])
        machine, _ = cost.with_assumed_rates(hardware)
        placement = placement_of(row.key["plan"])
        candidate = cost.predict(facts, placement, Around(), workload, machine)
        return cls(row, facts, workload, hardware, candidate)

    @property
    def step_ms(self) -> float:
        assert self.candidate.step_seconds is not None
        return 1e3 * self.candidate.step_seconds

    @property
    def measured_ms(self) -> float:
        return float(self.row.values["step_ms"]["median"])

    @property
    def step_ratio(self) -> float:
        """Predicted to measured."""
        return self.step_ms / self.measured_ms

    @property
    def measured_peak(self) -> int:
        """Bytes; 0 where device memory is not counted, on the CPU."""
        return int(self.row.values["device_peak_allocated"])

    @property
    def peak_ratio(self) -> float | None:
        """Predicted to measured; None where nothing was measured."""
        return self.candidate.device_peak_bytes / self.measured_peak if self.measured_peak else None

    @property
    def reserved(self) -> int:
        """Bytes that torch's allocator took from the driver at the peak."""
        return int(self.row.values["device_peak_reserved"])

    @property
    def fits(self) -> bool:
        """Whether the planner lets this placement onto this machine."""
        return plan_name(self.candidate.placement) in _fitting(self._plan())

    def _plan(self) -> Plan:
        return policy.plan(self.facts, self.workload, self.hardware)


def _fitting(made: Plan) -> set[str]:
    """The plans that no limit of the machine forbids."""
    return {plan_name(c.candidate.placement) for c in made.considered if c.obstacle is None}


def in_order(rows: Iterable[Predicted]) -> list[Predicted]:
    """By model, size and plan, however they were measured."""
    models = list(MODELS)

    def place(each: Predicted) -> tuple[int, int, int]:
        key = each.row.key
        return models.index(key["model"]), each.row.values["tokens"], PLANS.index(key["plan"])

    return sorted(rows, key=place)


@dataclass(frozen=True)
class Taken:
    """What ``auto`` takes on a card, against what was measured on this machine; times in ms.

    ``plan`` is None where nothing fits; a time is None where the plan was not measured.
    """

    model: str
    size: str
    card: str
    plan: str | None
    step_ms: float | None
    best: str | None
    best_ms: float | None

    @property
    def slower(self) -> float | None:
        """The part by which it is slower than the best."""
        if self.step_ms is None or self.best_ms is None:
            return None
        return self.step_ms / self.best_ms - 1


def what_auto_takes(rows: Iterable[Predicted]) -> list[Taken]:
    """For each model and size: the usual cards, and the one that was measured on."""
    groups: dict[tuple[str, str], list[Predicted]] = {}
    for each in rows:
        groups.setdefault((each.row.key["model"], each.row.key["size"]), []).append(each)
    return [
        _taken(group, card, replace(group[-1].hardware, device_memory=memory))
        for group in groups.values()
        for card, memory in (*((card, card) for card in CARDS), _own_card(group[-1].hardware))
    ]


def _own_card(hardware: Hardware) -> tuple[str, int | str | None]:
    """The card that was measured on, with what it had free."""
    memory = int(hardware.device_memory or 0)
    return f"this, {gb(memory)}", memory


def _taken(group: Sequence[Predicted], card: str, hardware: Hardware) -> Taken:
    """Facts alone decide what fits; how long it takes was measured."""
    made = policy.plan(group[-1].facts, group[-1].workload, hardware)
    measured = {each.row.key["plan"]: each.measured_ms for each in group}
    best = min(_fitting(made) & measured.keys(), key=lambda name: measured[name], default=None)
    name = plan_name(explain.taken(made)) if made.fits else None
    return Taken(
        model=group[-1].row.key["model"],
        size=group[-1].row.key["size"],
        card=card,
        plan=name,
        step_ms=measured.get(name) if name else None,
        best=best,
        best_ms=measured[best] if best else None,
    )
