"""Small models of every kind that is streamed: random weights, real dtypes, milliseconds a forward.

    model, inputs = MODELS["wan21_t2v"]()
    output = forward(model, inputs)

Weights and inputs are drawn on the CPU from seeds, so they are the same on every device and in
every process. Each streamed weight changes the output (but for the text side of Qwen's last block,
which the model itself throws away), and blocks differ in what they hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    QwenImageTransformer2DModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from torch import Tensor, nn

Inputs = dict[str, Any]
Device = torch.device | str

TEXT_DIM = 32
IMAGE_DIM = 16
LATENT = (3, 4, 6)
"""Latent frames, height and width: 18 tokens, patches being 1 x 2 x 2."""
TOKENS = 18


class Draw:
    """Random tensors in the order they are asked for."""

    def __init__(self, seed: int, device: Device = "cpu") -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._device = device

    def __call__(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self._generator)
        return values.to(torch.bfloat16).to(self._device)


@dataclass(frozen=True)
class SmallModel:
    """A kind of model. Called, it gives a model on the CPU and inputs for it.

    `units`: blocks that are streamed, in all lists together.
    """

    name: str
    units: int
    describe: Callable[[], nn.Module]
    latents_and_text: Callable[[Draw, Draw, Device], Inputs]

    def __call__(self, seed: int = 0) -> tuple[nn.Module, Inputs]:
        return self.make(seed), self.inputs()

    def make(self, seed: int = 0) -> nn.Module:
        """The model: bf16, with what its class keeps in fp32, for inference."""
        return fill(self.describe(), seed)

    def inputs(self, device: Device = "cpu", *, seed: int = 1, text: int = 0) -> Inputs:
        """Keywords of a forward. CFG's two passes differ in `text` only."""
        draw, draw_text = Draw(seed, device), Draw(1000 + text, device)
        return {**self.latents_and_text(draw, draw_text, device), "return_dict": False}


def forward(model: nn.Module, inputs: Inputs) -> Tensor:
    """One forward under inference mode; its only output."""
    with torch.inference_mode():
        output: Tensor = model(**inputs)[0]
    return output


def fill(model: nn.Module, seed: int) -> nn.Module:
    """Gives every parameter random values of its right dtype. In place."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        generator = torch.Generator().manual_seed(seed * 10_000 + index)
        parameter.data = _weight(name, parameter, generator).to(kept_dtype(model, name))
    return model.requires_grad_(False).eval()


def kept_dtype(model: nn.Module, name: str) -> torch.dtype:
    """The dtype in which diffusers keeps a parameter of a bf16 model."""
    kept: list[str] = getattr(model, "_keep_in_fp32_modules", None) or []
    return torch.float32 if any(part in kept for part in name.split(".")) else torch.bfloat16


def _weight(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Values that keep activations in range."""
    values = torch.randn(like.shape, generator=generator)
    if like.ndim >= 2:
        fan_in = like.shape[-1] if "scale_shift_table" in name else like[0].numel()
        return values * fan_in**-0.5
    values *= 0.1
    return values + 1.0 if "norm" in name and name.endswith("weight") else values


def _wan(**changes: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 96,
        "num_layers": 5,
        "rope_max_seq_len": 32,
        **changes,
    }


def _wan_inputs(draw: Draw, text: Draw, device: Device, channels: int = 4) -> Inputs:
    return {
        "hidden_states": draw(1, channels, *LATENT),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": text(1, 8, TEXT_DIM),
    }


def _wan21_i2v_inputs(draw: Draw, text: Draw, device: Device) -> Inputs:
    return {
        **_wan_inputs(draw, text, device, channels=12),
        # The attention takes the last 512 tokens for text, and those before for the image.
        "encoder_hidden_states": text(1, 512, TEXT_DIM),
        "encoder_hidden_states_image": draw(1, 17, IMAGE_DIM),
    }


def _wan22_i2v_inputs(draw: Draw, text: Draw, device: Device) -> Inputs:
    return _wan_inputs(draw, text, device, channels=36)


def _wan22_5b_inputs(draw: Draw, text: Draw, device: Device) -> Inputs:
    timestep = torch.full((1, TOKENS), 500.0, device=device)
    timestep[:, : TOKENS // 3] = 0  # the first frame is given
    return {**_wan_inputs(draw, text, device, channels=48), "timestep": timestep}


def _vace_inputs(draw: Draw, text: Draw, device: Device) -> Inputs:
    return {
        **_wan_inputs(draw, text, device),
        "control_hidden_states": draw(1, 8, *LATENT),
        "control_hidden_states_scale": torch.tensor([1.0, 0.5], device=device).bfloat16(),
    }


def _animate_inputs(draw: Draw, text: Draw, device: Device) -> Inputs:
    frames, height, width = LATENT
    return {
        **_wan_inputs(draw, text, device, channels=12),
        "encoder_hidden_states": text(1, 512, TEXT_DIM),
        "encoder_hidden_states_image": draw(1, 17, IMAGE_DIM),
        "pose_hidden_states": draw(1, 4, frames - 1, height, width),
        # One latent frame is the reference; the others are 1 + 4 frames of face.
        "face_pixel_values": draw(1, 3, 5, 16, 16),
    }


def _qwen_inputs(draw: Draw, text: Draw, device: Device) -> Inputs:
    return {
        "hidden_states": draw(1, 12, 16),
        "encoder_hidden_states": text(1, 7, TEXT_DIM),
        "encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.bool, device=device),
        "timestep": torch.tensor([0.5], device=device),
        "img_shapes": [[(1, 3, 4)]],
    }


ANIMATE: dict[str, Any] = {
    "added_kv_proj_dim": 48,
    "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 8,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2,
}
"""What only Animate has, small."""


def _animate() -> nn.Module:
    return WanAnimateTransformer3DModel(
        **_wan(in_channels=12, num_layers=4),
        latent_channels=4,
        image_dim=IMAGE_DIM,
        **ANIMATE,
    )


def _qwen() -> nn.Module:
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(8, 4, 4),
    )


def _kind(describe: Callable[..., nn.Module], **config: Any) -> Callable[[], nn.Module]:
    return lambda: describe(**_wan(**config))


MODELS: dict[str, SmallModel] = {
    kind.name: kind
    for kind in (
        SmallModel("wan21_t2v", 5, _kind(WanTransformer3DModel), _wan_inputs),
        SmallModel(
            "wan21_i2v",
            4,
            _kind(
                WanTransformer3DModel,
                in_channels=12,
                num_layers=4,
                image_dim=IMAGE_DIM,
                added_kv_proj_dim=48,
            ),
            _wan21_i2v_inputs,
        ),
        SmallModel(
            "wan22_i2v",
            7,
            _kind(WanTransformer3DModel, in_channels=36, num_layers=7),
            _wan22_i2v_inputs,
        ),
        SmallModel(
            "wan22_5b",
            3,
            _kind(WanTransformer3DModel, in_channels=48, out_channels=48, num_layers=3),
            _wan22_5b_inputs,
        ),
        SmallModel(
            "vace",
            6,
            _kind(WanVACETransformer3DModel, num_layers=4, vace_layers=[0, 2], vace_in_channels=8),
            _vace_inputs,
        ),
        SmallModel("animate", 6, _animate, _animate_inputs),
        SmallModel("qwen_image", 3, _qwen, _qwen_inputs),
    )
}


class Backwards(nn.Module):
    """Runs its blocks in the order that nobody expects."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = layer(x)
        return x
