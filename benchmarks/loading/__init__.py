"""Case ``loading``: from a checkpoint to a running model, in each tier of the host.

A checkpoint with random weights is made once, in the hub's layout. Then, each part by itself:
``warm``, from the page cache to page-locked, beside what the machine needs for the bytes, and
beside diffusers; ``cold``, from the disk, beside its O_DIRECT rate; ``tiers``, forwards streamed
from page-locked memory, ordinary memory and the files; ``share``, four processes with one arena;
``first-step``, from the start of a process to the end of its first step; ``cgroup``, both experts
of A14B on the disk tier under a limit of host memory.

Everything is loaded in fresh processes, which are told what to do over a pipe, so that their memory
is theirs alone. A row says what was measured beside its floor, the ratio of the two, and what was
asked of it; it is verified when the outputs are the resident model's, bit for bit.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

from benchmarks import machine
from benchmarks.engine import Found
from benchmarks.harness import Session, brief, code_fingerprint, say
from benchmarks.loading import cold, fresh, limited, share, tiers
from benchmarks.loading.bench import NAME, LoadingBench
from benchmarks.loading.checkpoint import SHARD_BYTES
from benchmarks.loading.claims import Claim

__all__ = ["HELP", "NAME", "PARTS", "add_options", "run"]

HELP = "from a checkpoint to a running model: seconds, host memory, and each tier's rate"
PARTS: dict[str, Callable[[LoadingBench], Found]] = {
    "warm": fresh.warm,
    "cold": cold.cold,
    "tiers": tiers.tiers,
    "share": share.share,
    "first-step": fresh.first_step,
    "cgroup": limited.limited,
}


def add_options(parser: ArgumentParser) -> None:
    """The options of this case; ``--repeats`` and ``--contenders`` (a peer) count here too."""
    group = parser.add_argument_group("loading")
    group.add_argument("--checkpoint", type=Path, help="folder of the checkpoint; it is kept")
    group.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="of its files")
    group.add_argument(
        "--tiers",
        type=lambda text: text.split(","),
        help=f"only these of the part tiers: {','.join(tiers.TIERS)}; pinned goes with pageable",
    )


def run(session: Session) -> None:
    """Measures the chosen parts; one that fails does not keep the others from running."""
    bench = LoadingBench(session)
    fingerprint = code_fingerprint(session.options.label)
    for part in session.chosen_parts(PARTS):
        if session.out_of_time():
            return
        try:
            _run_part(bench, part, fingerprint)
        except Exception as error:  # reported, and the run fails in the end
            session.failures.append(f"{NAME} {part}: {type(error).__name__}: {error}")
        machine.release_caches()


def _run_part(bench: LoadingBench, part: str, fingerprint: str) -> None:
    """All rows of a part, each stored as it is measured."""
    session = bench.session
    base = {"model": bench.spec.name, "part": part}
    only = session.options.tiers if part == "tiers" else None
    whole = {**base, **({"tiers": ",".join(only)} if only else {})}
    if not session.missing(NAME, whole, fingerprint):
        return
    verified = True
    for key, values in PARTS[part](bench):
        row = session.record(NAME, {**base, **key}, fingerprint, values)
        verified &= row.verified
        for claim in values["claims"]:
            say(f"{part} {brief(key)}: {Claim(**claim)}")
    session.record(NAME, whole, fingerprint, {"verified": verified, "complete": True})
