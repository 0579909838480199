"""The formulas against dry runs of the real modules, at real widths, on the meta device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    QwenImageTransformer2DModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.dry_run import DryRun
from tests.small_models import MODELS, kept_dtype
from wanoffload import image
from wanoffload.facts import tally
from wanoffload.facts.formulas import component_facts, dit_facts
from wanoffload.facts.formulas_qwen import TEXT_TOKENS as QWEN_TEXT_TOKENS
from wanoffload.facts.formulas_wan import CUBLAS_WORKSPACE_BYTES
from wanoffload.facts.model import DitFacts, PartFacts
from wanoffload.ring import cut
from wanoffload.units import BLOCK, PART, find_units

Inputs = dict[str, Any]
LATENTS = {1560: (1, 60, 104), 7800: (5, 60, 104), 32760: (21, 60, 104)}
"""480 x 832, of 1, 17 and 81 frames."""


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def on_meta(model: type[nn.Module], config: dict[str, Any]) -> nn.Module:
    """The real class without memory, each parameter of the dtype that a load in bf16 gives it."""
    with torch.device("meta"):
        module = model(**config)
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(kept_dtype(module, name))
    return module.requires_grad_(False).eval()


def wan_inputs(config: dict[str, Any], tokens: int) -> Inputs:
    channels = config.get("in_channels", 16)
    inputs = {
        "hidden_states": meta(1, channels, *LATENTS[tokens]),
        "timestep": meta(1, dtype=torch.float32),
        "encoder_hidden_states": meta(1, 512, 4096),
        "return_dict": False,
    }
    if config.get("image_dim"):
        inputs["encoder_hidden_states_image"] = meta(1, 257, 1280)
    return inputs


def ti2v_inputs(config: dict[str, Any], tokens: int) -> Inputs:
    return {**wan_inputs(config, tokens), "timestep": meta(1, tokens, dtype=torch.float32)}


def vace_inputs(config: dict[str, Any], tokens: int) -> Inputs:
    control = {
        "control_hidden_states": meta(1, 96, *LATENTS[tokens]),
        "control_hidden_states_scale": meta(len(config["vace_layers"])),
    }
    return {**wan_inputs(config, tokens), **control}


def animate_inputs(config: dict[str, Any], tokens: int) -> Inputs:
    height, width = {7812: (24, 62), 32760: (60, 104)}[tokens]
    return {
        **wan_inputs(config, 1560),
        "hidden_states": meta(1, 36, 21, height, width),
        "pose_hidden_states": meta(1, 16, 20, height, width),
        "face_pixel_values": meta(1, 3, 77, 512, 512),
    }


def qwen_inputs(_: dict[str, Any], tokens: int) -> Inputs:
    side = {1600: 40, 4096: 64, 16384: 128}[tokens]
    return {
        "hidden_states": meta(1, tokens, 64),
        "encoder_hidden_states": meta(1, QWEN_TEXT_TOKENS, 3584),
        "timestep": meta(1),
        "img_shapes": [[(1, side, side)]],
        "return_dict": False,
    }


@dataclass(frozen=True)
class Case:
    """A transformer at its real width with few layers: all formulas are linear in layers."""

    model: type[nn.Module]
    config: dict[str, Any]
    inputs: Callable[[dict[str, Any], int], Inputs] = wan_inputs
    tokens: tuple[int, ...] = (1560, 7800, 32760)

    def facts(self) -> DitFacts:
        return dit_facts({"_class_name": self.model.__name__, **self.config})

    def module(self) -> nn.Module:
        return on_meta(self.model, self.config)


WITH_PICTURE = {"image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36}
NARROW = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 4}
TI2V = {"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
CASES = {
    "14B": Case(WanTransformer3DModel, {"num_layers": 4}),
    "1.3B": Case(WanTransformer3DModel, NARROW),
    "5B": Case(WanTransformer3DModel, {**TI2V, "num_layers": 4}, ti2v_inputs),
    "I2V-A14B": Case(WanTransformer3DModel, {"in_channels": 36, "num_layers": 4}),
    "I2V": Case(WanTransformer3DModel, {**WITH_PICTURE, "num_layers": 4}),
    "VACE": Case(
        WanVACETransformer3DModel, {"num_layers": 6, "vace_layers": [0, 2, 4]}, vace_inputs
    ),
    "Animate": Case(
        WanAnimateTransformer3DModel,
        {**WITH_PICTURE, "num_layers": 10},
        animate_inputs,
        (7812, 32760),
    ),
    "Qwen-Image": Case(
        QwenImageTransformer2DModel, {"num_layers": 4}, qwen_inputs, (1600, 4096, 16384)
    ),
    "Qwen-Image with two modulations": Case(
        QwenImageTransformer2DModel,
        {"num_layers": 4, "zero_cond_t": True},
        qwen_inputs,
        (4096, 16384),
    ),
}


@pytest.fixture(autouse=True)
def _positions_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen's tables of positions are made on the CPU, whatever the default device."""
    rope = transformer_qwenimage.QwenEmbedRope
    made = rope.__init__

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.pos_freqs, self.neg_freqs = self.pos_freqs.to("meta"), self.neg_freqs.to("meta")

    monkeypatch.setattr(rope, "__init__", make)


