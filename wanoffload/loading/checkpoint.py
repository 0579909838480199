"""What a checkpoint holds, known before a byte of its weights is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanoffload.errors import CheckpointError
from wanoffload.loading.files import Hub, ModelFiles, find_files, read_json
from wanoffload.loading.header import StoredTensor, read_header


@dataclass(frozen=True)
class Checkpoint:
    """A model's config and a table of its tensors: file, dtype, shape, place, bytes.

    `source`: the path or id that was given, as it was given. `sharded`: an index names the files.
    """

    source: str | os.PathLike[str]
    config: dict[str, Any]
    config_file: Path
    files: tuple[Path, ...]
    sharded: bool
    tensors: dict[str, StoredTensor]

    @staticmethod
    def open(
        path_or_id: str | os.PathLike[str],
        subfolder: str | None = "transformer",
        *,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Checkpoint:
        """Looks at a folder, a `.safetensors` file with its config.json beside it, or a hub id.

        The files are those that diffusers' `from_pretrained` takes. (A model's own folder may be
        given as well as the pipeline's above it.) Of the weights only the headers are read.
        Raises CheckpointError, which names the file and the tensor, for whatever is missing,
        truncated or contradicts itself.
        """
        hub = Hub(revision, cache_dir, token, local_files_only)
        files = find_files(path_or_id, subfolder, variant, hub)
        config = read_json(files.config)
        tensors = _table(files)
        return Checkpoint(
            path_or_id, config, files.config, files.weights, files.index is not None, tensors
        )


def _table(files: ModelFiles) -> dict[str, StoredTensor]:
    """The tensors of all files. Each stands in one file, the one that the index names."""
    table: dict[str, StoredTensor] = {}
    for file in files.weights:
        for name, tensor in read_header(file).items():
            if name in table:
                raise CheckpointError(f"{name} stands in {table[name].file} and in {file}")
            table[name] = tensor
    for name, shard in files.weight_map.items():
        found = table.get(name)
        if found is None or found.file.name != shard:
            place = f"it stands in {found.file.name}" if found else "no shard holds it"
            raise CheckpointError(
                f"{files.index} says that {name} is in {shard}, but {place}; are all files of one "
                "download?"
            )
    if not table:
        raise CheckpointError(f"{files.weights[0]} holds no tensors")
    return table
