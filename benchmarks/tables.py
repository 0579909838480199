"""Prints what a result file holds as markdown tables, for the README.

Only the newest row of each key is shown. Every figure stands beside its floor or its ceiling.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import predict_tables
from benchmarks.budget import tables as budget_tables
from benchmarks.budget.bench import NAME as BUDGET
from benchmarks.cells import Column, gigabytes, markdown, of_key, spread, yes
from benchmarks.contenders import RESIDENT
from benchmarks.harness import ResultStore, Row
from benchmarks.loading import tables as loading_tables
from benchmarks.loading.bench import NAME as LOADING
from benchmarks.packing import tables as packing_tables
from benchmarks.packing.bench import NAME as PACKING
from benchmarks.predictions import NAME as PREDICT
from benchmarks.step_bench import NAME as STEP


def render(store: ResultStore) -> str:
    """All tables of a file, with the machine above them."""
    parts = []
    for machine in dict.fromkeys(row.machine for row in store.rows()):
        parts.append(f"Measured on {machine}.")
        for title, case, wanted, columns in TABLES:
            rows = [row for row in store.newest(case) if row.machine == machine and wanted(row)]
            if rows:
                parts.append(f"**{title}**\n\n{markdown(rows, columns)}")
        predicted = [row for row in store.newest(PREDICT) if row.machine == machine]
        parts += predict_tables.sections(predicted)
        loaded = [row for row in store.newest(LOADING) if row.machine == machine]
        parts += loading_tables.sections(loaded)
        packed = [row for row in store.newest(PACKING) if row.machine == machine]
        parts += packing_tables.sections(packed)
        budgets = [row for row in store.newest(BUDGET) if row.machine == machine]
        parts += budget_tables.sections(budgets)
    return "\n\n".join(parts) or "Nothing was measured yet."


def _resident_host(row: Row) -> str:
    """What the system counts; a process's own count misses memory that a driver mapped."""
    return gigabytes(max(row.values["host_used"], row.values["host_rss"]))


def _blank_for_resident(cell: Callable[[Row], str]) -> Callable[[Row], str]:
    return lambda row: "" if row.key["contender"] == RESIDENT else cell(row)


STEP_TIMES: list[Column[Row]] = [
    ("model", of_key("model")),
    ("size", of_key("size")),
    ("contender", of_key("contender")),
    ("step, ms", lambda row: spread(row.values["step_ms"])),
    ("resident, same run", lambda row: spread(row.values["resident_ms"])),
    ("link, GB/s", lambda row: spread(row.values["link_gbps"])),
    ("floor, ms", lambda row: f"{row.values['floor_ms']:.1f}"),
    ("x resident", lambda row: f"{row.values['x_resident']:.4f}"),
    ("x floor", _blank_for_resident(lambda row: f"{row.values['x_floor']:.4f}")),
    ("equal, bit for bit", lambda row: yes(row.verified)),
]
STEP_TIMES_COMPILED: list[Column[Row]] = [
    *STEP_TIMES,
    ("graphs, recompiled", lambda row: f"{row.values['graphs']}, {row.values['recompiled']}"),
]
STEP_COSTS: list[Column[Row]] = [
    *STEP_TIMES[:3],
    ("device peak, GB: in use", lambda row: gigabytes(row.values["device_peak_allocated"])),
    ("reserved", lambda row: gigabytes(row.values["device_peak_reserved"])),
    ("host, GB: page-locked", lambda row: gigabytes(row.values["host_locked"])),
    ("resident", _blank_for_resident(_resident_host)),
    ("set-up, s", _blank_for_resident(lambda row: f"{row.values['setup_s']:.2f}")),
    ("fetched a step, GB", lambda row: gigabytes(row.values["bytes_per_step"])),
]


def _ceiling(row: Row) -> str:
    if not row.values.get("reserved_resident") or not row.values["slot_bytes"]:
        return ""
    ceiling = row.values["reserved_ceiling"]
    return f"{gigabytes(ceiling)}, {_kept(row.values['reserved'], ceiling)}"


def _from_driver(row: Row) -> str:
    """What the driver says, above an empty process with its context."""
    return gigabytes(row.values["driver_used"] - row.values["driver_empty"])


def _locked(row: Row) -> str:
    values = row.values
    if not values["slot_bytes"]:
        return gigabytes(values["locked_bytes"])
    ceiling = 1.005 * values["block_bytes"] + values["ring_bytes"]
    return f"{gigabytes(values['locked_bytes'])}, {_kept(values['locked_bytes'], ceiling)}"


