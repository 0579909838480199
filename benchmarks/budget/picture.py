"""Memory against speed: one picture of the rows that a result file holds.

Device bytes for weights on one axis, a step's time on the other; ours plain and packed, their
floor, the resident model, and the peers as points: those of the part ``peers``, and of the case
``step`` if the file has some. `charts` is plain values; only `draw` needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.budget.bench import FORMS, NAME
from benchmarks.budget.peers import weight_bytes
from benchmarks.contenders import RESIDENT
from benchmarks.harness import ROOT, ResultStore, Row
from benchmarks.models import MODELS, model_bytes
from benchmarks.step_bench import NAME as STEP

DEFAULT = ROOT / "docs" / "memory-against-speed.png"
PEER_NAMES = {
    "diffusers-leaf-stream": "diffusers, leaf level",
    "diffusers-block-stream": "diffusers, block level",
}
COLOURS = {"plain": "tab:blue", "packed": "tab:orange"}
MARKERS = {"diffusers-leaf-stream": "^", "diffusers-block-stream": "s"}


@dataclass(frozen=True)
class Point:
    """GB of weights on the device, and ms of a step."""

    gb: float
    step_ms: float


@dataclass
class Chart:
    """One size. `ours` and `floors` by form, from the least memory on; `peers` by their names."""

    title: str
    resident: Point | None = None
    ours: dict[str, list[Point]] = field(default_factory=dict)
    floors: dict[str, list[Point]] = field(default_factory=dict)
    peers: dict[str, Point] = field(default_factory=dict)


def charts(store: ResultStore, model: str) -> list[Chart]:
    """A chart for each size with budgets, of the machine that was measured last."""
    rows = [row for row in store.newest(NAME) if _is_step(row) and row.key["model"] == model]
    if not rows:
        return []
    machine = max(rows, key=lambda row: row.when).machine
    rows = [row for row in rows if row.machine == machine]
    sizes = [str(size) for size in MODELS[model].sizes]
    found = sorted({str(row.key["size"]) for row in rows}, key=sizes.index)
    beside = [
        row
        for row in (*store.newest(STEP), *store.newest(NAME))
        if row.machine == machine and row.key.get("model") == model
    ]
    return [_chart(size, model, rows, beside) for size in found]


def _is_step(row: Row) -> bool:
    return row.key["part"] == "steps" and "step_ms" in row.values and row.verified


def _chart(size: str, model: str, rows: Iterable[Row], beside: Sequence[Row]) -> Chart:
    mine = [row for row in rows if row.key["size"] == size]
    made = Chart(f"{model}, {size}")
    resident = sorted(row.values["resident_ms"] for row in mine)[len(mine) // 2]
    made.resident = Point(model_bytes(MODELS[model]).all / 1e9, resident)
    for form in FORMS:
        budgets = [row for row in mine if row.key["form"] == form and row.values["budget"]]
        budgets.sort(key=lambda row: float(row.values["device_bytes"]))
        if budgets:
            made.ours[form] = [_point(row, row.values["step_ms"]["median"]) for row in budgets]
            made.floors[form] = [_point(row, row.values["floor_ms"]) for row in budgets]
    made.peers = _peers([row for row in beside if row.key.get("size") == size])
    return made


def _point(row: Row, step_ms: float) -> Point:
    return Point(row.values["device_bytes"] / 1e9, step_ms)


def _peers(rows: Sequence[Row]) -> dict[str, Point]:
    """Those of the case ``step`` (eager), then those measured beside budgets, which win."""
    eager = {
        row.key["contender"]: row.values
        for row in rows
        if row.case == STEP and not row.key["compiled"]
    }
    resident = eager.get(RESIDENT)
    found = {
        name: _weighed(values, resident)
        for name, values in eager.items()
        if name in PEER_NAMES and resident is not None
    }
    for row in rows:
        if row.case == NAME and row.key.get("contender") in PEER_NAMES:
            found[row.key["contender"]] = _point(row, row.values["step_ms"]["median"])
    return found


def _weighed(values: dict[str, Any], resident: dict[str, Any]) -> Point:
    """A contender's point; its weights are what its peak has above the activations."""
    name = "device_peak_allocated"
    weights = weight_bytes(values[name], resident[name], resident["model_bytes"])
    return Point(weights / 1e9, values["step_ms"]["median"])


def draw(made: Sequence[Chart], path: Path) -> None:
    """Writes a PNG. Raises ImportError without matplotlib (the extra `bench`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(made), 4.4), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(made), squeeze=False)[0]
    for axis, chart in zip(axes, made, strict=True):
        _draw_chart(axis, chart)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def _draw_chart(axis: Any, chart: Chart) -> None:
    for form, points in chart.ours.items():
        colour = COLOURS[form]
        axis.plot(*_line(points), "o-", color=colour, label=f"wanoffload, {form}")
        axis.plot(*_line(chart.floors[form]), "--", color=colour, label=f"floor, {form}")
    for name, point in chart.peers.items():
        axis.plot(
            *_line([point]), MARKERS[name], color="tab:red", markersize=8, label=PEER_NAMES[name]
        )
    if chart.resident is not None:
        axis.plot(*_line([chart.resident]), "*", color="black", markersize=11, label="resident")
    axis.set(
        title=chart.title,
        xlabel="weights on the device, GB",
        ylabel="a step (two forwards), ms",
    )
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _line(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.gb for point in points], [point.step_ms for point in points]
