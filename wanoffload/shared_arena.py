"""One copy of a model's images for all processes of a host that load it: an arena in a memfd.

The first process fills it, the others wait, and map what they find. No process may change it: who
wants to write takes the unit into own memory first (`HostImage.make_own`). The arena is there as
long as any process holds it or an image of it; there is nothing to clean up, whoever dies.
"""

from __future__ import annotations

import logging
import mmap
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from wanoffload import host_memory, shared_memory
from wanoffload._C import HostImage, HostStore
from wanoffload.arena_contents import (
    FILLING,
    READY,
    UNSETTLED,
    WITHDRAWN,
    Contents,
    filler_of,
    set_state,
    state_of,
)
from wanoffload.errors import ShareError
from wanoffload.shared_memory import SharedMemory

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9._/-]{1,100}", re.ASCII)
POLL_SECONDS = 0.02
MEET_SECONDS = 60.0
"""How long processes that start together may take to agree on who is first."""


class SharedArena:
    """The images of one model, in memory that processes of this user find by a name.

    Made by `join`. Not thread-safe. If `filled` is false, this process is the one that fills it:
    the others wait until it publishes, closes, or dies.
    """

    def __init__(
        self, name: str, memory: SharedMemory, contents: Contents, filled: bool, store: HostStore
    ) -> None:
        self.name = name
        self.filled = filled
        self._memory: SharedMemory | None = memory
        self._contents = contents
        self._store = store
        self._units = contents.units_in(memory)
        self._images: list[HostImage] = []  # while they are being filled

    @staticmethod
    def join(
        name: str, identity: Mapping[str, Any], sizes: Sequence[int], store: HostStore
    ) -> SharedArena:
        """Finds the arena of this name or makes it, and waits while another process fills it.

        Args:
            name: letters, digits and `._-/`, at most 100.
            identity: of the contents, in terms of JSON: whatever the bytes depend on.
            sizes: bytes of each unit, at most. None takes memory before it is asked for.
            store: makes the images.

        Raises:
            ShareError: the arena of this name holds something else; other processes can't find
                what this one shares. Says what, and which process.
        """
        check_name(name)
        contents = Contents.of(identity, sizes)
        while True:
            memory = _meet(name, contents)
            contents.check_same(name, memory)
            _wait_for_filler(name, memory)
            if state_of(memory) != WITHDRAWN:
                break
        filled = state_of(memory) == READY
        if filled:
            memory.unlock()
            logger.info("%s: the images are shared with process %d", name, memory.pid)
        else:
            _begin_to_fill(name, memory, contents)
        return SharedArena(name, memory, contents, filled, store)

    def holds(self, unit: int) -> bool:
        """Whether the arena has this unit: the filler has asked for its image."""
        return unit in self._units

    def first_bytes(self, unit: int, nbytes: int) -> bytes:
        """Of a unit that is there."""
        assert self._memory is not None, "the arena is closed"
        return os.pread(self._memory.fd, nbytes, self._contents.offsets[unit])

    def image(self, unit: int, nbytes: int | None = None) -> HostImage:
        """A unit's bytes, mapped in this process, not page-locked. It outlives the arena.

        `nbytes`: of the image, at most what was said when the arena was joined (None: that); the
        rest of the unit's place takes no memory. The filler gets zeros, with memory behind them,
        to be filled. Raises HostMemoryError.
        """
        assert self._memory is not None, "the arena is closed"
        size = self._contents.sizes[unit] if nbytes is None else nbytes
        assert size <= self._contents.sizes[unit]
        if not self.filled:
            host_memory.require(size, f"unit {unit} of the shared arena {self.name}")
        offset = self._contents.offsets[unit]
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
        self._contents.mark(self._memory, self._units)
        set_state(self._memory, READY)
        self._memory.unlock()
        self.filled = True
        self._images.clear()

    def close(self) -> None:
        """Lets go of the arena; its images stay. Idempotent.

        If it was not published, it is withdrawn: its images are this process's own from here on,
        and another process that waits, or comes later, makes one.
        """
        if self._memory is not None and not self.filled:
            set_state(self._memory, WITHDRAWN)
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


def _meet(name: str, contents: Contents) -> SharedMemory:
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
            contents.settle(own)
            return own
        if not offers:
            own = shared_memory.create(name, contents.offsets[-1])
            continue
        inode, pid = offers[0]
        if own is not None and inode < own.inode:
            own = None
        if time.monotonic() > give_up:
            raise ShareError(
                f"process {pid} began to make the shared arena {name!r} and stands still "
                f"for {MEET_SECONDS:.0f} s now"
            )
        time.sleep(POLL_SECONDS)


def _look(name: str, own: SharedMemory | None) -> tuple[SharedMemory | None, list[tuple[int, int]]]:
    """The settled arena of this name, if there is one, and what others offer, the lowest first.

    Offers are (inode, pid), and not held: what is taken back is to go.
    """
    offers = []
    for memory in shared_memory.find(name):
        if own is not None and memory.inode == own.inode:
            continue
        # Who offers holds the lock: an offer that can be locked was taken back, or its maker died,
        # or it was settled since.
        if state_of(memory) == UNSETTLED and not memory.try_lock():
            offers.append((memory.inode, memory.pid))
        elif state_of(memory) in (FILLING, READY):
            memory.unlock()
            return memory, []
    return None, offers


def _wait_for_filler(name: str, memory: SharedMemory) -> None:
    """Takes the lock. While another process fills the arena, a bar says how far it is."""
    total = os.fstat(memory.fd).st_size
    title = f"{name}: process {filler_of(memory)} fills it"
    with tqdm(total=total, unit="B", unit_scale=True, desc=title, leave=False, delay=1.0) as bar:
        while not memory.try_lock():
            bar.update(memory.filled_bytes() - bar.n)
            time.sleep(POLL_SECONDS)


def _begin_to_fill(name: str, memory: SharedMemory, contents: Contents) -> None:
    """From zeros, whatever one that died has left."""
    before = filler_of(memory)
    if before != os.getpid():
        logger.warning("%s: process %d died while it filled it; this one does", name, before)
    start, end = contents.offsets[0], contents.offsets[-1]
    if end > start:
        with mmap.mmap(memory.fd, end) as whole:
            whole.madvise(mmap.MADV_REMOVE, start, end - start)
    contents.settle(memory)
