"""enable on transformers that are wrapped already: they are taken over as they are."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import wanoffload
from tests.poison import poisoned_homes
from tests.small_models import MODELS, forward
from tests.small_pipelines import PIPELINES
from tests.test_pipeline import (
    CALL,
    HERE,
    PARKING,
    PLANS,
    STANDING,
    STREAMING,
    StandIn,
    at_home,
    check_work,
    enabled_of,
    planned,
    treatments,
    values,
)
from wanoffload import PipelineError, disable, enable, offloader, wrap, wrapping
from wanoffload.hooks import attached
from wanoffload.host_tensor import HostTensor
from wanoffload.pipelines import acting, components
from wanoffload.pipelines.components import STREAMED, Treatment
from wanoffload.pipelines.enabling import plan_of, with_own_weights

__all__ = ["planned", "poisoned_homes"]

ON_CPU = {"hardware": HERE, "device": "cpu"}


def experts(pipe: Any) -> list[nn.Module]:
    return [pipe.transformer, pipe.transformer_2]


def wrapped_pipeline(name: str = "a14b", **options: Any) -> tuple[Any, torch.Tensor]:
    """With every transformer wrapped, and its video before."""
    kind = PIPELINES[name]
    pipe = kind.make()
    expected = kind.run(pipe)
    for part, module in pipe.components.items():
        if part.startswith("transformer") and module is not None:
            wrap(module, **{"device": "cpu", **options})
            offloader(module).poison_slots()
    return pipe, expected


def images(module: nn.Module) -> list[int]:
    return [binding.image.address for binding in offloader(module).bindings]


@pytest.mark.usefixtures("poisoned_homes")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["t2v", "a14b", "low_noise_only", "vace", "qwen_image"])
def test_the_video_is_that_of_the_resident_pipeline(name: str, plan: str, planned) -> None:
    pipe, expected = wrapped_pipeline(name)
    truth = values(pipe)
    planned(PLANS[plan])
    enable(pipe, **ON_CPU)
    for _ in range(2):
        assert torch.equal(PIPELINES[name].run(pipe), expected)
        assert at_home(pipe)
    if plan != "sharded":
        check_work(pipe, PLANS[plan])
    assert all(torch.equal(value, truth[key]) for key, value in values(pipe).items())
    disable(pipe)
    assert torch.equal(PIPELINES[name].run(pipe), expected)


def test_streamed_it_keeps_runtime_and_images_and_takes_turns(planned) -> None:
    pipe, _ = wrapped_pipeline(host="pageable", verify=True)
    before = [(offloader(expert), images(expert)) for expert in experts(pipe)]
    planned(STREAMING)
    enable(pipe, **ON_CPU)
    assert [(offloader(expert), images(expert)) for expert in experts(pipe)] == before
    for runtime, _ in before:
        assert runtime.paused
        assert runtime.verify
        assert runtime.tiers == ["pageable"] * len(runtime.tiers)
        assert runtime.prefetch == 1  # what the plan says
    PIPELINES["a14b"].run(pipe)
    assert at_home(pipe)
    disable(pipe)
    for expert in experts(pipe):
        assert attached(expert) is None
        assert not any(isinstance(p, HostTensor) for p in expert.parameters())


def real_plan(pipe: Any, **choices: Any) -> Any:
    enable(pipe, "manual", **ON_CPU, dit_layerwise_offload=True, **choices)
    return plan_of(pipe)


@pytest.mark.parametrize(
    ("wrapped", "chosen", "taken"),
    [(3, None, 3), (2, None, 2), (0, None, 1), (3, 1, 1), (0, 2, 2)],
)
def test_its_prefetch_counts_as_chosen_unless_one_is_chosen(
    wrapped: int, chosen: int | None, taken: int, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, expected = wrapped_pipeline(prefetch=wrapped)
    with caplog.at_level(logging.INFO, "wanoffload"):
        plan = real_plan(pipe, dit_offload_prefetch_size=chosen)
    assert plan.dit_offload_prefetch_size == taken
    assert plan.reasons["dit_offload_prefetch_size"] == "chosen"
    said = f"dit_offload_prefetch_size is {wrapped}: transformers were wrapped so"
    assert (said in caplog.text) == (chosen is None)
    assert [offloader(expert).prefetch for expert in experts(pipe)] == [taken, taken]
    assert torch.equal(PIPELINES["a14b"].run(pipe), expected)


def test_of_two_prefetches_the_larger_is_taken() -> None:
    pipe, _ = wrapped_pipeline(prefetch=1)
    wanoffload.unwrap(pipe.transformer_2)
    wrap(pipe.transformer_2, prefetch=3, device="cpu")
    assert real_plan(pipe).dit_offload_prefetch_size == 3
    assert [offloader(expert).prefetch for expert in experts(pipe)] == [3, 3]


@pytest.mark.parametrize("plan", [PARKING, STANDING], ids=["parked", "resident"])
def test_where_the_plan_does_not_stream_it_it_is_unwrapped(plan: StandIn, planned) -> None:
    pipe, _ = wrapped_pipeline()
    planned(plan)
    enable(pipe, **ON_CPU)
    assert [attached(expert) for expert in experts(pipe)] == [None, None]


def by_height(workload: Any) -> StandIn:
    if workload is None or workload.height == 32:
        return STREAMING
    return PARKING if workload.height == 48 else replace(STREAMING, dit_offload_prefetch_size=2)


@pytest.mark.usefixtures("poisoned_homes")
def test_what_waits_for_the_size_stays_as_it_was_found_until_the_call(planned) -> None:
    kind = PIPELINES["a14b"]
    pipe, expected = wrapped_pipeline()
    larger = kind.run(kind.make(), height=48)
    runtime = offloader(pipe.transformer)
    planned(by_height)
    enable(pipe, **ON_CPU)
    assert treatments(pipe)["transformer"] == "as found"
    assert not runtime.paused
    assert torch.equal(kind.run(pipe), expected)
    assert offloader(pipe.transformer) is runtime
    assert treatments(pipe)["transformer"] == STREAMED
    assert torch.equal(kind.run(pipe, height=48), larger)
    assert attached(pipe.transformer) is None
    assert torch.equal(kind.run(pipe), expected)
    assert enabled_of(pipe).components["transformer"].treatment == Treatment(STREAMED, 1)


def test_one_that_nothing_was_decided_about_stays_wrapped_when_disabled(planned) -> None:
    pipe, expected = wrapped_pipeline()
    planned(by_height)
    runtime = offloader(pipe.transformer)
    disable(enable(pipe, **ON_CPU))
    assert offloader(pipe.transformer) is runtime
    pipe.transformer_2 = wanoffload.unwrap(pipe.transformer_2)
    assert torch.equal(PIPELINES["a14b"].run(pipe), expected)


@pytest.mark.parametrize("failing", ["text_encoder", "transformer", "transformer_2"])
@pytest.mark.parametrize("plan", [STREAMING, PARKING], ids=["streamed", "parked"])
@pytest.mark.parametrize("host", ["pinned", "pageable"])
def test_what_fails_on_the_way_leaves_it_wrapped_as_it_was(
    host: str, plan: StandIn, failing: str, planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, expected = wrapped_pipeline(prefetch=3, verify=True, host=host)
    before = [offloader(expert) for expert in experts(pipe)]
    planned(plan)
    become = components.Component.become

    def ending(self: Any, *args: Any) -> None:
        become(self, *args)
        if self.name == failing:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(components.Component, "become", ending)
        with pytest.raises(KeyboardInterrupt):
            enable(pipe, **ON_CPU)
    now = [offloader(expert) for expert in experts(pipe)]
    assert (now == before) == (plan is STREAMING or failing == "text_encoder")
    for runtime in now:
        assert (runtime.prefetch, runtime.verify) == (3, True)
        assert runtime.tiers == [host] * len(runtime.tiers)
        assert runtime.before_forward is None
    assert torch.equal(PIPELINES["a14b"].run(pipe), expected)
    enable(pipe, **ON_CPU)
    assert torch.equal(PIPELINES["a14b"].run(pipe), expected)


def test_what_can_not_be_taken_over_is_named(planned) -> None:
    planned(STREAMING)
    pipe, _ = wrapped_pipeline()
    offloader(pipe.transformer_2).close()
    with pytest.raises(
        PipelineError, match=r"transformer_2 .* wrapped already, and closed.*unwrap"
    ):
        enable(pipe, **ON_CPU)
    pipe, _ = wrapped_pipeline()
    pipe.transformer.blocks[1] = pipe.transformer_2.blocks[1]
    with pytest.raises(PipelineError, match=r"transformer .* was changed since .* blocks"):
        enable(pipe, **ON_CPU)
    pipe, _ = wrapped_pipeline()
    other = type(pipe)(**pipe.components)
    enable(pipe, **ON_CPU)
    with pytest.raises(PipelineError, match=r"enabled already, .* in another pipeline"):
        enable(other, **ON_CPU)
    other.text_encoder = other.vae = None
    with pytest.raises(PipelineError, match=r"is streamed by another pipeline that is enabled"):
        enable(other, **ON_CPU)
    pipe = PIPELINES["t2v"].make()
    runtime = offloader(wrap(pipe.transformer, device="cpu"))
    runtime.device = torch.device("cuda", 1)
    with pytest.raises(PipelineError, match=r"wrapped already, for cuda:1 and not for cpu"):
        enable(pipe, **ON_CPU)
    runtime.device = torch.device("cpu")
    assert attached(pipe.transformer) is runtime
    enable(pipe, **ON_CPU)


@pytest.mark.parametrize("granularity", ["block", "part"])
def test_slots_that_wrapped_transformers_hold_count_as_room(granularity: str) -> None:
    machine = replace(HERE, device_memory=1000)
    pipe, _ = wrapped_pipeline("t2v", granularity=granularity)
    runtime = offloader(pipe.transformer)
    assert with_own_weights(machine, [pipe.transformer]).device_memory == 1000
    runtime.device = torch.device("cuda", 0)  # as far as anybody asks
    slots = runtime.stats().slot_bytes
    assert with_own_weights(machine, [pipe.transformer]).device_memory == 1000 + slots > 1000
    runtime.device = torch.device("cpu")


def test_a_transformer_alone_is_taken_over_too() -> None:
    model, inputs = MODELS["wan22_5b"]()
    expected = forward(model, inputs)
    runtime = offloader(wrap(model, prefetch=1, device="cpu"))
    enable(model, **ON_CPU, dit_layerwise_offload=True)
    assert offloader(model) is runtime
    assert plan_of(model).dit_offload_prefetch_size == 1
    assert torch.equal(forward(model, inputs), expected)
    disable(model)
    assert attached(model) is None
    wrap(model, device="cpu")
    enable(model, "manual", **ON_CPU)
    assert attached(model) is None
    assert torch.equal(forward(model, inputs), expected)


def test_no_byte_of_what_is_taken_over_moves(planned, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar(acting.tqdm):  # type: ignore[name-defined, misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            bars.append(self)

    pipe = PIPELINES["t2v"].make()
    wrap(pipe.transformer, device="cpu")
    monkeypatch.setattr(acting, "tqdm", Bar)
    monkeypatch.setattr(wrapping.OwnTensors, "write", None)  # calling it would fail
    planned(StandIn(True, False, 2, ["dit"]))
    enable(pipe, workload=CALL, **ON_CPU)
    assert bars[0].n == bars[0].total == 0
    assert treatments(pipe)["transformer"] == STREAMED
