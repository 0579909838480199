"""The page cache as far as some files go: how much of them it holds, dropping, reading in."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.loading.reading import READ_BYTES, Reader, pieces_of

WARM_THREADS = 16


def cached_bytes(files: Iterable[Path]) -> int:
    """Bytes of these files that the page cache holds, in whole pages."""
    return sum(map(_cached_bytes, files))


def _cached_bytes(file: Path) -> int:
    nbytes = file.stat().st_size
    if nbytes == 0:
        return 0
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return min(nbytes, _resident_pages(descriptor, nbytes) * mmap.PAGESIZE)
    finally:
        os.close(descriptor)


def _resident_pages(descriptor: int, nbytes: int) -> int:
    """By mincore(2) on a mapping that nobody touches."""
    libc = _libc()
    address = libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    try:
        found = (ctypes.c_ubyte * (-(-nbytes // mmap.PAGESIZE)))()
        if libc.mincore(address, nbytes, found) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
    finally:
        libc.munmap(address, nbytes)
    pages = bytes(found)
    return sum(pages.count(value) for value in set(pages) if value & 1)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    size, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    libc.mmap.argtypes = (pointer, size, number, number, number, ctypes.c_long)
    libc.mmap.restype = pointer
    libc.mincore.argtypes = (pointer, size, pointer)
    libc.munmap.argtypes = (pointer, size)
    return libc


def drop(files: Iterable[Path]) -> None:
    """Asks the system to forget these files; what is not on the disk yet is written first."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def warm(files: Sequence[Path]) -> float:
    """Reads these files once, so that the page cache holds them; GB/s, from wherever they were."""
    with Reader(direct=False) as reader:
        pieces = pieces_of(files, READ_BYTES)
        return reader.gb_per_s(pieces, WARM_THREADS)
