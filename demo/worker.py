"""One run of the pipeline in a process of its own, so that the peaks of memory are its own.

`python -m demo.worker JOB_FILE` reads a `Job`, writes the frames (npy) and the `Figures` (JSON) to
the files that the job names.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline

EXPERTS = ("transformer", "transformer_2")
DTYPES = {"vae": torch.float32, "default": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """One run: what to generate, how, and where to leave it."""

    model: str
    offloaded: bool
    prompt: str
    steps: int
    frames: int
    width: int
    height: int
    prefetch: int
    device: str
    seed: int
    frames_file: str
    figures_file: str


@dataclass(frozen=True)
class Expert:
    """One transformer's part in a run; `stats` are the offloader's, empty where it is resident."""

    name: str
    steps: int
    forwards: int
    stats: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Figures:
    """What a run cost, in seconds and bytes. Device bytes are None on a machine without one.

    `slot_bytes`: the most that slots took at once; they are given back when the run is over.
    """

    set_up_s: float = 0.0
    generate_s: float = 0.0
    host_peak_bytes: int = 0
    device_free_bytes: int | None = None
    device_allocated_bytes: int | None = None
    device_reserved_bytes: int | None = None
    slot_bytes: int = 0
    experts: tuple[Expert, ...] = ()
    out_of_memory: str | None = None

    def total(self, stat: str) -> int:
        """The sum of one of the offloader's statistics over the experts."""
        return int(sum(expert.stats.get(stat, 0) for expert in self.experts))

    @classmethod
    def read(cls, path: Path) -> Figures:
        content = json.loads(path.read_text())
        content["experts"] = tuple(Expert(**expert) for expert in content["experts"])
        return cls(**content)


def run(job: Job) -> Figures:
    """Load, offload where asked, generate, write the frames; what it cost comes back."""
    free = _device_free_bytes(job.device)
    started = time.perf_counter()
    pipe = _set_up(job)
    ready = time.perf_counter()
    slots: list[int] = []
    frames = _generate(pipe, job, slots)
    finished = time.perf_counter()
    np.save(job.frames_file, frames)
    return Figures(
        set_up_s=ready - started,
        generate_s=finished - ready,
        host_peak_bytes=_host_peak_bytes(),
        device_free_bytes=free,
        device_allocated_bytes=None if free is None else torch.cuda.max_memory_allocated(),
        device_reserved_bytes=None if free is None else torch.cuda.max_memory_reserved(),
        slot_bytes=max(slots, default=0),
        experts=_experts(pipe, job),
    )


def load(folder: str | Path) -> Any:
    """The pipeline on the host: bf16, but for what diffusers keeps in fp32, and the VAE in fp32."""
    with warnings.catch_warnings():
        # The name that replaces it is not known to the older releases, which would ignore it.
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        return WanPipeline.from_pretrained(folder, torch_dtype=DTYPES)


def load_offloaded(job: Job) -> Any:
    """The same, enabled: the blocks of the experts are streamed, and all else is on the device."""
    import wanoffload

    return wanoffload.load_pipeline(
        WanPipeline,
        job.model,
        "manual",
        device=job.device,
        torch_dtype=DTYPES,
        dit_layerwise_offload=True,
        dit_offload_prefetch_size=job.prefetch,
    )


def _set_up(job: Job) -> Any:
    pipe = load_offloaded(job) if job.offloaded else load(job.model).to(job.device)
    pipe.set_progress_bar_config(desc="offloaded" if job.offloaded else "resident")
    return pipe


def _generate(pipe: Any, job: Job, slots: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Frames of shape (frames, height, width, 3), from 0 to 1. The noise is drawn on the CPU.

    `slots`: after each step, the bytes of the slots there are.
    """

    def look(pipe: Any, *_: Any) -> dict[str, Any]:
        if job.offloaded:
            experts = [e for e in (getattr(pipe, name) for name in EXPERTS) if e is not None]
            slots.append(int(sum(_stats(expert)["slot_bytes"] for expert in experts)))
        return {}

    video = pipe(
        job.prompt,
        height=job.height,
        width=job.width,
        num_frames=job.frames,
        num_inference_steps=job.steps,
        generator=torch.Generator("cpu").manual_seed(job.seed),
        output_type="np",
        callback_on_step_end=look,
    )
    return np.asarray(video.frames[0], dtype=np.float32)


def _experts(pipe: Any, job: Job) -> tuple[Expert, ...]:
    passes = 2 if pipe.do_classifier_free_guidance else 1
    return tuple(
        Expert(name, steps, steps * passes, _stats(getattr(pipe, name)) if job.offloaded else {})
        for name, steps in _steps(pipe).items()
        if getattr(pipe, name) is not None
    )


def _steps(pipe: Any) -> dict[str, int]:
    """How many of the steps of this run fell to each expert, by the pipeline's own rule."""
    timesteps = pipe.scheduler.timesteps.tolist()
    if pipe.config.boundary_ratio is None:
        return {"transformer": len(timesteps)}
    boundary = pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
    first = sum(timestep >= boundary for timestep in timesteps)
    return {"transformer": first, "transformer_2": len(timesteps) - first}


def _stats(transformer: torch.nn.Module) -> dict[str, float]:
    import wanoffload

    stats = asdict(wanoffload.offloader(transformer).stats())
    return {name: value for name, value in stats.items() if isinstance(value, (int, float))}


def _device_free_bytes(device: str) -> int | None:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else None


def _host_peak_bytes() -> int:
    """The peak of this program's resident memory.

    On Linux not by getrusage: its maximum also counts the parent, as it was when it started this.
    """
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(job_file: str) -> None:
    job = Job(**json.loads(Path(job_file).read_text()))
    try:
        figures = run(job)
    except torch.OutOfMemoryError as error:
        figures = Figures(out_of_memory=str(error).splitlines()[0])
    Path(job.figures_file).write_text(json.dumps(asdict(figures), indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
