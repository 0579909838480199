"""The part ``cold``: loading from the disk, and what the disk gives past the page cache."""

from __future__ import annotations

from typing import Any

from benchmarks.engine import Found
from benchmarks.harness import say
from benchmarks.loading.bench import COLD, LoadingBench, as_json
from benchmarks.loading.claims import AT_LEAST, Claim
from benchmarks.loading.reading import READ_BYTES, Piece, Reader, pieces_of

THREADS = (1, 4, 8, 16)
PROBED = 2 * 10**9  # bytes read for each number of threads


def cold(bench: LoadingBench) -> Found:
    """Seconds of load() with an empty page cache, between two measurements of the disk."""
    bench.cool_down()
    before = direct_rates(bench)
    with bench.worker(bench.ours()) as worker:
        cached = bench.cool_down()
        loaded = bench.load(worker)
        left = bench.cached()
        step = worker.ask("forwards", size=bench.sizes[0], warm=1, count=1)
    bench.cool_down()
    after = direct_rates(bench)
    best = max(*before.values(), *after.values())
    gbps = bench.checkpoint.nbytes / loaded["load_s"] / 1e9
    yield (
        {"what": "load"},
        {
            "verified": bench.is_expected(bench.sizes[0], [step]) and cached <= COLD,
            "cached": cached,
            "cached_after": left,
            "load_s": loaded["load_s"],
            "direct_gbps_before": before,
            "direct_gbps_after": after,
            "claims": as_json(
                [Claim("load() from the disk", gbps, best, "O_DIRECT", "GB/s", 0.95, AT_LEAST)]
            ),
        },
    )


def direct_rates(bench: LoadingBench) -> dict[str, float]:
    """GB/s of plain O_DIRECT reads by number of threads, each in a part of the files of its own."""
    pieces = _spread_out(bench, len(THREADS))
    found = {}
    with Reader(direct=True) as reader:
        for threads, part in zip(THREADS, pieces, strict=True):
            found[str(threads)] = reader.gb_per_s(part, threads)
    say(f"O_DIRECT, GB/s by threads: {_in_short(found)}")
    return found


def _spread_out(bench: LoadingBench, parts: int) -> list[list[Piece]]:
    """Runs of pieces from all over the files, one for each part."""
    size = min(READ_BYTES, bench.session.options.shard_bytes // 8 // 4096 * 4096)
    pieces = pieces_of(bench.checkpoint.files, size, whole_pages=True)
    each = max(1, min(len(pieces) // parts, PROBED // size))
    step = max(1, (len(pieces) - each) // max(1, parts - 1))
    return [pieces[part * step : part * step + each] for part in range(parts)]


def _in_short(rates: dict[str, Any]) -> str:
    return ", ".join(f"{threads}: {rate:.2f}" for threads, rate in rates.items())
