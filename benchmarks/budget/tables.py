"""The tables of the case ``budget``."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.budget import predicted
from benchmarks.cells import Column, gigabytes, markdown, of_key, spread, yes
from benchmarks.harness import Row
from benchmarks.loading.claims import Claim
from benchmarks.loading.tables import CLAIMS


def sections(rows: Sequence[Row]) -> list[str]:
    """What was asked and found, steps by budget, the ceiling, parts of blocks, the peer."""
    measured = [row for row in rows if not row.values.get("complete")]
    lines = [(row, claim) for row in measured for claim in all_claims(row) if claim.asked]
    of_part = {part: [row for row in measured if row.key["part"] == part] for part in TITLES}
    found = [f"**Budgets, asked and measured**\n\n{markdown(lines, CLAIMS)}"] if lines else []
    return found + [
        f"**{title}**\n\n{markdown(of_part[part], columns)}"
        for part, (title, columns) in TITLES.items()
        if of_part[part]
    ]


def all_claims(row: Row) -> list[Claim]:
    """What was measured, and what is predicted of it now."""
    return [*(Claim(**claim) for claim in row.values["claims"]), *predicted.claims(row)]


def _plan(row: Row) -> str:
    """Blocks that stay, plain and packed, and those that are streamed."""
    if (plan := row.values.get("plan")) is None:
        return "too small"
    return f"{plan['resident']} + {plan['kept_packed']} + {plan['streamed']}"


def _of_plan(name: str, row: Row) -> str:
    return gigabytes(row.values["plan"][name]) if "plan" in row.values else ""


def _number(name: str, row: Row, digits: int) -> str:
    return f"{row.values[name]:.{digits}f}" if name in row.values else ""


def _bytes(name: str, row: Row) -> str:
    return gigabytes(row.values[name]) if name in row.values else ""


def _predicted(row: Row) -> str:
    if "plan" not in row.values:
        return ""
    says = predicted.Predicted.of(row.key["model"], row.key["form"], row.values)
    return f"{says.step_ms:.1f} ms, {gigabytes(says.device_bytes)} GB"


STEPS: list[Column[Row]] = [
    ("model", of_key("model")),
    ("size", of_key("size")),
    ("blocks", of_key("form")),
    ("budget", of_key("budget")),
    ("on the device, plain + packed + streamed", _plan),
    ("ahead, slots", lambda row: _slots(row)),
    ("weights on the device, GB", lambda row: _bytes("device_bytes", row)),
    ("step, ms", lambda row: spread(row.values["step_ms"]) if "step_ms" in row.values else ""),
    ("floor, ms", lambda row: _number("floor_ms", row, 1)),
    ("x floor", lambda row: _number("x_floor", row, 4)),
    ("x resident", lambda row: _number("x_resident", row, 4)),
    ("predicted", _predicted),
    ("streamed a forward, GB", lambda row: _of_plan("streamed_bytes", row)),
    ("unpacked a forward, GB", lambda row: _of_plan("decoded_bytes", row)),
    ("link, GB/s", lambda row: spread(row.values["link_gbps"]) if "step_ms" in row.values else ""),
    ("device peak, GB: in use", lambda row: _bytes("device_peak_allocated", row)),
    ("reserved", lambda row: _bytes("device_peak_reserved", row)),
    ("equal, bit for bit, and as planned", lambda row: yes(row.verified)),
]


def _slots(row: Row) -> str:
    plan = row.values.get("plan")
    return f"{plan['depth']}, {plan['slots']}" if plan else ""


def _left(row: Row) -> str:
    left = row.values.get("left")
    return gigabytes(left) if left is not None else ""


CEILING: list[Column[Row]] = [
    ("model", of_key("model")),
    ("budget", of_key("budget")),
    ("forwards", lambda row: str(row.values["forwards"])),
    ("left on the device, GB", _left),
    ("the resident model's activations", lambda row: gigabytes(row.values["activations"])),
    ("weights, the most", lambda row: gigabytes(row.values["device_bytes"])),
    ("reserved, the most", lambda row: gigabytes(row.values["reserved"])),
    ("blocks that stayed", lambda row: "{} to {}".format(*row.values["stayed"])),
    ("out of memory", lambda row: str(row.values["out_of_memory"])),
    ("the allocator's retries", lambda row: str(row.values["retries"])),
    ("seconds", lambda row: f"{row.values['seconds']:.1f}"),
    ("equal, bit for bit", lambda row: yes(row.verified)),
]


def _passes_through(row: Row) -> str:
    """The ring; slots where blocks stream."""
    ring = row.values.get("ring_bytes")
    if ring is None:
        return ""
    return gigabytes(ring) if ring else f"slots, {gigabytes(row.values['slot_bytes'])}"


PARTS: list[Column[Row]] = [
    ("model", of_key("model")),
    ("size", of_key("size")),
    ("contender", of_key("contender")),
    ("step, ms", lambda row: spread(row.values["step_ms"])),
    ("x resident", lambda row: f"{row.values['x_resident']:.4f}"),
    ("x block granularity", lambda row: f"{row.values['x_blocks']:.4f}"),
    ("weights on the device, GB", lambda row: gigabytes(row.values["device_bytes"])),
    ("of this, the ring", _passes_through),
    ("device peak, GB: in use", lambda row: gigabytes(row.values["device_peak_allocated"])),
    ("reserved", lambda row: gigabytes(row.values["device_peak_reserved"])),
    ("link, GB/s", lambda row: spread(row.values["link_gbps"])),
    ("equal, bit for bit, and as planned", lambda row: yes(row.verified)),
]
EXPERTS: list[Column[Row]] = [
    ("model", of_key("model")),
    ("size", of_key("size")),
    ("blocks", of_key("form")),
    ("budget of both", of_key("budget")),
    ("expert", of_key("expert")),
    ("what stays", lambda row: str(row.values["stays"])),
    ("its first forward, ms", lambda row: spread(row.values["first_ms"])),
    ("with nothing staying", lambda row: spread(row.values["streamed_ms"])),
    ("stall", lambda row: _number("stall_ms", row, 1)),
    ("the copy of the first units", lambda row: _number("first_units_ms", row, 1)),
    ("its other forwards", lambda row: spread(row.values["forward_ms"])),
    ("resident", lambda row: _number("resident_ms", row, 1)),
    ("link, GB/s", lambda row: spread(row.values["link_gbps"])),
    ("equal, bit for bit", lambda row: yes(row.verified)),
]
PEERS: list[Column[Row]] = [
    ("model", of_key("model")),
    ("size", of_key("size")),
    ("contender", of_key("contender")),
    ("step, ms", lambda row: spread(row.values["step_ms"])),
    ("x resident", lambda row: f"{row.values['x_resident']:.4f}"),
    ("weights on the device, GB", lambda row: gigabytes(row.values["device_bytes"])),
    ("device peak, GB: in use", lambda row: gigabytes(row.values["device_peak_allocated"])),
    ("reserved", lambda row: gigabytes(row.values["device_peak_reserved"])),
    ("equal, bit for bit", lambda row: yes(row.verified)),
]
TITLES: dict[str, tuple[str, list[Column[Row]]]] = {
    "steps": ("Steps under a budget", STEPS),
    "ceiling": ("Forwards of mixed shapes", CEILING),
    "parts": ("Parts of blocks, beside whole blocks", PARTS),
    "experts": ("Two experts under one budget", EXPERTS),
    "peers": ("Peers, beside the budgets", PEERS),
}
