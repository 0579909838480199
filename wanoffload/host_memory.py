"""How much memory the host still has. Asked before bytes are copied, so that too little is an
error with numbers and not a killed process."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import psutil
from torch import Tensor

from wanoffload.errors import HostMemoryError

CGROUP = Path("/sys/fs/cgroup")
RESERVE = 256 << 20
"""Bytes that are left to everyone else."""


class _Group(NamedTuple):
    """The files of one cgroup: its limit, what it has taken, and of what that consists."""

    limit: str
    usage: str
    stat: str
    prefix: str


@lru_cache(maxsize=8)
def _groups(root: Path, own: str) -> tuple[_Group, ...]:
    """This process's group and those above it, v2 and v1, by the text of /proc/self/cgroup."""
    versions = (
        (root, "", "memory.max", "memory.current", ""),
        (
            root / "memory",
            "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_",
        ),
    )
    found = []
    for base, controller, limit, usage, prefix in versions:
        folder = base / _path_of(controller, own).lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(base):
                break
            stat = str(group / "memory.stat")
            found.append(_Group(str(group / limit), str(group / usage), stat, prefix))
    return tuple(found)


def _path_of(controller: str, own: str) -> str:
    """A process's cgroup path: for v2 (controller "") or for a v1 controller."""
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"


def _text(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def _number(path: str) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def cgroup_headroom(root: Path = CGROUP) -> tuple[int, int] | None:
    """(limit, bytes left under it) of the tightest cgroup limit of this process, v2 or v1.

    Pages that only cache files count as left: the kernel gives them back first.
    """
    found: list[tuple[int, int]] = []
    for group in _groups(root, _text("/proc/self/cgroup")):
        limit = _number(group.limit)
        usage = _number(group.usage) if limit is not None and limit < 1 << 60 else None
        if limit is not None and usage is not None:
            found.append((limit, limit - usage + _cached(group)))
    return min(found, key=lambda pair: pair[1]) if found else None


def _cached(group: _Group) -> int:
    """Bytes that only cache files: a checkpoint that was read twice counts as active."""
    try:
        rows = dict(line.split() for line in _text(group.stat).splitlines())
    except ValueError:
        return 0
    return sum(int(rows.get(f"{group.prefix}{kind}_file", 0)) for kind in ("inactive", "active"))


def available_bytes() -> int:
    """Bytes that this process can still take, by what the machine and its cgroup say.

    A limit above the machine's present total is believed alone: virtual machines that are given
    memory as they use it start with a small total.
    """
    memory = psutil.virtual_memory()
    group = cgroup_headroom()
    if group is None:
        return int(memory.available)
    limit, left = group
    return left if limit > memory.total else min(left, int(memory.available))


def bytes_not_given_back(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors whose memory does not become free on the host when they are let go.

    Those on a device, and those that are mappings of a file, as checkpoints are read.
    """
    mapped = _file_mappings()
    return sum(
        tensor.nbytes
        for tensor in tensors
        if tensor.device.type != "cpu"
        or any(start <= tensor.data_ptr() < end for start, end in mapped)
    )


def _file_mappings() -> list[tuple[int, int]]:
    """Address ranges of this process that large files are mapped to."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(number, 16) for number in fields[0].split("-"))
        if fields[4] != "0" and end - start >= 1 << 16:  # the inode: a file
            found.append((start, end))
    return found


def to_be_had() -> int:
    """Bytes that may be taken, with a reserve left."""
    return max(0, available_bytes() - RESERVE)


def require(nbytes: int, purpose: str) -> None:
    """Raises HostMemoryError unless `nbytes` more can be taken, with a reserve left."""
    available = available_bytes()
    if nbytes + RESERVE > available:
        raise HostMemoryError(
            f"{purpose} needs {nbytes / 1e9:.2f} GB of host memory (and {RESERVE / 1e9:.2f} GB "
            f"must stay free), but {available / 1e9:.2f} GB are available. Free host memory (other "
            "references to the model's tensors, such as a state_dict, count), or use a smaller "
            "model."
        )
