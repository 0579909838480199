"""enable and `granularity`: what the plan says of it is done, kept, and undone; videos stay the
same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import wanoffload
from tests.poison import poisoned_homes
from tests.small_models import MODELS, forward
from tests.small_pipelines import PIPELINES
from tests.test_adopting import ON_CPU, experts, images, wrapped_pipeline
from tests.test_load_pipeline import load_it, ordinary, saved
from tests.test_pipeline import PARKING, STREAMING, enabled_of, planned, values
from wanoffload import Hardware, Workload, disable, enable, offloader
from wanoffload.errors import CacheFileError
from wanoffload.facts.look import look
from wanoffload.hooks import attached
from wanoffload.host_tensor import HostTensor
from wanoffload.pipelines import acting, components
from wanoffload.pipelines.enabling import plan_of

__all__ = ["planned", "poisoned_homes", "saved"]

PARTED = replace(STREAMING, dit_offload_prefetch_size=None, granularity="part")
STREAM: dict[str, Any] = {"dit_layerwise_offload": True}
KIND = PIPELINES["a14b"]
BLOCKS, PARTS = [3, 4], [9, 12]  # units of the two experts
SIZE = Workload(32, 32, 5)


def units(pipe: Any) -> list[int]:
    return [offloader(expert).stats().units for expert in experts(pipe)]


def granularities(pipe: Any) -> list[str]:
    return [offloader(expert).granularity for expert in experts(pipe)]


@pytest.mark.usefixtures("poisoned_homes")
@pytest.mark.parametrize("packed", [None, 1.0, 1 / 3])
@pytest.mark.parametrize("name", ["t2v", "a14b", "i2v", "vace", "animate", "qwen_image"])
def test_a_pipeline_in_parts_makes_the_resident_ones_video_and_holds_the_same_values(
    name: str, packed: float | None, planned
) -> None:
    planned(replace(PARTED, pack_share=packed))
    kind = PIPELINES[name]
    pipe = kind.make()
    expected, truth = kind.run(pipe), values(pipe)
    enable(pipe, **ON_CPU)
    runtime = offloader(pipe.transformer)
    assert runtime.granularity == "part"
    assert runtime.paused
    for _ in range(2):
        assert torch.equal(kind.run(pipe), expected)
    assert runtime.stats().bytes_fetched > runtime.stats().host_bytes
    assert runtime.stats().acquires % runtime.stats().units == 0 < runtime.stats().acquires
    assert (runtime.stats().packed_units > 0) == (packed is not None)
    assert all(torch.equal(value, truth[key]) for key, value in values(pipe).items())
    disable(pipe)
    assert attached(pipe.transformer) is None
    assert not any(isinstance(p, HostTensor) for p in pipe.transformer.parameters())
    assert torch.equal(kind.run(pipe), expected)


@pytest.mark.usefixtures("poisoned_homes")
def test_experts_share_one_budget_in_parts(planned) -> None:
    some = 2**21 * 5 + 400_000  # of the second expert's parts some stay
    for budget, all_stay in ((some, False), (1 << 30, True)):
        planned(replace(PARTED, budget_of_one=budget))
        pipe = KIND.make()
        expected = KIND.run(pipe)
        enable(pipe, **ON_CPU)
        seen: list[list[int]] = []

        def note(*_: Any, pipe: Any = pipe, seen: list[list[int]] = seen) -> None:
            stats = [offloader(expert).stats() for expert in experts(pipe)]
            seen.append([each.resident_units for each in stats])
            assert all(each.device_bytes <= budget for each in stats)  # noqa: B023

        for expert in experts(pipe):
            expert.register_forward_hook(note)
        for _ in range(2):
            assert torch.equal(KIND.run(pipe), expected)
        assert seen
        assert all(0 in counts for counts in seen)
        assert any(first > 0 for first, _ in seen)
        assert any(second > 0 for _, second in seen)
        assert (PARTS[1] in [second for _, second in seen]) == all_stay
        for expert in experts(pipe):
            stats = offloader(expert).stats()
            assert stats.device_bytes <= budget
            assert stats.slot_bytes == 0  # paused: its ring is gone


def by_height(workload: Workload | None) -> Any:
    """In parts at 48, in blocks at 32, with room for more parts at 64, with a budget at 80."""
    plans = {
        48: PARTED,
        32: STREAMING,
        64: replace(PARTED, dit_offload_prefetch_size=2),
        80: replace(PARTED, budget_of_one=1 << 30),
    }
    return plans.get(workload.height if workload else 32, PARTED)


@pytest.mark.usefixtures("poisoned_homes")
def test_another_granularity_at_a_later_call_and_back(planned) -> None:
    planned(by_height)
    pipe = enable(KIND.make(), **ON_CPU)
    resident = KIND.make()
    for height, expected in ((32, BLOCKS), (48, PARTS), (64, PARTS), (80, PARTS), (32, BLOCKS)):
        assert torch.equal(KIND.run(pipe, height=height), KIND.run(resident, height=height))
        assert units(pipe) == expected


def test_what_only_gets_another_prefetch_or_budget_stays_where_it_is(planned) -> None:
    planned(by_height)
    pipe = enable(KIND.make(), **ON_CPU)
    KIND.run(pipe, height=48)
    before = [(offloader(expert), images(expert)) for expert in experts(pipe)]
    for height in (64, 80, 48):
        KIND.run(pipe, height=height)
        assert [(offloader(expert), images(expert)) for expert in experts(pipe)] == before
    assert [offloader(expert).prefetch for expert in experts(pipe)] == [None, None]


def test_the_plan_is_told_how_blocks_stand(planned, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(by_height)
    seen: list[str | None] = []
    decide = acting.decide
    monkeypatch.setattr(
        acting, "decide", lambda facts, *a: (seen.append(facts.granularity), decide(facts, *a))[1]
    )
    pipe = enable(KIND.make(), **ON_CPU)
    assert set(seen) == {None}
    for height, stands in ((48, None), (32, "part"), (64, "block")):
        seen.clear()
        KIND.run(pipe, height=height)
        assert seen[0] in (stands, "block")
    seen.clear()
    KIND.run(pipe, height=48)
    assert seen == ["part"]


@pytest.mark.parametrize("chosen", ["block", "part"])
def test_a_chosen_granularity_is_obeyed_and_another_after_disable(chosen: str) -> None:
    pipe = KIND.make()
    expected = KIND.run(pipe)
    for granularity in (chosen, "part", "block"):
        enable(pipe, workload=SIZE, **ON_CPU, granularity=granularity, **STREAM)
        assert granularities(pipe) == [granularity] * 2
        assert torch.equal(KIND.run(pipe), expected)
        disable(pipe)


def test_a_real_plan_streams_in_parts_where_blocks_take_more_or_are_slower_or_do_not_fit() -> None:
    """As if the small experts were those of 14B."""
    large = {"facts": look("Wan-AI/Wan2.2-T2V-A14B-Diffusers"), "workload": SIZE, "device": "cpu"}
    card = Hardware("48GiB", "200GB", 55.2)
    for mode, budget, granularity in (
        ("memory", None, "part"),
        ("auto", "2.2GB", "part"),
        ("auto", "4GB", "part"),
        ("auto", None, "block"),
        ("manual", "4GB", "block"),
        ("manual", "2.2GB", "part"),
    ):
        pipe = KIND.make()
        expected = KIND.run(pipe)
        enable(pipe, mode, hardware=card, vram_budget=budget, pack=False, **STREAM, **large)
        assert granularities(pipe) == [granularity] * 2
        given = None if budget is None else plan_of(pipe).budget_of_one
        assert [offloader(expert).budget.nbytes for expert in experts(pipe)] == [given] * 2
        assert torch.equal(KIND.run(pipe), expected)


def test_within_a_budget_blocks_or_parts_wait_for_the_size_of_the_first_call() -> None:
    card = Hardware("80GiB", "200GB", 55.2)
    facts = replace(look("Wan-AI/Wan2.2-T2V-A14B-Diffusers"), text_encoder=None, vae=None)
    pipe = KIND.make()
    options: dict[str, Any] = {"vram_budget": "16GB", "pack": False, **STREAM}
    enable(pipe, hardware=card, facts=facts, device="cpu", **options)
    enabled = enabled_of(pipe)
    assert all(attached(expert) is None for expert in experts(pipe))
    enabled.before_call(pipe, Workload(480, 832, 1))
    assert granularities(pipe) == ["part", "part"]
    disable(pipe)
    enable(pipe, hardware=card, facts=facts, device="cpu", **options)
    enabled_of(pipe).before_call(pipe, Workload(480, 832, 17))
    assert granularities(pipe) == ["block", "block"]


def test_a_transformer_alone_streams_in_parts_as_planned() -> None:
    model, inputs = MODELS["wan22_5b"]()
    expected = forward(model, inputs)
    enable(model, **ON_CPU, granularity="part", **STREAM)
    assert offloader(model).granularity == "part"
    assert torch.equal(forward(model, inputs), expected)


# Transformers that were wrapped before.


@pytest.mark.parametrize("granularity", ["block", "part"])
def test_one_that_was_wrapped_keeps_its_granularity_and_its_images(granularity: str) -> None:
    pipe, expected = wrapped_pipeline(granularity=granularity)
    before = [(offloader(expert), images(expert)) for expert in experts(pipe)]
    enable(pipe, "manual", **ON_CPU, **STREAM)
    assert plan_of(pipe).granularity == granularity
    assert plan_of(pipe).reasons["granularity"] == "chosen"
    assert [(offloader(expert), images(expert)) for expert in experts(pipe)] == before
    assert torch.equal(KIND.run(pipe), expected)
    disable(pipe)
    assert [attached(expert) for expert in experts(pipe)] == [None, None]
    assert all(attached(module) is None for expert in experts(pipe) for module in expert.modules())
    assert torch.equal(KIND.run(pipe), expected)


@pytest.mark.parametrize(("was", "chosen"), [("part", "block"), ("block", "part")])
def test_a_chosen_granularity_wins_over_the_one_that_was_found(was: str, chosen: str) -> None:
    pipe, expected = wrapped_pipeline(granularity=was, prefetch=3)
    enable(pipe, "manual", **ON_CPU, granularity=chosen, **STREAM)
    assert granularities(pipe) == [chosen] * 2
    assert 3 not in [offloader(expert).prefetch for expert in experts(pipe)]  # of other units
    assert torch.equal(KIND.run(pipe), expected)


def test_where_one_was_in_parts_and_one_was_not_the_plan_decides() -> None:
    pipe, expected = wrapped_pipeline(granularity="part")
    wanoffload.unwrap(pipe.transformer_2)
    wanoffload.wrap(pipe.transformer_2, device="cpu")
    enable(pipe, "manual", **ON_CPU, **STREAM)
    assert plan_of(pipe).reasons["granularity"] != "chosen"
    assert granularities(pipe) == ["block"] * 2
    assert torch.equal(KIND.run(pipe), expected)


@pytest.mark.parametrize("plan", [PARKING, STREAMING], ids=["parked", "in blocks"])
def test_one_that_was_wrapped_in_parts_is_so_again_when_enabling_fails(
    plan: Any, planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, expected = wrapped_pipeline(granularity="part", prefetch=2)
    planned(plan)
    become = components.Component.become

    def ending(self: Any, *args: Any) -> None:
        become(self, *args)
        if self.name == "transformer_2":
            raise KeyboardInterrupt

    monkeypatch.setattr(components.Component, "become", ending)
    with pytest.raises(KeyboardInterrupt):
        enable(pipe, **ON_CPU)
    assert granularities(pipe) == ["part"] * 2
    assert units(pipe) == PARTS
    assert [offloader(expert).prefetch for expert in experts(pipe)] == [2, 2]
    assert torch.equal(KIND.run(pipe), expected)


def test_one_that_nothing_was_decided_about_stays_in_parts_when_disabled(planned) -> None:
    planned(lambda workload: PARTED if workload is None or workload.height < 64 else PARKING)
    pipe, expected = wrapped_pipeline(granularity="part")
    before = [offloader(expert) for expert in experts(pipe)]
    enable(pipe, **ON_CPU)
    disable(pipe)
    assert [offloader(expert) for expert in experts(pipe)] == before
    assert torch.equal(KIND.run(pipe.to("cpu")), expected)


# From files.


@pytest.mark.parametrize("host", ["pinned", "disk"])
def test_a_pipeline_is_read_in_parts(saved: Any, host: str, planned) -> None:
    planned(PARTED)
    ours = load_it(saved("a14b"), host=host)
    assert granularities(ours) == ["part"] * 2
    assert set(offloader(ours.transformer).tiers) == {host}
    assert torch.equal(KIND.run(ours), KIND.run(ordinary(saved("a14b"))))


def test_cache_files_are_taken_in_blocks_or_parts_as_they_are(saved: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"cache": tmp_path, "mode": "memory", **STREAM}
    folder = saved("a14b")
    expected = KIND.run(ordinary(folder))
    written = load_it(folder, granularity="part", **options)
    assert granularities(written) == ["part"] * 2
    for asked in (None, "auto"):
        again = load_it(folder, granularity=asked, **{**options, "mode": "auto"})
        assert granularities(again) == ["part"] * 2
        assert enabled_of(again).plan.reasons["granularity"] == "chosen"
        assert torch.equal(KIND.run(again), expected)
    with pytest.raises(CacheFileError, match="does not fit"):
        load_it(folder, granularity="block", **options)
