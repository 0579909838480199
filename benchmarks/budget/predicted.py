"""What the cost model says about rows of the part ``steps``: plain values, no GPU.

As in ``benchmarks.predictions``: rows hold what was measured and what was known of machine and
workload, and the prediction is computed from them with the cost model as it is now.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.budget.bench import PARTS
from benchmarks.contenders import BLOCK, PART
from benchmarks.harness import Row
from benchmarks.loading.claims import WITHIN, Claim
from benchmarks.models import MODELS
from benchmarks.packing.bench import PACKED
from benchmarks.predictions import facts_of
from wanoffload.machine.hardware import Hardware
from wanoffload.policy import cost
from wanoffload.policy.cost import STREAM, Around, Placement
from wanoffload.workload import Workload

STEP_WITHIN = 0.05
MEMORY_WITHIN = 0.01


@dataclass(frozen=True)
class Predicted:
    """A step in ms, and the bytes of the weights on the device."""

    step_ms: float
    device_bytes: int

    @classmethod
    def of(cls, model: str, form: str, values: Mapping[str, Any]) -> Predicted:
        """For the values of a row. The depth is the one that the plan has taken."""
        machine, _ = cost.with_assumed_rates(Hardware(**values["hardware"]))
        packed = 1.0 if form == PACKED else 0.0
        granularity = PART if form == PARTS else BLOCK
        candidate = cost.predict(
            facts_of(MODELS[model]),
            Placement(STREAM, values["plan"]["depth"], packed, granularity),
            Around(),
            Workload(**values["workload"]),
            machine,
            values["budget"],
        )
        assert candidate.step_seconds is not None
        return cls(1e3 * candidate.step_seconds, candidate.device_weight_bytes)


def claims(row: Row) -> list[Claim]:
    """Predicted over measured; none for a row without a measured step."""
    values = row.values
    if "plan" not in values:
        return []
    says = Predicted.of(row.key["model"], row.key["form"], values)
    measured_ms, held = values["step_ms"]["median"], values["device_bytes"] / 1e9
    predicted_gb = says.device_bytes / 1e9
    return [
        Claim("step, predicted", says.step_ms, measured_ms, "measured", "ms", STEP_WITHIN, WITHIN),
        Claim(
            "weights on the device, predicted",
            predicted_gb,
            held,
            "measured",
            "GB",
            MEMORY_WITHIN,
            WITHIN,
        ),
    ]
