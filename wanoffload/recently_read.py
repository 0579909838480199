"""What of a model's packed units stands unpacked on the host, because it was read."""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

from wanoffload import host_memory

UNPACKED_UNITS = 2
"""So many stand unpacked on the host, besides those that somebody holds, when packed weights are
read; and so many more when they are written to."""


class Dropping(Protocol):
    """A unit of which a part is unpacked."""

    @property
    def nbytes(self) -> int:
        """Of that part."""

    def drop_unused(self) -> None:
        """Gives back what nobody needs."""


class RecentlyRead:
    """The units of a model of which a part was unpacked, in the order in which they were read.

    Any thread, and a garbage collection in the middle of anything. Keeps no unit alive.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._mutex = threading.RLock()  # not held while something is dropped
        self._units: dict[int, weakref.ref[Dropping]] = {}  # by id, the most recent last

    @property
    def nbytes(self) -> int:
        return sum(unit.nbytes for unit in self._oldest_first())

    def note(self, unit: Dropping) -> None:
        """A part of it was read, and is unpacked."""
        with self._mutex:
            self._units.pop(id(unit), None)
            self._units[id(unit)] = weakref.ref(unit)

    def forget(self, unit: Dropping) -> None:
        """Nothing of it is unpacked any more, or it is to stay."""
        with self._mutex:
            self._units.pop(id(unit), None)

    def make_room(self, nbytes: int, purpose: str) -> None:
        """Raises HostMemoryError if there is no room for so many bytes more."""
        if host_memory.to_be_had() < nbytes:
            self.drop_all()
            host_memory.require(nbytes, purpose)

    def trim(self) -> None:
        """Drops those read longest ago, as far as nobody needs them, if too much is unpacked."""
        self._drop_down_to(self._most_bytes)

    def holder_is_gone(self, _: object) -> None:
        """Somebody who kept a part of some unit does so no longer."""
        self.trim()

    def drop_all(self) -> None:
        """Drops whatever nobody needs."""
        self._drop_down_to(0)

    def _drop_down_to(self, nbytes: int) -> None:
        units = self._oldest_first()
        excess = sum(unit.nbytes for unit in units) - nbytes
        for unit in units:
            if excess <= 0:
                return
            before = unit.nbytes
            unit.drop_unused()
            excess -= before - unit.nbytes

    def _oldest_first(self) -> list[Dropping]:
        with self._mutex:
            found = [reference() for reference in list(self._units.values())]
        return [unit for unit in found if unit is not None]
