"""Memory against speed: one picture of the rows that a result file holds.

Device bytes for weights on one axis, a step's time on the other; ours plain and packed, their
floor, the resident model, and as points parts of blocks and the peers: those of the parts ``parts``
and ``peers``, and of the case ``step`` if the file has some. Rows that are not verified are left
out, and counted. `compose` gives plain values; only `draw` needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.budget import parts
from benchmarks.budget.bench import FORMS, NAME
from benchmarks.budget.peers import weight_bytes
from benchmarks.contenders import RESIDENT
from benchmarks.harness import ROOT, ResultStore, Row
from benchmarks.models import MODELS, model_bytes
from benchmarks.packing.bench import PACKED, PLAIN
from benchmarks.step_bench import NAME as STEP

DEFAULT = ROOT / "docs" / "memory-against-speed.png"
PEER_NAMES = {
    "diffusers-leaf-stream": "diffusers, leaf level",
    "diffusers-block-stream": "diffusers, block level",
}
WITH_CHARTS = ("steps", "parts")
PARTS = {parts.PARTS: PLAIN, parts.PACKED_PARTS: PACKED}
COLOURS = {"plain": "tab:blue", "packed": "tab:orange", "parts": "tab:green"}
LABELS = {"plain": "plain", "packed": "packed", "parts": "plain, in parts"}
MARKERS = {"diffusers-leaf-stream": "^", "diffusers-block-stream": "s"}


@dataclass(frozen=True)
class Point:
    """GB of weights on the device, and ms of a step."""

    gb: float
    step_ms: float


@dataclass
class Chart:
    """One size. `ours` and `floors` by form, from the least memory on; `parts` by form; `peers` by
    their names."""

    title: str
    resident: Point | None = None
    ours: dict[str, list[Point]] = field(default_factory=dict)
    floors: dict[str, list[Point]] = field(default_factory=dict)
    parts: dict[str, Point] = field(default_factory=dict)
    peers: dict[str, Point] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """Charts, and how many rows would have been in them, had they been verified."""

    charts: tuple[Chart, ...] = ()
    left_out: int = 0

    @property
    def warning(self) -> str:
        """For who looks at it; empty if nothing is left out."""
        if not self.left_out:
            return ""
        rows, are = ("rows", "are") if self.left_out > 1 else ("row", "is")
        return f"{self.left_out} {rows} that {are} not verified {are} left out"


def compose(store: ResultStore, model: str) -> Picture:
    """A chart for each size with budgets or parts, of the machine that was measured last."""
    rows = [
        row
        for row in (*store.newest(STEP), *store.newest(NAME))
        if row.key.get("model") == model and _is_drawn(row)
    ]
    mine = [row for row in rows if _part(row) in WITH_CHARTS]
    if not mine:
        return Picture()
    machine = max(mine, key=lambda row: row.when).machine
    rows = [row for row in rows if row.machine == machine]
    right = [row for row in rows if row.verified]
    sizes = [str(size) for size in MODELS[model].sizes]
    with_budgets = {str(row.key["size"]) for row in right if _part(row) in WITH_CHARTS}
    found = sorted(with_budgets, key=sizes.index)
    charts = (_chart(size, model, [r for r in right if r.key["size"] == size]) for size in found)
    return Picture(tuple(charts), len(rows) - len(right))


def _part(row: Row) -> str:
    return str(row.key["part"]) if row.case == NAME else ""


def _is_drawn(row: Row) -> bool:
    """Whether there is a place for it, if it is verified."""
    values, contender = row.values, row.key.get("contender")
    if "step_ms" not in values:
        return False
    if row.case == STEP:  # compiled ones are in no picture
        return not row.key["compiled"] and contender in (RESIDENT, *PEER_NAMES)
    if _part(row) == "steps":
        return True
    return contender in (RESIDENT, *PARTS, *PEER_NAMES)


def _chart(size: str, model: str, rows: Sequence[Row]) -> Chart:
    made = Chart(f"{model}, {size}")
    steps = [row for row in rows if _part(row) == "steps"]
    beside = steps or [row for row in rows if _part(row) == "parts"]
    resident = sorted(row.values["resident_ms"] for row in beside)[len(beside) // 2]
    made.resident = Point(model_bytes(MODELS[model]).all / 1e9, resident)
    for form in FORMS:
        budgets = [row for row in steps if row.key["form"] == form and row.values["budget"]]
        budgets.sort(key=lambda row: float(row.values["device_bytes"]))
        if budgets:
            made.ours[form] = [_point(row, row.values["step_ms"]["median"]) for row in budgets]
            made.floors[form] = [_point(row, row.values["floor_ms"]) for row in budgets]
    in_parts = [row for row in rows if row.key.get("contender") in PARTS]
    for row in in_parts:
        form = PARTS[row.key["contender"]]
        made.parts[form] = _point(row, row.values["step_ms"]["median"])
    made.peers = _peers(rows)
    return made


def _point(row: Row, step_ms: float) -> Point:
    return Point(row.values["device_bytes"] / 1e9, step_ms)


def _peers(rows: Sequence[Row]) -> dict[str, Point]:
    """Those of the case ``step``, then those measured beside budgets, which win, the last first."""
    eager = {row.key["contender"]: row.values for row in rows if row.case == STEP}
    resident = eager.get(RESIDENT)
    found = {
        name: _weighed(values, resident)
        for name, values in eager.items()
        if name in PEER_NAMES and resident is not None
    }
    for row in sorted(rows, key=lambda row: row.when):
        if row.case == NAME and row.key.get("contender") in PEER_NAMES:
            found[row.key["contender"]] = _point(row, row.values["step_ms"]["median"])
    return found


def _weighed(values: dict[str, Any], resident: dict[str, Any]) -> Point:
    """A contender's point; its weights are what its peak has above the activations."""
    name = "device_peak_allocated"
    weights = weight_bytes(values[name], resident[name], resident["model_bytes"])
    return Point(weights / 1e9, values["step_ms"]["median"])


def draw(made: Picture, path: Path) -> None:
    """Writes a PNG. Raises ImportError without matplotlib (the extra `bench`)."""
    from matplotlib.figure import Figure

    charts = made.charts
    figure = Figure(figsize=(5.6 * len(charts), 4.4), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(charts), squeeze=False)[0]
    for axis, chart in zip(axes, charts, strict=True):
        _draw_chart(axis, chart)
    if made.warning:
        figure.supxlabel(made.warning, fontsize="small", color="tab:red")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def _draw_chart(axis: Any, chart: Chart) -> None:
    for form, points in chart.ours.items():
        colour = COLOURS[form]
        axis.plot(*_line(points), "o-", color=colour, label=f"wanoffload, {LABELS[form]}")
        axis.plot(*_line(chart.floors[form]), "--", color=colour, label=f"floor, {LABELS[form]}")
    for form, point in chart.parts.items():
        colour = COLOURS["parts" if form == PLAIN else form]
        label = f"wanoffload, {form}, in parts, no budget"
        axis.plot(*_line([point]), "D", color=colour, markersize=8, mec="black", label=label)
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
    axis.margins(y=0.1)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _line(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.gb for point in points], [point.step_ms for point in points]
