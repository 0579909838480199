"""A pipeline's files: found, looked at, and made a pipeline; what will be streamed stays unread."""

from __future__ import annotations

import importlib
import inspect
import os
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wanoffload.errors import CheckpointError, PipelineError
from wanoffload.facts.folder import look_at_folder
from wanoffload.facts.model import ModelFacts
from wanoffload.facts.modules import part_of, pipeline_name
from wanoffload.facts.parts import is_relevant, model_facts
from wanoffload.loading.checkpoint import Checkpoint
from wanoffload.loading.describing import describe, stored_name
from wanoffload.loading.files import Hub
from wanoffload.loading.unread import Unread
from wanoffload.pipelines.components import role
from wanoffload.policy.choices import DIT, Choices

Dtype = torch.dtype | dict[str, torch.dtype] | None


def find_source(
    cls: Any,
    path_or_id: str | os.PathLike[str],
    hub: Hub,
    torch_dtype: Dtype,
    variant: str | None,
    more: dict[str, Any],
) -> tuple[Source, dict[str, Any]]:
    """Where the pipeline comes from, and the choices among `more`.

    Of the hub, what its cache lacks is downloaded. Raises PipelineError for a class that is none,
    ValueError for keywords that are neither the class's nor choices, CheckpointError for what can't
    be found.
    """
    index = _read_index(cls, path_or_id, hub)
    kind = _class_named(cls, index)
    given, choices = _tell_apart(kind, more)
    folder = _folder(kind, path_or_id, variant, hub, given)
    name = os.fspath(path_or_id)
    return Source(name, folder, kind, index, torch_dtype, variant, given), choices


def _read_index(cls: Any, path_or_id: str | os.PathLike[str], hub: Hub) -> dict[str, Any]:
    """The pipeline's model_index.json."""
    from diffusers import DiffusionPipeline

    if not (isinstance(cls, type) and issubclass(cls, DiffusionPipeline)):
        raise PipelineError(
            f"{getattr(cls, '__name__', cls)} is no pipeline class of diffusers, such as "
            "WanPipeline; of a model alone, see wanoffload.load()"
        )
    try:
        index: dict[str, Any] = cls.load_config(  # type: ignore[attr-defined]
            path_or_id,
            revision=hub.revision,
            cache_dir=hub.cache_dir,
            token=hub.token,
            local_files_only=hub.local_files_only,
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path_or_id} is no pipeline's folder, and its model_index.json could not be had from "
            f"the hub: {error}"
        ) from error
    return index


def _class_named(cls: Any, index: Mapping[str, Any]) -> Any:
    import diffusers

    if cls is not diffusers.DiffusionPipeline:
        return cls
    name = index.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if found is None:
        raise PipelineError(f"diffusers has no pipeline {name}, which the model's index names")
    return found


