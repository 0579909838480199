"""The part ``experts``: two experts of a pipeline under one budget, and what their turns cost.

What stays on the device belongs to the expert that runs: when the other one comes, all of its
blocks come over the link, those that will stay too. So its first forward takes as long as one
beside which nothing stays. What it takes beyond that is the stall, and is asked to be no longer
than the copy of the first units: that in use and those ahead of it. The quickest of each are
compared: where a link pauses for tens of milliseconds now and then, it does so in either.

The pipeline is diffusers' own, with nothing but its transformers: texts are given embedded, latents
come out. It runs with both experts on the device first, for the expected latents, and last without
a budget.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import wanoffload
from benchmarks import machine
from benchmarks.budget.bench import GB, BudgetBench, name_of, others_of, toy_budgets
from benchmarks.contenders import BLOCK
from benchmarks.engine import Found, is_small
from benchmarks.harness import Spread, say
from benchmarks.loading.claims import Claim
from benchmarks.models import SEED, Size, build, copy_to_host, make_inputs
from benchmarks.packing.bench import PACKED, PLAIN, as_json
from benchmarks.predict import known_hardware
from wanoffload import Offloader, Workload

NAMES = ("transformer", "transformer_2")
SEEDS = (SEED, SEED + 100_000)  # every tensor of a model has a seed of its own
STEPS = 6  # half of them by each expert
GUIDANCE = 5.0
BOUNDARY = 0.5
CALLS = {1: 4}  # that count, by frames; another one goes before
CALLS_OF_LONG = 2
BUDGET = 16 * GB


def experts(bench: BudgetBench) -> Found:
    """A row for each form, size, and expert whose turn it is."""
    if bench.session.out_of_time():
        return
    bench.let_go()  # both experts at once leave no room for models of other parts
    _ = bench.link
    machine.touch_once(round(2 * bench.bytes.all * 1.1))
    say(f"building two experts of {bench.spec.name} on {bench.device}")
    pipe = _pipeline([build(bench.spec, bench.device, seed) for seed in SEEDS])
    before = {size: _Calls.of(bench, pipe, size) for size in bench.asked_sizes}
    for name in NAMES:
        on_host = copy_to_host(bench.spec, getattr(pipe, name))
        setattr(pipe, name, on_host)
    machine.release_caches()
    hardware = known_hardware(bench.device)
    for form in (PLAIN, PACKED):
        if bench.session.out_of_time():
            return
        with _enabled(bench, pipe, form, hardware) as budget:
            for size in bench.asked_sizes:
                calls = _Calls.of(bench, pipe, size)
                gbps = [bench.link.measure()]
                says = [runtime.residency.sentence for runtime in _runtimes(pipe)]
                with _nothing_staying(pipe):
                    streamed = _Calls.of(bench, pipe, size)
                    nothing = not any(map(_staying, _runtimes(pipe)))
                gbps.append(bench.link.measure())
                measured = _Measured(
                    form, budget, before[size], streamed, calls, gbps, says, nothing
                )
                yield from measured.rows(bench, pipe)


def _pipeline(transformers: Sequence[nn.Module]) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    make: Any = WanPipeline
    scheduler: Any = FlowMatchEulerDiscreteScheduler
    nothing = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    named = dict(zip(NAMES, transformers, strict=True))
    pipe = make(scheduler=scheduler(), boundary_ratio=BOUNDARY, **nothing, **named)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _enabled(
    bench: BudgetBench, pipe: Any, form: str, hardware: wanoffload.Hardware
) -> Iterator[int]:
    """Streamed under one budget while the body runs, as the plan says otherwise; the budget."""
    options: dict[str, Any] = {
        "hardware": hardware,
        "device": bench.device,
        "host": "pinned",
        "pack": form == PACKED,
        "granularity": BLOCK,
        "dit_layerwise_offload": True,
    }
    budget = BUDGET
    if is_small(bench.session):
        wanoffload.enable(pipe, workload=Workload(16, 16), **options)
        runtime = wanoffload.offloader(getattr(pipe, NAMES[0]))
        budget = toy_budgets(runtime)[3] + others_of(runtime)
        wanoffload.disable(pipe)
    wanoffload.enable(pipe, vram_budget=budget, **options)
    try:
        yield budget
    finally:
        wanoffload.disable(pipe)


def _runtimes(pipe: Any) -> list[Offloader]:
    return [wanoffload.offloader(getattr(pipe, name)) for name in NAMES]


def _staying(runtime: Offloader) -> int:
    return len(runtime.residency.resident) + len(runtime.residency.kept_packed)


@contextmanager
def _nothing_staying(pipe: Any) -> Iterator[None]:
    """No expert has a budget while the body runs."""
    before = [(runtime, runtime.budget.nbytes) for runtime in _runtimes(pipe)]
    try:
        for runtime, _ in before:
            runtime.set_budget(None)
        yield
    finally:
        for runtime, nbytes in before:
            runtime.set_budget(nbytes)


@dataclass
class _Calls:
    """Calls of the pipeline. `forward_ms`: of each call that counts, the milliseconds up to the end
    of each forward, since the one before it or since the call began. `ran`: of every call, which
    expert each forward was."""

    size: Size
    latents: list[Tensor] = field(default_factory=list)
    forward_ms: list[list[float]] = field(default_factory=list)
    ran: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, bench: BudgetBench, pipe: Any, size: Size) -> _Calls:
        """One call that does not count, and some that do."""
        made = cls(size)
        inputs = make_inputs(bench.spec, size, bench.device)
        marks: list[Any] = []
        handles = [
            getattr(pipe, name).register_forward_hook(made._marking(bench, marks, number))
            for number, name in enumerate(NAMES)
        ]
        try:
            for _ in range(1 + CALLS.get(size.frames, CALLS_OF_LONG)):
                marks.clear()
                made.ran.append([])
                bench.clock.synchronize()
                marks.append(bench.clock.mark())
                output = pipe(
                    prompt_embeds=inputs.texts["cond"],
                    negative_prompt_embeds=inputs.texts["uncond"],
                    height=size.height,
                    width=size.width,
                    num_frames=size.frames,
                    num_inference_steps=STEPS,
                    guidance_scale=GUIDANCE,
                    generator=torch.Generator("cpu").manual_seed(SEED),
                    output_type="latent",
                    return_dict=False,
                )
                bench.clock.synchronize()
                made.latents.append(output[0])
                made.forward_ms.append(bench.clock.between_ms(marks))
        finally:
            for handle in handles:
                handle.remove()
        del made.forward_ms[0]
        return made

    def _marking(self, bench: BudgetBench, marks: list[Any], number: int) -> Any:
        def mark(*_: Any) -> None:
            marks.append(bench.clock.mark())
            self.ran[-1].append(number)

        return mark

    def first(self, expert: int) -> list[float]:
        """Of each call, the expert's first forward."""
        at = self.ran[-1].index(expert)
        return [row[at] for row in self.forward_ms]

    def steady(self, expert: int) -> list[float]:
        """Its forwards but for the first two: what is found out in one may change the plan."""
        mine = [at for at, number in enumerate(self.ran[-1]) if number == expert]
        return [row[at] for row in self.forward_ms for at in mine[2:]]


