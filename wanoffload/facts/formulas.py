"""From a component's config to its facts, without torch and without weights.

What a forward takes is counted operation by operation, as the code of diffusers' modules runs them
(read in version 0.42); tests compare the counts with a dry run of these modules on meta tensors.
Weights are those of a load in bf16: transformers with what their class keeps in fp32, encoders in
bf16, Wan's VAE in fp32, as its pipelines are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from wanoffload.facts.formulas_animate import animate_facts
from wanoffload.facts.formulas_encoders import clip_vision_facts, qwen_vl_facts, umt5_facts
from wanoffload.facts.formulas_qwen import qwen_facts
from wanoffload.facts.formulas_vace import vace_facts
from wanoffload.facts.formulas_vae import qwen_vae_facts, wan_vae_facts
from wanoffload.facts.formulas_wan import wan_facts
from wanoffload.facts.model import ComponentFacts, DitFacts

Config = Mapping[str, Any]

TI2V_5B_CHANNELS = 48
"""Latents of Wan2.2's VAE: only TI2V-5B takes them, and its pipeline has `expand_timesteps`."""

_DITS: dict[str, Callable[[Config], DitFacts]] = {
    "WanVACETransformer3DModel": vace_facts,
    "WanAnimateTransformer3DModel": animate_facts,
    "QwenImageTransformer2DModel": qwen_facts,
}
_COMPONENTS: dict[str, Callable[[Config], ComponentFacts]] = {
    "UMT5EncoderModel": umt5_facts,
    "CLIPVisionModel": lambda config: clip_vision_facts(config, projected=False),
    "CLIPVisionModelWithProjection": lambda config: clip_vision_facts(config, projected=True),
    "Qwen2_5_VLForConditionalGeneration": qwen_vl_facts,
    "AutoencoderKLWan": wan_vae_facts,
    "AutoencoderKLQwenImage": qwen_vae_facts,
}


def knows_dit(name: str) -> bool:
    """Whether `dit_facts` has formulas for the class of this name."""
    return name == "WanTransformer3DModel" or name in _DITS


def dit_facts(config: Config, expand_timesteps: bool | None = None) -> DitFacts:
    """Facts of a diffusion transformer; `config` as diffusers saves it, `_class_name` included.

    `expand_timesteps`: each token has its own timestep, as the pipeline's config says; None: where
    the latents are TI2V-5B's. Raises ValueError for a class that no formula is for.
    """
    name = class_name(config)
    if name == "WanTransformer3DModel":
        if expand_timesteps is None:
            expand_timesteps = config.get("in_channels") == TI2V_5B_CHANNELS
        return wan_facts(config, token_timesteps=expand_timesteps)
    if name not in _DITS:
        known = ", ".join(("WanTransformer3DModel", *_DITS))
        raise ValueError(f"no formula for the transformer class {name!r}; there are for: {known}")
    return _DITS[name](config)


def component_facts(config: Config) -> ComponentFacts:
    """Facts of an encoder or a VAE. Raises ValueError for a class that no formula is for."""
    name = class_name(config)
    if name not in _COMPONENTS:
        known = ", ".join(_COMPONENTS)
        raise ValueError(f"no formula for the component class {name!r}; there are for: {known}")
    return _COMPONENTS[name](config)


def class_name(config: Config) -> str:
    """Diffusers writes `_class_name`, transformers `architectures`; "" where neither is there."""
    return str(config.get("_class_name") or next(iter(config.get("architectures") or ()), ""))
