"""Case ``micro``: the parts one at a time.

``link``: rate over size and kind of host memory. ``locking``: how fast memory is made present and
page-locked, by method. ``ring``: a chunk checked out and sent. ``event``: recorded, waited for, and
there and back between two streams. ``acquire``: what the host pays to acquire and release one
block of 27 tensors, the engine's part and Python's.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

from benchmarks import machine, micro_engine, micro_memory
from benchmarks.engine import Found
from benchmarks.harness import Session, code_fingerprint, say

NAME = "micro"
HELP = "link rate, page-locking rate, ring, events, host cost of acquire and release"

PARTS: dict[str, Callable[[Session], Found]] = {
    "link": micro_memory.link,
    "locking": micro_memory.locking,
    "ring": micro_engine.ring,
    "event": micro_engine.event,
    "acquire": micro_engine.acquire,
}


def add_options(parser: ArgumentParser) -> None:
    """No options of its own; ``--parts`` chooses among its parts."""


def run(session: Session) -> None:
    """Measures the parts; one that fails does not keep the others from running."""
    fingerprint = code_fingerprint(session.options.label)
    for part in session.chosen_parts(PARTS):
        if session.out_of_time():
            return
        if not session.missing(NAME, {"part": part}, fingerprint):
            continue
        try:
            _run_part(session, part, fingerprint)
        except Exception as error:  # reported, and the run fails in the end
            session.failures.append(f"{NAME} {part}: {type(error).__name__}: {error}")
        machine.release_caches()


def _run_part(session: Session, part: str, fingerprint: str) -> None:
    """All rows of a part, then the row that says that the part is complete."""
    verified = True
    for key, values in PARTS[part](session):
        row = session.record(NAME, {"part": part, **key}, fingerprint, values)
        verified &= row.verified
        say(f"{part} {_in_short({**key, **values})}")
    session.record(NAME, {"part": part}, fingerprint, {"verified": verified, "complete": True})


def _in_short(values: dict[str, Any]) -> str:
    medians = {
        name: value["median"] if isinstance(value, dict) else value
        for name, value in values.items()
    }
    return ", ".join(
        f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in medians.items()
    )
