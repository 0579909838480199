"""Which blocks are packed: what is decided, from what was asked, sizes and room. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from wanoffload.errors import CacheFileError, WrapError
from wanoffload.host_tiers import RING_BYTES, HostChoice
from wanoffload.pack_choice import Cached, Packable, check_pack, choose

GB = 10**9
BLOCKS = 40
PLAIN = 700_000_000
PACKED = 500_000_000
ALL = frozenset(range(BLOCKS))
NONE: frozenset[int] = frozenset()


def model(**changes: Any) -> Packable:
    return Packable(**{"plain": [PLAIN] * BLOCKS, "packed": [PACKED] * BLOCKS, **changes})


def decide(
    pack: Any,
    of: Packable | None = None,
    *,
    host: str = "auto",
    budget: int | str | None = None,
    room: int = 1000 * GB,
    lockable: int | None = None,
) -> tuple[frozenset[int], str]:
    lockable = room if lockable is None else lockable
    return choose(pack, of or model(), HostChoice.of(host, budget), room, lockable)


def cached(packed: frozenset[int]) -> Cached:
    flags = tuple(number in packed for number in range(BLOCKS))
    return Cached(Path("the.cache"), flags, (PACKED + 1,) * BLOCKS)


@pytest.mark.parametrize("pack", ["yes", "", 1.5, 0.5, 1, 0, object()])
def test_what_pack_can_not_be_is_refused(pack: Any) -> None:
    with pytest.raises(WrapError, match="pack is True, False, 'auto' or None, not"):
        check_pack(pack)


@pytest.mark.parametrize("pack", [True, False, None, "auto"])
def test_what_pack_can_be_is_not_refused(pack: Any) -> None:
    check_pack(pack)


@pytest.mark.parametrize(
    ("pack", "packed"), [(True, ALL), (False, NONE), (None, NONE), (1.0, ALL), (0.0, NONE)]
)
def test_a_choice_is_kept_whatever_the_room(pack: Any, packed: frozenset[int]) -> None:
    for room in (0, 1000 * GB):
        assert decide(pack, room=room)[0] == packed


def test_a_share_is_spread_evenly() -> None:
    packed, why = decide(0.125)
    assert sorted(packed) == [0, 8, 16, 24, 32]
    assert why == "packed: 5 of 40 blocks, as asked"


def test_what_can_not_be_packed_is_left_plain() -> None:
    packed = [PACKED, None] * (BLOCKS // 2)
    assert decide(True, model(packed=packed))[0] == frozenset(range(0, BLOCKS, 2))


def test_a_model_of_which_nothing_can_be_packed_is_refused_only_if_all_was_asked_for() -> None:
    of = model(packed=[None] * BLOCKS)
    with pytest.raises(WrapError, match="no block of this model holds bf16 weights"):
        decide(True, of)
    assert decide(None, of) == (NONE, "")
    assert decide("auto", of, room=0) == (NONE, "plain: no block holds bf16 weights")


# auto


def test_auto_is_plain_where_all_blocks_can_be_page_locked() -> None:
    assert decide("auto", room=28 * GB) == (NONE, "plain: the host holds 28.00 GB")


@pytest.mark.parametrize(
    "short",
    [{"room": 28 * GB - 1}, {"lockable": 28 * GB - 1}, {"budget": 28 * GB - 1}],
    ids=["room", "lockable", "budget"],
)
@pytest.mark.parametrize("host", ["auto", "pinned"])
def test_auto_packs_where_they_can_not(short: dict[str, int], host: str) -> None:
    packed, why = decide("auto", host=host, **short)  # type: ignore[arg-type]
    assert packed == ALL
    assert why == "packed: 28.00 GB are more than the 28.00 GB that the host may hold"


def test_auto_asks_for_no_lock_where_nothing_is_to_be_locked() -> None:
    enough = 28 * GB + RING_BYTES
    assert decide("auto", host="pageable", room=enough, lockable=0)[0] == NONE
    assert decide("auto", host="pageable", room=enough - 1, lockable=0)[0] == ALL


def test_auto_stays_plain_where_only_plain_blocks_can_be_on_disk_and_packed_ones_do_not_fit() -> (
    None
):
    packed, why = decide("auto", room=10 * GB)
    assert packed == NONE
    assert "they can't be on disk" in why
    assert decide("auto", model(to_be_cached=True), room=10 * GB)[0] == ALL
    assert decide("auto", model(why_not_in_files="it is cast"), room=10 * GB)[0] == ALL
    assert decide("auto", room=20 * GB)[0] == ALL


def test_auto_packs_what_is_read_from_a_cache_file_on_disk() -> None:
    assert decide("auto", model(to_be_cached=True), host="disk")[0] == ALL
    packed, why = decide("auto", host="disk")
    assert packed == NONE
    assert "none is given" in why


# A cache file that is there


@pytest.mark.parametrize("pack", [None, "auto", 0.5])
@pytest.mark.parametrize("there", [ALL, NONE, frozenset({3})], ids=len)
def test_a_cache_file_is_used_as_it_is(pack: Any, there: frozenset[int]) -> None:
    of = model(cached=cached(there))
    packed, _ = decide(pack, of, room=0)
    assert packed == there
    assert of.sizes(packed) == [PACKED + 1] * BLOCKS


@pytest.mark.parametrize(
    ("pack", "there", "words"),
    [
        (False, ALL, r"holds 40 of 40 packed images, and pack=False asks for plain ones"),
        (0.0, frozenset({3}), r"holds 1 of 40 packed images, and pack=False asks for plain"),
        (True, NONE, r"holds no packed images, and pack=True asks for packed ones"),
        (1.0, frozenset({3}), r"holds 1 of 40 packed images, and pack=True asks for packed"),
    ],
)
def test_a_cache_file_of_the_other_kind_is_refused_by_name(
    pack: Any, there: frozenset[int], words: str
) -> None:
    with pytest.raises(CacheFileError, match=f"the cache file the.cache {words}"):
        decide(pack, model(cached=cached(there)))


@pytest.mark.parametrize(("pack", "there"), [(True, ALL), (False, NONE)])
def test_a_cache_file_of_the_right_kind_is_used(pack: Any, there: frozenset[int]) -> None:
    assert decide(pack, model(cached=cached(there)))[0] == there


def test_sizes_are_those_of_what_is_packed() -> None:
    sizes = model().sizes(frozenset({0, 2}))
    assert sizes[:4] == [PACKED, PLAIN, PACKED, PLAIN]
