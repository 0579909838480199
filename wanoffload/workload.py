"""What is generated: the size of the video, and how many forwards it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """One generation: pixels, frames (1 for an image), denoising steps, scale of guidance.

    Guidance above 1 means two forwards a step, one with the prompt and one without. `videos` are
    made at once: prompts in a list, times the videos for each prompt.
    """

    height: int
    width: int
    frames: int = 1
    steps: int = 50
    guidance: float = 5.0
    videos: int = 1

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames", "steps", "videos"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Workload.{name} is a whole number, 1 or more, not {value!r}")
        guidance = self.guidance
        number = not isinstance(guidance, bool) and isinstance(guidance, int | float)
        if not number or not 0 <= guidance < math.inf:
            raise ValueError(f"Workload.guidance is a number, 0 or more, not {guidance!r}")

    @property
    def forwards_per_step(self) -> int:
        return 2 if self.guidance > 1 else 1

    def __str__(self) -> str:
        at_once = f", {self.videos} at once" if self.videos > 1 else ""
        return f"{self.width}x{self.height}x{self.frames}{at_once}"
