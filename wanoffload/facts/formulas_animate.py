"""Animate in numbers: Wan's transformer, a pose, and the motion of a face.

A forward is one segment of the video: 77 frames, 20 latent ones, and the reference before them. The
motion encoder sees each frame of the face, whatever the size of the video.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wanoffload.facts.formulas_wan import make_facts
from wanoffload.facts.model import DitFacts
from wanoffload.facts.tally import BF16, FP32, BlockSizes, Sizes, Tally, dense
from wanoffload.facts.wan_forward import block, embed, head
from wanoffload.facts.wan_shape import WanShape, block_sizes, outer_sizes, shape_of

SEGMENT_FRAMES = 77
"""The pipeline's `segment_frame_length`."""
LATENT_FRAMES = 21
"""Of a segment: (77 - 1) / 4 + 1, and the reference."""
CHANNELS = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}
"""Channels of the motion encoder at each size of picture, by diffusers' default."""
BLUR = 4
"""Side of the filter before a convolution that halves the picture."""
MOTION_LINEARS = 5

DEFAULTS: dict[str, Any] = {
    "in_channels": 36,
    "latent_channels": 16,
    "image_dim": 1280,
    "motion_encoder_channel_sizes": None,
    "motion_encoder_size": 512,
    "motion_style_dim": 512,
    "motion_dim": 20,
    "motion_encoder_dim": 512,
    "face_encoder_hidden_dim": 1024,
    "face_encoder_num_heads": 4,
    "inject_face_latents_blocks": 5,
    "motion_encoder_batch_size": 8,
}
"""Of diffusers' class, for fields that a config leaves out."""


def animate_facts(config: Mapping[str, Any]) -> DitFacts:
    """WanAnimateTransformer3DModel. Every fifth block is followed by one of `face_adapter`.

    Up to 6,000 tokens the motion encoder's 0.8 GB is the peak instead; 77 frames are never so few.
    """
    get = {**DEFAULTS, **config}
    s = shape_of(get)
    every = get["inject_face_latents_blocks"]

    def forward(t: Tally, n: int) -> None:
        embed(t, n, s)
        _pose(t, n, s, get["latent_channels"])
        _motion(t, get)
        _face(t, get, s.d)
        for index in range(s.layers):
            block(t, n, s)
            if index % every == 0:
                _adapter(t, n, s, get["face_encoder_num_heads"] + 1)
        head(t, n, s)

    outer = [*outer_sizes(s), *dense(get["latent_channels"] * s.patch, s.d)]
    outer += _motion_sizes(get) + _face_sizes(get, s.d)
    # Beside a block: what the last face adapter gave, and the pose; and the frames of the face.
    pose = BF16 * (1 - 1 / LATENT_FRAMES)
    face = 3 * SEGMENT_FRAMES * get["motion_encoder_size"] ** 2 * BF16
    return make_facts(s, _blocks(s, every), outer, forward, beside=BF16 + pose, fixed=face)


def _blocks(s: WanShape, every: int) -> list[BlockSizes]:
    plain = block_sizes(s)
    face = BlockSizes([*[dense(s.d, s.d)] * 4, *[[s.head * BF16]] * 2])
    sizes = []
    for index in range(s.layers):
        sizes.append(plain)
        if index % every == 0 and index // every < s.layers // every:
            sizes.append(face)
    return sizes


def _pose(t: Tally, n: float, s: WanShape, channels: int) -> None:
    """Its patches are added to all frames but the reference."""
    later = n * (1 - 1 / LATENT_FRAMES)
    t.linear(later, channels * s.patch, s.d)
    t.move(later * s.d, BF16, BF16, BF16)
    t.move(later * s.d, BF16, BF16)
    t.move(n * s.d, BF16, BF16)


def _adapter(t: Tally, n: float, s: WanShape, faces: int) -> None:
    """Each token looks at the face of its own frame, `faces` vectors; the sum goes on."""
    rows = LATENT_FRAMES * faces
    for count in (n, rows):
        t.move(count * s.d, BF16, BF16)
    for count in (n, rows, rows):
        t.linear(count, s.d, s.d)
    for count in (n, rows):
        t.move(count * s.d, BF16, BF16)
    t.attend(n, faces, s.d)
    t.linear(n, s.d, s.d)
    t.move(n * s.d, BF16, BF16, BF16)


# The motion encoder: convolutions that halve the picture to 4 x 4, then linear layers.


