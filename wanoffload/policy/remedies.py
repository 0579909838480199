"""What helps where nothing that is permitted fits: other modes and choices, tried one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from wanoffload.policy import compare, cost, rules
from wanoffload.policy.choices import AUXILIARY, Choices
from wanoffload.policy.compare import Problem
from wanoffload.policy.cost import Candidate
from wanoffload.sizes import gb

_OF_THE_DIT = (
    "dit_layerwise_offload",
    "dit_cpu_offload",
    "layerwise_offload_components",
    "dit_offload_prefetch_size",
    "vram_budget",
    "pack",
    "granularity",
)
_COARSE = tuple(f"{name}_cpu_offload" for name in AUXILIARY)


def what_helps(problem: Problem) -> str:
    """A sentence or two: at most two changes that make it fit, or what memory is needed."""
    found = [f"{how}, which {_takes(candidate)}" for how, candidate in _fitting(problem)]
    if found:
        return f"What fits: {'; or '.join(found[:2])}."
    least = min(_tried(problem), key=lambda candidate: candidate.device_need_bytes)
    smaller = replace(problem, workload=None)
    if problem.workload and compare.choose(smaller, compare.consider(smaller)):
        return "Fewer frames or a smaller size help: the weights fit."
    locked = least.host_locked_bytes + cost.HOST_RESERVE_BYTES
    return (
        "Other modes and choices do not fit either. What takes least device memory needs "
        f"{gb(least.device_need_bytes)} of it, and {gb(locked)} of host memory."
    )


def _takes(candidate: Candidate) -> str:
    locked = candidate.host_locked_bytes
    return (
        f"needs {gb(candidate.device_need_bytes)} of device memory and locks "
        f"{gb(locked) if locked else 'none'} of host memory"
    )


def _fitting(problem: Problem) -> list[tuple[str, Candidate]]:
    """Changes that make it fit, with what is taken then. Two at once only if no single one does."""
    found: dict[int, list[tuple[str, Candidate]]] = {1: [], 2: []}
    for changes, changed in _changed(problem):
        taken = compare.choose(changed, compare.consider(changed))
        if taken is not None:
            found[len(changes)].append((" and ".join(changes), taken))
    return found[1] or found[2]


def _tried(problem: Problem) -> list[Candidate]:
    problems = [problem, *(changed for _, changed in _changed(problem))]
    return [each.candidate for changed in problems for each in compare.consider(changed)]


def _changed(problem: Problem) -> Iterator[tuple[list[str], Problem]]:
    """The problem with other choices, another mode, or both, and the changes in words."""
    for mode in dict.fromkeys((problem.mode, "auto", "speed")):
        of_mode = [] if mode == problem.mode else [f"mode={mode!r}"]
        for of_choices, choices in _other_choices(problem.choices):
            changed = _decided(problem, mode, choices)
            if changed is not None and (of_mode or of_choices):
                yield [*of_mode, *of_choices], changed


def _other_choices(choices: Choices) -> Iterator[tuple[list[str], Choices]]:
    """As they are; packed; with the text encoder kept on the device; what was chosen left out."""
    yield [], choices
    if choices.pack is None:
        yield ["pack=True"], replace(choices, pack=True)
    yield ["text_encoder_cpu_offload=False"], replace(choices, text_encoder_cpu_offload=False)
    made = [name for name in (*_OF_THE_DIT, *_COARSE) if choices.made(name)]
    if made:
        yield [f"leaving out {', '.join(made)}"], replace(choices, **dict.fromkeys(made))


def _decided(problem: Problem, mode: str, choices: Choices) -> Problem | None:
    """None where the choices exclude each other, or the model."""
    try:
        decision = rules.decide(problem.facts, mode, choices, problem.limits.platform)
    except ValueError:
        return None
    return replace(problem, mode=mode, choices=choices, decision=decision)
