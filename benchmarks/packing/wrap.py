"""The parts ``wrap`` and ``host``: what packing costs once, and what it leaves on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import machine
from benchmarks.contenders import Contender, Counters, Live
from benchmarks.engine import Found
from benchmarks.harness import Spread
from benchmarks.loading.claims import Claim
from benchmarks.packing.bench import PACKED, PLAIN, PackingBench, as_json, stats_of

RATIO = 0.705
SETUP = 1.5
TWO_EXPERTS_GB = 40.5


class Watched:
    """A contender of which it is seen how much the process's own memory grows while it sets up."""

    def __init__(self, inner: Contender) -> None:
        self._inner = inner
        self.name = inner.name
        self.needs_gpu = inner.needs_gpu
        self.growth = 0

    def fingerprint(self, label: str | None) -> str:
        """That of the contender."""
        return self._inner.fingerprint(label)

    def apply(self, model: nn.Module, device: torch.device) -> None:
        """Sets the contender up."""
        before = machine.ProcessBytes.now().own
        with machine.watch_rss() as peak:
            self._inner.apply(model, device)
        self.growth = peak.own_bytes - before

    def counters(self, model: nn.Module) -> Counters | None:
        """What it counts."""
        return self._inner.counters(model)

    def close(self, model: nn.Module) -> None:
        """Closes it."""
        self._inner.close(model)


@dataclass(frozen=True)
class _Once:
    """One setting up; bytes and seconds."""

    setup_s: float
    growth: int
    equal: bool


def wrap(bench: PackingBench) -> Found:
    """Seconds from a model in host memory to a streamed one, plain and packed in turn."""
    repeats = bench.session.options.repeats
    first_use_s = bench.first_use_s
    found: dict[str, list[_Once]] = {PLAIN: [], PACKED: []}
    for number in range(repeats):
        for form, runs in found.items():
            if not bench.has(form):
                runs.append(_once(bench, form, keep=number == repeats - 1))
    seconds = {form: Spread.of([each.setup_s for each in runs]) for form, runs in found.items()}
    held = {form: _held(bench.live(form)) for form in found}
    plain_gb = held[PLAIN]["host_bytes"] / 1e9
    exact = all(each["locked_bytes"] == each["host_bytes"] for each in held.values())
    yield (
        {"what": "wrap"},
        {
            "verified": exact and all(each.equal for runs in found.values() for each in runs),
            "first_use_s": first_use_s,
            **{f"{form}_s": spread.as_json() for form, spread in seconds.items()},
            **{f"{form}_held": each for form, each in held.items()},
            **{f"{form}_growth": max(o.growth for o in runs) for form, runs in found.items()},
            "claims": as_json(
                [
                    Claim(
                        "wrapping, packed",
                        seconds[PACKED].median,
                        seconds[PLAIN].median,
                        "wrapping plain",
                        "s",
                        SETUP,
                    ),
                    Claim(
                        "bytes of the blocks, packed",
                        held[PACKED]["host_bytes"] / 1e9,
                        plain_gb,
                        "plain",
                        "GB",
                        RATIO,
                    ),
                ]
            ),
        },
    )


def _once(bench: PackingBench, form: str, keep: bool) -> _Once:
    watched = Watched(bench.contender(form))
    live = bench.set_up(watched)
    once = _Once(live.setup_s, watched.growth, bench.is_right(live))
    if keep:
        bench.put(form, live)
    else:
        bench.tear_down(live)
    return once


def _held(live: Live) -> dict[str, int]:
    stats = stats_of(live)
    names = ("host_bytes", "locked_bytes", "plain_bytes", "packed_units", "staging_bytes")
    return {**{name: getattr(stats, name) for name in names}, "rss": live.host_rss_bytes}


def host(bench: PackingBench) -> Found:
    """Two packed experts at once: what is page-locked."""
    first = bench.live(PACKED)
    with bench.one_more(bench.contender(PACKED)) as second:
        held: list[dict[str, Any]] = [_held(live) for live in (first, second)]
        equal = bench.is_right(first) and bench.is_right(second)
    locked = sum(each["locked_bytes"] for each in held)
    plain = sum(each["plain_bytes"] for each in held)
    claims = [Claim("page-locked, both experts", locked / 1e9, plain / 1e9, "plain", "GB", RATIO)]
    if bench.spec.name == "14b":
        asked = Claim("page-locked, both experts", locked / 1e9, TWO_EXPERTS_GB, "asked", "GB", 1.0)
        claims.append(asked)
    yield (
        {"what": "two experts"},
        {
            "verified": equal and locked == sum(each["host_bytes"] for each in held),
            "held": held,
            "claims": as_json(claims),
        },
    )
