"""The models in their real shapes with random weights, their sizes and their inputs.

Random weights are fine for speed, but the dtypes are diffusers' own: bf16, with the modules that
the class keeps in fp32. A model is first described without memory and then filled, one tensor at a
time and each from a seed of its own, so that any process makes the same weights on the same device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

SEED = 20260101
TEXT_TOKENS = 512


@dataclass(frozen=True)
class Size:
    """A video: height and width in pixels, and frames."""

    height: int
    width: int
    frames: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.frames}"


@dataclass(frozen=True)
class ModelSpec:
    """A Wan transformer: its config, how its VAE shrinks a video, and the sizes measured on it.

    ``slow_sizes`` take so long that they are measured only where they are asked for by name.
    """

    name: str
    config: dict[str, Any]
    sizes: tuple[Size, ...]
    slow_sizes: tuple[Size, ...] = ()
    spatial: int = 8
    temporal: int = 4
    expand_timesteps: bool = False
    text_tokens: int = TEXT_TOKENS
    prefetches: tuple[int, ...] = field(default=(1, 2, 3))

    def latent_shape(self, size: Size) -> tuple[int, int, int, int, int]:
        """Batch, channels, latent frames, height and width of the model's input."""
        frames = (size.frames - 1) // self.temporal + 1
        height, width = size.height // self.spatial, size.width // self.spatial
        return 1, self.config["in_channels"], frames, height, width

    def tokens(self, size: Size) -> int:
        """Tokens a forward has to work on: patches are 1 x 2 x 2."""
        _, _, frames, height, width = self.latent_shape(size)
        return frames * (height // 2) * (width // 2)


def _config(dim: int, heads: int, ffn: int, layers: int, channels: int = 16) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": ffn,
        "num_layers": layers,
    }


SIZES_480P = (Size(480, 832, 1), Size(480, 832, 17), Size(480, 832, 81))
MODELS = {
    spec.name: spec
    for spec in (
        ModelSpec("14b", _config(5120, 40, 13824, 40), SIZES_480P, (Size(720, 1280, 81),)),
        ModelSpec("1.3b", _config(1536, 12, 8960, 30), SIZES_480P),
        ModelSpec(
            "5b",
            _config(3072, 24, 14336, 30, channels=48),
            (Size(704, 1280, 17), Size(704, 1280, 121)),
            spatial=16,
            expand_timesteps=True,
        ),
        ModelSpec(
            "tiny",
            {**_config(48, 2, 96, 6), "text_dim": 32, "freq_dim": 32},
            (Size(32, 48, 1), Size(32, 48, 9)),
            text_tokens=8,
            prefetches=(1, 2),
        ),
    )
}


def chosen_sizes(spec: ModelSpec, frames: Sequence[int] | None) -> list[Size]:
    """The sizes of a model with one of the numbers of frames asked for, or all."""
    return [size for size in spec.sizes if not frames or size.frames in frames]


def named_sizes(spec: ModelSpec, names: Sequence[str]) -> list[Size]:
    """The sizes of a model with one of these names, slow ones too."""
    return [size for size in (*spec.sizes, *spec.slow_sizes) if str(size) in names]


def describe_only(spec: ModelSpec) -> nn.Module:
    """The model without memory for its weights; the buffers of the rotary embedding are real."""
    from diffusers import WanTransformer3DModel
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    make: Any = WanTransformer3DModel
    with torch.device("meta"):
        model: Any = make(**spec.config)
    config = model.config
    model.rope = WanRotaryPosEmbed(
        config.attention_head_dim, config.patch_size, config.rope_max_seq_len
    )
    for name, parameter in model.named_parameters():
        dtype = kept_dtype(model, name)
        _set(model, name, torch.empty_like(parameter, dtype=dtype))
    return _ready(model)


def kept_dtype(model: nn.Module, name: str) -> torch.dtype:
    """The dtype in which diffusers keeps a parameter of a bf16 model."""
    kept: list[str] = getattr(model, "_keep_in_fp32_modules", None) or []
    return torch.float32 if any(part in kept for part in name.split(".")) else torch.bfloat16


def build(spec: ModelSpec, device: torch.device, seed: int = SEED) -> nn.Module:
    """A model with random weights on ``device``."""
    model = describe_only(spec)
    for index, (name, parameter) in enumerate(list(model.named_parameters())):
        _set(model, name, random_weight(name, parameter, device, seed + index))
    return model.to(device)


