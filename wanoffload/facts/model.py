"""What is known of a model before anything is loaded: bytes, work for each token, its kind.

Plain values. `look` finds them, in a pipeline, in a folder, or in a table of published
models; by hand, `ModelFacts(...)` or `dataclasses.replace(facts, dmd_denoising_steps=(1000, 757))`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from wanoffload.apart import PART
from wanoffload.workload import Workload

WAN = "wan"
QWEN_IMAGE = "qwen-image"
MOVA = "mova"
OTHER = "other"
FAMILIES = (WAN, QWEN_IMAGE, MOVA, OTHER)


@dataclass(frozen=True)
class PartFacts:
    """A part of a block, as `wanoffload.units` finds them.

    `nbytes`: of its image, of which `bf16_bytes` can be packed. `pieces`: bytes of the pieces that
    it may be cut into (`wanoffload.ring.cut`). `block`: the number of its block.
    """

    nbytes: int
    bf16_bytes: int
    pieces: tuple[int, ...]
    block: int


@dataclass(frozen=True)
class ComponentFacts:
    """Weights of one component, in bytes: its repeated blocks in the order of use, and the rest.

    `bf16_bytes`: of a DiT, how many of its blocks' bytes are bf16: those can be packed. `parts`: of
    a DiT, those of its blocks, in order, and `loose_bytes`, what the blocks have besides; none: not
    known, each block counts as one part. `compiled`: blocks use all of their parts at once.
    `activation_bytes_per_pixel`: of a VAE, the peak of encoding or decoding, above its weights, for
    each pixel of a frame (it works through the frames a few at a time), and
    `activation_bytes_per_voxel` for each pixel of each frame.
    """

    block_bytes: tuple[int, ...] = ()
    other_bytes: int = 0
    bf16_bytes: int = 0
    parts: tuple[PartFacts, ...] = field(default=(), repr=False)
    loose_bytes: int = 0
    compiled: bool = False
    activation_bytes_per_pixel: float = 0.0
    activation_bytes_per_voxel: float = 0.0

    @property
    def bytes(self) -> int:
        return sum(self.block_bytes) + self.other_bytes


@dataclass(frozen=True)
class DitFacts(ComponentFacts):
    """One diffusion transformer: weights, and what a forward of n tokens takes.

    Matrix products: `matmul_flops_per_token` n + `matmul_flops`. Attention:
    `attention_flops_per_token_squared` n^2 + `attention_flops_per_token` n + `attention_flops`.
    Everything else is memory traffic: `traffic_bytes_per_token` n + `traffic_bytes`. `kernels` are
    launched. At the peak, `activation_bytes_per_token` n + `activation_bytes` stand beside the
    weights. All for a batch of one, eager. `attention_efficiency`: part of the rate of plain
    attention that is reached; attention with a mask takes another kernel.
    """

    matmul_flops_per_token: float = 0.0
    matmul_flops: float = 0.0
    attention_flops_per_token: float = 0.0
    attention_flops_per_token_squared: float = 0.0
    attention_flops: float = 0.0
    attention_efficiency: float = 1.0
    traffic_bytes_per_token: float = 0.0
    traffic_bytes: float = 0.0
    kernels: int = 0
    activation_bytes_per_token: float = 0.0
    activation_bytes: float = 0.0

    def in_parts(self) -> DitFacts:
        """The same, with parts in the place of blocks."""
        total = sum(self.block_bytes)
        parts = self.parts or tuple(
            PartFacts(nbytes, round(self.bf16_bytes * nbytes / total), (nbytes,), number)
            for number, nbytes in enumerate(self.block_bytes)
        )
        return replace(
            self,
            block_bytes=tuple(part.nbytes for part in parts),
            other_bytes=self.other_bytes + self.loose_bytes,
            bf16_bytes=sum(part.bf16_bytes for part in parts),
            parts=parts,
            loose_bytes=0,
        )


@dataclass(frozen=True)
class ModelFacts:
    """A pipeline, as far as deciding needs it. Unknown numbers are 0, missing components None.

    `family`: one of FAMILIES; "wan" means a Wan pipeline, not one that is merely built from Wan
    parts. `a14b`: Wan2.2 A14B (T2V or I2V), with its two experts. `dmd_denoising_steps`: the steps
    of a step-distilled (DMD) variant, else None. `cache_dit`: the package cache-dit is active.
    `sharded`: parameters of the DiT are DTensors. `layerwise_allowed`: what the model's deployment
    config says. `dits`: one, or two experts, in the order of use. `temporal_factor`: frames that
    become one latent frame (the first alone); `pixels_per_token`: side of the square of pixels that
    becomes one token; `token_factor`: what editing multiplies tokens by. `segment_frames`: a longer
    video is made in pieces of so many frames, and a shorter one is filled up to it (0: in one);
    `reference_frames`: latent frames that each forward has on top. `blocks_in_files`: blocks of the
    DiTs need no host memory, since they can be read from their files for each use. `packed`: the
    DiTs are streamed already, and this share of their blocks stands packed in host memory; None:
    they are not streamed yet. `granularity`: and they stand in blocks, or in parts of them.
    """

    name: str = ""
    family: str = OTHER
    a14b: bool = False
    dmd_denoising_steps: Sequence[int] | None = None
    cache_dit: bool = False
    sharded: bool = False
    layerwise_allowed: bool = True
    dits: tuple[DitFacts, ...] = field(default_factory=tuple)
    text_encoder: ComponentFacts | None = None
    image_encoder: ComponentFacts | None = None
    vae: ComponentFacts | None = None
    temporal_factor: int = 4
    pixels_per_token: int = 16
    token_factor: float = 1.0
    segment_frames: int = 0
    reference_frames: int = 0
    blocks_in_files: bool = False
    packed: float | None = None
    granularity: str | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family is one of {', '.join(FAMILIES)}, not {self.family!r}")

    def streamed_in(self, granularity: str) -> ModelFacts:
        """As the engine has it: with parts of the DiTs' blocks in the place of blocks, or as is."""
        if granularity != PART:
            return self
        return replace(self, dits=tuple(dit.in_parts() for dit in self.dits))

    def tokens(self, workload: Workload) -> int:
        """Tokens of one forward. Frames are rounded as Wan's pipelines round them: 80 become 81."""
        factor = self.temporal_factor
        frames = self.segment_frames or workload.frames
        frames = (frames // factor + 1 if factor > 1 else frames) + self.reference_frames
        side = self.pixels_per_token
        return round(
            frames * (workload.height // side) * (workload.width // side) * self.token_factor
        )
