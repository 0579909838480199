"""Published pipelines, so that a plan needs neither weights nor a network.

Of each config only the fields that the formulas read; what is left out is the class's default.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]

_WAN_14B: Config = {"_class_name": "WanTransformer3DModel"}
_WAN_1_3B: Config = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 12,
    "ffn_dim": 8960,
    "num_layers": 30,
}
_WAN_5B: Config = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 24,
    "ffn_dim": 14336,
    "num_layers": 30,
    "in_channels": 48,
    "out_channels": 48,
}
_WITH_LATENTS: Config = {**_WAN_14B, "in_channels": 36}
"""Wan2.2's I2V: the picture comes as latents, beside the noise."""
_WITH_PICTURE: Config = {**_WITH_LATENTS, "image_dim": 1280, "added_kv_proj_dim": 5120}
"""Wan2.1's I2V: through CLIP, too."""
_VACE = "WanVACETransformer3DModel"
_ANIMATE: Config = {**_WITH_PICTURE, "_class_name": "WanAnimateTransformer3DModel"}
_UMT5_XXL: Config = {
    "_class_name": "UMT5EncoderModel",
    "vocab_size": 256384,
    "d_model": 4096,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
}
_CLIP_VIT_H: Config = {
    "_class_name": "CLIPVisionModel",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "patch_size": 14,
}
_WAN21_VAE: Config = {"_class_name": "AutoencoderKLWan"}
_WAN22_VAE: Config = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
_QWEN_IMAGE: Config = {"_class_name": "QwenImageTransformer2DModel"}
_QWEN_VL_7B: Config = {
    "_class_name": "Qwen2_5_VLForConditionalGeneration",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vision_config": {"hidden_size": 1280},
}
_QWEN_VAE: Config = {"_class_name": "AutoencoderKLQwenImage"}


def _wan(pipeline: str, *transformers: Config, vae: Config = _WAN21_VAE, **more: Any) -> Config:
    parts = dict(zip(("transformer", "transformer_2"), transformers, strict=False))
    return {"_class_name": pipeline, **parts, "text_encoder": _UMT5_XXL, "vae": vae, **more}


def _qwen(pipeline: str) -> Config:
    parts = {"transformer": _QWEN_IMAGE, "text_encoder": _QWEN_VL_7B, "vae": _QWEN_VAE}
    return {"_class_name": pipeline, **parts}


_I2V_21 = _wan("WanImageToVideoPipeline", _WITH_PICTURE, image_encoder=_CLIP_VIT_H)

PUBLISHED: dict[str, Config] = {
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _wan(
        "WanPipeline", _WAN_14B, _WAN_14B, boundary_ratio=0.875
    ),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": _wan(
        "WanImageToVideoPipeline", _WITH_LATENTS, _WITH_LATENTS, boundary_ratio=0.9
    ),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _wan(
        "WanPipeline", _WAN_5B, vae=_WAN22_VAE, expand_timesteps=True
    ),
    "Wan-AI/Wan2.2-Animate-14B-Diffusers": _wan(
        "WanAnimatePipeline", _ANIMATE, image_encoder=_CLIP_VIT_H
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan("WanPipeline", _WAN_14B),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _wan("WanPipeline", _WAN_1_3B),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _I2V_21,
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": _I2V_21,
    "Wan-AI/Wan2.1-VACE-14B-diffusers": _wan("WanVACEPipeline", {**_WAN_14B, "_class_name": _VACE}),
    "Wan-AI/Wan2.1-VACE-1.3B-diffusers": _wan(
        "WanVACEPipeline",
        {**_WAN_1_3B, "_class_name": _VACE, "vace_layers": list(range(0, 30, 2))},
    ),
    "Qwen/Qwen-Image": _qwen("QwenImagePipeline"),
    "Qwen/Qwen-Image-Edit-2509": _qwen("QwenImageEditPlusPipeline"),
}
"""The pipeline's class and settings, and the configs of its components."""


def published(name: str) -> tuple[str, Config]:
    """The id as published and its entry; case does not matter. ValueError for an unknown id."""
    for known, entry in PUBLISHED.items():
        if known.lower() == name.lower():
            return known, entry
    raise ValueError(
        f"{name!r} is neither a folder nor one of the published models known here"
        f"{did_you_mean(name)}: {', '.join(PUBLISHED)}. "
        "A local folder in the hub's layout works for any model."
    )


def did_you_mean(name: str) -> str:
    """A hint at the published id that a name is close to, with or without its owner; else ""."""
    ids = {known.lower(): known for known in PUBLISHED}
    ids |= {known.partition("/")[2].lower(): known for known in PUBLISHED}
    near = difflib.get_close_matches(name.lower(), ids, 1, cutoff=0.75)
    return f" (did you mean {ids[near[0]]}?)" if near else ""