def build_on_host(spec: ModelSpec, device: torch.device, seed: int = SEED) -> nn.Module:
    """The same weights as :func:`build` makes on ``device``, in ordinary host memory.

    They are drawn on the device, one tensor at a time, because that takes a second where the host
    would take minutes.
    """
    model = describe_only(spec)
    staging = Staging(device, _largest_bytes(model))
    for index, (name, parameter) in enumerate(list(model.named_parameters())):
        weight = random_weight(name, parameter, device, seed + index)
        _set(model, name, staging.to_host(weight))
    return model


def copy_to_host(spec: ModelSpec, model: nn.Module) -> nn.Module:
    """A second model with the weights of ``model`` in ordinary host memory."""
    copy = describe_only(spec)
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    staging = Staging(device, _largest_bytes(model))
    for name, parameter in parameters.items():
        weight = staging.to_host(parameter.detach())
        _set(copy, name, weight.clone() if device.type == "cpu" else weight)
    return copy


class Staging:
    """A page-locked bounce buffer: a copy to the host at the link's rate instead of a tenth."""

    def __init__(self, device: torch.device, size: int) -> None:
        locked = device.type == "cuda"
        self._buffer = torch.empty(size if locked else 0, dtype=torch.uint8, pin_memory=locked)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in ordinary host memory; all threads share the first touch.

        One that is there already is given back as it is: letting go of large pieces of memory
        while a model is built makes the allocator keep all that is freed later.
        """
        if tensor.device.type == "cpu":
            return tensor
        bounce = self._buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        bounce.copy_(tensor)
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(bounce)


def _largest_bytes(model: nn.Module) -> int:
    return max(parameter.nbytes for parameter in model.parameters())


def random_weight(name: str, like: torch.Tensor, device: torch.device, seed: int) -> torch.Tensor:
    """Weights that keep the activations in range and let each of them change the output."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.empty(like.shape, dtype=like.dtype, device=device)
    if like.ndim >= 2:
        fan_in = like.shape[-1] if "scale_shift_table" in name else like[0].numel()
        return weight.normal_(std=fan_in**-0.5, generator=generator)
    weight.normal_(std=0.1, generator=generator)
    return weight.add_(1.0) if "norm" in name and name.endswith("weight") else weight


def _set(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Puts a tensor in the place of a parameter."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))


def _ready(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False).eval()


def blocks(model: nn.Module) -> nn.ModuleList:
    """The repeated blocks, which are what an offloader streams."""
    found = model.get_submodule("blocks")
    assert isinstance(found, nn.ModuleList)
    return found


@dataclass(frozen=True)
class ModelBytes:
    """How much a model weighs."""

    all: int
    blocks: int
    largest_block: int
    block_count: int


def model_bytes(spec: ModelSpec) -> ModelBytes:
    """The bytes of a model, read off its shapes."""
    model = describe_only(spec)
    per_block = [sum(p.nbytes for p in block.parameters()) for block in blocks(model)]
    whole = sum(parameter.nbytes for parameter in model.parameters())
    return ModelBytes(whole, sum(per_block), max(per_block), len(per_block))


@dataclass(frozen=True)
class Inputs:
    """What the two forwards of a step are given: the same latents and time, other text."""

    hidden_states: torch.Tensor
    timestep: torch.Tensor
    texts: dict[str, torch.Tensor]


def make_inputs(spec: ModelSpec, size: Size, device: torch.device, seed: int = SEED) -> Inputs:
    """Random latents and texts of a size, the same in every process."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)

    text_shape = (1, spec.text_tokens, spec.config["text_dim"])
    latents = draw(*spec.latent_shape(size))
    timestep = torch.tensor([500], device=device)
    if spec.expand_timesteps:
        timestep = timestep.float().expand(1, math.prod((1, spec.tokens(size))))
    return Inputs(latents, timestep, {"cond": draw(*text_shape), "uncond": draw(*text_shape)})


def forward(model: nn.Module, inputs: Inputs, name: str) -> torch.Tensor:
    """One of the two forwards, called as the pipeline calls it."""
    transformer: Any = model
    with transformer.cache_context(name):
        output: torch.Tensor = transformer(
            hidden_states=inputs.hidden_states,
            timestep=inputs.timestep,
            encoder_hidden_states=inputs.texts[name],
            return_dict=False,
        )[0]
    return output


def step(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """A denoising step with guidance: both forwards, nothing in between."""
    return [forward(model, inputs, name) for name in inputs.texts]
