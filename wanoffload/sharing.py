"""The arena in which a model's images are shared, if its caller wants that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from wanoffload._C import HostStore
from wanoffload.image import ImageLayout
from wanoffload.packing import most_bytes
from wanoffload.shared_arena import SharedArena
from wanoffload.units import Unit, granularity_of
from wanoffload.weights import Weights


@contextmanager
def joined(
    name: str | None,
    module: nn.Module,
    weights: Weights,
    units: list[Unit],
    layouts: list[ImageLayout],
    packed: frozenset[int],
    store: HostStore,
) -> Iterator[SharedArena | None]:
    """The arena of this name; None without a name. Raises what `SharedArena.join` does.

    `packed`: the units whose images are packed: the arena has room for them whatever they will be.
    It is let go at the end: images hold what they stand on.
    """
    if name is None:
        yield None
        return
    identity = {
        "model": f"{type(module).__module__}.{type(module).__qualname__}",
        "granularity": granularity_of(units),
        "units": [[unit.name, _table(own)] for unit, own in zip(units, layouts, strict=True)],
        "packed blocks": sorted(packed),
        "weights": weights.identity(units, layouts),
    }
    sizes = [
        most_bytes(layout) if number in packed else layout.nbytes
        for number, layout in enumerate(layouts)
    ]
    arena = SharedArena.join(name, identity, sizes, store)
    try:
        yield arena
    finally:
        arena.close()


def _table(layout: ImageLayout) -> list[list[object]]:
    """Where each tensor of an image stands."""
    return [
        [spec.name, str(spec.dtype), [*spec.shape], [*spec.stride], spec.offset]
        for spec in layout.specs
    ]
