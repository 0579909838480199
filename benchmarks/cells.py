"""What tables are made of: markdown, and values as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from benchmarks.harness import Row

GB = 1e9
Item = TypeVar("Item")
Column = tuple[str, Callable[[Item], str]]


def markdown(rows: Iterable[Item], columns: Sequence[Column[Item]]) -> str:
    """One table."""
    lines = [_line(title for title, _ in columns), _line("---" for _ in columns)]
    lines += [_line(cell(row) for _, cell in columns) for row in rows]
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(value: dict[str, float], digits: int = 1) -> str:
    """A median with the least and the greatest."""
    numbers = (f"{value[name]:.{digits}f}" for name in ("median", "min", "max"))
    return "{} ({}–{})".format(*numbers)  # noqa: RUF001


def gigabytes(value: float) -> str:
    """Bytes in GB."""
    return f"{value / GB:.2f}"


def yes(value: object) -> str:
    """A truth value in a word."""
    return "yes" if value else "**no**"


def of_key(name: str) -> Callable[[Row], str]:
    """A cell with a part of the key."""
    return lambda row: str(row.key.get(name, ""))
