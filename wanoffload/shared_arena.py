"""One copy of a model's images for all processes of a host that load it: an arena in a memfd.

The first process fills it, the others wait, and map what they find. No process may change it: who
wants to write takes the unit into own memory first (`HostImage.make_own`). The arena is there as
long as any process holds it or an image of it; there is nothing to clean up, whoever dies.

Start of the memfd: a state (zero until it is settled that this is the arena), `_Head`, the identity
of the contents as JSON, a byte for each unit that says whether it is in the arena. Then the units,
each at a page's boundary.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import re
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from tqdm import tqdm

from wanoffload import host_memory, shared_memory
from wanoffload._C import HostImage, HostStore
from wanoffload.errors import ShareError
from wanoffload.shared_memory import SharedMemory

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9._/-]{1,100}", re.ASCII)
PAGE = 4096
POLL_SECONDS = 0.02
MEET_SECONDS = 60.0
"""How long processes that start together may take to agree on who is first."""

_MAGIC = b"wanoffld"
_VERSION = 1
_UNSETTLED, _FILLING, _READY, _WITHDRAWN = range(4)
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


def _state(memory: SharedMemory) -> int:
    (state,) = _STATE.unpack(os.pread(memory.fd, _STATE.size, 0))
    return int(state)


def _set_state(memory: SharedMemory, state: int) -> None:
    os.pwrite(memory.fd, _STATE.pack(state), 0)


@dataclass(frozen=True)
class _Table:
    """What an arena holds, and where. `text`: the identity of the contents, sizes included."""

    text: bytes
    sizes: tuple[int, ...]

    @staticmethod
    def of(identity: Mapping[str, Any], sizes: Sequence[int]) -> _Table:
        text = json.dumps({**identity, "sizes": list(sizes)}, sort_keys=True)
        return _Table(text.encode(), tuple(sizes))

    @property
    def marks(self) -> int:
        """Where the bytes begin that say which units are there."""
        return _TEXT + len(self.text)

    @property
    def offsets(self) -> list[int]:
        """Where each unit begins, and where the last one ends."""
        pages = (_to_pages(max(size, 1)) for size in self.sizes)
        return list(accumulate(pages, initial=_to_pages(self.marks + len(self.sizes))))


def _to_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


class SharedArena:
    """The images of one model, in memory that processes of this user find by a name.

    Made by `join`. Not thread-safe. If `filled` is false, this process is the one that fills it:
    the others wait until it publishes, closes, or dies.
    """

    def __init__(
        self, name: str, memory: SharedMemory, table: _Table, filled: bool, store: HostStore
    ) -> None:
        self.name = name
        self.filled = filled
        self._memory: SharedMemory | None = memory
        self._table = table
        self._store = store
        marks = os.pread(memory.fd, len(table.sizes), table.marks)
        self._units = {i for i, mark in enumerate(marks) if mark}
        self._images: list[HostImage] = []  # while they are being filled

    @staticmethod
    def join(
        name: str, identity: Mapping[str, Any], sizes: Sequence[int], store: HostStore
    ) -> SharedArena:
        """Finds the arena of this name or makes it, and waits while another process fills it.

        Args:
            name: letters, digits and `._-/`, at most 100.
            identity: of the contents, in terms of JSON: whatever the bytes depend on.
            sizes: bytes of each unit. None takes memory before it is asked for.
            store: makes the images.

        Raises:
            ShareError: the arena of this name holds something else; other processes can't find
                what this one shares. Says what, and which process.
        """
        check_name(name)
        table = _Table.of(identity, sizes)
        while True:
            memory = _meet(name, table)
            _check_same(name, memory, table)
            _wait_for_filler(name, memory)
            if _state(memory) != _WITHDRAWN:
                break
        filled = _state(memory) == _READY
        if filled:
            memory.unlock()
            logger.info("%s: the images are shared with process %d", name, memory.pid)
        else:
            _begin_to_fill(name, memory, table)
        return SharedArena(name, memory, table, filled, store)

    def holds(self, unit: int) -> bool:
        """Whether the arena has this unit: the filler has asked for its image."""
        return unit in self._units

    def image(self, unit: int) -> HostImage:
        """A unit's bytes, mapped in this process, not page-locked. It outlives the arena.

        The filler gets zeros, with memory behind them, to be filled. Raises HostMemoryError.
        """
        assert self._memory is not None, "the arena is closed"
        size = self._table.sizes[unit]
        if not self.filled:
            host_memory.require(size, f"unit {unit} of the shared arena {self.name}")
        offset = self._table.offsets[unit]
        image = self._store.map_shared(self._memory.descriptor, offset, size)
        if not self.filled:
            image.touch()
            self._units.add(unit)
            self._images.append(image)
        assert self.holds(unit), f"the arena has no unit {unit}"
        return image

    def publish(self) -> None:
        """All images are filled: the others may use them, and nobody changes them any more."""
        if self.filled:
            return
        assert self._memory is not None, "the arena is closed"
        marks = bytes(i in self._units for i in range(len(self._table.sizes)))
        os.pwrite(self._memory.fd, marks, self._table.marks)
        _set_state(self._memory, _READY)
        self._memory.unlock()
        self.filled = True
        self._images.clear()

    def close(self) -> None:
        """Lets go of the arena; its images stay. Idempotent.

        If it was not published, it is withdrawn: its images are this process's own from here on,
        and another process that waits, or comes later, makes one.
        """
        if self._memory is not None and not self.filled:
            _set_state(self._memory, _WITHDRAWN)
            self._memory.unlock()
        for image in self._images:
            image.keep()
        self._images.clear()
        self._memory = None


def check_name(name: str) -> None:
    """Raises ShareError for what can't be the name of an arena."""
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise ShareError(
            f"share is a name of at most 100 letters, digits and . _ - /, not {name!r}"
        )


