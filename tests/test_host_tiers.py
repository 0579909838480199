"""Where each unit stands on the host: what is decided, from sizes and room. Pure."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest

from wanoffload.errors import HostMemoryError, WrapError
from wanoffload.facts.look import look
from wanoffload.facts.published import PUBLISHED
from wanoffload.host_tiers import (
    CHUNK_BYTES,
    DISK,
    PAGEABLE,
    PINNED,
    READ_AHEAD_BYTES,
    RING_BYTES,
    HostChoice,
    HostPlan,
    assign,
    host_bytes,
)

BLOCK = 700_000_000
MODEL = [BLOCK] * 40
PLENTY = 1 << 50


def decide(
    sizes: list[int],
    host: str = "auto",
    budget: int | str | None = None,
    room: int = PLENTY,
    lockable: int | None = None,
    why_not: str | None = None,
) -> HostPlan:
    choice = HostChoice.of(host, budget)
    reasons = [why_not] * len(sizes)
    return assign("load X", sizes, choice, room, room if lockable is None else lockable, reasons)


def count(plan: HostPlan, tier: str) -> int:
    return plan.tiers.count(tier)


def test_auto_page_locks_everything_where_there_is_room() -> None:
    plan = decide(MODEL, room=sum(MODEL))
    assert plan.tiers == (PINNED,) * 40
    assert plan.ring_bytes == 0
    assert plan.sentence == "40 of 40 blocks page-locked (28.00 GB)"


def test_what_is_too_much_stands_on_disk_evenly_between_the_others() -> None:
    plan = decide(MODEL, budget="15GB")
    on_disk = [number for number, tier in enumerate(plan.tiers) if tier == DISK]
    assert len(on_disk) == 21  # 19 blocks and the ring are 14.4 GB; one block more, 15.1
    assert {b - a for a, b in pairwise(on_disk)} == {1, 2}
    assert host_bytes(MODEL, plan) <= 15_000_000_000
    assert plan.sentence == (
        "19 of 40 blocks page-locked (13.30 GB), 21 of 40 blocks on disk (14.70 GB), "
        "through a pinned ring of 1.07 GB"
    )


def test_what_can_not_be_locked_and_not_stand_in_files_is_pageable() -> None:
    plan = decide(MODEL, room=30_000_000_000, lockable=20_000_000_000, why_not="it is cast")
    assert count(plan, PAGEABLE) == 12
    assert count(plan, PINNED) * BLOCK + RING_BYTES <= 20_000_000_000


def test_the_ring_is_deep_where_something_is_on_disk_and_never_more_than_there_is() -> None:
    assert decide(MODEL, "disk").ring_bytes == READ_AHEAD_BYTES
    assert decide(MODEL, "pageable").ring_bytes == RING_BYTES
    assert decide([BLOCK], "disk").ring_bytes == -(-BLOCK // CHUNK_BYTES) * CHUNK_BYTES
    assert decide([10], "disk").ring_bytes == RING_BYTES


@pytest.mark.parametrize("host", ["pinned", "pageable", "disk"])
def test_a_kind_that_was_chosen_is_kept_whatever_the_room(host: str) -> None:
    assert decide(MODEL, host, room=0).tiers == (host,) * 40


@pytest.mark.parametrize(
    ("host", "budget", "least"),
    [
        ("pinned", "27GB", "28.00 GB"),
        ("pageable", "28GB", "28.13 GB of host memory (0.13 GB of it for the pinned ring)"),
        ("disk", "1GB", "1.07 GB of host memory (1.07 GB of it for the pinned ring)"),
        ("auto", "1GB", "1.07 GB"),
    ],
)
def test_a_budget_below_the_least_is_an_error_that_names_the_least(
    host: str, budget: str, least: str
) -> None:
    with pytest.raises(HostMemoryError) as caught:
        decide(MODEL, host, budget)
    assert str(caught.value).startswith("load X: ")
    assert least in str(caught.value)
    assert "raise" in str(caught.value)


def test_why_a_file_can_not_be_used_is_told() -> None:
    with pytest.raises(HostMemoryError, match=r"may be taken.*, but it is cast"):
        decide(MODEL, room=10**9, why_not="it is cast")
    with pytest.raises(WrapError, match="host='disk' is not to be had here: it is cast"):
        decide(MODEL, "disk", why_not="it is cast")


@pytest.mark.parametrize("budget", ["much", -1, 1.5, "3 parsecs", True])
def test_a_budget_that_is_no_size_is_refused(budget: int) -> None:
    with pytest.raises(WrapError, match="host_budget is a number of bytes"):
        HostChoice.of("auto", budget)


def test_a_kind_that_there_is_not_is_refused() -> None:
    with pytest.raises(WrapError, match=r"host is one of 'auto', 'pinned', .*, not 'tape'"):
        HostChoice.of("tape", None)


def test_auto_never_takes_more_than_there_is_and_locks_as_much_as_it_may() -> None:
    chance = random.Random(7)
    for _ in range(2000):
        kinds = chance.choice([[1, 5, 8], [5]])
        sizes = [chance.choice(kinds) * 100 * CHUNK_BYTES for _ in range(chance.randint(1, 50))]
        room = chance.randint(0, 2 * sum(sizes))
        lockable = chance.randint(0, room)
        may = [None if chance.random() < 0.7 else "no" for _ in sizes]
        choice = HostChoice.of("auto", chance.choice([None, chance.randint(0, 2 * sum(sizes))]))
        try:
            plan = assign("load X", sizes, choice, room, lockable, may)
        except HostMemoryError:
            in_memory = sum(s for s, reason in zip(sizes, may, strict=True) if reason)
            assert in_memory + READ_AHEAD_BYTES > min(lockable, choice.budget or PLENTY)
            continue
        limit = min(room, choice.budget if choice.budget is not None else PLENTY)
        locked = sum(s for s, t in zip(sizes, plan.tiers, strict=True) if t == PINNED)
        assert host_bytes(sizes, plan) <= limit
        assert locked + plan.ring_bytes <= min(limit, lockable)
        for tier, reason in zip(plan.tiers, may, strict=True):
            assert tier != DISK or reason is None
        if len(set(sizes)) == 1 and {PINNED} < set(plan.tiers):
            # with one more page-locked it would have been too much
            assert locked + plan.ring_bytes + sizes[0] > min(limit, lockable)


@pytest.mark.parametrize("model", [name for name in PUBLISHED if name.startswith("Wan-AI/")])
def test_the_table_of_host_memory_in_the_readme_is_what_is_taken(model: str) -> None:
    cells = []
    for host in (PINNED, PAGEABLE, DISK):
        plans = [
            (list(dit.block_bytes), decide(list(dit.block_bytes), host)) for dit in look(model).dits
        ]
        cells.append(f"{sum(host_bytes(sizes, plan) for sizes, plan in plans) / 1e9:.2f}")
    short = (
        model.removeprefix("Wan-AI/").removesuffix("iffusers").removesuffix("-D").removesuffix("-d")
    )
    rows = (Path(__file__).parents[1] / "README.md").read_text().splitlines()
    (row,) = [row for row in rows if row.endswith(f" | {' | '.join(cells)} |")]
    assert short in row