def _wrap_peak(row: Row) -> str:
    values = row.values
    if not values["rss_peak_wrap"]:
        return ""
    above = values["rss_peak_wrap"] - values["rss_empty"]
    allowed = values["rss_ceiling"] - values["rss_empty"]
    kept = _kept(above, allowed)
    return f"{gigabytes(above)} of {gigabytes(allowed)}, {kept} ({values['rss_peak_method']})"


def _kept(value: float, ceiling: float) -> str:
    return "kept" if value <= ceiling else "**exceeded**"


MEMORY: list[Column[Row]] = [
    *STEP_TIMES[:3],
    ("reserved, GB", lambda row: gigabytes(row.values["reserved"])),
    ("ceiling", _ceiling),
    ("reserved, peak", lambda row: gigabytes(row.values["reserved_peak"])),
    ("in use, peak", lambda row: gigabytes(row.values["allocated_peak"])),
    ("taken from the driver, GB", _from_driver),
    ("page-locked, GB", _locked),
    ("host peak above the empty process while wrapping, GB", _wrap_peak),
    ("equal", lambda row: yes(row.verified)),
]


def _first_forward(row: Row) -> str:
    values = row.values
    first, steady = values["first_forward_ms"], values["steady_forward_ms"]
    ceiling = steady["median"] + values["block_copy_ms"]
    return f"{spread(first)}, {_kept(first['median'], ceiling)}"


WRAPPING: list[Column[Row]] = [
    ("model", of_key("model")),
    ("contender", of_key("contender")),
    ("set-up, s", lambda row: spread(row.values["setup_s"], 2)),
    ("GB/s", lambda row: f"{row.values['gb_per_s']:.1f}"),
    ("page-locked, GB", lambda row: gigabytes(row.values["host_locked"])),
    ("size", of_key("size")),
    ("first forward, ms", _first_forward),
    ("steady forward, ms", lambda row: spread(row.values["steady_forward_ms"])),
    ("one block's copy, ms", lambda row: f"{row.values['block_copy_ms']:.2f}"),
    ("equal", lambda row: yes(row.verified)),
]


def _measured(row: Row) -> str:
    """All figures of a micro row in one cell."""
    found = []
    for name, value in row.values.items():
        if name != "verified":
            shown = spread(value, 2) if isinstance(value, dict) else f"{value:.2f}"
            found.append(f"{name} {shown}")
    return ", ".join(found)


def _micro_name(row: Row) -> str:
    return ", ".join(f"{value}" for name, value in row.key.items() if name != "part")


MICRO: list[Column[Row]] = [
    ("part", of_key("part")),
    ("what", _micro_name),
    ("median (least–greatest)", _measured),  # noqa: RUF001
    ("verified", lambda row: yes(row.verified)),
]


def _eager(row: Row) -> bool:
    return not row.key["compiled"]


def _compiled(row: Row) -> bool:
    return bool(row.key["compiled"])


def _every(row: Row) -> bool:
    return True


def _is_part(row: Row) -> bool:
    return not row.values.get("complete", False)


LIMITED: list[Column[Row]] = [
    ("treatment", of_key("treatment")),
    ("weights, GB", lambda row: gigabytes(row.values["weights"])),
    ("limit", lambda row: gigabytes(row.values["limit"])),
    ("runs", lambda row: "yes" if row.values["fits"] else "out of memory"),
    ("device peak, GB: in use", lambda row: gigabytes(row.values["allocated_peak"])),
    ("reserved", lambda row: gigabytes(row.values["reserved_peak"])),
    ("equal, bit for bit", lambda row: "yes" if row.values["equal"] else ""),
    ("as asked", lambda row: yes(row.verified)),
]


TABLES: list[tuple[str, str, Callable[[Row], bool], list[Column[Row]]]] = [
    ("A step (two forwards)", STEP, _eager, STEP_TIMES),
    ("A step with compiled blocks", STEP, _compiled, STEP_TIMES_COMPILED),
    ("What a step takes", STEP, _eager, STEP_COSTS),
    ("What a step with compiled blocks takes", STEP, _compiled, STEP_COSTS),
    ("Memory, each in a fresh process", "memory", _every, MEMORY),
    ("Setting up from a model in host memory", "wrapping", _every, WRAPPING),
    ("Parts", "micro", _is_part, MICRO),
    ("A DiT larger than the device", "limited", _every, LIMITED),
]
