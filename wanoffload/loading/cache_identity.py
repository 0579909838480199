"""What a cache file was made of: the model, and the files that its weights were read from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import nn

from wanoffload.errors import CheckpointError

SAMPLES = 64
SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Source:
    """A safetensors file as it was once.

    `digest`: sha256, in hex, of its header and of samples of its bytes. Two checkpoints of one
    architecture are alike in all but their bytes, and may even be of one time of modification,
    where an archive or a filesystem keeps none of its own.
    """

    name: str
    nbytes: int
    mtime_ns: int
    digest: str


@dataclass(frozen=True)
class Identity:
    """`model`: the name of the class. `config`: sha256, in hex. `sources`: empty if the weights
    came from a model in memory."""

    model: str
    config: str
    sources: tuple[Source, ...]


def identity_of(module: nn.Module, files: Iterable[Path] = ()) -> Identity:
    """Of a model and the safetensors files, if any, that its weights come from."""
    return Identity(type(module).__name__, _config_digest(module), sources_of(files))


def sources_of(files: Iterable[Path]) -> tuple[Source, ...]:
    """Their states now. Raises CheckpointError for one that can't be read."""
    return tuple(_source(file) for file in sorted(files))


def _config_digest(module: nn.Module) -> str:
    """Of the config's JSON, without names, versions and the like, which begin with "_"."""
    config = dict(getattr(module, "config", None) or {})
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def _source(file: Path) -> Source:
    try:
        with file.open("rb") as opened:
            status = os.fstat(opened.fileno())
            digest = _digest(opened, status.st_size)
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error}") from error
    return Source(file.name, status.st_size, status.st_mtime_ns, digest)


def _digest(opened: BinaryIO, nbytes: int) -> str:
    length = opened.read(8)
    digest = hashlib.sha256(length + opened.read(int.from_bytes(length, "little")))
    start = opened.tell()
    way = max(0, nbytes - SAMPLE_BYTES - start)
    for i in range(SAMPLES):
        opened.seek(start + i * way // (SAMPLES - 1))
        digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()
