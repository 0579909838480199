"""The tables of the case ``loading``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.cells import Column, gigabytes, markdown, of_key, spread, yes
from benchmarks.harness import Row
from benchmarks.loading.claims import Claim

Line = tuple[Row, Claim]


def sections(rows: Sequence[Row]) -> list[str]:
    """What was asked and found, the tiers' forwards, and what the ratios are made of."""
    lines = [(row, Claim(**claim)) for row in rows for claim in row.values.get("claims", ())]
    tiers = [row for row in rows if "gbps" in row.values]
    found = [f"**Loading, asked and measured**\n\n{markdown(lines, CLAIMS)}"] if lines else []
    found += [f"**Forwards by tier**\n\n{markdown(tiers, TIERS)}"] if tiers else []
    return found + [_raw(row) for row in rows if "what" in row.key]


def _what(row: Row) -> str:
    left_out = ("model", "part")
    return ", ".join(str(value) for name, value in row.key.items() if name not in left_out)


CLAIMS: list[Column[Line]] = [
    ("model", lambda line: str(line[0].key["model"])),
    ("part", lambda line: str(line[0].key["part"])),
    ("of", lambda line: _what(line[0])),
    ("what", lambda line: line[1].what),
    ("measured", lambda line: f"{line[1].value:.4g} {line[1].unit}"),
    ("beside", lambda line: f"{line[1].against:.4g} {line[1].unit}: {line[1].against_is}"),
    ("ratio", lambda line: f"{line[1].ratio:.3f}"),
    ("asked", lambda line: line[1].asked),
    ("equal, bit for bit", lambda line: yes(line[0].verified)),
]


def _own(row: Row) -> str:
    return gigabytes(row.values["anon"] + row.values["shmem"])


TIERS: list[Column[Row]] = [
    ("model", of_key("model")),
    ("tier", of_key("tier")),
    ("blocks in", of_key("source")),
    ("size", of_key("size")),
    ("forward, ms", lambda row: spread(row.values["forward_ms"])),
    ("resident", lambda row: f"{row.values['resident_ms']:.1f}"),
    ("bytes / rate, ms", lambda row: f"{row.values['bytes_ms']:.1f}"),
    ("GB/s", lambda row: f"{row.values['gbps']:.2f}"),
    ("of its source, or the link", lambda row: f"{row.values['source_gbps']:.2f}"),
    ("load, s", lambda row: f"{row.values['load_s']:.2f}"),
    ("host, GB: own", _own),
    ("of this, the empty process", lambda row: gigabytes(row.values["empty_own"])),
    ("mapped files", lambda row: gigabytes(row.values["file"])),
    ("page-locked", lambda row: gigabytes(row.values["locked_bytes"])),
    ("equal", lambda row: yes(row.verified)),
]

# What the other parts' ratios are made of, by the names under which it is stored.
RAW = {
    "touch_gbps": "touch, GB/s",
    "read_gbps": "read from the page cache, GB/s",
    "register_gbps": "register, GB/s",
    "rate_gbps": "the three together, GB/s",
    "load_s": "load(), s",
    "peer": "peer",
    "peer_load_s": "its set-up, s",
    "peer_host_used": "its host memory, bytes",
    "import_s": "imports, s",
    "device_s": "the device's context, s",
    "first_step_s": "first step, s",
    "peer_first_step_s": "the peer's, s",
    "direct_gbps_before": "O_DIRECT by threads before, GB/s",
    "direct_gbps_after": "after, GB/s",
    "gbps_alone": "one alone, GB/s",
    "gbps_together": "each of all at once, GB/s",
    "host_used_by_one": "the system's memory for one, bytes",
    "host_used_by_all": "for all, bytes",
    "how": "limit",
    "group": "the group, bytes",
    "forward_ms": "forwards, ms",
    "note": "note",
}


def _raw(row: Row) -> str:
    """One line of figures."""
    shown = [
        f"{title} {text(row.values[name])}"
        for name, title in RAW.items()
        if row.values.get(name) is not None
    ]
    return f"{row.key['part']}, {_what(row)}: {'; '.join(shown)}."


def text(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        return spread(value, 2)
    if isinstance(value, dict):
        return ", ".join(f"{name}: {text(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(text, value))
    return f"{value:.2f}" if isinstance(value, float) else f"{value}"
