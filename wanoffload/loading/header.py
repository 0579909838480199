"""The header of a safetensors file: which tensors it holds, and where. Without torch.

The format is documented at https://github.com/huggingface/safetensors: 8 bytes give the length of
the header (little endian), the header is a JSON object, and the rest is the tensors' bytes, without
gaps. The library doesn't tell where in the file a tensor begins, so the header is read here; what
the library refuses is refused.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from wanoffload.errors import CheckpointError

LARGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""

_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32}
_BITS |= {"U64": 64, "I64": 64, "BF16": 16, "F16": 16, "F32": 32, "F64": 64, "C64": 64}
_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8}
_BITS |= {"F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2": 8, "F8_E5M2FNUZ": 8}
"""Bits of an element, by the format's names."""

_LFS_POINTER = b"version https://git-lfs"
_METADATA = "__metadata__"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: dense, in the order of its shape.

    `dtype`: the format's name ("BF16"). `offset`: of its first byte, from the beginning of the
    file; the tensors of a file are aligned to nothing.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name, in the order of their bytes. Reads the header alone.

    Raises CheckpointError, which names the file, for whatever is not a whole safetensors file.
    """
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            start = opened.read(8)
            length = _header_length(file, start + opened.read(32))
            opened.seek(8)
            text = opened.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; is the download complete?") from None
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error}") from error
    if len(text) < length:
        _incomplete(file, f"Its header ends at byte {8 + length}, the file at byte {size}")
    tensors = [_tensor(file, name, row, 8 + length) for name, row in _rows(file, text).items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_places(file, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def _broken(file: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"{file} is not a sound safetensors file: {reason}")


def _incomplete(file: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"{file} can't be read, is it complete? {reason}")


def _header_length(file: Path, start: bytes) -> int:
    """`start`: the first bytes of the file."""
    if start.startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{file} is a pointer of git-lfs and not the weights themselves: run `git lfs pull` in "
            "its repository"
        )
    if len(start) < 8:
        _incomplete(file, f"It has {len(start)} bytes; the length of the header alone takes 8")
    length = int.from_bytes(start[:8], "little")
    if length > LARGEST_HEADER:
        _broken(file, f"its header would have {length} bytes; {LARGEST_HEADER} are permitted")
    return length


def _rows(file: Path, text: bytes) -> dict[str, Any]:
    """Name and description of each tensor, as they stand in the header."""
    try:
        pairs = json.loads(text.decode("utf-8"), object_pairs_hook=_Pairs)
    except ValueError as error:  # bad JSON or bad UTF-8
        _broken(file, f"its header is not JSON: {error}")
    if not isinstance(pairs, _Pairs):
        _broken(file, "its header is not a JSON object")
    rows: dict[str, Any] = {}
    for name, row in pairs:
        if name in rows:
            _broken(file, f"its header names {name} twice")
        rows[name] = dict(row) if isinstance(row, _Pairs) else row
    rows.pop(_METADATA, None)
    return rows


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its names in order, those that stand twice included."""


def _tensor(file: Path, name: str, row: Any, first_byte: int) -> StoredTensor:
    """`first_byte`: of the file's data, to which the header's offsets relate."""
    try:
        dtype, shape, (begin, end) = row["dtype"], row["shape"], row["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        _broken(file, f"the header's entry of {name} lacks dtype, shape or data_offsets: {row!r}")
    if any(type(number) is not int or number < 0 for number in numbers) or begin > end:
        _broken(file, f"{name} has shape {shape} and stands at bytes {begin} to {end}")
    if dtype not in _BITS:
        _broken(file, f"{name} has the dtype {dtype!r}, which is unknown")
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (end - begin):
        _broken(
            file, f"{name} of shape {shape} in {dtype} takes {bits / 8:g} bytes, not {end - begin}"
        )
    return StoredTensor(file, name, dtype, tuple(shape), first_byte + begin, end - begin)


def _check_places(file: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """`tensors` in order, from `start` to the end of the file, with no gap and no overlap."""
    end, before = start, "the header"
    for tensor in tensors:
        if tensor.offset != end:
            how = "overlaps" if tensor.offset < end else "leaves a gap behind"
            _broken(
                file,
                f"{tensor.name} {how} {before}: it begins at byte {tensor.offset}, and {before} "
                f"ends at byte {end}",
            )
        end, before = tensor.offset + tensor.nbytes, tensor.name
    if end > size:
        _incomplete(file, f"Its last tensor, {before}, ends at byte {end}, the file at byte {size}")
    if end < size:
        _broken(file, f"the file has {size} bytes, and its tensors end at byte {end}")
