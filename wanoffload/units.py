"""Units: what is fetched at once, and in which order. Plain looking; nothing is changed here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wanoffload.apart import AUTO as AUTO
from wanoffload.apart import BLOCK as BLOCK
from wanoffload.apart import PART as PART
from wanoffload.apart import parts_among
from wanoffload.errors import WrapError
from wanoffload.host_tensor import HostTensor

CALLED = {BLOCK: "blocks", PART: "parts of blocks"}
"""In what is said of units."""
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class Entry:
    """One place where a parameter stands: `owner._parameters[key]`."""

    owner: nn.Module
    key: str
    name: str  # inside the unit, as in its state_dict

    @property
    def tensor(self) -> Tensor:
        tensor = self.owner._parameters[self.key]
        assert tensor is not None
        return tensor


@dataclass(frozen=True)
class Unit:
    """A block, or a part of one, and its streamed parameters.

    `groups`: entries of one tensor (ties) together. `block`: the block that it is a part of; the
    same as `module` where it is a whole one.
    """

    name: str
    module: nn.Module
    groups: tuple[tuple[Entry, ...], ...]
    block: nn.Module


BASE_LAYER = "base_layer"
"""How PEFT's layers name the module that they stand around."""


def find_units(model: nn.Module, granularity: str = BLOCK) -> list[Unit]:
    """The model's blocks, or their parts, in the order in which they are expected to be called.

    Blocks are the items of the ModuleLists that are direct children of the model. The order is the
    class's own where it is declared below, else that of the lists; the runtime corrects it after
    the first forward. A parameter that appears in more than one block, or also outside the blocks,
    is left out of all: it stays on the device.

    A part is a module of a block that is called by itself: `attn1`, `attn2`, `ffn`. What a block
    has besides is small and stays on the device; a block of which much would is one part.
    """
    blocks = [(name, block, block) for name, block in _ordered_blocks(model)]
    if granularity == PART:
        blocks = [(n, part, block) for name, block, _ in blocks for n, part in _parts(name, block)]
    homes = _homes_of_parameters(model, [(name, module) for name, module, _ in blocks])
    units = []
    for name, module, block in blocks:
        groups: dict[object, list[Entry]] = {}
        for entry in entries_of(module):
            if homes[tie_key(entry.tensor)] == {name}:
                groups.setdefault(tie_key(entry.tensor), []).append(entry)
        if groups:
            units.append(Unit(name, module, tuple(map(tuple, groups.values())), block))
    if not units:
        raise WrapError(
            f"{type(model).__name__} has no block to stream: no ModuleList among its direct "
            "children holds modules with parameters of their own"
        )
    return units


def granularity_of(found: Sequence[Unit]) -> str:
    """What these units are."""
    return PART if any(unit.module is not unit.block for unit in found) else BLOCK


def any_compiled(units: Iterable[Unit]) -> bool:
    """Whether the block of one of them is compiled as a whole: it uses its parts all at once."""
    return any(unit.block._compiled_call_impl is not None for unit in units)


def entries_of(module: nn.Module) -> Iterator[Entry]:
    """Every place in a module (and below) where a parameter stands."""
    for prefix, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                yield Entry(owner, key, f"{prefix}.{key}" if prefix else key)


def tie_key(tensor: Tensor) -> object:
    """Equal for tensors that are the same memory seen in the same way."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return id(tensor)
    bits = (tensor.is_conj(), tensor.is_neg())
    address = tensor.address if isinstance(tensor, HostTensor) else tensor.data_ptr()
    return (tensor.device, address, tensor.dtype, tensor.shape, tensor.stride(), bits)


def _parts(name: str, block: nn.Module) -> list[tuple[str, nn.Module]]:
    """The parts of a block; the block, if it has none."""
    called = list(_called(name, block))
    parts = parts_among([_nbytes(module) for _, module in called], _nbytes(block))
    return [called[at] for at in parts] or [(name, block)]


def _called(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules below that are called: lists and dictionaries of modules are not."""
    for key, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _called(f"{name}.{key}", child)
        else:
            yield _below_adapters(f"{name}.{key}", child)


