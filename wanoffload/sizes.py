"""Sizes as people write them."""

from __future__ import annotations

import re

_UNITS: dict[str, int] = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(size: int | str, what: str = "a size") -> int:
    """Bytes of `size`: a whole number of bytes, or text such as "24GiB" (1024) or "24 GB" (1000).

    Raises ValueError, which names `what`, for anything else and for less than 0.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None or found[2].lower() not in _UNITS:
        raise ValueError(
            f"{what} is a number of bytes, 0 or more, or text such as '24GiB' or '24 GB', "
            f"not {size!r}"
        )
    return round(float(found[1]) * _UNITS[found[2].lower()])


def gb(nbytes: float) -> str:
    """Bytes as text, in GB of 10^9."""
    return f"{nbytes / 1e9:.2f} GB"
