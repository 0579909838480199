"""`wanoffload pack --report`: what packing a checkpoint's blocks saves, tensor by tensor."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from wanoffload._C import HostImage, Packer, PackingPlan
from wanoffload.image import ImageLayout, TensorSpec
from wanoffload.loading.cache_writer import fill_each
from wanoffload.loading.packing import streamed_of
from wanoffload.packing import TILE_BYTES, tensors_of
from wanoffload.sizes import gb
from wanoffload.units import Unit

TILE_WEIGHTS = TILE_BYTES // 2
_COLUMNS = ("tensor", "of blocks", "dtype", "plain", "packed", "ratio", "escapes")


@dataclass
class Kind:
    """The tensors of one name in all blocks: how many, their bytes in plain and packed images,
    heads left out, how many weights are coded, and how many of those escape."""

    dtype: str
    count: int = 0
    plain: int = 0
    packed: int = 0
    coded: int = 0
    escapes: int = 0


@dataclass(frozen=True)
class Report:
    """`kinds`: by name in a block. `plain`, `packed`: bytes of all images, heads included."""

    model: str
    blocks: int
    kinds: dict[str, Kind]
    plain: int
    packed: int

    def as_text(self) -> str:
        """A table of all kinds, and a line of the whole."""
        rows = [_COLUMNS, *(_row(name, kind) for name, kind in self.kinds.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        coded = sum(kind.coded for kind in self.kinds.values())
        escapes = sum(kind.escapes for kind in self.kinds.values())
        lines.append(
            f"{self.blocks} blocks of {self.model}: {gb(self.plain)} plain, {gb(self.packed)} "
            f"packed, ratio {self.packed / self.plain:.4f}, {_share(escapes, coded)} of the packed "
            "weights escape"
        )
        return "\n".join(lines)


def report(
    path_or_id: str | os.PathLike[str],
    subfolder: str | None = "transformer",
    *,
    torch_dtype: torch.dtype | None,
    variant: str | None = None,
    revision: str | None = None,
) -> Report:
    """Reads a checkpoint's blocks and plans how they would be packed. Takes host memory for one
    block. Raises what `load` raises."""
    kinds: dict[str, Kind] = {}
    packed = 0

    def look(_: Unit, layout: ImageLayout, memory: HostImage) -> None:
        nonlocal packed
        plan = Packer(memory.address, memory.nbytes, tensors_of(layout)).plan
        packed += plan.packed_bytes
        _tally(kinds, layout, plan)

    with streamed_of(path_or_id, subfolder, torch_dtype, variant, revision) as of:
        fill_each(of.units, of.layouts, of.fill, look, "pack report")
        plain = sum(layout.nbytes for layout in of.layouts)
        return Report(type(of.module).__name__, len(of.units), kinds, plain, packed)


def _tally(kinds: dict[str, Kind], layout: ImageLayout, plan: PackingPlan) -> None:
    """Adds a block's tensors to their kinds."""
    for spec in layout.specs:
        kind = kinds.setdefault(spec.name, Kind(str(spec.dtype).removeprefix("torch.")))
        kind.count += 1
    for spec, codec, nbytes, escapes in _runs(layout, plan):
        kind = kinds[spec.name]
        tiles = nbytes // TILE_BYTES
        kind.plain += nbytes
        kind.packed += _coded_bytes(tiles, escapes) if codec else nbytes
        kind.coded += tiles * TILE_WEIGHTS if codec else 0
        kind.escapes += escapes


def _runs(layout: ImageLayout, plan: PackingPlan) -> Iterator[tuple[TensorSpec, int, int, int]]:
    """(tensor, codec, bytes of the plain image, escapes) of each run."""
    specs = [spec for spec in layout.specs if spec.nbytes > 0]
    starts = [spec.offset for spec in specs]
    for codec, offset, nbytes, _, _, escapes in plan.runs:
        yield specs[bisect_right(starts, offset) - 1], codec, nbytes, escapes


def _coded_bytes(tiles: int, escapes: int) -> int:
    """Of the sections of a run with codec 1."""
    return _up(4 * (tiles + 1)) + (1024 + 384) * tiles + _up(escapes)


def _up(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


def _row(name: str, kind: Kind) -> tuple[str, ...]:
    sizes = (f"{kind.plain / 1e6:.2f} MB", f"{kind.packed / 1e6:.2f} MB")
    ratio = f"{kind.packed / kind.plain:.4f}" if kind.plain else "-"
    return (name, str(kind.count), kind.dtype, *sizes, ratio, _share(kind.escapes, kind.coded))


def _share(escapes: int, weights: int) -> str:
    return f"{escapes / weights:.2%}" if weights else "-"
