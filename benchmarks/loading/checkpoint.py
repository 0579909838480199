"""A checkpoint with random weights in the hub's layout, written on the spot.

The files are what ``save_pretrained`` would have made: shards with an index, in each the tensors
of the widest dtype first and then by name, so that offsets are as odd as in real files. The
weights are the harness's own, drawn on the device; the index comes last, so that a checkpoint that
was cut off is seen and made again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import say
from benchmarks.models import SEED, ModelSpec, Staging, describe_only, random_weight

WEIGHTS = "diffusion_pytorch_model"
SHARD_BYTES = 5 * 10**9
WRITTEN_AT_ONCE = 32 << 20
WRITERS = 16
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True)
class Stored:
    """A tensor of the model, described, and the seed it is drawn from."""

    name: str
    like: Tensor
    seed: int


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder as ``from_pretrained`` takes it, and its weight files."""

    folder: Path
    subfolder: str
    files: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(file.stat().st_size for file in self.files)


def ensure(spec: ModelSpec, folder: Path, device: torch.device, shard_bytes: int) -> Checkpoint:
    """The checkpoint in ``folder``, made if it is not there whole. It stays for the next run."""
    inner = folder / "transformer"
    model = describe_only(spec)
    shards = plan_shards(model, shard_bytes)
    names = [f"{WEIGHTS}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    made = Checkpoint(folder, "transformer", tuple(inner / name for name in names))
    index = _index(names, shards)
    if _is_whole(inner, index, shards, made):
        return made
    say(f"making a checkpoint of {index['metadata']['total_size'] / 1e9:.1f} GB in {folder}")
    start = time.perf_counter()
    inner.mkdir(parents=True, exist_ok=True)
    _index_file(inner).unlink(missing_ok=True)
    (inner / "config.json").write_text(json.dumps(_config(model), indent=2))
    for file, shard in zip(made.files, shards, strict=True):
        _write_shard(file, shard, device)
    _index_file(inner).write_text(json.dumps(index))
    seconds = time.perf_counter() - start
    say(f"made at {made.nbytes / seconds / 1e9:.2f} GB/s; it is kept for the next run")
    return made


def second_expert(checkpoint: Checkpoint) -> Checkpoint:
    """The same files once more as ``transformer_2``, as hard links: they take no disk."""
    inner = checkpoint.folder / "transformer_2"
    inner.mkdir(exist_ok=True)
    for file in (checkpoint.folder / checkpoint.subfolder).iterdir():
        (inner / file.name).unlink(missing_ok=True)
        os.link(file, inner / file.name)
    files = tuple(inner / file.name for file in checkpoint.files)
    return Checkpoint(checkpoint.folder, "transformer_2", files)


def plan_shards(model: nn.Module, shard_bytes: int) -> list[list[Stored]]:
    """The model's tensors in its own order, cut where the next would not fit, then sorted."""
    shards: list[list[Stored]] = [[]]
    taken = 0
    for number, (name, like) in enumerate(model.named_parameters()):
        if shards[-1] and taken + like.nbytes > shard_bytes:
            shards.append([])
            taken = 0
        shards[-1].append(Stored(name, like, SEED + number))
        taken += like.nbytes
    return [sorted(shard, key=lambda each: (-each.like.itemsize, each.name)) for shard in shards]


def _index_file(inner: Path) -> Path:
    return inner / f"{WEIGHTS}.safetensors.index.json"


def _index(names: Sequence[str], shards: Sequence[Sequence[Stored]]) -> dict[str, Any]:
    total = sum(each.like.nbytes for shard in shards for each in shard)
    where = {each.name: name for name, shard in zip(names, shards, strict=True) for each in shard}
    return {"metadata": {"total_size": total}, "weight_map": where}


def _config(model: nn.Module) -> dict[str, Any]:
    described: Any = model
    config = json.loads(described.to_json_string())
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def _is_whole(
    inner: Path, index: dict[str, Any], shards: Sequence[Sequence[Stored]], made: Checkpoint
) -> bool:
    """Whether index and sizes are those that would be written."""
    found = _index_file(inner)
    if not found.exists() or json.loads(found.read_text()) != index:
        return False
    return all(
        file.exists() and file.stat().st_size == len(_header(shard)) + _data_bytes(shard)
        for file, shard in zip(made.files, shards, strict=True)
    )


def _data_bytes(shard: Sequence[Stored]) -> int:
    return sum(each.like.nbytes for each in shard)


def _header(shard: Sequence[Stored]) -> bytes:
    """Length and table of a safetensors file, padded to eight bytes."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for each in shard:
        end = offset + each.like.nbytes
        table[each.name] = {
            "dtype": DTYPES[each.like.dtype],
            "shape": list(each.like.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_shard(file: Path, shard: Sequence[Stored], device: torch.device) -> None:
    """Draws all tensors of a shard, and has many threads write them. On the disk when it ends."""
    staging = Staging(device, max(each.like.nbytes for each in shard))
    drawn = [
        staging.to_host(random_weight(each.name, each.like, device, each.seed)) for each in shard
    ]
    header = _header(shard)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.ftruncate(descriptor, len(header) + _data_bytes(shard))
        pieces = [(0, memoryview(header)), *_pieces(drawn, len(header))]
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(lambda piece: _write(descriptor, *piece), pieces))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    say(f"{file.name}: {file.stat().st_size / 1e9:.2f} GB")


def _pieces(tensors: Sequence[Tensor], offset: int) -> Iterator[tuple[int, memoryview]]:
    """Where in the file which bytes go."""
    for tensor in tensors:
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), WRITTEN_AT_ONCE):
            yield offset + start, data[start : start + WRITTEN_AT_ONCE]
        offset += len(data)


def _write(descriptor: int, offset: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        offset, data = offset + written, data[written:]
