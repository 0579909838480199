"""What stays on the device under a budget: never above it, and as quick as can be. Pure."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.timeline import GB, Assignment, ends, seconds
from wanoffload import residency
from wanoffload.errors import WrapError
from wanoffload.residency import (
    AS_GOOD,
    TIGHT,
    Rates,
    Residency,
    UnitBytes,
    allocated,
    choose,
    forward_seconds,
    least,
)

MB = 10**6
CHUNK = 48 << 20
BLOCK = UnitBytes(702 * MB, 702 * MB)
PACKED = UnitBytes(702 * MB, 495 * MB, packed=True)
OTHERS = 520 << 20
LINK = Rates(link_gb_per_s=55, decode_gb_per_s=2000, compute_s=0.09)


@dataclass(frozen=True)
class Case:
    units: tuple[UnitBytes, ...]
    others: int
    prefetch: int | None
    rates: Rates
    part: float  # of what lies between the least budget and all that can be used

    @property
    def least(self) -> int:
        return least(self.units, others=self.others, prefetch=self.prefetch)

    def budget(self, part: float | None = None) -> int:
        most = self.others + sum(allocated(256 + unit.plain) for unit in self.units)
        part = self.part if part is None else part
        return self.least + round(part * max(most - self.least, 0))

    def choose(self, budget: int | None, rates: Rates | None) -> Residency:
        return choose(self.units, budget, others=self.others, prefetch=self.prefetch, rates=rates)


def letters(plan: Residency, units: int) -> str:
    return "".join(
        "r" if unit in plan.resident else "k" if unit in plan.kept_packed else "s"
        for unit in range(units)
    )


def assignment(plan: Residency, units: int) -> Assignment:
    slots = plan.staging_slots
    return Assignment(letters(plan, units), plan.depth, slots * plan.staging_bytes, slots)


def memory(
    units: Sequence[UnitBytes], row: str, depth: int, others: int, staging_slots: int = 3
) -> tuple[int, int]:
    """Bytes on the device of everything, and of one staging slot, counted unit by unit."""
    of = {
        letter: [u for u, own in zip(units, row, strict=True) if own == letter] for letter in "rks"
    }
    passing = of["k"] + of["s"]
    # What is resident comes over the link too, once.
    staging = max((min(u.stored, CHUNK) for u in of["s"] + of["r"] if u.packed), default=0)
    allocations = [256 + unit.plain for unit in of["r"]] + [256 + unit.stored for unit in of["k"]]
    if passing:
        slots = min(depth + 1, len(passing))
        allocations.append(256 + slots * max(unit.plain for unit in passing))
    if staging:
        allocations.append(256 + staging_slots * staging)
    return others + sum(-(-size // (2 << 20)) * (2 << 20) for size in allocations), staging


def unit(plain: int, packed: bool) -> UnitBytes:
    return UnitBytes(plain, int(plain * 0.705) if packed else plain, packed)


@st.composite
def cases(draw: st.DrawFn, most: int = 12) -> Case:
    sizes = draw(st.lists(st.integers(1, 700 * MB), min_size=1, max_size=3))
    units = tuple(
        unit(plain, packed)
        for plain, packed in draw(
            st.lists(st.tuples(st.sampled_from(sizes), st.booleans()), min_size=1, max_size=most)
        )
    )
    link = draw(st.floats(5, 60))
    copy_s = sum(unit.stored for unit in units) / (link * GB)
    return Case(
        units,
        others=draw(st.sampled_from([0, 2 << 20, OTHERS])),
        prefetch=draw(st.sampled_from([None, None, 0, 1, 2, 3])),
        rates=Rates(link, draw(st.floats(500, 2500)), copy_s * draw(st.floats(0.05, 2))),
        part=draw(st.floats(0, 1)),
    )


def random_case(rng: random.Random, most: int) -> Case:
    """Of equal units, of two sizes, or of any; none, some or all packed; link and compute alike."""
    sizes = [rng.randrange(5, 700) * MB for _ in range(rng.choice([1, 2, 2, most]))]
    packed = rng.choice([0, 0.5, 1])
    units = tuple(
        unit(rng.choice(sizes), rng.random() < packed) for _ in range(rng.randint(1, most))
    )
    link = rng.uniform(10, 60)
    ratio = rng.choice([0.1, 0.5, 0.7, 0.9, 1, 1.2, rng.uniform(0.05, 2)])
    compute_s = ratio * sum(u.plain for u in units) / (link * GB)
    rates = Rates(link, rng.uniform(200, 2500), compute_s)
    others, prefetch = rng.choice([0, OTHERS]), rng.choice([None, None, 0, 1, 2, 3])
    return Case(units, others, prefetch, rates, rng.random())


thousands = settings(max_examples=1000, deadline=None)


# --- memory ---------------------------------------------------------------------------------------


@thousands
@given(cases(), st.booleans())
def test_no_plan_takes_more_than_the_budget_and_its_numbers_are_those_of_its_units(
    case: Case, knows_rates: bool
) -> None:
    plan = case.choose(case.budget(), case.rates if knows_rates else None)
    row = letters(plan, len(case.units))
    device, staging = memory(case.units, row, plan.depth, case.others, plan.staging_slots)
    assert plan.device_bytes == device <= case.budget()
    assert plan.staging_bytes == staging
    passing = [u for u, own in zip(case.units, row, strict=True) if own != "r"]
    assert plan.slots == min(plan.depth + 1, len(passing))
    assert plan.slot_bytes == max((u.plain for u in passing), default=0)
    moves = len(passing) > plan.slots
    streamed = sum(u.stored for u, own in zip(case.units, row, strict=True) if own == "s")
    assert plan.streamed_bytes == moves * streamed
    assert plan.decoded_bytes == moves * sum(u.plain for u in passing if u.packed)
    assert all(case.units[unit].packed for unit in plan.kept_packed)
    assert case.prefetch in (None, plan.depth) or not passing


@thousands
@given(cases())
def test_the_least_budget_is_enough_and_a_byte_less_is_refused(case: Case) -> None:
    assert case.choose(case.least, None).device_bytes == case.least
    with pytest.raises(WrapError, match=f"at least {case.least:,} bytes"):
        case.choose(case.least - 1, None)


def test_the_least_of_small_models_is_the_least_there_is() -> None:
    rng = random.Random(1)
    for _ in range(300):
        case = random_case(rng, most=5)
        depths = (0, 1, 2) if case.prefetch is None else (case.prefetch,)
        assert case.least == min(
            memory(case.units, row, depth, case.others, slots)[0]
            for row in rows(case.units)
            for depth in depths
            for slots in (1, 3)
        )


def test_an_error_names_the_least_for_the_prefetch_and_the_least_of_all() -> None:
    with pytest.raises(WrapError) as error:
        choose([BLOCK] * 40, 10**9, others=OTHERS, prefetch=2)
    three, one = (OTHERS + allocated(256 + slots * BLOCK.plain) for slots in (3, 1))
    assert str(error.value) == (
        f"the weights take at least {three:,} bytes (2.65 GB) of the device with prefetch=2; "
        f"vram_budget is 1,000,000,000 bytes (1.00 GB): raise it, or prefetch=None: "
        f"{one:,} bytes are enough"
    )
    with pytest.raises(WrapError) as error:
        choose([BLOCK] * 40, 10**9, others=OTHERS, prefetch=None)
    assert "prefetch" not in str(error.value)
    assert f"{one:,} bytes (1.25 GB)" in str(error.value)


@pytest.mark.parametrize(("nbytes", "taken"), [(0, 0), (1, 1), (2 << 20, 1), ((2 << 20) + 1, 2)])
def test_the_allocator_takes_whole_pieces_of_2_mib(nbytes: int, taken: int) -> None:
    assert allocated(nbytes) == taken * (2 << 20)


def test_without_a_budget_everything_streams() -> None:
    for prefetch, depth, slots in ((None, 2, 3), (0, 0, 1), (5, 5, 6), (60, 60, 40)):
        plan = choose([BLOCK] * 40, None, others=OTHERS, prefetch=prefetch)
        assert (plan.depth, plan.slots) == (depth, slots)
        assert not plan.resident
        assert not plan.kept_packed
    assert plan.streamed_bytes == 0  # 40 slots: nothing moves


def test_what_fits_is_resident_to_the_byte() -> None:
    for unit, staging in ((BLOCK, 0), (PACKED, CHUNK)):
        staged = allocated(256 + 3 * staging) if staging else 0
        everything = OTHERS + 40 * allocated(256 + unit.plain) + staged
        plan = choose([unit] * 40, everything, others=OTHERS, prefetch=2, rates=LINK)
        assert plan.resident == frozenset(range(40))
        assert (plan.slots, plan.depth, plan.slot_bytes) == (0, 0, 0)
        assert plan.staging_bytes == staging
        assert plan.seconds == LINK.compute_s
        plan = choose([unit] * 40, everything - 1, others=OTHERS, prefetch=2)
        assert plan.slots == 3


def test_large_units_that_stay_make_the_slots_smaller() -> None:
    units = [unit(600 * MB, False), *[unit(50 * MB, False)] * 12]
    plan = choose(units, 800 * MB, others=0, prefetch=1)
    assert 0 in plan.resident
    assert plan.slot_bytes == 50 * MB


def test_the_least_of_many_sizes_keeps_those_that_would_make_slots_larger() -> None:
    sizes = [600, *range(300, 330), *range(10, 40)]
    random.Random(3).shuffle(sizes)
    units = [unit(size * MB, False) for size in sizes]
    for depth in (0, 1, 2):
        assert least(units, others=0, prefetch=depth) == min(
            memory(units, "".join("r" if size > cap else "s" for size in sizes), depth, 0)[0]
            for cap in sizes
        )


def test_a_model_without_units_takes_what_is_outside_of_them() -> None:
    assert choose([], OTHERS, others=OTHERS, prefetch=2, rates=LINK).device_bytes == OTHERS
    with pytest.raises(WrapError):
        choose([], OTHERS - 1, others=OTHERS, prefetch=2)


# --- time -----------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(cases(), st.lists(st.floats(0, 1), min_size=4, max_size=6), st.booleans())
def test_a_larger_budget_is_never_slower(case: Case, parts: list[float], knows_rates: bool) -> None:
    rates = case.rates if knows_rates else None
    plans = [case.choose(case.budget(part), rates) for part in sorted([*parts, 1.0])]
    for smaller, larger in pairwise(plans):
        assert cost(larger) <= cost(smaller)


def cost(plan: Residency) -> tuple[float, ...]:
    if plan.seconds is not None:
        return (plan.seconds,)
    streams = plan.streamed_bytes > 0
    last = streams and plan.depth == 0, streams and plan.staging_slots == 1
    return (*last, plan.streamed_bytes, plan.decoded_bytes)


@thousands
@given(cases())
def test_no_plan_is_slower_than_streaming_everything_as_far_ahead(case: Case) -> None:
    """From a cold start, over many forwards: what stays needs no copy, and no slot that another
    waits for. But what is kept is unpacked when its slot is free instead of when it has come, and
    if the largest is kept, the staging memory is smaller: that may cost 1 % at most."""
    plan = case.choose(case.budget(), case.rates)
    row = letters(plan, len(case.units))
    _, staging = memory(case.units, "s" * len(row), plan.depth, case.others)
    slots = plan.staging_slots
    everything = Assignment("s" * len(row), plan.depth, slots * staging, slots)
    mine = ends(case.units, assignment(plan, len(row)), case.rates, 30)[-1]
    allowed = 1.01 if plan.kept_packed else 1 + 1e-9
    if not plan.resident and not plan.kept_packed:
        return
    assert mine <= ends(case.units, everything, case.rates, 30)[-1] * allowed


def rows(units: Sequence[UnitBytes]) -> Iterator[str]:
    """Every way to keep them."""
    return ("".join(row) for row in product(*("rks" if unit.packed else "rs" for unit in units)))


def quickest(case: Case, within: float) -> float:
    """Seconds of the quickest way there is. Only what may be quicker than `within` is timed."""
    depths = (0, 1, 2) if case.prefetch is None else (case.prefetch,)
    best = within
    for row, depth, slots in product(rows(case.units), depths, (3, 1)):
        device, staging = memory(case.units, row, depth, case.others, slots)
        streamed = sum(u.stored for u, own in zip(case.units, row, strict=True) if own == "s")
        stays = len(row) - row.count("r") <= depth + 1
        if device <= case.budget() and (stays or streamed / (case.rates.link_gb_per_s * GB) < best):
            way = Assignment(row, depth, slots * staging, slots)
            best = min(best, seconds(case.units, way, case.rates))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_no_plan_of_a_small_model_is_1_percent_quicker(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(25):
        case = random_case(rng, most=6)
        plan = case.choose(case.budget(), case.rates)
        mine = seconds(case.units, assignment(plan, len(case.units)), case.rates)
        assert mine <= 1.01 * quickest(case, mine), (case, plan)


def test_units_are_placed_well_between_those_of_another_size() -> None:
    """Of which each kind alone would be spread as evenly in other places."""
    units = (unit(490 * MB, True),) * 2 + (unit(490 * MB, False),) * 4
    case = Case(units, OTHERS, None, Rates(39.9, 917.4, 0.0368), part=0.75)
    plan = case.choose(case.budget(), case.rates)
    mine = seconds(units, assignment(plan, len(units)), case.rates)
    assert mine <= 1.01 * quickest(case, mine)


@thousands
@given(cases(most=20))
def test_the_predicted_time_is_that_of_the_timeline(case: Case) -> None:
    """The planner charges unpacking to the unit's own compute, the timeline to whatever is computed
    meanwhile. So they differ by less than the time of unpacking, and not where there is none."""
    plan = case.choose(case.budget(), case.rates)
    assert plan.seconds is not None
    timed = seconds(case.units, assignment(plan, len(case.units)), case.rates)
    timed *= TIGHT if plan.staging_slots == 1 else 1
    unpacking = plan.decoded_bytes / (case.rates.decode_gb_per_s * GB)
    assert abs(timed - plan.seconds) <= 0.005 * timed + unpacking


@pytest.mark.parametrize("compute_s", [0.09, 0.2, 0.4, 1.0])
@pytest.mark.parametrize("some", [0, 1, 2, 3])
def test_the_predicted_time_of_a_large_model_is_within_1_percent(
    some: int, compute_s: float
) -> None:
    units = [PACKED if number % 3 < some else BLOCK for number in range(40)]
    rates = Rates(55, 2000, compute_s)
    for budget in (3, 6, 10, 15, 20, 25):
        plan = choose(units, budget * 10**9, others=OTHERS, prefetch=None, rates=rates)
        timed = seconds(units, assignment(plan, 40), rates)
        assert timed == pytest.approx(plan.seconds, rel=0.01)


def test_without_rates_nothing_that_fits_streams_less() -> None:
    rng = random.Random(2)
    for _ in range(200):
        case = random_case(rng, most=5)
        plan = case.choose(case.budget(), None)
        depths = (1, 2) if case.prefetch is None else (case.prefetch,)
        for row, depth in product(rows(case.units), depths):
            if memory(case.units, row, depth, case.others)[0] <= case.budget():
                streamed = sum(
                    u.stored for u, own in zip(case.units, row, strict=True) if own == "s"
                )
                stays = len(row) - row.count("r") <= depth + 1
                assert plan.streamed_bytes <= (0 if stays else streamed)


def test_of_plans_as_quick_the_smallest_is_taken() -> None:
    near = Rates(link_gb_per_s=55, decode_gb_per_s=2000, compute_s=0.4)
    plan = choose([BLOCK] * 50, 30 * 10**9, others=OTHERS, prefetch=1, rates=near)
    assert plan.device_bytes < 28 * 10**9
    less = choose([BLOCK] * 50, plan.device_bytes - 1, others=OTHERS, prefetch=1, rates=near)
    assert plan.seconds is not None
    assert less.seconds is not None
    assert plan.seconds <= near.compute_s * AS_GOOD < less.seconds


def test_packed_units_are_kept_packed_while_the_link_binds_and_then_plain() -> None:
    plans = [
        choose([PACKED] * 40, budget * 10**9, others=OTHERS, prefetch=1, rates=LINK)
        for budget in (8, 12, 16, 20, 24, 27)
    ]
    kept, resident = (
        [len(getattr(p, name)) for p in plans] for name in ("kept_packed", "resident")
    )
    assert kept[0] > 0 == resident[0]
    assert kept[1] > kept[0]
    assert kept[-1] < max(kept)
    assert resident == sorted(resident)
    assert resident[-1] > 25


def test_one_staging_slot_is_for_where_there_is_no_room_for_more() -> None:
    """The 14B, packed, in 2 GB: two slots, and the compute hides all that comes, where 1.44 times
    as long would be taken with one slot."""
    units = [PACKED] * 40
    hidden = Rates(55, 1569, 0.52)
    for rates in (None, hidden):
        plan = choose(units, 2 * 10**9, others=524 * MB, prefetch=None, rates=rates)
        assert (plan.slots, plan.staging_slots) == (2, 1)
        plan = choose(units, 3 * 10**9, others=524 * MB, prefetch=None, rates=rates)
        assert (plan.slots, plan.staging_slots) == (2, 3)
    assert plan.seconds is not None
    tight = choose(units, 2 * 10**9, others=524 * MB, prefetch=None, rates=hidden)
    assert tight.seconds == pytest.approx(plan.seconds * 1.005)
    assert forward_seconds(units, tight, hidden) == pytest.approx(tight.seconds)
    # Where the link binds it would wait for unpacking: one slot, and all three for staging.
    bound_by_link = 40 * (PACKED.stored / 55e9 + PACKED.plain / 1569e9)
    seconds_tight = forward_seconds(units, tight, Rates(55, 1569, 0.05))
    assert seconds_tight == pytest.approx(1.005 * bound_by_link, rel=0.01)
    bound = choose(units, 2 * 10**9, others=524 * MB, prefetch=None, rates=Rates(55, 1569, 0.05))
    assert (bound.slots, bound.staging_slots) == (1, 3)


def test_staging_memory_is_there_if_something_packed_comes_over_the_link() -> None:
    plan = choose([PACKED] * 40, 10 * 10**9, others=0, prefetch=1)
    assert plan.staging_bytes == CHUNK
    assert choose([PACKED] * 40, 10**10, others=0, prefetch=1, largest_chunk=5).staging_bytes == 5
    kept = 40 * allocated(256 + PACKED.stored) + allocated(256 + 2 * PACKED.plain)
    plan = choose([PACKED] * 40, kept, others=0, prefetch=1)
    assert plan.streamed_bytes == plan.staging_bytes == 0
    assert len(plan.kept_packed) == 40
    plan = choose([PACKED] * 40, 24 * 10**9, others=0, prefetch=1)  # what is resident comes once
    assert plan.streamed_bytes == 0 < len(plan.resident)
    assert plan.staging_bytes == CHUNK


def test_depth_0_is_the_last_resort() -> None:
    two_slots = OTHERS + allocated(256 + 2 * BLOCK.plain)
    assert choose([BLOCK] * 40, two_slots, others=OTHERS, prefetch=None).depth == 1
    assert choose([BLOCK] * 40, two_slots - 1, others=OTHERS, prefetch=None).depth == 0


@pytest.mark.parametrize("rates", [None, Rates(0.1, 2000, 0.2)])
def test_where_nothing_streams_one_slot_is_enough_to_unpack_to(rates: Rates | None) -> None:
    kept = OTHERS + 40 * allocated(256 + PACKED.stored)
    for slots, ahead in ((1, None), (3, 2)):
        budget = kept + allocated(256 + slots * PACKED.plain)
        plan = choose([PACKED] * 40, budget, others=OTHERS, prefetch=ahead, rates=rates)
        assert len(plan.kept_packed) == 40
        assert plan.slots == slots


@pytest.mark.parametrize("rates", [None, LINK, Rates(55, 2000, 0.35), Rates(55, 2000, 1.0)])
@pytest.mark.parametrize(
    "units",
    [
        [BLOCK] * 40,
        [PACKED] * 50,
        [PACKED if number % 3 else BLOCK for number in range(40)],
        [unit(size, False) for size in (105 * MB, 105 * MB, 283 * MB)] * 16,
    ],
    ids=["plain", "packed", "some packed", "parts"],
)
def test_few_plans_are_looked_at_and_fewer_are_timed(
    units: list[UnitBytes], rates: Rates | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a plan is made in milliseconds."""
    sized, timed = [], []
    size, steady = residency._Planner._size, residency._steady
    monkeypatch.setattr(residency._Planner, "_size", lambda *given: sized.append(1) or size(*given))
    monkeypatch.setattr(residency, "_steady", lambda *given: timed.append(1) or steady(*given))
    for budget in (4 * 10**9, 9 * 10**9, 20 * 10**9):
        sized.clear()
        timed.clear()
        residency._choose.cache_clear()
        choose(units, budget, others=OTHERS, prefetch=None, rates=rates)
        families, depths = 2, 3
        assert 0 < len(sized) <= families * depths * residency.MOST_PLANS + 10
        assert len(timed) <= (400 if rates else 0)


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rates", [None, LINK, Rates(55, 2000, 0.4)])
@pytest.mark.parametrize("block", [BLOCK, PACKED])
def test_what_stays_is_spread_evenly(block: UnitBytes, rates: Rates | None) -> None:
    for budget in range(3, 28):
        plan = choose([block] * 40, budget * 10**9, others=OTHERS, prefetch=None, rates=rates)
        row = letters(plan, 40)
        assert_even([own == "s" for own in row])
        assert_even([own == "k" for own in row if own != "s"])


