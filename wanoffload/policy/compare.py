"""Comparing: which placements of the DiT no choice forbids, which fit, which of them is taken."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import inf

from wanoffload.apart import BLOCK, PART
from wanoffload.facts.model import ModelFacts
from wanoffload.machine.hardware import Hardware
from wanoffload.policy import cost, rules, within
from wanoffload.policy.choices import AUTO, AUXILIARY, DIT, Choices, blocks_ahead
from wanoffload.policy.cost import RESIDENT, STREAM, WHOLE, Around, Candidate, Placement
from wanoffload.policy.rules import ENOUGH, Decision
from wanoffload.sizes import gb
from wanoffload.workload import Workload

EQUAL = 1.005
"""Plans within half a per cent of the fastest count as equally fast."""
WORTH_ANOTHER = 0.98
"""Within a budget, parts are taken in place of blocks, or the other way round, if a step takes at
most this share of the time."""


@dataclass(frozen=True)
class Problem:
    """What is decided about: the arguments of `plan`, checked, and what the base rules say."""

    facts: ModelFacts
    workload: Workload | None
    hardware: Hardware | None
    mode: str
    choices: Choices
    decision: Decision
    from_disk: bool = False
    """Streamed blocks count as read from disk for each use, which takes a time that is not known"""

    @property
    def limits(self) -> Hardware:
        """The machine; one without limits if none was given."""
        return self.hardware or Hardware()

    @property
    def known(self) -> bool:
        """Whether workload and machine are both known, so that the cost model may speak."""
        return self.workload is not None and self.limits.device_memory is not None

    @property
    def limited(self) -> bool:
        """Whether there is a limit that weights alone may exceed."""
        return self.limits.device_memory is not None or self.choices.budget_bytes is not None

    @property
    def left_alone(self) -> bool:
        """Whether the DiT is sharded, by its caller or already: what it takes is not known."""
        return self.decision.fsdp or self.facts.sharded

    @property
    def base(self) -> Placement:
        """What the base rules say."""
        if self.decision.dit_layerwise:
            decision = self.decision
            return Placement(STREAM, decision.prefetch, decision.packed, decision.granularity)
        return Placement(WHOLE if self.decision.dit_cpu_offload else RESIDENT)


@dataclass(frozen=True)
class Considered:
    """A candidate and the verdict: None if it can be taken, else what is wrong with it."""

    candidate: Candidate
    obstacle: str | None


def consider(problem: Problem, placements: Iterable[Placement] | None = None) -> list[Considered]:
    """Every permitted placement, or these, with its verdict; that of the base rules first.

    Where the device is too small for all of them, or another is quicker within the budget, also the
    same in the other granularity, if that is open.
    """
    if placements is not None:
        return _judged(problem, placements)
    found = _judged(problem, permitted(problem))
    if any(each.obstacle is None for each in found):
        return found + _quicker_otherwise(problem, found)
    return found + _smaller_otherwise(problem, found)


def _quicker_otherwise(problem: Problem, found: list[Considered]) -> list[Considered]:
    """What is streamed in blocks, in their parts, or the other way round, if that makes steps so
    much shorter within a budget that it is worth it: more may stay on the device then. A prefetch
    that was chosen counts what it was chosen for."""
    choices = problem.choices
    chosen = choices.dit_offload_prefetch_size is not None
    if choices.vram_budget is None or chosen or problem.mode != "auto" or not problem.known:
        return []
    enough = min(_times(problem, found), default=0.0) * WORTH_ANOTHER
    (resident,) = _judged(problem, [Placement(RESIDENT)])
    if (resident.candidate.step_seconds or 0.0) >= enough:
        return []  # compute alone takes as long, or nothing is timed
    others = _in_the_other_granularity(problem, found)
    return others if min(_times(problem, others), default=inf) <= enough else []


def _times(problem: Problem, considered: list[Considered]) -> list[float]:
    """Seconds a step, of those that can be taken."""
    usable = [c.candidate for c in considered if c.obstacle is None]
    return [spent(problem, c) for c in usable if c.step_seconds is not None]


def _smaller_otherwise(problem: Problem, found: list[Considered]) -> list[Considered]:
    """The same where nothing fits. Of what can't be taken either, the first alone, for its
    numbers."""
    judged = _in_the_other_granularity(problem, found)
    streamed = (c.candidate for c in found if c.candidate.placement.kind == STREAM)
    if not judged or not _helps(problem, judged[0].candidate, min(streamed, key=least_first)):
        return []
    return judged if any(each.obstacle is None for each in judged) else judged[:1]


def _in_the_other_granularity(problem: Problem, found: list[Considered]) -> list[Considered]:
    """Of what is streamed; nothing if none of it is, or the other granularity is not open."""
    placements = [c.candidate.placement for c in found if c.candidate.placement.kind == STREAM]
    other = other_granularity(problem)
    if other is None or not placements:
        return []
    shares = dict.fromkeys(placement.packed for placement in placements)
    ahead = depths(problem, other)
    return _judged(problem, (Placement(STREAM, n, share, other) for share in shares for n in ahead))


def _helps(problem: Problem, candidate: Candidate, nearest: Candidate) -> bool:
    """Whether it takes less of that of which the nearest takes too much."""
    budget, device = problem.choices.budget_bytes, problem.limits.device_memory
    if budget is not None and nearest.device_weight_bytes > budget:
        return candidate.device_weight_bytes < nearest.device_weight_bytes
    short = device is not None and nearest.device_need_bytes > int(device)
    return short and candidate.device_need_bytes < nearest.device_need_bytes


def _judged(problem: Problem, placements: Iterable[Placement]) -> list[Considered]:
    machine, assumed = cost.with_assumed_rates(problem.limits)
    timed = not assumed or problem.limits.platform in rules.SUPPORTED_PLATFORMS
    facts = replace(problem.facts, dits=()) if problem.left_alone else problem.facts
    found = []
    for placement in placements:
        around = around_of(problem.decision, placement)
        candidate = _predict(problem, facts, placement, around, machine)
        if problem.from_disk and placement.kind == STREAM:
            candidate = cost.from_disk(candidate, facts)
        if not timed:  # a CPU is no H200
            candidate = replace(candidate, step_seconds=None)
        found.append(Considered(candidate, obstacle(problem, candidate)))
    return found


def _predict(
    problem: Problem, facts: ModelFacts, placement: Placement, around: Around, machine: Hardware
) -> Candidate:
    """With the budget; an automatic one is what the activations of this workload leave."""
    budget, workload = problem.choices.budget_bytes, problem.workload
    if problem.choices.vram_budget != AUTO:
        return cost.predict(facts, placement, around, workload, machine, budget)
    left = cost.left_by_activations(facts, placement, around, workload, machine)
    return cost.predict(facts, placement, around, workload, machine, left, outlasts=False)


def permitted(problem: Problem) -> list[Placement]:
    """Placements that no choice forbids, that of the base rules first."""
    kinds = open_kinds(problem)
    first, *more = forms(problem)
    found = [problem.base, *(Placement(kind) for kind in (RESIDENT, WHOLE) if kind in kinds)]
    if STREAM in kinds:
        granularity = streams_in(problem)
        ahead = depths(problem, granularity)
        found += [Placement(STREAM, depth, first, granularity) for depth in ahead]
    streamed = [placement for placement in found if placement.kind == STREAM]
    found += [replace(placement, packed=share) for share in more for placement in streamed]
    return list(dict.fromkeys(found))


def open_kinds(problem: Problem) -> tuple[str, ...]:
    """The kinds of placement that are not settled by a choice, the mode or the platform."""
    choices, facts = problem.choices, problem.facts
    decides = problem.mode in rules.AUTOMATIC_MODES and (problem.known or problem.limited)
    if not decides or not facts.dits:
        return ()
    if rules.layerwise_chosen(choices):
        return (STREAM,)  # how deep is still open
    supported = problem.limits.platform in rules.SUPPORTED_PLATFORMS
    if not supported or facts.sharded or choices.use_fsdp_inference:
        return ()
    coarse = {None: (RESIDENT, WHOLE), True: (WHOLE,), False: (RESIDENT,)}[choices.dit_cpu_offload]
    return coarse if stream_forbidden(facts, choices) else (*coarse, STREAM)


def stream_forbidden(facts: ModelFacts, choices: Choices) -> bool:
    """Whether a choice, or cache-dit, rules streaming out."""
    chosen = choices.layerwise_offload_components
    left_out = chosen is not None and DIT not in chosen
    return choices.dit_layerwise_offload is False or left_out or facts.cache_dit


def streams_in(problem: Problem) -> str:
    """The granularity to compare where the DiT is streamed."""
    return rules.granularity_of(problem.facts, problem.mode, problem.choices)[0]


def other_granularity(problem: Problem) -> str | None:
    """What may take the place of it; None: it was chosen, or parts are not known."""
    chosen = rules.chosen_granularity(problem.choices)
    if chosen is not None or not within.known_in_parts(problem.facts):
        return None
    return BLOCK if streams_in(problem) == PART else PART


def depths(problem: Problem, granularity: str) -> tuple[int | None, ...]:
    """Numbers of blocks, or parts, ahead to compare."""
    chosen = problem.choices.dit_offload_prefetch_size
    if chosen is not None:
        return (blocks_ahead(chosen, rules.most_units(problem.facts, granularity)),)
    return (None,) if granularity == PART else (rules.DEFAULT_PREFETCH, ENOUGH)


def forms(problem: Problem) -> list[float]:
    """Shares of packed blocks to compare where the DiT is streamed, that of the rules first."""
    facts, choices = problem.facts, problem.choices
    if isinstance(choices.pack, bool):
        return [float(choices.pack)]
    settled = rules.why_settled(facts, problem.mode, choices, problem.limits.platform)
    as_it_is = facts.packed or 0.0
    if settled is not None or problem.from_disk:  # the checkpoint's files hold plain blocks
        return [as_it_is]
    return list(dict.fromkeys([as_it_is, *all_forms(problem)]))


def all_forms(problem: Problem) -> list[float]:
    """Plain, as they stand already, as many packed as the link needs, all packed."""
    shares: list[float | None] = [0.0]
    if problem.workload is not None:
        machine, _ = cost.with_assumed_rates(problem.limits)
        shares.append(cost.share_needed(problem.facts, problem.workload, machine))
    shares.append(1.0)
    return list(dict.fromkeys(share for share in shares if share is not None))


def components(decision: Decision, placement: Placement) -> list[str]:
    """What is offloaded layer by layer with this placement, DiT first."""
    rest = [name for name in decision.components if name != DIT]
    return [DIT, *rest] if placement.kind == STREAM else rest


def around_of(decision: Decision, placement: Placement) -> Around:
    """How the other components are run beside it."""
    streamed = components(decision, placement)

    def how(name: str) -> str:
        if name in streamed:
            return STREAM if name != "vae" else WHOLE  # half a gigabyte: it moves as a whole
        return WHOLE if decision.coarse[name] else RESIDENT

    return Around(**{name: how(name) for name in AUXILIARY})


def obstacle(problem: Problem, candidate: Candidate) -> str | None:
    """Why a candidate can't be taken: budget, device memory, host memory; None if it can."""
    budget = problem.choices.budget_bytes
    if budget is not None and candidate.device_weight_bytes > budget:
        taken = gb(candidate.device_weight_bytes)
        return f"weights take {taken} of the device, vram_budget is {gb(budget)}"
    device, host = problem.limits.device_memory, problem.limits.host_memory
    if device is not None and candidate.device_need_bytes > int(device):
        need = gb(candidate.device_need_bytes)
        return f"needs {need} of device memory, reserve included; {gb(int(device))} are there"
    locked = candidate.host_locked_bytes
    if host is not None and locked and locked + cost.HOST_RESERVE_BYTES > int(host):
        need = gb(locked + cost.HOST_RESERVE_BYTES)
        return (
            f"locks {gb(locked)} of host memory, {need} with the reserve; {gb(int(host))} are there"
        )
    return None


