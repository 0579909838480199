"""From a class and a checkpoint to a described model: what `from_pretrained` would make of them.

The rules are those of `ModelMixin.from_pretrained` and `load_model_dict_into_meta` in diffusers
0.42.1, called without quantization, device map and parallelism. It differs in what it refuses: a
tensor missing or left over is an error here, and a warning there.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wanoffload.errors import CheckpointError
from wanoffload.host_tensor import ordinary_tensors
from wanoffload.loading.checkpoint import Checkpoint
from wanoffload.loading.header import StoredTensor

_SHOWN = 10
_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


def stored_name(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype; one that it does not know, its own name."""
    return _NAMES.get(dtype, str(dtype))


@dataclass(frozen=True)
class Described:
    """A model without its weights, and where in the files they are.

    `module`: parameters on the meta device, dense, in the dtype they will have; buffers real, as
    the constructor made them. `stored`: for each name of its state_dict, the tensor to be read.
    `dtypes`: for each of these names, the dtype to be cast to.
    """

    module: nn.Module
    stored: dict[str, StoredTensor]
    dtypes: dict[str, torch.dtype]


def torch_dtype_of(stored: StoredTensor) -> torch.dtype:
    """Raises CheckpointError for what torch has no dtype for (parts of a byte)."""
    if stored.dtype not in _TORCH_DTYPES:
        raise CheckpointError(f"{stored.file}: {stored.name} is {stored.dtype}; torch has no such")
    return _TORCH_DTYPES[stored.dtype]


def describe(
    cls: type[nn.Module], checkpoint: Checkpoint, torch_dtype: torch.dtype | None = None
) -> Described:
    """The model that `cls.from_pretrained(..., torch_dtype=...)` would give, without its weights.

    `torch_dtype`: floating tensors are cast to it, but those of the class's
    `_keep_in_fp32_modules` to fp32. None: each takes the dtype in which the constructor makes it,
    fp32 as a rule, whatever the checkpoint holds.

    Raises CheckpointError, with up to ten of the tensors, if some are missing, unexpected or of
    another shape. Reads no weights.
    """
    _check(cls, checkpoint, torch_dtype)
    with ordinary_tensors():
        module = _construct(cls, checkpoint, torch_dtype)
        if torch_dtype == torch.float8_e4m3fn and _kept_in_fp32(module) is None:
            nn.Module.to(module, torch_dtype)  # the buffers too
        stored = _with_names_of_now(module, checkpoint)
        wanted = dict(module.state_dict())
        _check_fit(module, checkpoint, stored, wanted)
        kept = _kept_in_fp32(module) or ()
        stored = {name: stored[name] for name in wanted}
        dtypes = {
            name: _target_dtype(name, stored[name], like.dtype, torch_dtype, kept)
            for name, like in wanted.items()
        }
        _make_dense(module, dtypes)
        module.register_to_config(_name_or_path=checkpoint.source)  # type: ignore[operator]
    return Described(module.eval(), stored, dtypes)


def _check(cls: Any, checkpoint: Checkpoint, torch_dtype: Any) -> None:
    from diffusers import ModelMixin

    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise CheckpointError(
            f"{getattr(cls, '__name__', cls)} is no model class of diffusers, such as "
            "WanTransformer3DModel"
        )
    if torch_dtype is not None and not isinstance(torch_dtype, torch.dtype):
        raise CheckpointError(
            f"torch_dtype is a torch.dtype, such as torch.bfloat16, or None; not {torch_dtype!r}"
        )
    if torch_dtype is not None and not torch_dtype.is_floating_point:
        raise CheckpointError(f"torch_dtype is a floating-point dtype, not {torch_dtype}")
    if checkpoint.config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{checkpoint.config_file} describes a quantized model; quantized tensors can't be "
            "streamed yet"
        )