def assert_even(marks: Sequence[bool]) -> None:
    """In a ring, the distances between neighbours differ by one at most."""
    places = [place for place, mark in enumerate(marks) if mark]
    if places:
        around = [*places, places[0] + len(marks)]
        distances = {b - a for a, b in pairwise(around)}
        assert max(distances) - min(distances) <= 1


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**30), st.floats(0, 1), st.booleans())
def test_units_of_different_sizes_are_spread_by_their_bytes(
    seed: int, part: float, knows_rates: bool
) -> None:
    """Up to any unit, the bytes streamed are their share of all, but for a few of the largest
    units: for each size those of one, and those of one more that stands at either end."""
    rng = random.Random(seed)
    sizes = [rng.randrange(50, 700) * MB for _ in range(rng.randint(1, 3))]
    units = tuple(unit(size, False) for _ in range(14) for size in sizes)
    case = Case(units, 0, rng.choice([1, 2]), Rates(30, 2000, sum(sizes) * 10 / 30e9), part)
    row = letters(case.choose(case.budget(), case.rates if knows_rates else None), len(units))
    streamed = [u.plain * (own == "s") for u, own in zip(units, row, strict=True)]
    far = 0.0
    for place in range(len(units)):
        share = sum(streamed) * sum(u.plain for u in units[:place]) / sum(u.plain for u in units)
        far = max(far, abs(sum(streamed[:place]) - share))
    assert far <= 2 * sum(sizes)


