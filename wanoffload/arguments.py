"""What can be typed: the parser of the command line, and what its values mean."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any

from wanoffload.apart import BLOCK, PART
from wanoffload.machine.hardware import PLATFORMS, Hardware
from wanoffload.policy.choices import GRANULARITIES, MODES
from wanoffload.sizes import parse_bytes
from wanoffload.workload import Workload

FLAGS = {
    "--dit-layerwise-offload": "stream the DiT, block by block, while it runs. Combines with "
    "--dit-cpu-offload: together they give the lowest peak of device memory",
    "--dit-cpu-offload": "the DiT's weights start in host memory, so that a card smaller than the "
    "DiT can load it; alone, the whole DiT goes to the device for its use and back. Combines with "
    "--dit-layerwise-offload: together they give the lowest peak of device memory",
    "--text-encoder-cpu-offload": "the text encoder is on the device only while it is used",
    "--image-encoder-cpu-offload": "the image encoder is on the device only while it is used",
    "--vae-cpu-offload": "the VAE is on the device only while it is used",
    "--use-fsdp-inference": "you shard the DiT yourself (FSDP): it is left alone",
}
DTYPES = ("bfloat16", "float16", "float32")
PACK = {"auto": "auto", "yes": True, "no": False}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `command` of what it returns is the command's name."""
    parser = argparse.ArgumentParser(prog="wanoffload", description="Offloading for Wan models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add, short, text in (
        ("probe", _add_probe, "measure this machine", _PROBE),
        ("plan", _add_plan, "say how a model will be run", _PLAN),
        ("pack", _add_pack, "write a transformer's cache file", _PACK),
        ("check", _add_check, "compare a cache file with its checksums", _CHECK),
    ):
        # No abbreviations: --dit-offload would be taken for --dit-offload-prefetch-size.
        add(commands.add_parser(name, help=short, description=text, allow_abbrev=False))
    return parser


_PROBE = (
    "Shows this machine: memory as it is now, and rates, which are measured once, in less than "
    "three seconds, and kept."
)
_PLAN = (
    "Says how a model will be run, what that takes, and why. Nothing is loaded. Without --probe "
    "and values by hand the machine is unknown, and without --size and --frames the workload: then "
    "the base rules decide, as long as the weights fit."
)
_PACK = (
    "Writes the cache file that load(..., cache=OUT) streams a transformer's blocks from, in the "
    "dtype in which they run, packed without loss (docs/packing.md). Takes host memory for one "
    "block, and disk for all of them."
)
_CHECK = (
    "Reads a cache file as a whole, compares each block with its checksum, and unpacks what is "
    "packed."
)


def _add_probe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="default: torch's current CUDA device, else the CPU")
    parser.add_argument("--refresh", action="store_true", help="measure again")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="id of a published Wan repository, or a folder in the hub's layout"
    )
    parser.add_argument("--mode", choices=MODES, default="auto", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_workload(parser.add_argument_group("workload"))
    _add_hardware(parser.add_argument_group("machine"))
    _add_choices(parser.add_argument_group("choices", "Unset means: decide for me."))


def _add_pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="a pipeline's or model's folder, a .safetensors file, or an id of the hub"
    )
    parser.add_argument(
        "out", nargs="?", help="the file to be written; must not be there yet. Not needed to report"
    )
    parser.add_argument(
        "--plain", action="store_true", help="plain images, of 1.4 times the size, for any dtype"
    )
    parser.add_argument(
        "--granularity",
        choices=(BLOCK, PART),
        default=BLOCK,
        help="what it is streamed in: blocks, or parts of them; default: %(default)s",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="say what packing saves, for each kind of tensor. Without OUT nothing is written",
    )
    parser.add_argument(
        "--subfolder", default="transformer", help="of the pipeline; default: %(default)s"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help="torch_dtype; default: %(default)s"
    )
    parser.add_argument("--variant", help="of the files, such as fp16")
    parser.add_argument("--revision", help="of a model of the hub")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a cache file")