def _below_adapters(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The module that adapters stand around, if any do: they may go, and it stays."""
    while (base := module._modules.get(BASE_LAYER)) is not None:
        name, module = f"{name}.{BASE_LAYER}", base
    return name, module


def place_below_adapters(block: nn.Module, module: nn.Module) -> tuple[nn.Module, str]:
    """The module of a block, and the name in it, where a part stands: alone or below adapters."""
    for parent in block.modules():
        for key, child in parent._modules.items():
            if child is module:
                return (parent, key) if key != BASE_LAYER else place_below_adapters(block, parent)
    raise AssertionError("the part is not in its block")


def _nbytes(module: nn.Module) -> int:
    return sum({tie_key(e.tensor): e.tensor.nbytes for e in entries_of(module)}.values())


def _homes_of_parameters(
    model: nn.Module, blocks: list[tuple[str, nn.Module]]
) -> dict[object, set[str]]:
    """For each parameter, the blocks where it appears; "" stands for outside of all."""
    homes: dict[object, set[str]] = {}
    inside: set[int] = set()
    for name, block in blocks:
        inside.update(id(module) for module in block.modules())
        for entry in entries_of(block):
            homes.setdefault(tie_key(entry.tensor), set()).add(name)
    for entry in entries_of(model):
        if id(entry.owner) not in inside:
            homes.setdefault(tie_key(entry.tensor), set()).add("")
    return homes


def _ordered_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    lists = {
        name: [(f"{name}.{i}", block) for i, block in enumerate(child)]
        for name, child in model.named_children()
        if isinstance(child, nn.ModuleList)
    }
    order = _DECLARED.get(type(model).__name__, _as_registered)
    seen: set[int] = set()
    for name, block in order(model, lists):
        # A block that stands twice (a looped layer) is one unit.
        if not isinstance(block, CONTAINERS) and id(block) not in seen:
            seen.add(id(block))
            yield name, block


Named = tuple[str, nn.Module]
Lists = dict[str, list[Named]]


def _as_registered(_: nn.Module, lists: Lists) -> Iterator[Named]:
    for blocks in lists.values():
        yield from blocks


def _vace(_: nn.Module, lists: Lists) -> Iterator[Named]:
    """VACE computes all its hints before the first ordinary block."""
    yield from lists.pop("vace_blocks", [])
    yield from _as_registered(_, lists)


def _animate(model: nn.Module, lists: Lists) -> Iterator[Named]:
    """Animate runs one face block behind every `inject_face_latents_blocks`-th ordinary one."""
    faces = lists.pop("face_adapter", [])
    blocks = lists.pop("blocks", [])
    every: int = getattr(getattr(model, "config", None), "inject_face_latents_blocks", 5)
    for i, block in enumerate(blocks):
        yield block
        if i % every == 0 and i // every < len(faces):
            yield faces[i // every]
    yield from faces[-(-len(blocks) // every) :]
    yield from _as_registered(model, lists)


_DECLARED: dict[str, Callable[[nn.Module, Lists], Iterator[Named]]] = {
    "WanVACETransformer3DModel": _vace,
    "WanAnimateTransformer3DModel": _animate,
}


def check_wrappable(model: nn.Module) -> None:
    """Raises WrapError for models that someone else moves, or whose weights are not plain bytes."""
    for name, module in model.named_modules():
        where = f"{type(model).__name__}.{name}" if name else type(model).__name__
        if (hook := foreign_hook(module)) is not None:
            raise WrapError(
                f"{where} has {hook}, which moves its weights too. Load the model again without "
                "it, or remove it (accelerate.hooks.remove_hook_from_module for accelerate's)."
            )
        for key, parameter in module._parameters.items():
            if parameter is not None:
                _check_parameter(f"{where}.{key}", parameter)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                raise WrapError(f"{where}.{key} is on the meta device: it has no value.")


def foreign_hook(module: nn.Module) -> str | None:
    """The name of a hook of accelerate or diffusers that moves the module's weights, if any."""
    if "_hf_hook" in module.__dict__:
        return "an accelerate hook (enable_model_cpu_offload, device_map, ...)"
    registry = module.__dict__.get("_diffusers_hook")
    for hook in ("group_offloading", "layerwise_casting"):
        if registry is not None and registry.get_hook(hook) is not None:
            return f"diffusers' hook {hook!r}"
    return None


def _check_parameter(where: str, parameter: Tensor) -> None:
    if parameter.device.type == "meta":
        raise WrapError(f"{where} is on the meta device: it has no value. Load the weights first.")
    if type(parameter) not in (nn.Parameter, Tensor):
        raise WrapError(
            f"{where} is a {type(parameter).__name__}; only plain parameters can be streamed "
            "(quantized and distributed tensors can't yet)"
        )
    if parameter.layout != torch.strided:
        raise WrapError(f"{where} has layout {parameter.layout}; only dense tensors are streamed")