def dry_run(module: nn.Module, *held: Any, call: Callable[[], Any]) -> DryRun:
    known = itertools.chain(module.parameters(), module.buffers())
    with torch.inference_mode(), DryRun(known) as run:
        run.hold(held)
        call()
    return run


@pytest.mark.parametrize(
    ("name", "tokens"), [(name, n) for name, case in CASES.items() for n in case.tokens]
)
def test_formulas_of_a_forward_agree_with_a_dry_run_of_the_module(name: str, tokens: int) -> None:
    case, facts = CASES[name], CASES[name].facts()
    module, inputs = case.module(), case.inputs(case.config, tokens)
    run = dry_run(module, inputs, call=lambda: module(**inputs))
    matmul = facts.matmul_flops_per_token * tokens + facts.matmul_flops
    attention = facts.attention_flops_per_token_squared * tokens**2 + facts.attention_flops
    attention += facts.attention_flops_per_token * tokens
    traffic = facts.traffic_bytes_per_token * tokens + facts.traffic_bytes
    peak = facts.activation_bytes_per_token * tokens + facts.activation_bytes
    assert matmul == pytest.approx(run.matmul_flops, rel=1e-6)
    assert attention == pytest.approx(run.attention_flops, rel=1e-6)
    assert traffic == pytest.approx(run.traffic_bytes, rel=0.002)
    assert facts.kernels == pytest.approx(run.kernels, rel=0.02)
    assert peak - CUBLAS_WORKSPACE_BYTES == pytest.approx(run.peak_bytes, rel=0.01)


def image_sizes(module: nn.Module) -> list[int]:
    return [
        image.lay_out([(group[0].name, group[0].tensor) for group in unit.groups]).nbytes
        for unit in find_units(module)
    ]


def outside_bytes(module: nn.Module, blocks: nn.Module) -> int:
    inside = {
        id(group[0].tensor): group[0].tensor.nbytes
        for unit in find_units(blocks)
        for group in unit.groups
    }
    return sum(p.nbytes for p in module.parameters()) - sum(inside.values())


def bf16_bytes(blocks: nn.Module) -> int:
    tensors = [group[0].tensor for unit in find_units(blocks) for group in unit.groups]
    return sum(tensor.nbytes for tensor in tensors if tensor.dtype == torch.bfloat16)


@pytest.mark.parametrize("name", CASES)
def test_block_bytes_are_those_of_the_images_in_the_order_of_the_units(name: str) -> None:
    module, facts = CASES[name].module(), CASES[name].facts()
    assert list(facts.block_bytes) == image_sizes(module)
    assert facts.other_bytes == outside_bytes(module, module)
    assert facts.bf16_bytes == bf16_bytes(module)


@pytest.mark.parametrize("name", MODELS)
def test_block_bytes_of_small_models_with_values_are_those_of_their_images(name: str) -> None:
    module = MODELS[name].make()
    facts = dit_facts({**module.config, "_class_name": type(module).__name__})
    assert list(facts.block_bytes) == image_sizes(module)
    assert facts.other_bytes == outside_bytes(module, module)
    assert facts.bf16_bytes == bf16_bytes(module)