def least_first(candidate: Candidate) -> tuple[int, int]:
    """What the candidate takes of the device."""
    return candidate.device_weight_bytes, candidate.device_need_bytes


def choose(problem: Problem, considered: list[Considered]) -> Candidate | None:
    """The candidate to take, or None if none can be."""
    usable = [c.candidate for c in considered if c.obstacle is None]
    if not usable:
        return None
    timed = all(candidate.step_seconds is not None for candidate in usable)
    decides = problem.mode in rules.AUTOMATIC_MODES or problem.choices.pack == AUTO
    if not (problem.known and timed and decides):
        return usable[0]  # the base rules' own if it fits, else the simplest
    if considered[0].obstacle is None and kept_from_streaming(problem):
        usable = [c for c in usable if c.placement.kind != STREAM]
    if problem.mode != "memory":
        fastest = min(spent(problem, candidate) for candidate in usable)
        usable = [c for c in usable if spent(problem, c) <= fastest * EQUAL]
    return min(usable, key=lambda c: (c.device_peak_bytes, c.device_weight_bytes, seconds(c)))


def kept_from_streaming(problem: Problem) -> bool:
    """Whether rule 1 keeps the DiT from being streamed by itself, as long as it fits otherwise."""
    if rules.layerwise_chosen(problem.choices):
        return False
    return rules.why_not(problem.facts, problem.choices, problem.limits.platform) is not None


def spent(problem: Problem, candidate: Candidate) -> float:
    """Seconds a step. Blocks that stand on the host already in another form must be brought into
    this one, which is spread over the steps of one generation."""
    facts, placement = problem.facts, candidate.placement
    same = (placement.packed, placement.granularity) == (facts.packed, facts.granularity or BLOCK)
    if facts.packed is None or placement.kind != STREAM or same:
        return seconds(candidate)
    assert problem.workload is not None
    change = cost.streaming_seconds(problem.facts, placement)
    return seconds(candidate) + change / problem.workload.steps


def seconds(candidate: Candidate) -> float:
    """The predicted step of a candidate that has one."""
    assert candidate.step_seconds is not None
    return candidate.step_seconds