@dataclass
class _Measured:
    """All calls at one size, and the link's rate beside them. `says`: what stays of each expert;
    `nothing_stayed`: in the calls without a budget."""

    form: str
    budget: int
    resident: _Calls
    streamed: _Calls
    calls: _Calls
    gbps: list[float]
    says: list[str]
    nothing_stayed: bool

    def rows(self, bench: BudgetBench, pipe: Any) -> Found:
        """Of each expert; times in ms."""
        size = str(self.calls.size)
        for expert, (name, runtime) in enumerate(zip(NAMES, _runtimes(pipe), strict=True)):
            values = self._values(expert, runtime)
            claims = _claims(values) if bench.device.type == "cuda" else []
            values["claims"] = as_json(claims)
            say(
                f"{size} {self.form}, {name}: first forward {values['first_ms']['min']:.1f} ms, "
                f"with nothing staying {values['streamed_ms']['min']:.1f}, the first units "
                f"{values['first_units_ms']:.1f}; others {values['forward_ms']['median']:.1f}; "
                f"{values['stays']}"
            )
            key = {"form": self.form, "budget": name_of(self.budget), "expert": name}
            yield {"size": size, **key}, values

    def _values(self, expert: int, runtime: Offloader) -> dict[str, Any]:
        first, steady = self.calls.first(expert), self.calls.steady(expert)
        streamed = self.streamed.steady(expert)
        units = runtime.bindings[: 1 + runtime.residency.depth]
        ahead = sum(unit.image.nbytes for unit in units) / statistics.median(self.gbps) / 1e6
        return {
            "verified": self.equal() and self.as_intended(),
            "budget": self.budget,
            "granularity": runtime.granularity,
            "first_ms": Spread.of(first).as_json(),
            "forward_ms": Spread.of(steady).as_json(),
            "streamed_ms": Spread.of(streamed).as_json(),
            "resident_ms": statistics.median(self.resident.steady(expert)),
            "stall_ms": min(first) - min(streamed),
            "first_units_ms": ahead,
            "link_gbps": Spread.of(self.gbps).as_json(),
            "stays": self.says[expert],
        }

    def equal(self) -> bool:
        """Whether all latents are those of the first call with both experts on the device."""
        expected = self.resident.latents[0]
        everyone = (self.resident, self.streamed, self.calls)
        return all(torch.equal(each, expected) for calls in everyone for each in calls.latents)

    def as_intended(self) -> bool:
        """Whether both experts ran, in the same order each time, and nothing stayed where nothing
        was to."""
        (first, *others) = [
            ran for calls in (self.resident, self.streamed, self.calls) for ran in calls.ran
        ]
        same = all(ran == first for ran in others)
        return same and set(first) == {0, 1} and self.nothing_stayed


def _claims(values: dict[str, Any]) -> list[Claim]:
    """The stall is what is asked about; the other forwards are told beside the resident ones."""
    steady, resident = values["forward_ms"]["median"], values["resident_ms"]
    units = values["first_units_ms"]
    return [
        Claim(
            "an expert's stall", values["stall_ms"], units, "the copy of the first units", "ms", 1.0
        ),
        Claim("its other forwards", steady, resident, "resident", "ms"),
    ]
