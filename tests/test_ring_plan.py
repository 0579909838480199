"""Where parts of blocks stand in their ring, and what of them stays on the device. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ring_timeline import Timed, bound, ends, one_by_one, seconds
from tests.small_models import MODELS
from wanoffload import ring_plan
from wanoffload.errors import WrapError
from wanoffload.image import ImageLayout, TensorSpec, aligned, lay_out
from wanoffload.residency import Residency, UnitBytes, evenly
from wanoffload.ring import LEAST_PIECE, MOST, Piece, Place, Ring, cut, ring_of
from wanoffload.ring_plan import Part, choose_parts, parts_of
from wanoffload.units import PART, find_units

MB = 10**6
MIB = 1 << 20
CHUNK = 48 << 20
OTHERS = 520 << 20
LINK = 55.0
FRAMES_17 = (6.2e-3, 2.5e-3, 4.7e-3)
"""Seconds of the compute of attn1, attn2 and ffn of Wan 14B, 17 frames of 480p on an H100."""

thousands = settings(max_examples=1000, deadline=None)
hundreds = settings(max_examples=200, deadline=None)


def cut_up(whole: ImageLayout) -> tuple[int, ...]:
    """The pieces of an image."""
    return cut(spec.nbytes for spec in whole.specs)


def layout(*nbytes: int) -> ImageLayout:
    """Of tensors of these sizes."""
    specs, offset = [], 0
    for number, size in enumerate(nbytes):
        specs.append(TensorSpec(f"{number}", torch.uint8, torch.Size([size]), (1,), offset))
        offset += aligned(size)
    return ImageLayout(tuple(specs), offset)


# --- cut ------------------------------------------------------------------------------------------


@thousands
@given(st.lists(st.integers(0, 3000) | st.integers(0, 30), min_size=1, max_size=30))
def test_pieces_cover_the_layout_begin_at_tensors_and_have_tensors_whole(sizes: list[int]) -> None:
    whole = layout(*sizes)
    pieces = cut_up(whole)
    assert sum(pieces) == whole.nbytes
    starts = [sum(pieces[:number]) for number in range(len(pieces))]
    assert set(starts) <= {spec.offset for spec in whole.specs}
    assert all(nbytes > 0 for nbytes in pieces) or whole.nbytes == 0
    for spec in whole.specs:
        piece = max(number for number, start in enumerate(starts) if start <= spec.offset)
        assert spec.offset + spec.nbytes <= starts[piece] + pieces[piece]
    small = whole.nbytes * LEAST_PIECE
    assert all(nbytes >= small for nbytes in pieces)


def test_a_part_is_cut_in_front_of_each_of_its_matrices() -> None:
    matrix, bias = 52_428_800, 10_240
    attention = layout(*(matrix, bias) * 4, bias, bias)
    assert cut_up(attention) == (*(matrix + bias,) * 3, matrix + 3 * bias)
    assert cut_up(layout(1000)) == (1024,)
    assert cut_up(layout(bias, matrix, bias)) == (matrix + 2 * bias,)  # the first stays with it


# --- the ring -------------------------------------------------------------------------------------

Sizes = tuple[tuple[int, ...], ...]


@st.composite
def rows(draw: st.DrawFn, most: int = 24) -> Sizes:
    """Parts of a few kinds, in any order, of some or many pieces."""
    size = st.integers(1, 2000) | st.sampled_from([50, 51, 100, 500])
    kinds = draw(
        st.lists(st.lists(size, min_size=1, max_size=6).map(tuple), min_size=1, max_size=4)
    )
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=most))
    return tuple(tuple(256 * nbytes for nbytes in kind) for kind in chosen)


def touch(a: Place, b: Place) -> bool:
    return any(
        one.start < other.start + other.nbytes and other.start < one.start + one.nbytes
        for one in a
        for other in b
    )


def apart(places: Sequence[Place], ahead: int, around: bool) -> bool:
    """Whether none touches one of those before it; `around`, also of the forward before."""
    total = len(places)
    return not any(
        touch(places[number], places[(number - before) % total])
        for number in range(total)
        for before in range(1, min(ahead, total - 1) + 1)
        if around or number >= before
    )


def least_of(row: Sizes, ahead: int) -> int:
    """Bytes of as many parts in a row as must be in the ring at once."""
    sizes = [sum(pieces) for pieces in row] * 2
    together = min(ahead + 1, len(row))
    return max(sum(sizes[first : first + together]) for first in range(len(row)))


@settings(max_examples=500, deadline=None)
@given(rows(), st.integers(0, 5))
def test_each_part_stands_in_the_ring_as_a_whole_and_on_nothing_of_those_before_it(
    row: Sizes, ahead: int
) -> None:
    ring = ring_of(row, ahead)
    assert len(ring.places) == len(row)
    for place, pieces in zip(ring.places, row, strict=True):
        assert tuple(piece.nbytes for piece in place) == pieces
        assert [piece.offset for piece in place] == [
            sum(pieces[:number]) for number in range(len(pieces))
        ]
        assert all(0 <= piece.start <= ring.nbytes - piece.nbytes for piece in place)
        assert all(piece.start % 256 == 0 for piece in place)
        assert not any(touch((a,), (b,)) for i, a in enumerate(place) for b in place[:i])
    assert apart(ring.places, ahead, around=False)


@settings(max_examples=500, deadline=None)
@given(rows(), st.integers(0, 5))
def test_a_ring_is_little_larger_than_what_stands_in_it_at_once(row: Sizes, ahead: int) -> None:
    ring, least = ring_of(row, ahead), least_of(row, ahead)
    assert ring.nbytes >= least
    if ahead == 0:
        assert ring.nbytes == least
        return
    pieces = max(map(len, row)) * (ahead + 1)
    # At its end less than the largest piece is lost, and less than a step behind each.
    largest = max(nbytes for part in row for nbytes in part)
    assert ring.nbytes <= max(MOST * least, least + largest) + (pieces + 2) * max(256, least / 1000)


def rows_of_places(row: Sizes, nbytes: int, step: int) -> list[Place]:
    """One behind the other, from the front again where a piece would pass the end."""
    places, at = [], 0
    for pieces in row:
        place, offset = [], 0
        for size in pieces:
            at = at if at + size <= nbytes else 0
            place.append(Piece(offset, at, size))
            at = -(-(at + size) // step) * step
            offset += size
        places.append(tuple(place))
    return places


@settings(max_examples=150, deadline=None)
@given(rows(most=9), st.integers(1, 4))
def test_no_smaller_ring_would_do(row: Sizes, ahead: int) -> None:
    ring, least = ring_of(row, ahead), least_of(row, ahead)
    around = apart(ring.places, ahead, around=True)
    step = max(256, int(least / 1024) // 256 * 256)
    for nbytes in range(-(-least // step) * step, ring.nbytes, step):
        places = rows_of_places(row, nbytes, step)
        alone = not any(
            touch((a,), (b,)) for place in places for i, a in enumerate(place) for b in place[:i]
        )
        assert not (alone and apart(places, ahead, around)), nbytes


@settings(max_examples=150, deadline=None)
@given(rows(most=9), st.integers(1, 4))
def test_the_last_parts_keep_the_first_of_the_next_forward_waiting_only_if_they_must(
    row: Sizes, ahead: int
) -> None:
    """That is, if no ring of at most half as much again keeps them apart."""
    ring = ring_of(row, ahead)
    if apart(ring.places, ahead, around=True):
        return
    least = least_of(row, ahead)
    step = max(256, int(least / 1024) // 256 * 256)
    for nbytes in range(-(-least // step) * step, int(MOST * least) + 1, step):
        places = rows_of_places(row, nbytes, step)
        alone = not any(
            touch((a,), (b,)) for place in places for i, a in enumerate(place) for b in place[:i]
        )
        assert not (alone and apart(places, ahead, around=True)), nbytes


@pytest.mark.parametrize("ahead", [1, 2, 3])
@pytest.mark.parametrize("count", range(2, 12))
def test_equal_parts_that_fill_the_ring_have_one_place_each(count: int, ahead: int) -> None:
    """And the forward closes, where their number is a multiple of the places'."""
    row = ((1 << 20,),) * count
    ring = ring_of(row, ahead)
    if count % (ahead + 1) == 0 or count <= ahead:
        least = min(ahead + 1, count) << 20
        assert least <= ring.nbytes <= 1.004 * least  # by a step at most for each
        assert apart(ring.places, ahead, around=True)


