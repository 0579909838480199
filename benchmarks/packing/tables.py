"""The tables of the case ``packing``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.cells import Column, gigabytes, markdown, spread, yes
from benchmarks.harness import Row
from benchmarks.loading.claims import Claim
from benchmarks.loading.tables import CLAIMS, text

Form = tuple[Row, str, dict[str, Any]]


def sections(rows: Sequence[Row]) -> list[str]:
    """What was asked and found, the steps, what others published, and what ratios are made of."""
    lines = [(row, Claim(**claim)) for row in rows for claim in row.values.get("claims", ())]
    forms = [
        (row, name, form) for row in rows for name, form in row.values.get("by_form", {}).items()
    ]
    peers = [row for row in rows if "published" in row.values]
    found = [f"**Packing, asked and measured**\n\n{markdown(lines, CLAIMS)}"] if lines else []
    found += [f"**Steps, plain and packed**\n\n{markdown(forms, STEPS)}"] if forms else []
    found += (
        [f"**Published by others, not measured here**\n\n{markdown(peers, PEERS)}"] if peers else []
    )
    raw = [_raw(row) for row in rows if "what" in row.key and row not in peers]
    return found + [line for line in raw if line]


def _stat(form: Form, name: str) -> Any:
    stats = form[2]["stats"]
    return stats[name] if stats else 0


STEPS: list[Column[Form]] = [
    ("model", lambda form: str(form[0].key["model"])),
    ("size", lambda form: str(form[0].key["size"])),
    ("blocks", lambda form: form[1]),
    ("packed", lambda form: f"{_stat(form, 'packed_units')} of {_stat(form, 'units')}"),
    ("step, ms", lambda form: spread(form[2]["step_ms"])),
    ("x resident", lambda form: f"{form[2]['x_resident']:.4f}"),
    ("floor, ms", lambda form: f"{form[2]['floor_ms']:.1f}"),
    ("exposed, ms", lambda form: f"{form[2]['exposed_ms']:.1f}"),
    ("over the link, GB a step", lambda form: gigabytes(form[2]["bytes_per_step"])),
    ("link, GB/s", lambda form: spread(form[0].values["link_gbps"])),
    ("device peak, GB: in use", lambda form: gigabytes(form[2]["device_peak_allocated"])),
    ("reserved", lambda form: gigabytes(form[2]["device_peak_reserved"])),
    ("page-locked, GB", lambda form: gigabytes(_stat(form, "locked_bytes"))),
    ("equal, bit for bit", lambda form: yes(form[2]["equal"] and form[2]["fetches_right"])),
]


def _published(name: str) -> Any:
    return lambda row: str(row.values["published"][name])


PEERS: list[Column[Row]] = [
    ("who", _published("who")),
    ("what", _published("what")),
    ("plain, GB", _published("plain_gb")),
    ("packed, GB", _published("packed_gb")),
    ("packed and resident", _published("resident")),
    ("packed and offloaded", _published("offloaded")),
    ("where", _published("where")),
]

# What ratios are made of, by the names under which it is stored.
RAW = {
    "plain_bytes": "plain, bytes",
    "packed_bytes": "packed, bytes",
    "one_core_gbps": "one core, GB/s",
    "all_cores_gbps": "all cores, GB/s",
    "cores": "cores",
    "gbps": "GB/s of plain bytes",
    "copy_gbps": "a copy within the device, GB/s",
    "chunks": "chunks",
    "ms": "ms",
    "first_use_s": "the first block of all, compiling included, s",
    "plain_s": "plain, s",
    "packed_s": "packed, s",
    "plain_growth": "own memory grows by, plain, bytes",
    "packed_growth": "packed, bytes",
    "plain_held": "held, plain",
    "packed_held": "held, packed",
    "held": "held",
}


def _raw(row: Row) -> str:
    """One line of figures."""
    shown = [
        f"{title} {text(row.values[name])}"
        for name, title in RAW.items()
        if row.values.get(name) is not None
    ]
    return f"{row.key['part']}, {row.key['what']}: {'; '.join(shown)}." if shown else ""
