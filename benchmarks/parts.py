"""The parts of a case: each is measured once, its rows are stored as they come, claims are told."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from benchmarks import machine
from benchmarks.engine import Found
from benchmarks.harness import Session, brief, code_fingerprint, say
from benchmarks.loading.claims import Claim
from benchmarks.models import ModelSpec


class Bench(Protocol):
    """What the parts of a case share."""

    @property
    def session(self) -> Session:
        """The run."""

    @property
    def spec(self) -> ModelSpec:
        """The model."""

    def close(self) -> None:
        """Takes down what was set up."""


AnyBench = TypeVar("AnyBench", bound=Bench)
Parts = Mapping[str, Callable[[AnyBench], Found]]


def run_parts(case: str, bench: AnyBench, parts: Parts[AnyBench]) -> None:
    """Measures the chosen parts; one that fails does not keep the others from running."""
    session = bench.session
    fingerprint = code_fingerprint(session.options.label)
    try:
        for part in session.chosen_parts(parts):
            if session.out_of_time():
                return
            try:
                _run_part(case, bench, part, parts[part], fingerprint)
            except Exception as error:  # reported, and the run fails in the end
                traceback.print_exception(error)
                session.failures.append(f"{case} {part}: {type(error).__name__}: {error}")
    finally:
        bench.close()
        machine.release_caches()


def _run_part(
    case: str, bench: AnyBench, part: str, measure: Callable[[AnyBench], Found], fingerprint: str
) -> None:
    """The rows of a part that are not there yet."""
    session = bench.session
    base = {"model": bench.spec.name, "part": part}
    frames = session.options.frames
    whole = {**base, **({"frames": ",".join(map(str, frames))} if frames else {})}
    if not session.missing(case, whole, fingerprint):
        return
    say(f"{case} {part}")
    verified = True
    for key, values in measure(bench):
        row = session.record(case, {**base, **key}, fingerprint, values)
        verified &= row.verified
        for claim in values["claims"]:
            say(f"{part} {brief(key)}: {Claim(**claim)}")
    if session.stopped:
        return  # the next run goes on
    session.record(case, whole, fingerprint, {"verified": verified, "complete": True})