def test_a_ring_in_which_all_have_room_has_all_in_it() -> None:
    row = ((700 * 256,), (300 * 256, 5 * 256), (256,))
    for ahead in (2, 3, 50):
        places = ring_of(row, ahead).places
        assert not any(touch(a, b) for i, a in enumerate(places) for b in places[:i])


# --- parts of published models --------------------------------------------------------------------


@cache
def layouts_of_14b(blocks: int = 40) -> tuple[ImageLayout, ...]:
    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=blocks)
    for name, parameter in model.named_parameters():
        if not any(part in name for part in model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(torch.bfloat16)
    units = find_units(model, PART)
    assert [unit.name.rpartition(".")[2] for unit in units] == ["attn1", "attn2", "ffn"] * blocks
    return tuple(lay_out((g[0].name, g[0].tensor) for g in unit.groups) for unit in units)


@cache
def parts_of_14b(packed: bool = False, blocks: int = 40) -> tuple[Part, ...]:
    return tuple(
        Part(takes(own.nbytes, packed), cut_up(own), number // 3)
        for number, own in enumerate(layouts_of_14b(blocks))
    )


def takes(plain: int, packed: bool) -> UnitBytes:
    return UnitBytes(plain, int(plain * 0.705) if packed else plain, packed)


def test_the_parts_of_14b_are_those_that_are_known() -> None:
    matrix, vector = 5120 * 5120 * 2, 5120 * 2
    up, wide = 5120 * 13824 * 2, 13824 * 2
    attention = 4 * (matrix + vector) + 2 * vector
    assert [own.nbytes for own in layouts_of_14b()[:3]] == [
        attention,
        attention,
        2 * up + wide + vector,
    ]


def test_the_ring_of_14b_takes_at_most_0_61_gb_and_closes() -> None:
    plan = choose_parts(parts_of_14b(), None, others=0, prefetch=None)
    assert plan.ring_bytes <= 0.61e9
    assert apart([plan.places[number] for number in range(120)], 1, around=True)


def test_the_ring_of_14b_is_small_however_much_of_it_stays() -> None:
    for gigabytes in range(2, 28):
        plan = choose_parts(parts_of_14b(), gigabytes * 10**9, others=OTHERS, prefetch=None)
        assert plan.depth == 1
        assert plan.ring_bytes <= 0.74e9


def timed(plan: Residency, computes: Sequence[float]) -> list[Timed]:
    """The parts of a plan, which are used in the order in which they are numbered."""
    return [
        Timed(tuple((p.start, p.nbytes) for p in plan.places.get(number, ())), compute)
        for number, compute in enumerate(computes)
    ]


def test_14b_loses_at_most_2_percent_through_its_ring_and_over_10_through_two_slots() -> None:
    parts, computes = parts_of_14b(), FRAMES_17 * 40
    plan = choose_parts(parts, None, others=0, prefetch=None)
    through = timed(plan, computes)
    assert seconds(through, plan.ring_bytes, LINK) <= 1.02 * bound(through, LINK)

    slot = max(part.takes.plain for part in parts)
    slots = [
        Timed(((number % 2 * slot, part.takes.plain),), computes[number])
        for number, part in enumerate(parts)
    ]
    assert seconds(slots, 2 * slot, LINK) > 1.10 * bound(slots, LINK)


def test_14b_loses_at_most_2_percent_with_parts_that_stay_and_the_stretches_of_the_engine() -> None:
    """Which copies a stretch of less than a MiB at once with its neighbour: pieces that differ by a
    bias must begin where each other begin."""
    parts, computes = parts_of_14b(), FRAMES_17 * 40
    for tenth in range(15, 280, 12):
        plan = choose_parts(parts, tenth * 10**8, others=OTHERS, prefetch=None)
        row = timed(plan, computes)
        taken = seconds(row, plan.ring_bytes, LINK, least_stretch=MIB)
        assert taken <= 1.02 * bound(row, LINK), tenth


@thousands
@given(rows(most=12), st.integers(0, 3), st.floats(1, 60), st.data())
def test_no_ring_is_slower_than_fetching_each_part_when_it_is_needed(
    row: Sizes, ahead: int, link: float, data: st.DataObject
) -> None:
    ring = ring_of(row, ahead)
    copies = sum(map(sum, row)) / (link * 1e9 * len(row))
    compute = st.floats(0, 3).map(lambda share: share * copies)
    parts = [
        Timed(tuple((p.start, p.nbytes) for p in place), data.draw(compute))
        for place in ring.places
    ]
    taken = seconds(parts, ring.nbytes, link)
    assert taken <= one_by_one(parts, link) * (1 + 1e-9)
    assert taken >= bound(parts, link) * (1 - 1e-9)


# --- the simulator itself -------------------------------------------------------------------------

TENTH = 10**8  # bytes: 0.1 s over a link of 1 GB/s


def test_a_timeline_of_two_slots_is_what_can_be_counted() -> None:
    slots = [Timed(((number % 2 * TENTH, TENTH),), 0.1) for number in range(2)]
    assert ends(slots, 2 * TENTH, 1.0, 4) == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert seconds(slots, 2 * TENTH, 1.0) == pytest.approx(0.2)


def test_a_timeline_of_one_slot_overlaps_nothing() -> None:
    slot = [Timed(((0, TENTH),), 0.1)] * 2
    assert ends(slot, TENTH, 1.0, 3) == pytest.approx([0.2, 0.4, 0.6])
    assert one_by_one(slot, 1.0) == pytest.approx(0.4)


def test_a_stretch_waits_for_whom_it_overwrites_and_for_nobody_else() -> None:
    """The second part stands on half of the first: that half comes when the first is computed."""
    half = TENTH // 2
    parts = [Timed(((0, TENTH),), 0.3), Timed(((TENTH, half), (0, half)), 0.1)]
    # Copies: 0.0-0.1; 0.1-0.15, then from 0.4 on, 0.4-0.45.
    assert ends(parts, 2 * TENTH, 1.0, 2) == pytest.approx([0.4, 0.55])


def test_a_stretch_of_less_than_the_least_waits_with_its_neighbour_for_all() -> None:
    half, little = TENTH // 2, TENTH // 100
    parts = [Timed(((half, TENTH),), 0.3), Timed(((little, half),), 0.1)]  # on its first bytes
    assert ends(parts, 2 * TENTH, 1.0, 2) == pytest.approx([0.4, 0.501])
    assert ends(parts, 2 * TENTH, 1.0, 2, 2 * little) == pytest.approx([0.4, 0.55])


def test_a_timeline_does_not_depend_on_where_a_piece_is_split() -> None:
    whole = [Timed(((0, 3 * TENTH),), 0.2), Timed(((3 * TENTH, 2 * TENTH),), 0.4)]
    split = [Timed(((0, TENTH), (TENTH, 2 * TENTH)), 0.2), whole[1]]
    assert ends(whole, 5 * TENTH, 1.0, 9) == pytest.approx(ends(split, 5 * TENTH, 1.0, 9))


# --- plans ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    parts: tuple[Part, ...]
    others: int
    prefetch: int | None
    order: tuple[int, ...] | None
    together: bool
    share: float  # of what lies between the least budget and all that can be used

    def choose(self, budget: int | None) -> Residency:
        return choose_parts(
            self.parts,
            budget,
            others=self.others,
            prefetch=self.prefetch,
            order=self.order,
            together=self.together,
        )

    @property
    def least(self) -> int:
        """As the error names it."""
        with pytest.raises(WrapError) as error:
            self.choose(-1)
        found = re.search(r"at least ([\d,]+) bytes", str(error.value))
        assert found is not None
        return int(found[1].replace(",", ""))

    def budget(self, share: float) -> int:
        most = self.others + sum(allocated(256 + part.takes.plain) for part in self.parts)
        return self.least + round(share * max(most - self.least, 0))

    @property
    def row(self) -> tuple[int, ...]:
        return self.order or tuple(range(len(self.parts)))

    @property
    def at_once(self) -> int:
        """Parts of the largest block."""
        blocks = [part.block for part in self.parts]
        return max(map(blocks.count, blocks))

    def ahead(self, plan: Residency) -> int:
        """So many behind the one in use have room beside it."""
        if self.prefetch is None:
            return plan.depth
        return max(self.prefetch, self.at_once - 1 if self.together else 0)


def allocated(nbytes: int) -> int:
    return -(-nbytes // (2 * MIB)) * 2 * MIB


@st.composite
def cases(draw: st.DrawFn, most_blocks: int = 7) -> Case:
    piece = st.integers(1, 60 * MB // 256).map(lambda n: 256 * n)
    part = st.lists(piece, min_size=1, max_size=4).map(tuple)
    kinds = draw(st.lists(st.lists(part, min_size=1, max_size=4), min_size=1, max_size=2))
    blocks = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=most_blocks))
    packed = draw(st.sampled_from([st.just(False), st.just(False), st.just(True), st.booleans()]))
    parts = tuple(
        Part(takes(sum(pieces), draw(packed)), pieces, number)
        for number, block in enumerate(blocks)
        for pieces in block
    )
    together = draw(st.sampled_from([False, False, True]))
    return Case(
        parts,
        others=draw(st.sampled_from([0, 2 * MIB, OTHERS])),
        prefetch=draw(st.sampled_from([None, None, 0, 1, 2, 3, 9])),
        order=draw(orders(parts, together)),
        together=together,
        share=draw(st.floats(0, 1)),
    )


def orders(parts: Sequence[Part], together: bool) -> st.SearchStrategy[tuple[int, ...] | None]:
    """Any; of parts that are used together, blocks stay together."""
    numbers = list(range(len(parts)))
    if not together:
        return st.none() | st.permutations(numbers).map(tuple)

    def by_block(blocks: list[int]) -> tuple[int, ...]:
        return tuple(n for block in blocks for n in numbers if parts[n].block == block)

    return st.none() | st.permutations(sorted({part.block for part in parts})).map(by_block)


def memory(case: Case, plan: Residency) -> tuple[int, int]:
    """Bytes on the device of everything, and of one staging slot."""
    packed = [min(part.takes.stored, CHUNK) for part in case.parts if part.takes.packed]
    staging = max(packed, default=0)
    allocations = [256 + case.parts[number].takes.plain for number in plan.resident]
    allocations += [256 + plan.ring_bytes] if plan.ring_bytes else []
    allocations += [256 + 3 * staging] if staging else []
    return case.others + sum(map(allocated, allocations)), staging


def moving(case: Case, plan: Residency) -> list[UnitBytes]:
    """What comes in each forward: the parts that another part overwrites."""
    return [
        case.parts[number].takes
        for number, place in plan.places.items()
        if any(touch(place, other) for n, other in plan.places.items() if n != number)
    ]


def passing(case: Case, plan: Residency) -> int:
    """Bytes of the parts that do not stay."""
    return sum(case.parts[number].takes.stored for number in plan.places)


@thousands
@given(cases())
def test_no_plan_takes_more_than_the_budget_and_its_numbers_are_those_of_its_parts(
    case: Case,
) -> None:
    plan = case.choose(budget := case.budget(case.share))
    device, staging = memory(case, plan)
    assert plan.device_bytes == device <= budget
    assert plan.staging_bytes == staging
    assert (plan.slots, plan.slot_bytes, plan.kept_packed) == (0, 0, frozenset())
    comes = moving(case, plan)
    assert plan.streamed_bytes == sum(each.stored for each in comes)
    assert plan.decoded_bytes == sum(each.plain for each in comes if each.packed)


@hundreds
@given(cases())
def test_every_part_that_does_not_stay_has_a_place_in_the_order_of_use(case: Case) -> None:
    plan = case.choose(case.budget(case.share))
    assert list(plan.places) == [n for n in case.row if n not in plan.resident]
    for number, place in plan.places.items():
        part = case.parts[number]
        nbytes = tuple(piece.nbytes for piece in place)
        assert nbytes == ((part.takes.plain,) if part.takes.packed else part.pieces)
        assert all(0 <= piece.start <= plan.ring_bytes - piece.nbytes for piece in place)
    assert apart(list(plan.places.values()), case.ahead(plan), around=False)


@hundreds
@given(cases())
def test_parts_that_are_used_together_have_room_together(case: Case) -> None:
    case = replace(case, together=True, order=None)
    plan = case.choose(case.budget(case.share))
    for block in {part.block for part in case.parts}:
        places = [place for n, place in plan.places.items() if case.parts[n].block == block]
        assert not any(touch(a, b) for i, a in enumerate(places) for b in places[:i])


@hundreds
@given(cases())
def test_the_least_budget_is_enough_and_a_byte_less_is_refused(case: Case) -> None:
    assert case.choose(case.least).device_bytes <= case.least
    with pytest.raises(WrapError, match=f"at least {case.least:,} bytes"):
        case.choose(case.least - 1)


def test_the_least_is_what_all_take_where_a_ring_would_take_more() -> None:
    pieces = (1_035_008, 5_234_176)
    parts = [Part(takes(sum(pieces), False), pieces, number) for number in range(2)]
    ring = choose_parts(parts, None, others=0, prefetch=1).device_bytes
    assert ring > 12 * MIB
    assert choose_parts(parts, 12 * MIB, others=0, prefetch=1).resident == {0, 1}
    with pytest.raises(WrapError, match=f"at least {12 * MIB:,} bytes"):
        choose_parts(parts, 12 * MIB - 1, others=0, prefetch=1)


@hundreds
@given(cases())
def test_what_the_error_offers_instead_is_enough(case: Case) -> None:
    with pytest.raises(WrapError) as error:
        case.choose(case.least - 1)
    offered = re.search(r"or prefetch=None: ([\d,]+) bytes are enough", str(error.value))
    if case.prefetch is None:
        assert offered is None
    if offered is not None:
        nbytes = int(offered[1].replace(",", ""))
        assert nbytes < case.least
        assert replace(case, prefetch=None).choose(nbytes).device_bytes <= nbytes


@hundreds
@given(cases(), st.floats(0, 1))
def test_a_larger_budget_never_has_more_bytes_pass(case: Case, more: float) -> None:
    """But where it has room for another part beside the one in use: that is worth more."""
    low, high = sorted((case.share, more))
    small, large = (case.choose(case.budget(share)) for share in (low, high))
    if large.resident != frozenset(range(len(case.parts))):
        assert large.depth >= small.depth
    if large.depth == small.depth:
        assert passing(case, large) <= passing(case, small)


def test_a_larger_budget_never_has_more_of_14b_pass() -> None:
    """Of blocks that are compiled, whose ring is large and jumps."""
    parts = parts_of_14b()
    passed = [
        sum(parts[number].takes.stored for number in plan.places)
        for budget in range(16_500 * MB, 19_000 * MB, 33 * MB)
        for plan in [choose_parts(parts, budget, others=OTHERS, prefetch=None, together=True)]
    ]
    assert passed == sorted(passed, reverse=True)


@hundreds
@given(cases())
def test_a_budget_never_has_more_bytes_pass_than_none(case: Case) -> None:
    without = case.choose(None)
    assert without.resident == frozenset()
    assert passing(case, case.choose(case.budget(case.share))) <= passing(case, without)


@hundreds
@given(cases())
def test_what_fits_stays_to_the_byte(case: Case) -> None:
    staging = memory(case, case.choose(None))[1]
    everything = case.others + sum(allocated(256 + part.takes.plain) for part in case.parts)
    everything += allocated(256 + 3 * staging) if staging else 0
    plan = case.choose(everything)
    assert plan.resident == frozenset(range(len(case.parts)))
    assert (plan.ring_bytes, plan.places, plan.streamed_bytes) == (0, {}, 0)
    try:
        less = case.choose(everything - 1)
    except WrapError:
        return
    assert less.resident != plan.resident


@hundreds
@given(cases())
def test_prefetch_is_obeyed(case: Case) -> None:
    plan = case.choose(case.budget(case.share))
    if case.prefetch is not None:
        assert plan.depth == case.prefetch
    elif case.together:
        assert plan.depth in (2 * case.at_once - 1, case.at_once - 1, 0)
    else:
        assert plan.depth in (1, 0)


def test_without_a_budget_everything_passes_and_one_part_is_ahead() -> None:
    plan = choose_parts(parts_of_14b(), None, others=OTHERS, prefetch=None)
    assert (plan.depth, plan.resident) == (1, frozenset())
    assert plan.streamed_bytes == sum(part.takes.stored for part in parts_of_14b())
    together = choose_parts(parts_of_14b(), None, others=OTHERS, prefetch=None, together=True)
    assert together.depth == 5


def test_one_part_at_a_time_is_the_last_resort() -> None:
    parts = parts_of_14b()
    ring = choose_parts(parts, None, others=OTHERS, prefetch=None).device_bytes
    assert choose_parts(parts, ring, others=OTHERS, prefetch=None).depth == 1
    less = choose_parts(parts, ring - 1, others=OTHERS, prefetch=None)
    assert less.depth == 0
    largest = max(part.takes.plain for part in parts)
    assert choose_parts(parts, OTHERS + allocated(256 + largest), others=OTHERS, prefetch=None)


def test_whole_blocks_stay_evenly_and_single_parts_of_others_with_what_is_left() -> None:
    parts = parts_of_14b()
    for gigabytes in (4, 9, 13, 20, 27):
        plan = choose_parts(parts, gigabytes * 10**9, others=OTHERS, prefetch=None)
        stay = {block: [n for n in plan.resident if n // 3 == block] for block in range(40)}
        whole = [block for block, numbers in stay.items() if len(numbers) == 3]
        some = [numbers for numbers in stay.values() if len(numbers) in (1, 2)]
        assert all(numbers[0] % 3 == 2 for numbers in some)  # the largest of its block
        around = [*whole, whole[0] + 40]
        distances = {b - a for a, b in pairwise(around)}
        assert max(distances) - min(distances) <= 1


@pytest.mark.parametrize("gigabytes", [21, 24, 27])
def test_of_whole_blocks_and_largest_parts_of_others_no_choice_that_fits_streams_less(
    gigabytes: int,
) -> None:
    parts = parts_of_14b()
    plan = choose_parts(parts, gigabytes * 10**9, others=OTHERS, prefetch=None)
    planner = ring_plan._Planner(tuple(parts), tuple(range(120)), OTHERS, CHUNK)
    budget, tried = gigabytes * 10**9, 0
    for whole in range(41):
        blocks = evenly(whole, 40)
        others = [block for block in range(40) if block not in blocks]
        for more in range(len(others) + 1):
            largest = {3 * others[at] + 2 for at in evenly(more, len(others), 0.5)}
            stay = frozenset({3 * block + i for block in blocks for i in range(3)} | largest)
            held = sum(parts[n].takes.plain for n in stay)
            streamed = sum(part.takes.stored for part in parts) - held
            if streamed < plan.streamed_bytes and held + OTHERS < budget:
                tried += 1
                assert planner.bytes_with(stay, 1) > budget
    assert tried
    if gigabytes == 27:  # of each block that streams
        assert all(n % 3 != 2 for n in plan.places)
        assert plan.ring_bytes < 0.45e9


def test_little_of_the_budget_is_left() -> None:
    """Less than a whole block of 14B, and most of the time less than a part."""
    parts = parts_of_14b()
    unused = []
    for tenth in range(20, 280, 7):
        budget = tenth * 10**8
        plan = choose_parts(parts, budget, others=OTHERS, prefetch=None)
        unused.append(budget - plan.device_bytes)
    assert max(unused) < 0.35e9
    assert sum(unused) / len(unused) < 0.18e9


def test_packed_parts_stand_in_one_piece_and_have_staging_memory() -> None:
    plan = choose_parts(parts_of_14b(packed=True), 10**10, others=OTHERS, prefetch=None)
    assert all(len(place) == 1 for place in plan.places.values())
    assert plan.staging_bytes == CHUNK
    assert plan.decoded_bytes == sum(parts_of_14b()[n].takes.plain for n in plan.places)
    small = choose_parts(
        parts_of_14b(packed=True), 10**10, others=OTHERS, prefetch=None, largest_chunk=5
    )
    assert small.staging_bytes == 5


def test_blocks_of_compiled_parts_are_in_the_ring_with_the_next_one() -> None:
    parts = parts_of_14b()
    block = sum(part.takes.plain for part in parts[:3])
    plan = choose_parts(parts, None, others=0, prefetch=None, together=True)
    assert 2 * block <= plan.ring_bytes <= 2.1 * block
    one = choose_parts(parts, plan.device_bytes - 1, others=0, prefetch=None, together=True)
    assert one.depth == 2
    assert one.ring_bytes >= block
    with pytest.raises(WrapError, match="part by part"):
        choose_parts(parts, block - 1, others=0, prefetch=None, together=True)


def test_an_error_names_the_least_for_the_prefetch_and_the_least_of_all() -> None:
    parts = parts_of_14b()
    with pytest.raises(WrapError) as error:
        choose_parts(parts, 2 * 10**8, others=OTHERS, prefetch=2)
    three = choose_parts(parts, None, others=OTHERS, prefetch=2).device_bytes
    one = choose_parts(parts, None, others=OTHERS, prefetch=0).device_bytes
    assert str(error.value) == (
        f"the weights take at least {three:,} bytes ({three / 1e9:.2f} GB) of the device with "
        "prefetch=2, part by part; vram_budget is 200,000,000 bytes (0.20 GB): raise it, or "
        f"prefetch=None: {one:,} bytes are enough"
    )
    with pytest.raises(WrapError) as error:
        choose_parts(parts, 2 * 10**8, others=OTHERS, prefetch=None)
    assert "prefetch" not in str(error.value)
    assert f"{one:,} bytes" in str(error.value)


def test_a_plan_says_what_it_does() -> None:
    plan = choose_parts(parts_of_14b(), 2 * 10**9, others=OTHERS, prefetch=None)
    words = re.fullmatch(
        r"(\d+) of 120 parts of blocks resident \((.*) GB\), (\d+) streamed through a ring of "
        r"(.*) GB; (.*) GB of the device, budget 2\.00 GB",
        plan.sentence,
    )
    assert words is not None
    assert words.groups() == (
        f"{len(plan.resident)}",
        f"{sum(parts_of_14b()[n].takes.plain for n in plan.resident) / 1e9:.2f}",
        f"{len(plan.places)}",
        f"{plan.ring_bytes / 1e9:.2f}",
        f"{plan.device_bytes / 1e9:.2f}",
    )


@pytest.mark.parametrize("packed", [False, True])
def test_few_rings_are_made_for_a_plan(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a plan is made in a second at most."""
    made: list[int] = []
    real = ring_plan.ring_of

    def counted(row: Sizes, ahead: int) -> Ring:
        made.append(len(row))
        return real(row, ahead)

    monkeypatch.setattr(ring_plan, "ring_of", counted)
    ring_plan._choose.cache_clear()
    ring_plan._choices.cache_clear()
    for gigabytes in (2, 4, 9, 15, 20, 26):
        made.clear()
        choose_parts(parts_of_14b(packed), gigabytes * 10**9, others=OTHERS, prefetch=None)
        assert 0 < len(made) <= 40


def test_units_of_small_models_become_parts_with_their_blocks() -> None:
    model = MODELS["vace"].make()
    units = find_units(model, PART)
    layouts = [lay_out((g[0].name, g[0].tensor) for g in unit.groups) for unit in units]
    sizes = [takes(own.nbytes, False) for own in layouts]
    parts = parts_of(units, layouts, sizes)
    assert [part.pieces for part in parts] == [cut_up(own) for own in layouts]
    for (one, a), (other, b) in pairwise(zip(units, parts, strict=True)):
        assert (one.block is other.block) == (a.block == b.block)
