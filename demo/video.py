"""Writes the clip: MP4 where ffmpeg is at hand, else an animated WebP."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.utils import export_to_video
from PIL import Image

FRAMES_PER_SECOND = 16  # what Wan was trained at

Frames = np.ndarray[Any, np.dtype[np.float32]]


def can_write_mp4() -> bool:
    return find_spec("imageio") is not None and find_spec("imageio_ffmpeg") is not None


def write_video(frames: Frames, folder: Path, name: str) -> Path:
    """Write frames of shape (frames, height, width, 3), from 0 to 1, and return the file."""
    if can_write_mp4():
        path = folder / f"{name}.mp4"
        export_to_video(list(frames), str(path), fps=FRAMES_PER_SECOND)
        return path
    path = folder / f"{name}.webp"
    first, *others = [Image.fromarray((frame * 255).astype(np.uint8)) for frame in frames]
    milliseconds = 1000 // FRAMES_PER_SECOND
    first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0)
    return path
