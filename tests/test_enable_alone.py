"""enable and disable on a transformer alone: decided at once, and run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import wanoffload
from tests.small_models import MODELS, forward
from tests.small_pipelines import PIPELINES
from wanoffload import Hardware, PipelineError, Plan
from wanoffload.facts.look import look
from wanoffload.hooks import attached
from wanoffload.pipelines import enabling
from wanoffload.pipelines.enabling import plan_of, with_own_weights
from wanoffload.policy import cost

KINDS = ["wan22_5b", "qwen_image"]


@pytest.fixture(autouse=True)
def on(device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test on both devices; by itself enable() takes the GPU where there is one."""
    if device == "cpu":
        monkeypatch.setattr(enabling, "resolve_device", lambda _: torch.device("cpu"))
    return device


def card(device_memory: str) -> Hardware:
    return Hardware(device_memory=device_memory, host_memory="64GiB", platform="cuda")


def enabled(
    kind: str, device: str, hardware: Hardware, **choices: Any
) -> tuple[Any, Any, torch.Tensor]:
    """An enabled model, its inputs, and what it gave before on the same device."""
    model, _ = MODELS[kind]()
    inputs = MODELS[kind].inputs(device)
    expected = forward(model.to(device), inputs)
    wanoffload.enable(model.to("cpu"), hardware=hardware, **choices)
    return model, inputs, expected


def check_streamed(model: Any, inputs: Any, expected: torch.Tensor) -> Plan:
    """Runs it, and looks whether every block was fetched."""
    runtime = wanoffload.offloader(model)
    runtime.reset_stats()
    assert torch.equal(forward(model, inputs), expected)
    assert runtime.stats().acquires == runtime.stats().units > 1
    return plan_of(model)


@pytest.mark.parametrize("kind", KINDS)
def test_both_flags_chosen_stream_it_and_both_stay_on(kind: str, on: str) -> None:
    both = {"dit_cpu_offload": True, "dit_layerwise_offload": True}
    plan = check_streamed(*enabled(kind, on, card("80GiB"), **both))
    assert (plan.dit_cpu_offload, plan.dit_layerwise_offload) == (True, True)
    assert plan.layerwise_offload_components == ["dit"]


@pytest.mark.parametrize("kind", KINDS)
def test_with_nothing_chosen_it_is_streamed_where_it_does_not_fit(kind: str, on: str) -> None:
    dit = look(MODELS[kind]()[0]).dits[0]
    a_byte_less = Hardware(device_memory=dit.bytes + cost.RESERVE_BYTES - 1, host_memory="64GiB")
    plan = check_streamed(*enabled(kind, on, a_byte_less))
    assert "does not fit" in plan.reasons["dit_layerwise_offload"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_fits_stays_as_it_is_with_nothing_chosen(kind: str, on: str) -> None:
    model, inputs, expected = enabled(kind, on, card("80GiB"))
    assert attached(model) is None
    assert torch.equal(forward(model, inputs), expected)


def test_one_that_is_run_as_a_whole_comes_with_its_forward(on: str) -> None:
    model, inputs, expected = enabled("wan22_5b", on, card("80GiB"), dit_cpu_offload=True)
    assert not plan_of(model).dit_layerwise_offload
    assert torch.equal(forward(model, inputs), expected)
    assert torch.equal(forward(model, inputs), expected)


@pytest.mark.parametrize(
    "choices", [{}, {"dit_cpu_offload": True}, {"dit_layerwise_offload": True}]
)
def test_disabled_it_is_an_ordinary_module_that_can_be_enabled_again(choices: Any, on: str) -> None:
    model, inputs, expected = enabled("wan22_5b", on, card("80GiB"), **choices)
    names = set(model.__dict__)
    assert wanoffload.disable(model) is model
    assert attached(model) is None
    assert torch.equal(forward(model.to(on), inputs), expected)
    wanoffload.enable(model.to("cpu"), hardware=card("80GiB"), **choices)
    assert set(model.__dict__) == names
    assert torch.equal(forward(model, inputs), expected)


def test_a_copy_is_an_ordinary_module(on: str) -> None:
    model, inputs, expected = enabled("wan22_5b", on, card("80GiB"), dit_layerwise_offload=True)
    again = copy.deepcopy(model)
    with pytest.raises(PipelineError, match="not enabled"):
        wanoffload.disable(again)
    assert torch.equal(forward(again.to(on), inputs), expected)


def test_enabling_twice_is_an_error_that_says_what_to_do(on: str) -> None:
    model, _, _ = enabled("wan22_5b", on, card("80GiB"))
    with pytest.raises(PipelineError, match=r"enabled already.*disable"):
        wanoffload.enable(model, hardware=card("80GiB"))
    pipe = PIPELINES["t2v"].make()
    wanoffload.enable(pipe.transformer, hardware=card("80GiB"))
    with pytest.raises(PipelineError, match=r"enabled already, by itself.*disable"):
        wanoffload.enable(pipe, hardware=card("80GiB"))
    with pytest.raises(PipelineError, match="a transformer"):
        wanoffload.enable("Wan-AI/Wan2.2-T2V-A14B-Diffusers")


def test_what_the_model_holds_already_counts_as_room(on: str) -> None:
    model, _ = MODELS["wan22_5b"]()
    model.to(on)
    total = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    machine = with_own_weights(Hardware(device_memory=1000, host_memory=100), [model])
    on_device = total if on == "cuda" else 0
    assert machine.device_memory == 1000 + on_device
    assert machine.host_memory == 100 + total - on_device
    assert with_own_weights(Hardware(), [model]) == Hardware()
