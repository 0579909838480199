"""Case ``predict``: step and device peak as the planner predicts them, beside measured ones.

For each model and size: resident; streamed, 1 and 2 blocks ahead, plain and packed; and whole,
where the DiT waits in page-locked host memory and is brought to the device for a few steps. Rows
hold what was measured; the tables compute predictions from them with the cost model as it is then
(see ``predictions``), so ``python -m benchmarks table`` says what a changed constant would have
predicted.
"""

from __future__ import annotations

import traceback
from argparse import ArgumentParser, ArgumentTypeError
from dataclasses import replace

import torch

from benchmarks import machine
from benchmarks.harness import Session, say
from benchmarks.models import MODELS, ModelSpec, Size, chosen_sizes, named_sizes
from benchmarks.predict_bench import PredictBench, Wanted, fingerprint, key_of
from benchmarks.predictions import NAME, PLANS
from wanoffload.machine.hardware import Hardware
from wanoffload.policy import cost

HELP = "step and device peak of the planner's candidates, beside what it predicts"


def add_options(parser: ArgumentParser) -> None:
    """The options of this case."""
    group = parser.add_argument_group(NAME)
    group.add_argument(
        "--models", type=_models, help="names with commas between, in place of --model"
    )
    group.add_argument(
        "--sizes",
        type=_names,
        help="only these, such as 720x1280x81, commas between; slow ones are measured only so",
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _models(text: str) -> list[str]:
    names = _names(text)
    unknown = [name for name in names if name not in MODELS]
    if unknown or not names:
        raise ArgumentTypeError(f"{text!r}: models are {', '.join(MODELS)}")
    return names


def run(session: Session) -> None:
    """Measures all missing rows, model by model; the machine is probed once, before them."""
    options = session.options
    specs = [MODELS[name] for name in options.models or [options.model]]
    wanted = {spec.name: _wanted(session, spec) for spec in specs}
    if not any(_sizes(session, spec) for spec in specs):
        asked = ", ".join(options.sizes or map(str, options.frames or []))
        session.failures.append(f"{NAME}: no model has a size {asked}; see --list")
    missing = [spec for spec in specs if wanted[spec.name]]
    if not missing:
        return
    hardware = known_hardware(session.device)
    for spec in missing:
        if not session.out_of_time():
            _measure(session, spec, hardware, wanted[spec.name])


def _measure(session: Session, spec: ModelSpec, hardware: Hardware, wanted: Wanted) -> None:
    """One model's failure must not cost the others."""
    try:
        PredictBench(session, spec, hardware, wanted).run()
    except Exception as error:
        traceback.print_exc()
        session.failures.append(f"{NAME} {spec.name}: {type(error).__name__}: {error}")
    machine.release_caches()


def _sizes(session: Session, spec: ModelSpec) -> list[Size]:
    options = session.options
    if options.sizes:
        return named_sizes(spec, options.sizes)
    return chosen_sizes(spec, options.frames)


def _wanted(session: Session, spec: ModelSpec) -> Wanted:
    """The plans of each size that are still to be measured."""
    missing = {
        size: [plan for plan in PLANS if _is_missing(session, spec, size, plan)]
        for size in _sizes(session, spec)
    }
    return {size: plans for size, plans in missing.items() if plans}


def _is_missing(session: Session, spec: ModelSpec, size: Size, plan: str) -> bool:
    return session.missing(NAME, key_of(spec, size, plan), fingerprint(session, plan))


def known_hardware(device: torch.device) -> Hardware:
    """This machine as the planner sees it; without a GPU one made up, to try the case out."""
    if device.type == "cuda":
        found = Hardware.probe(device)
        say(f"probed: {found}")
        return found
    return replace(cost.ASSUMED, name="made up", device_memory="8GiB", host_memory="32GiB")