# How processes that want the same arena meet.


def _meet(name: str, table: _Table) -> SharedMemory:
    """The one arena of this name; if this process made it, it holds the lock.

    Each that finds none offers one of its own, and then looks who else does. An offer is settled by
    who sees no other beside it; where several see each other, all but the lowest are taken back.
    Two can't be settled: of two offers, the one that looked last has seen the other.
    """
    give_up = time.monotonic() + MEET_SECONDS
    own: SharedMemory | None = None
    while True:
        settled, offers = _look(name, own)
        if settled is not None:
            return settled
        if not offers and own is not None:
            _settle(own, table)
            return own
        if not offers:
            own = shared_memory.create(name, table.offsets[-1])
            continue
        if own is not None and offers[0].inode < own.inode:
            own = None
        if time.monotonic() > give_up:
            raise ShareError(
                f"process {offers[0].pid} began to make the shared arena {name!r} and stands still "
                f"for {MEET_SECONDS:.0f} s now"
            )
        time.sleep(POLL_SECONDS)


def _look(name: str, own: SharedMemory | None) -> tuple[SharedMemory | None, list[SharedMemory]]:
    """The settled arena of this name, if there is one, and what others offer."""
    offers = []
    for memory in shared_memory.find(name):
        if own is not None and memory.inode == own.inode:
            continue
        # Who offers holds the lock: an offer that can be locked was taken back, or its maker died,
        # or it was settled since.
        if _state(memory) == _UNSETTLED and not memory.try_lock():
            offers.append(memory)
        elif _state(memory) in (_FILLING, _READY):
            memory.unlock()
            return memory, []
    return None, offers


def _settle(memory: SharedMemory, table: _Table) -> None:
    """This process fills it. The state says so behind all else."""
    head = _Head(_MAGIC, _VERSION, os.getpid(), len(table.text))
    os.pwrite(memory.fd, _HEAD.pack(*head) + table.text, _STATE.size)
    _set_state(memory, _FILLING)


def _wait_for_filler(name: str, memory: SharedMemory) -> None:
    """Takes the lock. While another process fills the arena, a bar says how far it is."""
    total = os.fstat(memory.fd).st_size
    filler = _Head.read(memory).filler
    title = f"{name}: process {filler} fills it"
    with tqdm(total=total, unit="B", unit_scale=True, desc=title, leave=False, delay=1.0) as bar:
        while not memory.try_lock():
            bar.update(memory.filled_bytes() - bar.n)
            time.sleep(POLL_SECONDS)


def _begin_to_fill(name: str, memory: SharedMemory, table: _Table) -> None:
    """From zeros, whatever one that died has left."""
    before = _Head.read(memory).filler
    if before != os.getpid():
        logger.warning("%s: process %d died while it filled it; this one does", name, before)
    start, end = table.offsets[0], table.offsets[-1]
    if end > start:
        with mmap.mmap(memory.fd, end) as whole:
            whole.madvise(mmap.MADV_REMOVE, start, end - start)
    _settle(memory, table)


# What an arena holds.


def _check_same(name: str, memory: SharedMemory, table: _Table) -> None:
    head = _Head.read(memory)
    where = f"the shared arena {name!r}, which process {memory.pid} holds,"
    if (head.magic, head.version) != (_MAGIC, _VERSION):
        raise ShareError(f"{where} was made by another version of wanoffload; use another name")
    text = os.pread(memory.fd, head.text_bytes, _TEXT)
    if text == table.text:
        return
    found = list(_differences(json.loads(table.text), json.loads(text)))
    more = f"; and {len(found) - 3} differences more" if len(found) > 3 else ""
    raise ShareError(
        f"{where} holds another model than the one asked for: {'; '.join(found[:3])}{more}. Use "
        "another name for this one, or end the processes that hold the other."
    )


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
