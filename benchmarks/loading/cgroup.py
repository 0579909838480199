"""A limit of host memory around a process, by whatever this system lets us use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
SYSTEMD = Path("/run/systemd/system")
JOIN = 'echo $$ > "$0" && exec "$@"'
# By version: limit, what is taken now, the most that was.
FILES = {
    2: ("memory.max", "memory.current", "memory.peak"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.max_usage_in_bytes"),
}


@dataclass(frozen=True)
class MemoryLimit:
    """`launcher`: what a command begins with to run under it. Empty: there is no limit."""

    how: str
    launcher: tuple[str, ...] = ()


@contextmanager
def memory_limit(nbytes: int) -> Iterator[MemoryLimit]:
    """A cgroup of our own, v2 or v1; else systemd's; else none, which its `how` says."""
    for version, base in ((2, ROOT), (1, ROOT / "memory")):
        group = base / f"wanoffload-bench-{os.getpid()}"
        try:
            _make(version, base, group, nbytes)
        except OSError:
            continue
        try:
            join = ("sh", "-c", JOIN, str(group / "cgroup.procs"))
            yield MemoryLimit(f"a cgroup (v{version}) of {nbytes / 1e9:g} GB", join)
        finally:
            group.rmdir()
        return
    yield _by_systemd(nbytes)


def _make(version: int, base: Path, group: Path, nbytes: int) -> None:
    """Raises OSError where this can't be had, and leaves nothing then."""
    limit, *_ = FILES[version]
    if version == 2:
        if "memory" not in (base / "cgroup.controllers").read_text().split():
            raise FileNotFoundError("this hierarchy has no memory controller")
        (base / "cgroup.subtree_control").write_text("+memory")
    elif not (base / limit).exists():
        raise FileNotFoundError(base / limit)
    group.mkdir()
    try:
        (group / limit).write_text(str(nbytes))
        if (group / "memory.swap.max").exists():
            (group / "memory.swap.max").write_text("0")
    except OSError:
        group.rmdir()
        raise


def _by_systemd(nbytes: int) -> MemoryLimit:
    program = shutil.which("systemd-run")
    if program is None or not SYSTEMD.exists():
        return MemoryLimit("no limit: no cgroup can be made here and there is no systemd")
    limits = ("-p", f"MemoryMax={nbytes}", "-p", "MemorySwapMax=0")
    return MemoryLimit(
        f"systemd's MemoryMax of {nbytes / 1e9:g} GB",
        (program, "--scope", "--quiet", "--collect", *limits, "--"),
    )


def own_group() -> dict[str, int]:
    """Limit, current and peak bytes of this process's group, as far as the system tells."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            found = _read(2, ROOT / path.lstrip("/"))
        elif "memory" in controllers.split(","):
            found = _read(1, ROOT / "memory" / path.lstrip("/"))
        else:
            continue
        if found:
            return found
    return {}


def _read(version: int, group: Path) -> dict[str, int]:
    found = {}
    for name, file in zip(("limit", "current", "peak"), FILES[version], strict=True):
        text = (group / file).read_text().strip() if (group / file).exists() else ""
        if text.isdigit():
            found[name] = int(text)
    if found and (group / "memory.stat").exists():
        rows = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
        kinds = ("anon", "shmem", "file") if version == 2 else ("rss", "shmem", "cache")
        found |= {kind: int(rows[kind]) for kind in kinds if kind in rows}
    return found
