"""Writes cache files: one unit after the other, under another name until the file is whole."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from tqdm import tqdm

from wanoffload import host_memory
from wanoffload._C import HostBackend, HostImage, HostStore, fingerprint
from wanoffload.errors import CacheFileError
from wanoffload.image import ImageLayout
from wanoffload.loading.cache_header import CachedUnit, CacheHeader
from wanoffload.loading.cache_identity import Identity, sources_of
from wanoffload.units import Unit

Named = TypeVar("Named")
Fill = Callable[[Unit, ImageLayout, HostImage], None]
"""Writes the tensors of a unit to their places in a new image."""


def write_cache(
    path: Path,
    identity: Identity,
    files: Sequence[Path],
    units: Sequence[Unit],
    layouts: Sequence[ImageLayout],
    fill: Fill,
) -> CacheHeader:
    """Writes a cache file and gives its header. Takes host memory for one unit at a time.

    Several processes may write the same file: each writes one of its own, under a name of its own,
    and the first that is whole stays. Whatever fails, nothing is left; a process that is killed
    leaves `<name>.<hex>.tmp`.

    Raises CacheFileError: too little space (looked at before), or it can't be written, or `files`,
    of which `identity` is, changed meanwhile.
    """
    header = CacheHeader.plan(identity, [unit.name for unit in units], layouts)
    path = path.resolve()
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        _require_space(path, header.file_bytes)
        with temporary.open("xb", buffering=0) as file:
            try:
                header = _write(file, header, units, layouts, fill)
                _check_unchanged(path, identity, files)
                if not path.exists():  # what somebody else wrote meanwhile stays
                    temporary.rename(path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CacheFileError(f"the cache file {path} can't be written: {error}") from error
    return header


def fill_each(
    units: Sequence[Named],
    layouts: Sequence[ImageLayout],
    fill: Callable[[Named, ImageLayout, HostImage], None],
    use: Callable[[Named, HostImage], None],
    title: str,
) -> None:
    """Fills the image of one unit after the other and has it used. A bar counts the bytes."""
    largest = max(layout.nbytes for layout in layouts)
    host_memory.require(largest, f"{title}: the image of one block")
    store = HostStore(HostBackend())
    total = sum(layout.nbytes for layout in layouts)
    with tqdm(total=total, unit="B", unit_scale=True, desc=title, leave=False, delay=1.0) as bar:
        for unit, layout in zip(units, layouts, strict=True):
            _fill_one(store, unit, layout, fill, use)
            bar.update(layout.nbytes)


def _fill_one(
    store: HostStore,
    unit: Named,
    layout: ImageLayout,
    fill: Callable[[Named, ImageLayout, HostImage], None],
    use: Callable[[Named, HostImage], None],
) -> None:
    memory = store.allocate(layout.nbytes)  # a new one: between its tensors are zeros
    fill(unit, layout, memory)
    use(unit, memory)


def _write(
    file: BinaryIO,
    header: CacheHeader,
    units: Sequence[Unit],
    layouts: Sequence[ImageLayout],
    fill: Fill,
) -> CacheHeader:
    places: dict[str, CachedUnit] = {unit.name: unit for unit in header.units}
    checksums: list[int] = []

    def write_image(unit: Unit, memory: HostImage) -> None:
        _write_at(file, places[unit.name].offset, memoryview(memory))
        os.fdatasync(file.fileno())  # so that the bar tells the truth and little waits in memory
        checksums.append(fingerprint(memory.address, memory.nbytes))

    fill_each(units, layouts, fill, write_image, "write cache")
    header = header.with_checksums(checksums)
    _write_at(file, 0, memoryview(header.encode()))
    file.truncate(header.file_bytes)
    os.fsync(file.fileno())
    return header


def _write_at(file: BinaryIO, offset: int, content: memoryview) -> None:
    file.seek(offset)
    while content:
        content = content[file.write(content) :]


def _require_space(path: Path, nbytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if nbytes > free:
        raise CacheFileError(
            f"the cache file {path} takes {nbytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free "
            "there. Free some, or give a path on another disk."
        )


def _check_unchanged(path: Path, identity: Identity, files: Sequence[Path]) -> None:
    if sources_of(files) != identity.sources:
        raise CacheFileError(
            f"the checkpoint's files in {files[0].parent} changed while {path} was made of them: "
            "load again when they are complete"
        )
