"""What the user chose. Unset and None are the same, and are not choices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from wanoffload.apart import AUTO as AUTO
from wanoffload.apart import BLOCK, PART
from wanoffload.sizes import parse_bytes

DIT = "dit"
AUXILIARY = ("text_encoder", "image_encoder", "vae")
COMPONENTS = (DIT, *AUXILIARY)
MODES = ("auto", "memory", "speed", "manual")
GRANULARITIES = (BLOCK, PART, AUTO)

_GROUPS = {"default": AUXILIARY, "all": COMPONENTS}
_FLAGS = (
    "dit_layerwise_offload",
    "dit_cpu_offload",
    "text_encoder_cpu_offload",
    "image_encoder_cpu_offload",
    "vae_cpu_offload",
    "use_fsdp_inference",
)


@dataclass(frozen=True)
class Choices:
    """The choices that were made, checked; None where none was.

    `dit_offload_prefetch_size` is as given: a count, or a ratio below 1 (see `blocks_ahead`).
    `layerwise_offload_components` is in the order of COMPONENTS. `pack` may be AUTO: to be decided,
    in modes too that by themselves pack nothing. `granularity`: BLOCK, PART or AUTO, which is as if
    it were not chosen. `vram_budget`: bytes, a fraction of the device memory that is to be had, or
    AUTO: what activations leave.
    """

    dit_layerwise_offload: bool | None = None
    dit_cpu_offload: bool | None = None
    layerwise_offload_components: tuple[str, ...] | None = None
    dit_offload_prefetch_size: float | None = None
    text_encoder_cpu_offload: bool | None = None
    image_encoder_cpu_offload: bool | None = None
    vae_cpu_offload: bool | None = None
    use_fsdp_inference: bool | None = None
    vram_budget: int | float | str | None = None
    pack: bool | str | None = None
    granularity: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Choices:
        """Checks names and values. Raises ValueError, which lists what is allowed."""
        allowed = [field.name for field in fields(cls)]
        for name in given:
            if name not in allowed:
                near = difflib.get_close_matches(name, allowed, 1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ValueError(f"unknown choice {name!r}{hint}; choices: {', '.join(allowed)}")
        made = {name: value for name, value in given.items() if value is not None}
        choices = cls(**{name: _checked(name, value) for name, value in made.items()})
        choices._check_together()
        return choices

    @property
    def budget_bytes(self) -> int | None:
        """The budget, where it was chosen as bytes."""
        return self.vram_budget if isinstance(self.vram_budget, int) else None

    def coarse(self, component: str) -> bool | None:
        """The choice of `<component>_cpu_offload`."""
        value: bool | None = getattr(self, f"{component}_cpu_offload")
        return value

    def made(self, name: str) -> bool:
        return getattr(self, name) is not None

    def _check_together(self) -> None:
        chosen = self.layerwise_offload_components
        if self.dit_layerwise_offload is False and chosen is not None and DIT in chosen:
            raise ValueError(
                "dit_layerwise_offload=False and layerwise_offload_components with 'dit' in it "
                "contradict each other: leave one of them out"
            )


def blocks_ahead(size: float, blocks: int) -> int:
    """A prefetch size in blocks, or parts: a count of 1 or more, or a ratio v below 1 of n of them.

    A ratio means 1 + round(v (n - 1)), so 0 means 1.
    """
    if size >= 1:
        return int(size)
    return 1 + round(size * max(blocks - 1, 0))


def check_mode(mode: object) -> str:
    """Raises ValueError unless `mode` is one of MODES."""
    if mode not in MODES:
        raise ValueError(f"mode is one of {', '.join(MODES)}, not {mode!r}")
    return str(mode)


def _checked(name: str, value: Any) -> Any:
    if name in _FLAGS:
        if not isinstance(value, bool):
            raise ValueError(f"{name} is True, False or None, not {value!r}")
        return value
    if name == "layerwise_offload_components":
        return _components(value)
    if name == "vram_budget":
        return _budget(value)
    if name == "granularity":
        if value not in GRANULARITIES:
            raise ValueError(f"granularity is 'block', 'part', 'auto' or None, not {value!r}")
        return value
    if name == "pack":
        if not isinstance(value, bool) and value != AUTO:
            raise ValueError(f"pack is True, False, 'auto' or None, not {value!r}")
        return value
    return _prefetch(value)


def _budget(value: Any) -> int | float | str:
    if value == AUTO:
        return AUTO
    if isinstance(value, float) and 0 < value <= 1:
        return value
    try:
        return parse_bytes(value, "vram_budget")
    except ValueError as error:
        raise ValueError(
            f"{error}; or a fraction of the device memory above 0 and up to 1.0, or 'auto'"
        ) from None


def _components(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    names: set[str] = set()
    for name in value if isinstance(value, Iterable) else [value]:
        if not isinstance(name, str) or (name not in COMPONENTS and name not in _GROUPS):
            allowed = ", ".join((*COMPONENTS, *_GROUPS))
            raise ValueError(f"unknown component {name!r}; layerwise_offload_components: {allowed}")
        names.update(_GROUPS.get(name, (name,)))
    return tuple(name for name in COMPONENTS if name in names)


def _prefetch(value: Any) -> float:
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not 0 <= value < float("inf") or (value >= 1 and value != int(value)):
        raise ValueError(
            "dit_offload_prefetch_size is a number of blocks (1, 2, ...) or a ratio of the blocks "
            f"(0 or more, below 1), not {value!r}"
        )
    return float(value)