# --- words ----------------------------------------------------------------------------------------


def test_a_plan_says_what_it_does() -> None:
    plan = choose([BLOCK] * 40, 20 * 10**9, others=OTHERS, prefetch=1)
    assert plan.sentence == (
        "25 of 40 blocks resident (17.55 GB), 15 streamed through 2 slots; "
        "19.51 GB of the device, budget 20.00 GB"
    )
    plan = choose([PACKED] * 40, 21 * 10**9, others=OTHERS, prefetch=1)
    kept, stay = len(plan.kept_packed), len(plan.resident)
    assert kept + stay == 38
    assert plan.sentence == (
        f"{stay} of 40 blocks resident ({stay * 0.702:.2f} GB), {kept} kept packed "
        f"({kept * 0.495:.2f} GB), 2 streamed through 2 slots; "
        f"{plan.device_bytes / 1e9:.2f} GB of the device, budget 21.00 GB"
    )
    plan = choose([BLOCK] * 3, None, others=0, prefetch=0)
    assert plan.sentence == (
        "0 of 3 blocks resident (0.00 GB), 3 streamed through 1 slot; "
        "0.70 GB of the device, no budget"
    )


def test_planning_needs_no_torch() -> None:
    code = "import sys, wanoffload.residency; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the timeline itself --------------------------------------------------------------------------