def _add_workload(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--size", type=_pixels, metavar="WxH", help="width x height: 832x480")
    group.add_argument("--frames", type=int, metavar="N", help="1 for an image")
    shown, steps, scale = "default: %(default)s", Workload.steps, Workload.guidance
    group.add_argument("--steps", type=int, default=steps, metavar="N", help=shown)
    group.add_argument("--guidance", type=float, default=scale, metavar="SCALE", help=shown)


def _add_hardware(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--probe", action="store_true", help="this machine; values by hand replace its own"
    )
    group.add_argument("--vram", type=_bytes, metavar="SIZE", help="device memory to be had: 24GiB")
    group.add_argument(
        "--host-memory", type=_bytes, metavar="SIZE", help="host memory to be had: 64GiB"
    )
    group.add_argument(
        "--link", type=float, metavar="GB/S", help="page-locked host memory to device"
    )
    group.add_argument(
        "--tflops", type=float, metavar="N", help="achieved in bf16, by products and attention"
    )
    group.add_argument("--platform", choices=PLATFORMS, help="default: cuda")


def _add_choices(group: argparse._ArgumentGroup) -> None:
    for flag, text in FLAGS.items():
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    group.add_argument(
        "--layerwise-offload-components",
        type=_names,
        metavar="NAMES",
        help="of dit,text_encoder,image_encoder,vae; or default (the last three), or all",
    )
    group.add_argument(
        "--dit-offload-prefetch-size",
        type=float,
        metavar="N",
        help="blocks fetched ahead: a count, or below 1 a ratio of all blocks",
    )
    group.add_argument(
        "--vram-budget",
        type=_budget,
        metavar="SIZE",
        help="what the DiT's weights may take on the device: 6GiB; or a fraction of what is to be "
        "had there: 0.5; or auto: what activations leave",
    )
    group.add_argument(
        "--granularity",
        choices=GRANULARITIES,
        help="what is fetched at once of a streamed DiT: whole blocks, or parts of them, which "
        "take less of the device; auto, as without it: parts where blocks do not fit, in mode "
        "memory where they take less, in auto where they are quicker within --vram-budget",
    )
    group.add_argument(
        "--pack",
        choices=PACK,
        help="the DiT's streamed blocks stand packed on the host, without loss, and are unpacked "
        "on the device; auto: where the link binds or host memory is short",
    )


def workload_of(arguments: argparse.Namespace) -> Workload | None:
    """From --size and --frames, None without them."""
    if arguments.size is None and arguments.frames is None:
        return None
    if arguments.size is None or arguments.frames is None:
        missing = "--size" if arguments.size is None else "--frames"
        raise ValueError(f"--size and --frames go together, and {missing} is missing")
    width, height = arguments.size
    return Workload(height, width, arguments.frames, arguments.steps, arguments.guidance)


def hardware_of(arguments: argparse.Namespace) -> Hardware | None:
    """By hand, measured, or measured with some values by hand; None where nothing was given."""
    by_hand = {
        "device_memory": arguments.vram,
        "host_memory": arguments.host_memory,
        "link_gb_per_s": arguments.link,
        "matmul_tflops": arguments.tflops,
        "attention_tflops": arguments.tflops,
        "platform": arguments.platform,
    }
    given = {name: value for name, value in by_hand.items() if value is not None}
    if arguments.probe:
        return dataclasses.replace(Hardware.probe(), **given)
    return Hardware(**given) if given else None


def choices_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The choices that were made, under their names in `wanoffload.plan`."""
    names = [flag.removeprefix("--").replace("-", "_") for flag in FLAGS]
    names += ["layerwise_offload_components", "dit_offload_prefetch_size"]
    names += ["vram_budget", "granularity"]
    values = {name: getattr(arguments, name) for name in names}
    values["pack"] = PACK[arguments.pack] if arguments.pack is not None else None
    return {name: value for name, value in values.items() if value is not None}


def _bytes(text: str) -> int:
    if text.strip().isdigit() and text.strip() != "0":
        raise argparse.ArgumentTypeError(f"{text} of what? Write {text}GiB, {text}GB or {text}B")
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _budget(text: str) -> int | float | str:
    if text.strip() == "auto":
        return "auto"
    if re.fullmatch(r"0?\.\d+|1\.0*", text.strip()):
        return float(text)
    return _bytes(text)


def _pixels(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a width x height such as 832x480")
    return int(found[1]), int(found[2])


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
