"""The command line: `wanoffload probe`, `plan`, `pack` and `check`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wanoffload.apart import PART
from wanoffload.arguments import choices_of, hardware_of, make_parser, workload_of
from wanoffload.errors import OffloadError
from wanoffload.machine.hardware import Hardware
from wanoffload.sizes import gb

if TYPE_CHECKING:
    from wanoffload.loading.cache_header import CacheHeader

RATE_LABELS = {
    "link_gb_per_s": ("page-locked host memory to device", "GB/s"),
    "pageable_gb_per_s": ("ordinary host memory to device", "GB/s"),
    "matmul_tflops": ("matrix product, bf16", "TFLOP/s"),
    "attention_tflops": ("attention, bf16", "TFLOP/s"),
    "device_gb_per_s": ("device memory traffic", "GB/s"),
    "launch_us": ("launch of one operation", "us"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, or 2 after an error in one line on stderr."""
    arguments = make_parser().parse_args(argv)
    try:
        print(COMMANDS[arguments.command](arguments))
    except (ValueError, OffloadError) as error:
        print(f"wanoffload: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def run_probe(arguments: argparse.Namespace) -> str:
    """The machine, as text or JSON."""
    from wanoffload.machine.probe import cached_at  # loads torch

    hardware = Hardware.probe(arguments.device, refresh=arguments.refresh)
    path = cached_at(arguments.device)
    if arguments.json:
        cache = str(path) if path else None
        return json.dumps({**dataclasses.asdict(hardware), "cache": cache}, indent=2)
    return _machine_table(hardware, f"rates are kept in {path}" if path else None)


def run_plan(arguments: argparse.Namespace) -> str:
    """The plan for a model, as text or JSON."""
    from wanoffload.policy.planning import plan

    made = plan(
        arguments.model,
        workload_of(arguments),
        hardware_of(arguments),
        mode=arguments.mode,
        **choices_of(arguments),
    )
    if arguments.json:
        return json.dumps(made.as_dict(), indent=2)
    return made.explain()


def run_pack(arguments: argparse.Namespace) -> str:
    """Writes a cache file, or only says what packing saves; says what was written, how quickly."""
    if arguments.out is None and not arguments.report:
        raise ValueError("OUT, the file to be written, is missing; only --report does without")
    lines = [_report(arguments)] if arguments.report else []
    if arguments.out is not None:
        lines.append(_write_cache(arguments))
    return "\n".join(lines)


def _report(arguments: argparse.Namespace) -> str:
    from wanoffload.loading.pack_report import report

    return report(arguments.model, arguments.subfolder, **_checkpoint_options(arguments)).as_text()


def _write_cache(arguments: argparse.Namespace) -> str:
    from wanoffload.loading.packing import pack

    begin = time.perf_counter()
    header = pack(
        arguments.model,
        arguments.out,
        arguments.subfolder,
        plain=arguments.plain,
        granularity=arguments.granularity,
        **_checkpoint_options(arguments),
    )
    return f"{arguments.out}: {_contents(header)} {_rate(header, begin)}"


def _checkpoint_options(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    return {
        "torch_dtype": getattr(torch, arguments.dtype),
        "variant": arguments.variant,
        "revision": arguments.revision,
    }


def run_check(arguments: argparse.Namespace) -> str:
    """Reads a whole cache file; says what it is if it is sound."""
    from wanoffload.loading.packing import check

    begin = time.perf_counter()
    header = check(arguments.file)
    sources = ", ".join(source.name for source in header.identity.sources) or "a model in memory"
    return f"{arguments.file} is sound: {_contents(header)} {_rate(header, begin)}, of {sources}"


def _contents(header: CacheHeader) -> str:
    called = "parts of blocks" if header.granularity == PART else "blocks"
    blocks = f"{len(header.units)} {called} of {header.identity.model}"
    packed = sum(unit.packed for unit in header.units)
    how = "plain"
    if packed:
        stored = sum(unit.nbytes for unit in header.units)
        plain = sum(unit.layout.nbytes for unit in header.units)
        how = f"{packed} packed, in {stored / plain:.4f} of {gb(plain)}"
    return f"{blocks} ({how}), {gb(header.file_bytes)} ({header.file_bytes} bytes)"


def _rate(header: CacheHeader, begin: float) -> str:
    seconds = time.perf_counter() - begin
    return f"in {seconds:.1f} s ({header.file_bytes / 1e9 / seconds:.2f} GB/s)"


def _machine_table(hardware: Hardware, last: str | None) -> str:
    sizes = {"device memory": hardware.device_memory, "host memory": hardware.host_memory}
    rows = [(f"{name} to be had", _size(size)) for name, size in sizes.items()]
    for name, (label, unit) in RATE_LABELS.items():
        rate = getattr(hardware, name)
        rows.append((label, "unknown" if rate is None else f"{rate:.1f} {unit}"))
    width = max(len(label) for label, _ in rows)
    lines = [f"{label:<{width}}  {value}" for label, value in rows]
    return "\n".join([f"{hardware.name} ({hardware.platform})", *lines, *([last] if last else [])])


def _size(size: int | str | None) -> str:
    return "unknown" if size is None else gb(int(size))


COMMANDS = {"probe": run_probe, "plan": run_plan, "pack": run_pack, "check": run_check}