def _stages(get: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """(side, channels in, channels out) of each residual block."""
    given = get["motion_encoder_channel_sizes"]
    channels = {int(side): count for side, count in given.items()} if given else CHANNELS
    stages, side = [], get["motion_encoder_size"]
    while side > 4:
        stages.append((side, channels[side], channels[side // 2]))
        side //= 2
    return stages


def _motion_sizes(get: Mapping[str, Any]) -> Sizes:
    stages, style, dim = _stages(get), get["motion_style_dim"], get["motion_dim"]
    sizes = [3 * stages[0][1] * BF16, stages[0][1] * BF16]
    for _, few, many in stages:
        sizes += [9 * few * few * BF16, few * BF16, 9 * few * many * BF16, many * BF16]
        sizes += [few * many * BF16]
    sizes += [16 * stages[-1][2] * style * BF16]
    sizes += dense(style, style) * (MOTION_LINEARS - 1) + dense(style, dim)
    return [*sizes, get["motion_encoder_dim"] * dim * FP32]


def _motion(t: Tally, get: Mapping[str, Any]) -> None:
    """Frames of the face, a few at a time."""
    batch = get["motion_encoder_batch_size"]
    for start in range(0, SEGMENT_FRAMES, batch):
        _motion_batch(t, min(batch, SEGMENT_FRAMES - start), get)
    t.kernels += 1


def _motion_batch(t: Tally, images: int, get: Mapping[str, Any]) -> None:
    stages, style, dim = _stages(get), get["motion_style_dim"], get["motion_dim"]
    out = get["motion_encoder_dim"]
    side, first, _ = stages[0]
    _convolve(t, images, side, 3, first)
    _activate(t, images * side**2 * first)
    for side, few, many in stages:
        _residual(t, images, side, few, many)
    _convolve(t, images, 1, stages[-1][2], style, kernel=4)
    for outputs in [style] * (MOTION_LINEARS - 1) + [dim]:
        t.move(style * outputs, BF16, BF16)
        t.linear(images, style, outputs)
    t.kernels += 4  # the basis: plus epsilon, to fp32, orthogonalised, as a diagonal
    t.linear(images * dim, dim, out)
    t.move(images * dim * out, FP32)
    t.kernels += 1  # back to bf16


def _convolve(t: Tally, images: int, side: int, few: int, many: int, kernel: int = 1) -> None:
    """Scales the weight, then convolves to pictures of this side."""
    t.move(kernel**2 * few * many, BF16, BF16)
    t.linear(images * side**2, kernel**2 * few, many)


def _blur(t: Tally, images: int, side: int, channels: int) -> None:
    """Each channel alone; the filter is cast for each."""
    t.kernels += 1
    t.linear(images * side**2 * channels, BLUR**2, 1)


def _activate(t: Tally, elements: float) -> None:
    """Plus bias, leaky ReLU, times a constant."""
    for _ in range(3):
        t.move(elements, BF16, BF16)


def _residual(t: Tally, images: int, side: int, few: int, many: int) -> None:
    """MotionEncoderResBlock: two convolutions, and one beside them; the sum is halved."""
    half = images * (side // 2) ** 2 * many
    _convolve(t, images, side, few, few, kernel=3)
    _activate(t, images * side**2 * few)
    _blur(t, images, side + 1, few)
    _convolve(t, images, side // 2, few, many, kernel=3)
    _activate(t, half)
    _blur(t, images, side - 1, few)
    _convolve(t, images, side // 2, few, many)
    t.move(half, BF16, BF16, BF16)
    t.move(half, BF16, BF16)


# The face encoder: three convolutions over time, the last two halving it.


def _face_sizes(get: Mapping[str, Any], d: int) -> Sizes:
    width, hidden = get["motion_encoder_dim"], get["face_encoder_hidden_dim"]
    convolutions = dense(3 * width, hidden * get["face_encoder_num_heads"])
    convolutions += dense(3 * hidden, hidden) * 2
    return [*convolutions, *dense(hidden, d), d * BF16]


def _face(t: Tally, get: Mapping[str, Any], d: int) -> None:
    width, hidden = get["motion_encoder_dim"], get["face_encoder_hidden_dim"]
    heads = get["face_encoder_num_heads"]
    frames = [SEGMENT_FRAMES, (SEGMENT_FRAMES + 1) // 2, LATENT_FRAMES - 1]
    t.linear(frames[0], 3 * width, hidden * heads)
    for count in frames[1:]:
        t.linear(count * heads, 3 * hidden, hidden)
    for count in frames:
        t.kernels += 2  # the padding, and one copy for the layout
        t.move(count * heads * hidden, BF16, BF16)
        t.move(count * heads * hidden, BF16, BF16)
    t.linear(frames[-1] * heads, hidden, d)
    t.kernels += 4  # the padding's copies, two concatenations and zeros
