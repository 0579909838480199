"""A worker process as its parent sees it."""

from __future__ import annotations

import math
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from benchmarks.harness import ROOT

ANSWER_SECONDS = 400.0
END_SECONDS = 60.0


class WorkerError(RuntimeError):
    """A worker could not do what it was told, did not answer, or is gone."""


class Remote:
    """A fresh process; a context manager, at whose end it is gone.

    Args:
        name: the contender as which it will load.
        model: the name of what it will load.
        device: where it will run it.
        launcher: what the command begins with, to start it in a cgroup.

    ``started``: the moment of ``time.monotonic`` before it was started; ``imported`` and ``ready``,
    those when its libraries, and then its device, were there.
    """

    def __init__(
        self, name: str, model: str, device: torch.device, launcher: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.imported = self.ready = math.nan
        ours, theirs = multiprocessing.Pipe()
        command = [*launcher, sys.executable, "-m", "benchmarks.loading.worker"]
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            [*command, str(theirs.fileno()), name, model, str(device)],
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._pipe: Connection[Any, Any] = ours

    def __enter__(self) -> Remote:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pipe.close()
        try:
            self._process.wait(timeout=END_SECONDS if error is None else 0.1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def tell(self, command: str, **arguments: Any) -> None:
        """Sends a command; its answer must be taken before the next one is sent."""
        try:
            self._pipe.send((command, arguments))
        except OSError as error:
            raise WorkerError(self._gone()) from error

    def answer(self, timeout_s: float = ANSWER_SECONDS) -> Any:
        """The answer to the command sent last. Raises WorkerError, with the worker's traceback."""
        if not self._pipe.poll(timeout_s):
            raise WorkerError(f"the worker gave no answer in {timeout_s:g} s")
        try:
            right, found = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise WorkerError(self._gone()) from error
        if not right:
            raise WorkerError(f"in the worker:\n{found}")
        return found

    def ask(self, command: str, **arguments: Any) -> Any:
        """Sends a command and waits for its answer."""
        self.tell(command, **arguments)
        return self.answer()

    def take_moments(self) -> None:
        """Takes the answer to "prepare"."""
        found = self.answer()
        self.imported, self.ready = found["imported"], found["ready"]

    def _gone(self) -> str:
        code = self._process.wait(timeout=END_SECONDS)
        killed = " (killed, perhaps for memory)" if code in (-9, 137) else ""
        return f"the worker ended with {code}{killed}"
