"""Case ``memory``: what a model takes on the device and the host, each contender in a process of
its own.

The ceiling for the device is what the resident model has reserved, less the bytes of all blocks,
plus the bytes of the slots, and 2 %. The ceiling for the host, while a model is being wrapped, is
the model, one block and 1 GB. The contender's output is compared with the resident model's through
a hash of its bytes, since the two never stand in one process.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import machine
from benchmarks.contenders import (
    RESIDENT,
    Contender,
    Counters,
    by_name,
    names_for,
)
from benchmarks.harness import ROOT, Session, peer_fingerprint, say
from benchmarks.models import (
    MODELS,
    ModelSpec,
    Size,
    build,
    build_on_host,
    chosen_sizes,
    make_inputs,
    model_bytes,
    step,
)
from benchmarks.timing import Clock

NAME = "memory"
HELP = "device and host memory after a step and while wrapping, each in a fresh process"
DEVICE_MARGIN = 1.02
LOCKED_MARGIN = 1.005
HOST_MARGIN_BYTES = 10**9
CHILD_SECONDS = 540


def add_options(parser: ArgumentParser) -> None:
    """The options of this case."""
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--fresh-sizes",
        action="store_true",
        help="a process for each size too, not only for each contender",
    )


def key_of(spec: ModelSpec, size: Size, contender: str) -> dict[str, Any]:
    """The key of a row."""
    return {"model": spec.name, "size": str(size), "contender": contender}


def run(session: Session) -> None:
    """Measures all missing rows, the resident model's first: the ceilings come from them."""
    options = session.options
    spec = MODELS[options.model]
    names = options.contenders or names_for(spec, session.device, compiled=False)
    ours = [name for name in names if name != RESIDENT]
    for name in (RESIDENT, *ours):
        sizes = _missing_sizes(session, spec, name)
        batches = [[size] for size in sizes] if options.fresh_sizes else [sizes]
        for batch in batches:
            if batch and not session.out_of_time():
                _measure(session, spec, name, batch)


def _missing_sizes(session: Session, spec: ModelSpec, name: str) -> list[Size]:
    if name != RESIDENT and by_name(name).needs_gpu and session.device.type != "cuda":
        say(f"{name} needs a GPU and is left out")
        return []
    return [
        size
        for size in chosen_sizes(spec, session.options.frames)
        if session.missing(NAME, key_of(spec, size, name), _fingerprint(session, name))
    ]


def _fingerprint(session: Session, name: str) -> str:
    if name == RESIDENT:
        return peer_fingerprint()
    return by_name(name).fingerprint(session.options.label)


def _measure(session: Session, spec: ModelSpec, name: str, sizes: Sequence[Size]) -> None:
    """One child process; a row for each size it went through."""
    say(f"{name}: a fresh process for {', '.join(map(str, sizes))}")
    try:
        found = run_child(spec, name, sizes, session.device)
    except (subprocess.SubprocessError, OSError) as error:
        session.failures.append(f"{NAME} {name}: {error}")
        return
    for size, values in zip(sizes, found["sizes"], strict=True):
        row = _with_ceilings(session, spec, size, name, {**found["setup"], **values})
        session.record(NAME, key_of(spec, size, name), _fingerprint(session, name), row)
        say(
            f"{size} {name}: reserved {values['reserved'] / 1e9:.3f} GB, verified {row['verified']}"
        )


def _with_ceilings(
    session: Session, spec: ModelSpec, size: Size, name: str, values: dict[str, Any]
) -> dict[str, Any]:
    """Adds the comparison with the resident model's row."""
    if name == RESIDENT:
        return {**values, "verified": True}
    resident = session.find(NAME, key_of(spec, size, RESIDENT), peer_fingerprint())
    if resident is None:
        return {**values, "verified": False}
    equal = values["output_sha256"] == resident.values["output_sha256"]
    streamed = resident.values["reserved"] - values["block_bytes"]
    return {
        **values,
        "verified": equal and values["acquires_right"],
        "equal": equal,
        "reserved_resident": resident.values["reserved"],
        "reserved_ceiling": round((streamed + values["slot_bytes"]) * DEVICE_MARGIN),
    }


