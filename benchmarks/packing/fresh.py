"""The part ``memory``: plain and packed blocks, each in a fresh process."""

from __future__ import annotations

from typing import Any

from benchmarks.engine import Found
from benchmarks.harness import say
from benchmarks.loading.claims import Claim
from benchmarks.memory import run_child
from benchmarks.packing.bench import PACKED, PLAIN, PackingBench, as_json

BEYOND_PLAIN_MB = 160
CHUNK_BYTES = 48 << 20  # packed, at most; three are staged


def memory(bench: PackingBench) -> Found:
    """Device memory of a step, and host memory while wrapping."""
    sizes = bench.sizes[:2]
    found = {}
    for form in (PLAIN, PACKED):
        name = bench.contender(form).name
        say(f"{name}: a fresh process")
        found[form] = run_child(bench.spec, name, sizes, bench.device)
    for number, size in enumerate(sizes):
        plain, packed = (found[form]["sizes"][number] for form in (PLAIN, PACKED))
        yield (
            {"size": str(size)},
            {
                "verified": plain["output_sha256"] == packed["output_sha256"]
                and plain["acquires_right"]
                and packed["acquires_right"],
                PLAIN: plain,
                PACKED: packed,
                "claims": as_json(_device_claims(bench, plain, packed)),
            },
        )
    setups = {form: found[form]["setup"] for form in found}
    yield (
        {"what": "wrapping"},
        {"verified": True, **setups, "claims": as_json(_host_claims(setups[PACKED]))},
    )


def _device_claims(
    bench: PackingBench, plain: dict[str, Any], packed: dict[str, Any]
) -> list[Claim]:
    if bench.device.type != "cuda":  # where torch counts nothing
        return []
    floor = 3 * min(CHUNK_BYTES, 0.705 * bench.bytes.largest_block) / 1e6
    names = {"in use": "allocated_peak", "reserved": "reserved_peak"}
    claims = []
    for what, name in names.items():
        beyond = (packed[name] - plain[name]) / 1e6
        title = f"device memory beyond plain, {what}"
        claims.append(Claim(title, beyond, BEYOND_PLAIN_MB, "asked", "MB", 1.0))
        claims.append(Claim(title, beyond, floor, "three chunks", "MB"))
    return claims


def _host_claims(setup: dict[str, Any]) -> list[Claim]:
    """While packing, the peak is the model and a block, plus what libraries take."""
    if not setup["rss_peak_wrap"]:
        return []
    above = setup["rss_peak_wrap"] - setup["rss_empty"]
    allowed = setup["rss_ceiling"] - setup["rss_empty"]
    return [
        Claim(
            "host memory at the peak of wrapping",
            above / 1e9,
            allowed / 1e9,
            "the model, a block and 1 GB",
            "GB",
            1.0,
        )
    ]
