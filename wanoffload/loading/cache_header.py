"""The first bytes of a cache file: what it holds, and where. docs/cache-file.md is the format."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wanoffload.apart import BLOCK as WHOLE_BLOCK
from wanoffload.apart import PART
from wanoffload.image import ImageLayout, TensorSpec
from wanoffload.loading.cache_identity import Identity, Source
from wanoffload.packing import most_bytes

MAGIC = b"\x93WOCACHE"
PLAIN_VERSION, PACKED_VERSION = 1, 2
"""Of the format: the second is that of files in which an image is packed."""
BLOCK = 4096
"""Bytes between which images start: what O_DIRECT asks for."""
START = struct.Struct("<8sQQQ")
"""Magic, version of the format, bytes of the JSON, bytes of the file."""
START_BYTES = START.size + hashlib.sha256().digest_size


class HeaderError(ValueError):
    """These bytes are no header of a whole cache file of this version. The text says why."""


@dataclass(frozen=True)
class CachedUnit:
    """`layout`: of the plain image. `offset`: of the image, in the file. `nbytes`: of it as it
    stands there, `checksum`: `_C.fingerprint` of them. `packed`: it is a packed one."""

    name: str
    layout: ImageLayout
    offset: int
    nbytes: int
    checksum: int
    packed: bool = False


@dataclass(frozen=True)
class CacheHeader:
    """`nbytes`: of the header; `file_bytes`: of the whole file. Both multiples of BLOCK."""

    identity: Identity
    units: tuple[CachedUnit, ...]
    nbytes: int
    file_bytes: int

    @property
    def granularity(self) -> str | None:
        """What the images are of: blocks, or some of them parts of blocks; None: there is none."""
        in_parts = any(unit.name.count(".") > 1 for unit in self.units)  # "blocks.0.attn1"
        return (PART if in_parts else WHOLE_BLOCK) if self.units else None

    @staticmethod
    def plan(
        identity: Identity,
        names: Sequence[str],
        layouts: Sequence[ImageLayout],
        packed: Collection[int] = (),
    ) -> CacheHeader:
        """Room for a header with images of these layouts. Offsets, checksums and the sizes of
        packed images are still to come; its size is that of the one that `placed` gives.

        `packed`: which of them are packed, by their numbers.
        """
        units, end = [], 0
        for number, (name, layout) in enumerate(zip(names, layouts, strict=True)):
            most = most_bytes(layout) if number in packed else layout.nbytes
            units.append(CachedUnit(name, layout, end, most, 0, number in packed))
            end += whole_blocks(most)
        nbytes = whole_blocks(START_BYTES + len(_text(tuple(units), identity, 0)))
        return CacheHeader(identity, tuple(units), nbytes, nbytes + end)

    def placed(self, sizes: Sequence[int], checksums: Sequence[int]) -> CacheHeader:
        """With each image behind the one before it."""
        units, end = [], self.nbytes
        for unit, nbytes, checksum in zip(self.units, sizes, checksums, strict=True):
            placed = dataclasses.replace(unit, offset=end, nbytes=nbytes, checksum=checksum)
            units.append(placed)
            end += whole_blocks(nbytes)
        return CacheHeader(self.identity, tuple(units), self.nbytes, end)

    def encode(self) -> bytes:
        """`nbytes` bytes."""
        text = _text(self.units, self.identity, self.nbytes)
        packed = any(unit.packed for unit in self.units)
        version = PACKED_VERSION if packed else PLAIN_VERSION
        if packed:  # where images begin follows from the length of the text
            text = text.ljust(self.nbytes - START_BYTES, b" ")
        start = START.pack(MAGIC, version, len(text), self.file_bytes)
        return (start + hashlib.sha256(start + text).digest() + text).ljust(self.nbytes, b"\0")


def whole_blocks(nbytes: int) -> int:
    """`nbytes`, rounded up to a multiple of BLOCK."""
    return -(-nbytes // BLOCK) * BLOCK


def json_bytes(start: bytes, file_bytes: int) -> int:
    """How long the JSON behind these first START_BYTES of a file is. Raises HeaderError."""
    if len(start) < START_BYTES or start[: len(MAGIC)] != MAGIC:
        raise HeaderError("it is no cache file of wanoffload")
    _, version, length, _ = START.unpack_from(start)
    if version not in (PLAIN_VERSION, PACKED_VERSION):
        raise HeaderError(f"it is of version {version} of the format, not of version 1 or 2")
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


def _text(units: tuple[CachedUnit, ...], identity: Identity, images_start: int) -> bytes:
    rows = {
        **dataclasses.asdict(identity),
        "units": [_unit_row(unit, images_start) for unit in units],
    }
    return json.dumps(rows, separators=(",", ":")).encode()


def _unit_row(unit: CachedUnit, images_start: int) -> dict[str, Any]:
    packed = {"packed": True, "plain_nbytes": unit.layout.nbytes} if unit.packed else {}
    return {
        "name": unit.name,
        "offset": unit.offset - images_start,
        "nbytes": unit.nbytes,
        **packed,
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
        if unit.offset % BLOCK or not nbytes <= unit.offset <= file_bytes - unit.nbytes:
            raise ValueError(f"{unit.name} would stand at byte {unit.offset}")
    return CacheHeader(Identity(rows["model"], rows["config"], sources), units, nbytes, file_bytes)


def _unit(row: Any, images_start: int) -> CachedUnit:
    packed = row.get("packed", False)
    plain_bytes = row["plain_nbytes"] if packed else row["nbytes"]
    layout = ImageLayout(tuple(_spec(spec) for spec in row["tensors"]), plain_bytes)
    offset, checksum = images_start + row["offset"], int(row["checksum"], 16)
    return CachedUnit(row["name"], layout, offset, row["nbytes"], checksum, packed)


def _spec(row: Any) -> TensorSpec:
    dtype = getattr(torch, row["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{row['dtype']} is no dtype")
    shape = torch.Size(row["shape"])
    return TensorSpec(row["name"], dtype, shape, tuple(row["stride"]), row["offset"])
