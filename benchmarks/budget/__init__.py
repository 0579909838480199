"""Case ``budget``: what a step takes under each budget of device memory for the weights.

``steps``: a model, plain and packed, under one budget after the other, beside the resident model
and the floor of its plan. ``ceiling``: forwards of mixed shapes, and the most that torch's
allocator had meanwhile. ``parts``: parts of blocks, plain and packed, beside whole blocks and
diffusers' leaf level. ``experts``: two of a pipeline under one budget, and what their turns cost.
``peers``: that leaf level, whose memory can't be chosen, beside the budgets.

``python -m benchmarks picture`` draws the rows: memory against speed. A row is verified when
outputs are the resident model's, bit for bit, and forwards fetch what the plan says, to the byte.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable

from benchmarks.budget import ceiling, experts, parts, peers, steps
from benchmarks.budget.bench import NAME, BudgetBench
from benchmarks.engine import Found
from benchmarks.harness import Session
from benchmarks.parts import run_parts

__all__ = ["HELP", "NAME", "PARTS", "add_options", "run"]

HELP = "steps under budgets of device memory, beside their plans' floor; parts of blocks"
PARTS: dict[str, Callable[[BudgetBench], Found]] = {
    "steps": steps.steps,
    "ceiling": ceiling.ceiling,
    "parts": parts.parts,
    "experts": experts.experts,
    "peers": peers.peers,
}


def add_options(parser: ArgumentParser) -> None:
    """The options of this case; ``--parts`` and ``--frames`` count here too."""
    group = parser.add_argument_group(NAME)
    group.add_argument(
        "--forwards", type=int, default=ceiling.FORWARDS, help="of mixed shapes, under the ceiling"
    )


def run(session: Session) -> None:
    """Measures the chosen parts."""
    run_parts(NAME, BudgetBench(session), PARTS)
