"""enable and disable: every kind of pipeline, in every treatment, makes the resident's video."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from torch import Tensor, nn

import wanoffload
from tests.poison import poisoned_homes
from tests.small_pipelines import FRAMES, PIPELINES, SIDE
from wanoffload import (
    DeviceMemoryError,
    Hardware,
    HostMemoryError,
    MoveError,
    PipelineError,
    Workload,
    hooks,
    wrapping,
)
from wanoffload.facts.model import ModelFacts
from wanoffload.forward_thread import ForwardThread
from wanoffload.pipelines import acting, components, enabling, tenancy
from wanoffload.pipelines.acting import Enabled
from wanoffload.pipelines.components import (
    PARKED,
    RESIDENT,
    STREAMED,
    UNTOUCHED,
    Treatment,
    find_stack,
)
from wanoffload.pipelines.enabled_class import state, workload_of
from wanoffload.pipelines.enabling import disable, enable, plan_of
from wanoffload.pipelines.parking import Parked
from wanoffload.pipelines.tenancy import Floor
from wanoffload.runtime import Offloader

__all__ = ["poisoned_homes"]

ALL = ["dit", "text_encoder", "image_encoder", "vae"]
HERE = Hardware(device_memory="80GiB", host_memory="64GiB", platform="cpu")
CALL = Workload(height=SIDE, width=SIDE, frames=FRAMES, steps=2, guidance=3.0)


@dataclass(frozen=True)
class StandIn:
    """A plan without its making: the attributes that are acted on."""

    dit_layerwise_offload: bool = False
    dit_cpu_offload: bool = False
    dit_offload_prefetch_size: int | None = None
    layerwise_offload_components: list[str] = field(default_factory=list)
    text_encoder_cpu_offload: bool = False
    image_encoder_cpu_offload: bool = False
    vae_cpu_offload: bool = False
    use_fsdp_inference: bool = False
    pack_share: float | None = None
    budget_of_one: int | str | None = None
    residents_stay: bool = True
    granularity: str = "block"
    step_seconds: float | None = None
    host_locked_bytes: int | None = None
    fits: bool = True
    messages: tuple[str, ...] = ()
    facts: ModelFacts = field(default_factory=ModelFacts)
    rates: tuple[Any, ...] = ()


STREAMING = StandIn(True, False, 1, ALL)
PARKING = StandIn(False, True, None, [], True, True, True)
STANDING = StandIn()
PLANS = {
    "streamed": STREAMING,
    "parked": PARKING,
    "resident": STANDING,
    "both flags": StandIn(True, True, 2, ["dit"], vae_cpu_offload=True),
    "encoders streamed": StandIn(False, True, None, ALL[1:]),
    "sharded": StandIn(use_fsdp_inference=True),
}

Decide = Callable[[Workload | None], StandIn]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[[Decide | StandIn], None]:
    """Puts a plan, or a rule that makes plans from workloads, in the place of deciding."""

    def put(plan: Decide | StandIn) -> None:
        rule = plan if callable(plan) else lambda _: plan
        monkeypatch.setattr(acting, "decide", lambda model, workload, *_: rule(workload))

    return put


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests without the mark run on the host backend, also where there is a GPU."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(enabling, "resolve_device", lambda _: torch.device("cpu"))


@pytest.fixture(autouse=True)
def _slots_are_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every streamed block's slot holds NaN before it is filled."""
    stream = wrapping.stream

    def poisoning(*args: Any, **kwargs: Any) -> Any:
        runtime = stream(*args, **kwargs)
        runtime.poison_slots()
        return runtime

    monkeypatch.setattr(wrapping, "stream", poisoning)


def treatments(pipe: Any) -> dict[str, str]:
    enabled = state(pipe)
    assert enabled is not None
    return {
        name: component.treatment.kind if component.treatment else "as found"
        for name, component in enabled.components.items()
    }


def enabled_of(pipe: Any) -> Enabled:
    enabled = state(pipe)
    assert enabled is not None
    return enabled


def at_home(pipe: Any) -> bool:
    """Nobody stands on the device: no slots, nothing parked is in use."""
    enabled = enabled_of(pipe)
    parts = enabled.components.values()
    return (
        enabled.floor.tenant is None
        and not any(c.parked.in_use for c in parts if c.parked)
        and not any(c.runtime.stats().slot_bytes for c in parts if c.runtime)
    )


def values(pipe: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, component in pipe.components.items()
        if isinstance(component, nn.Module)
        for key, value in component.state_dict().items()
    }


def entries(pipe: Any) -> dict[str, set[str]]:
    """The attributes of every module, to see what was left behind."""
    return {
        f"{name}.{key}": set(vars(module))
        for name, component in pipe.components.items()
        if isinstance(component, nn.Module)
        for key, module in component.named_modules()
    }


