"""Text and image encoders in numbers: bytes of their blocks and of the rest, loaded in bf16.

UMT5's class keeps `wo` in fp32 only when it is loaded in fp16: in bf16 all of it is bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wanoffload.facts.model import ComponentFacts
from wanoffload.facts.tally import BF16, Sizes, dense, image_bytes

UMT5_DEFAULTS: dict[str, Any] = {
    "vocab_size": 250112,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "gated-gelu",
}
CLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
}
QWEN_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
QWEN_VISION_DEFAULTS: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
}
"""Of the classes of transformers' configs, for fields that a config leaves out."""


def umt5_facts(config: Mapping[str, Any]) -> ComponentFacts:
    """UMT5EncoderModel: each block has its own relative positions."""
    get = {**UMT5_DEFAULTS, **config}
    d, inner = get["d_model"], get["num_heads"] * get["d_kv"]
    up = 2 if get["feed_forward_proj"].startswith("gated") else 1
    attention = [d * inner * BF16] * 4
    positions = get["relative_attention_num_buckets"] * get["num_heads"] * BF16
    block = [*attention, positions, d * BF16, *[d * get["d_ff"] * BF16] * (up + 1), d * BF16]
    other = (get["vocab_size"] + 1) * d * BF16
    return ComponentFacts((image_bytes(block),) * get["num_layers"], other)


def clip_vision_facts(config: Mapping[str, Any], projected: bool) -> ComponentFacts:
    """CLIPVisionModel, or CLIPVisionModelWithProjection where `projected`."""
    get = {**CLIP_DEFAULTS, **config}
    d, hidden = get["hidden_size"], get["intermediate_size"]
    block = [*dense(d, d) * 4, *[d * BF16] * 4, *dense(d, hidden), *dense(hidden, d)]
    patches = (get["image_size"] // get["patch_size"]) ** 2
    other = get["num_channels"] * get["patch_size"] ** 2 + 1 + patches + 1 + 4
    other += get["projection_dim"] if projected else 0
    return ComponentFacts((image_bytes(block),) * get["num_hidden_layers"], other * d * BF16)


def qwen_vl_facts(config: Mapping[str, Any]) -> ComponentFacts:
    """Qwen2_5_VLForConditionalGeneration: the language model's blocks; vision is in the rest."""
    text = {**QWEN_TEXT_DEFAULTS, **config, **config.get("text_config", {})}
    vision = {**QWEN_VISION_DEFAULTS, **config.get("vision_config", {})}
    d, hidden = text["hidden_size"], text["intermediate_size"]
    shared = d * text["num_key_value_heads"] // text["num_attention_heads"]
    attention = [*dense(d, d), *dense(d, shared) * 2, d * d * BF16]
    block = [*attention, *[d * hidden * BF16] * 3, d * BF16, d * BF16]
    tied = config.get("tie_word_embeddings", False)
    words = text["vocab_size"] * d * BF16 * (1 if tied else 2)
    other = words + d * BF16 + sum(_qwen_vision(vision))
    return ComponentFacts((image_bytes(block),) * text["num_hidden_layers"], other)


def _qwen_vision(get: Mapping[str, Any]) -> Sizes:
    d, hidden = get["hidden_size"], get["intermediate_size"]
    pixels = get["in_channels"] * get["temporal_patch_size"] * get["patch_size"] ** 2
    merged = d * get["spatial_merge_size"] ** 2
    block = [d * BF16] * 2 + dense(d, 3 * d) + dense(d, d)
    block += dense(d, hidden) * 2 + dense(hidden, d)
    merger = [d * BF16, *dense(merged, merged), *dense(merged, get["out_hidden_size"])]
    return [pixels * d * BF16, *block * get["depth"], *merger]
