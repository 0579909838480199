"""The part ``parts``: parts of blocks that stream through a ring of bytes, beside whole blocks.

All take turns in rounds, forth and back, so that what link and card do meanwhile hits them alike.
Steps are compared by the medians of their turns: now and then the link is slow for one of them.
diffusers' leaf level comes last, beside blocks and the resident model, when the parts are taken
down: it page-locks half as much again as the model has.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import wanoffload
from benchmarks.budget.bench import BudgetBench, take_as_planned
from benchmarks.budget.peers import LEAF, weight_bytes
from benchmarks.contenders import PART, RESIDENT, DiffusersGroupOffload, Live, Wanoffload
from benchmarks.engine import Found
from benchmarks.harness import Spread, say
from benchmarks.loading.claims import Claim
from benchmarks.models import Size, make_inputs
from benchmarks.packing.bench import as_json, stats_of
from benchmarks.turns import Measure, Turns, forth_and_back

BLOCKS = Wanoffload(2).name
PARTS = Wanoffload(None, granularity=PART).name
PACKED_PARTS = Wanoffload(None, pack=True, granularity=PART).name
ROUNDS = {1: 4}  # by frames; an even number is fair
ROUNDS_OF_LONG = 2
STEPS = 1  # of a turn: short ones, so that what changes meanwhile changes for all
STEPS_OF_LEAF = 2  # it has one turn
ON_DEVICE = 1_150_000_000
BESIDE_BLOCKS = 1.02


def parts(bench: BudgetBench) -> Found:
    """A row for each size and contender; the one of diffusers only with a GPU."""
    bench.close()  # host memory: with what other parts of the case have set up it would be short
    measured: list[_Beside] = []
    try:
        for size in bench.asked_sizes:
            if bench.session.out_of_time():
                return
            measured.append(_Beside(bench, size))
            yield from measured[-1].ours()
        yield from _leaf_level(bench, measured)
    finally:
        bench.close()


def _leaf_level(bench: BudgetBench, measured: Sequence[_Beside]) -> Found:
    peer = DiffusersGroupOffload(LEAF)
    if peer.needs_gpu and bench.device.type != "cuda":
        say(f"{LEAF} needs a GPU and is left out")
        return
    if not measured or bench.session.out_of_time():
        return
    for name in (PARTS, PACKED_PARTS):
        bench.drop(name)
    with bench.one_more(peer) as live:
        for beside in measured:
            if bench.session.out_of_time():
                return
            yield beside.leaf_level(live)


@dataclass
class _Beside:
    """Everyone's turns at one size."""

    bench: BudgetBench
    size: Size
    turns: dict[str, Turns] = field(default_factory=dict)
    gbps: list[float] = field(default_factory=list)
    resident_peak: int = 0

    def ours(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """The resident model, blocks, and parts, plain and packed."""
        bench = self.bench
        names = (BLOCKS, PARTS, PACKED_PARTS)
        inputs = make_inputs(bench.spec, self.size, bench.device)
        self.measure = Measure(bench.clock, inputs, bench.bytes)
        lives = {RESIDENT: bench.resident, **{name: bench.live(name) for name in names}}
        for name, live in lives.items():
            self._warm_up(name, live, STEPS)
        rounds = ROUNDS.get(self.size.frames, ROUNDS_OF_LONG)
        for number in range(rounds):
            for name in forth_and_back(list(lives), number):
                self._take(name, lives[name])
        self.resident_peak = bench.resident.peak.allocated
        for name, live in lives.items():
            yield self._row(name, live, rounds)

    def leaf_level(self, live: Live) -> tuple[dict[str, Any], dict[str, Any]]:
        """Its turn, between one of blocks and one of the resident model."""
        bench = self.bench
        self.gbps.clear()
        self._warm_up(LEAF, live, STEPS_OF_LEAF)
        self._take(BLOCKS, bench.live(BLOCKS))
        self._take(LEAF, live)
        self._take(RESIDENT, bench.resident)
        return self._row(LEAF, live, 1)

    def _warm_up(self, name: str, live: Live, steps: int) -> None:
        self.turns[name] = self.measure.warm_up(live, 0.0, steps)
        if live.contender.counters(live.model) is not None:
            plan = wanoffload.offloader(live.model).residency
            self.turns[name].streamed = plan.streamed_bytes

    def _take(self, name: str, live: Live) -> None:
        self.gbps.append(self.bench.link.measure())
        take_as_planned(self.measure, live, self.turns[name])

    def _row(self, name: str, live: Live, last: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the last turns gave; times in ms, memory in bytes."""
        mine = self.turns[name]
        median, resident, blocks = (
            statistics.median(self.turns[each].turn_ms[-last:]) for each in (name, RESIDENT, BLOCKS)
        )
        values: dict[str, Any] = {
            "verified": mine.equal and mine.fetches_right,
            "equal": mine.equal,
            "fetches_right": mine.fetches_right,
            "rounds": last,
            "step_ms": Spread.of(mine.step_ms).as_json(),
            "resident_ms": resident,
            "blocks_ms": blocks,
            "x_resident": median / resident,
            "x_blocks": median / blocks,
            "link_gbps": Spread.of(self.gbps).as_json(),
            "setup_s": live.setup_s,
            "device_peak_allocated": live.peak.allocated,
            "device_peak_reserved": live.peak.reserved,
            **self._weights(name, live),
        }
        values["claims"] = as_json(_claims(name, values))
        say(
            f"{self.size} {name}: {values['step_ms']['median']:.1f} ms, "
            f"{values['x_blocks']:.4f} x blocks, {values['device_bytes'] / 1e9:.3f} GB"
        )
        return {"size": str(self.size), "contender": name}, values

    def _weights(self, name: str, live: Live) -> dict[str, int]:
        """Bytes on the device for weights, and of these what they pass through."""
        if name == RESIDENT:
            return {"device_bytes": self.bench.bytes.all}
        if name == LEAF:
            peaks = live.peak.allocated, self.resident_peak
            return {"device_bytes": weight_bytes(*peaks, self.bench.bytes.all)}
        stats, plan = stats_of(live), wanoffload.offloader(live.model).residency
        return {
            "device_bytes": stats.device_bytes,
            "ring_bytes": plan.ring_bytes,
            "slot_bytes": stats.slot_bytes,
            "staging_bytes": stats.staging_bytes,
            "units": stats.units,
            "locked_bytes": live.locked_bytes,
        }


def _claims(name: str, values: dict[str, Any]) -> list[Claim]:
    """Asked of plain parts: speed beside blocks, and what they take. Others' steps are told."""
    if name in (RESIDENT, BLOCKS):
        return []
    blocks, resident = values["blocks_ms"], values["resident_ms"]
    asked = BESIDE_BLOCKS if name == PARTS else None
    claims = [
        Claim("step", values["x_blocks"] * blocks, blocks, "block granularity", "ms", asked),
        Claim("step", values["x_resident"] * resident, resident, "resident", "ms"),
    ]
    if name == PARTS:
        held = values["device_bytes"] / 1e9
        what = "weights and ring on the device"
        claims.append(Claim(what, held, ON_DEVICE / 1e9, "what is asked", "GB", 1.0))
    return claims
