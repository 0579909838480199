"""The command line of the demo, checked before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROMPT = "A red fox walks through fresh snow at dawn, soft light, slow camera."
OUT = Path(__file__).parent / "out"


@dataclass(frozen=True)
class Options:
    """What to run. `model` is a folder or a hub id; None stands for the demo's own checkpoint."""

    model: str | None
    prompt: str
    out: Path
    steps: int
    frames: int
    width: int
    height: int
    prefetch: int
    device: str
    seed: int

    def __post_init__(self) -> None:
        if self.model == "":
            raise ValueError("--model is empty; name a folder or a hub id, or leave it out")
        if self.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {self.steps}")
        if self.prefetch < 1:
            raise ValueError(f"--prefetch must be at least 1, got {self.prefetch}")
        check_geometry(self, size_step=16, frame_step=4)


def check_geometry(options: Options, *, size_step: int, frame_step: int) -> None:
    """The pipeline would round sizes silently; the demo says which would fit.

    Raises:
        ValueError: width or height is no multiple of `size_step` pixels, or the number of frames
            is not a multiple of `frame_step` plus one.
    """
    for name, pixels in (("width", options.width), ("height", options.height)):
        if pixels < size_step or pixels % size_step:
            raise ValueError(f"--size: the {name} must be a multiple of {size_step}, got {pixels}")
    if options.frames < 1 or options.frames % frame_step != 1:
        raise ValueError(
            f"--frames must be {frame_step}k+1 (1, {frame_step + 1}, {2 * frame_step + 1}, ...), "
            f"got {options.frames}"
        )


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options from the command line. A mistake in it ends the process with 2 and a message."""
    parser = _parser()
    given = parser.parse_args(arguments)
    # The demo's own checkpoint is sized for two CPU cores; real weights need a real picture.
    size, frames, steps = ("256x144", 17, 8) if given.model is None else ("832x480", 17, 20)
    try:
        width, height = _size(size if given.size is None else given.size)
        return Options(
            model=given.model,
            prompt=given.prompt,
            out=given.out.absolute(),
            steps=steps if given.steps is None else given.steps,
            frames=frames if given.frames is None else given.frames,
            width=width,
            height=height,
            prefetch=given.prefetch,
            device=given.device,
            seed=given.seed,
        )
    except ValueError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Makes a short clip with Wan, once with the transformers' blocks streamed from "
        "host memory and once fully resident, and says whether the frames are equal bit for bit.",
    )
    add = parser.add_argument
    add("--model", metavar="PATH_OR_ID", help="a Wan text-to-video pipeline, a folder or a hub id "
        "(default: a small checkpoint with random weights, made once)")  # fmt: skip
    add("--prompt", metavar="TEXT", default=PROMPT)
    add("--out", metavar="FOLDER", type=Path, default=OUT, help="default: %(default)s")
    add("--steps", metavar="N", type=int, help="default: 8; with --model 20")
    add("--frames", metavar="N", type=int, help="4k+1 (default: 17)")
    add("--size", metavar="WxH", help="multiples of 16 (default: 256x144; with --model 832x480)")
    add("--prefetch", metavar="N", type=int, default=2, help="blocks fetched ahead (default: 2)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--seed", metavar="N", type=int, default=0)
    return parser


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"--size must read like 832x480 (width x height), got {text!r}")
    return int(width), int(height)
