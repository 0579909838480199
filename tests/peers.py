"""Other processes that do what a test says, step by step.

peer = Peer()
peer.start(function, 1, 2)   # function(state, 1, 2) in the other process; state: its own dict
peer.result()                # what it returned, or its error, raised here
peer.kill()                  # as `kill -9` does
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

State = dict[str, Any]
# Each is forked from one that has imported this, which takes seconds, and has done nothing else.
_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(["diffusers", "wanoffload", "tests.small_models"])


class Peer:
    def __init__(self) -> None:
        self._ours, theirs = _forking.Pipe()
        self._process = _forking.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._ours.send((function, arguments))

    def has_result(self, seconds: float) -> bool:
        """Whether there is one within this time."""
        return self._ours.poll(seconds)

    def result(self) -> Any:
        assert self._ours.poll(120), f"process {self.pid} does not answer"
        succeeded, value = self._ours.recv()
        if not succeeded:
            raise value
        return value

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.start(function, *arguments)
        return self.result()

    def forget(self) -> None:
        """Its state is emptied, and with it goes what it holds."""
        self.run(_forget)

    def kill(self) -> int | None:
        """Ends it at once. Returns its exit code."""
        self._process.kill()
        return self.wait()

    def wait(self) -> int | None:
        give_up = time.monotonic() + 60
        # Not join(): it waits for the process's children too, by a pipe that they inherit.
        while self._process.exitcode is None and time.monotonic() < give_up:
            time.sleep(0.005)
        return self._process.exitcode


def _forget(state: State) -> None:
    state.clear()
    gc.collect()


def _serve(pipe: Any) -> None:
    state: State = {}
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = True, function(state, *arguments)
        except Exception as error:
            answer = False, error.with_traceback(None)
        pipe.send(answer)
        del answer


def mapped_arenas() -> tuple[int, int]:
    """(Rss, Pss) of this process's mappings of shared arenas, in bytes."""
    totals = {"Rss:": 0, "Pss:": 0}
    is_arena = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            is_arena = "/memfd:wanoffload:" in line
        elif is_arena and key in totals:
            totals[key] += int(values[0]) * 1024
    return totals["Rss:"], totals["Pss:"]


def is_kept_waiting(peer: Peer, name: str) -> bool:
    """Whether a process that joins an arena has found it, and stays in that call."""
    give_up = time.monotonic() + 60
    while not any(name in link for link in _links(peer.pid)):
        assert time.monotonic() < give_up, "it has not come so far"
        time.sleep(0.01)
    return not peer.has_result(0.2)


def _links(pid: int) -> Iterator[str]:
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since
            yield os.readlink(link)
