"""Where the model comes from: a folder on this machine, or the hub; always a WanPipeline."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import WanPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from demo import DemoError

PIPELINE = "WanPipeline"
INDEX_FILE = "model_index.json"


def find_model(name: str) -> Path:
    """The folder of the pipeline `name`, which is a folder or a hub id; downloads what is missing.

    Raises:
        DemoError: there is no such model, or it is no text-to-video Wan pipeline.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_pipeline(name, folder / INDEX_FILE)
        return folder.absolute()
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise DemoError(f"there is no folder {name}, and a hub id would read like owner/model")
    return _download(name)


def _download(hub_id: str) -> Path:
    try:
        _check_pipeline(hub_id, Path(hf_hub_download(hub_id, INDEX_FILE)))
        return Path(WanPipeline.download(hub_id))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DemoError(
            f"there is no folder {hub_id}, and the hub did not give a model of that name: {error}"
        ) from error


def _check_pipeline(name: str, index: Path) -> None:
    """Only the index is read, so a wrong model is refused before its weights are downloaded."""
    try:
        found = _read_json(index).get("_class_name")
    except FileNotFoundError:
        raise DemoError(f"{name} has no {INDEX_FILE}, so it is no diffusers pipeline") from None
    if found != PIPELINE:
        raise DemoError(f"{name} is no {PIPELINE} but a {found}; the demo runs text to video")


@dataclass(frozen=True)
class Geometry:
    """Width and height are multiples of `size_step` pixels, frames of `frame_step`, plus one."""

    size_step: int
    frame_step: int


def geometry(folder: Path) -> Geometry:
    """What the VAE and the patches of this model ask of the picture's size."""
    vae = _config(folder / "vae")
    transformer = _config(folder / "transformer") or _config(folder / "transformer_2")
    patch = transformer.get("patch_size", [1, 2, 2])
    # The defaults are those of diffusers' classes: older checkpoints don't name the factors.
    return Geometry(
        size_step=vae.get("scale_factor_spatial", 8) * max(patch[1:]),
        frame_step=vae.get("scale_factor_temporal", 4),
    )


def _config(component: Path) -> dict[str, Any]:
    try:
        return _read_json(component / "config.json")
    except FileNotFoundError:
        return {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise DemoError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise DemoError(f"{path} can't be read: it holds no JSON object")
    return content
