"""How much memory the host still has. Asked before bytes are copied, so that too little is an
error with numbers and not a killed process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import psutil
from torch import Tensor

from wanoffload.errors import HostMemoryError

CGROUP = Path("/sys/fs/cgroup")
RESERVE = 256 << 20
"""Bytes that are left to everyone else."""


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _own_group(controller: str) -> str:
    """This process's cgroup path: for v2 (controller "") or for a v1 controller."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return "/"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"


def cgroup_headroom(root: Path = CGROUP) -> tuple[int, int] | None:
    """(limit, bytes left under it) of the tightest cgroup limit of this process, v2 or v1.

    Pages that only cache files count as left: the kernel gives them back first.
    """
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
    found: list[tuple[int, int]] = []
    for base, controller, limit_file, usage_file, prefix in versions:
        folder = base / _own_group(controller).lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(base):
                break
            limit, usage = _number(group / limit_file), _number(group / usage_file)
            if limit is not None and usage is not None and limit < 1 << 60:
                found.append((limit, limit - usage + _cached(group / "memory.stat", prefix)))
    return min(found, key=lambda pair: pair[1]) if found else None


def _cached(path: Path, prefix: str) -> int:
    """Bytes that only cache files: a checkpoint that was read twice counts as active."""
    try:
        rows = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return sum(int(rows.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))


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