@pytest.mark.usefixtures("poisoned_homes")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", PIPELINES)
def test_the_video_is_that_of_the_resident_pipeline(name: str, plan: str, planned) -> None:
    kind = PIPELINES[name]
    pipe = kind.make()
    expected = kind.run(pipe)
    truth, attributes, base = values(pipe), entries(pipe), type(pipe)
    planned(PLANS[plan])
    assert enable(pipe, hardware=HERE) is pipe
    assert isinstance(pipe, base)
    for _ in range(2):
        assert torch.equal(kind.run(pipe), expected)
        assert at_home(pipe)
    check_work(pipe, PLANS[plan])
    assert all(torch.equal(value, truth[key]) for key, value in values(pipe).items())

    assert disable(pipe) is pipe
    assert type(pipe) is base
    assert entries(pipe) == attributes
    assert torch.equal(kind.run(pipe), expected)


WHOLE, HERE_ALWAYS, NOT_OURS = Treatment(PARKED), Treatment(RESIDENT), Treatment(UNTOUCHED)


@pytest.mark.parametrize(
    ("plan", "dit", "text", "image", "vae"),
    [
        (STREAMING, Treatment(STREAMED, 1), *[Treatment(STREAMED, 2)] * 2, WHOLE),
        (PARKING, WHOLE, WHOLE, WHOLE, WHOLE),
        (STANDING, *[HERE_ALWAYS] * 4),
        (PLANS["both flags"], Treatment(STREAMED, 2), HERE_ALWAYS, HERE_ALWAYS, WHOLE),
        (PLANS["encoders streamed"], WHOLE, *[Treatment(STREAMED, 2)] * 2, WHOLE),
        (PLANS["sharded"], NOT_OURS, *[HERE_ALWAYS] * 3),
        (StandIn(vae_cpu_offload=True), *[HERE_ALWAYS] * 3, WHOLE),
        (StandIn(text_encoder_cpu_offload=True), HERE_ALWAYS, WHOLE, *[HERE_ALWAYS] * 2),
        (StandIn(image_encoder_cpu_offload=True), *[HERE_ALWAYS] * 2, WHOLE, HERE_ALWAYS),
    ],
)
def test_what_a_plan_means_for_each_component(
    plan: StandIn, dit: Treatment, text: Treatment, image: Treatment, vae: Treatment
) -> None:
    expected = {"transformer": dit, "transformer_2": dit, "text_encoder": text}
    expected |= {"image_encoder": image, "vae": vae, "watermarker": HERE_ALWAYS}
    assert {name: components.treatment(plan, name) for name in expected} == expected


def check_work(pipe: Any, plan: StandIn) -> None:
    """After two calls: each component was treated as the plan says, and really so."""
    for name, component in enabled_of(pipe).components.items():
        now = component.treatment
        assert now is not None
        assert now == components.treatment(plan, name)
        dit = name.startswith("transformer")
        streamed = now.kind == STREAMED
        assert (component.runtime is not None) == streamed
        if component.runtime is not None:
            stats = component.runtime.stats()
            assert stats.forwards >= 2
            assert stats.acquires == stats.forwards * stats.units
            assert stats.bytes_fetched >= stats.host_bytes
        assert (component.parked is not None) == (now.kind == PARKED or (streamed and not dit))
        if component.parked is not None:
            assert component.parked.bytes_brought >= 2 * component.parked._images[0].layout.nbytes


def test_each_part_of_an_encoder_moves_in_its_own_way() -> None:
    pipe = PIPELINES["i2v"].make()
    assert find_stack(pipe.text_encoder) is pipe.text_encoder.encoder
    qwen = PIPELINES["qwen_image"].make().text_encoder
    assert find_stack(qwen) is qwen.model.language_model
    stack = find_stack(pipe.image_encoder)
    assert stack is not None
    assert stack.layers is not None
    assert find_stack(pipe.vae) is None


def test_an_encoder_whose_blocks_are_little_moves_as_a_whole(planned) -> None:
    pipe = PIPELINES["t2v"].make()
    expected = PIPELINES["t2v"].run(pipe)
    shared = pipe.text_encoder.shared
    shared.weight = nn.Parameter(shared.weight.repeat(20, 1), requires_grad=False)
    pipe.text_encoder.encoder.embed_tokens.weight = shared.weight
    planned(STREAMING)
    enable(pipe, hardware=HERE)
    component = enabled_of(pipe).components["text_encoder"]
    assert component.runtime is None
    assert component.parked is not None
    assert torch.equal(PIPELINES["t2v"].run(pipe), expected)


@pytest.mark.parametrize("missing", ["text_encoder", "vae"])
@pytest.mark.parametrize("plan", [STREAMING, PARKING], ids=["streamed", "parked"])
def test_a_missing_component_is_no_trouble(missing: str, plan: StandIn, planned) -> None:
    kind = PIPELINES["t2v"]
    pipe = kind.make()
    changes: dict[str, Any] = {"output_type": "latent"}
    with torch.no_grad():
        prompt, negative = pipe.encode_prompt("waves", "blurry", max_sequence_length=16)
    changes |= {"prompt": None, "prompt_embeds": prompt}
    changes |= {"negative_prompt": None, "negative_prompt_embeds": negative}
    expected = kind.run(pipe, **changes)
    parts = {name: part for name, part in pipe.components.items() if name != missing}
    pipe = WanPipeline(**{**parts, missing: None})
    planned(plan)
    enable(pipe, hardware=HERE)
    assert torch.equal(kind.run(pipe, **changes), expected)


