"""enable and `vram_budget`: one budget is for both experts, and residents outlast a call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import wanoffload
from tests.poison import poisoned_homes
from tests.small_pipelines import PIPELINES
from tests.test_adopting import ON_CPU, experts, wrapped_pipeline
from tests.test_load_pipeline import load_it, ordinary, saved
from tests.test_pipeline import HERE, STREAMING, planned
from wanoffload import Hardware, Workload, enable, offloader
from wanoffload.pipelines.enabling import plan_of
from wanoffload.residency import Rates

__all__ = ["planned", "poisoned_homes", "saved"]

WITHIN = replace(STREAMING, budget_of_one=1 << 30)
CALL = Workload(480, 832, 1)
KIND = PIPELINES["a14b"]


def residents(pipe: Any) -> list[int]:
    return [offloader(expert).stats().resident_units for expert in experts(pipe)]


@pytest.mark.usefixtures("poisoned_homes")
@pytest.mark.parametrize("name", ["t2v", "a14b", "vace", "animate"])
def test_videos_are_the_same(name: str, planned: Any) -> None:
    planned(WITHIN)
    kind = PIPELINES[name]
    pipe = kind.make()
    expected = kind.run(pipe)
    enable(pipe, workload=None, hardware=HERE)
    for _ in range(2):
        assert torch.equal(kind.run(pipe), expected)


def test_what_stays_is_the_running_experts(planned: Any) -> None:
    planned(WITHIN)
    pipe = KIND.make()
    seen: list[list[int]] = []
    enable(pipe, workload=None, hardware=HERE)
    KIND.run(pipe)
    for expert in experts(pipe):
        expert.register_forward_hook(lambda *_: seen.append(residents(pipe)))
    KIND.run(pipe)
    first, second = (len(offloader(expert).bindings) for expert in experts(pipe))
    assert [first, 0] in seen
    assert [0, second] in seen
    assert all(0 in counts for counts in seen)
    assert residents(pipe) == [0, second]  # until the next call


def test_what_stays_is_not_brought_again_by_the_next_call(planned: Any) -> None:
    planned(WITHIN)
    kind = PIPELINES["t2v"]
    pipe = kind.make()
    enable(pipe, workload=None, hardware=HERE)
    kind.run(pipe)
    runtime = offloader(pipe.transformer)
    fetched = runtime.stats().bytes_fetched
    assert fetched < 2 * runtime.stats().host_bytes  # some were on their way while it was wrapped
    kind.run(pipe)
    assert runtime.stats().bytes_fetched == fetched
    assert runtime.stats().resident_units == runtime.stats().units


def test_each_expert_is_told_what_its_forwards_are_up_against(planned: Any) -> None:
    first, second = Rates(1.0, 100.0, 0.1), Rates(1.0, 100.0, 0.2)
    packed = replace(WITHIN, pack_share=1.0, budget_of_one=64 << 20, rates=(first, second))

    def told(plan: Any) -> list[Rates | None]:
        planned(plan)
        pipe = KIND.make()
        enable(pipe, workload=CALL, hardware=HERE)
        return [offloader(expert).streaming.planner.rates for expert in experts(pipe)]

    assert told(packed) == [first, second]
    assert told(replace(packed, rates=(None, second))) == [None, second]
    assert told(replace(packed, rates=(first,))) == [first, None]  # facts of another pipeline
    assert told(replace(packed, budget_of_one=None)) == [None, None]


def test_nothing_stays_while_others_need_the_room(planned: Any) -> None:
    planned(replace(WITHIN, residents_stay=False))
    kind = PIPELINES["t2v"]
    pipe = kind.make()
    expected = kind.run(pipe)
    enable(pipe, workload=None, hardware=HERE)
    kind.run(pipe)
    runtime = offloader(pipe.transformer)
    assert runtime.stats().resident_units == 0
    fetched = runtime.stats().bytes_fetched
    assert torch.equal(kind.run(pipe), expected)
    assert runtime.stats().bytes_fetched >= fetched + runtime.stats().host_bytes


def test_a_plan_lets_blocks_go_for_the_encoder_where_both_do_not_fit() -> None:
    options: dict[str, Any] = {"vram_budget": "16GB", "pack": False, "granularity": "block"}
    for memory, stays in (("24GB", False), ("80GB", True)):
        card = Hardware(memory, "200GB", 55.2)
        made = wanoffload.plan("Wan-AI/Wan2.2-T2V-A14B-Diffusers", CALL, card, **options)
        assert (made.fits, made.dit_layerwise_offload, made.residents_stay) == (True, True, stays)
        assert ("while it runs" in made.explain()) is not stays
        assert "of 40 blocks stay on the device" in made.explain()


def test_a_wrapped_transformers_budget_is_kept_and_comes_back() -> None:
    pipe, _ = wrapped_pipeline(vram_budget="1GiB")
    budgets = [offloader(expert).budget for expert in experts(pipe)]
    enable(pipe, **ON_CPU, dit_layerwise_offload=True)
    assert [offloader(expert).budget for expert in experts(pipe)] == budgets
    wanoffload.disable(pipe)


def test_the_plan_has_what_stays_and_the_part_of_one_expert() -> None:
    card = Hardware("200GB", "200GB", 55.2)
    options: dict[str, Any] = {"dit_layerwise_offload": True}
    steps = []
    for budget in ("4GB", "12GB", "20GB", "31GB"):
        made = wanoffload.plan(
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            CALL,
            card,
            vram_budget=budget,
            **options,
        )
        part = made.budget_of_one
        assert part is not None
        assert made.vram_budget is not None
        assert 0 < made.vram_budget - part < 10**9  # the other expert's weights outside of blocks
        taken = next(
            c.candidate
            for c in made.considered
            if c.candidate.step_seconds is not None
            and c.candidate.placement.prefetch == made.dit_offload_prefetch_size
        )
        assert taken.device_weight_bytes <= made.vram_budget
        assert made.step_seconds is not None
        steps.append(made.step_seconds)
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < steps[0] / 3
    assert wanoffload.plan("Wan-AI/Wan2.2-T2V-A14B-Diffusers").budget_of_one is None


# A fraction, and what activations leave.

AUTOMATIC = replace(STREAMING, budget_of_one="auto")


@pytest.mark.usefixtures("poisoned_homes")
@pytest.mark.parametrize("granularity", ["block", "part"])
def test_what_activations_leave_is_for_the_expert_that_runs(granularity: str, planned: Any) -> None:
    planned(replace(AUTOMATIC, granularity=granularity))
    pipe = KIND.make()
    expected = KIND.run(pipe, num_inference_steps=4)
    enable(pipe, workload=None, hardware=HERE)
    assert all(offloader(expert).budget.auto for expert in experts(pipe))
    seen: list[list[int]] = []
    for expert in experts(pipe):
        expert.register_forward_hook(lambda *_: seen.append(residents(pipe)))
    first, second = (len(offloader(expert).bindings) for expert in experts(pipe))
    for _ in range(2):
        assert torch.equal(KIND.run(pipe, num_inference_steps=4), expected)
        assert residents(pipe) == [0, 0]  # the VAE came
    assert seen[0] == [0, 0]  # nothing is known of the first forward
    assert [first, 0] in seen
    assert [0, second] in seen
    assert all(0 in counts for counts in seen)


def test_what_was_seen_of_activations_outlasts_another_plan(planned: Any) -> None:
    def by_height(workload: Workload | None) -> Any:
        ahead = 2 if workload is not None and workload.height == 48 else 1
        return replace(AUTOMATIC, dit_offload_prefetch_size=ahead)

    planned(by_height)
    kind = PIPELINES["t2v"]
    pipe = enable(kind.make(), workload=None, hardware=HERE)
    kind.run(pipe)
    runtime = offloader(pipe.transformer)
    watching = runtime._activations
    kind.run(pipe, height=48)
    assert runtime.prefetch == 2
    assert runtime._activations is watching is not None


def test_a_real_plan_hands_auto_and_fractions_on() -> None:
    options: dict[str, Any] = {"dit_layerwise_offload": True, "device": "cpu", "hardware": HERE}
    for mode in ("auto", "manual"):
        pipe = KIND.make()
        expected = KIND.run(pipe)
        enable(pipe, mode, vram_budget="auto", **options)
        assert all(offloader(expert).budget.auto for expert in experts(pipe))
        assert torch.equal(KIND.run(pipe), expected)
        wanoffload.disable(pipe)
        enable(pipe, mode, vram_budget=0.5, **options)
        made = plan_of(pipe)
        assert made.vram_budget == 40 * 2**30
        budgets = [offloader(expert).budget.nbytes for expert in experts(pipe)]
        assert budgets == [made.budget_of_one] * 2
        assert torch.equal(KIND.run(pipe), expected)
    with pytest.raises(ValueError, match="device_memory"):
        enable(KIND.make(), vram_budget=0.5, hardware=Hardware(platform="cpu"), device="cpu")


def test_a_pipeline_is_loaded_with_an_automatic_budget(saved: Any) -> None:
    ours = load_it(saved("a14b"), vram_budget="auto", dit_layerwise_offload=True, hardware=HERE)
    assert all(offloader(expert).budget.auto for expert in experts(ours))
    assert torch.equal(KIND.run(ours), KIND.run(ordinary(saved("a14b"))))
