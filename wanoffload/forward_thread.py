"""Who is inside a forward of a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from wanoffload.errors import ConcurrentForwardError


class ForwardThread:
    """The one thread that is inside a forward of a model, if any. Any thread may ask.

    Each step is one of a dictionary's, which no interrupt can cut in two.
    """

    def __init__(self) -> None:
        self._owner: dict[str, int] = {}  # "thread": its number

    def is_this(self) -> bool:
        """Whether it is the calling one."""
        return self._owner.get("thread") == threading.get_ident()

    def is_any(self) -> bool:
        """Whether there is one."""
        return bool(self._owner)

    def enter(self, what: str) -> bool:
        """It is the calling one from here on; False if it was already. Raises
        ConcurrentForwardError if it is another."""
        me = threading.get_ident()
        if self._owner.get("thread") == me:
            return False
        if self._owner.setdefault("thread", me) != me:
            raise ConcurrentForwardError(
                f"{what} was called by a second thread while a forward of the same model is "
                "running. Weights in slots belong to one forward at a time: take turns, or wrap a "
                "copy for each thread."
            )
        return True

    def leave(self) -> None:
        """It is the calling one no more, if it was."""
        if self.is_this():
            self._owner.pop("thread", None)

    @contextmanager
    def between_forwards(self, what: str, instead: str) -> Iterator[None]:
        """For what must not happen during a forward. Raises ConcurrentForwardError if one runs."""
        if not self.enter(what):
            raise ConcurrentForwardError(f"a forward of this model is running: {instead}")
        try:
            yield
        finally:
            self.leave()

    def refuse_others(self, what: str) -> None:
        """Raises ConcurrentForwardError if it is another than the calling one."""
        if self.is_any() and not self.is_this():
            raise ConcurrentForwardError(
                f"{what} while another thread runs a forward of the model, whose weights stand in "
                "the slots in part; wait until the forward has ended"
            )
