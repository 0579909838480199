"""The part ``peers``: diffusers' leaf level, as points beside the curve of budgets.

What its weights take on the device is what is in use at its peak, without what activations take:
the resident model's peak less its weights.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.budget.bench import BudgetBench
from benchmarks.contenders import DIFFUSERS_LEVELS, DiffusersGroupOffload, Live
from benchmarks.engine import Found
from benchmarks.harness import Spread, say
from benchmarks.models import Size, make_inputs
from benchmarks.turns import Measure

LEAF = "diffusers-leaf-stream"
STEPS = 2
assert LEAF in DIFFUSERS_LEVELS


def peers(bench: BudgetBench) -> Found:
    """A row for each size; none without a GPU, which streams need."""
    if bench.device.type != "cuda":
        say(f"{LEAF} needs a GPU and is left out")
        return
    bench.close()  # host memory for it: it page-locks half as much again as the model has
    with bench.one_more(DiffusersGroupOffload(LEAF)) as live:
        for size in bench.sizes:
            if bench.session.out_of_time():
                return
            yield {"size": str(size), "contender": LEAF}, _measure(bench, size, live)


def _measure(bench: BudgetBench, size: Size, live: Live) -> dict[str, Any]:
    """Its turn between two of the resident model."""
    measure = Measure(bench.clock, make_inputs(bench.spec, size, bench.device), bench.bytes)
    resident = measure.warm_up(bench.resident, 0.0, 1)
    mine = measure.warm_up(live, 0.0, STEPS)
    for one, turns in ((bench.resident, resident), (live, mine), (bench.resident, resident)):
        measure.take(one, turns)
    resident_ms = statistics.fmean(resident.turn_ms)
    return {
        "verified": mine.equal,
        "step_ms": Spread.of(mine.step_ms).as_json(),
        "resident_ms": resident_ms,
        "x_resident": mine.turn_ms[0] / resident_ms,
        "setup_s": live.setup_s,
        "device_bytes": weight_bytes(
            live.peak.allocated, bench.resident.peak.allocated, bench.bytes.all
        ),
        "device_peak_allocated": live.peak.allocated,
        "device_peak_reserved": live.peak.reserved,
        "claims": [],
    }


def weight_bytes(peak: int, resident_peak: int, model: int) -> int:
    """Bytes of weights on the device at an offloaded model's peak. All three: in use."""
    return max(0, peak - (resident_peak - model))
