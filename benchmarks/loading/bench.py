"""What the parts share: the checkpoint, the machine made ready, the resident model's outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

from benchmarks import machine
from benchmarks.contenders import DIFFUSERS_LEVELS, OURS, RESIDENT
from benchmarks.harness import ROOT, Session, Spread, peer_fingerprint, say
from benchmarks.loading import checkpoint, page_cache
from benchmarks.loading.checkpoint import Checkpoint
from benchmarks.loading.claims import Claim
from benchmarks.loading.remote import Remote
from benchmarks.models import MODELS, Size, chosen_sizes, model_bytes

NAME = "loading"
PEER = "diffusers-block-stream"
TOUCHED = 1.6  # times the model: what diffusers page-locks, the largest that any part takes
WARM = 0.99  # of the files' bytes in the page cache
COLD = 0.01
MOST_FORWARDS = 4


class LoadingBench:
    """One run of the case."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.device = session.device
        self.spec = MODELS[session.options.model]
        self.bytes = model_bytes(self.spec)
        self.sizes = chosen_sizes(self.spec, session.options.frames)
        self.prefetch = self.spec.prefetches[1]
        self._resident_is_new = False

    # What is loaded.

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Made at the first use; then the machine is made to give the memory that parts take.

        A virtual machine is slow at memory that it has not been given yet, whoever asks for it.
        """
        options = self.session.options
        folder = options.checkpoint or ROOT / "build" / "checkpoints" / self.spec.name
        made = checkpoint.ensure(self.spec, folder, self.device, options.shard_bytes)
        machine.release_caches()
        machine.touch_once(round(self.bytes.all * TOUCHED))
        return made

    def warm_up(self) -> float:
        """Has the page cache hold the files; the share of them that it holds."""
        page_cache.warm(self.checkpoint.files)
        return self.cached()

    def cool_down(self) -> float:
        """Has the page cache forget the files; the share of them that it holds all the same."""
        page_cache.drop(self.checkpoint.files)
        return self.cached()

    def cached(self) -> float:
        """The share of the files in the page cache, 0 to 1."""
        return page_cache.cached_bytes(self.checkpoint.files) / self.checkpoint.nbytes

    # Who loads it.

    def ours(self, tier: str = "pinned") -> str:
        """This project as a contender."""
        kind = "" if tier == "pinned" else f"-{tier}"
        return f"{OURS}{kind}-p{self.prefetch}"

    @cached_property
    def peer(self) -> str | None:
        """diffusers' group offload with streams: block level, or what --contenders says."""
        if self.device.type != "cuda":
            say(f"{PEER} needs a GPU and is left out")
            return None
        named = [n for n in self.session.options.contenders or () if n in DIFFUSERS_LEVELS]
        return named[0] if named else PEER

    @contextmanager
    def workers(
        self, name: str, count: int, launcher: Sequence[str] = ()
    ) -> Iterator[list[Remote]]:
        """Fresh processes, ready to load as the contender ``name`` does it. They start together."""
        with ExitStack() as stack:
            made = [
                stack.enter_context(Remote(name, self.spec.name, self.device, launcher))
                for _ in range(count)
            ]
            for each in made:
                each.tell("prepare")
            for each in made:
                each.take_moments()
            yield made

    @contextmanager
    def worker(self, name: str, launcher: Sequence[str] = ()) -> Iterator[Remote]:
        """One of these."""
        with self.workers(name, 1, launcher) as (worker,):
            yield worker

    def load(self, worker: Remote, subfolder: str = "transformer", **options: Any) -> Any:
        """Has a worker load the checkpoint."""
        folder = self.checkpoint.folder
        found = worker.ask("load", folder=folder, subfolder=subfolder, **options)
        say(f"{worker.name}: loaded in {found['load_s']:.2f} s")
        return found

    # What is expected.

    def resident(self, size: Size) -> dict[str, Any]:
        """The resident model at a size: ``forward_ms`` and ``digest``. Measured once and stored."""
        again = self.session.options.again and not self._resident_is_new
        row = self.session.find(NAME, self._resident_key(size), peer_fingerprint())
        if row is None or again:
            self._measure_resident()
            row = self.session.find(NAME, self._resident_key(size), peer_fingerprint())
        if row is None:
            raise RuntimeError(f"the resident model gave no numbers at {size}")
        return row.values

    def _resident_key(self, size: Size) -> dict[str, Any]:
        return {"model": self.spec.name, "part": RESIDENT, "size": str(size)}

    def _measure_resident(self) -> None:
        self._resident_is_new = True
        self.warm_up()
        with self.worker(RESIDENT) as worker:
            self.load(worker)
            for size in self.sizes:
                found = worker.ask("forwards", size=size, count=MOST_FORWARDS)
                values = {
                    "verified": found["finite"],
                    "claims": [],
                    "forward_ms": Spread.of(found["forward_ms"]).as_json(),
                    "digest": found["digest"],
                }
                self.session.record(NAME, self._resident_key(size), peer_fingerprint(), values)

    def is_expected(self, size: Size, runs: Iterable[Mapping[str, Any]]) -> bool:
        """Whether all these forwards gave the resident model's outputs, and by fetched blocks."""
        digest = self.resident(size)["digest"]
        return all(run["digest"] == digest and run["fetches_right"] for run in runs)


def as_json(claims: Iterable[Claim]) -> list[dict[str, Any]]:
    """Claims as they are stored."""
    return [claim.as_json() for claim in claims]
