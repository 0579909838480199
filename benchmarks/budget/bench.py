"""What the parts share: the models, and the budgets that are measured."""

from __future__ import annotations

import time
from functools import cached_property

import wanoffload
from benchmarks import machine
from benchmarks.contenders import BLOCK, PART, Contender, Live, Wanoffload, by_name
from benchmarks.engine import is_small
from benchmarks.harness import Session
from benchmarks.link import LinkProbe
from benchmarks.models import Size
from benchmarks.packing.bench import PACKED, PLAIN, PackingBench
from benchmarks.turns import FORWARDS_PER_STEP, Measure, Turns
from wanoffload import residency
from wanoffload.residency import ROUND_BYTES, UnitBytes, allocated

NAME = "budget"
PARTS = "parts"
FORMS = (PLAIN, PACKED, PARTS)  # of what streams; parts of blocks are plain
GB = 10**9
BUDGETS = tuple(GB * size for size in (2, 4, 6, 8, 12, 16, 24, 30))
# By form and frames: a budget more, and how many times as long as the resident model's a step may
# be under it.
LEAST = {(PACKED, 1): (21_500_000_000, 1.14), (PACKED, 17): (3 * GB, 1.025)}
FIRST_TWO = 2  # sizes that are measured: beyond, every plan hides behind compute
IDLE_S = 0.02  # an engine that has counted nothing for so long has all that it wants


class BudgetBench(PackingBench):
    """One run of the case. Models are wrapped once a form; then their budget is set.

    ``asked_sizes``: also larger ones, if ``--frames`` names them.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.asked_sizes = self.sizes[: None if session.options.frames else FIRST_TWO]
        self.sizes = self.sizes[:FIRST_TWO]

    @cached_property
    def link(self) -> LinkProbe:
        """The link, as one block's bytes see it."""
        return LinkProbe.page_locked(self.device, self.bytes.largest_block)

    @cached_property
    def resident(self) -> Live:
        """The model on the device; the link's probe comes first, so that it is no model's own."""
        _ = self.link
        return super().resident

    def let_go(self) -> None:
        """Takes everything down, the resident model too; it is made anew when it is needed."""
        self.close()
        self.__dict__.pop("resident", None)
        machine.release_caches()

    def contender(self, form: str) -> Contender:
        """This project, with as many blocks ahead as its plan takes; or one by its name."""
        if form not in FORMS:
            return by_name(form)
        return Wanoffload(None, pack=form == PACKED, granularity=PART if form == PARTS else BLOCK)

    def budgets(self, form: str, size: Size) -> list[int]:
        """In bytes, from the smallest to the largest."""
        if is_small(self.session):
            return toy_budgets(wanoffload.offloader(self.live(form).model))
        extra = LEAST.get((form, size.frames))
        return sorted({*BUDGETS, *([extra[0]] if extra else [])})


def toy_budgets(offloader: wanoffload.Offloader) -> list[int]:
    """For blocks that are tiny beside what the allocator rounds to: one that is too small, the
    least, some in between, and one under which everything stays."""
    units = [UnitBytes(b.layout.nbytes, b.image.nbytes, b.packed) for b in offloader.bindings]
    others = others_of(offloader)
    if offloader.granularity == PART:  # what they take now, without a budget
        least, too_small = offloader.stats().device_bytes, others
    else:
        least = residency.least(units, others=others, prefetch=None)
        too_small = least - 1
    return [too_small, *(least + more * ROUND_BYTES for more in (0, 1, 2, len(units) + 2))]


def others_of(offloader: wanoffload.Offloader) -> int:
    """Bytes on the device of what is in no unit."""
    stats = offloader.stats()
    passing = allocated(stats.slot_bytes) + allocated(stats.staging_bytes)
    return stats.device_bytes - passing - stats.resident_bytes


def name_of(budget: int | None) -> str:
    """How rows call a budget; "none": no block stays on the device."""
    if budget is None:
        return "none"
    return f"{budget / GB:g} GB" if budget >= GB else f"{budget} B"


def settled_bytes(live: Live) -> int:
    """Bytes fetched so far, once the engine has fetched all that it wants ahead."""
    fetched: list[int] = []
    while len(fetched) < 2 or fetched[-1] != fetched[-2]:
        counters = live.contender.counters(live.model)
        assert counters is not None
        fetched.append(counters.bytes_fetched)
        time.sleep(IDLE_S)
    return fetched[-1]


def take_as_planned(measure: Measure, live: Live, turns: Turns) -> None:
    """One turn; of one that counts, whether it fetched what `turns.streamed` says, or less if a
    unit that streams found its place unneeded by others and stayed there."""
    if turns.streamed is None:
        measure.take(live, turns)
        return
    before = settled_bytes(live)
    measure.take(live, turns)
    forwards = 1 + FORWARDS_PER_STEP * turns.steps
    turns.fetches_right &= settled_bytes(live) - before <= forwards * turns.streamed
