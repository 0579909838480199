"""A pipeline in a local folder, in the hub's layout: configs, and weights where they are there.

Of weights only the headers are read. Bytes are those after a load in bf16, with what the class
keeps in fp32 (see `formulas`), whatever the checkpoint was saved in; tensors of other
classes, and dtypes other than floating point of 2 bytes and more, count as they are stored. Or, of
components for which it is known, those after a load in another dtype.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from wanoffload.errors import CheckpointError
from wanoffload.facts.block_parts import BlockTensors, TensorBytes, taken_apart
from wanoffload.facts.model import ComponentFacts, PartFacts
from wanoffload.facts.parts import Part, Parts, is_relevant
from wanoffload.facts.tally import image_bytes
from wanoffload.loading.files import read_json
from wanoffload.loading.header import read_header

_STORED = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4}
_STORED |= {"I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "C64": 8}
_BF16, _FP32_STORED = "BF16", "F32"
_FLOATING = ("F64", _FP32_STORED, "F16", _BF16)
_WAN_FP32 = ("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
_FP32: dict[str, tuple[str, ...]] = {
    "WanTransformer3DModel": _WAN_FP32,
    "WanVACETransformer3DModel": _WAN_FP32,
    "WanAnimateTransformer3DModel": (*_WAN_FP32, "motion_synthesis_weight"),
    "QwenImageTransformer2DModel": (),
    "UMT5EncoderModel": (),
    "CLIPVisionModel": (),
    "CLIPVisionModelWithProjection": (),
    "Qwen2_5_VLForConditionalGeneration": (),
    "AutoencoderKLQwenImage": (),
}
"""Known classes, and the parts of names whose tensors diffusers keeps in fp32."""
_ALL_FP32 = ("AutoencoderKLWan",)
_NOT_LOADED = {
    "Wan": re.compile(r"norm_added_q\."),
    "CLIP": re.compile(r"position_ids$"),
    "UMT5": re.compile(r"^encoder\.embed_tokens\."),
}
"""By the start of the class's name, what some checkpoints hold and the loaded model does not: what
diffusers ignores for Wan, a buffer, the tied copy of an embedding."""
_IN_LIST = re.compile(r"(.*?)\.(\d+)\.")


@dataclass(frozen=True)
class Loaded:
    """A tensor as it will be in memory; `dtype` as safetensors names it."""

    nbytes: int
    dtype: str


Tensors = dict[str, Loaded]
"""By the tensor's name."""


def look_at_folder(
    folder: Path,
    *,
    without: Container[str] = (),
    dtypes: Mapping[str, str] = MappingProxyType({}),
) -> Parts:
    """Raises CheckpointError, which names the file, for what is missing or can't be read.

    `without`: names of components that are not looked at. `dtypes`: by a component's name, the
    dtype it will be loaded in, as safetensors names it.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise CheckpointError(
            f"{folder} has no model_index.json: a pipeline's folder in the hub's layout is "
            "expected, as save_pretrained or a download makes it"
        )
    index = read_json(index_file)
    parts = {
        name: _part(folder / name, value[1], dtypes.get(name))
        for name, value in index.items()
        if is_relevant(name)
        and name not in without
        and _names_class(value)
        and value[1] is not None
    }
    settings = {name: value for name, value in index.items() if not _names_class(value)}
    return Parts(str(folder), str(index.get("_class_name", "")), settings, parts)


def _names_class(value: Any) -> bool:
    """A component in model_index.json: library and class, both null where it was left out."""
    pair = isinstance(value, list) and len(value) == 2
    return pair and all(item is None or isinstance(item, str) for item in value)


def _part(folder: Path, name: str, dtype: str | None) -> Part:
    """A scheduler has a config of its own name, and no weights."""
    own = folder / "scheduler_config.json"
    config = read_json(own if own.is_file() else folder / "config.json")
    config["_class_name"] = name
    tensors = {
        tensor: loaded
        for file in _weight_files(folder)
        for tensor, loaded in _tensors(file, name, dtype)
        if not _ignored(name, tensor)
    }
    return Part(config, _weights(tensors, config) if tensors else None)


def _ignored(name: str, tensor: str) -> bool:
    return any(
        name.startswith(start) and pattern.search(tensor) for start, pattern in _NOT_LOADED.items()
    )


def _weight_files(folder: Path) -> list[Path]:
    """The files that a load would read; none where no weights are there.

    Raises CheckpointError where some shards are missing, or it can't be told which file counts.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    plain = [file for file in indices if file.name.count(".") == 3] or indices
    if plain:
        return _shards(folder, plain[0])
    files = sorted(folder.glob("*.safetensors"))
    named = [file for file in files if file.name.count(".") == 1] or files
    if len(named) > 1:
        names = ", ".join(file.name for file in named)
        raise CheckpointError(f"{folder} holds {names} and no index: which of them is the model?")
    return named


