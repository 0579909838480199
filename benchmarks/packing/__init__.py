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

from benchmarks.engine import Found
from benchmarks.harness import Session
from benchmarks.packing import fresh, micro, peers, step, wrap
from benchmarks.packing.bench import NAME, PackingBench
from benchmarks.parts import run_parts

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
    """Measures the chosen parts."""
    run_parts(NAME, PackingBench(session), PARTS)
