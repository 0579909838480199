"""Qwen-Image's transformer in numbers: weights, work and activations, read off diffusers' module.

Two streams: n tokens of the picture and TEXT_TOKENS of text, joined in attention. All in bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wanoffload.facts.block_parts import BlockTensors, taken_apart
from wanoffload.facts.formulas_wan import CUBLAS_WORKSPACE_BYTES
from wanoffload.facts.model import DitFacts
from wanoffload.facts.tally import BF16, FP32, BlockSizes, Sizes, Tally, coefficients, dense

TEXT_TOKENS = 256
"""Prompts are not padded. This many are a long prompt or, in editing, a short one after the 190
tokens that the text encoder makes of the picture."""
COMPLEX = 8
INT32 = 4
BOOL = 1
TIME_DIM = 256

DEFAULTS: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "zero_cond_t": False,
    "use_additional_t_cond": False,
}
"""Of diffusers' class, for fields that a config leaves out."""


MASKED_ATTENTION = 0.53
"""Pipelines hand attention a mask of the text, which takes a slower kernel. Measured on an H200:
186 ms a forward of 4,096 tokens and 438 of 8,192, where 188 and 446 are predicted."""


def qwen_facts(config: Mapping[str, Any]) -> DitFacts:
    """QwenImageTransformer2DModel."""
    get = {**DEFAULTS, **config}
    two = bool(get["zero_cond_t"])
    head, layers = get["attention_head_dim"], get["num_layers"]
    d = get["num_attention_heads"] * head
    block = BlockSizes(_block_sizes(d, head))
    outputs = get["patch_size"] ** 2 * (get["out_channels"] or get["in_channels"])

    def forward(t: Tally, n: int) -> None:
        _embed(t, n, d, head, get)
        for _ in range(layers):
            _block(t, n, d, head, two)
        t.move(d, BF16, BF16)
        t.linear(1, d, 2 * d)
        _modulated(t, n, d)
        t.linear(n, d, outputs)

    parts, loose = taken_apart([BlockTensors.of(block)] * layers)
    return DitFacts(
        block_bytes=(block.image_bytes,) * layers,
        other_bytes=sum(_outer_sizes(d, outputs, get)),
        bf16_bytes=block.bf16_bytes * layers,
        parts=parts,
        loose_bytes=loose,
        activation_bytes_per_token=_activation_per_token(d, head, get["in_channels"], two),
        activation_bytes=_activation_fixed(d, head, get["joint_attention_dim"]),
        attention_efficiency=MASKED_ATTENTION,
        **coefficients(forward),  # type: ignore[arg-type]  # kernels is the only int
    )


def _block_sizes(d: int, head: int) -> list[Sizes]:
    """The modulation and the feed-forward of each stream, and attention between the picture's:
    norms of the picture's q and k, q, k and v of both streams, out of both, norms of the text's."""
    modulation, forward = dense(d, 6 * d), [*dense(d, 4 * d), *dense(4 * d, d)]
    attention = [*[head * BF16] * 2, *dense(d, d) * 8, *[head * BF16] * 2]
    return [modulation, attention, forward, modulation, forward]


def _outer_sizes(d: int, outputs: int, get: Mapping[str, Any]) -> Sizes:
    joint = get["joint_attention_dim"]
    sizes = [*dense(TIME_DIM, d), *dense(d, d), joint * BF16]
    sizes += dense(get["in_channels"], d) + dense(joint, d) + dense(d, 2 * d) + dense(d, outputs)
    return sizes + ([2 * d * BF16] if get["use_additional_t_cond"] else [])


def _rms_norm(t: Tally, rows: float, width: float) -> None:
    """Diffusers' own, in eight kernels: square, mean, root, each in fp32, and back."""
    elements = rows * width
    t.move(elements, BF16, FP32)
    t.move(elements, FP32, FP32)
    t.move(elements, FP32)
    t.kernels += 2
    t.move(elements, BF16, FP32)
    t.move(elements, FP32, BF16)
    t.move(elements, BF16, BF16)
    t.also(6 * rows * FP32)


