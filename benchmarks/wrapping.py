"""Case ``wrapping``: seconds from a model in host memory to one that streams, and what follows.

The memory used is touched before (a virtual machine that has not been given it yet would be slow at
first, whoever asks). Then in turn: a fresh model in host memory, set up by each contender, one
forward right after, and some more to compare it with.
"""

from __future__ import annotations

import time
import traceback
from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import machine
from benchmarks.contenders import RESIDENT, Contender, by_name
from benchmarks.harness import Session, Spread, say
from benchmarks.link import LinkProbe
from benchmarks.models import (
    MODELS,
    Inputs,
    ModelSpec,
    build,
    chosen_sizes,
    copy_to_host,
    forward,
    make_inputs,
    model_bytes,
)
from benchmarks.timing import Clock

NAME = "wrapping"
HELP = "seconds to set up from a model in host memory, and the first forward after it"
PEER = "diffusers-leaf-stream"
STEADY_FORWARDS = 6
TOUCHED = 2.6  # times the model: the source, and the copy of the contender that rounds up


def add_options(parser: ArgumentParser) -> None:
    """The options of this case."""
    group = parser.add_argument_group("wrapping")
    group.add_argument("--repeats", type=int, default=2, help="times that ours is set up")


def key_of(spec: ModelSpec, contender: str, size: object) -> dict[str, Any]:
    """The key of a row."""
    return {"model": spec.name, "contender": contender, "size": str(size)}


def run(session: Session) -> None:
    """Measures all missing rows."""
    options = session.options
    spec = MODELS[options.model]
    size = chosen_sizes(spec, options.frames)[0]
    contenders = [by_name(name) for name in _names(session, spec) if name != RESIDENT]
    missing = [
        contender
        for contender in contenders
        if session.missing(
            NAME, key_of(spec, contender.name, size), contender.fingerprint(options.label)
        )
    ]
    if missing:
        bench = WrappingBench(session, spec)
        for contender in missing:
            if not session.out_of_time():
                bench.measure(contender)


def _names(session: Session, spec: ModelSpec) -> list[str]:
    peers = [PEER] if session.device.type == "cuda" else []
    return session.options.contenders or [f"wanoffload-p{spec.prefetches[1]}", *peers]


@dataclass(frozen=True)
class _Once:
    """One setting up: its cost and the forwards after it, in ms of the device's clock."""

    setup_s: float
    first_ms: float
    steady_ms: list[float]
    equal: bool
    locked_bytes: int


class WrappingBench:
    """The resident model, from which fresh models in host memory are copied."""

    def __init__(self, session: Session, spec: ModelSpec) -> None:
        self._session = session
        self._spec = spec
        self._clock = Clock(session.device)
        self._bytes = model_bytes(spec)
        self._size = chosen_sizes(spec, session.options.frames)[0]
        self._touch_s = machine.touch_once(round(self._bytes.all * TOUCHED))
        self._inputs: Inputs = make_inputs(spec, self._size, session.device)
        self._resident = build(spec, session.device)
        self._expected = self._warm_kernels()
        self._block_ms = self._time_of_a_block()

    def _warm_kernels(self) -> torch.Tensor:
        """The resident model's output; afterwards every kernel of a forward is loaded."""
        with torch.inference_mode():
            forward(self._resident, self._inputs, "cond")
            return forward(self._resident, self._inputs, "cond")

    def _time_of_a_block(self) -> float:
        probe = LinkProbe.page_locked(self._session.device, self._bytes.largest_block)
        return self._bytes.largest_block / probe.measure() / 1e6

    def measure(self, contender: Contender) -> None:
        """Sets a contender up, once or several times, and records a row."""
        repeats = 1 if contender.needs_gpu else self._session.options.repeats
        try:
            once = [self._once(contender) for _ in range(repeats)]
        except Exception as error:  # one contender's failure must not cost the other rows
            traceback.print_exc()
            self._session.failures.append(f"{NAME} {contender.name}: {error}")
            return
        self._record(contender, once)

    def _once(self, contender: Contender) -> _Once:
        machine.release_caches()
        locked = machine.torch_locked_bytes()
        model = self._fresh()
        try:
            setup_s, forwards = self._set_up_and_run(contender, model)
            counters = contender.counters(model)
            locked = machine.torch_locked_bytes() - locked
            return _Once(
                setup_s,
                *forwards,
                locked_bytes=locked + (counters.locked_bytes if counters else 0),
            )
        finally:
            contender.close(model)
            del model
            machine.release_caches()

    def _fresh(self) -> nn.Module:
        model = copy_to_host(self._spec, self._resident)
        machine.release_caches()
        return model

    def _set_up_and_run(
        self, contender: Contender, model: nn.Module
    ) -> tuple[float, tuple[float, list[float], bool]]:
        """Sets up and goes on with a forward at once, as a user would: no wait in between."""
        self._clock.synchronize()
        start = time.perf_counter()
        contender.apply(model, self._session.device)
        setup_s = time.perf_counter() - start
        first_ms, first = self._forwards(model, 1)
        # The first after a wait finds blocks fetched already: it is quicker than a steady one.
        (_, *steady_ms), last = self._forwards(model, 1 + STEADY_FORWARDS)
        equal = torch.equal(first, self._expected) and torch.equal(last, self._expected)
        say(
            f"{contender.name}: {setup_s:.2f} s, first forward {first_ms[0]:.1f} ms, "
            f"steady {Spread.of(steady_ms).median:.1f} ms"
        )
        return setup_s, (first_ms[0], steady_ms, equal)

    def _forwards(self, model: nn.Module, count: int) -> tuple[list[float], torch.Tensor]:
        """Forwards in a row: milliseconds of each, and the last one's output."""
        with torch.inference_mode():
            marks = [self._clock.mark()]
            for _ in range(count):
                output = forward(model, self._inputs, "cond")
                marks.append(self._clock.mark())
        self._clock.synchronize()
        return self._clock.between_ms(marks), output

    def _record(self, contender: Contender, once: list[_Once]) -> None:
        setup = Spread.of([each.setup_s for each in once])
        steady = Spread.of([ms for each in once for ms in each.steady_ms])
        values = {
            "verified": all(each.equal for each in once),
            "setup_s": setup.as_json(),
            "gb_per_s": self._bytes.all / setup.median / 1e9,
            "first_forward_ms": Spread.of([each.first_ms for each in once]).as_json(),
            "steady_forward_ms": steady.as_json(),
            "block_copy_ms": self._block_ms,
            "host_locked": max(each.locked_bytes for each in once),
            "model_bytes": self._bytes.all,
            "touch_s": self._touch_s,
        }
        key = key_of(self._spec, contender.name, self._size)
        fingerprint = contender.fingerprint(self._session.options.label)
        self._session.record(NAME, key, fingerprint, values)
