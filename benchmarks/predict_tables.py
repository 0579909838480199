"""The tables of the case ``predict``, computed with the cost model as it is now."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cells import Column, gigabytes, markdown, yes
from benchmarks.harness import Row
from benchmarks.predictions import (
    LOSS_TOLERANCE,
    PEAK_TOLERANCE,
    STEP_TOLERANCE,
    Predicted,
    Taken,
    in_order,
    what_auto_takes,
)
from wanoffload.machine.hardware import RATES, Hardware


def sections(rows: Sequence[Row]) -> list[str]:
    """Both tables, the rates that predictions are made from, and a line that sums up."""
    if not rows:
        return []
    predicted = in_order(map(Predicted.of, rows))
    taken = what_auto_takes(predicted)
    return [
        f"**Prediction against measurement**\n\n{markdown(predicted, PREDICTIONS)}",
        _rates(predicted[-1].hardware),
        f"**What auto takes**\n\n{markdown(taken, TAKEN)}",
        _summary(predicted, taken),
    ]


def _rates(hardware: Hardware) -> str:
    known = {name: getattr(hardware, name) for name in RATES}
    found = (f"{name} {rate:.4g}" if rate else f"{name} unknown" for name, rate in known.items())
    return f"Rates of the probe: {', '.join(found)}."


def _summary(predicted: Sequence[Predicted], taken: Sequence[Taken]) -> str:
    """How many are inside. What was not measured does not count."""
    counts = (
        ("steps", STEP_TOLERANCE, [_off(each.step_ratio) for each in predicted]),
        ("peaks", PEAK_TOLERANCE, [_off(each.peak_ratio) for each in predicted]),
        ("losses of auto", LOSS_TOLERANCE, [each.slower for each in taken]),
    )
    return "Inside: " + "; ".join(_count(*each) for each in counts) + "."


def _off(ratio: float | None) -> float | None:
    return None if ratio is None else abs(ratio - 1)


def _count(name: str, tolerance: float, found: Sequence[float | None]) -> str:
    off = [each for each in found if each is not None]
    inside = sum(each <= tolerance for each in off)
    worst = f", the worst is off by {max(off):.1%}" if off else ""
    return f"{inside} of {len(off)} {name} ({tolerance:.0%}{worst})"


def _verdict(off: float, tolerance: float) -> str:
    return "inside" if off <= tolerance else "**OUTSIDE**"


def _judged(ratio: float | None, tolerance: float) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.3f}, {_verdict(abs(ratio - 1), tolerance)}"


def _measured_peak(each: Predicted) -> str:
    return gigabytes(each.measured_peak) if each.measured_peak else ""


def _reserved(each: Predicted) -> str:
    """What torch's allocator took; it gives back what it does not use when memory runs short."""
    return gigabytes(each.reserved) if each.reserved else ""


def _milliseconds(value: float | None) -> str:
    return f"{value:.1f}" if value is not None else "not measured"


def _slower(each: Taken) -> str:
    if each.slower is None:
        return ""
    return f"{each.slower:.1%}, {_verdict(each.slower, LOSS_TOLERANCE)}"


PREDICTIONS: list[Column[Predicted]] = [
    ("model", lambda each: each.row.key["model"]),
    ("size", lambda each: each.row.key["size"]),
    ("plan", lambda each: each.row.key["plan"]),
    ("step predicted, ms", lambda each: f"{each.step_ms:.1f}"),
    ("measured", lambda each: f"{each.measured_ms:.1f}"),
    ("ratio", lambda each: _judged(each.step_ratio, STEP_TOLERANCE)),
    ("peak predicted, GB", lambda each: gigabytes(each.candidate.device_peak_bytes)),
    ("measured", _measured_peak),
    ("ratio", lambda each: _judged(each.peak_ratio, PEAK_TOLERANCE)),
    ("reserved, GB", _reserved),
    ("fits", lambda each: yes(each.fits)),
    ("equal", lambda each: yes(each.row.verified)),
]
TAKEN: list[Column[Taken]] = [
    ("model", lambda each: each.model),
    ("size", lambda each: each.size),
    ("card", lambda each: each.card),
    ("auto takes", lambda each: each.plan or "nothing fits"),
    ("its step, ms", lambda each: _milliseconds(each.step_ms)),
    ("best measured that fits", lambda each: each.best or ""),
    ("its step, ms", lambda each: _milliseconds(each.best_ms)),
    ("slower by", _slower),
]
