"""What this machine needs to make a model's host memory: touch, read from the page cache, register.

Three passes, one after the other over the same fresh memory, each timed by itself: a loader that
does nothing else and overlaps nothing takes the sum, so ``1 / rate`` is the sum of the three.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Spread
from benchmarks.loading.reading import READ_BYTES, Piece, Reader, pieces_of
from benchmarks.timing import each_timed

if TYPE_CHECKING:
    from wanoffload import _C

REPEATS = 3
THREADS = (8, 16)  # of the reads; the quicker number counts


def measure(backend: _C.Backend, files: Sequence[Path], image_bytes: int) -> dict[str, Any]:
    """GB/s of each pass and of all three, over as much memory as the files have bytes."""
    runs = [_passes(backend, files, image_bytes) for _ in range(REPEATS)]
    found: dict[str, Any] = {
        f"{name}_gbps": Spread.of([run[name] for run in runs]).as_json() for name in runs[0]
    }
    found["rate_gbps"] = 1 / sum(1 / found[f"{name}_gbps"]["median"] for name in runs[0])
    return found


def _passes(backend: _C.Backend, files: Sequence[Path], image_bytes: int) -> dict[str, float]:
    from wanoffload import _C

    store = _C.HostStore(backend)
    pieces = pieces_of(files, min(READ_BYTES, image_bytes))
    whole = sum(piece.nbytes for piece in pieces)
    images = [store.allocate(image_bytes) for _ in range(-(-whole // image_bytes) + 1)]
    touched = each_timed(image.touch for image in images)
    read = _read_into(images, pieces, image_bytes)
    registered = each_timed(image.lock for image in images)
    mapped = len(images) * image_bytes
    del images
    gc.collect()
    return {
        "touch": mapped / touched / 1e9,
        "read": read,
        "register": mapped / registered / 1e9,
    }


def _read_into(images: Sequence[_C.HostImage], pieces: Sequence[Piece], image_bytes: int) -> float:
    """GB/s of the reads, each piece to a place of its own."""
    views = [memoryview(image) for image in images]
    in_an_image = max(1, image_bytes // max(piece.nbytes for piece in pieces))
    where = {piece: divmod(number, in_an_image) for number, piece in enumerate(pieces)}
    longest = max(piece.nbytes for piece in pieces)

    def place(_: int, piece: Piece) -> memoryview:
        image, slot = where[piece]
        return views[image % len(views)][slot * longest : (slot + 1) * longest]

    with Reader(direct=False) as reader:
        return max(reader.gb_per_s(pieces, threads, place) for threads in THREADS)
