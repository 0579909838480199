"""`load_pipeline`: from files to an enabled pipeline, streamed transformers read into place."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wanoffload.apart import BLOCK, PART
from wanoffload.errors import WrapError
from wanoffload.facts.look import look
from wanoffload.facts.model import ModelFacts
from wanoffload.host_tiers import AUTO, DISK, HostChoice
from wanoffload.loading.cached_weights import granularity_in
from wanoffload.loading.files import Hub
from wanoffload.machine.hardware import Hardware
from wanoffload.pipelines import acting
from wanoffload.pipelines.acting import require_fit, within
from wanoffload.pipelines.components import STREAMED, treatment
from wanoffload.pipelines.enabling import (
    check_component,
    enable_pipeline,
    with_choices_found,
    with_own_weights,
)
from wanoffload.pipelines.pipeline_source import Dtype, cache_file, find_source
from wanoffload.policy.choices import check_mode
from wanoffload.workload import Workload
from wanoffload.wrapping import check_options, resolve_device


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
    cache: str | os.PathLike[str] | None = None,
    share: str | None = None,
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
        cache: a folder for the cache files of the transformers, as of `load`, each by its name
            (`transformer.images`). Made if it is not there. What is there is taken as it is, in
            blocks or parts, unless `granularity` is "block" or "part".
        share: a name, as of `load`: under it processes hold one copy of each transformer's images.
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
        CacheFileError, ShareError: as of `load`.
        TransferError: a file could not be read, or changed meanwhile.
        torch.OutOfMemoryError: the device's memory ended on the way.
        After any of them nothing is held, and components that were given are as they were.
    """
    check_mode(mode)
    target = resolve_device(device)
    choice = HostChoice.of(host, host_budget)
    folder = check_way(choice, cache, share)
    hub = Hub(revision, cache_dir, token, local_files_only)
    source, choices = find_source(cls, path_or_id, hub, torch_dtype, variant, more)
    for name, module in source.modules.items():
        check_component(source.kind.__name__, name, module, target)
    machine = hardware or with_own_weights(Hardware.probe(target), source.modules.values())
    machine = within(machine, choice)
    choices = with_choices_found(choices, source.modules)
    choices = without_packing_in_files(choices, choice, folder)
    choices = with_granularity_in_cache(choices, folder, source.transformers())
    in_files = choice.kind in (AUTO, DISK)
    known = facts or replace(source.facts(), blocks_in_files=in_files)
    plan = acting.decide(known, workload, machine, mode, choices)
    require_fit(plan, machine, choice)
    streamed = [n for n in source.transformers() if treatment(plan, n).kind == STREAMED]
    unread = {name: source.describe(name, folder, share) for name in streamed}
    told = (each.why_not_in_files(bool(plan.pack_share)) for each in unread.values())
    reasons = [why for why in told if why is not None]
    if reasons and choice.kind == DISK:
        raise WrapError(f"host='disk' is not to be had here: {reasons[0]}")
    if reasons and in_files:  # then the plan must do without
        in_files = False
        known = replace(known, blocks_in_files=False)
        require_fit(acting.decide(known, workload, machine, mode, choices), machine, choice)
    pipe = source.assemble(unread)
    try:
        known = facts or replace(look(pipe), blocks_in_files=in_files and bool(unread))
        return enable_pipeline(
            pipe, mode, workload, machine, known, target, choice, choices, unread
        )
    except BaseException:
        for name, component in pipe.components.items():
            if isinstance(component, nn.Module) and name not in source.given:
                _empty(component)
        raise


def without_packing_in_files(
    choices: dict[str, Any], host: HostChoice, cache: Path | None
) -> dict[str, Any]:
    """Blocks that are read from the checkpoint's own files are plain, unless the user insists."""
    if host.kind != DISK or cache is not None or choices.get("pack") is True:
        return choices
    return {**choices, "pack": False}


def with_granularity_in_cache(
    choices: dict[str, Any], cache: Path | None, transformers: list[str]
) -> dict[str, Any]:
    """Cache files that are there are taken as they are, unless the user insists."""
    if cache is None or choices.get("granularity") in (BLOCK, PART):
        return choices
    found = {granularity_in(cache_file(cache, name)) for name in transformers} - {None}
    return {**choices, "granularity": found.pop()} if len(found) == 1 else choices


def check_way(
    host: HostChoice, cache: str | os.PathLike[str] | None, share: str | None
) -> Path | None:
    """The cache's folder, made if need be. Raises WrapError for what can't be used."""
    check_options(1, BLOCK, cache, share, False)
    if share is not None and host.kind == DISK:
        raise WrapError("share: with host='disk' there is nothing in memory that could be shared")
    if cache is None:
        return None
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WrapError(f"cache={cache!r} can't be a folder of cache files: {error}") from error
    return Path(cache)


def _empty(module: nn.Module) -> None:
    """Whoever keeps the error keeps its frames, and with them the module."""
    for owner in module.modules():
        owner._parameters.clear()
        owner._buffers.clear()
