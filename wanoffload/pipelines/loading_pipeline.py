"""`load_pipeline`: from files to an enabled pipeline, streamed transformers read into place."""

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
from wanoffload.facts.look import look
from wanoffload.facts.model import ModelFacts
from wanoffload.facts.modules import part_of, pipeline_name
from wanoffload.facts.parts import is_relevant, model_facts
from wanoffload.host_tiers import AUTO, DISK, HostChoice
from wanoffload.loading.checkpoint import Checkpoint
from wanoffload.loading.describing import Described, describe
from wanoffload.loading.files import Hub
from wanoffload.machine.hardware import Hardware
from wanoffload.pipelines import acting
from wanoffload.pipelines.components import STREAMED, role, treatment
from wanoffload.pipelines.enabling import enable_pipeline, with_own_weights, with_prefetch_found
from wanoffload.policy.choices import DIT, Choices, check_mode
from wanoffload.workload import Workload
from wanoffload.wrapping import resolve_device

Dtype = torch.dtype | dict[str, torch.dtype] | None


def load_pipeline(
    cls: Any,
    path_or_id: str | os.PathLike[str],
    mode: str = "auto",
    *,
    workload: Workload | None = None,
    hardware: Hardware | None = None,
    facts: ModelFacts | None = None,
    device: torch.device | str | int | None = None,
    host: str = AUTO,
    host_budget: int | str | None = None,
    torch_dtype: Dtype = None,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **more: Any,
) -> Any:
    """Loads a pipeline that is enabled: what `enable(cls.from_pretrained(path_or_id))` gives.

    It is planned from configs and the headers of files, before weights are read. Transformers that
    are streamed by that plan are then read straight into the memory they are streamed from, as
    `load` does; everything else is loaded by diffusers.

    Args:
        cls: a pipeline class of diffusers, such as WanPipeline; or DiffusionPipeline, which stands
            for the class that the model names.
        path_or_id: a pipeline's folder, or an id of the hub, whose files are taken from
            huggingface_hub's cache and downloaded where it lacks them.
        mode, workload, hardware, facts, device, host, host_budget: as of `enable`. With "auto",
            where memory is short, and "disk" blocks stay in the checkpoint's own files and are
            read from there, which must stay as they are (see `load`). Without a workload, a
            transformer whose treatment depends on it is streamed at first if that is what `plan`
            says of an unknown size, and else stays on the host; the first call decides anew.
        torch_dtype: as of `from_pretrained`: of all components, or `{name: dtype, "default": ...}`.
        variant, revision, cache_dir, token, local_files_only: as of `from_pretrained`.
        more: choices, as of `plan`; and what the pipeline's class is constructed of, in place of
            what stands in the folder: components (`vae=vae`, `image_encoder=None`; a transformer
            may be one that was made by `load`), settings (`boundary_ratio=0.9`).

    Raises:
        ValueError: a choice that can't be made, a component whose size can't be told.
        CheckpointError: files are missing, not whole, or of another model.
        PipelineError: no pipeline class, or a component that can't be enabled as it is.
        DeviceMemoryError, HostMemoryError: nothing that is permitted fits.
        TransferError: a file could not be read, or changed meanwhile.
        torch.OutOfMemoryError: the device's memory ended on the way.
        After any of them nothing is held, and components that were given are as they were.
    """
    check_mode(mode)
    target = resolve_device(device)
    choice = HostChoice.of(host, host_budget)
    hub = Hub(revision, cache_dir, token, local_files_only)
    index = _read_index(cls, path_or_id, hub)
    kind = _class_named(cls, index)
    given, choices = _tell_apart(kind, more)
    folder = _folder(kind, path_or_id, variant, hub, given)
    source = Source(os.fspath(path_or_id), folder, kind, index, torch_dtype, variant, given)
    modules = {name: value for name, value in given.items() if isinstance(value, nn.Module)}
    machine = hardware or with_own_weights(Hardware.probe(target), modules.values())
    machine = acting.within(machine, choice)
    choices = with_prefetch_found(choices, modules)
    in_files = choice.kind in (AUTO, DISK)
    known = facts or replace(source.facts(), blocks_in_files=in_files)
    plan = acting.decide(known, workload, machine, mode, choices)
    acting.require_fit(plan, machine, choice)
    unread = {
        name: source.describe(name)
        for name in source.transformers()
        if treatment(plan, name).kind == STREAMED
    }
    pipe = source.assemble(unread)
    try:
        known = facts or replace(look(pipe), blocks_in_files=in_files and bool(unread))
        return enable_pipeline(
            pipe, mode, workload, machine, known, target, choice, choices, unread
        )
    except BaseException:
        for name, component in pipe.components.items():
            if isinstance(component, nn.Module) and name not in given:
                _empty(component)
        raise


def _empty(module: nn.Module) -> None:
    """Whoever keeps the error keeps its frames, and with them the module."""
    for owner in module.modules():
        owner._parameters.clear()
        owner._buffers.clear()


# What is asked for.


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

    def facts(self) -> ModelFacts:
        """The facts of what will be loaded, as far as files tell."""
        taken = self._taken()
        seen = look_at_folder(
            Path(self.folder),
            without=[name for name in self.index if name not in taken],
            itemsizes={name: size for name in taken if (size := self._itemsize(name)) is not None},
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

    def describe(self, name: str) -> Described:
        """Raises CheckpointError if the files are not those of the class."""
        library, class_name = self._taken()[name]
        folder = os.path.join(self.folder, name)
        checkpoint = Checkpoint.open(folder, None, variant=self._variant(folder))
        cls = getattr(importlib.import_module(library), class_name)
        return describe(cls, checkpoint, self._dtype(name))

    def assemble(self, unread: Mapping[str, Described]) -> Any:
        """The pipeline, with what diffusers loads. Raises CheckpointError for whatever it says."""
        options = {"torch_dtype": self.torch_dtype, "variant": self.variant}
        options = {name: value for name, value in options.items() if value is not None}
        described = {name: known.module for name, known in unread.items()}
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

    def _itemsize(self, name: str) -> int | None:
        dtype = self._dtype(name)
        if dtype is None and self._taken()[name][0] == "diffusers":
            return torch.float32.itemsize
        return None if dtype is None else dtype.itemsize

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
