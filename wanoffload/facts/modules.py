"""A pipeline, or a transformer, in memory: bytes of its parameters, configs, who else is at work.

Works for modules on any device, on none (meta), and offloaded by this package.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from wanoffload.errors import WrapError
from wanoffload.facts.block_parts import TensorBytes, part_facts
from wanoffload.facts.formulas import knows_dit
from wanoffload.facts.model import OTHER, ComponentFacts
from wanoffload.facts.parts import Part, Parts, family, is_dit, is_relevant
from wanoffload.facts.tally import image_bytes

if TYPE_CHECKING:
    from torch import nn

    from wanoffload.units import Unit


def look_at_pipeline(pipe: Any) -> Parts:
    """A diffusers pipeline, told by its `components`."""
    present = {
        name: component
        for name, component in pipe.components.items()
        if component is not None and is_relevant(name)
    }
    dits = [component for name, component in present.items() if is_dit(name)]
    return Parts(
        name=str(getattr(pipe, "name_or_path", "") or type(pipe).__name__),
        pipeline=pipeline_name(type(pipe)),
        config=_config(pipe),
        parts={name: part_of(name, component) for name, component in present.items()},
        # cache-dit marks the pipeline's class too, which then holds for others of that class.
        cache_dit="_context_manager" in vars(pipe) or any(_cached(dit) for dit in dits),
        sharded=any(_sharded(dit) for dit in dits),
    )


def look_at_transformer(model: nn.Module) -> Parts:
    """A transformer without a pipeline."""
    return Parts(
        name=type(model).__name__,
        pipeline=_class_name(model),
        config={},
        parts={"transformer": part_of("transformer", model)},
        cache_dit=_cached(model),
        sharded=_sharded(model),
    )


def _class_name(thing: Any) -> str:
    """The class's name; of a subclass of a transformer that the formulas know, that one's."""
    names = [kind.__name__ for kind in type(thing).__mro__]
    return next((name for name in names if knows_dit(name)), names[0])


def pipeline_name(pipeline: type[Any]) -> str:
    """The class's name; of a subclass of a pipeline whose family is known, that one's."""
    names = [kind.__name__ for kind in pipeline.__mro__]
    return next((name for name in names if family(name) != OTHER), names[0])


def _config(thing: Any) -> dict[str, Any]:
    """Of diffusers a mapping, of transformers an object with `to_dict`; {} where there is none."""
    config: Any = getattr(thing, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    return dict(config) if isinstance(config, Mapping) else {}


def part_of(name: str, component: Any) -> Part:
    """A component, by its name in the pipeline."""
    config = {**_config(component), "_class_name": _class_name(component)}
    if not hasattr(component, "named_parameters"):
        return Part(config)
    if name.startswith("vae"):
        return Part(config, ComponentFacts((), _all_bytes(component)))
    dit = is_dit(name)
    return Part(config, _weights(component, component if dit else _stack(component), dit))


def _weights(module: nn.Module, owner: nn.Module | None, in_parts: bool) -> ComponentFacts:
    """The blocks that stand in `owner`'s lists, as the engine finds and lays them out, and their
    parts."""
    from wanoffload.units import BLOCK, PART, any_compiled

    blocks = _units(owner, BLOCK)
    parts = _units(owner, PART) if in_parts else []
    inside = sum(map(_bytes_of, blocks))
    return ComponentFacts(
        tuple(image_bytes(tensor.nbytes for tensor in _tensors(unit)) for unit in blocks),
        _all_bytes(module) - inside,
        sum(tensor.nbytes for unit in blocks for tensor in _tensors(unit) if tensor.bf16),
        parts=tuple(map(part_facts, map(_tensors, parts), _numbers_of_blocks(parts))),
        loose_bytes=inside - sum(map(_bytes_of, parts)) if parts else 0,
        compiled=bool(parts) and any_compiled(parts),
    )


def _units(owner: nn.Module | None, granularity: str) -> list[Unit]:
    from wanoffload.units import find_units

    try:
        return find_units(owner, granularity) if owner is not None else []
    except WrapError:  # no block
        return []


def _numbers_of_blocks(parts: list[Unit]) -> list[int]:
    numbers: dict[int, int] = {}
    return [numbers.setdefault(id(part.block), len(numbers)) for part in parts]


def _tensors(unit: Unit) -> list[TensorBytes]:
    found = [group[0].tensor for group in unit.groups]
    return [TensorBytes(_nbytes(t), str(t.dtype) == "torch.bfloat16") for t in found]


def _bytes_of(unit: Unit) -> int:
    return sum(tensor.nbytes for tensor in _tensors(unit))


def _all_bytes(module: nn.Module) -> int:
    """Parameters, each once, however often it stands in the module."""
    from wanoffload.units import entries_of, tie_key

    return sum(
        {tie_key(entry.tensor): _nbytes(entry.tensor) for entry in entries_of(module)}.values()
    )


def _nbytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.dtype.itemsize)


def _stack(module: nn.Module) -> nn.Module | None:
    """The part of an encoder that owns the list of blocks with most bytes."""
    from torch import nn

    def heaviest(owner: nn.Module) -> int:
        lists = [child for child in owner.children() if isinstance(child, nn.ModuleList)]
        return max((_all_bytes(child) for child in lists), default=0)

    owners = [owner for owner in module.modules() if heaviest(owner)]
    return max(owners, key=heaviest, default=None)


# Who else is at work.


def _cached(model: nn.Module) -> bool:
    """Marks of the package cache-dit: on the transformer while it is on, or its own classes."""
    if getattr(model, "_is_cached", False):
        return True
    return any(type(module).__module__.split(".")[0] == "cache_dit" for module in model.modules())


def _sharded(model: nn.Module) -> bool:
    """Whether a parameter is a DTensor. Where that module was not imported, none can be."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return False
    return any(isinstance(parameter, module.DTensor) for parameter in _parameters(model))


def _parameters(model: nn.Module) -> Iterator[Any]:
    from wanoffload.units import entries_of

    return (entry.tensor for entry in entries_of(model))
