"""What the parts share: the resident model, and the models set up beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

import wanoffload
from benchmarks import machine
from benchmarks.contenders import OURS, Contender, Counters, Live, Wanoffload, set_up, tear_down
from benchmarks.harness import Session, code_fingerprint, say
from benchmarks.loading.claims import Claim
from benchmarks.models import (
    MODELS,
    SEED,
    Inputs,
    ModelSpec,
    Size,
    build,
    build_on_host,
    chosen_sizes,
    copy_to_host,
    forward,
    make_inputs,
    model_bytes,
)
from benchmarks.step_bench import Resident
from benchmarks.timing import Clock
from wanoffload import Workload

NAME = "packing"
STEPS = 50
TOUCHED = 2.2  # times the model: source, plain images and packed ones at once
PLAIN, PACKED, PLANNED = "plain", "packed", "planned"


@dataclass(frozen=True)
class Planned:
    """This project, streamed in the form that the plan takes for a size: plain, packed, in part."""

    prefetch: int
    size: Size
    needs_gpu: bool = False

    @property
    def name(self) -> str:
        """``wanoffload-planned``."""
        return f"{OURS}-{PLANNED}"

    def fingerprint(self, label: str | None) -> str:
        """A hash of the sources, or the label."""
        return code_fingerprint(label)

    def apply(self, model: nn.Module, device: torch.device) -> None:
        """Enables the model."""
        wanoffload.enable(
            model,
            workload=Workload(self.size.height, self.size.width, self.size.frames, steps=STEPS),
            device=device,
            host="pinned",
            dit_layerwise_offload=True,
            dit_offload_prefetch_size=max(1, self.prefetch),
        )

    def counters(self, model: nn.Module) -> Counters:
        """The offloader's statistics."""
        return Wanoffload(self.prefetch).counters(model)

    def close(self, model: nn.Module) -> None:
        """Closes the offloader."""
        wanoffload.offloader(model).close()


class PackingBench:
    """One run of the case. Models are set up when a part first needs them, and kept."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.device = session.device
        self.clock = Clock(session.device)
        self.spec: ModelSpec = MODELS[session.options.model]
        self.bytes = model_bytes(self.spec)
        self.sizes = chosen_sizes(self.spec, session.options.frames)
        self.prefetch = self.spec.prefetches[1]
        self._lives: dict[str, Live] = {}

    @cached_property
    def resident(self) -> Live:
        """The model on the device, from which all others are copied."""
        machine.touch_once(round(self.bytes.all * TOUCHED))
        say(f"building {self.spec.name} on {self.device}")
        peak = machine.DevicePeak.above_now(self.device)
        model = build(self.spec, self.device)
        peak.settle()
        return Live(Resident(), model, 0.0, 0, 0, 0, peak)

    @cached_property
    def inputs(self) -> Inputs:
        """Of the smallest size."""
        return make_inputs(self.spec, self.sizes[0], self.device)

    @cached_property
    def expected(self) -> torch.Tensor:
        """What a forward of the resident model gives at the smallest size."""
        with torch.inference_mode():
            return forward(self.resident.model, self.inputs, "cond")

    @cached_property
    def first_use_s(self) -> float:
        """Seconds to pack a model of one block: what is compiled and loaded once a machine."""
        one = replace(self.spec, config={**self.spec.config, "num_layers": 1})
        model = build_on_host(one, self.device, SEED)
        contender = self.contender(PACKED)
        _, seconds = self.clock.timed(lambda: contender.apply(model, self.device))
        with torch.inference_mode():
            forward(model, self.inputs, "cond")
        contender.close(model)
        return seconds

    def contender(self, form: str) -> Contender:
        """This project with plain blocks, or with packed ones."""
        return Wanoffload(self.prefetch, pack=form == PACKED)

    def live(self, form: str) -> Live:
        """The model with plain or packed blocks; set up at the first call."""
        if form not in self._lives:
            self.put(form, self.set_up(self.contender(form)))
        return self._lives[form]

    def put(self, form: str, live: Live) -> None:
        """Keeps a model that was set up."""
        assert form not in self._lives
        self._lives[form] = live

    def has(self, form: str) -> bool:
        """Whether this one is set up."""
        return form in self._lives

    def set_up(self, contender: Contender) -> Live:
        """Copies the resident model to the host and has a contender take it over."""
        source = self.resident.model
        say(f"setting up {contender.name}")
        live = set_up(contender, lambda: copy_to_host(self.spec, source), self.device)
        for other in (self.resident, *self._lives.values()):
            other.peak.other_came(live.peak)
        say(f"{contender.name} is set up: {live.setup_s:.2f} s")
        return live

    def tear_down(self, live: Live) -> None:
        """Takes down what is not kept."""
        for other in (self.resident, *self._lives.values()):
            other.peak.other_left(live.peak)
        tear_down(live)

    def drop(self, form: str) -> None:
        """Takes down one that was kept."""
        self.tear_down(self._lives.pop(form))

    @contextmanager
    def one_more(self, contender: Contender) -> Iterator[Live]:
        """A model that is there while the body runs."""
        live = self.set_up(contender)
        try:
            yield live
        finally:
            self.tear_down(live)

    def is_right(self, live: Live) -> bool:
        """Whether a forward gives the resident model's bits, by blocks that were fetched."""
        before = live.contender.counters(live.model)
        with torch.inference_mode():
            output = forward(live.model, self.inputs, "cond")
        after = live.contender.counters(live.model)
        assert before is not None
        assert after is not None
        acquired = after.acquires - before.acquires == self.bytes.block_count
        return acquired and torch.equal(output, self.expected)

    def close(self) -> None:
        """Takes everything down."""
        while self._lives:
            self.tear_down(self._lives.popitem()[1])


def stats_of(live: Live) -> wanoffload.Stats:
    """All that the offloader counts."""
    return wanoffload.offloader(live.model).stats()


def as_json(claims: Iterable[Claim]) -> list[dict[str, Any]]:
    """Claims as they are stored."""
    return [claim.as_json() for claim in claims]
