"""The first bytes of a cache file: what it holds, and where. docs/cache-file.md is the format."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wanoffload.image import ImageLayout, TensorSpec
from wanoffload.loading.cache_identity import Identity, Source

MAGIC = b"\x93WOCACHE"
VERSION = 1
BLOCK = 4096
"""Bytes between which images start: what O_DIRECT asks for."""
START = struct.Struct("<8sQQQ")
"""Magic, version of the format, bytes of the JSON, bytes of the file."""
START_BYTES = START.size + hashlib.sha256().digest_size


class HeaderError(ValueError):
    """These bytes are no header of a whole cache file of this version. The text says why."""


@dataclass(frozen=True)
class CachedUnit:
    """`offset`: of the image, in the file. `checksum`: `_C.fingerprint` of the image."""

    name: str
    layout: ImageLayout
    offset: int
    checksum: int


@dataclass(frozen=True)
class CacheHeader:
    """`nbytes`: of the header; `file_bytes`: of the whole file. Both multiples of BLOCK."""

    identity: Identity
    units: tuple[CachedUnit, ...]
    nbytes: int
    file_bytes: int

    @staticmethod
    def plan(
        identity: Identity, names: Sequence[str], layouts: Sequence[ImageLayout]
    ) -> CacheHeader:
        """Gives each image its place; the checksums are still to come."""
        offsets, end = [], 0
        for layout in layouts:
            offsets.append(end)
            end += whole_blocks(layout.nbytes)
        units = map(CachedUnit, names, layouts, offsets, [0] * len(offsets))
        flat = CacheHeader(identity, tuple(units), 0, end)
        nbytes = whole_blocks(START_BYTES + len(_text(flat)))
        moved = [dataclasses.replace(unit, offset=nbytes + unit.offset) for unit in flat.units]
        return CacheHeader(identity, tuple(moved), nbytes, nbytes + end)

    def with_checksums(self, checksums: Sequence[int]) -> CacheHeader:
        pairs = zip(self.units, checksums, strict=True)
        units = tuple(dataclasses.replace(unit, checksum=checksum) for unit, checksum in pairs)
        return dataclasses.replace(self, units=units)

    def encode(self) -> bytes:
        """Of the same length whatever the checksums are."""
        text = _text(self)
        start = START.pack(MAGIC, VERSION, len(text), self.file_bytes)
        return (start + hashlib.sha256(start + text).digest() + text).ljust(self.nbytes, b"\0")


def whole_blocks(nbytes: int) -> int:
    """`nbytes`, rounded up to a multiple of BLOCK."""
    return -(-nbytes // BLOCK) * BLOCK


def json_bytes(start: bytes, file_bytes: int) -> int:
    """How long the JSON behind these first START_BYTES of a file is. Raises HeaderError."""
    if len(start) < START_BYTES or start[: len(MAGIC)] != MAGIC:
        raise HeaderError("it is no cache file of wanoffload")
    _, version, length, _ = START.unpack_from(start)
    if version != VERSION:
        raise HeaderError(f"it is of version {version} of the format, not of version {VERSION}")
    if START_BYTES + length > file_bytes:
        raise HeaderError(f"it has {file_bytes} bytes and ends within its header: it was cut short")
    return int(length)


def decode(start: bytes, text: bytes, file_bytes: int) -> CacheHeader:
    """The header of a file of so many bytes. Raises HeaderError for any other than a whole one."""
    if hashlib.sha256(start[: START.size] + text).digest() != start[START.size :]:
        raise HeaderError("its header is spoilt: the checksum is another")
    wanted = START.unpack_from(start)[3]
    if file_bytes != wanted:
        raise HeaderError(f"it has {file_bytes} bytes, and was written with {wanted}")
    try:
        return _header(json.loads(text), whole_blocks(START_BYTES + len(text)), file_bytes)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise HeaderError(f"its header makes no sense: {error}") from error


# The JSON.


def _text(header: CacheHeader) -> bytes:
    identity = dataclasses.asdict(header.identity)
    rows = {**identity, "units": [_unit_row(unit, header.nbytes) for unit in header.units]}
    return json.dumps(rows, separators=(",", ":")).encode()


def _unit_row(unit: CachedUnit, images_start: int) -> dict[str, Any]:
    return {
        "name": unit.name,
        "offset": unit.offset - images_start,
        "nbytes": unit.layout.nbytes,
        "checksum": f"{unit.checksum:016x}",
        "tensors": [
            {
                "name": spec.name,
                "dtype": str(spec.dtype).removeprefix("torch."),
                "shape": list(spec.shape),
                "stride": list(spec.stride),
                "offset": spec.offset,
            }
            for spec in unit.layout.specs
        ],
    }


def _header(rows: Any, nbytes: int, file_bytes: int) -> CacheHeader:
    sources = tuple(Source(**row) for row in rows["sources"])
    units = tuple(_unit(row, nbytes) for row in rows["units"])
    for unit in units:
        if unit.offset % BLOCK or not nbytes <= unit.offset <= file_bytes - unit.layout.nbytes:
            raise ValueError(f"{unit.name} would stand at byte {unit.offset}")
    return CacheHeader(Identity(rows["model"], rows["config"], sources), units, nbytes, file_bytes)


def _unit(row: Any, images_start: int) -> CachedUnit:
    layout = ImageLayout(tuple(_spec(spec) for spec in row["tensors"]), row["nbytes"])
    return CachedUnit(row["name"], layout, images_start + row["offset"], int(row["checksum"], 16))


def _spec(row: Any) -> TensorSpec:
    dtype = getattr(torch, row["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{row['dtype']} is no dtype")
    shape = torch.Size(row["shape"])
    return TensorSpec(row["name"], dtype, shape, tuple(row["stride"]), row["offset"])
