"""A cache file: the images of a model's units as they stand in memory. Opened, believed or refused.

docs/cache-file.md is the format.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from wanoffload._C import FileImage, HostImage, PackedImage, SourceFile, TransferError
from wanoffload.errors import CacheFileError
from wanoffload.image import ImageLayout
from wanoffload.loading.cache_header import (
    START_BYTES,
    CachedUnit,
    CacheHeader,
    HeaderError,
    decode,
    json_bytes,
)
from wanoffload.loading.cache_identity import Identity, Source
from wanoffload.units import BLOCK, CALLED, PART

_REMEDY = "Give another path, or delete the file to have it written anew."


class CacheFile:
    """An open cache file, whole as far as its header and size say. Nothing is ever written to it.

    `units`: what it holds, by name. Images are compared with their checksums when they are read.
    """

    def __init__(self, path: Path, file: SourceFile, header: CacheHeader) -> None:
        self.path = path
        self.header = header
        self.units: dict[str, CachedUnit] = {unit.name: unit for unit in header.units}
        self._file = file

    @staticmethod
    def open(path: str | os.PathLike[str]) -> CacheFile:
        """Reads the header. Raises CacheFileError for what is no whole cache file."""
        path = Path(path)
        try:
            file = SourceFile(str(path), direct=True)
            return CacheFile(path, file, _read_header(file))
        except (HeaderError, TransferError) as error:
            raise CacheFileError(f"{path} can't be used as a cache: {error}. {_REMEDY}") from error

    def refuse(self, reason: str) -> NoReturn:
        """Raises CacheFileError, with the path and what can be done."""
        raise CacheFileError(f"the cache file {self.path} does not fit: {reason}. {_REMEDY}")

    @property
    def packed(self) -> bool:
        """Whether some of its images are."""
        return any(unit.packed for unit in self.header.units)

    # Whose it is.

    def check_model(
        self, identity: Identity, names: Sequence[str], layouts: Sequence[ImageLayout]
    ) -> None:
        """Raises CacheFileError unless it holds exactly these units, of a model like this."""
        own = self.header.identity
        if own.model != identity.model:
            self.refuse(f"it is of a {own.model}, and this is a {identity.model}")
        if own.config != identity.config:
            self.refuse(f"it is of a {own.model} with another config")
        for reason in self._other_units(dict(zip(names, layouts, strict=True))):
            self.refuse(reason)

    def _other_units(self, wanted: dict[str, ImageLayout]) -> Iterator[str]:
        yield from _other_granularity(self.units.keys(), wanted.keys())
        for name in sorted(wanted.keys() ^ self.units.keys()):
            yield f"only {'the model' if name in wanted else 'the file'} has a unit {name}"
        for name, layout in wanted.items():
            yield from (f"{name}: {text}" for text in _differences(self.units[name].layout, layout))

    def is_of(self, sources: tuple[Source, ...]) -> bool:
        """Whether it was made of these files as they are now.

        False if only a comparison of all bytes can tell: the files were touched, or the cache was
        written from a model in memory. Raises CacheFileError if they are others.
        """
        own = self.header.identity.sources
        if not own or not sources:
            return False
        before = {source.name: source for source in own}
        now = {source.name: source for source in sources}
        if before.keys() != now.keys():
            self.refuse(f"it was made of {', '.join(before)}, and not of {', '.join(now)}")
        for name, source in now.items():
            if source.nbytes != before[name].nbytes:
                self.refuse(f"{name} had {before[name].nbytes} bytes, and has {source.nbytes} now")
            if source.digest != before[name].digest:
                self.refuse(f"{name} holds other bytes than those it was made of")
        return all(source.mtime_ns == before[name].mtime_ns for name, source in now.items())

    # Images.

    def image(self, name: str) -> FileImage | PackedImage:
        """A unit's image where it stands in the file; its checksum is compared as it is read.

        Raises TransferError if it is packed and its head can't be read, or is spoilt.
        """
        stored, unit = self._stored(name), self.units[name]
        if not unit.packed:
            return stored
        with _named(name):
            packed = PackedImage(stored)
            if packed.plain_bytes != unit.layout.nbytes:
                raise TransferError(f"it unpacks to {packed.plain_bytes} bytes")
            return packed

    def plain_checksum(self, name: str) -> int:
        """Of a unit's plain image, as it was written there. Raises what `image` does."""
        image = self.image(name)
        return (
            image.plain_fingerprint if isinstance(image, PackedImage) else self.units[name].checksum
        )

    def fill(self, name: str, memory: HostImage) -> None:
        """Reads a unit's image, as it stands there, into memory. Raises TransferError, which names
        unit, file and place, if it could not be read or is not what was written there."""
        with _named(name):
            memory.copy_from(self._stored(name))

    def _stored(self, name: str) -> FileImage:
        unit = self.units[name]
        extent = (self._file, unit.offset, unit.nbytes, 0)
        return FileImage([extent], unit.nbytes, fingerprint=unit.checksum)


@contextmanager
def _named(unit: str) -> Iterator[None]:
    """A TransferError names the unit, and says what can be done."""
    try:
        yield
    except TransferError as error:
        raise TransferError(
            f"{unit} can't be taken from the cache file: {error}. Delete the file to have it "
            "written anew."
        ) from error


def _read_header(file: SourceFile) -> CacheHeader:
    start = _bytes(file, 0, min(START_BYTES, file.nbytes))
    text = _bytes(file, START_BYTES, json_bytes(start, file.nbytes))
    return decode(start, text, file.nbytes)


def _bytes(file: SourceFile, offset: int, nbytes: int) -> bytes:
    """Through the file that is open, so that header and images are of one file."""
    place = torch.empty(nbytes, dtype=torch.uint8)
    FileImage([(file, offset, nbytes, 0)], nbytes).read(0, nbytes, place.data_ptr())
    return place.numpy().tobytes()


def _other_granularity(held: Collection[str], asked: Collection[str]) -> Iterator[str]:
    """A sentence, if units of these names are blocks on one side and parts of them on the other."""
    for blocks, parts, there, here in ((held, asked, BLOCK, PART), (asked, held, PART, BLOCK)):
        starts = tuple(f"{name}." for name in blocks)
        if any(name.startswith(starts) for name in parts):
            yield (
                f"it holds {CALLED[there]}, and {CALLED[here]} are asked for "
                f"(granularity={there!r} fits it)"
            )


def _differences(cached: ImageLayout, wanted: ImageLayout) -> Iterator[str]:
    """What is different in a unit's table, as sentences."""
    for old, new in zip(cached.specs, wanted.specs, strict=False):
        if old.name != new.name:
            yield f"the file has {old.name} where the model has {new.name}"
        for what in ("dtype", "shape", "stride", "offset"):
            there, here = getattr(old, what), getattr(new, what)
            if there != here:
                yield f"{old.name} has {what} {_plain(there)} there, and {_plain(here)} here"
    if len(cached.specs) != len(wanted.specs):
        yield f"it holds {len(cached.specs)} tensors there, and {len(wanted.specs)} here"
    if cached.nbytes != wanted.nbytes:
        yield f"it takes {cached.nbytes} bytes there, and {wanted.nbytes} here"


def _plain(value: object) -> str:
    return str(tuple(value) if isinstance(value, torch.Size) else value)
