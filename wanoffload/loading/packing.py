"""`wanoffload pack` and `wanoffload check`: a cache file made of a checkpoint, and looked at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from wanoffload import host_memory
from wanoffload._C import HostBackend, HostImage, HostStore, PackedImage
from wanoffload.errors import CacheFileError, CheckpointError, TransferError, UsageError, WrapError
from wanoffload.image import ImageLayout, lay_out, leave_unlocked
from wanoffload.loading.cache_file import CacheFile
from wanoffload.loading.cache_header import CachedUnit, CacheHeader
from wanoffload.loading.cache_identity import identity_of
from wanoffload.loading.cache_writer import fill_each, write_cache
from wanoffload.loading.checkpoint import Checkpoint
from wanoffload.loading.describing import describe
from wanoffload.loading.stored_weights import StoredWeights
from wanoffload.packing import packs
from wanoffload.units import BLOCK, Unit, find_units


@dataclass(frozen=True)
class Streamed:
    """The streamed units of a checkpoint's model, and their weights, whose files are open."""

    module: nn.Module
    files: tuple[Path, ...]
    units: list[Unit]
    layouts: list[ImageLayout]
    weights: StoredWeights

    def fill(self, unit: Unit, layout: ImageLayout, memory: HostImage) -> None:
        """Reads a unit's tensors to their places in a new image."""
        self.weights.write(unit, layout, memory, leave_unlocked)


@contextmanager
def streamed_of(
    path_or_id: str | os.PathLike[str],
    subfolder: str | None,
    torch_dtype: torch.dtype | None,
    variant: str | None,
    revision: str | None,
    granularity: str = BLOCK,
) -> Iterator[Streamed]:
    """Of the model the class is that of its config. Raises what `load` raises."""
    checkpoint = Checkpoint.open(path_or_id, subfolder, variant=variant, revision=revision)
    described = describe(_class_of(checkpoint), checkpoint, torch_dtype)
    units = find_units(described.module, granularity)
    layouts = [lay_out((g[0].name, g[0].tensor) for g in unit.groups) for unit in units]
    weights = StoredWeights(described, torch.device("cpu"))
    weights.open_files()
    try:
        yield Streamed(described.module, checkpoint.files, units, layouts, weights)
    finally:
        weights.finish()


def pack(
    path_or_id: str | os.PathLike[str],
    out: str | os.PathLike[str],
    subfolder: str | None = "transformer",
    *,
    torch_dtype: torch.dtype | None,
    variant: str | None = None,
    revision: str | None = None,
    plain: bool = False,
    granularity: str = BLOCK,
) -> CacheHeader:
    """Writes the cache file that `load(..., cache=out, pack=not plain)` with the same arguments
    writes, which `load(..., cache=out, granularity=granularity)` reads.

    Takes host memory for one block, and for its packed image. Raises CacheFileError if `out` is
    there already or can't be written, WrapError if nothing can be packed, and what `load` raises.
    """
    out = Path(out)
    if out.exists():
        raise CacheFileError(f"{out} is there already; a cache file is never written over")
    with streamed_of(path_or_id, subfolder, torch_dtype, variant, revision, granularity) as of:
        packed = [n for n, layout in enumerate(of.layouts) if packs(layout) and not plain]
        if not packed and not plain:
            raise WrapError(
                f"no block of this {type(of.module).__name__} holds bf16 weights in {torch_dtype}, "
                "and nothing else is packed: ask for plain images (--plain), or bf16"
            )
        identity = identity_of(of.module, of.files)
        return write_cache(out, identity, of.files, of.units, of.layouts, of.fill, packed)


def check(path: str | os.PathLike[str]) -> CacheHeader:
    """Compares each image of a cache file with its checksum; unpacks those that are packed, and
    compares what comes out.

    Raises CacheFileError, which names every unit that is not what was written.
    """
    cache = CacheFile.open(path)
    bad: list[str] = []

    def check_one(unit: CachedUnit, stored: ImageLayout, memory: HostImage) -> None:
        try:
            cache.fill(unit.name, memory)
            if unit.packed:
                _check_packed(unit, memory)
        except TransferError as error:
            bad.append(str(error))

    units = cache.header.units
    stored = [ImageLayout((), unit.nbytes) for unit in units]
    fill_each(units, stored, check_one, lambda *_: None, "check cache")
    if bad:
        raise CacheFileError(f"{len(bad)} of {len(units)} units are spoilt. " + "\n".join(bad))
    return cache.header


def _check_packed(unit: CachedUnit, memory: HostImage) -> None:
    """Its bytes are those that were written. Raises TransferError if they unpack to others than
    were packed."""
    host_memory.require(unit.layout.nbytes, f"unpacking {unit.name}")
    plain = HostStore(HostBackend()).allocate(unit.layout.nbytes)
    try:
        PackedImage(memory).unpack(0, plain.nbytes, plain.address)
    except (TransferError, UsageError) as error:
        raise TransferError(f"{unit.name} can't be unpacked: {error}") from error


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
