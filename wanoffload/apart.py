"""Which modules of a block are fetched by themselves. Pure: looked at in bytes, wherever these were
found (`units` sees modules, `facts` also configs and files)."""

from __future__ import annotations

from collections.abc import Sequence

BLOCK, PART, AUTO = "block", "part", "auto"
"""Granularities: what a unit is, a block or a part of one. AUTO: whichever fits, or is
quicker within a budget."""
LEAST_PART = 1 / 50
"""Of a block: what is smaller is no part of its own, it stays on the device."""
MOST_REST = 1 / 10
"""Of a block: if more would stay on the device besides its parts, it is not taken apart."""


def parts_among(called: Sequence[int], whole: int) -> list[int]:
    """The places in `called` of those that are parts; none: the block is one part.

    Args:
        called: bytes of each module that the block calls.
        whole: bytes of the block.
    """
    parts = [at for at, nbytes in enumerate(called) if nbytes >= whole * LEAST_PART]
    rest = whole - sum(called[at] for at in parts)
    return parts if len(parts) > 1 and rest <= whole * MOST_REST else []
