"""The ring of bytes that parts of blocks pass through: where each stands in it. Pure.

Every part has the same place in every forward. Places follow each other, and begin again at the
front where the next would pass the end; a part that is plain is cut between its tensors, so that
little is lost there. What is brought to a place waits for the readers of what it overwrites, piece
by piece, so a ring need not hold parts as a whole to be kept busy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, count
from typing import NamedTuple

from wanoffload.facts.tally import ALIGNMENT, aligned

LEAST_PIECE = 1 / 32
"""Of a part: smaller tensors go with those before or behind them."""
STEP = 1 / 1024
"""Of the least size: places begin at multiples of this. So those of pieces that differ by a bias
cover each other exactly: a few bytes of a later place would keep the whole piece waiting."""
MOST = 1.5
"""Times the least size: beyond, that the last part of a forward keeps the first of the next
waiting is taken into account."""


class Piece(NamedTuple):
    """A run of a part's bytes: where it begins in its image and in the ring."""

    offset: int
    start: int
    nbytes: int


Place = tuple[Piece, ...]


Span = tuple[int, int]  # where a piece begins and ends in the ring


class Ring(NamedTuple):
    """`places`: one a part, in the order of use."""

    nbytes: int
    places: tuple[Place, ...]


def cut(tensors: Iterable[int]) -> tuple[int, ...]:
    """Bytes of the pieces that a plain part may be cut into: each begins with a large tensor.

    `tensors`: bytes of each, in the order of the part's image.
    """
    sizes = list(tensors)
    offsets = list(accumulate(map(aligned, sizes), initial=0))
    least = offsets[-1] * LEAST_PIECE
    starts = [0]
    for offset, nbytes in zip(offsets, sizes, strict=False):
        if nbytes >= least and offset - starts[-1] >= least:
            starts.append(offset)
    ends = [*starts[1:], offsets[-1]]
    return tuple(end - start for start, end in zip(starts, ends, strict=True))


@lru_cache(maxsize=64)
def ring_of(parts: tuple[tuple[int, ...], ...], ahead: int) -> Ring:
    """The smallest ring in which a part touches none of the `ahead` before it.

    Args:
        parts: for each part, in the order of use, the bytes of its pieces.
        ahead: 0: nothing is fetched while something is in use.
    """
    if ahead == 0:
        return Ring(max(map(sum, parts), default=0), tuple(_row(pieces, 0) for pieces in parts))
    least = least_bytes(parts, ahead)
    step = max(ALIGNMENT, int(least * STEP) // ALIGNMENT * ALIGNMENT)
    open_end: Ring | None = None
    for nbytes in count(-(-least // step) * step, step):
        if open_end is not None and nbytes > MOST * least:
            return open_end
        spans = _spans(parts, nbytes, step, ahead)
        if spans is None:
            continue
        if _apart_around(spans, ahead):
            return Ring(nbytes, _as_places(spans))
        open_end = open_end or Ring(nbytes, _as_places(spans))
    raise AssertionError("there is no end to the sizes")


def least_bytes(parts: Sequence[Sequence[int]], ahead: int) -> int:
    """No ring of these parts is smaller: what a part and those ahead take together."""
    sizes = [sum(pieces) for pieces in parts]
    together = min(ahead + 1, len(sizes))
    return max(
        sum(sizes[(first + i) % len(sizes)] for i in range(together)) for first in range(len(sizes))
    )


def overwritten(places: Mapping[int, Place]) -> set[int]:
    """The parts that have bytes in common with others: each forward fetches them again."""
    row = sorted(
        (piece.start, piece.start + piece.nbytes, number)
        for number, place in places.items()
        for piece in place
    )
    found: set[int] = set()
    end, last = 0, -1  # of what has come in the row, the farthest end and whose it is
    for start, stop, number in row:
        if start < end:
            found.update((last, number))
        if stop > end:
            end, last = stop, number
    return found


def _row(pieces: Sequence[int], start: int) -> Place:
    place, offset = [], 0
    for nbytes in pieces:
        place.append(Piece(offset, start + offset, nbytes))
        offset += nbytes
    return tuple(place)


def _spans(
    parts: Sequence[Sequence[int]], nbytes: int, step: int, ahead: int
) -> list[list[Span]] | None:
    """Of each part's pieces, one behind the other, from multiples of `step` on. None if a part
    would touch itself, or one of the `ahead` before it."""
    lap = at = 0
    row: list[Span] = []  # of all pieces, as if laps of the ring followed each other
    first: list[int] = []  # of each part, in the row
    for number, pieces in enumerate(parts):
        first.append(len(row))
        oldest = first[max(0, number - ahead)]
        for size in pieces:
            if at + size > nbytes:
                lap, at = lap + nbytes, 0
            start, end = lap + at, lap + at + size
            # Each lap begins at the front, so what is touched is one lap behind.
            for other in range(oldest, len(row)):
                other_start, other_end = row[other]
                if other_start >= end - nbytes:
                    break
                if start - nbytes < other_end:
                    return None
            row.append((start, end))
            at += -(-size // step) * step
    ends = [*first[1:], len(row)]
    return [
        [(start % nbytes, start % nbytes + end - start) for start, end in row[one:other]]
        for one, other in zip(first, ends, strict=True)
    ]


def _apart_around(spans: Sequence[Sequence[Span]], ahead: int) -> bool:
    """Whether the first parts touch none of the last ones, of the forward before."""
    ahead = min(ahead, len(spans) - 1)
    return not any(
        start < other_end and other_start < end
        for number in range(ahead)
        for before in range(number - ahead, 0)
        for start, end in spans[number]
        for other_start, other_end in spans[before]
    )


def _as_places(spans: Iterable[Iterable[Span]]) -> tuple[Place, ...]:
    places = []
    for row in spans:
        place, offset = [], 0
        for start, end in row:
            place.append(Piece(offset, start, end - start))
            offset += end - start
        places.append(tuple(place))
    return tuple(places)
