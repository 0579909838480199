"""The part ``step``: steps of the resident model, plain blocks and packed ones, in one run.

With C the resident step, B the bytes that come over the link and R its rate, all of this run, the
floor of each is ``max(C, B / R)``: packing makes B smaller. Where copies take about as long as
compute, the plan's own choice runs too: as many blocks packed as the link needs.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from benchmarks.contenders import Live
from benchmarks.engine import Found
from benchmarks.harness import Spread, say
from benchmarks.link import LinkProbe
from benchmarks.loading.claims import Claim
from benchmarks.models import Size, make_inputs
from benchmarks.packing.bench import (
    PACKED,
    PLAIN,
    PLANNED,
    PackingBench,
    Planned,
    as_json,
    stats_of,
)
from benchmarks.turns import Measure, Turns, beside, forth_and_back

RESIDENT = "resident"
TURN_S = 2.0
LONG_STEP_MS = 3000.0
LONG_ROUNDS = 2
BESIDE_PLAIN = {1: 0.73}  # by frames
BESIDE_RESIDENT = {17: 1.025, 81: 1.005}


def step(bench: PackingBench) -> Found:
    """A row for each size."""
    link = LinkProbe.page_locked(bench.device, bench.bytes.largest_block)
    for size in bench.sizes:
        if bench.session.out_of_time():
            return
        lives = {RESIDENT: bench.resident, PLAIN: bench.live(PLAIN), PACKED: bench.live(PACKED)}
        if size is not bench.sizes[min(1, len(bench.sizes) - 1)]:
            yield {"size": str(size)}, _measure(bench, size, lives, link)
            continue
        with bench.one_more(Planned(bench.prefetch, size)) as planned:
            lives[PLANNED] = planned
            yield {"size": str(size)}, _measure(bench, size, lives, link)


def _measure(
    bench: PackingBench, size: Size, lives: dict[str, Live], link: LinkProbe
) -> dict[str, Any]:
    """Everyone is warmed up; then they take turns, each after one of the link."""
    measure = Measure(bench.clock, make_inputs(bench.spec, size, bench.device), bench.bytes)
    turns = {name: measure.warm_up(live, TURN_S) for name, live in lives.items()}
    rounds, gbps, number = bench.session.options.rounds, [], 0
    while number < rounds:
        for name in forth_and_back(list(lives), number):
            gbps.append(link.measure())
            measure.take(lives[name], turns[name])
        number += 1
        if turns[RESIDENT].turn_ms[0] > LONG_STEP_MS:
            rounds = min(rounds, LONG_ROUNDS)
    right = all(each.equal and each.fetches_right for each in turns.values())
    rate = Spread.of(gbps)
    found = {name: _of_one(lives[name], turns[name], turns[RESIDENT], rate) for name in lives}
    say(f"{size}: " + ", ".join(f"{n} {v['step_ms']['median']:.1f} ms" for n, v in found.items()))
    return {
        "verified": right,
        "link_gbps": rate.as_json(),
        "rounds": rounds,
        "by_form": found,
        "claims": as_json(_claims(size, found, turns)),
    }


def _of_one(live: Live, mine: Turns, resident: Turns, rate: Spread) -> dict[str, Any]:
    """One model's steps; times in ms, memory in bytes above what stood there before it."""
    resident_ms = Spread.of(resident.step_ms).median
    link_ms = mine.bytes_per_step / rate.median / 1e6
    x_resident = beside(mine.turn_ms, resident.turn_ms)
    packed = stats_of(live) if mine is not resident else None
    return {
        "step_ms": Spread.of(mine.step_ms).as_json(),
        "x_resident": x_resident,
        "exposed_ms": (x_resident - 1) * resident_ms,
        "link_ms": link_ms,
        "floor_ms": max(resident_ms, link_ms),
        "bytes_per_step": mine.bytes_per_step,
        "equal": mine.equal,
        "fetches_right": mine.fetches_right,
        "device_peak_allocated": live.peak.allocated,
        "device_peak_reserved": live.peak.reserved,
        "stats": asdict(packed) if packed else None,
    }


def _claims(size: Size, found: dict[str, Any], turns: dict[str, Turns]) -> list[Claim]:
    """Steps beside plain ones, the resident model's and their floors. Ratios are of turns of the
    same round."""
    resident = found[RESIDENT]["step_ms"]["median"]
    plain = found[PLAIN]["step_ms"]["median"]
    beside_plain = beside(turns[PACKED].turn_ms, turns[PLAIN].turn_ms)
    asked = BESIDE_PLAIN.get(size.frames)
    claims = [Claim("packed", beside_plain * plain, plain, "plain streamed", "ms", asked)]
    for name in list(found)[1:]:
        of_resident = BESIDE_RESIDENT.get(size.frames) if name != PLAIN else None
        step_ms = found[name]["x_resident"] * resident
        floor = found[name]["floor_ms"]
        claims.append(Claim(name, step_ms, resident, RESIDENT, "ms", of_resident))
        median = found[name]["step_ms"]["median"]
        claims.append(Claim(name, median, floor, "its floor, max(C, B / R)", "ms"))
    return claims
