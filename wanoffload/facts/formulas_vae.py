"""The VAEs of Wan and of Qwen-Image in numbers: weights, and the peak of a decode.

A frame of latents becomes four of pixels (the first only one), one after the other. Every causal
convolution keeps the last two frames of what came in, for the next four.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from wanoffload.facts.model import ComponentFacts
from wanoffload.facts.tally import BF16, FP32

DEFAULTS: dict[str, Any] = {
    "base_dim": 96,
    "decoder_base_dim": None,
    "z_dim": 16,
    "dim_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "attn_scales": (),
    "temperal_downsample": (False, True, True),
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
}
"""Of diffusers' AutoencoderKLWan, for fields that a config leaves out."""

CACHED_FRAMES = 2
FRAMES_AT_ONCE = 4


def wan_vae_facts(config: Mapping[str, Any]) -> ComponentFacts:
    """AutoencoderKLWan in fp32, as Wan's pipelines are loaded.

    The peak is decoding's, of five frames and more; encoding, and one frame, take less. What cuDNN
    may take as workspace is not in it.
    """
    get = _fields(config)
    per_pixel = (get["patch_size"] or 1) ** 2
    side = get["scale_factor_spatial"]
    latents = 2 * get["z_dim"] / (side**2 * get["scale_factor_temporal"])
    video = 3 * FP32
    inside = (_cached_channels(get) * CACHED_FRAMES + _last_block(get)) / per_pixel
    return ComponentFacts(
        other_bytes=sum(_elements(get)) * FP32,
        activation_bytes_per_pixel=inside * FP32 + FRAMES_AT_ONCE * video,
        activation_bytes_per_voxel=video + latents * FP32,
    )


def qwen_vae_facts(config: Mapping[str, Any]) -> ComponentFacts:
    """AutoencoderKLQwenImage in bf16: Wan's first VAE, for one frame.

    The first frame leaves one cached frame at each convolution. At the peak, in the last one but
    one: its input padded to three frames, its output, input, skip, what goes into the cache, and
    what the caller keeps; less two caches not yet there.
    """
    get = _fields(config)
    channels = get["base_dim"] * get["dim_mult"][0]
    inside = _cached_channels(get, first=True) + (3 + 5 - 2) * channels
    return ComponentFacts(
        other_bytes=sum(_elements(get)) * BF16,
        activation_bytes_per_pixel=inside * BF16,
    )


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    get = {**DEFAULTS, **config}
    if get["attn_scales"]:
        raise ValueError(f"a VAE with attn_scales {get['attn_scales']} is not known; expected none")
    get["decoder_base_dim"] = get["decoder_base_dim"] or get["base_dim"]
    return get


# Weights, in elements.


def _conv(inputs: int, outputs: int, taps: int) -> int:
    return inputs * outputs * taps + outputs


def _resnet(inputs: int, outputs: int) -> int:
    shortcut = _conv(inputs, outputs, 1) if inputs != outputs else 0
    return inputs + _conv(inputs, outputs, 27) + outputs + _conv(outputs, outputs, 27) + shortcut


def _middle(width: int) -> int:
    return 2 * _resnet(width, width) + width + _conv(width, 3 * width, 1) + _conv(width, width, 1)


def _elements(get: Mapping[str, Any]) -> Iterator[int]:
    yield from _encoder(get)
    yield from _decoder(get)
    z = get["z_dim"]
    yield _conv(2 * z, 2 * z, 1) + _conv(z, z, 1)


def _encoder(get: Mapping[str, Any]) -> Iterator[int]:
    dims = [get["base_dim"] * factor for factor in (1, *get["dim_mult"])]
    yield _conv(get["in_channels"], dims[0], 27)
    for index, (inputs, outputs) in enumerate(itertools.pairwise(dims)):
        yield _resnet(inputs, outputs) + (get["num_res_blocks"] - 1) * _resnet(outputs, outputs)
        if index < len(get["dim_mult"]) - 1:
            yield _conv(outputs, outputs, 9)
            yield _conv(outputs, outputs, 3) if get["temperal_downsample"][index] else 0
    yield _middle(dims[-1]) + dims[-1] + _conv(dims[-1], 2 * get["z_dim"], 27)


def _decoder_blocks(get: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Channels in and out. In Wan's first VAE, upsampling between them halves the channels."""
    mult = get["dim_mult"]
    dims = [get["decoder_base_dim"] * factor for factor in (mult[-1], *reversed(mult))]
    pairs = list(itertools.pairwise(dims))
    if get["is_residual"]:
        return pairs
    return [pairs[0], *((inputs // 2, outputs) for inputs, outputs in pairs[1:])]


def _decoder(get: Mapping[str, Any]) -> Iterator[int]:
    blocks = _decoder_blocks(get)
    width = blocks[0][0]
    yield _conv(get["z_dim"], width, 27) + _middle(width)
    upsample_time = [*reversed(get["temperal_downsample"])]
    for index, (inputs, outputs) in enumerate(blocks):
        yield _resnet(inputs, outputs) + get["num_res_blocks"] * _resnet(outputs, outputs)
        if index < len(blocks) - 1:
            yield _conv(outputs, outputs if get["is_residual"] else outputs // 2, 9)
            yield _conv(outputs, 2 * outputs, 3) if upsample_time[index] else 0
    yield blocks[-1][1] + _conv(blocks[-1][1], get["out_channels"], 27)


# Activations, in elements for each position of the decoder's last and largest size.


def _cached_channels(get: Mapping[str, Any], first: bool = False) -> float:
    """Channels that come into the decoder's convolutions, less by 4 for each halving of the size.

    Upsampling in time caches too, but not at the `first` frame.
    """
    blocks = _decoder_blocks(get)
    upsample_time = [*reversed(get["temperal_downsample"]), False]
    channels = (get["z_dim"] + 4 * blocks[0][0]) / 4 ** (len(blocks) - 1)
    for index, (inputs, outputs) in enumerate(blocks):
        count = inputs + (2 * get["num_res_blocks"] + 1) * outputs
        count += outputs if upsample_time[index] and not first else 0
        channels += count / 4 ** (len(blocks) - 1 - index)
    return float(channels + blocks[-1][1])


def _last_block(get: Mapping[str, Any]) -> int:
    """In a convolution of the last block: with the two cached frames, six, before and after
    padding; its input, the block's input, kept by the caller, and the skip, four each; two that go
    into the cache. In the residual kind at the block's first convolution, whose inputs are wider;
    the block's copy of its input is the fourth, and the skip comes projected on top.
    """
    inputs, outputs = _decoder_blocks(get)[-1]
    frames = 2 * (CACHED_FRAMES + FRAMES_AT_ONCE) + 3 * FRAMES_AT_ONCE + CACHED_FRAMES
    if get["is_residual"]:
        return frames * inputs + FRAMES_AT_ONCE * outputs
    return frames * outputs