def run_child(
    spec: ModelSpec, name: str, sizes: Sequence[Size], device: torch.device
) -> dict[str, Any]:
    """What a contender takes in a fresh process: "setup", and one of "sizes" for each size."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.memory", str(answer), spec.name, name]
        command += ["--device", str(device), "--frames", *(str(size.frames) for size in sizes)]
        subprocess.run(command, cwd=ROOT, check=True, timeout=CHILD_SECONDS)
        found: dict[str, Any] = json.loads(answer.read_text())
    return found


# From here on: what runs in the child.


@dataclass
class _Setup:
    """What making the model cost; bytes."""

    model_bytes: int
    block_bytes: int
    largest_block: int
    setup_s: float = 0.0
    slot_bytes: int = 0
    locked_bytes: int = 0
    ring_bytes: int = 0
    driver_empty: int = 0
    rss_empty: int = 0
    rss_before_wrap: int = 0
    rss_peak_wrap: int = 0
    rss_peak_method: str = ""
    rss_ceiling: int = 0
    host_used: int = 0


def _child(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(description="measures one contender; started by the memory case")
    parser.add_argument("answer", type=Path)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("contender")
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--frames", type=int, nargs="+")
    options = parser.parse_args(arguments)
    options.answer.write_text(json.dumps(_measure_here(options)))


def _measure_here(options: Namespace) -> dict[str, Any]:
    spec = MODELS[options.model]
    device: torch.device = options.device
    sizes = chosen_sizes(spec, options.frames)
    contender = None if options.contender == RESIDENT else by_name(options.contender)
    model, setup = _make(spec, contender, device)
    found = [_measure_size(spec, size, model, contender, device) for size in sizes]
    return {"setup": asdict(setup), "sizes": found}


def _make(
    spec: ModelSpec, contender: Contender | None, device: torch.device
) -> tuple[nn.Module, _Setup]:
    weights = model_bytes(spec)
    setup = _Setup(weights.all, weights.blocks, weights.largest_block)
    _first_use(device)
    setup.rss_empty, used = machine.rss_bytes(), machine.host_used_bytes()
    setup.driver_empty = machine.driver_used_bytes(device)
    if contender is None:
        model = build(spec, device)
    else:
        model = build_on_host(spec, device)
        _apply(model, contender, device, setup)
    machine.release_caches()
    setup.host_used = machine.host_used_bytes() - used
    return model, setup


def _first_use(device: torch.device) -> None:
    """What the device's libraries take at their first use must not count as the model's."""
    torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
    Clock(device).synchronize()
    machine.release_caches()


def _apply(model: nn.Module, contender: Contender, device: torch.device, setup: _Setup) -> None:
    machine.release_caches()
    setup.rss_before_wrap = machine.rss_bytes()
    with machine.watch_rss() as peak:
        _, setup.setup_s = Clock(device).timed(lambda: contender.apply(model, device))
    setup.rss_peak_wrap, setup.rss_peak_method = peak.peak_bytes, peak.method
    allowed = setup.model_bytes + setup.largest_block + HOST_MARGIN_BYTES
    setup.rss_ceiling = setup.rss_empty + allowed
    setup.locked_bytes = machine.torch_locked_bytes()
    counters = contender.counters(model)
    if counters is not None:
        setup.slot_bytes, setup.ring_bytes = counters.slot_bytes, counters.ring_bytes
        setup.locked_bytes += counters.locked_bytes


def _measure_size(
    spec: ModelSpec,
    size: Size,
    model: nn.Module,
    contender: Contender | None,
    device: torch.device,
) -> dict[str, Any]:
    """One step from an emptied cache, then what is taken."""
    inputs = make_inputs(spec, size, device)
    machine.release_caches()
    peak = machine.DevicePeak(device)
    before = contender.counters(model) if contender else None
    with peak.watch(), torch.inference_mode():
        outputs = step(model, inputs)
        Clock(device).synchronize()
    after = contender.counters(model) if contender else None
    acquires = spec.config["num_layers"] * len(inputs.texts)
    allocated, reserved = machine.device_bytes(device)
    return {
        "allocated": allocated,
        "allocated_peak": peak.allocated,
        "reserved": reserved,
        "reserved_peak": peak.reserved,
        "driver_used": machine.driver_used_bytes(device),
        "output_sha256": digest_of(outputs),
        "acquires_right": _acquired(before, after) in (None, acquires),
    }


def _acquired(before: Counters | None, after: Counters | None) -> int | None:
    if before is None or after is None:
        return None
    return after.acquires - before.acquires


def digest_of(outputs: Sequence[torch.Tensor]) -> str:
    """A hash of the outputs' bytes, to compare those of several processes."""
    digest = hashlib.sha256()
    for output in outputs:
        digest.update(output.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    _child(sys.argv[1:])