def test_a_component_taken_away_later_is_let_go(planned) -> None:
    kind = PIPELINES["t2v"]
    pipe = kind.make()
    expected = kind.run(pipe, output_type="latent")
    planned(STREAMING)
    enable(pipe, hardware=HERE)
    with torch.no_grad():
        prompt, negative = pipe.encode_prompt(
            kind.call()["prompt"], "blurry", max_sequence_length=16
        )
    encoder, pipe.text_encoder = pipe.text_encoder, None
    embeds = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
    none = {"prompt": None, "negative_prompt": None, "output_type": "latent"}
    assert torch.equal(kind.run(pipe, **embeds, **none), expected)
    assert "text_encoder" not in treatments(pipe)
    assert not tenancy.installed(encoder)
    disable(pipe)
    pipe.text_encoder = encoder
    assert torch.equal(kind.run(pipe, output_type="latent"), expected)
    enable(pipe, hardware=HERE)
    assert torch.equal(kind.run(pipe, output_type="latent"), expected)


def test_a_replaced_or_unwrapped_component_is_refused(planned) -> None:
    kind = PIPELINES["t2v"]
    pipe = kind.make()
    planned(STREAMING)
    enable(pipe, hardware=HERE)
    vae = pipe.vae
    pipe.vae = AutoencoderKLWan(base_dim=4, z_dim=16)
    with pytest.raises(PipelineError, match="vae was replaced"):
        kind.run(pipe)
    pipe.vae = vae
    wanoffload.unwrap(pipe.transformer)
    with pytest.raises(PipelineError, match="transformer was unwrapped"):
        kind.run(pipe)
    disable(pipe)
    kind.run(pipe)


@pytest.mark.usefixtures("poisoned_homes")
@pytest.mark.parametrize("plan", [STREAMING, PARKING], ids=["streamed", "parked"])
def test_prompts_are_encoded_twice_and_the_encoder_goes_home_each_time(
    plan: StandIn, planned
) -> None:
    pipe = PIPELINES["t2v"].make()
    with torch.no_grad():
        expected = pipe.encode_prompt("waves", "blurry", max_sequence_length=16)
    planned(plan)
    enable(pipe, hardware=HERE)
    component = enabled_of(pipe).components["text_encoder"]
    brought = []
    for _ in range(2):
        with torch.no_grad():
            found = pipe.encode_prompt("waves", "blurry", max_sequence_length=16)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert at_home(pipe)
        brought.append(component.parked.bytes_brought)
    assert brought[1] == 2 * brought[0] > 0


class Stop(Exception):
    pass


@pytest.mark.usefixtures("poisoned_homes")
@pytest.mark.parametrize("where", ["callback", "block", "vae", "text_encoder"])
@pytest.mark.parametrize("plan", [STREAMING, PARKING], ids=["streamed", "parked"])
def test_a_call_may_end_anywhere_and_the_next_one_is_right(
    plan: StandIn, where: str, planned
) -> None:
    kind = PIPELINES["a14b"]
    pipe = kind.make()
    expected = kind.run(pipe)
    planned(plan)
    enable(pipe, hardware=HERE)

    def stop(*_: Any) -> None:
        raise Stop

    changes: dict[str, Any] = {}
    part: nn.Module = pipe.transformer.blocks[1]
    if where == "callback":
        changes["callback_on_step_end"] = stop
    elif where == "vae":
        part = pipe.vae.decoder.mid_block
    elif where == "text_encoder":
        part = pipe.text_encoder.encoder.block[1]
    handle = part.register_forward_hook(stop)
    with pytest.raises(Stop):
        kind.run(pipe, **changes)
    handle.remove()
    assert at_home(pipe)
    assert torch.equal(kind.run(pipe), expected)


BEGINNING, END = "beginning", "end"


@pytest.mark.parametrize("call", [0, 1, -1])
@pytest.mark.parametrize("where", [BEGINNING, END])
@pytest.mark.parametrize(
    ("plan", "kind", "name"),
    [
        (STREAMING, Offloader, "end_forward"),
        (STREAMING, ForwardThread, "leave"),
        (STREAMING, Offloader, "pause"),
        (replace(STREAMING, budget_of_one=1 << 30), Offloader, "pause"),
        (replace(STREAMING, budget_of_one=1 << 30), Offloader, "resume"),
        (STREAMING, Floor, "enter"),
        (STREAMING, Floor, "clear"),
        (STREAMING, Parked, "bring_in"),
        (STREAMING, Parked, "send_home"),
        (PARKING, Floor, "clear"),
        (PARKING, Parked, "bring_in"),
        (PARKING, Parked, "send_home"),
    ],
)
def test_the_call_after_an_interrupt_is_right(
    plan: StandIn, kind: type, name: str, where: str, call: int, planned
) -> None:
    """An interrupt between the lines of what moves weights, at its first call, second and last."""
    small = PIPELINES["a14b"]
    pipe = small.make()
    planned(plan)
    enable(pipe, hardware=HERE)
    original, calls, at = getattr(kind, name), [], [-1]

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        if where == BEGINNING and len(calls) == at[0]:
            raise KeyboardInterrupt
        result = original(self, *args, **kwargs)
        if where == END and len(calls) == at[0]:
            raise KeyboardInterrupt
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, name, counting)
        expected = small.run(pipe)
        at[0] = range(1, len(calls) + 1)[call]
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            small.run(pipe)
    assert torch.equal(small.run(pipe), expected)
    assert at_home(pipe)
    disable(pipe)
    assert torch.equal(small.run(pipe), expected)


