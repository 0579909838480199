"""A measured value beside what it is compared with and what was asked of the two."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

AT_MOST, AT_LEAST, WITHIN = "at most", "at least", "within"


@dataclass(frozen=True)
class Claim:
    """One line of the table: `value` over `against`, both in `unit`, is what `bound` is about.

    `bound` None: nothing was asked, the ratio is told all the same. WITHIN: the ratio may be so far
    from 1, on either side.
    """

    what: str
    value: float
    against: float
    against_is: str
    unit: str
    bound: float | None = None
    sense: str = AT_MOST

    @property
    def ratio(self) -> float:
        """Value over what it is compared with."""
        return self.value / self.against

    @property
    def kept(self) -> bool | None:
        """Whether the bound holds; None without one."""
        if self.bound is None:
            return None
        if self.sense == WITHIN:
            return abs(self.ratio - 1) <= self.bound
        return self.ratio <= self.bound if self.sense == AT_MOST else self.ratio >= self.bound

    @property
    def asked(self) -> str:
        """For example ``at most 1.3, kept``."""
        if self.bound is None:
            return ""
        return f"{self.sense} {self.bound:g}, {'kept' if self.kept else '**missed**'}"

    def as_json(self) -> dict[str, Any]:
        """The fields alone: ratio and verdict are computed again by whoever reads them."""
        return asdict(self)

    def __str__(self) -> str:
        asked = f" ({self.asked})" if self.bound is not None else ""
        return (
            f"{self.what}: {self.value:.4g} {self.unit} / {self.against:.4g} {self.unit} "
            f"({self.against_is}) = {self.ratio:.3f}{asked}"
        )
