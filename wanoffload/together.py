"""A block that streams in parts, as a whole: what its parts have in common where it is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from wanoffload import hooks
from wanoffload.binding import Binding

if TYPE_CHECKING:
    from wanoffload.runtime import Offloader


class Together(hooks.Attached):
    """A block and the bindings of its parts, in the order of use.

    An ordinary block is not in the way: its parts fetch for themselves. Inside of a compiled block
    they can't, so all are fetched in front of it and let go behind it.
    """

    def __init__(self, offloader: Offloader, block: nn.Module, parts: list[Binding]) -> None:
        self.block = block
        self._offloader = offloader
        self._parts = parts
        self._inside = ExitStack()

    @property
    def aside(self) -> bool:
        """As of a Binding."""
        return self._parts[0].aside

    def compiling(self) -> None:
        """The block is about to be compiled. Raises WrapError, and nothing has changed, if the
        budget is too small to hold it as a whole."""
        self._offloader.leave_home("compile() was called")
        self._offloader.use_together()

    def compiled(self) -> None:
        """It is: its parts fetch nothing from here on."""
        for part in self._parts:
            hooks.unhook_forward(part.unit.module)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """As of a Binding, for all parts."""
        with ExitStack() as stack:
            for part in self._parts:
                part.begin(args, kwargs)
                stack.callback(part.exit)
            for part in self._parts:
                part.bring()
            self._inside = stack.pop_all()

    def own(self, output: Any) -> Any:
        return self._parts[0].own(output)

    def exit(self) -> None:
        self._inside.close()

    @contextmanager
    def moving(self, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Refuses what can't be done before any part moves."""
        if not self._offloader.moving_all:
            self._offloader.check_move(fn)
        yield


def wholes(offloader: Offloader) -> list[Together]:
    """One for each block that streams in parts."""
    parts: dict[int, list[Binding]] = {}
    for binding in offloader.bindings:
        if binding.unit.module is not binding.unit.block:
            parts.setdefault(id(binding.unit.block), []).append(binding)
    return [Together(offloader, row[0].unit.block, row) for row in parts.values()]