def test_a_disable_that_is_interrupted_anywhere_can_be_called_again(planned) -> None:
    kind = PIPELINES["t2v"]
    pipe = kind.make()
    expected = kind.run(pipe)
    planned(STREAMING)
    enable(pipe, hardware=HERE)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(enabling, "ordinary_class", interrupt)
        with pytest.raises(KeyboardInterrupt):
            disable(pipe)
    with pytest.raises(PipelineError, match="not enabled"):
        disable(pipe)
    assert torch.equal(kind.run(pipe), expected)
    enable(pipe, hardware=HERE)
    assert torch.equal(kind.run(pipe), expected)


def test_one_component_at_a_time_stands_on_the_device(planned) -> None:
    """The order of tenants of a call, and that each leaves before the next comes."""
    kind = PIPELINES["a14b"]
    pipe = kind.make()
    planned(replace(STREAMING, dit_offload_prefetch_size=0))
    enable(pipe, hardware=HERE)
    enabled = enabled_of(pipe)
    floor, seen = enabled.floor, []
    held = {
        name: lambda c=c: (
            bool(c.parked and c.parked.in_use) or bool(c.runtime and c.runtime.stats().slot_bytes)
        )
        for name, c in enabled.components.items()
    }

    def look(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            assert {other for other in held if held[other]()} == {name}
            seen.append(name)

        return hook

    pipe.text_encoder.encoder.block[0].register_forward_hook(look("text_encoder"))
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).blocks[2].register_forward_hook(look(name))
    pipe.vae.decoder.mid_block.register_forward_hook(look("vae"))
    kind.run(pipe)
    assert list(dict.fromkeys(seen)) == ["text_encoder", "transformer", "transformer_2", "vae"]
    assert seen.count("text_encoder") == 2
    assert floor.tenant is None


def _lora(folder: Path, pipe: Any) -> str:
    from safetensors.torch import save_file

    state = {}
    draw = torch.Generator().manual_seed(3)
    for i, block in enumerate(pipe.transformer.blocks):
        for layer in ("to_q", "to_v"):
            weight = getattr(block.attn1, layer).weight
            key = f"transformer.blocks.{i}.attn1.{layer}"
            state[f"{key}.lora_A.weight"] = torch.randn(2, weight.shape[1], generator=draw)
            state[f"{key}.lora_B.weight"] = torch.randn(weight.shape[0], 2, generator=draw)
    save_file(state, folder / "lora.safetensors")
    return str(folder / "lora.safetensors")


@pytest.mark.usefixtures("poisoned_homes")
@pytest.mark.parametrize("plan", [STREAMING, PARKING, STANDING], ids=str)
def test_a_lora_loaded_after_enable_counts(plan: StandIn, planned, tmp_path: Path) -> None:
    kind = PIPELINES["t2v"]
    pipe = kind.make()
    plain = kind.run(pipe)
    path = _lora(tmp_path, pipe)
    pipe.load_lora_weights(path)
    with_lora = kind.run(pipe)
    assert not torch.equal(plain, with_lora)

    pipe = kind.make()
    planned(plan)
    enable(pipe, hardware=HERE)
    assert torch.equal(kind.run(pipe), plain)
    before = treatments(pipe)
    pipe.load_lora_weights(path)
    assert treatments(pipe) == before
    for _ in range(2):
        assert torch.equal(kind.run(pipe), with_lora)
    pipe.disable_lora()
    assert torch.equal(kind.run(pipe), plain)
    pipe.enable_lora()
    pipe.fuse_lora()
    fused = kind.run(pipe)
    assert not torch.equal(fused, plain)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    disable(pipe)
    assert type(pipe.transformer.blocks[0].attn1.to_q) is nn.Linear


# Deciding at the call.


def by_size(workload: Workload | None) -> StandIn:
    """Encoders never depend on the size; the DiT does."""
    large = workload is not None and workload.height >= 48
    return replace(STREAMING, dit_offload_prefetch_size=2) if large else PARKING_DIT


PARKING_DIT = StandIn(False, True, None, ALL[1:])