def _embed(t: Tally, n: float, d: int, head: int, get: Mapping[str, Any]) -> None:
    """Picture, text and timestep. Positions are cached from the second forward on: a copy alone."""
    joint = get["joint_attention_dim"]
    t.linear(n, get["in_channels"], d)
    _rms_norm(t, TEXT_TOKENS, joint)
    t.linear(TEXT_TOKENS, joint, d)
    t.kernels += 12
    times = 2 if get["zero_cond_t"] else 1
    t.linear(times, TIME_DIM, d)
    t.move(times * d, BF16, BF16)
    t.linear(times, d, d)
    t.kernels += 2 if get["use_additional_t_cond"] else 0
    t.kernels += 2 if get["zero_cond_t"] else 0
    t.move(n * head / 2, COMPLEX, COMPLEX)


def _modulated(t: Tally, rows: float, d: int, two: bool = False) -> None:
    """Layer norm, 1 + scale, times, plus, all in bf16.

    `two` modulations (`zero_cond_t`): shift, scale and gate are picked for each token beforehand.
    """
    t.move(rows * d, BF16, BF16)
    for _ in range(3 if two else 0):
        t.move(rows, INT32, BOOL)
        t.move(rows * d, BF16)
        t.also(rows * BOOL)
    t.move(rows * d if two else d, BF16, BF16)
    for _ in ("times", "plus"):
        t.move(rows * d, BF16, BF16)
        t.also(rows * d * BF16 if two else 0)


def _rope(t: Tally, rows: float, d: int, head: int) -> None:
    """To fp32, a complex product, back."""
    t.move(rows * d, BF16, FP32)
    t.move(rows * d / 2, COMPLEX, COMPLEX)
    t.also(rows * head / 2 * COMPLEX)
    t.move(rows * d, FP32, BF16)


def _block(t: Tally, n: float, d: int, head: int, two: bool) -> None:
    """One forward of QwenImageTransformerBlock."""
    streams = ((n, two), (TEXT_TOKENS, False))
    for rows, picked in streams:
        t.move((1 + picked) * d, BF16, BF16)
        t.linear(1 + picked, d, 6 * d)
        _modulated(t, rows, d, picked)
        for _ in "qkv":
            t.linear(rows, d, d)
        for _ in "qk":
            _rms_norm(t, rows * d / head, head)
            _rope(t, rows, d, head)
    for _ in "qkv":
        t.move((n + TEXT_TOKENS) * d, BF16, BF16)
    t.attend(n + TEXT_TOKENS, n + TEXT_TOKENS, d)
    for rows, picked in streams:
        t.linear(rows, d, d)
        _gated_residual(t, rows, d, picked)
        _modulated(t, rows, d, picked)
        t.linear(rows, d, 4 * d)
        t.move(rows * 4 * d, BF16, BF16)
        t.linear(rows, 4 * d, d)
        _gated_residual(t, rows, d, picked)


def _gated_residual(t: Tally, rows: float, d: int, picked: bool) -> None:
    t.move(rows * d, BF16, BF16, BF16 if picked else 0)
    t.move(rows * d, BF16, BF16, BF16)


def _activation_per_token(d: int, head: int, in_channels: int, two: bool) -> float:
    """In the picture's feed-forward: its hidden layer before and after GELU (2 x 4 d), and seven
    states of d: the block's input, kept by the caller, the present one, attention's output, two
    norms, two modulated (and both gates, where picked for each token). Positions as complex
    numbers, cached, and a copy; the latents.
    """
    return (2 * 4 + 7 + (2 if two else 0)) * d * BF16 + head / 2 * COMPLEX * 2 + in_channels * BF16


def _activation_fixed(d: int, head: int, joint: int) -> float:
    """Of the text: five states of d, and what came in; tables of positions; cuBLAS' workspace."""
    text = TEXT_TOKENS * (5 * d + joint) * BF16
    tables = 2 * 4096 * head / 2 * COMPLEX
    return text + tables + CUBLAS_WORKSPACE_BYTES
