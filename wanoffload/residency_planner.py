"""What stays on the device of one model's units, by what these take now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from wanoffload import residency, units
from wanoffload.errors import WrapError
from wanoffload.host_tiers import HostPlan
from wanoffload.image import ImageLayout
from wanoffload.packing import largest_chunk
from wanoffload.residency import Rates, Residency, UnitBytes
from wanoffload.ring_plan import choose_parts, parts_of
from wanoffload.staging import CHUNK_BYTES

if TYPE_CHECKING:
    from wanoffload.binding import Binding


@dataclass(frozen=True)
class ResidencyPlanner:
    """Chooses what stays on the device, and what streams how. Takes nothing by itself.

    Attributes:
        others: bytes on the device of what is in no unit, as allocated.
        prefetch: units that are fetched ahead, as asked for; None: as is best within the budget.
        granularity: BLOCK or PART.
        compiled: some block is: its parts are used all at once.
        rates: of the forwards that run now; None: not known.
    """

    others: int
    prefetch: int | None
    granularity: str
    compiled: bool
    rates: Rates | None = None

    def expect(
        self,
        found: Sequence[units.Unit],
        layouts: Sequence[ImageLayout],
        plan: HostPlan,
        budget: int | None,
    ) -> Residency:
        """By what packed units are expected to take. Raises WrapError if the budget is too small
        for any residency."""
        takes = [
            UnitBytes(layout.nbytes, plan.sizes[number], number in plan.packed)
            for number, layout in enumerate(layouts)
        ]
        if self.granularity == units.PART:
            return self._choose_parts(found, layouts, takes, budget)
        return residency.choose(takes, budget, others=self.others, prefetch=self.prefetch)

    def choose(
        self, bindings: Sequence[Binding], budget: int | None, order: Sequence[int]
    ) -> Residency:
        """By what units take now. Raises WrapError if the budget is too small.

        Args:
            budget: bytes that all of the weights may take. None: none stays.
            order: the numbers of the units as they are used.
        """
        chunk = max((largest_chunk(binding.image) for binding in bindings), default=0)
        if self.granularity == units.PART:
            found = [binding.unit for binding in bindings]
            layouts = [binding.layout for binding in bindings]
            takes = [_takes(binding, binding.image.nbytes) for binding in bindings]
            return self._choose_parts(found, layouts, takes, budget, order, chunk)
        chosen = residency.choose(
            sizes_of(bindings),
            budget,
            others=self.others,
            prefetch=self.prefetch,
            rates=self.rates,
            largest_chunk=chunk,
        )
        return _with_bytes_over_link(chosen, bindings)

    def choose_within(
        self, bindings: Sequence[Binding], budget: int | None, order: Sequence[int]
    ) -> Residency:
        """The same; where the budget is too small, nothing stays."""
        try:
            return self.choose(bindings, budget, order)
        except WrapError:
            return self.choose(bindings, None, order)

    def depends_on_rates(self, bindings: Sequence[Binding], budget: int | None) -> bool:
        """Whether rates decide what stays: packed blocks, which are unpacked for each use, or fewer
        plain ones."""
        given = budget is not None and self.granularity == units.BLOCK
        return given and any(binding.packed for binding in bindings)

    def seconds(self, bindings: Sequence[Binding], plan: Residency) -> float:
        """Of a forward under a plan, by the rates, which are known."""
        assert self.rates is not None
        return residency.forward_seconds(sizes_of(bindings), plan, self.rates)

    def _choose_parts(
        self,
        found: Sequence[units.Unit],
        layouts: Sequence[ImageLayout],
        takes: Sequence[UnitBytes],
        budget: int | None,
        order: Sequence[int] | None = None,
        chunk: int = CHUNK_BYTES,
    ) -> Residency:
        return choose_parts(
            parts_of(found, layouts, takes),
            budget,
            others=self.others,
            prefetch=self.prefetch,
            order=order,
            together=self.compiled,
            largest_chunk=chunk,
        )


def sizes_of(bindings: Sequence[Binding]) -> list[UnitBytes]:
    """What blocks take. Packed ones of equal plain size differ by a little: all count as the
    largest, so that they can be spread evenly."""
    stored: dict[int, int] = {}
    for binding in bindings:
        if binding.packed:
            plain = binding.layout.nbytes
            stored[plain] = max(stored.get(plain, 0), binding.image.nbytes)
    return [
        _takes(binding, stored[binding.layout.nbytes] if binding.packed else binding.image.nbytes)
        for binding in bindings
    ]


def _takes(binding: Binding, stored: int) -> UnitBytes:
    return UnitBytes(binding.layout.nbytes, stored, binding.packed)


def _with_bytes_over_link(chosen: Residency, bindings: Sequence[Binding]) -> Residency:
    """Each block counts as what it takes, not as the largest of its size."""
    if chosen.streamed_bytes == 0:
        return chosen
    stays = chosen.resident | chosen.kept_packed
    over_link = (b.image.nbytes for n, b in enumerate(bindings) if n not in stays)
    return replace(chosen, streamed_bytes=sum(over_link))