def _shards(folder: Path, index: Path) -> list[Path]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict):
        raise CheckpointError(f"{index} has no weight_map")
    files = [folder / name for name in sorted(set(table.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing and len(missing) < len(files):
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
    return [] if missing else files


def _tensors(file: Path, name: str, dtype: str | None) -> Iterator[tuple[str, Loaded]]:
    """Names, and what is loaded, from the file's header."""
    for tensor in read_header(file).values():
        loaded = _loaded_dtype(name, tensor.name, tensor.dtype, dtype)
        yield tensor.name, Loaded(math.prod(tensor.shape) * _STORED.get(loaded, 1), loaded)


def _loaded_dtype(name: str, tensor: str, stored: str, dtype: str | None) -> str:
    """The dtype of this class's tensor, once loaded; `dtype`: that which is asked for."""
    if stored not in _FLOATING:
        return stored
    if dtype is None and name in _ALL_FP32:
        return _FP32_STORED
    if dtype is None and name not in _FP32:
        return stored
    kept = any(part in _FP32.get(name, ()) for part in tensor.split("."))
    return _FP32_STORED if kept else dtype or _BF16


# Blocks, told by their names.

Block = dict[str, Loaded]
"""By the tensor's name inside the block."""
Lists = dict[str, dict[int, Block]]
"""By a list's name and the number of its item, the tensors."""


def _weights(tensors: Tensors, config: Mapping[str, Any]) -> ComponentFacts:
    """Blocks are the items of the list (in a transformer: lists at the top) with most bytes."""
    lists: Lists = {}
    for tensor, loaded in tensors.items():
        if found := _IN_LIST.match(tensor):
            block = lists.setdefault(found[1], {}).setdefault(int(found[2]), {})
            block[tensor[found.end() :]] = loaded
    name = str(config["_class_name"])
    streamed = _streamed(lists, name)
    items = {key: [block for _, block in sorted(lists[key].items())] for key in streamed}
    blocks = list(_in_order(items, name, config))
    inside = [each for block in blocks for each in block.values()]
    everything = sum(each.nbytes for each in tensors.values())
    parts, loose = _parts(blocks, name) if any("." not in key for key in streamed) else ((), 0)
    return ComponentFacts(
        block_bytes=tuple(image_bytes(each.nbytes for each in block.values()) for block in blocks),
        other_bytes=everything - sum(each.nbytes for each in inside),
        bf16_bytes=sum(each.nbytes for each in inside if each.dtype == _BF16),
        parts=parts,
        loose_bytes=loose,
    )


def _streamed(lists: Lists, name: str) -> list[str]:
    if name.startswith("Autoencoder") or not lists:
        return []
    top = [key for key in lists if "." not in key]
    if top:
        return top

    def held(key: str) -> int:
        return sum(t.nbytes for block in lists[key].values() for t in block.values())

    return [max(lists, key=held)]


def _in_order(
    blocks: dict[str, list[Block]], name: str, config: Mapping[str, Any]
) -> Iterator[Block]:
    """As the engine orders them: `wanoffload.units`."""
    if name == "WanVACETransformer3DModel":
        yield from blocks.pop("vace_blocks", [])
    if name == "WanAnimateTransformer3DModel":
        every = config.get("inject_face_latents_blocks", 5)
        faces = iter(blocks.pop("face_adapter", []))
        for index, block in enumerate(blocks.pop("blocks", [])):
            yield block
            if index % every == 0:
                yield from [face for face in [next(faces, None)] if face is not None]
        yield from faces
    for items in blocks.values():
        yield from items


# Parts of blocks.

_WAN_ORDER = (
    *("proj_in", "attn1", "attn2", "ffn", "proj_out"),
    *("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k"),
    *("add_k_proj", "add_v_proj", "norm_added_k"),
)
_QWEN_ORDER = (
    *("img_mod", "attn", "img_mlp", "txt_mod", "txt_mlp"),
    *("norm_q", "norm_k", "to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "add_q_proj"),
    *("to_out", "to_add_out", "norm_added_q", "norm_added_k"),
)
_ORDER = {"Wan": _WAN_ORDER, "QwenImage": _QWEN_ORDER}
"""By the start of the class's name: how modules follow each other in a block, and in its parts. A
file has them by name."""


def _parts(blocks: list[Block], name: str) -> tuple[tuple[PartFacts, ...], int]:
    """A module that a block calls is told by its name. What looks like a list of modules there is
    taken for one module: so it is in the known classes."""
    known = next((order for start, order in _ORDER.items() if name.startswith(start)), ())
    return taken_apart(_taken_apart(block, known) for block in blocks)


def _taken_apart(block: Block, known: tuple[str, ...]) -> BlockTensors:
    called: dict[str, list[TensorBytes]] = {}
    rest: list[TensorBytes] = []
    for tensor in sorted(block, key=lambda tensor: _rank(tensor, known)) if known else block:
        loaded = TensorBytes(block[tensor].nbytes, block[tensor].dtype == _BF16)
        module, dot, _ = tensor.partition(".")
        (called.setdefault(module, []) if dot else rest).append(loaded)
    return BlockTensors(list(called.values()), rest)


def _rank(tensor: str, known: tuple[str, ...]) -> list[tuple[int, str]]:
    """Weights stand before biases."""
    *modules, own = tensor.split(".")
    ranks = [(known.index(name) if name in known else len(known), name) for name in modules]
    return [*ranks, (0 if own == "weight" else 1, own)]