def parts_of(module: nn.Module) -> tuple[PartFacts, ...]:
    """As the engine would have them."""
    found = find_units(module, PART)
    blocks = list(dict.fromkeys(id(unit.block) for unit in found))
    layouts = [image.lay_out((g[0].name, g[0].tensor) for g in unit.groups) for unit in found]
    return tuple(
        PartFacts(
            layout.nbytes,
            sum(spec.nbytes for spec in layout.specs if spec.dtype == torch.bfloat16),
            cut(spec.nbytes for spec in layout.specs),
            blocks.index(id(unit.block)),
        )
        for unit, layout in zip(found, layouts, strict=True)
    )


def loose_bytes(module: nn.Module) -> int:
    """Of tensors that are in blocks and in no part."""
    inside, in_parts = (
        sum(group[0].tensor.nbytes for unit in find_units(module, what) for group in unit.groups)
        for what in (BLOCK, PART)
    )
    return inside - in_parts


@pytest.mark.parametrize("name", CASES)
def test_parts_of_blocks_are_those_of_the_units_with_the_same_pieces(name: str) -> None:
    module, facts = CASES[name].module(), CASES[name].facts()
    assert facts.parts == parts_of(module)
    assert facts.loose_bytes == loose_bytes(module)
    assert len(facts.parts) > 2 * len(facts.block_bytes)
    assert any(len(part.pieces) > 1 for part in facts.parts)


@pytest.mark.parametrize("name", MODELS)
def test_parts_of_small_models_with_values_are_those_of_their_units(name: str) -> None:
    module = MODELS[name].make()
    facts = dit_facts({**module.config, "_class_name": type(module).__name__})
    assert facts.parts == parts_of(module)
    assert facts.loose_bytes == loose_bytes(module)


def test_in_parts_nothing_is_lost_and_a_block_without_known_parts_is_one() -> None:
    facts = CASES["14B"].facts()
    parted = facts.in_parts()
    assert len(parted.block_bytes) == 3 * len(facts.block_bytes)
    assert parted.other_bytes == facts.other_bytes + facts.loose_bytes > facts.other_bytes
    assert parted.bytes == pytest.approx(facts.bytes, abs=256 * len(facts.parts))
    assert parted.bf16_bytes == facts.bf16_bytes
    assert parted.in_parts() == parted
    unknown = DitFacts(block_bytes=(512, 1024), other_bytes=7, bf16_bytes=768)
    assert unknown.in_parts() == replace(
        unknown, parts=(PartFacts(512, 256, (512,), 0), PartFacts(1024, 512, (1024,), 1))
    )


def test_the_alignment_of_the_formulas_is_that_of_images() -> None:
    assert tally.ALIGNMENT == image.ALIGNMENT
    assert tally.image_bytes([1, 256, 257]) == 256 + 256 + 512


def test_a_14b_forward_peaks_where_an_h200_peaked() -> None:
    """Measured: peak allocated less 28.64 GB of weights, whose tensors torch's allocator rounds up:
    the 80 of the feed-forwards by 1 MiB each, to a multiple of 2 MiB.
    """
    facts = dit_facts({"_class_name": "WanTransformer3DModel"})
    rounding = 80 * 2**20
    for tokens, measured in ((1560, 0.31e9), (7800, 1.02e9), (32760, 3.87e9)):
        peak = facts.activation_bytes_per_token * tokens + facts.activation_bytes
        assert peak + rounding == pytest.approx(measured, rel=0.02)


def test_5b_latents_mean_a_timestep_for_each_token_unless_the_pipeline_says_otherwise() -> None:
    config = {"_class_name": "WanTransformer3DModel", **TI2V}
    per_token = dit_facts(config)
    assert per_token == dit_facts(config, expand_timesteps=True)
    once = dit_facts(config, expand_timesteps=False)
    assert once.activation_bytes_per_token < 0.5 * per_token.activation_bytes_per_token


# Encoders and VAEs.

