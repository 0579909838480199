"""The part ``cgroup``: both experts of A14B on the disk tier, under a limit of host memory."""

from __future__ import annotations

from typing import Any

from benchmarks.engine import Found
from benchmarks.harness import say
from benchmarks.loading import checkpoint
from benchmarks.loading.bench import LoadingBench, as_json
from benchmarks.loading.cgroup import memory_limit
from benchmarks.loading.claims import Claim
from benchmarks.loading.remote import Remote

LIMIT_BYTES = 24 * 10**9
EXPERTS = ("transformer", "transformer_2")
TURNS = 1


def limited(bench: LoadingBench) -> Found:
    """One step of each expert in turn, and the most memory that the group had."""
    bench.resident(bench.sizes[0])  # outside of the limit
    checkpoint.second_expert(bench.checkpoint)
    bench.cool_down()
    with memory_limit(LIMIT_BYTES) as limit:
        say(f"under {limit.how}")
        with bench.worker(bench.ours("disk"), limit.launcher) as worker:
            found = _run(bench, worker)
    peak = found["group"].get("peak") or found["own_peak"]
    what = "group's peak" if found["group"].get("peak") else "process's own peak, no limit"
    yield (
        {"what": "two experts on the disk tier"},
        {
            **found,
            "verified": bench.is_expected(bench.sizes[0], found["runs"]),
            "limit": LIMIT_BYTES if limit.launcher else None,
            "how": limit.how,
            "note": "the second expert's files are hard links to the first's",
            "claims": as_json(
                [
                    Claim(
                        f"host memory, {what}",
                        peak / 1e9,
                        LIMIT_BYTES / 1e9,
                        "the limit",
                        "GB",
                        1.0,
                    )
                ]
            ),
        },
    )


def _run(bench: LoadingBench, worker: Remote) -> dict[str, Any]:
    loads = [bench.load(worker, expert) for expert in EXPERTS]
    runs = [
        worker.ask("forwards", size=bench.sizes[0], subfolder=expert, warm=1, count=1)
        for _ in range(TURNS)
        for expert in EXPERTS
    ]
    memory = worker.ask("memory")
    own = memory["anon"] + memory["shmem"]
    return {
        "load_s": [load["load_s"] for load in loads],
        "forward_ms": [run["forward_ms"][-1] for run in runs],
        "runs": runs,
        "own": own,
        "own_peak": max(own, *(load["own_peak"] for load in loads)),
        "locked_bytes": memory["locked_bytes"],
        "group": worker.ask("group"),
    }