@pytest.mark.usefixtures("poisoned_homes")
def test_what_depends_on_the_size_is_decided_at_the_call(planned) -> None:
    kind = PIPELINES["t2v"]
    pipe = kind.make()
    small, large = kind.run(pipe), kind.run(pipe, height=48)
    planned(by_size)
    enable(pipe, hardware=HERE)
    others = {"text_encoder": STREAMED, "vae": PARKED}
    assert treatments(pipe) == {**others, "transformer": "as found"}
    kept = {name: enabled_of(pipe).components[name].parked for name in others}

    assert torch.equal(kind.run(pipe), small)
    assert treatments(pipe) == {**others, "transformer": PARKED}
    assert torch.equal(kind.run(pipe, height=48), large)
    assert treatments(pipe) == {**others, "transformer": STREAMED}
    assert plan_of(pipe) == by_size(replace(CALL, height=48))
    assert torch.equal(kind.run(pipe), small)
    assert treatments(pipe) == {**others, "transformer": PARKED}
    assert kept == {name: enabled_of(pipe).components[name].parked for name in others}


def test_another_prefetch_needs_no_new_images(planned) -> None:
    kind = PIPELINES["t2v"]
    pipe = kind.make()
    expected = kind.run(pipe)
    planned(lambda w: replace(STREAMING, dit_offload_prefetch_size=1 if w and w.steps == 2 else 0))
    enable(pipe, workload=None, hardware=HERE)
    kind.run(pipe)
    runtime = wanoffload.offloader(pipe.transformer)
    kind.run(pipe, num_inference_steps=3)
    assert wanoffload.offloader(pipe.transformer) is runtime
    assert (runtime.prefetch, runtime.residency.slots) == (0, 1)
    assert torch.equal(kind.run(pipe), expected)
    assert (runtime.prefetch, runtime.residency.slots) == (1, 2)


def test_a_given_workload_is_decided_about_once(planned) -> None:
    asked: list[Workload | None] = []

    def decide(workload: Workload | None) -> StandIn:
        asked.append(workload)
        return STREAMING

    kind = PIPELINES["t2v"]
    pipe = kind.make()
    planned(decide)
    enable(pipe, workload=CALL, hardware=HERE)
    kind.run(pipe)
    kind.run(pipe, height=48)
    assert asked == [CALL]


