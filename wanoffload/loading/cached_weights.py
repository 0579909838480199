"""A cache file in front of wherever weights come from: read if it matches, written if it is not
there, refused if it is another's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from torch import nn

from wanoffload._C import HostImage, Image, fingerprint
from wanoffload.binding import Binding
from wanoffload.errors import CacheFileError
from wanoffload.host_tiers import HostPlan
from wanoffload.image import ImageLayout, Lock, leave_unlocked
from wanoffload.loading.cache_file import CacheFile
from wanoffload.loading.cache_identity import identity_of
from wanoffload.loading.cache_writer import fill_each, write_cache
from wanoffload.pack_choice import Cached
from wanoffload.units import Unit
from wanoffload.weights import Identity, Weights

logger = logging.getLogger(__name__)


def granularity_in(path: Path) -> str | None:
    """What the images of a cache file are of: blocks, or some of them parts of blocks. None: there
    is no file, or none that can be used, of which who uses it is told."""
    try:
        return CacheFile.open(path).header.granularity if path.exists() else None
    except CacheFileError:
        return None


class CachedWeights:
    """`inner`, with the images of its units in a cache file: `wanoffload.weights`.

    `files`: the safetensors files that `inner` reads; none if it has the weights in memory. Then
    all bytes are compared with those of a cache file that is found, and units that stay in memory
    are written from there.
    """

    def __init__(
        self, inner: Weights, model: nn.Module, path: Path, files: Sequence[Path] = ()
    ) -> None:
        self._inner = inner
        self._path = path
        self._files = files
        self._identity = identity_of(model, files)
        self._cache: CacheFile | None = None

    def why_not_in_files(self, unit: Unit, packed: bool) -> None:
        """Every unit can stand in the cache file, plain or packed."""

    def cached(self, units: list[Unit], layouts: list[ImageLayout]) -> Cached | None:
        if self._cache is None and not self._path.exists():
            return None
        cache = self._cache or CacheFile.open(self._path)
        cache.check_model(self._identity, [unit.name for unit in units], layouts)
        own = [cache.units[unit.name] for unit in units]
        return Cached(self._path, tuple(u.packed for u in own), tuple(u.nbytes for u in own))

    def identity(self, units: list[Unit], layouts: list[ImageLayout]) -> Identity:
        return self._inner.identity(units, layouts)

    def room(self, units: list[Unit], layouts: list[ImageLayout]) -> int:
        return self._inner.room(units, layouts)

    def prepare(self, units: list[Unit], layouts: list[ImageLayout], plan: HostPlan) -> None:
        """Writes the cache file, or proves that the one that is there is of these weights.

        Raises CacheFileError if it is not, or can't be written.
        """
        self._inner.prepare(units, layouts, plan)
        written = None
        if not self._path.exists():
            written = write_cache(
                self._path, self._identity, self._files, units, layouts, self._fill, plan.packed
            )
        self._cache = CacheFile.open(self._path)
        if self._cache.header != written:
            self._match(self._cache, units, layouts)
            self._check_packed(self._cache, units, plan)

    def place_others(self, streamed: set[int]) -> None:
        self._inner.place_others(streamed)

    def write(
        self,
        unit: Unit,
        layout: ImageLayout,
        memory: HostImage,
        lock: Lock,
    ) -> None:
        if not self._files and not self._opened.units[unit.name].packed:
            self._inner.write(unit, layout, memory, lock)
            return
        self._opened.fill(unit.name, memory)
        lock(memory, False)

    def source(self, unit: Unit, layout: ImageLayout) -> NoReturn:
        raise AssertionError("what is packed is packed in the cache file")

    def in_files(self, unit: Unit, layout: ImageLayout) -> Image:
        return self._opened.image(unit.name)

    def finish(self) -> None:
        self._inner.finish()
        self._cache = None  # images in it keep it open

    def undo(self, bound: list[Binding]) -> None:
        self._inner.undo(bound)
        self._cache = None

    @property
    def _opened(self) -> CacheFile:
        assert self._cache is not None
        return self._cache

    def _fill(self, unit: Unit, layout: ImageLayout, memory: HostImage) -> None:
        """From where the weights come from, into ordinary memory."""
        self._inner.write(unit, layout, memory, leave_unlocked)

    def _check_packed(self, cache: CacheFile, units: Sequence[Unit], plan: HostPlan) -> None:
        """The file may have been written by another process, since it was looked at."""
        for number, unit in enumerate(units):
            if cache.units[unit.name].packed != (number in plan.packed):
                asked, there = (
                    ("plain", "packed") if number not in plan.packed else ("packed", "plain")
                )
                cache.refuse(f"{unit.name} is {there} there, and asked for {asked}")

    def _match(
        self, cache: CacheFile, units: Sequence[Unit], layouts: Sequence[ImageLayout]
    ) -> None:
        cache.check_model(self._identity, [unit.name for unit in units], layouts)
        if cache.is_of(self._identity.sources):
            return

        def compare(unit: Unit, _: ImageLayout, memory: HostImage) -> None:
            if fingerprint(memory.address, memory.nbytes) != cache.plain_checksum(unit.name):
                cache.refuse(f"the weights of {unit.name} are others than those in the file")

        fill_each(units, layouts, self._fill, compare, "compare cache")
        if self._files:
            logger.warning(
                "%s: the checkpoint's files are not those it was made of, as far as their times "
                "say. All their weights were compared with it and are the same; this takes a whole "
                "reading of the checkpoint each time. Delete the cache file to have it written "
                "anew.",
                cache.path,
            )