UMT5 = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384}
CLIP = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 1024,
}
QWEN_VL = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584},
}
ENCODERS: dict[str, tuple[type[nn.Module], Any, dict[str, Any], str]] = {
    "UMT5": (UMT5EncoderModel, UMT5Config, UMT5, "encoder"),
    "CLIP": (CLIPVisionModel, CLIPVisionConfig, CLIP, "encoder"),
    "CLIP with projection": (
        CLIPVisionModelWithProjection,
        CLIPVisionConfig,
        CLIP,
        "vision_model.encoder",
    ),
    "Qwen2.5-VL": (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig,
        QWEN_VL,
        "model.language_model",
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_bytes_of_encoders_are_those_of_the_real_classes_in_bf16(name: str) -> None:
    model, config_class, config, stack = ENCODERS[name]
    with torch.device("meta"):
        module = model(config_class(**config)).to(torch.bfloat16)
    facts = component_facts({"architectures": [model.__name__], **config})
    blocks = module.get_submodule(stack)
    assert list(facts.block_bytes) == image_sizes(blocks)
    assert facts.other_bytes == outside_bytes(module, blocks)


def test_umt5_loaded_in_bf16_is_bf16_throughout(tmp_path: Any) -> None:
    small = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    UMT5EncoderModel(UMT5Config(**small, vocab_size=20)).save_pretrained(tmp_path)
    loaded = UMT5EncoderModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


WAN22_VAE = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
VAES: dict[str, tuple[type[nn.Module], dict[str, Any], torch.dtype, tuple[int, ...]]] = {
    "Wan2.1": (AutoencoderKLWan, {}, torch.float32, (17, 81)),
    "Wan2.2": (AutoencoderKLWan, WAN22_VAE, torch.float32, (17, 81)),
    "Qwen-Image": (AutoencoderKLQwenImage, {}, torch.bfloat16, (1,)),
}


def vae_peaks(name: str, height: int, width: int, frames: int) -> tuple[float, int, int]:
    """(formula, dry run of decode, dry run of encode) in bytes above the weights."""
    model, config, dtype, _ = VAES[name]
    with torch.device("meta"):
        module: Any = model(**config)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    side, z = config.get("scale_factor_spatial", 8), config.get("z_dim", 16)
    latents = meta(1, z, (frames - 1) // 4 + 1, height // side, width // side, dtype=dtype)
    video = meta(1, 3, frames, height, width, dtype=dtype)
    decode = dry_run(module, latents, call=lambda: module.decode(latents, return_dict=False))
    encode = dry_run(module, video, call=lambda: module.encode(video))
    facts = component_facts({"_class_name": model.__name__, **config})
    pixels = height * width
    formula = pixels * facts.activation_bytes_per_pixel
    formula += pixels * frames * facts.activation_bytes_per_voxel
    return formula, decode.peak_bytes, encode.peak_bytes


@pytest.mark.parametrize("size", [(256, 384), (480, 832)])
@pytest.mark.parametrize("name", VAES)
def test_the_peak_of_a_vae_is_decoding_and_agrees_with_a_dry_run(
    name: str, size: tuple[int, int]
) -> None:
    for frames in VAES[name][3]:
        formula, decode, encode = vae_peaks(name, *size, frames)
        assert formula == pytest.approx(decode, rel=0.01)
        assert encode < decode


@pytest.mark.parametrize("name", VAES)
def test_bytes_of_vaes_are_those_of_the_real_classes(name: str) -> None:
    model, config, dtype, _ = VAES[name]
    with torch.device("meta"):
        module = model(**config)
    expected = sum(p.numel() for p in module.parameters()) * dtype.itemsize
    assert component_facts({"_class_name": model.__name__, **config}).bytes == expected


def test_classes_without_a_formula_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'FluxTransformer2DModel'.*WanTransformer3DModel"):
        dit_facts({"_class_name": "FluxTransformer2DModel"})
    with pytest.raises(ValueError, match=r"'T5EncoderModel'.*UMT5EncoderModel"):
        component_facts({"architectures": ["T5EncoderModel"]})
    with pytest.raises(ValueError, match="attn_scales"):
        component_facts({"_class_name": "AutoencoderKLWan", "attn_scales": [0.5]})
