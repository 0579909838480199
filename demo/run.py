"""The flow of the demo: find the model, run it offloaded and resident, compare, report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from demo import DemoError, report
from demo.checkpoint import Sizes, make_checkpoint
from demo.options import Options, check_geometry, parse
from demo.source import find_model, geometry
from demo.video import Frames, can_write_mp4, write_video
from demo.worker import Figures, Job

HOST_BACKEND = "host backend: the device is this machine's memory"
FIT_MARGIN = 1.02  # the allocator's rounding differs between one streamed and one resident model


def main(arguments: Sequence[str] | None = None, *, sizes: Sizes | None = None) -> int:
    """Run the demo. 0: frames equal, or nothing to compare with; 1: not equal, or it failed.

    `sizes` are those of the checkpoint that is made where no model is named.
    """
    options = parse(arguments)
    try:
        return demonstrate(options, sizes or Sizes())
    except (DemoError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as a shell reports it; the run's own process has ended with this one


def demonstrate(options: Options, sizes: Sizes) -> int:
    """Both runs, the video and the report; the process's exit code."""
    device = _pick_device(options.device)
    model = _model(options, sizes)
    _say(f"device: {torch.cuda.get_device_name() if device == 'cuda' else HOST_BACKEND}")

    offloaded = _run(options, model, device, offloaded=True)
    if offloaded.out_of_memory is not None:
        raise DemoError(f"the offloaded run ran out of device memory: {offloaded.out_of_memory}")
    _check_streamed(offloaded)
    _write_video(options.out, "offloaded", "video")

    runs = {"offloaded": offloaded}
    skipped = why_resident_does_not_fit(offloaded)
    if skipped is None:
        resident = _run(options, model, device, offloaded=False)
        skipped = resident.out_of_memory
        if skipped is None:
            runs["resident"] = resident

    _say("", report.table(runs), "", f"experts: {report.experts(offloaded)}")
    _say(f"loaded: {report.how_loaded(offloaded)}")
    if skipped is not None:
        _say(f"the resident run was skipped, so nothing was compared: {skipped}")
        return 0
    return verdict(options.out)


def why_resident_does_not_fit(offloaded: Figures) -> str | None:
    """None if the resident run should fit, else a sentence with the numbers.

    It needs what the offloaded run reserved at its peak, with all blocks in place of the slots.
    """
    if offloaded.device_free_bytes is None or offloaded.device_reserved_bytes is None:
        return None
    streamed = offloaded.total("host_bytes") - offloaded.slot_bytes
    need = int((offloaded.device_reserved_bytes + streamed) * FIT_MARGIN)
    if need <= offloaded.device_free_bytes:
        return None
    return (
        f"it needs about {report.gigabytes(need)} of device memory, "
        f"{report.gigabytes(offloaded.device_free_bytes)} are free"
    )


def _pick_device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _model(options: Options, sizes: Sizes) -> Path:
    """The model's folder, once it is clear that it can make a clip of this size."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out: {options.out} can't be made: {error.strerror}") from error
    if options.model is None:
        model = make_checkpoint(options.out / "checkpoint", sizes=sizes)
        _say(f"model: {model} (random weights, so the clip is colour noise)")
    else:
        model = find_model(options.model)
        _say(f"model: {model}")
    steps = geometry(model)
    try:
        check_geometry(options, size_step=steps.size_step, frame_step=steps.frame_step)
    except ValueError as error:
        raise DemoError(f"for this model {error}") from None
    return model


def _run(options: Options, model: Path, device: str, *, offloaded: bool) -> Figures:
    """One run in a process of its own; its progress goes to the terminal."""
    name = "offloaded" if offloaded else "resident"
    files = {kind: options.out / f"{name}{kind}" for kind in (".npy", ".json", ".job.json")}
    for file in files.values():
        file.unlink(missing_ok=True)  # what an earlier run left must not pass for this one's
    job = Job(
        model=str(model),
        offloaded=offloaded,
        prompt=options.prompt,
        steps=options.steps,
        frames=options.frames,
        width=options.width,
        height=options.height,
        prefetch=options.prefetch,
        device=device,
        seed=options.seed,
        frames_file=str(files[".npy"]),
        figures_file=str(files[".json"]),
    )
    files[".job.json"].write_text(json.dumps(asdict(job), indent=2) + "\n")
    _say(f"{name} run:")
    _start(name, files[".job.json"])
    return Figures.read(files[".json"])


def _start(name: str, job_file: Path) -> None:
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    # All files are here by now: a run that asks the network for one is a mistake, and should fail.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "demo.worker", str(job_file)]
    code = subprocess.run(command, env=environment, check=False).returncode
    if code < 0:
        raise DemoError(
            f"the {name} run was killed by signal {-code}"
            + ("; most often the host's memory was too small" if code == -9 else "")
        )
    if code != 0:
        raise DemoError(f"the {name} run failed; its message stands above")


def _check_streamed(figures: Figures) -> None:
    """Every expert that had steps must have fetched blocks, or the comparison would say nothing."""
    for expert in figures.experts:
        stats = expert.stats
        if stats["forwards"] != expert.forwards:
            raise DemoError(
                f"{expert.name} had {expert.forwards} forwards, the offloader saw "
                f"{stats['forwards']}"
            )
        if expert.steps and not (stats["acquires"] and stats["fetches"] and stats["bytes_fetched"]):
            raise DemoError(f"{expert.name} ran {expert.steps} steps but fetched nothing: {stats}")


def _write_video(out: Path, run: str, name: str) -> None:
    path = write_video(_frames(out, run), out, name)
    if not can_write_mp4():
        _say(
            "imageio-ffmpeg is not installed, so the video is an animated WebP; "
            "`pip install imageio imageio-ffmpeg` gives an MP4"
        )
    _say(f"video: {path}")


def verdict(out: Path) -> int:
    """Compare the frames that both runs left in `out`, and return the process's exit code."""
    offloaded, resident = _frames(out, "offloaded"), _frames(out, "resident")
    equal = same_bits(offloaded, resident)
    _say(f"frames equal bit for bit: {'yes' if equal else 'no'}")
    if not equal:
        _write_video(out, "resident", "video-resident")
        _say(how_different(offloaded, resident))
    return 0 if equal else 1


def _frames(out: Path, run: str) -> Frames:
    frames: Frames = np.load(out / f"{run}.npy")
    if not np.isfinite(frames).all():
        raise DemoError(f"the frames of the {run} run hold values that are no numbers")
    return frames


def same_bits(one: Frames, other: Frames) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return one.tobytes() == other.tobytes()


def how_different(one: Frames, other: Frames) -> str:
    if one.shape != other.shape:
        return f"the shapes differ: {one.shape} and {other.shape}"
    difference = np.abs(one - other)
    count = int(np.count_nonzero(difference))
    return f"{count} of {one.size} values differ, by at most {difference.max():.3g}"


def _say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)
