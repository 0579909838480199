"""Case ``packing``: packed blocks beside plain ones, and beside the resident model.

``micro``: one block packed and unpacked, by the device and by the CPU. ``wrap``: seconds to wrap,
plain and packed, and the bytes that come out. ``step``: steps of the resident model, of the plainly
streamed one, of the packed one, and where copies take about as long as compute of what the plan
makes of it, all in one run. ``host``: what two packed experts hold. ``memory``: what the device and
the host hold in a fresh process each. ``peers``: what others published.

A row says what was measured beside its floor or what was asked of it; it is verified when outputs
are the resident model's, bit for bit. Models stay set up from one part to the next.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable

from benchmarks import machine
from benchmarks.engine import Found
from benchmarks.harness import Session, brief, code_fingerprint, say
from benchmarks.loading.claims import Claim
from benchmarks.packing import fresh, micro, peers, step, wrap
from benchmarks.packing.bench import NAME, PackingBench

__all__ = ["HELP", "NAME", "PARTS", "add_options", "run"]

HELP = "packed blocks: rates, seconds to wrap, steps beside plain and resident, memory"
PARTS: dict[str, Callable[[PackingBench], Found]] = {
    "micro": micro.micro,
    "wrap": wrap.wrap,
    "step": step.step,
    "host": wrap.host,
    "memory": fresh.memory,
    "peers": peers.peers,
}


def add_options(parser: ArgumentParser) -> None:
    """No options of its own; ``--parts``, ``--frames``, ``--rounds`` and ``--repeats`` count."""


def run(session: Session) -> None:
    """Measures the chosen parts; one that fails does not keep the others from running."""
    bench = PackingBench(session)
    fingerprint = code_fingerprint(session.options.label)
    try:
        for part in session.chosen_parts(PARTS):
            if session.out_of_time():
                return
            try:
                _run_part(bench, part, fingerprint)
            except Exception as error:  # reported, and the run fails in the end
                bench.failed(part, error)
    finally:
        bench.close()
        machine.release_caches()


def _run_part(bench: PackingBench, part: str, fingerprint: str) -> None:
    """The rows of a part that are not there yet."""
    session = bench.session
    base = {"model": bench.spec.name, "part": part}
    frames = session.options.frames
    whole = {**base, **({"frames": ",".join(map(str, frames))} if frames else {})}
    if not session.missing(NAME, whole, fingerprint):
        return
    say(f"{NAME} {part}")
    verified = True
    for key, values in PARTS[part](bench):
        row = session.record(NAME, {**base, **key}, fingerprint, values)
        verified &= row.verified
        for claim in values["claims"]:
            say(f"{part} {brief(key)}: {Claim(**claim)}")
    session.record(NAME, whole, fingerprint, {"verified": verified, "complete": True})
