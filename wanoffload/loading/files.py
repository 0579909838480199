"""Which files a model consists of: where diffusers' `from_pretrained` looks, in its order."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanoffload.errors import CheckpointError

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@dataclass(frozen=True)
class ModelFiles:
    """A model's config, and its weights: one file, or the shards that an index names.

    `weight_map`: the index's own, tensor to file name; empty where there is no index.
    """

    config: Path
    weights: tuple[Path, ...]
    index: Path | None
    weight_map: dict[str, str]


@dataclass(frozen=True)
class Hub:
    """How the hub is asked; the fields are huggingface_hub's."""

    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    token: str | bool | None = None
    local_files_only: bool = False


def with_variant(name: str, variant: str | None) -> str:
    """`variant` stands before the last suffix, as save_pretrained puts it."""
    stem, suffix = name.rsplit(".", 1)
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def _index_names(variant: str | None) -> Iterator[str]:
    """And, after the usual one, where older versions of diffusers put the variant."""
    yield with_variant(INDEX, variant)
    if variant is not None:
        yield f"{WEIGHTS}.{variant}.index.json"


def find_files(
    path_or_id: str | os.PathLike[str], subfolder: str | None, variant: str | None, hub: Hub
) -> ModelFiles:
    """The files of a local folder, of one `.safetensors` file, or of a model of the hub.

    Of the hub, what is not in its cache yet is downloaded, with huggingface_hub's own progress.
    Raises CheckpointError, which names what is missing.
    """
    path = Path(path_or_id)
    if path.is_file():
        return _one_file(path, variant)
    if path.is_dir():
        return _local(path, subfolder, variant)
    if path.is_absolute() or str(path_or_id).count("/") != 1:
        raise CheckpointError(
            f"{path_or_id} is neither a folder, nor a .safetensors file, nor a model id of the hub "
            "(name/model)"
        )
    return _from_hub(str(path_or_id), subfolder, variant, hub)


def read_json(file: Path) -> dict[str, Any]:
    """Raises CheckpointError, which names the file, for what is not a JSON object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; is the download complete?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} can't be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return found


def _one_file(file: Path, variant: str | None) -> ModelFiles:
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file} is no .safetensors file. {_CONVERT}")
    if variant is not None:
        raise CheckpointError(f"{file} is one file; variant={variant!r} chooses among several")
    config = file.with_name(CONFIG)
    if not config.is_file():
        raise CheckpointError(f"{config} is missing: the config is read from beside {file.name}")
    return ModelFiles(config, (file,), None, {})


_CONVERT = (
    "Weights are read from safetensors files only; convert pickled ones once, with "
    "from_pretrained(...).save_pretrained(folder)"
)


# A local folder.


def _local(folder: Path, subfolder: str | None, variant: str | None) -> ModelFiles:
    inner = folder / (subfolder or "")
    if not inner.is_dir():
        inner = folder  # the model's own folder was given
    config = next((f for f in (inner / CONFIG, folder / CONFIG) if f.is_file()), None)
    if config is None:
        raise CheckpointError(f"{inner / CONFIG} is missing; is {folder} a model's folder?")
    for name in _index_names(variant):
        if (inner / name).is_file():
            weight_map = _weight_map(inner / name)
            shards = tuple(inner / shard for shard in sorted(set(weight_map.values())))
            _check_present(inner / name, shards)
            return ModelFiles(config, shards, inner / name, weight_map)
    name = with_variant(WEIGHTS, variant)
    for place in (folder, inner):  # in this order: diffusers prefers the outer one
        if (place / name).is_file():
            return ModelFiles(config, (place / name,), None, {})
    raise CheckpointError(_nothing_found(inner, name))


def _nothing_found(folder: Path, name: str) -> str:
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    there = ", ".join(files[:10]) + (" and more" if len(files) > 10 else "")
    text = f"{folder} holds neither {name} nor an index of shards; it holds {there or 'nothing'}"
    pickled = any(file.endswith(".bin") or ".bin.index" in file for file in files)
    return f"{text}. {_CONVERT}" if pickled else text


def _weight_map(index: Path) -> dict[str, str]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index} has no weight_map")
    for tensor, shard in table.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: {tensor} stands in {shard!r}, which is no file's name")
    return table


def _check_present(index: Path, shards: tuple[Path, ...]) -> None:
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {', '.join(missing)}, which {index.name} names; is the download "
            "complete?"
        )


# The hub.


def _from_hub(model: str, subfolder: str | None, variant: str | None, hub: Hub) -> ModelFiles:
    config = _fetch(model, subfolder, CONFIG, hub)
    hub = _pinned(config, hub)
    for name in _index_names(variant):
        index = _fetch_if_there(model, subfolder, name, hub)
        if index is not None:
            weight_map = _weight_map(index)
            shards = _fetch_shards(model, index, subfolder, weight_map, hub)
            return ModelFiles(config, shards, index, weight_map)
    name = with_variant(WEIGHTS, variant)
    weights = _fetch_if_there(model, subfolder, name, hub)
    if weights is not None:
        return ModelFiles(config, (weights,), None, {})
    where = f"{model}/{subfolder}" if subfolder else model
    raise CheckpointError(
        f"{where} on the hub (or in its cache, if the hub can't be reached) has neither {name} nor "
        f"an index of shards; is the variant right? {_CONVERT}"
    )


def _pinned(config: Path, hub: Hub) -> Hub:
    """All files are taken from the commit of the first, even if the hub moves on meanwhile."""
    found = re.search(r"/snapshots/([0-9a-f]{40})/", config.as_posix())
    if found is None:
        return hub
    return Hub(found[1], hub.cache_dir, hub.token, hub.local_files_only)


def _fetch(model: str, subfolder: str | None, name: str, hub: Hub) -> Path:
    """Raises CheckpointError for whatever keeps the file from being had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        return Path(
            hf_hub_download(
                model,
                name,
                subfolder=subfolder or None,
                revision=hub.revision,
                cache_dir=hub.cache_dir,
                token=hub.token,
                local_files_only=hub.local_files_only,
            )
        )
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{model} is no local folder, and {'/'.join(filter(None, (subfolder, name)))} could "
            f"not be had from the hub: {error}"
        ) from error


def _fetch_if_there(model: str, subfolder: str | None, name: str, hub: Hub) -> Path | None:
    """None where the hub, or its cache, has no such file."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return _fetch(model, subfolder, name, hub)
    except CheckpointError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return None
        raise


def _fetch_shards(
    model: str, index: Path, subfolder: str | None, weight_map: dict[str, str], hub: Hub
) -> tuple[Path, ...]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    names = sorted(set(weight_map.values()))
    patterns = [f"{subfolder}/{name}" if subfolder else name for name in names]
    try:
        snapshot_download(
            model,
            revision=hub.revision,
            cache_dir=hub.cache_dir,
            token=hub.token,
            local_files_only=hub.local_files_only,
            allow_patterns=patterns,
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{model}: its shards could not be had: {error}") from error
    shards = tuple(index.parent / name for name in names)
    _check_present(index, shards)
    return shards
