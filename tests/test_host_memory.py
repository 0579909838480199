"""What the host still has, by its cgroup. The folders are made here."""

from __future__ import annotations

from pathlib import Path

import pytest

from wanoffload.host_memory import cgroup_headroom

LIMIT = 10 << 30
STAT = "anon 5\ninactive_file 300\nactive_file 40\nshmem 7\n"


def put(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_what_only_caches_files_counts_as_left_however_often_it_was_read(tmp_path: Path) -> None:
    put(tmp_path, memory__max=f"{LIMIT}\n", memory__current="1000\n", memory__stat=STAT)
    assert cgroup_headroom(tmp_path) == (LIMIT, LIMIT - 1000 + 340)


def test_the_older_version_counts_what_stands_below_too(tmp_path: Path) -> None:
    stat = STAT + "total_inactive_file 600\ntotal_active_file 80\n"
    files = {"memory__limit_in_bytes": f"{LIMIT}", "memory__usage_in_bytes": "1000"}
    put(tmp_path / "memory", **files, memory__stat=stat)
    assert cgroup_headroom(tmp_path) == (LIMIT, LIMIT - 1000 + 680)


@pytest.mark.parametrize("limit", ["max", str(1 << 62)])
def test_no_limit_is_none(tmp_path: Path, limit: str) -> None:
    put(tmp_path, memory__max=limit, memory__current="1000", memory__stat=STAT)
    assert cgroup_headroom(tmp_path) is None