def _construct(
    cls: type[nn.Module], checkpoint: Checkpoint, torch_dtype: torch.dtype | None
) -> nn.Module:
    """Under what `from_pretrained` constructs under: no values, parameters without memory."""
    from accelerate import init_empty_weights
    from diffusers.models.modeling_utils import no_init_weights

    with ExitStack() as stack:
        if torch_dtype is not None and torch_dtype != torch.float8_e4m3fn:
            stack.enter_context(_default_dtype(torch_dtype))
        stack.enter_context(no_init_weights())
        stack.enter_context(init_empty_weights(include_buffers=False))
        try:
            module: nn.Module = cls.from_config(  # type: ignore[attr-defined]
                copy.deepcopy(checkpoint.config)
            )
        except Exception as error:
            described = checkpoint.config.get("_class_name", "unknown class")
            raise CheckpointError(
                f"no {cls.__name__} can be made from {checkpoint.config_file}, which describes a "
                f"model of class {described}: {type(error).__name__}: {error}"
            ) from error
    return module


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
    except TypeError as error:
        raise CheckpointError(f"no model can be made in {dtype}: {error}") from None
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _with_names_of_now(module: nn.Module, checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Old names of tensors become those of today. Diffusers does so where there are no shards."""
    tensors = OrderedDict(checkpoint.tensors)
    if not checkpoint.sharded:
        module._fix_state_dict_keys_on_load(tensors)  # type: ignore[operator]
    return tensors


def _kept_in_fp32(module: nn.Module) -> tuple[str, ...] | None:
    """Parts of names whose tensors the class keeps in fp32. None: it says nothing of it."""
    kept: list[str] | str | None = getattr(module, "_keep_in_fp32_modules", None)
    return (kept,) if isinstance(kept, str) else None if kept is None else tuple(kept)


def _target_dtype(
    name: str,
    stored: StoredTensor,
    constructed: torch.dtype,
    torch_dtype: torch.dtype | None,
    kept: tuple[str, ...],
) -> torch.dtype:
    if torch_dtype is None or not torch_dtype_of(stored).is_floating_point:
        return constructed
    if any(part in kept for part in name.split(".")):
        return torch.float32
    return torch_dtype


def _make_dense(module: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Meta parameters in their dtypes; what comes from a file is dense, however it was made."""
    for prefix, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is None:
                continue
            dtype = dtypes[f"{prefix}.{key}" if prefix else key]
            dense = torch.empty(parameter.shape, dtype=dtype, device="meta")
            owner._parameters[key] = type(parameter)(dense, requires_grad=parameter.requires_grad)


# What doesn't fit.


def _check_fit(
    module: nn.Module,
    checkpoint: Checkpoint,
    stored: dict[str, StoredTensor],
    wanted: dict[str, Tensor],
) -> None:
    problems = list(_problems(module, checkpoint, stored, wanted))
    if not problems:
        return
    name = type(module).__name__
    described = checkpoint.config.get("_class_name", name)
    told = f" (which is one of {described})" if described != name else ""
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    raise CheckpointError(
        f"the tensors of {checkpoint.source} are not those of a {name} by {checkpoint.config_file}"
        f"{told}:\n  " + "\n  ".join(problems[:_SHOWN] + more)
    )


def _problems(
    module: nn.Module,
    checkpoint: Checkpoint,
    stored: dict[str, StoredTensor],
    wanted: dict[str, Tensor],
) -> Iterator[str]:
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    where = checkpoint.files[0] if len(checkpoint.files) == 1 else f"{len(checkpoint.files)} files"
    for name, like in wanted.items():
        shape = tuple(like.shape)
        if name not in stored:
            yield f"{name}, of shape {shape}, is missing in {where}"
        elif stored[name].shape != shape:
            yield f"{name} has shape {stored[name].shape} in {stored[name].file}, not {shape}"
    for name, tensor in stored.items():
        if name not in wanted and not any(re.search(pattern, name) for pattern in ignored):
            yield f"{name}, of shape {tensor.shape} in {tensor.file}, is not in the model"
