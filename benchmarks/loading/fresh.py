"""The parts ``warm`` and ``first-step``: a fresh process loads from the page cache and runs a step.

Both look at the same processes, which are run once where both parts are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from benchmarks.engine import Found
from benchmarks.harness import Spread, say
from benchmarks.loading.bench import WARM, LoadingBench, as_json
from benchmarks.loading.claims import AT_LEAST, Claim


@dataclass(frozen=True)
class Fresh:
    """One process: what it took until its model was there, and until its first step had ended."""

    cached: float  # share of the files in the page cache when it began
    import_s: float
    device_s: float
    load: dict[str, Any]
    memory: dict[str, int]
    first_step_s: float  # since before the process was started
    step: dict[str, Any]


@cache
def fresh(bench: LoadingBench, name: str, number: int) -> Fresh:
    """Process ``number`` of the contender ``name``, run at the first call."""
    cached = bench.warm_up()
    with bench.worker(name) as worker:
        loaded = bench.load(worker)
        step = worker.ask("forwards", size=bench.sizes[0], warm=1, count=1)
        took = step["ended"] - worker.started
        say(f"{name}: the first step ended {took:.2f} s after the start of the process")
        return Fresh(
            cached=cached,
            import_s=worker.imported - worker.started,
            device_s=worker.ready - worker.imported,
            load=loaded,
            memory=worker.ask("memory"),
            first_step_s=took,
            step=step,
        )


def _runs(bench: LoadingBench) -> tuple[list[Fresh], Fresh | None]:
    """Ours, some times, and the peer once."""
    peer = bench.peer
    ours = [fresh(bench, bench.ours(), n) for n in range(bench.session.options.repeats)]
    return ours, fresh(bench, peer, 0) if peer else None


def _common(bench: LoadingBench, ours: list[Fresh], peer: Fresh | None) -> dict[str, Any]:
    everyone = [*ours, *([peer] if peer else [])]
    return {
        "verified": bench.is_expected(bench.sizes[0], [run.step for run in everyone])
        and all(run.cached >= WARM for run in everyone),
        "cached": min(run.cached for run in everyone),
        "import_s": ours[-1].import_s,
        "device_s": ours[-1].device_s,
        "load_s": Spread.of([run.load["load_s"] for run in ours]).as_json(),
    }


def warm(bench: LoadingBench) -> Found:
    """Seconds from the call of load() to ready-to-run, and the host's memory meanwhile."""
    bench.warm_up()
    with bench.worker(bench.ours()) as worker:
        rates = worker.ask(
            "host_rates", files=bench.checkpoint.files, image_bytes=bench.bytes.largest_block
        )
    say(f"touch, read, register: {rates['rate_gbps']:.1f} GB/s together")
    ours, peer = _runs(bench)
    values = _common(bench, ours, peer)
    seconds = values["load_s"]["median"]
    yield (
        {"what": "load"},
        {
            **values,
            **rates,
            "peer": bench.peer if peer else None,
            "peer_load_s": peer.load["load_s"] if peer else None,
            "rss_peak_method": ours[0].load["rss_peak_method"],
            "peer_rss_peak": peer.load["rss_peak"] - peer.load["rss_before"] if peer else None,
            "peer_host_used": peer.load["host_used"] if peer else None,
            "claims": as_json(_warm_claims(bench, ours, peer, seconds, rates["rate_gbps"])),
        },
    )


def _warm_claims(
    bench: LoadingBench, ours: list[Fresh], peer: Fresh | None, seconds: float, gbps: float
) -> list[Claim]:
    floor_s = bench.checkpoint.nbytes / gbps / 1e9
    peak = max(run.load["rss_peak"] - run.load["rss_before"] for run in ours)
    own = max(run.load["own_peak"] - run.load["own_before"] for run in ours)
    model = bench.bytes.all / 1e9
    claims = [
        Claim(
            "load(), files in the page cache", seconds, floor_s, "touch, read, register", "s", 1.3
        ),
        Claim("host memory at the peak of load()", peak / 1e9, model, "the model", "GB", 1.03),
        Claim("of this, without mapped files", own / 1e9, model, "the model", "GB", 1.03),
    ]
    if peer is not None:
        setup = peer.load["load_s"]
        claims.append(
            Claim("from_pretrained and group offload", setup, seconds, "ours", "s", 5, AT_LEAST)
        )
    return claims


def first_step(bench: LoadingBench) -> Found:
    """Seconds from the start of a process to the end of its first step."""
    ours, peer = _runs(bench)
    took = Spread.of([run.first_step_s for run in ours])
    claims = []
    if peer is not None:
        other = peer.first_step_s
        claims.append(Claim("start to first step", took.median, other, bench.peer or "", "s", 0.5))
    yield (
        {"what": "first step"},
        {
            **_common(bench, ours, peer),
            "first_step_s": took.as_json(),
            "peer_first_step_s": peer.first_step_s if peer else None,
            "claims": as_json(claims),
        },
    )
