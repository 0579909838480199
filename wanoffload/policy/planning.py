"""Deciding: `plan` turns a model, a workload, a machine and choices into a `Plan` that says why.

Pure: values in, values out; no torch, no GPU. The base rules (`rules`) say what is on when workload
or machine are unknown. When both are known the cost model (`cost`, `compare`) may overrule rules 2
and 3, never a choice. `wanoffload.enable` acts on a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from wanoffload.apart import PART
from wanoffload.facts.look import look
from wanoffload.facts.model import ModelFacts
from wanoffload.machine.hardware import Hardware
from wanoffload.policy import compare, cost, forms, remedies, rules, within
from wanoffload.policy.choices import AUTO, Choices, check_mode
from wanoffload.policy.compare import EQUAL, Considered, Problem, seconds
from wanoffload.policy.cost import STREAM, WHOLE, Candidate, Placement
from wanoffload.residency import Rates
from wanoffload.sizes import gb
from wanoffload.workload import Workload

FROM_DISK = "host memory is short: blocks of the DiT are read from disk for each use"


@dataclass(frozen=True)
class Plan:
    """What was decided, under the choices' own names, what is predicted, and why.

    `dit_offload_prefetch_size` is a number of blocks, None where the DiT is not streamed. With
    `granularity` "part" it counts parts of blocks, and is None unless it was chosen.
    Predictions are None where nothing is known to predict from: `step_seconds` (one denoising step,
    all its forwards), `start_seconds`, `device_peak_bytes` (weights and activations, allocated, at
    the worst moment of a generation), `host_locked_bytes`. `fits` is False if no permitted plan
    fits; `messages` say what gives way and what does not fit; `reasons` names for each choice the
    rule that set it; `considered` are the candidates that were compared.

    `pack` says whether blocks of the DiT stand packed on the host, `pack_share` which part of them,
    evenly spread; None: none, and nothing was said against it (a cache file that is there may hold
    them packed all the same).
    `forms` are the plan with plain blocks, with packed ones, and with some packed, each with its
    predictions; none where the DiT is not streamed.
    """

    mode: str
    facts: ModelFacts
    workload: Workload | None
    hardware: Hardware | None
    dit_layerwise_offload: bool
    dit_cpu_offload: bool
    dit_offload_prefetch_size: int | None
    layerwise_offload_components: list[str]
    text_encoder_cpu_offload: bool
    image_encoder_cpu_offload: bool
    vae_cpu_offload: bool
    use_fsdp_inference: bool
    vram_budget: int | str | None
    pack: bool
    pack_share: float | None
    granularity: str
    step_seconds: float | None
    start_seconds: float | None
    device_peak_bytes: int | None
    host_locked_bytes: int | None
    fits: bool
    reasons: Mapping[str, str]
    messages: tuple[str, ...] = ()
    residents_stay: bool = True
    """Whether what stays on the device under `vram_budget` does so while other components run."""
    considered: tuple[Considered, ...] = field(default=(), repr=False)
    forms: tuple[Considered, ...] = field(default=(), repr=False)

    @property
    def budget_of_one(self) -> int | str | None:
        """What one streamed DiT may take of `vram_budget`; None: it was not chosen."""
        if self.vram_budget is None or not self.dit_layerwise_offload:
            return None
        if isinstance(self.vram_budget, str):
            return AUTO
        return within.share_of_one(self.facts.streamed_in(self.granularity), self.vram_budget)

    @property
    def rates(self) -> list[Rates | None]:
        """What forwards of each DiT are up against. None: that is not known, or nothing that stays
        under a budget depends on it."""
        if self.hardware is None or self.budget_of_one is None:
            return [None] * len(self.facts.dits)
        placement = Placement(STREAM, packed=self.pack_share or 0.0, granularity=self.granularity)
        machine, _ = cost.with_assumed_rates(self.hardware)
        return cost.rates(self.facts, placement, self.workload, machine)

    def explain(self) -> str:
        """The plan in plain text: what was decided, by which rule, and what was compared."""
        from wanoffload.policy import explain

        return explain.text(self)

    def as_dict(self) -> dict[str, Any]:
        """The same as a dictionary of values that JSON can hold."""
        from wanoffload.policy import explain

        return explain.as_dict(self)


def plan(
    model: object,
    workload: Workload | None = None,
    hardware: Hardware | None = None,
    *,
    mode: str = "auto",
    **choices: Any,
) -> Plan:
    """Decides how a model is run. Changes nothing.

    Args:
        model: a diffusers pipeline or transformer, a local folder in the hub's layout, the id of a
            published Wan repository, or `ModelFacts`.
        workload: what will be generated; None: unknown.
        hardware: the machine, measured (`Hardware.probe()`) or written by hand; None: unknown, a
            machine with CUDA.
        mode: "auto", the fastest plan that fits, of equals the one with least device memory;
            "memory", least device memory; "speed", everything resident; "manual", what was chosen.
        choices: `dit_layerwise_offload`, `dit_cpu_offload`, `layerwise_offload_components`,
            `dit_offload_prefetch_size`, `text_encoder_cpu_offload`, `image_encoder_cpu_offload`,
            `vae_cpu_offload`, `use_fsdp_inference`, `vram_budget` (what the DiT's weights may take
            on the device: bytes, text, a fraction of the device memory that `hardware` has, or
            "auto": what activations leave), `pack` (True, False, or "auto": packed where the link
            binds or host memory is short; modes "auto" and "memory" do so by themselves),
            `granularity` ("block", "part": parts of blocks through a ring, which takes less of the
            device; "auto", as without it: parts where no plan with blocks fits, in mode "memory"
            where they take less, and in "auto" where they are quicker within `vram_budget`). None
            is the same as not given.

    Returns:
        A plan. If nothing that is permitted fits, `fits` is False and `messages` have the numbers.

    Raises:
        ValueError: unknown or contradicting choices, an unknown model, a `vram_budget` that no
            permitted plan can keep, or a fraction of what is not known; says what is allowed.
    """
    mode = check_mode(mode)
    chosen = Choices.of(choices)
    _check_types(workload, hardware)
    made = _in_bytes(chosen, hardware)
    facts = look(model)
    platform = hardware.platform if hardware is not None else "cuda"
    decision = rules.decide(facts, mode, made, platform)
    problem = Problem(facts, workload, hardware, mode, made, decision)
    considered = compare.consider(problem)
    taken = compare.choose(problem, considered)
    if taken is None and facts.blocks_in_files:
        problem = replace(problem, from_disk=True)
        considered = compare.consider(problem)
        taken = compare.choose(problem, considered)
        if taken is not None and taken.placement.kind == STREAM:
            decision.messages.append(FROM_DISK)
    _say_assumed(problem, considered[0].candidate)
    if taken is not None and taken.placement != problem.base:
        _say_overruled(problem, considered, taken)
    _say_budget(problem, chosen, taken or considered[0].candidate)
    _say_granularity(problem, considered, taken or considered[0].candidate)
    forms.say(problem, considered, taken or considered[0].candidate)
    if taken is None:
        taken = considered[0].candidate
        decision.messages.append(_nothing_fits(problem, considered))  # the last: enable raises it
    return _write(problem, taken, considered)


def _check_types(workload: object, hardware: object) -> None:
    if workload is not None and not isinstance(workload, Workload):
        raise ValueError(f"workload is a Workload(height, width, frames, ...), not {workload!r}")
    if hardware is not None and not isinstance(hardware, Hardware):
        raise ValueError(f"hardware is a Hardware, by hand or Hardware.probe(), not {hardware!r}")


def _in_bytes(choices: Choices, hardware: Hardware | None) -> Choices:
    """With the budget's bytes where it is a fraction. Raises ValueError if it is not known of
    what."""
    fraction = choices.vram_budget
    if not isinstance(fraction, float):
        return choices
    if hardware is None or hardware.device_memory is None:
        missing = "no hardware was given" if hardware is None else "hardware has no device_memory"
        raise ValueError(
            f"vram_budget={fraction} is a fraction of the device memory that is to be had, and "
            f"{missing}: give hardware=Hardware.probe(), on a machine with CUDA, or one with "
            "device_memory; or give the budget in bytes"
        )
    return replace(choices, vram_budget=int(fraction * int(hardware.device_memory)))


def _say_budget(problem: Problem, chosen: Choices, taken: Candidate) -> None:
    """Where the budget comes from; and where an automatic one is not predicted."""
    decision, given = problem.decision, chosen.vram_budget
    decision.reasons["vram_budget"] = rules.CHOSEN if given is not None else "not chosen"
    if isinstance(given, float):
        there = gb(int(problem.limits.device_memory or 0))
        decision.reasons["vram_budget"] = f"chosen: {given:g} of {there}"
    if given == AUTO and taken.placement.kind == STREAM and not problem.known:
        missing = [
            *(["workload"] if problem.workload is None else []),
            *(["device_memory of hardware"] if problem.limits.device_memory is None else []),
        ]
        decision.messages.append(
            "vram_budget='auto': what stays on the device is found out while it runs, and is not "
            f"predicted without {' and '.join(missing)}"
        )


def _say_assumed(problem: Problem, candidate: Candidate) -> None:
    _, assumed = cost.with_assumed_rates(problem.limits)
    if problem.hardware is not None and candidate.step_seconds is not None and assumed:
        problem.decision.messages.append(
            f"rates that are not known are taken from {cost.ASSUMED.name}: {', '.join(assumed)}"
        )


def _say_overruled(problem: Problem, considered: list[Considered], taken: Candidate) -> None:
    """Reasons for what the cost model decided in place of a rule."""
    reasons, choices = problem.decision.reasons, problem.choices
    streamed_by_rule = problem.base.kind == STREAM
    streamed = taken.placement.kind == STREAM
    base = considered[0]
    if streamed_by_rule and streamed:
        if taken.placement.granularity != problem.base.granularity:
            return  # `_say_granularity` tells of it
        if taken.placement.prefetch == problem.base.prefetch:
            return  # the form alone differs: `forms.say` tells of it
        base = forms.like(base, considered, taken.placement.packed)
    why = f"{taken.placement}; {_why(problem, base, taken)}"
    if streamed_by_rule and streamed:
        _overrule(reasons, "dit_offload_prefetch_size", why)
    elif streamed_by_rule != streamed:
        _overrule(reasons, "dit_layerwise_offload", why)
        if not choices.made("dit_cpu_offload"):
            reasons["dit_cpu_offload"] = f"cost model: {taken.placement}"
        _say_prefetch(problem, streamed)
    else:  # between resident and whole
        reasons["dit_cpu_offload"] = f"cost model: {why}"


def _overrule(reasons: dict[str, str], name: str, why: str) -> None:
    rule = reasons[name].partition(":")[0]
    reasons[name] = f"cost model over {rule}: {why}"


def _say_prefetch(problem: Problem, streamed: bool) -> None:
    """The prefetch size, where the cost model turns streaming on or off."""
    decision, name = problem.decision, "dit_offload_prefetch_size"
    chosen = problem.choices.dit_offload_prefetch_size
    if streamed:
        decision.reasons[name] = "cost model: what is enough" if chosen is None else rules.CHOSEN
        decision.messages[:] = [m for m in decision.messages if not m.startswith(name)]
        return
    decision.reasons[name] = "rule 4: the DiT is not streamed"
    if chosen is not None:
        decision.messages.append(rules.no_effect(chosen, decision))


def _say_granularity(problem: Problem, considered: list[Considered], taken: Candidate) -> None:
    """Rule 10, as it came out, and what it means for the prefetch size."""
    decision, choices, placement = problem.decision, problem.choices, taken.placement
    if placement.kind != STREAM:
        rules.no_parts(decision, choices)
        return
    said, why = rules.granularity_of(problem.facts, problem.mode, choices)
    if placement.granularity != said:
        units = forms.UNITS[placement.granularity]
        why = f"rule 10: {units}, {_why_not(problem, said, considered, taken)}"
        in_parts = placement.granularity == PART
        ahead = rules.PARTS_AHEAD if in_parts else "cost model: what is enough"
        chosen = choices.made("dit_offload_prefetch_size")
        decision.reasons["dit_offload_prefetch_size"] = rules.CHOSEN if chosen else ahead
    elif placement.granularity == PART and not choices.made("dit_offload_prefetch_size"):
        decision.reasons["dit_offload_prefetch_size"] = rules.PARTS_AHEAD
    decision.reasons["granularity"] = why


def _why_not(problem: Problem, said: str, considered: list[Considered], taken: Candidate) -> str:
    """What is wrong with the granularity that the rules say."""
    tried = [
        c
        for c in considered
        if c.candidate.placement.granularity == said and c.candidate.placement.kind == STREAM
    ]
    usable = [c.candidate for c in tried if c.obstacle is None]
    if usable:
        quickest = min(usable, key=lambda c: compare.spent(problem, c))
        return f"quicker within the budget than {quickest.placement}, {_times(quickest, taken)}"
    nearest = min(tried, key=lambda c: compare.least_first(c.candidate))
    return f"since what is {nearest.candidate.placement} does not fit: {nearest.obstacle}"


def _why(problem: Problem, base: Considered, taken: Candidate) -> str:
    of_base = base.candidate
    if base.obstacle is not None:
        return f"{of_base.placement} does not fit: {base.obstacle}"
    less = _less(of_base, taken)
    slower = seconds(of_base) > seconds(taken) * EQUAL
    if less is None or (problem.mode == "auto" and slower):
        return f"faster than {of_base.placement}, {_times(of_base, taken)}"
    return f"{less} than {of_base.placement}, {_times(of_base, taken)}"


def _less(base: Candidate, taken: Candidate) -> str | None:
    """What the taken candidate saves; None if that is nothing."""
    peak = base.device_peak_bytes - taken.device_peak_bytes
    weights = base.device_weight_bytes - taken.device_weight_bytes
    if (peak, weights) <= (0, 0):
        return None
    for saved, what in ((peak, "less device memory"), (weights, "less for weights")):
        if saved >= 10**7:
            return f"{gb(saved)} {what}"
    return "slightly less device memory"


def _times(base: Candidate, taken: Candidate) -> str:
    ours, theirs = (f"{seconds(candidate):.4g} s" for candidate in (taken, base))
    return f"at the same {ours} a step" if ours == theirs else f"{ours} a step against {theirs}"


def _nothing_fits(problem: Problem, considered: list[Considered]) -> str:
    told = [c for c in considered if c.candidate.placement.packed in (0, 1)]
    found = "; ".join(f"{c.candidate.placement}: {c.obstacle}" for c in told)
    budget = problem.choices.budget_bytes
    least = min(c.candidate.device_weight_bytes for c in considered)
    if budget is not None and least > budget:
        raise ValueError(
            f"vram_budget={gb(budget)} is too small: the least that is possible in mode "
            f"{problem.mode!r} with these choices is {gb(least)} ({found})"
        )
    return f"nothing that is permitted fits ({found}). {remedies.what_helps(problem)}"


def _write(problem: Problem, taken: Candidate, considered: list[Considered]) -> Plan:
    decision, placement, facts = problem.decision, taken.placement, problem.facts
    timed = taken.step_seconds is not None and problem.hardware is not None
    sized = any((facts.dits, facts.text_encoder, facts.image_encoder, facts.vae))
    whole = sized and not problem.left_alone
    automatic = problem.choices.vram_budget == AUTO
    streamed = placement.kind == STREAM
    told = streamed and (isinstance(problem.choices.pack, bool) or bool(facts.packed))
    return Plan(
        mode=problem.mode,
        facts=facts,
        workload=problem.workload,
        hardware=problem.hardware,
        dit_layerwise_offload=streamed,
        dit_cpu_offload=decision.dit_cpu_offload or placement.kind == WHOLE,
        dit_offload_prefetch_size=placement.prefetch,
        layerwise_offload_components=compare.components(decision, placement),
        text_encoder_cpu_offload=decision.coarse["text_encoder"],
        image_encoder_cpu_offload=decision.coarse["image_encoder"],
        vae_cpu_offload=decision.coarse["vae"],
        use_fsdp_inference=decision.fsdp,
        vram_budget=AUTO if automatic else problem.choices.budget_bytes,
        pack=placement.packed > 0,
        pack_share=placement.packed if placement.packed or told else None,
        granularity=placement.granularity,
        step_seconds=taken.step_seconds if timed else None,
        start_seconds=taken.start_seconds if whole and problem.hardware is not None else None,
        device_peak_bytes=taken.device_peak_bytes if whole and problem.workload else None,
        host_locked_bytes=taken.host_locked_bytes if sized else None,
        fits=any(c.obstacle is None for c in considered),
        reasons=MappingProxyType(decision.reasons),
        messages=tuple(decision.messages),
        residents_stay=taken.residents_stay and not automatic,
        considered=tuple(considered),
        forms=tuple(forms.of_the_same(problem, placement)) if whole else (),
    )
