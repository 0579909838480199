"""LoRA adapters through diffusers and PEFT, before wrap and after it: always as in the resident
model, and in the very next forward, although its first blocks were fetched already."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

import wanoffload
from tests.small_models import MODELS, SmallModel, forward
from wanoffload import WeightChangeError

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
State = dict[str, Tensor]


def config(rank: int = 4) -> LoraConfig:
    """Random adapters: PEFT's own start as nothing."""
    return LoraConfig(r=rank, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)


@functools.cache
def lora_state(name: str, seed: int, rank: int = 4) -> State:
    """What a LoRA file holds for a kind of model."""
    model: Any = MODELS[name].make()
    torch.manual_seed(seed)
    model.add_adapter(config(rank))
    return {key: value for key, value in model.state_dict().items() if "lora" in key}


def file_keys(state: State, prefix: str = "") -> State:
    return {f"{prefix}{key.replace('.default', '')}": value for key, value in state.items()}


STORED = {"plain": {}, "packed": {"pack": True}, "at home": {"vram_budget": "1GiB"}}


@pytest.fixture(autouse=True, params=STORED)
def stored(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the blocks of every test are stored: "at home", on the device, once they have come."""
    monkeypatch.setattr(Pair, "options", STORED[request.param])


only_streamed = pytest.mark.parametrize("stored", ["plain", "packed"], indirect=True)


def wrap(model: Any, device: str) -> Any:
    wanoffload.wrap(model, 1, device=device, **Pair.options)
    wanoffload.offloader(model).poison_slots()
    return model


def values(model: Any) -> State:
    return {key: value.cpu() for key, value in model.state_dict().items()}


class Pair:
    """A resident model and a streamed one that go through the same operations."""

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, name: str, device: str, home: str | None = None) -> None:
        """`home`: where both models are changed while they are not streamed."""
        self.kind: SmallModel = MODELS[name]
        self.name = name
        self.device = device
        self.home = home or device
        self.resident: Any = self.kind.make().to(self.home)
        self.streamed: Any = self.kind.make().to(self.home)
        self.wrapped = False

    def wrap(self) -> None:
        wrap(self.streamed, self.device)
        self.wrapped = True

    def unwrap(self) -> None:
        wanoffload.unwrap(self.streamed, self.home)
        self.wrapped = False

    def both(self, operation: Callable[[Any, str], None]) -> None:
        for model in (self.resident, self.streamed):
            torch.manual_seed(7)
            operation(model, self.name)

    def check(self) -> list[Tensor]:
        """Two forwards of each are equal, and every block of the streamed one was fetched, or is at
        home by now."""
        outputs = []
        before = wanoffload.offloader(self.streamed).stats() if self.wrapped else None
        self.resident.to(self.device)
        self.streamed.to(self.device)
        for text in range(2):
            inputs = self.kind.inputs(self.device, text=text)
            outputs.append(forward(self.resident, inputs))
            assert torch.equal(forward(self.streamed, inputs), outputs[-1]), f"text {text}"
        if before is not None:
            after = wanoffload.offloader(self.streamed).stats()
            if "vram_budget" in self.options:
                assert after.at_home
                assert {p.device.type for p in self.streamed.parameters()} == {self.device}
                return outputs
            assert after.acquires - before.acquires == 2 * self.kind.units
            assert after.bytes_fetched - before.bytes_fetched >= after.host_bytes
            self.check_homes()
        return outputs

    def check_homes(self) -> None:
        """What is streamed is on the host; all else, adapters too, is on the device."""
        runtime = wanoffload.offloader(self.streamed)
        streamed = {id(weight) for binding in runtime.bindings for weight in binding.weights}
        for name, parameter in self.streamed.named_parameters():
            home = "cpu" if id(parameter) in streamed else self.device
            assert parameter.device.type == home, name

    def check_values(self) -> None:
        resident, streamed = values(self.resident), values(self.streamed)
        assert list(streamed) == list(resident)
        for key, value in resident.items():
            assert torch.equal(streamed[key], value), key
            assert streamed[key].dtype == value.dtype


def add(model: Any, _: str) -> None:
    model.add_adapter(config(), "first")


def load(model: Any, name: str) -> None:
    model.load_lora_adapter(
        file_keys(lora_state(name, seed=2), "transformer."),
        adapter_name="second",
        prefix="transformer",
    )


def use_both(model: Any, _: str) -> None:
    model.set_adapters(["first", "second"], [0.5, 0.75])


def use_second(model: Any, _: str) -> None:
    model.set_adapters("second", 1.0)


def disable(model: Any, _: str) -> None:
    model.disable_lora()


def enable(model: Any, _: str) -> None:
    model.enable_lora()


def fuse(model: Any, _: str) -> None:
    model.fuse_lora()


def fuse_safely(model: Any, _: str) -> None:
    model.fuse_lora(lora_scale=0.5, safe_fusing=True)


def unfuse(model: Any, _: str) -> None:
    model.unfuse_lora()


def delete_first(model: Any, _: str) -> None:
    model.delete_adapters("first")


def unload(model: Any, _: str) -> None:
    model.unload_lora()


LIFE = [
    add,
    load,
    use_both,
    disable,
    enable,
    fuse,
    unfuse,
    use_second,
    fuse_safely,
    unfuse,
    delete_first,
    unload,
]
# What does not show: disabling is undone by enabling, "first" is not in use when it is deleted,
# and fusing and unfusing change only how a result is rounded.
SHOW = {add, load, use_both, disable, enable, use_second, fuse_safely, unload}


FUSING = {fuse, fuse_safely, unfuse}


@pytest.mark.parametrize("wrapped_before", range(0, len(LIFE) + 1, 3))
@pytest.mark.parametrize("name", ["wan21_t2v", "wan21_i2v"])
def test_the_life_of_adapters_is_that_of_the_resident_model(
    name: str, wrapped_before: int, device: str
) -> None:
    pair = Pair(name, device)
    last = pair.check()
    # PEFT computes what it fuses where the adapter is, and rounds otherwise on a CPU. Adapters that
    # were there before wrap are on the host.
    fuses = device == "cpu" or wrapped_before in (0, len(LIFE))
    for number, operation in enumerate(LIFE):
        if number == wrapped_before:
            pair.wrap()
            pair.check()
        if operation in FUSING and not fuses:
            continue
        pair.both(operation)
        now = pair.check()
        if operation in SHOW:
            assert not torch.equal(now[0], last[0]), operation.__name__
        last = now
        pair.check_values()
    if wrapped_before == len(LIFE):
        pair.wrap()
        pair.check()
    pair.unwrap()
    pair.check()
    pair.check_values()


@pytest.mark.parametrize("wrapped_before", range(0, len(LIFE) - 3, 2))
def test_the_life_of_adapters_is_right_without_a_forward_in_between(
    wrapped_before: int, device: str
) -> None:
    """Wrapped for four operations; the others come before and after."""
    pair = Pair("wan21_t2v", device, home="cpu")
    for number, operation in enumerate(LIFE):
        if number == wrapped_before:
            pair.wrap()
        if number == wrapped_before + 4:
            pair.check_values()
            pair.unwrap()
        pair.both(operation)
    pair.check_values()
    if not pair.wrapped:
        pair.wrap()
    pair.check()


@pytest.mark.parametrize("last", range(1, len(LIFE), 2))
def test_adapters_wrapped_in_any_state_are_right(last: int, device: str) -> None:
    pair = Pair("wan21_t2v", device, home="cpu")
    for operation in LIFE[:last]:
        pair.both(operation)
    pair.wrap()
    pair.check()
    pair.check_values()
    pair.unwrap()
    pair.check()
    pair.check_values()


@only_streamed
@pytest.mark.parametrize("operation", [fuse, fuse_safely])
def test_fusing_takes_effect_although_every_block_was_fetched_before(
    operation: Callable[[Any, str], None], device: str
) -> None:
    kind = MODELS["wan21_t2v"]
    pair = Pair("wan21_t2v", device)
    wanoffload.wrap(pair.streamed, kind.units, device=device, **pair.options)
    pair.both(load)
    inputs = kind.inputs(device)
    forward(pair.streamed, inputs)
    runtime = wanoffload.offloader(pair.streamed)
    before = runtime.stats()
    assert torch.equal(forward(pair.streamed, inputs), forward(pair.resident, inputs))
    assert runtime.stats().bytes_fetched == before.bytes_fetched  # nothing had to be fetched
    pair.both(operation)
    assert torch.equal(forward(pair.streamed, inputs), forward(pair.resident, inputs))
    after = runtime.stats()
    assert after.invalidations > before.invalidations
    assert after.bytes_fetched - before.bytes_fetched == after.host_bytes
    assert after.acquires - before.acquires == 2 * kind.units


@only_streamed
def test_a_scale_for_one_forward_is_that_of_the_resident_model(device: str) -> None:
    pair = Pair("wan21_t2v", device)
    pair.wrap()
    pair.both(load)
    inputs = pair.kind.inputs(device)
    outputs = []
    for scale in (1.0, 0.25, 1.0):
        scaled = {**inputs, "attention_kwargs": {"scale": scale}}
        outputs.append(forward(pair.streamed, scaled))
        assert torch.equal(outputs[-1], forward(pair.resident, scaled))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    assert wanoffload.offloader(pair.streamed).stats().acquires == 3 * pair.kind.units


@pytest.mark.parametrize("adapters_are_streamed", [False, True])
def test_a_saved_adapter_is_the_resident_models_file(
    adapters_are_streamed: bool, device: str, tmp_path: Path
) -> None:
    pair = Pair("wan21_t2v", device)
    if adapters_are_streamed:
        pair.both(load)
    pair.wrap()
    if not adapters_are_streamed:
        pair.both(load)
    pair.check()
    files = []
    for part, model in (("resident", pair.resident), ("streamed", pair.streamed)):
        model.save_lora_adapter(tmp_path / part, adapter_name="second")
        files.append(load_file(tmp_path / part / "pytorch_lora_weights.safetensors"))
    assert sorted(files[0]) == sorted(files[1])
    assert all(torch.equal(files[1][key], value) for key, value in files[0].items())
    pair.both(unload)
    for model in (pair.resident, pair.streamed):
        model.load_lora_adapter(tmp_path / "streamed", prefix=None, use_safetensors=True)
    pair.check()
    pair.check_values()


def swap_hot(model: Any, name: str, rank: int = 4) -> None:
    state = file_keys(lora_state(name, seed=5, rank=rank))
    model.load_lora_adapter(state, adapter_name="second", prefix=None, hotswap=True)


@pytest.mark.parametrize("adapters_are_streamed", [False, True])
def test_an_adapter_swapped_for_another_takes_effect_in_the_next_forward(
    adapters_are_streamed: bool, device: str
) -> None:
    pair = Pair("wan21_t2v", device)
    if adapters_are_streamed:
        pair.both(load)
    pair.wrap()
    if not adapters_are_streamed:
        pair.both(load)
    first = pair.check()
    pair.both(swap_hot)
    assert not torch.equal(pair.check()[0], first[0])
    pair.check_values()


@only_streamed
def test_a_streamed_adapter_swapped_for_a_larger_one_is_an_error_by_name(device: str) -> None:
    pair = Pair("wan21_t2v", device)
    pair.both(load)
    pair.wrap()
    pair.check()
    with pytest.raises(WeightChangeError, match=r"blocks\.\d+: .*unwrap"):
        swap_hot(pair.streamed, pair.name, rank=8)
    pair.both(unload)
    pair.check()
    for model in (pair.resident, pair.streamed):
        model.load_lora_adapter(file_keys(lora_state(pair.name, seed=5, rank=8)), prefix=None)
    pair.check()
    pair.check_values()


@only_streamed
def test_a_weight_can_not_be_swapped_for_another_tensor_unnoticed(device: str) -> None:
    """`torch.utils.swap_tensors` puts another tensor into the same Python object."""
    pair = Pair("wan21_t2v", device)
    pair.wrap()
    expected = pair.check()
    linear = pair.streamed.blocks[0].ffn.net[2]
    for other in (linear.weight.plain.clone(), linear.weight.clone()):
        with pytest.raises(RuntimeError, match="weakref"):
            torch.utils.swap_tensors(linear.weight, torch.nn.Parameter(other + 1, False))
    assert torch.equal(pair.check()[0], expected[0])
    pair.check_values()


def test_an_adapter_loaded_into_compiled_blocks_is_right(device: str) -> None:
    torch.compiler.reset()
    pair = Pair("wan22_5b", device)
    pair.wrap()
    for model in (pair.resident, pair.streamed):
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
    without = pair.check()
    pair.both(load)
    assert not torch.equal(pair.check()[0], without[0])
    pair.both(fuse)
    pair.check()
    pair.check_values()


# Through the pipeline.


def pipeline(device: str) -> Any:
    kind = MODELS["wan21_t2v"]
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=kind.make(seed=0).to(device),
        transformer_2=kind.make(seed=1).to(device),
        boundary_ratio=0.9,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, device: str) -> Tensor:
    """Three steps, the first one by the first expert."""
    texts = [MODELS["wan21_t2v"].inputs(device, text=x)["encoder_hidden_states"] for x in (0, 1)]
    result: Tensor = pipe(
        prompt_embeds=texts[0],
        negative_prompt_embeds=texts[1],
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=3,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).frames
    return result


def load_into(second: bool) -> Callable[[Any], None]:
    def operation(pipe: Any) -> None:
        name = "low" if second else "high"
        state = file_keys(lora_state("wan21_t2v", seed=3 + second), "transformer.")
        pipe.load_lora_weights(state, adapter_name=name, load_into_transformer_2=second)

    return operation


EXPERTS = ["transformer", "transformer_2"]
PIPELINE_LIFE: list[Callable[[Any], None]] = [
    load_into(second=False),
    load_into(second=True),
    lambda pipe: pipe.fuse_lora(components=EXPERTS, lora_scale=0.5, safe_fusing=True),
    lambda pipe: pipe.unfuse_lora(components=EXPERTS),
    lambda pipe: pipe.fuse_lora(components=EXPERTS),
    lambda pipe: pipe.unfuse_lora(components=EXPERTS),
    lambda pipe: pipe.unload_lora_weights(),
]


@only_streamed
def test_loras_of_a_pipeline_are_those_of_the_resident_one(device: str) -> None:
    resident, streamed = pipeline(device), pipeline(device)
    for name in EXPERTS:
        wrap(getattr(streamed, name), device)
    assert streamed.to(device) is streamed
    last = latents(resident, device)
    assert torch.equal(latents(streamed, device), last)
    for operation in PIPELINE_LIFE:
        operation(resident)
        operation(streamed)
        before = [wanoffload.offloader(getattr(streamed, x)).stats() for x in EXPERTS]
        now = latents(resident, device)
        assert torch.equal(latents(streamed, device), now)
        after = [wanoffload.offloader(getattr(streamed, x)).stats() for x in EXPERTS]
        units = MODELS["wan21_t2v"].units
        forwards = [(y.acquires - x.acquires) / units for x, y in zip(before, after, strict=True)]
        assert forwards == [2, 4]
        assert not torch.equal(now, last)
        last = now
    for name in EXPERTS:
        expert, right = getattr(streamed, name), getattr(resident, name)
        wanoffload.unwrap(expert, device)
        assert list(expert.state_dict()) == list(right.state_dict())
        assert all(
            torch.equal(x, y)
            for x, y in zip(*map(torch.nn.Module.parameters, (expert, right)), strict=True)
        )
    assert torch.equal(latents(streamed, device), last)


# Fused projections: the other way in which diffusers changes a block's weights.


def test_fused_projections_are_streamed_like_other_weights(device: str) -> None:
    pair = Pair("wan21_i2v", device)
    for model in (pair.resident, pair.streamed):
        model.fuse_qkv_projections()
    pair.wrap()
    pair.check()
    pair.check_values()
    names = {spec.name for spec in wanoffload.offloader(pair.streamed).bindings[0].layout.specs}
    assert {"attn1.to_qkv.weight", "attn2.to_kv.weight", "attn2.to_added_kv.weight"} <= names
    pair.unwrap()
    pair.check()
    pair.check_values()


@only_streamed
def test_fusing_projections_of_a_wrapped_model_is_an_error_by_name(device: str) -> None:
    pair = Pair("wan21_i2v", device)
    pair.wrap()
    expected = pair.check()
    pair.streamed.fuse_qkv_projections()
    for _ in range(2):
        with pytest.raises(WeightChangeError, match=r"blocks\.0\.attn1\.to_qkv\.weight.*unwrap"):
            forward(pair.streamed, pair.kind.inputs(device))
    pair.streamed.unfuse_qkv_projections()
    assert torch.equal(pair.check()[0], expected[0])
    pair.streamed.fuse_qkv_projections()
    pair.unwrap()
    pair.resident.fuse_qkv_projections()
    pair.check_values()
    pair.check()
