"""A pipeline as seen, wherever it was seen, and the facts that follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from wanoffload.facts.formulas import (
    TI2V_5B_CHANNELS,
    class_name,
    component_facts,
    dit_facts,
    knows_dit,
)
from wanoffload.facts.formulas_animate import SEGMENT_FRAMES
from wanoffload.facts.model import (
    MOVA,
    OTHER,
    QWEN_IMAGE,
    WAN,
    ComponentFacts,
    DitFacts,
    ModelFacts,
)

Config = Mapping[str, Any]

WAN_PIPELINES = (
    "WanPipeline",
    "WanImageToVideoPipeline",
    "WanVACEPipeline",
    "WanAnimatePipeline",
    "WanVideoToVideoPipeline",
)
A14B_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
ROLES = ("transformer", "text_encoder", "image_encoder", "vae", "scheduler")


@dataclass(frozen=True)
class Part:
    """One component: its config, with its class's name, and its weights where they were seen."""

    config: Config
    weights: ComponentFacts | None = None


@dataclass(frozen=True)
class Parts:
    """A pipeline: its class (of a bare transformer, that class), settings and components."""

    name: str
    pipeline: str
    config: Config
    parts: Mapping[str, Part] = field(default_factory=dict)
    cache_dit: bool = False
    sharded: bool = False


def is_dit(name: str) -> bool:
    """Whether a component of this name is a diffusion transformer ("dit" as MOVA names its own)."""
    return name.startswith("transformer") or "dit" in name.split("_")


def is_relevant(name: str) -> bool:
    """Whether a component of this name says anything about memory or kind."""
    return is_dit(name) or name.startswith(ROLES)


def model_facts(seen: Parts) -> ModelFacts:
    """The facts. Raises ValueError for a component that has neither weights nor a formula."""
    dits = [part for name, part in seen.parts.items() if is_dit(name)]
    vae = seen.parts.get("vae")
    animated = seen.pipeline.startswith("WanAnimate")
    return ModelFacts(
        name=seen.name,
        family=family(seen.pipeline),
        a14b=_a14b(seen),
        dmd_denoising_steps=_dmd_denoising_steps(seen),
        cache_dit=seen.cache_dit,
        sharded=seen.sharded,
        dits=tuple(_dit(part, seen.config.get("expand_timesteps")) for part in dits),
        text_encoder=_merged(_named(seen, "text_encoder")),
        image_encoder=_merged(_named(seen, "image_encoder")),
        vae=_component(vae) if vae is not None else None,
        temporal_factor=_patch(dits)[0] * (_vae_field(vae, "scale_factor_temporal") or 4),
        pixels_per_token=_patch(dits)[1] * _vae_side(vae, dits),
        token_factor=2.0 if _edits(seen.pipeline) else 1.0,
        segment_frames=SEGMENT_FRAMES if animated else 0,
        reference_frames=1 if animated else 0,
    )


def family(pipeline: str) -> str:
    """By the name of the pipeline's class, not of its parts; of a bare transformer, of its own."""
    if pipeline in WAN_PIPELINES or (knows_dit(pipeline) and pipeline.startswith("Wan")):
        return WAN
    if pipeline.startswith("MOVA"):
        return MOVA
    return QWEN_IMAGE if pipeline.startswith("QwenImage") else OTHER


def _a14b(seen: Parts) -> bool:
    """Two experts, of which either may be left out, or the timestep where they change."""
    two = seen.config.get("boundary_ratio") is not None or "transformer_2" in seen.parts
    return two and seen.pipeline in A14B_PIPELINES


def _edits(pipeline: str) -> bool:
    """Qwen-Image's editing: the tokens of the given picture stand beside those of the new one."""
    return pipeline.startswith("QwenImageEdit")


def _dmd_denoising_steps(seen: Parts) -> Sequence[int] | None:
    """From the pipeline's settings, or a transformer's or scheduler's config."""
    holders = [part.config for name, part in seen.parts.items() if is_dit(name)]
    holders += [part.config for part in _named(seen, "scheduler")]
    for config in (seen.config, *holders):
        steps: Sequence[int] | None = config.get("dmd_denoising_steps")
        if steps is not None:
            return tuple(steps)
    return None


def _named(seen: Parts, role: str) -> list[Part]:
    return [part for name, part in seen.parts.items() if name.startswith(role)]


def _dit(part: Part, expand_timesteps: bool | None) -> DitFacts:
    """By the formulas, with the weights as seen. Of other classes only the weights are known."""
    if part.weights is None:
        return dit_facts(part.config, expand_timesteps)
    seen = part.weights
    weights: dict[str, Any] = {
        "block_bytes": seen.block_bytes,
        "other_bytes": seen.other_bytes,
        "bf16_bytes": seen.bf16_bytes,
        "parts": seen.parts,
        "loose_bytes": seen.loose_bytes,
        "compiled": seen.compiled,
    }
    if not knows_dit(class_name(part.config)):
        return DitFacts(**weights)
    return replace(dit_facts(part.config, expand_timesteps), **weights)


def _component(part: Part) -> ComponentFacts:
    if part.weights is None:
        return component_facts(part.config)
    blocks, other = part.weights.block_bytes, part.weights.other_bytes
    try:
        known = component_facts(part.config)
    except ValueError:
        return ComponentFacts(blocks, other)
    return replace(known, block_bytes=blocks, other_bytes=other)


def _merged(parts: Iterable[Part]) -> ComponentFacts | None:
    """Several text encoders count as one."""
    found = [_component(part) for part in parts]
    if len(found) < 2:
        return found[0] if found else None
    blocks = tuple(size for facts in found for size in facts.block_bytes)
    return ComponentFacts(blocks, sum(facts.other_bytes for facts in found))


def _patch(dits: Sequence[Part]) -> tuple[int, int]:
    """Latent frames, and side of the square of latents, that become one token."""
    size = dits[0].config.get("patch_size") if dits else None
    if isinstance(size, Sequence) and len(size) == 3:
        return size[0], size[1]
    return 1, size if isinstance(size, int) else 2


def _vae_side(vae: Part | None, dits: Sequence[Part]) -> int:
    """Pixels of one latent's side. TI2V-5B's latents tell, where the VAE was left out."""
    if side := _vae_field(vae, "scale_factor_spatial"):
        return side
    channels = {part.config.get("in_channels") for part in dits}
    return 16 if vae is None and TI2V_5B_CHANNELS in channels else 8


def _vae_field(vae: Part | None, name: str) -> int | None:
    return vae.config.get(name) if vae is not None else None
