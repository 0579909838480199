"""The resident model and the contenders beside it: set up, measured in turns, written down."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

from torch import nn
from tqdm import tqdm

from benchmarks import machine
from benchmarks.contenders import RESIDENT, Contender, Live, set_up, tear_down
from benchmarks.harness import Session, Spread, peer_fingerprint, say
from benchmarks.link import LinkProbe
from benchmarks.models import ModelSpec, Size, build, copy_to_host, make_inputs, model_bytes
from benchmarks.timing import Clock
from benchmarks.turns import FORWARDS_PER_STEP, Measure, Turns, beside, forth_and_back

NAME = "step"


def key_of(spec: ModelSpec, size: Size, contender: str, compiled: bool) -> dict[str, Any]:
    """The key of a row."""
    return {"model": spec.name, "size": str(size), "contender": contender, "compiled": compiled}


class StepBench:
    """Holds the resident model on the device for as long as contenders are measured beside it."""

    def __init__(self, session: Session, spec: ModelSpec) -> None:
        self._session = session
        self._spec = spec
        self._clock = Clock(session.device)
        self._weights = model_bytes(spec)
        self._link = LinkProbe.page_locked(session.device, self._weights.largest_block)
        say(f"building {spec.name} on {session.device}: {self._weights.all / 1e9:.2f} GB")
        peak = machine.DevicePeak.above_now(session.device)
        model = self._compiled(build(spec, session.device))
        peak.settle()
        self._resident = Live(Resident(), model, 0.0, 0, 0, 0, peak)
        self._resident_seen: set[Size] = set()

    def run_group(self, group: Sequence[Contender], sizes: Sequence[Size]) -> None:
        """Sets contenders up, measures them at every size, and takes them down again.

        With no contender the resident model is measured alone. An error ends the group and is
        reported; the other groups go on.
        """
        lives: list[Live] = []
        try:
            for contender in group:
                lives.append(self._set_up(contender, lives))
            for size in sizes:
                if self._session.out_of_time():
                    return
                self._measure(size, lives)
        except Exception as error:
            traceback.print_exc()
            names = ", ".join(contender.name for contender in group) or RESIDENT
            self._session.failures.append(f"{names}: {type(error).__name__}: {error}")
        finally:
            while lives:
                self._tear_down(lives.pop(), lives)

    def _compiled(self, model: nn.Module) -> nn.Module:
        if self._session.options.compiled:
            transformer: Any = model
            transformer.compile_repeated_blocks(fullgraph=True)
        return model

    def _set_up(self, contender: Contender, before: Sequence[Live]) -> Live:
        say(f"setting up {contender.name}")
        live = set_up(
            contender,
            lambda: copy_to_host(self._spec, self._resident.model),
            self._session.device,
        )
        for other in (self._resident, *before):
            other.peak.other_came(live.peak)
        self._compiled(live.model)
        say(f"{contender.name} is set up: {live.setup_s:.2f} s")
        return live

    def _tear_down(self, live: Live, before: Sequence[Live]) -> None:
        for other in (self._resident, *before):
            other.peak.other_left(live.peak)
        tear_down(live)

    def _measure(self, size: Size, lives: Sequence[Live]) -> None:
        """Everyone is warmed up; then they take turns, each after one of the link."""
        options = self._session.options
        inputs = make_inputs(self._spec, size, self._session.device)
        measure = Measure(self._clock, inputs, self._weights)
        everyone = [
            (live, measure.warm_up(live, options.run_seconds)) for live in (self._resident, *lives)
        ]
        link_gbps = []
        for number in tqdm(range(options.rounds), desc=str(size), disable=None):
            for live, turns in forth_and_back(everyone, number):
                link_gbps.append(self._link.measure())
                measure.take(live, turns)
        resident = everyone[0][1]
        for live, turns in everyone:
            if live is not self._resident or self._resident_wanted(size):
                self._record(size, live, turns, resident, Spread.of(link_gbps))

    def _resident_wanted(self, size: Size) -> bool:
        """The resident model runs beside every contender; one row of it is enough."""
        if size in self._resident_seen:
            return False
        self._resident_seen.add(size)
        key = key_of(self._spec, size, RESIDENT, self._session.options.compiled)
        known = self._session.find(NAME, key, peer_fingerprint()) is not None
        return bool(self._session.options.again) or not known

    def _record(
        self, size: Size, live: Live, turns: Turns, resident: Turns, link_gbps: Spread
    ) -> None:
        options = self._session.options
        name = live.contender.name
        values = {
            "verified": turns.equal and turns.fetches_right,
            "equal": turns.equal,
            "fetches_right": turns.fetches_right,
            "bytes_per_step": turns.bytes_per_step,
            "steps_per_turn": turns.steps,
            "graphs": turns.graphs,
            "recompiled": turns.recompiled,
            "rounds": options.rounds,
            **self._times(turns, resident, link_gbps),
            **self._memory(live),
        }
        key = key_of(self._spec, size, name, options.compiled)
        self._session.record(NAME, key, live.contender.fingerprint(options.label), values)
        step_ms = values["step_ms"]
        say(
            f"{size} {name}: {step_ms['median']:.2f} ms ({step_ms['min']:.2f} to "
            f"{step_ms['max']:.2f}), {values['x_resident']:.4f} x resident, "
            f"{values['x_floor']:.4f} x floor, verified {values['verified']}"
        )

    def _times(self, mine: Turns, resident: Turns, link_gbps: Spread) -> dict[str, Any]:
        """Times in ms. The floor is from this very run; ratios are of turns of the same round."""
        link_ms = FORWARDS_PER_STEP * self._weights.blocks / link_gbps.median / 1e6
        step_ms, resident_ms = Spread.of(mine.step_ms), Spread.of(resident.step_ms)
        x_resident = beside(mine.turn_ms, resident.turn_ms)
        return {
            "step_ms": step_ms.as_json(),
            "resident_ms": resident_ms.as_json(),
            "link_gbps": link_gbps.as_json(),
            "link_ms": link_ms,
            "floor_ms": max(resident_ms.median, link_ms),
            "x_resident": x_resident,
            "x_floor": beside(mine.turn_ms, [max(ms, link_ms) for ms in resident.turn_ms]),
            "exposed_ms": (x_resident - 1) * resident_ms.median,
        }

    def _memory(self, live: Live) -> dict[str, Any]:
        """Bytes above what stood on the host and the device before this model was made."""
        counters = live.contender.counters(live.model)
        return {
            "setup_s": live.setup_s,
            "device_peak_allocated": live.peak.allocated,
            "device_peak_reserved": live.peak.reserved,
            "host_locked": live.locked_bytes,
            "host_rss": live.host_rss_bytes,
            "host_used": live.host_used_bytes,
            "slot_bytes": counters.slot_bytes if counters else 0,
            "ring_bytes": counters.ring_bytes if counters else 0,
            "model_bytes": self._weights.all,
            "block_bytes": self._weights.blocks,
        }


class Resident:
    """The model that is compared with: everything is on the device already."""

    name = RESIDENT
    needs_gpu = False

    def fingerprint(self, label: str | None) -> str:
        return peer_fingerprint()

    def apply(self, model: nn.Module, device: Any) -> None:
        model.to(device)

    def counters(self, model: nn.Module) -> None:
        return None

    def close(self, model: nn.Module) -> None:
        return None
