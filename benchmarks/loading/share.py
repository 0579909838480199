"""The part ``share``: four processes of one host, one arena."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

from benchmarks.engine import Found
from benchmarks.harness import say
from benchmarks.loading.bench import MOST_FORWARDS, LoadingBench, as_json
from benchmarks.loading.claims import Claim
from benchmarks.loading.remote import Remote

PROCESSES = 4
LEAD_S = 1.0  # between telling all of them and the moment they begin


def share(bench: LoadingBench) -> Found:
    """Memory of one and of four, and the rate of one alone and of each while all stream.

    Memory is counted by Pss, in which a page that n processes map counts 1/n in each, above what
    each process had before it loaded, and before forwards load the device's libraries.
    """
    bench.warm_up()
    name = f"bench-{os.getpid()}"
    with bench.workers(bench.ours(), PROCESSES) as workers:
        empty = [worker.ask("memory") for worker in workers]
        loads = [bench.load(workers[0], share=name)]
        one = workers[0].ask("memory")
        loads += [bench.load(worker, share=name) for worker in workers[1:]]
        all_of_them = [worker.ask("memory") for worker in workers]
        alone = _together(bench, workers[:1])
        together = _together(bench, workers)
        running = [worker.ask("memory") for worker in workers]
    took_one = one["pss"] - empty[0]["pss"]
    took_all = sum(m["pss"] for m in all_of_them) - sum(m["pss"] for m in empty)
    rate_alone, rates = _gbps(bench, alone[0]), [_gbps(bench, run) for run in together]
    say(f"GB/s: alone {rate_alone:.1f}, together {', '.join(f'{rate:.1f}' for rate in rates)}")
    yield (
        {"what": f"{PROCESSES} processes"},
        {
            "verified": bench.is_expected(bench.sizes[0], [*alone, *together]),
            "load_s": [each["load_s"] for each in loads],
            "gbps_alone": rate_alone,
            "gbps_together": rates,
            "host_used_by_one": one["host_used"] - empty[0]["host_used"],
            "host_used_by_all": all_of_them[-1]["host_used"] - empty[-1]["host_used"],
            "pss_running": [each["pss"] for each in running],
            "locked_each": [each["locked_bytes"] for each in all_of_them],
            "claims": as_json(
                [
                    Claim("host memory of four", took_all / 1e9, took_one / 1e9, "one", "GB", 1.05),
                    Claim("rates of four at once", sum(rates), rate_alone, "one alone", "GB/s"),
                ]
            ),
        },
    )


def _together(bench: LoadingBench, workers: list[Remote]) -> list[dict[str, Any]]:
    """Forwards of all these processes, begun at one moment. On one GPU they share its link."""
    begin = time.monotonic() + LEAD_S
    for worker in workers:
        worker.tell("forwards", size=bench.sizes[0], count=MOST_FORWARDS, warm=2, at=begin)
    return [worker.answer() for worker in workers]


def _gbps(bench: LoadingBench, run: dict[str, Any]) -> float:
    return bench.bytes.blocks / statistics.fmean(run["forward_ms"]) / 1e6
