"""When parts of blocks come and are computed that pass through a ring of bytes. Pure.

One link copies parts in the order of their use, whichever forward they belong to, each piece by
piece. What is copied waits, stretch by stretch, until that was computed which last stood there. One
device computes parts in order, each once all of it has come. The host runs ahead of the device and
costs nothing.

Whatever was used last stood there: a ring in which a part stands on bytes of the one in use, or of
one that is still to be used, makes copies wait longer, and never gives wrong bytes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

Piece = tuple[int, int]
"""(where in the ring, bytes)."""


@dataclass(frozen=True)
class Timed:
    """A part: where it stands, and the seconds of its compute. No pieces: it stays where it is."""

    pieces: tuple[Piece, ...]
    compute_s: float

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.pieces)


class Holders:
    """Which use of a part last stood on each byte of the ring; -1: none did."""

    def __init__(self, nbytes: int) -> None:
        self._starts = [0, nbytes]  # of stretches; the last one ends there
        self._uses = [-1]

    def take(self, piece: Piece, use: int) -> list[tuple[int, int]]:
        """(bytes, the use before) of each stretch of the piece. It stands there from here on."""
        start, end = piece[0], piece[0] + piece[1]
        assert 0 <= start < end <= self._starts[-1]
        for edge in (start, end):
            self._end_at(edge)
        first, last = bisect_left(self._starts, start), bisect_left(self._starts, end)
        stretches = [
            (self._starts[n + 1] - self._starts[n], self._uses[n]) for n in range(first, last)
        ]
        self._starts[first:last] = [start]
        self._uses[first:last] = [use]
        return stretches

    def _end_at(self, edge: int) -> None:
        stretch = bisect_right(self._starts, edge) - 1
        if self._starts[stretch] != edge:
            self._starts.insert(stretch + 1, edge)
            self._uses.insert(stretch + 1, self._uses[stretch])


def merged(
    stretches: Sequence[tuple[int, int]], least_stretch: int
) -> list[tuple[int, tuple[int, ...]]]:
    """(bytes, the uses before): a stretch of less is copied at once with its neighbour, behind all
    that stood there."""
    found: list[tuple[int, tuple[int, ...]]] = []
    for nbytes, before in stretches:
        if found and min(nbytes, found[-1][0]) < least_stretch:
            found[-1] = (found[-1][0] + nbytes, (*found[-1][1], before))
        else:
            found.append((nbytes, (before,)))
    return found


def ends(
    parts: Sequence[Timed],
    ring_bytes: int,
    link_gb_per_s: float,
    uses: int,
    least_stretch: int = 0,
) -> list[float]:
    """When each of so many uses of the parts, one after the other, has been computed."""
    holders = Holders(ring_bytes)
    done: list[float] = []
    copied = now = 0.0
    for use in range(uses):
        part = parts[use % len(parts)]
        for piece in part.pieces:
            for nbytes, before in merged(holders.take(piece, use), least_stretch):
                free = max((done[each] for each in before if each >= 0), default=0.0)
                copied = max(copied, free) + nbytes / (link_gb_per_s * 1e9)
        now = max(now, copied) + part.compute_s
        done.append(now)
    return done


def seconds(
    parts: Sequence[Timed],
    ring_bytes: int,
    link_gb_per_s: float,
    forwards: int = 8,
    least_stretch: int = 0,
) -> float:
    """Of a forward: the mean over the second half of so many."""
    done = ends(parts, ring_bytes, link_gb_per_s, forwards * len(parts), least_stretch)
    half = forwards // 2
    return (done[-1] - done[half * len(parts) - 1]) / (forwards - half)


def bound(parts: Sequence[Timed], link_gb_per_s: float) -> float:
    """What no ring is quicker than: all computes, or all copies."""
    copies = sum(part.nbytes for part in parts) / (link_gb_per_s * 1e9)
    return max(sum(part.compute_s for part in parts), copies)


def one_by_one(parts: Sequence[Timed], link_gb_per_s: float) -> float:
    """Each is fetched when it is needed."""
    copies = sum(part.nbytes for part in parts) / (link_gb_per_s * 1e9)
    return sum(part.compute_s for part in parts) + copies
