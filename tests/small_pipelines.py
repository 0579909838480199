"""Small pipelines of every kind that is enabled: random weights, made on the spot, real code.

    pipe = PIPELINES["t2v"].make()
    video = PIPELINES["t2v"].run(pipe)

The same name gives the same weights every time, and the same call the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from demo import checkpoint
from demo.checkpoint import TINY
from tests.small_models import ANIMATE, fill

IMAGE_DIM = 16
CHANNELS = 16  # of the VAE's latents
SIDE = 32
FRAMES = 5
PROMPT = "waves break on the rocks"


def _transformer(kind: type[nn.Module] = WanTransformer3DModel, **changes: Any) -> nn.Module:
    return kind(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "text_dim": TINY.text_dim,
            "freq_dim": 32,
            "ffn_dim": 64,
            "num_layers": 3,
            "rope_max_seq_len": 32,
            **changes,
        }
    )


def _image_encoder() -> nn.Module:
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
    )
    return CLIPVisionModel(config)


def _image_processor() -> CLIPImageProcessor:
    size = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessor(size=size, crop_size=size)


def _common(layers: int = 3) -> dict[str, Any]:
    """What every Wan pipeline has; the encoder's blocks are most of it, as in the real one."""
    tokenizer = checkpoint._tokenizer()
    sizes = checkpoint.Sizes(text_dim=TINY.text_dim, text_layers=layers)
    return {
        "tokenizer": tokenizer,
        "text_encoder": checkpoint._text_encoder(sizes, len(tokenizer)),
        "vae": AutoencoderKLWan(base_dim=TINY.vae_dim, z_dim=CHANNELS),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


def _filled(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Every component with random weights of its own, in its right dtypes."""
    for number, (name, module) in enumerate(sorted(pipe.components.items())):
        if not isinstance(module, nn.Module):
            continue
        if name.startswith("transformer"):
            fill(module, number)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(number)
                for parameter in module.parameters():
                    parameter.data += 0.01 * torch.randn_like(parameter)
            module.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _t2v() -> DiffusionPipeline:
    return WanPipeline(transformer=_transformer(), **_common())


def _a14b() -> DiffusionPipeline:
    return WanPipeline(
        transformer=_transformer(),
        transformer_2=_transformer(num_layers=4),
        boundary_ratio=0.9,
        **_common(),
    )


def _low_noise_only() -> DiffusionPipeline:
    return WanPipeline(
        transformer=None, transformer_2=_transformer(), boundary_ratio=1.0, **_common()
    )


def _i2v() -> DiffusionPipeline:
    return WanImageToVideoPipeline(
        transformer=_transformer(
            in_channels=2 * CHANNELS + 4, image_dim=IMAGE_DIM, added_kv_proj_dim=48
        ),
        image_encoder=_image_encoder(),
        image_processor=_image_processor(),
        **_common(),
    )


def _vace() -> DiffusionPipeline:
    return WanVACEPipeline(
        transformer=_transformer(
            WanVACETransformer3DModel, vace_layers=[0, 2], vace_in_channels=2 * CHANNELS + 64
        ),
        **_common(),
    )


def _animate() -> DiffusionPipeline:
    transformer = _transformer(
        WanAnimateTransformer3DModel,
        in_channels=2 * CHANNELS + 4,
        latent_channels=CHANNELS,
        num_layers=4,
        image_dim=IMAGE_DIM,
        **ANIMATE,
    )
    return WanAnimatePipeline(
        transformer=transformer,
        image_encoder=_image_encoder(),
        image_processor=_image_processor(),
        **_common(),
    )


def _qwen_image() -> DiffusionPipeline:
    tokenizer = checkpoint._tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TINY.text_dim,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": TINY.text_dim,
    }
    ids = {"vision_start_token_id": 3, "vision_end_token_id": 4}
    ids |= {"vision_token_id": 5, "image_token_id": 6, "video_token_id": 7}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return QwenImagePipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16),
        transformer=QwenImageTransformer2DModel(
            in_channels=4 * CHANNELS,
            out_channels=CHANNELS,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TINY.text_dim,
            axes_dims_rope=(8, 4, 4),
        ),
        vae=AutoencoderKLQwenImage(base_dim=TINY.vae_dim, z_dim=CHANNELS),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def _picture(seed: int = 0, side: int = SIDE) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _video_call() -> dict[str, Any]:
    return {
        "prompt": PROMPT,
        "negative_prompt": "blurry",
        "height": SIDE,
        "width": SIDE,
        "num_frames": FRAMES,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "max_sequence_length": 16,
        "output_type": "pt",
    }


def _i2v_call() -> dict[str, Any]:
    # The attention takes the last 512 tokens for text.
    return {**_video_call(), "image": _picture(), "max_sequence_length": 512}


def _vace_call() -> dict[str, Any]:
    return {**_video_call(), "video": [_picture(i) for i in range(FRAMES)]}


def _animate_call() -> dict[str, Any]:
    call = {**_i2v_call(), "segment_frame_length": FRAMES, "guidance_scale": 1.0}
    del call["num_frames"]
    frames = [_picture(i) for i in range(FRAMES)]
    return {**call, "pose_video": frames, "face_video": frames}


def _qwen_call() -> dict[str, Any]:
    return {
        "prompt": PROMPT,
        "negative_prompt": "blurry",
        "true_cfg_scale": 3.0,
        "height": SIDE,
        "width": SIDE,
        "num_inference_steps": 2,
        "max_sequence_length": 64,
        "output_type": "pt",
    }


@dataclass(frozen=True)
class SmallPipeline:
    """A kind of pipeline: `build` it, `call` it."""

    build: Callable[[], DiffusionPipeline]
    call: Callable[[], dict[str, Any]] = _video_call

    def make(self) -> DiffusionPipeline:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _filled(self.build())

    def run(self, pipe: Any, **changes: Any) -> Tensor:
        """The video, or the image, of one call with a seed of its own."""
        generator = torch.Generator("cpu").manual_seed(7)
        arguments = {**self.call(), "generator": generator, **changes}
        output: Tensor = pipe(**arguments, return_dict=False)[0]
        return output


PIPELINES = {
    "t2v": SmallPipeline(_t2v),
    "a14b": SmallPipeline(_a14b),
    "low_noise_only": SmallPipeline(_low_noise_only),
    "i2v": SmallPipeline(_i2v, _i2v_call),
    "vace": SmallPipeline(_vace, _vace_call),
    "animate": SmallPipeline(_animate, _animate_call),
    "qwen_image": SmallPipeline(_qwen_image, _qwen_call),
}