def _tell_apart(kind: Any, more: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the class is constructed of, and choices. Raises ValueError for what is neither."""
    given = {name: value for name, value in more.items() if name in _constructed_of(kind)}
    choices = {name: value for name, value in more.items() if name not in given}
    Choices.of(choices)
    return given, choices


def _constructed_of(kind: Any) -> set[str]:
    return set(inspect.signature(kind.__init__).parameters) - {"self"}


def _folder(
    kind: Any,
    path_or_id: str | os.PathLike[str],
    variant: str | None,
    hub: Hub,
    given: Mapping[str, Any],
) -> str:
    """Of an id, that of the hub's cache; what it lacks is downloaded, but for what was given."""
    if os.path.isdir(path_or_id):
        return os.fspath(path_or_id)
    try:
        return str(
            kind.download(
                path_or_id,
                variant=variant,
                revision=hub.revision,
                cache_dir=hub.cache_dir,
                token=hub.token,
                local_files_only=hub.local_files_only,
                **given,
            )
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path_or_id} could not be had from the hub: {error}") from error


def cache_file(cache: Path, name: str) -> Path:
    """Of the transformer of this name, in the folder of all."""
    return cache / f"{name}.images"


@dataclass(frozen=True)
class Source:
    """A pipeline's folder, and how it is loaded. `given`: what is not taken from it."""

    name: str
    folder: str
    kind: Any
    index: dict[str, Any]
    torch_dtype: Dtype
    variant: str | None
    given: dict[str, Any]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that were given."""
        return {name: value for name, value in self.given.items() if isinstance(value, nn.Module)}

    def facts(self) -> ModelFacts:
        """The facts of what will be loaded, as far as files tell."""
        taken = self._taken()
        seen = look_at_folder(
            Path(self.folder),
            without=[name for name in self.index if name not in taken],
            dtypes={name: dtype for name in taken if (dtype := self._dtype_name(name)) is not None},
        )
        own = {
            name: part_of(name, value)
            for name, value in self.given.items()
            if is_relevant(name) and value is not None
        }
        return model_facts(
            replace(
                seen,
                pipeline=pipeline_name(self.kind),
                config={**seen.config, **self.given},
                parts={**seen.parts, **own},
            )
        )

    def transformers(self) -> list[str]:
        """Names of those that `describe` can read."""
        taken = self._taken()
        return [n for n in taken if role(n) == DIT and taken[n][0] == "diffusers"]

    def describe(self, name: str, cache: Path | None, share: str | None) -> Unread:
        """Raises CheckpointError if the files are not those of the class.

        `cache`: a folder with the cache files of all transformers. `share`: the pipeline's name.
        """
        library, class_name = self._taken()[name]
        folder = os.path.join(self.folder, name)
        checkpoint = Checkpoint.open(folder, None, variant=self._variant(folder))
        cls = getattr(importlib.import_module(library), class_name, None)
        if cls is None:
            raise CheckpointError(f"{library} has no {class_name}, which is what {name} is")
        described = describe(cls, checkpoint, self._dtype(name))
        own = cache_file(cache, name) if cache is not None else None
        return Unread(described, checkpoint.files, own, share and f"{share}/{name}")

    def assemble(self, unread: Mapping[str, Unread]) -> Any:
        """The pipeline, with what diffusers loads. Raises CheckpointError for whatever it says."""
        options = {"torch_dtype": self.torch_dtype, "variant": self.variant}
        options = {name: value for name, value in options.items() if value is not None}
        described = {name: known.described.module for name, known in unread.items()}
        try:
            with warnings.catch_warnings():
                # The name that replaces it is not known to older releases, which would ignore it.
                warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
                pipe = self.kind.from_pretrained(
                    self.folder, **options, **{**self.given, **described}
                )
        except BaseException as error:
            _forget_locals(error)
            if not isinstance(error, Exception):
                raise
            raise CheckpointError(
                f"diffusers could not load the rest of {self.name}: {type(error).__name__}: {error}"
            ) from error
        pipe.register_to_config(_name_or_path=self.name)
        return pipe

    def _taken(self) -> dict[str, list[str]]:
        """The components that come from the folder: library and class."""
        wanted = _constructed_of(self.kind) - set(self.given)
        return {
            name: value
            for name, value in self.index.items()
            if name in wanted and isinstance(value, list) and value[0] is not None
        }

    def _dtype(self, name: str) -> torch.dtype | None:
        """As diffusers reads it: what is not named in a dictionary without a default is fp32."""
        if not isinstance(self.torch_dtype, dict):
            return self.torch_dtype
        return self.torch_dtype.get(name, self.torch_dtype.get("default", torch.float32))

    def _dtype_name(self, name: str) -> str | None:
        dtype = self._dtype(name)
        if dtype is None and self._taken()[name][0] == "diffusers":
            dtype = torch.float32
        return None if dtype is None else stored_name(dtype)

    def _variant(self, folder: str) -> str | None:
        """None: the component was saved without it, and is loaded as it is."""
        if self.variant is None or not os.path.isdir(folder):
            return None
        after_dot = [name.split(".")[1:2] for name in os.listdir(folder)]
        has_it = any(part and part[0].startswith(self.variant) for part in after_dot)
        return self.variant if has_it else None


def _forget_locals(error: BaseException | None) -> None:
    """Whoever keeps the error keeps its frames: they let go of what was loaded."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
