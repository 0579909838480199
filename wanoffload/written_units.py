"""What of a model's packed units stands plain on the host, because it was written to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wanoffload.binding import Binding


class WrittenUnits:
    """The packed units that were written to and are not packed again yet: a few, for all others
    are, as soon as nobody uses them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._units: dict[int, Binding] = {}  # by id, the latest last

    def __len__(self) -> int:
        return len(self._units)

    def add(self, unit: Binding, pack_others: bool = True) -> None:
        """It stands plain as it is now. One that was written to before is packed again, if there
        are too many and nobody uses it; not without `pack_others`."""
        self._units.pop(id(unit), None)
        self._units[id(unit)] = unit
        if not pack_others:
            return
        for other in list(self._units.values())[: -self._most]:
            with other.turn.if_free() as free:
                if free and other.pack_again():
                    self._units.pop(id(other), None)

    def forget(self, unit: Binding) -> None:
        """It is not to be packed again."""
        self._units.pop(id(unit), None)

    def settle(self) -> None:
        """Before a forward: all are packed again, or, without memory for that, plain to the engine
        as well."""
        for unit in list(self._units.values()):
            unit.settle()
            if unit.packed:
                self._units.pop(id(unit), None)
