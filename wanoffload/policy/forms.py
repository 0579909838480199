"""Plain or packed: the forms in which blocks may stand on the host, and why one was taken."""

from __future__ import annotations

from dataclasses import replace

from wanoffload.apart import BLOCK, PART
from wanoffload.policy import compare, rules
from wanoffload.policy.compare import EQUAL, Considered, Problem, seconds
from wanoffload.policy.cost import STREAM, Candidate, Placement
from wanoffload.policy.rules import most_units

UNITS = {BLOCK: "blocks", PART: "parts"}


def of_the_same(problem: Problem, placement: Placement) -> list[Considered]:
    """The placement with plain blocks, with some packed and with all; none if nothing is streamed.

    Whatever was chosen: they are there to be looked at.
    """
    packable = any(dit.bf16_bytes for dit in problem.facts.dits)
    if placement.kind != STREAM or not packable:
        return []
    shares = dict.fromkeys([*compare.all_forms(problem), placement.packed])
    return compare.consider(problem, [replace(placement, packed=s) for s in sorted(shares)])


def like(one: Considered, considered: list[Considered], share: float) -> Considered:
    """The same placement with this share of packed blocks; itself where that was not considered."""
    wanted = replace(one.candidate.placement, packed=share)
    return next((c for c in considered if c.candidate.placement == wanted), one)


def say(problem: Problem, considered: list[Considered], taken: Candidate) -> None:
    """The reason for the form that was taken, and a message where packing decided itself."""
    decision, share = problem.decision, taken.placement.packed
    if taken.placement.kind != STREAM:
        rules.no_packing(decision, problem.choices)
        return
    if isinstance(problem.choices.pack, bool):
        decision.reasons["pack"] = rules.CHOSEN
        return
    settled = rules.why_settled(
        problem.facts, problem.mode, problem.choices, problem.limits.platform
    )
    if settled is not None or problem.from_disk:
        in_files = rules.AS_IT_STANDS if share else "rule 9: plain, as in the files"
        decision.reasons["pack"] = settled or in_files
        return
    why = (_why_packed if share else _why_plain)(problem, considered, taken)
    unknown = rules.AS_IT_STANDS if share else rules.PLAIN_WHILE_UNKNOWN
    decision.reasons["pack"] = f"cost model: {why}" if why else unknown
    if share and why:
        decision.messages.append(f"blocks of the DiT are stored packed: {why}")


def how_many(problem: Problem, share: float, granularity: str) -> str:
    """A share in words."""
    if share == 1:
        return "all blocks"
    units = most_units(problem.facts, granularity)
    return f"{round(share * units)} of {units} {UNITS[granularity]}, evenly spread"


def _why_packed(problem: Problem, considered: list[Considered], taken: Candidate) -> str | None:
    """None where nothing is known to tell from."""
    packed = how_many(problem, taken.placement.packed, taken.placement.granularity)
    plain = next(
        c for c in considered if c.candidate.placement == replace(taken.placement, packed=0.0)
    )
    if plain.obstacle is not None:
        return f"{packed}; plain does not fit: {plain.obstacle}"
    if taken.step_seconds is None:
        return None
    if seconds(plain.candidate) > seconds(taken) * EQUAL:
        return f"{packed}; the link binds, {_times(plain.candidate, taken)}"
    return f"{packed}, as they stand already"


def _why_plain(problem: Problem, considered: list[Considered], taken: Candidate) -> str | None:
    """None where nothing is known to tell from."""
    same = [
        c
        for c in considered
        if replace(c.candidate.placement, packed=0.0) == taken.placement
        and c.candidate.placement.packed
    ]
    fitting = [c.candidate for c in same if c.obstacle is None]
    if not fitting:
        return f"plain; packed does not fit: {same[-1].obstacle}" if same else None
    if taken.step_seconds is None:
        return None
    best = min(fitting, key=seconds)
    times = _times(taken, best)
    if seconds(taken) <= seconds(best) * EQUAL:
        return f"plain; packing would gain nothing, {times}"
    if problem.mode == "memory":
        return f"plain takes less device memory, {times}"
    return f"plain, as they stand already; packing them would take more than it saves, {times}"


def _times(plain: Candidate, packed: Candidate) -> str:
    return f"{seconds(plain):.4g} s a step plain and {seconds(packed):.4g} s packed"
