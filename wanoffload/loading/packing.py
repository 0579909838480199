"""`wanoffload pack` and `wanoffload check`: a cache file made of a checkpoint, and looked at."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from wanoffload._C import HostImage
from wanoffload.errors import CacheFileError, CheckpointError, TransferError
from wanoffload.image import ImageLayout, lay_out, leave_unlocked
from wanoffload.loading.cache_file import CacheFile
from wanoffload.loading.cache_header import CachedUnit, CacheHeader
from wanoffload.loading.cache_identity import identity_of
from wanoffload.loading.cache_writer import fill_each, write_cache
from wanoffload.loading.checkpoint import Checkpoint
from wanoffload.loading.describing import describe
from wanoffload.loading.stored_weights import StoredWeights
from wanoffload.units import Unit, find_units


def pack(
    path_or_id: str | os.PathLike[str],
    out: str | os.PathLike[str],
    subfolder: str | None = "transformer",
    *,
    torch_dtype: torch.dtype | None,
    variant: str | None = None,
    revision: str | None = None,
) -> CacheHeader:
    """Writes the cache file that `load(..., cache=out)` with the same arguments reads.

    Of the model the class is that of its config. Takes host memory for one block. Raises
    CacheFileError if `out` is there already or can't be written, and what `load` raises.
    """
    out = Path(out)
    if out.exists():
        raise CacheFileError(f"{out} is there already; a cache file is never written over")
    checkpoint = Checkpoint.open(path_or_id, subfolder, variant=variant, revision=revision)
    described = describe(_class_of(checkpoint), checkpoint, torch_dtype)
    units = find_units(described.module)
    layouts = [lay_out((g[0].name, g[0].tensor) for g in unit.groups) for unit in units]
    identity = identity_of(described.module, checkpoint.files)
    weights = StoredWeights(described, torch.device("cpu"))

    def fill(unit: Unit, layout: ImageLayout, memory: HostImage) -> None:
        weights.write(unit, layout, memory, leave_unlocked)

    weights.open_files()
    try:
        return write_cache(out, identity, checkpoint.files, units, layouts, fill)
    finally:
        weights.finish()


def check(path: str | os.PathLike[str]) -> CacheHeader:
    """Compares each image of a cache file with its checksum.

    Raises CacheFileError, which names every unit that is not what was written.
    """
    cache = CacheFile.open(path)
    bad: list[str] = []

    def fill(unit: CachedUnit, layout: ImageLayout, memory: HostImage) -> None:
        try:
            cache.fill(unit.name, memory)
        except TransferError as error:
            bad.append(str(error))

    units = cache.header.units
    fill_each(units, [unit.layout for unit in units], fill, lambda *_: None, "check cache")
    if bad:
        raise CacheFileError(f"{len(bad)} of {len(units)} units are spoilt. " + "\n".join(bad))
    return cache.header


def _class_of(checkpoint: Checkpoint) -> type[nn.Module]:
    import diffusers

    name = checkpoint.config.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type):
        raise CheckpointError(
            f"{checkpoint.config_file} describes a model of class {name}, which this diffusers "
            f"({diffusers.__version__}) does not have"
        )
    return cls
