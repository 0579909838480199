"""Memory that processes of one user find by a name: memfds, looked for in /proc.

There is no file, no socket and no server. A memfd shows under its name among the descriptors of
whoever holds it, and is gone with its last holder. Only what belongs to this user, in a process of
this user, counts, so nobody else can take a name.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import os
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from wanoffload._C import Descriptor
from wanoffload.errors import ShareError

logger = logging.getLogger(__name__)

PREFIX = "wanoffload:"
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedMemory:
    """A memfd, held open. `inode`: tells it from others. `pid`: of a process that holds it."""

    def __init__(self, descriptor: Descriptor, pid: int) -> None:
        self.descriptor = descriptor
        self.inode = os.fstat(descriptor.number).st_ino
        self.pid = pid
        self._lock: Descriptor | None = None

    @property
    def fd(self) -> int:
        return self.descriptor.number

    def filled_bytes(self) -> int:
        """Of all its bytes, those that have memory by now."""
        return os.fstat(self.fd).st_blocks * 512

    def try_lock(self) -> bool:
        """Takes the lock that one at a time can have; False if it is another. Ends with this
        process, and with this object."""
        if self._lock is None:
            # Opened for this alone: a lock lives as long as whatever stands on its opening, and
            # mappings do, in children too.
            lock = Descriptor(os.open(_link(self.fd), os.O_RDWR | os.O_CLOEXEC))
            try:
                fcntl.flock(lock.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            _watch_forks()
            _locks.add(lock)
            self._lock = lock
        return True

    def unlock(self) -> None:
        if self._lock is not None:
            fcntl.flock(self._lock.number, fcntl.LOCK_UN)
            self._lock = None


def create(name: str, nbytes: int) -> SharedMemory:
    """Zeros under this name, which take no room before they are written to. Locked.

    Raises ShareError where other processes could not find it: they would each make one.
    """
    _check_others_can_look()
    number = os.memfd_create(PREFIX + name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    memory = SharedMemory(Descriptor(number), os.getpid())
    os.fchmod(number, 0o600)
    os.ftruncate(number, nbytes)
    locked = memory.try_lock()
    assert locked, "nobody else could know of it"
    fcntl.fcntl(number, fcntl.F_ADD_SEALS, SEALS)
    return memory


def _check_others_can_look() -> None:
    if _descriptors(os.getpid()).stat().st_uid != os.geteuid():
        raise ShareError(
            "this process hides its descriptors from others of the same user (it is not dumpable: "
            "prctl, file capabilities, or a change of user), so they could not find what it shares"
        )


def find(name: str) -> list[SharedMemory]:
    """All memory under this name, each once, the lowest inode first.

    What a process hides from others (see `create`), or holds in another container with processes
    of its own, is not found.
    """
    found: dict[int, SharedMemory] = {}
    for pid, link in _links(f"/memfd:{PREFIX}{name} (deleted)"):
        with suppress(OSError):  # its process may end, or close it, at any time
            if link.stat().st_ino not in found and (memory := _open(link, pid)) is not None:
                found[memory.inode] = memory
    return [found[inode] for inode in sorted(found)]


def _links(target: str) -> Iterator[tuple[int, Path]]:
    """(pid, link in /proc) of each descriptor of this user's processes that leads to `target`."""
    for pid in _own_processes():
        try:
            links = list(_descriptors(pid).iterdir())
        except PermissionError:
            logger.debug("process %d hides its descriptors", pid)
            continue
        except OSError:
            continue  # it has ended
        for link in links:
            with suppress(OSError):
                if os.readlink(link) == target:
                    yield pid, link


def _own_processes() -> Iterator[int]:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.uids().effective == os.geteuid():
                yield process.pid


def _descriptors(pid: int) -> Path:
    return Path(f"/proc/{pid}/fd")


def _link(fd: int) -> Path:
    """Of a descriptor of this process."""
    return _descriptors(os.getpid()) / str(fd)


def _open(link: Path, pid: int) -> SharedMemory | None:
    """What the link leads to, opened; None if that is not a memfd of this user's."""
    target = os.readlink(link)
    descriptor = Descriptor(os.open(link, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    owner = os.fstat(descriptor.number).st_uid
    if os.readlink(_link(descriptor.number)) != target or owner != os.geteuid():
        return None
    sealed = fcntl.fcntl(descriptor.number, fcntl.F_GET_SEALS)  # OSError for what is no memfd
    # Without its seals its maker has not come so far.
    return SharedMemory(descriptor, pid) if sealed == SEALS else None


# A child made by fork gets copies of all descriptors, and would hold a lock that ends with us.

_locks: weakref.WeakSet[Descriptor] = weakref.WeakSet()


@functools.cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_let_go)


def _let_go() -> None:
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    for lock in _locks:
        os.dup2(nothing, lock.number, inheritable=False)
    os.close(nothing)