def test_a_plan_that_fails_at_a_call_leaves_the_pipeline_as_it_was(
    planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = PIPELINES["a14b"]
    pipe = kind.make()
    expected = kind.run(pipe)
    planned(by_size)
    enable(pipe, hardware=HERE)
    kind.run(pipe)
    before = treatments(pipe)
    stream = wrapping.stream

    def failing(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module is pipe.transformer_2:
            raise torch.OutOfMemoryError("no room")
        return stream(module, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(wrapping, "stream", failing)
        with pytest.raises(torch.OutOfMemoryError):
            kind.run(pipe, height=48)
    assert treatments(pipe) == before
    assert torch.equal(kind.run(pipe), expected)


def test_several_prompts_and_videos_for_each_are_counted() -> None:
    pipe = PIPELINES["t2v"].make()

    def videos(**changes: Any) -> int:
        arguments = {**PIPELINES["t2v"].call(), **changes}
        bound = inspect.signature(type(pipe).__call__).bind(pipe, **arguments)
        bound.apply_defaults()
        workload = workload_of(pipe, bound.arguments)
        assert workload is not None
        return workload.videos

    assert videos() == 1
    assert videos(prompt=["a", "b"]) == 2
    assert videos(prompt=["a", "b"], num_videos_per_prompt=3) == 6
    assert videos(prompt=None, prompt_embeds=torch.zeros(4, 8, 16)) == 4


def test_casting_a_streamed_encoder_is_refused_before_a_part_of_it_is_cast(planned) -> None:
    pipe = PIPELINES["t2v"].make()
    expected = PIPELINES["t2v"].run(pipe)
    before = {name: p.dtype for name, p in pipe.text_encoder.named_parameters()}
    planned(STREAMING)
    enable(pipe, hardware=HERE)
    with pytest.raises(MoveError, match=r"enabled pipeline.*disable"):
        pipe.text_encoder.to(torch.float64)
    assert {name: p.dtype for name, p in pipe.text_encoder.named_parameters()} == before
    assert torch.equal(PIPELINES["t2v"].run(pipe), expected)
    disable(pipe)
    assert next(pipe.text_encoder.to(torch.float64).parameters()).dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("t2v", {}, CALL),
        ("t2v", {"num_frames": 9, "guidance_scale": 1.0}, replace(CALL, frames=9, guidance=1.0)),
        ("animate", {}, replace(CALL, guidance=1.0)),
        ("qwen_image", {}, replace(CALL, frames=1)),
        ("qwen_image", {"negative_prompt": None}, replace(CALL, frames=1, guidance=1.0)),
        ("qwen_image", {"height": None, "width": None}, Workload(1024, 1024, 1, 2, 3.0)),
        ("qwen_image", {"sigmas": [1.0, 0.5, 0.2]}, replace(CALL, frames=1, steps=3)),
        ("t2v", {"height": "tall"}, None),
        ("t2v", {"num_inference_steps": 0}, None),
    ],
)
def test_the_size_is_read_from_the_call(
    name: str, changes: dict[str, Any], expected: Workload | None
) -> None:
    pipe = PIPELINES[name].make()
    arguments = {**PIPELINES[name].call(), **changes}
    bound = inspect.signature(type(pipe).__call__).bind(pipe, **arguments)
    bound.apply_defaults()
    if expected is not None and expected.height == 1024:
        expected = replace(
            expected,
            height=pipe.default_sample_size * pipe.vae_scale_factor,
            width=pipe.default_sample_size * pipe.vae_scale_factor,
        )
    assert workload_of(pipe, bound.arguments) == expected


def test_steps_are_measured_beside_their_prediction(planned) -> None:
    kind = PIPELINES["t2v"]
    pipe = kind.make()
    planned(replace(STREAMING, step_seconds=0.5))
    enable(pipe, hardware=HERE)
    kind.run(pipe)
    stats = wanoffload.offloader(pipe.transformer).stats()
    assert stats.predicted_step_seconds == 0.5
    assert stats.measured_step_seconds is not None
    assert 0 < stats.measured_step_seconds < 5
    disable(pipe)

    planned(replace(STREAMING, step_seconds=0.5))
    enable(pipe, workload=CALL, hardware=HERE)
    kind.run(pipe, height=48)  # not what was predicted
    stats = wanoffload.offloader(pipe.transformer).stats()
    assert (stats.predicted_step_seconds, stats.measured_step_seconds) == (None, None)
    kind.run(pipe)
    assert wanoffload.offloader(pipe.transformer).stats().measured_step_seconds is not None


def test_the_real_plan_of_a_small_pipeline_runs() -> None:
    kind = PIPELINES["a14b"]
    pipe = kind.make()
    expected = kind.run(pipe)
    machine = Hardware(device_memory="24GiB", host_memory="64GiB", platform="cuda")
    enable(pipe, "memory", hardware=machine)
    assert treatments(pipe)["text_encoder"] == STREAMED
    assert torch.equal(kind.run(pipe), expected)
    assert set(treatments(pipe).values()) == {STREAMED, PARKED}
    assert "rule 2" in plan_of(pipe).explain()
    disable(pipe)
    enable(pipe, "manual", hardware=machine, dit_cpu_offload=True)
    assert treatments(pipe)["transformer"] == PARKED
    assert torch.equal(kind.run(pipe), expected)


# Refusals.


def unchanged(pipe: Any, before: tuple[Any, ...]) -> bool:
    truth, attributes, ids, base = before
    return (
        type(pipe) is base
        and entries(pipe) == attributes
        and [id(p) for p in pipe.transformer.parameters()] == ids
        and all(torch.equal(v, truth[k]) for k, v in values(pipe).items())
    )


def snapshot(pipe: Any) -> tuple[Any, ...]:
    ids = [id(p) for p in pipe.transformer.parameters()]
    return values(pipe), entries(pipe), ids, type(pipe)


@pytest.mark.parametrize("failing", ["vae", "text_encoder", "transformer"])
@pytest.mark.parametrize("plan", [STREAMING, PARKING], ids=["streamed", "parked"])
def test_what_fails_on_the_way_leaves_the_pipeline_as_it_was(
    plan: StandIn, failing: str, planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = PIPELINES["t2v"]
    pipe = kind.make()
    expected = kind.run(pipe)
    truth, attributes, base = values(pipe), entries(pipe), type(pipe)
    planned(plan)
    become = components.Component.become

    def ending(self: Any, *args: Any) -> None:
        become(self, *args)
        if self.name == failing:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(components.Component, "become", ending)
        with pytest.raises(KeyboardInterrupt):
            enable(pipe, hardware=HERE)
    assert type(pipe) is base
    assert state(pipe) is None
    assert entries(pipe) == attributes
    assert all(torch.equal(value, truth[key]) for key, value in values(pipe).items())
    assert torch.equal(kind.run(pipe), expected)
    enable(pipe, hardware=HERE)
    assert torch.equal(kind.run(pipe), expected)


@pytest.mark.parametrize(
    ("locked", "error"), [(None, DeviceMemoryError), (64 << 30, HostMemoryError)]
)
def test_a_plan_that_does_not_fit_is_an_error_before_anything_moves(
    locked: int | None, error: type[Exception], planned
) -> None:
    pipe = PIPELINES["t2v"].make()
    before = snapshot(pipe)
    planned(
        replace(STREAMING, fits=False, messages=("first", "take less"), host_locked_bytes=locked)
    )
    with pytest.raises(error, match=r"^take less$"):
        enable(pipe, hardware=HERE)
    assert unchanged(pipe, before)


def test_messages_of_the_plan_are_logged(planned, caplog: pytest.LogCaptureFixture) -> None:
    planned(replace(STANDING, messages=("one flag is ignored",)))
    with caplog.at_level("INFO", "wanoffload"):
        enable(PIPELINES["t2v"].make(), hardware=HERE)
    assert [r.getMessage() for r in caplog.records] == ["one flag is ignored"]


def test_what_cannot_be_enabled_is_named(planned) -> None:
    planned(STREAMING)
    pipe = PIPELINES["t2v"].make()
    with pytest.raises(PipelineError, match=r"or a transformer, not a str"):
        enable("pipe", hardware=HERE)
    wanoffload.wrap(pipe.text_encoder.encoder, device="cpu")
    with pytest.raises(PipelineError, match=r"text_encoder of this WanPipeline.*in part.*unwrap"):
        enable(pipe, hardware=HERE)
    wanoffload.unwrap(pipe.text_encoder.encoder)
    pipe.vae.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(PipelineError, match="vae of this WanPipeline is offloaded already"):
        enable(pipe, hardware=HERE)
    pipe = PIPELINES["t2v"].make()
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(pipe.text_encoder, "cpu")
    with pytest.raises(PipelineError, match=r"text_encoder of this .*remove_all_hooks"):
        enable(pipe, hardware=HERE)
    pipe.remove_all_hooks()
    pipe.hf_device_map = {"vae": 0, "transformer": 1}
    with pytest.raises(PipelineError, match="device_map"):
        enable(pipe, hardware=HERE)
    pipe.hf_device_map = None
    with pytest.raises(PipelineError, match="not enabled"):
        disable(pipe)
    with pytest.raises(PipelineError, match="not enabled"):
        plan_of(pipe)
    enable(pipe, hardware=HERE)
    with pytest.raises(PipelineError, match=r"enabled already.*disable\(\)"):
        enable(pipe, hardware=HERE)
    disable(pipe)
    with pytest.raises(PipelineError, match="not enabled"):
        disable(pipe)


def test_a_wrong_choice_changes_nothing() -> None:
    pipe = PIPELINES["t2v"].make()
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="unknown choice 'dit_offload'"):
        enable(pipe, hardware=HERE, dit_offload=True)
    with pytest.raises(ValueError, match="mode is one of"):
        enable(pipe, "fast", hardware=HERE)
    assert unchanged(pipe, before)


def test_moving_an_enabled_pipeline_is_refused_and_staying_is_not(planned) -> None:
    kind = PIPELINES["t2v"]
    pipe = kind.make()
    expected = kind.run(pipe)
    planned(STREAMING)
    enable(pipe, hardware=HERE)
    home = {name: p.data_ptr() for name, p in pipe.vae.named_parameters()}
    assert pipe.to("cpu") is pipe
    assert pipe.to(device="cpu", dtype=None) is pipe
    for arguments in (("meta",), (torch.float16,), ("cpu", torch.float16)):
        with pytest.raises(PipelineError, match=r"can't be moved or cast to .*disable"):
            pipe.to(*arguments)
    with pytest.raises(PipelineError, match="disable"):
        pipe.to(dtype=torch.float16)
    for move in (pipe.enable_model_cpu_offload, pipe.enable_group_offload, pipe.remove_all_hooks):
        with pytest.raises(PipelineError, match="disable"):
            move("cpu")
    assert {name: p.data_ptr() for name, p in pipe.vae.named_parameters()} == home
    assert torch.equal(kind.run(pipe), expected)


# What an enabled pipeline is to others.


def test_the_class_is_the_pipelines_own_to_everyone_who_asks(planned, tmp_path: Path) -> None:
    kind = PIPELINES["t2v"]
    pipe = kind.make()
    signature = inspect.signature(pipe.__call__)
    planned(STREAMING)
    enable(pipe, hardware=HERE)
    cls = type(pipe)
    assert (cls.__name__, cls.__module__, cls.__qualname__) == (
        WanPipeline.__name__,
        WanPipeline.__module__,
        WanPipeline.__qualname__,
    )
    assert inspect.signature(pipe.__call__) == signature
    assert pipe._execution_device == torch.device("cpu")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    expected = kind.run(pipe)
    loaded = WanPipeline.from_pretrained(tmp_path)
    for name in ("transformer", "text_encoder", "vae"):
        mine, other = getattr(pipe, name), getattr(loaded, name).state_dict()
        assert all(torch.equal(v, other[k].to(v.dtype)) for k, v in mine.state_dict().items())
    other = type(pipe).from_pretrained(tmp_path)  # a class without a state is as its base
    with pytest.raises(PipelineError, match="not enabled"):
        disable(other)
    other.to("cpu")
    other.set_progress_bar_config(disable=True)
    assert kind.run(other).shape == expected.shape


@pytest.mark.parametrize("plan", [STREAMING, PARKING], ids=["streamed", "parked"])
@pytest.mark.parametrize("make", ["deepcopy", "pickle"])
def test_a_copy_is_an_ordinary_pipeline(make: str, plan: StandIn, planned) -> None:
    kind = PIPELINES["t2v"]
    pipe = kind.make()
    expected = kind.run(pipe)
    planned(plan)
    enable(pipe, hardware=HERE)
    kind.run(pipe)
    twin = copy.deepcopy(pipe) if make == "deepcopy" else pickle.loads(pickle.dumps(pipe))
    assert type(twin) is WanPipeline
    assert hooks.ATTRIBUTE not in vars(twin)
    acquires = wanoffload.offloader(pipe.transformer).stats().acquires if plan is STREAMING else 0
    assert torch.equal(kind.run(twin), expected)
    if plan is STREAMING:
        assert wanoffload.offloader(pipe.transformer).stats().acquires == acquires
    enable(twin, hardware=HERE)
    assert torch.equal(kind.run(twin), expected)
    assert torch.equal(kind.run(pipe), expected)


def test_another_pipeline_made_of_the_same_components_runs(planned) -> None:
    kind = PIPELINES["t2v"]
    pipe = kind.make()
    expected = kind.run(pipe)
    planned(PARKING)
    enable(pipe, hardware=HERE)
    other = WanPipeline(**pipe.components)
    assert torch.equal(kind.run(other), expected)
    with pytest.raises(PipelineError, match=r"enabled already, .* in another pipeline"):
        enable(other, hardware=HERE)
    assert torch.equal(kind.run(pipe), expected)
    assert at_home(pipe)


def test_one_progress_bar_counts_every_byte_that_moves(
    planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars, steps = [], []

    class Bar(acting.tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bars.append(self)

        def update(self, n: float | None = 1) -> bool | None:
            steps.append(n)
            return super().update(n)

    pipe = PIPELINES["i2v"].make()
    expected = sum(
        tensor.nbytes
        for part in pipe.components.values()
        if isinstance(part, nn.Module)
        for tensor in {id(t): t for t in (*part.parameters(), *part.buffers())}.values()
    )
    for module in (acting, wrapping):
        monkeypatch.setattr(module, "tqdm", Bar)
    planned(STREAMING)
    enable(pipe, hardware=HERE)
    assert len(bars) == 1
    assert bars[0].n == bars[0].total == expected
    blocks = sum(c.runtime.stats().units for c in enabled_of(pipe).components.values() if c.runtime)
    assert len([step for step in steps if step]) >= blocks, "it jumps"


def test_a_call_in_inference_mode_right_after_enable_in_inference_mode(planned) -> None:
    kind = PIPELINES["i2v"]
    pipe = kind.make()
    expected = kind.run(pipe)
    planned(by_size)
    with torch.inference_mode():
        enable(pipe, hardware=HERE)
        assert torch.equal(kind.run(pipe), expected)
    assert torch.equal(kind.run(pipe), expected)
    disable(pipe)
    assert not any(p.is_inference() for p in pipe.transformer.parameters())


@pytest.mark.parametrize("name", ["t2v", "i2v", "qwen_image"])
@pytest.mark.parametrize("plan", ["streamed", "parked", "resident"])
@pytest.mark.gpu
def test_the_video_is_the_same_on_a_gpu(name: str, plan: str, planned) -> None:
    kind = PIPELINES[name]
    pipe = kind.make().to("cuda")
    expected = kind.run(pipe)
    pipe.to("cpu")
    planned(PLANS[plan])
    enable(pipe, hardware=HERE)
    for _ in range(2):
        assert torch.equal(kind.run(pipe).cpu(), expected.cpu())
        assert at_home(pipe)
        for part in ("text_encoder", "vae"):
            tensors = [*getattr(pipe, part).parameters(), *getattr(pipe, part).buffers()]
            device = "cuda" if plan == "resident" else "cpu"
            assert {tensor.device.type for tensor in tensors} == {device}, part
    disable(pipe)
    assert pipe.device == torch.device("cpu")


@pytest.mark.gpu
def test_what_became_resident_in_inference_mode_is_ordinary_on_a_gpu(planned) -> None:
    kind = PIPELINES["t2v"]
    pipe = kind.make()
    planned(STANDING)
    with torch.inference_mode():
        enable(pipe, hardware=HERE)
    assert not any(p.is_inference() for p in pipe.transformer.parameters())
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(2)
    kind.run(pipe)


@pytest.mark.gpu
def test_what_fails_on_a_gpu_puts_every_tensor_back_where_it_was(
    planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = PIPELINES["t2v"].make()
    pipe.vae.to("cuda")
    pipe.transformer.blocks[1].to("cuda")

    def places() -> dict[str, str]:
        parts = {name: getattr(pipe, name) for name in ("transformer", "vae", "text_encoder")}
        return {f"{n}.{k}": v.device.type for n, p in parts.items() for k, v in tensors_of(p)}

    def tensors_of(part: nn.Module) -> list[tuple[str, Tensor]]:
        return [*part.named_parameters(), *part.named_buffers()]

    before = places()
    become = components.Component.become

    def ending(self: Any, *args: Any) -> None:
        become(self, *args)
        if len([c for c in seen if c]) == 2:
            raise Stop
        seen.append(self.name)

    seen: list[str] = []
    planned(PARKING)
    monkeypatch.setattr(components.Component, "become", ending)
    with pytest.raises(Stop):
        enable(pipe, hardware=HERE)
    assert places() == before
