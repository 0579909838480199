"""``python -m benchmarks CASE [CASE ...]``: measures cases, or shows what was measured.

Progress goes to the standard error, tables to the standard output, the picture to a file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from benchmarks import (
    budget,
    limited,
    loading,
    machine,
    memory,
    micro,
    packing,
    predict,
    steps,
    tables,
    wrapping,
)
from benchmarks.budget import picture
from benchmarks.contenders import DIFFUSERS_LEVELS, OURS_BY_TIER, OURS_IN_PARTS, RESIDENT
from benchmarks.harness import ROOT, ResultStore, Session, say
from benchmarks.models import MODELS

CASES = {
    case.NAME: case
    for case in (steps, memory, wrapping, micro, predict, limited, loading, packing, budget)
}
TABLE, PICTURE = "table", "picture"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    made.add_argument("cases", nargs="*", metavar="CASE", help="see --list")
    made.add_argument("--list", action="store_true", help="say what can be measured, and stop")
    made.add_argument("--results", type=Path, help="where rows are kept, one JSON object a line")
    made.add_argument("--again", action="store_true", help="measure rows that are there already")
    made.add_argument("--label", help="names the code in place of a hash of its sources")
    made.add_argument("--deadline", type=float, help="seconds after which no row is begun")
    made.add_argument("--device", type=torch.device, default=_default_device())
    made.add_argument("--model", choices=MODELS, default="14b")
    made.add_argument(
        "--tiny",
        dest="model",
        action="store_const",
        const="tiny",
        help="a toy model, for trying the harness out without a GPU",
    )
    made.add_argument("--frames", type=int, nargs="+", help="only the sizes with these frames")
    made.add_argument("--contenders", type=_names, help="names with commas between; see --list")
    made.add_argument("--parts", type=_names, help="only these parts of the cases that have some")
    made.add_argument("--picture", type=Path, default=picture.DEFAULT, help="the picture's file")
    for case in CASES.values():
        case.add_options(made)
    return made


def _default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _parts_of(case: ModuleType | None) -> list[str]:
    """The names of a case's parts; most cases have none."""
    return list(getattr(case, "PARTS", ()))


def print_list() -> None:
    """What can be measured."""
    print("cases:")
    for case in CASES.values():
        print(f"  {case.NAME:10} {case.HELP}")
        if parts := _parts_of(case):
            print(f"  {'':10} parts: {', '.join(parts)}")
    print(f"  {TABLE:10} prints what --results holds, as markdown")
    print(f"  {PICTURE:10} draws memory against speed, from the rows of budget in --results")
    print("models and sizes:")
    for spec in MODELS.values():
        slow = [f"{size} (only by --sizes)" for size in spec.slow_sizes]
        print(f"  {spec.name:10} {', '.join([*map(str, spec.sizes), *slow])}")
    print("contenders:")
    for name in (RESIDENT, *OURS_BY_TIER, *OURS_IN_PARTS, *DIFFUSERS_LEVELS):
        print(f"  {name}")


def draw_picture(session: Session) -> None:
    """Of the newest rows of the chosen model."""
    options = session.options
    made = picture.compose(session.store, options.model)
    if made.warning:
        say(f"{PICTURE}: {made.warning}")
    if not made.charts:
        session.failures.append(f"{PICTURE}: {session.store.path} has no steps to be drawn")
        return
    try:
        picture.draw(made, options.picture)
    except ImportError as error:
        session.failures.append(f"{PICTURE}: {error}; pip install 'wanoffload[bench]'")
        return
    print(options.picture)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; 0 when every row is there and verified."""
    made = parser()
    options = made.parse_args(arguments)
    if options.list:
        print_list()
        return 0
    unknown = [name for name in options.cases if name not in (*CASES, TABLE, PICTURE)]
    if unknown or not options.cases:
        made.error(f"{', '.join(unknown)}: no such case; see --list" if unknown else "see --list")
    parts = {part for name in options.cases for part in _parts_of(CASES.get(name))}
    if no_parts := [part for part in options.parts or () if part not in parts]:
        made.error(f"{', '.join(no_parts)}: no such part of these cases; see --list")
    default = ROOT / "benchmarks" / "results" / f"{machine.slug(options.device)}.jsonl"
    store = ResultStore(options.results or default)
    session = Session(store, options, options.device, machine.describe(options.device))
    for name in options.cases:
        if name == TABLE:
            print(tables.render(store))
        elif name == PICTURE:
            draw_picture(session)
        else:
            CASES[name].run(session)
            machine.release_caches()
    for failure in session.failures:
        say(f"FAILED {failure}")
    return 1 if session.failures else 0


if __name__ == "__main__":
    sys.exit(main())