TEN = Rates(link_gb_per_s=1, decode_gb_per_s=10, compute_s=1.0)
FOUR = [UnitBytes(250 * MB, 250 * MB)] * 4  # 0.25 s to copy and 0.25 s to compute each


@pytest.mark.parametrize(
    ("row", "depth", "expected"),
    [
        ("rrrr", 0, 1.0),
        ("ssss", 0, 2.0),  # one after the other
        ("ssss", 1, 1.0),
        ("ssss", 3, 1.0),  # each has its slot
        ("rsrs", 0, 1.0),  # the slot is free while others compute
        ("rrss", 0, 1.25),
        ("rsrs", 1, 1.0),
    ],
)
def test_a_timeline_of_equal_units_is_what_can_be_counted(
    row: str, depth: int, expected: float
) -> None:
    assert seconds(FOUR, Assignment(row, depth), TEN) == pytest.approx(expected)


def test_a_timeline_waits_for_a_slot_where_it_is_not_spread_evenly() -> None:
    """Each copy takes as long as the compute of two units: 1 s if there is always a slot for it."""
    units = [UnitBytes(125 * MB, 125 * MB)] * 8
    slow = Rates(link_gb_per_s=0.5, decode_gb_per_s=10, compute_s=1.0)
    assert seconds(units, Assignment("srsrsrsr", 1), slow) == pytest.approx(1.0)
    assert seconds(units, Assignment("ssssrrrr", 1), slow) == pytest.approx(1.25)
    assert seconds(units, Assignment("ssssrrrr", 2), slow) == pytest.approx(1.0)


