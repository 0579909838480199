"""The part ``tiers``: forwards whose blocks come from page-locked memory, from ordinary memory, and
from the files, in the page cache or not.

A forward's floor is ``max(C, B / R)``: the resident forward, or the blocks' bytes over the rate of
where they come from, or of the link where that is slower. All rates are of the same run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.engine import Found
from benchmarks.harness import Spread, say
from benchmarks.link import LinkProbe
from benchmarks.loading.bench import COLD, MOST_FORWARDS, WARM, LoadingBench, as_json
from benchmarks.loading.claims import AT_LEAST, Claim
from benchmarks.loading.cold import direct_rates
from benchmarks.loading.reading import READ_BYTES, Reader, buffers_within, pieces_of
from benchmarks.models import Size

PAGE_CACHE, DISK = "page cache", "disk"
RING_THREADS = (4, 8, 16)
SECONDS = 45.0  # of forwards that are measured for a row, about
DISK_TIER_BYTES = 3 * 10**9


@dataclass(frozen=True)
class Tier:
    """Where the blocks stand while the model runs. ``source``: for files, where these are."""

    host: str
    source: str = "memory"
    every_size: bool = False

    @property
    def in_files(self) -> bool:
        """Whether the blocks are read from files for each forward."""
        return self.host == "disk"


TIERS = {
    "pinned": Tier("pinned"),
    "pageable": Tier("pageable", every_size=True),
    "disk-cached": Tier("disk", PAGE_CACHE, every_size=True),
    "disk-cold": Tier("disk", DISK),
}


@dataclass
class Rates:
    """GB/s of this run: the link, the sources, and what the page-locked tier made of the link."""

    link: float
    page_cache: float = 0.0
    disk: float = 0.0
    pinned: float = 0.0

    def of(self, tier: Tier) -> float:
        """What bounds a tier: the slower of its source and the link."""
        if tier.source == "memory":
            return self.link
        return min(self.link, self.page_cache if tier.source == PAGE_CACHE else self.disk)


def tiers(bench: LoadingBench) -> Found:
    """A process for each tier; a row for each size."""
    rates = Rates(LinkProbe.page_locked(bench.device, bench.bytes.largest_block).measure())
    chosen = bench.session.options.tiers or list(TIERS)
    if unknown := [name for name in chosen if name not in TIERS]:
        raise ValueError(f"no tier is called {', '.join(unknown)}; there are {', '.join(TIERS)}")
    for name in chosen:
        yield from _tier(bench, TIERS[name], rates)


def _tier(bench: LoadingBench, tier: Tier, rates: Rates) -> Found:
    sizes = bench.sizes if tier.every_size else bench.sizes[:1]
    for size in sizes:
        bench.resident(size)  # not while another model takes the memory
    cached = _make_ready(bench, tier, rates)
    with bench.worker(bench.ours(tier.host)) as worker:
        empty = worker.ask("memory")
        loaded = bench.load(worker)
        for size in sizes:
            run = worker.ask("forwards", size=size, count=MOST_FORWARDS, warm=1, budget_s=SECONDS)
            values = {
                "load_s": loaded["load_s"],
                "own_peak": loaded["own_peak"],
                "cached": cached,
                "cached_after": bench.cached(),
                "empty_own": empty["anon"] + empty["shmem"],
                **worker.ask("memory"),
            }
            values |= _timed(bench, tier, size, run, rates)
            values["verified"] = bench.is_expected(size, [run]) and _right(tier, cached)
            values["claims"] = as_json(_claims(tier, size is sizes[0], values, rates))
            yield {"tier": tier.host, "source": tier.source, "size": str(size)}, values


def _make_ready(bench: LoadingBench, tier: Tier, rates: Rates) -> float:
    """Measures the tier's source, and brings the files to where it is; the share cached."""
    if tier.source != DISK:
        cached = bench.warm_up()
        if tier.in_files:
            rates.page_cache = _page_cache_rate(bench)
        return cached
    bench.cool_down()
    rates.disk = max(direct_rates(bench).values())
    return bench.cool_down()


def _right(tier: Tier, cached: float) -> bool:
    return cached <= COLD if tier.source == DISK else cached >= WARM


def _page_cache_rate(bench: LoadingBench) -> float:
    """GB/s of many threads from the page cache into page-locked chunks, each used many times."""
    most = max(RING_THREADS)
    locked = bench.device.type == "cuda"
    ring = torch.zeros(most * READ_BYTES, dtype=torch.uint8, pin_memory=locked)
    memory = ring.numpy().data
    pieces = pieces_of(bench.checkpoint.files, READ_BYTES)
    with Reader(direct=False) as reader:
        found = [
            reader.gb_per_s(pieces, threads, buffers_within(memory, threads, READ_BYTES))
            for threads in RING_THREADS
        ]
    say(f"page cache into the ring: {max(found):.1f} GB/s")
    return max(found)


def _timed(
    bench: LoadingBench, tier: Tier, size: Size, run: dict[str, Any], rates: Rates
) -> dict[str, Any]:
    """The forwards beside their floor."""
    forward = Spread.of(run["forward_ms"])
    resident = bench.resident(size)["forward_ms"]["median"]
    gbps = bench.bytes.blocks / forward.median / 1e6
    if tier.host == "pinned":
        rates.pinned = gbps
    return {
        "forward_ms": forward.as_json(),
        "gbps": gbps,
        "resident_ms": resident,
        "bytes_ms": bench.bytes.blocks / rates.of(tier) / 1e6,
        "source_gbps": rates.of(tier),
        "link_gbps": rates.link,
    }


def _claims(tier: Tier, first: bool, values: dict[str, Any], rates: Rates) -> list[Claim]:
    forward, resident = values["forward_ms"]["median"], values["resident_ms"]
    floor = max(resident, values["bytes_ms"])
    hidden = resident >= values["bytes_ms"]
    against = "resident" if hidden else f"bytes over {values['source_gbps']:.2f} GB/s"
    asked = (1.01 if hidden else 1.05) if tier.in_files else None
    claims = [Claim("a forward", forward, floor, against, "ms", asked)]
    if tier.host == "pageable" and first and rates.pinned:
        claims.append(
            Claim("its rate", values["gbps"], rates.pinned, "page-locked", "GB/s", 0.7, AT_LEAST)
        )
    if tier.in_files and first:
        own, limit = values["anon"] + values["shmem"], DISK_TIER_BYTES
        claims.append(Claim("host memory", own / 1e9, limit / 1e9, "asked", "GB", 1.0))
    return claims
