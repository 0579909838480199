"""Writes cache files: one unit after the other, under another name until the file is whole."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

from tqdm import tqdm

from wanoffload import host_memory
from wanoffload._C import HostBackend, HostImage, HostStore, fingerprint
from wanoffload.errors import CacheFileError
from wanoffload.image import ImageLayout
from wanoffload.loading.cache_header import CacheHeader, whole_blocks
from wanoffload.loading.cache_identity import Identity, sources_of
from wanoffload.packing import estimated_bytes, pack_on_host
from wanoffload.sizes import gb
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
    packed: Collection[int] = (),
) -> CacheHeader:
    """Writes a cache file and gives its header. Takes host memory for one unit at a time, and for
    its packed image where it is packed. `packed`: which units are, by their numbers.

    Several processes may write the same file: each writes one of its own, under a name of its own,
    and the first that is whole stays. Whatever fails, nothing is left; a process that is killed
    leaves `<name>.<hex>.tmp`.

    Raises CacheFileError: too little space (looked at before), or it can't be written, or `files`,
    of which `identity` is, changed meanwhile.
    """
    header = CacheHeader.plan(identity, [unit.name for unit in units], layouts, packed)
    path = path.resolve()
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        _require_space(path, header, layouts)
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
    use: Callable[[Named, ImageLayout, HostImage], None],
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
    use: Callable[[Named, ImageLayout, HostImage], None],
) -> None:
    memory = store.allocate(layout.nbytes)  # a new one: between its tensors are zeros
    fill(unit, layout, memory)
    use(unit, layout, memory)


def _write(
    file: BinaryIO,
    header: CacheHeader,
    units: Sequence[Unit],
    layouts: Sequence[ImageLayout],
    fill: Fill,
) -> CacheHeader:
    packs: dict[str, bool] = {unit.name: unit.packed for unit in header.units}
    sizes: list[int] = []
    checksums: list[int] = []
    end = header.nbytes

    def write_image(unit: Unit, layout: ImageLayout, memory: HostImage) -> None:
        nonlocal end
        if packs[unit.name]:
            memory = pack_on_host(layout, memory, HostStore(HostBackend()))
        _write_at(file, end, memoryview(memory))
        os.fdatasync(file.fileno())  # so that the bar tells the truth and little waits in memory
        sizes.append(memory.nbytes)
        checksums.append(fingerprint(memory.address, memory.nbytes))
        end += whole_blocks(memory.nbytes)

    fill_each(units, layouts, fill, write_image, "write cache")
    header = header.placed(sizes, checksums)
    _write_at(file, 0, memoryview(header.encode()))
    file.truncate(header.file_bytes)
    os.fsync(file.fileno())
    return header


def _write_at(file: BinaryIO, offset: int, content: memoryview) -> None:
    file.seek(offset)
    while content:
        content = content[file.write(content) :]


def _require_space(path: Path, header: CacheHeader, layouts: Sequence[ImageLayout]) -> None:
    """What packed images take is an estimate; if it is too low, writing fails."""
    pairs = zip(header.units, layouts, strict=True)
    images = [estimated_bytes(own) if unit.packed else own.nbytes for unit, own in pairs]
    nbytes = header.nbytes + sum(map(whole_blocks, images))
    free = shutil.disk_usage(path.parent).free
    if nbytes > free:
        about = "about " if any(unit.packed for unit in header.units) else ""
        raise CacheFileError(
            f"the cache file {path} takes {about}{gb(nbytes)}, and {gb(free)} are free there. "
            "Free some, or give a path on another disk."
        )


def _check_unchanged(path: Path, identity: Identity, files: Sequence[Path]) -> None:
    if sources_of(files) != identity.sources:
        raise CacheFileError(
            f"the checkpoint's files in {files[0].parent} changed while {path} was made of them: "
            "load again when they are complete"
        )
