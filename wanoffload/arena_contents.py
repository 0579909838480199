"""What the memory of a shared arena begins with: whose it is, what it holds, and how far it is.

A state (zero until it is settled that this is the arena), `_Head`, the identity of the contents as
JSON, a byte for each unit that says whether it is there. Then the units, each at a page's boundary.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from wanoffload.errors import ShareError
from wanoffload.shared_memory import SharedMemory

PAGE = 4096
UNSETTLED, FILLING, READY, WITHDRAWN = range(4)
_MAGIC = b"wanoffld"
_VERSION = 1
_STATE = struct.Struct("<Q")
_HEAD = struct.Struct("<8sQQQ")
_TEXT = _STATE.size + _HEAD.size  # where it begins


class _Head(NamedTuple):
    """Stands behind the state, which is written last, alone. `filler`: the process that fills."""

    magic: bytes
    version: int
    filler: int
    text_bytes: int

    @staticmethod
    def read(memory: SharedMemory) -> _Head:
        return _Head(*_HEAD.unpack(os.pread(memory.fd, _HEAD.size, _STATE.size)))


def state_of(memory: SharedMemory) -> int:
    (state,) = _STATE.unpack(os.pread(memory.fd, _STATE.size, 0))
    return int(state)


def set_state(memory: SharedMemory, state: int) -> None:
    os.pwrite(memory.fd, _STATE.pack(state), 0)


def filler_of(memory: SharedMemory) -> int:
    """The process that fills it, or did."""
    return _Head.read(memory).filler


@dataclass(frozen=True)
class Contents:
    """What an arena holds, and where. `text`: the identity of the contents, sizes included."""

    text: bytes
    sizes: tuple[int, ...]

    @staticmethod
    def of(identity: Mapping[str, Any], sizes: Sequence[int]) -> Contents:
        text = json.dumps({**identity, "sizes": list(sizes)}, sort_keys=True)
        return Contents(text.encode(), tuple(sizes))

    @property
    def offsets(self) -> list[int]:
        """Where each unit begins, and where the last one ends."""
        pages = (to_pages(max(size, 1)) for size in self.sizes)
        return list(accumulate(pages, initial=to_pages(self._marks + len(self.sizes))))

    @property
    def _marks(self) -> int:
        return _TEXT + len(self.text)

    def settle(self, memory: SharedMemory) -> None:
        """This process fills it. The state says so behind all else."""
        head = _Head(_MAGIC, _VERSION, os.getpid(), len(self.text))
        os.pwrite(memory.fd, _HEAD.pack(*head) + self.text, _STATE.size)
        set_state(memory, FILLING)

    def units_in(self, memory: SharedMemory) -> set[int]:
        """The units that are there."""
        marks = os.pread(memory.fd, len(self.sizes), self._marks)
        return {unit for unit, mark in enumerate(marks) if mark}

    def mark(self, memory: SharedMemory, units: Collection[int]) -> None:
        """These units are there."""
        os.pwrite(memory.fd, bytes(u in units for u in range(len(self.sizes))), self._marks)

    def check_same(self, name: str, memory: SharedMemory) -> None:
        """Raises ShareError unless this is what a settled arena holds."""
        head = _Head.read(memory)
        where = f"the shared arena {name!r}, which process {memory.pid} holds,"
        if (head.magic, head.version) != (_MAGIC, _VERSION):
            raise ShareError(f"{where} was made by another version of wanoffload; use another name")
        text = os.pread(memory.fd, head.text_bytes, _TEXT)
        if text == self.text:
            return
        found = list(_differences(json.loads(self.text), json.loads(text)))
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise ShareError(
            f"{where} holds another model than the one asked for: {'; '.join(found[:3])}{more}. "
            "Use another name for this one, or end the processes that hold the other."
        )


def to_pages(nbytes: int) -> int:
    """Rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


def _differences(asked: Any, held: Any, path: str = "") -> Iterator[str]:
    """A line for each place where two JSON values differ."""
    if isinstance(asked, dict) and isinstance(held, dict):
        for key in sorted(asked.keys() | held.keys()):
            inner = f"{path}.{key}" if path else key
            yield from _differences(asked.get(key), held.get(key), inner)
    elif isinstance(asked, list) and isinstance(held, list) and len(asked) == len(held):
        for i, (one, other) in enumerate(zip(asked, held, strict=True)):
            yield from _differences(one, other, f"{path}[{i}]")
    elif asked != held:
        yield f"{path} is {_short(held)} there and {_short(asked)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