def test_a_timeline_charges_unpacking_to_compute() -> None:
    packed = [UnitBytes(250 * MB, 100 * MB, packed=True)] * 4
    assert seconds(packed, Assignment("kkkk", 1), TEN) == pytest.approx(1.1)
    assert seconds(packed, Assignment("kkrk", 1), TEN) == pytest.approx(1.075)
    assert seconds(packed, Assignment("ssss", 1), TEN) == pytest.approx(1.1)
    idle = Rates(link_gb_per_s=0.1, decode_gb_per_s=10, compute_s=0.1)
    assert seconds(packed, Assignment("ssss", 2, 10**9), idle) == pytest.approx(4.0)


def test_a_timeline_has_packed_bytes_come_into_staging_memory_before_there_is_a_slot() -> None:
    """With nothing ahead, too: all of a unit, half of it, or nothing of it."""
    packed = [UnitBytes(250 * MB, 100 * MB, packed=True)] * 4
    slow = Rates(link_gb_per_s=0.4, decode_gb_per_s=10**6, compute_s=0.8)  # 0.25 s and 0.2 s each
    for staging, each in ((100 * MB, 0.25), (50 * MB, 0.325), (0, 0.45)):
        assert seconds(packed, Assignment("ssss", 0, staging), slow) == pytest.approx(
            4 * each, rel=1e-3
        )
