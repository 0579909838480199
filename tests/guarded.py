"""Memory between two pages that nobody may touch: whoever goes beyond it ends the process."""

from __future__ import annotations

import ctypes
import mmap

_LIBRARY = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0


class Guarded:
    """Room for up to `most` bytes, at the end of its pages or at their start."""

    def __init__(self, most: int) -> None:
        self.room = -(-max(most, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map = mmap.mmap(-1, self.room + 2 * mmap.PAGESIZE)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + mmap.PAGESIZE
        self._protect(self._start - mmap.PAGESIZE)
        self._protect(self._start + self.room)

    def _protect(self, address: int) -> None:
        if _LIBRARY.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, _PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")

    def put(self, data: bytes, at_end: bool) -> int:
        """Puts the bytes against one of the two pages, and returns their address."""
        address = self._start + (self.room - len(data) if at_end else 0)
        ctypes.memmove(address, data, len(data))
        return address

    @staticmethod
    def get(address: int, nbytes: int) -> bytes:
        return ctypes.string_at(address, nbytes)
