"""Plain reads by many threads: what a disk, or the page cache, gives without any of this project.

The threads are Python's, which let go of the interpreter while they read; pieces are large enough
that what is left of it does not count.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

READ_BYTES = 8 << 20
PAGE = 4096  # what O_DIRECT asks of offsets, lengths and memory


@dataclass(frozen=True)
class Piece:
    """Some bytes of a file."""

    file: Path
    offset: int
    nbytes: int


Place = Callable[[int, Piece], memoryview]  # where a thread (by its number) puts a piece


def pieces_of(files: Sequence[Path], nbytes: int, *, whole_pages: bool = False) -> list[Piece]:
    """The files cut into pieces of this size. ``whole_pages`` leaves out what ends within one."""
    pieces = []
    for file in files:
        end = file.stat().st_size
        if whole_pages:
            end -= end % PAGE
        starts = range(0, end, nbytes)
        pieces += [Piece(file, start, min(nbytes, end - start)) for start in starts]
    return pieces


class Reader:
    """Open files that are read by many threads; ``direct`` past the page cache.

    Raises OSError (EINVAL) where the filesystem refuses O_DIRECT.
    """

    def __init__(self, *, direct: bool) -> None:
        self._flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
        self._open: dict[Path, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def gb_per_s(self, pieces: Sequence[Piece], threads: int, place: Place | None = None) -> float:
        """GB/s over all pieces; without ``place`` each thread reads into a buffer of its own."""
        place = place or own_buffers(threads, max(piece.nbytes for piece in pieces))
        for piece in pieces:
            if piece.file not in self._open:
                self._open[piece.file] = os.open(piece.file, self._flags)
        left = iter(pieces)
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda number: self._read_some(number, left, place), range(threads)))
        return sum(piece.nbytes for piece in pieces) / (time.perf_counter() - start) / 1e9

    def _read_some(self, thread: int, left: Iterator[Piece], place: Place) -> None:
        for piece in left:  # a list's iterator gives each item once, whoever asks
            self._read(piece, place(thread, piece)[: piece.nbytes])

    def _read(self, piece: Piece, target: memoryview) -> None:
        done = 0
        while done < piece.nbytes:
            found = os.preadv(self._open[piece.file], [target[done:]], piece.offset + done)
            if found == 0:
                raise OSError(f"{piece.file} ended at {piece.offset + done}")
            done += found


def own_buffers(threads: int, nbytes: int) -> Place:
    """A buffer for each thread, aligned to pages and touched."""
    buffers = [memoryview(mmap.mmap(-1, nbytes)) for _ in range(threads)]
    for buffer in buffers:
        buffer[:] = bytes(nbytes)
    return lambda thread, _: buffers[thread]


def buffers_within(memory: memoryview, threads: int, nbytes: int) -> Place:
    """A buffer for each thread, all cut from one memory."""
    return lambda thread, _: memory[thread * nbytes : (thread + 1) * nbytes]
