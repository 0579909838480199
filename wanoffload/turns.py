"""Who uses a unit's host bytes now."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager


class Turn:
    """Held while a unit's host bytes are used or move, so that no thread meets them half-way.

    One thread's at a time, which may take it several times.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0  # guarded by _lock

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        self._lock.release()

    @contextmanager
    def if_free(self) -> Iterator[bool]:
        """Takes it, if nobody has it: neither another thread nor this one. Never waits."""
        if not self._lock.acquire(blocking=False):
            yield False
            return
        self._depth += 1
        try:
            yield self._depth == 1
        finally:
            self._depth -= 1
            self._lock.release()


@contextmanager
def all_of(turns: Iterable[Turn]) -> Iterator[None]:
    """Takes each once, everybody in the same order, so that nobody waits for ever."""
    with ExitStack() as stack:
        for turn in sorted(set(turns), key=id):
            stack.enter_context(turn)
        yield
