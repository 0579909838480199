"""`load`: from a checkpoint to a streamed model, without a model of ordinary tensors in between."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from wanoffload.host_tiers import AUTO, HostChoice
from wanoffload.loading.checkpoint import Checkpoint
from wanoffload.loading.describing import describe
from wanoffload.loading.unread import Unread
from wanoffload.pack_choice import check_pack
from wanoffload.units import BLOCK
from wanoffload.wrapping import check_options, resolve_device, start

Model = TypeVar("Model", bound=nn.Module)


def load(
    cls: type[Model],
    path_or_id: str | os.PathLike[str],
    subfolder: str | None = "transformer",
    *,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    prefetch: int | None = None,
    device: torch.device | str | int | None = None,
    vram_budget: int | str | float | None = None,
    granularity: str = BLOCK,
    host: str = AUTO,
    host_budget: int | str | None = None,
    cache: str | os.PathLike[str] | None = None,
    share: str | None = None,
    pack: bool | str | None = None,
    verify: bool = False,
) -> Model:
    """Reads a checkpoint straight into the host memory from which blocks are streamed.

    The model is the one that `wrap(cls.from_pretrained(...))` gives, value for value, and needs no
    host memory besides its own: the weights of the blocks are read from the files into their
    images, by many threads, and all others go to the device as they are read. Tensors that are
    stored in another dtype than the model's are cast one at a time.

    Args:
        cls: a model class of diffusers, such as WanTransformer3DModel.
        path_or_id: a pipeline's folder, a model's own folder, a `.safetensors` file with its
            config.json beside it, or a model id of the hub, whose files are taken from
            huggingface_hub's cache and downloaded where it lacks them.
        subfolder, variant, revision, cache_dir, token, local_files_only: as of `from_pretrained`.
        torch_dtype: as of `from_pretrained`, with what the class keeps in fp32. None: what the
            class is constructed in, which is fp32 as a rule, whatever the checkpoint holds.
        prefetch, device, vram_budget, granularity, host, host_budget, share, pack, verify: as of
            `wrap`. With "disk" (or "auto", where memory is short) blocks stay in the checkpoint's
            own files and are read from there, which must stay as they are; it takes a checkpoint
            that holds the dtypes to be used, and packed blocks take a cache file.
        cache: a file that holds the blocks in the dtypes in which they are streamed
            (docs/cache-file.md), packed or plain. Read in place of the checkpoint's if it is of
            this checkpoint; written if it is not there.

    Raises:
        CheckpointError: files are missing, not whole, or of another model; names file, tensor and
            shapes. Nothing has been read but headers.
        HostMemoryError: too little host memory. Nothing has been read.
        CacheFileError: the cache file is spoilt or another checkpoint's, or can't be written.
        ShareError: the images can't be shared under this name.
        TransferError: a file could not be read, or changed meanwhile.
        WrapError: an argument can't be used; says what to do.
        torch.OutOfMemoryError: too little device memory.
        After any of them, nothing is held.
    """
    check_options(prefetch, granularity, cache, share, verify)
    check_pack(pack)
    choice = HostChoice.of(host, host_budget)
    target = resolve_device(device)
    checkpoint = Checkpoint.open(
        path_or_id,
        subfolder,
        variant=variant,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
    )
    described = describe(cls, checkpoint, torch_dtype)
    unread = Unread(described, checkpoint.files, None if cache is None else Path(cache))
    start(
        described.module,
        unread.weights(target),
        prefetch,
        target,
        vram_budget=vram_budget,
        granularity=granularity,
        host=choice,
        share=share,
        pack=pack,
        verify=verify,
        title="load",
    )
    return described.module  # type: ignore[return-value]  # it is of class cls
