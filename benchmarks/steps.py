"""Case ``step``: the time of a denoising step, beside the resident model and the floor.

A step is two forwards (guidance). Steps follow each other without a wait; marks on the compute
stream between them give the times. The resident model, the link and the contender take turns in
the same run, so that a drift of the machine shows in all of them; ``turns`` says in which order.
With ``C`` the resident model's time, ``B`` the bytes of all blocks of both forwards and ``R`` the
rate of the link, nothing that brings plain bytes can be quicker than ``max(C, B / R)``: the floor.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from benchmarks.contenders import RESIDENT, Contender, by_name, names_for
from benchmarks.harness import Session, peer_fingerprint, say
from benchmarks.models import MODELS, ModelSpec, Size, chosen_sizes
from benchmarks.step_bench import NAME, StepBench, key_of

HELP = "a step (two forwards) of the resident model, of ours and of peers, beside the floor"
GRAPHS_KEPT = 64  # graphs dynamo may hold for the block's code: one for each size and contender


def add_options(parser: ArgumentParser) -> None:
    """The options of this case."""
    group = parser.add_argument_group(NAME)
    group.add_argument("--compiled", action="store_true", help="compile the blocks on both sides")
    group.add_argument(
        "--rounds", type=int, default=4, help="turns that each model takes; an even number is fair"
    )
    group.add_argument(
        "--run-seconds", type=float, default=3.0, help="length of one turn, at least one step"
    )
    group.add_argument(
        "--together",
        action="store_true",
        help="set all contenders up at once, so that the resident model is measured only once "
        "(needs host memory for all of them)",
    )


def run(session: Session) -> None:
    """Measures all missing rows."""
    options = session.options
    spec = MODELS[options.model]
    names = options.contenders or names_for(spec, session.device, options.compiled)
    plan = Plan(session, spec, names)
    groups = [(group, plan.sizes_for(group)) for group in plan.groups()]
    if not any(sizes for _, sizes in groups):
        return
    with one_graph_per_size():
        bench = StepBench(session, spec)
        for group, sizes in groups:
            if sizes and not session.out_of_time():
                bench.run_group(group, sizes)


class Plan:
    """Which rows are missing, and which contenders are set up at the same time."""

    def __init__(self, session: Session, spec: ModelSpec, names: Sequence[str]) -> None:
        self._session = session
        self._spec = spec
        contenders = [by_name(name) for name in names if name != RESIDENT]
        self._missing = [(each, self._sizes_of(each)) for each in contenders]
        wants_resident = RESIDENT in names
        self._resident = self._without_row(RESIDENT, peer_fingerprint()) if wants_resident else []

    def _sizes_of(self, contender: Contender) -> list[Size]:
        if contender.needs_gpu and self._session.device.type != "cuda":
            say(f"{contender.name} needs a GPU and is left out")
            return []
        fingerprint = contender.fingerprint(self._session.options.label)
        return self._without_row(contender.name, fingerprint)

    def _without_row(self, name: str, fingerprint: str) -> list[Size]:
        options = self._session.options
        return [
            size
            for size in chosen_sizes(self._spec, options.frames)
            if self._session.missing(
                NAME, key_of(self._spec, size, name, options.compiled), fingerprint
            )
        ]

    def groups(self) -> list[list[Contender]]:
        """Contenders to set up together; the empty group is the resident model alone."""
        waiting = [contender for contender, sizes in self._missing if sizes]
        groups = [waiting] if self._session.options.together else [[each] for each in waiting]
        return [*groups, []]

    def sizes_for(self, group: Sequence[Contender]) -> list[Size]:
        """The sizes at which something of a group is missing, smallest first."""
        wanted = {
            size for contender, sizes in self._missing if contender in group for size in sizes
        }
        if not group:
            beside = {size for _, sizes in self._missing for size in sizes}
            wanted = set(self._resident) - beside
        return [size for size in self._spec.sizes if size in wanted]


@contextmanager
def one_graph_per_size() -> Iterator[None]:
    """Lets compiled blocks have a graph of their own for each size, as in a fresh process.

    Without this the second size would make the compiler go over to dynamic shapes, and what is
    measured would depend on the order of the sizes.
    """
    from torch._dynamo import config

    with config.patch(automatic_dynamic_shapes=False, recompile_limit=GRAPHS_KEPT):
        yield
