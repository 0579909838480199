"""What a checkpoint holds and what a class makes of it, beside diffusers' `from_pretrained`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ModelMixin,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from safetensors.torch import load_file, save_file
from torch import nn

import wanoffload
from tests.small_models import MODELS
from wanoffload.loading.checkpoint import Checkpoint
from wanoffload.loading.describing import Described, describe
from wanoffload.loading.header import LARGEST_HEADER, StoredTensor, read_header

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
WAYS = ["whole", "sharded", "variant", "sharded variant", "old sharded variant", "one file"]


def save(model: nn.Module, folder: Path, way: str = "whole") -> dict[str, Any]:
    """Saves a model in one of the ways; gives the keywords to open it with."""
    variant = "fp16" if "variant" in way else None
    size = "40KB" if "sharded" in way else "1GB"
    model.save_pretrained(folder / "transformer", variant=variant, max_shard_size=size)
    if way == "old sharded variant":
        index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.fp16.json"
        index.rename(index.with_name("diffusion_pytorch_model.safetensors.fp16.index.json"))
    return {"variant": variant} if variant else {}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline's folder with a transformer in one file."""
    save(MODELS["wan22_5b"].make(), tmp_path)
    return tmp_path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The same in shards."""
    save(MODELS["wan22_5b"].make(), tmp_path, "sharded")
    return tmp_path


def read(tensor: StoredTensor) -> bytes:
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        return file.read(tensor.nbytes)


# What is there.


@pytest.mark.parametrize("way", WAYS)
def test_the_table_says_where_each_tensor_of_from_pretrained_stands(
    tmp_path: Path, way: str
) -> None:
    options = save(MODELS["wan21_i2v"].make(), tmp_path, way)
    place = tmp_path / "transformer" / WEIGHTS if way == "one file" else tmp_path
    checkpoint = Checkpoint.open(place, **options)
    files = sorted((tmp_path / "transformer").glob("*.safetensors"))
    assert checkpoint.files == tuple(files)
    assert len(files) > 3 if "sharded" in way else len(files) == 1
    expected = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        stored = checkpoint.tensors[name]
        assert (stored.name, stored.shape) == (name, tuple(tensor.shape))
        assert stored.dtype == ("BF16" if tensor.dtype == torch.bfloat16 else "F32")
        assert read(stored) == tensor.view(torch.uint8).numpy().tobytes()


def test_the_models_own_folder_may_be_given(folder: Path, tmp_path: Path) -> None:
    inner = folder / "transformer"
    outer = Checkpoint.open(folder)
    assert Checkpoint.open(inner).tensors == outer.tensors
    assert Checkpoint.open(str(inner), subfolder=None).tensors == outer.tensors
    assert Checkpoint.open(folder, "transformer").config == outer.config


def test_where_two_files_could_be_meant_it_is_the_one_that_diffusers_reads(folder: Path) -> None:
    """`from_pretrained` takes a single file above the subfolder first."""
    MODELS["wan22_5b"].make(seed=1).save_pretrained(folder)
    loaded = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    stored = Checkpoint.open(folder).tensors["proj_out.weight"]
    assert stored.file == folder / WEIGHTS
    found = torch.frombuffer(bytearray(read(stored)), dtype=torch.bfloat16).float()
    assert torch.equal(found, loaded.proj_out.weight.flatten())


def test_a_variant_beside_the_model_is_read_only_when_asked_for(folder: Path) -> None:
    save(MODELS["wan22_5b"].make(seed=1).float(), folder, "variant")
    plain, variant = Checkpoint.open(folder), Checkpoint.open(folder, variant="fp16")
    assert plain.files[0].name == WEIGHTS
    assert variant.files[0].name == "diffusion_pytorch_model.fp16.safetensors"
    assert {t.dtype for t in variant.tensors.values()} == {"F32"}


def hub_cache(folder: Path, cache: Path, model: str, commit: str) -> None:
    """Puts a folder into a cache, as huggingface_hub downloads it."""
    home = cache / f"models--{model.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    shutil.copytree(folder, home / "snapshots" / commit)


@pytest.mark.parametrize("way", ["whole", "sharded", "variant", "sharded variant"])
def test_a_model_of_the_hub_is_read_from_its_cache(tmp_path: Path, way: str) -> None:
    options = save(MODELS["wan22_5b"].make(), tmp_path / "model", way)
    hub_cache(tmp_path / "model", tmp_path / "cache", "some/model", "a" * 40)
    there = {"cache_dir": tmp_path / "cache", "local_files_only": True, **options}
    found = Checkpoint.open("some/model", **there)
    local = Checkpoint.open(tmp_path / "model", **options)
    assert [file.name for file in found.files] == [file.name for file in local.files]
    assert all(tmp_path / "cache" in file.parents for file in found.files)
    assert (found.source, found.sharded) == ("some/model", "sharded" in way)
    assert found.config == local.config
    assert found.tensors.keys() == local.tensors.keys()


def test_what_the_cache_lacks_is_named(tmp_path: Path) -> None:
    save(MODELS["wan22_5b"].make(), tmp_path / "model", "sharded")
    hub_cache(tmp_path / "model", tmp_path / "cache", "some/model", "a" * 40)
    there: dict[str, Any] = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    with pytest.raises(wanoffload.CheckpointError, match=r"transformer/config.json could not be"):
        Checkpoint.open("some/other", **there)
    with pytest.raises(wanoffload.CheckpointError, match=r"has neither .*fp16.safetensors nor"):
        Checkpoint.open("some/model", variant="fp16", **there)
    snapshot = tmp_path / "cache" / "models--some--model" / "snapshots" / ("a" * 40)
    shard = sorted((snapshot / "transformer").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(wanoffload.CheckpointError, match=f"lacks {shard.name}"):
        Checkpoint.open("some/model", **there)


# What is not there, or not whole.


def refusal(place: Path | str, **options: Any) -> str:
    """The message with which a checkpoint is refused."""
    with pytest.raises(wanoffload.CheckpointError) as caught:
        Checkpoint.open(place, **options)
    return str(caught.value)


def test_what_is_no_checkpoint_is_named(tmp_path: Path, folder: Path) -> None:
    assert "nothing/here/at-all is neither a folder" in refusal("nothing/here/at-all")
    assert "/no/such is neither a folder" in refusal("/no/such")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty' / 'config.json'} is missing" in refusal(tmp_path / "empty")
    assert "config.json is no .safetensors file" in refusal(folder / "transformer" / "config.json")
    assert "chooses among several" in refusal(folder / "transformer" / WEIGHTS, variant="fp16")
    assert "neither diffusion_pytorch_model.fp16.safetensors" in refusal(folder, variant="fp16")


def test_a_missing_or_broken_config_is_named(folder: Path) -> None:
    config = folder / "transformer" / "config.json"
    config.write_text("{")
    assert f"{config} can't be read as JSON" in refusal(folder)
    config.write_text("[]")
    assert f"{config} holds no JSON object" in refusal(folder)
    config.unlink()
    assert f"{config} is missing" in refusal(folder)
    assert f"{config} is missing" in refusal(folder / "transformer" / WEIGHTS)


@pytest.mark.parametrize("size", ["1GB", "40KB"])
def test_pickled_weights_are_not_read_and_the_way_out_is_told(tmp_path: Path, size: str) -> None:
    inner = tmp_path / "transformer"
    MODELS["wan22_5b"].make().save_pretrained(inner, safe_serialization=False, max_shard_size=size)
    message = refusal(tmp_path)
    assert f"{inner} holds neither {WEIGHTS}" in message
    assert "convert" in message


def test_a_missing_shard_is_named(shards: Path) -> None:
    shard = sorted((shards / "transformer").glob("*.safetensors"))[1]
    shard.unlink()
    assert f"transformer lacks {shard.name}, which {INDEX} names" in refusal(shards)


def change_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = folder / "transformer" / INDEX
    table = json.loads(index.read_text())
    change(table)
    index.write_text(json.dumps(table))


def test_an_index_that_contradicts_its_shards_is_refused(shards: Path) -> None:
    inner = shards / "transformer"
    first, second = sorted(file.name for file in inner.glob("*.safetensors"))[:2]
    moved = next(iter(read_header(inner / first)))
    change_index(shards, lambda table: table["weight_map"].update({moved: second}))
    assert f"{moved} is in {second}, but it stands in {first}" in refusal(shards)
    change_index(shards, lambda table: table["weight_map"].update({moved: first, "extra": second}))
    assert f"extra is in {second}, but no shard holds it" in refusal(shards)
    change_index(shards, lambda table: table["weight_map"].update({"extra": "../other"}))
    assert "extra stands in '../other', which is no file's name" in refusal(shards)
    change_index(shards, lambda table: table.pop("weight_map"))
    assert f"{INDEX} has no weight_map" in refusal(shards)


def test_a_tensor_in_two_shards_is_refused(shards: Path) -> None:
    first, second = sorted((shards / "transformer").glob("*.safetensors"))[:2]
    both = {**load_file(second), **dict(list(load_file(first).items())[:1])}
    save_file(both, second)
    name = next(iter(load_file(first)))
    assert f"{name} stands in {first} and in {second}" in refusal(shards)


# Headers.


def header_of(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    found: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found


def write(file: Path, header: dict[str, Any] | bytes, nbytes: int = 16) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(nbytes))
    return file


def row(begin: int, end: int, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BROKEN: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "no json": (b"{nonsense", "its header is not JSON"),
    "no utf-8": (b'{"\xff": 1}', "its header is not JSON"),
    "no object": (b"[1, 2]", "its header is not a JSON object"),
    "twice": (b'{"a": 1, "a": 2}', "its header names a twice"),
    "no entry": ({"a": 3}, "entry of a lacks dtype"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 16]}}, "entry of a lacks"),
    "three offsets": ({"a": row(0, 16) | {"data_offsets": [0, 8, 16]}}, "entry of a lacks"),
    "a wrong shape": ({"a": row(0, 16, shape=[4.0, 4])}, r"a has shape \[4.0, 4\]"),
    "a negative shape": ({"a": row(0, 16, shape=[-4, -4])}, "a has shape"),
    "turned round": ({"a": row(16, 0, shape=[16])}, "a has shape .* bytes 16 to 0"),
    "unknown dtype": ({"a": row(0, 16, "X8")}, "a has the dtype 'X8', which is unknown"),
    "no dtype": ({"a": row(0, 16, None)}, "a has the dtype None"),
    "a short tensor": ({"a": row(0, 16, "F32", [5])}, "takes 20 bytes, not 16"),
    "a long tensor": ({"a": row(0, 16, "F32", [3])}, "takes 12 bytes, not 16"),
    "overlap": ({"a": row(0, 9), "b": row(8, 16)}, "b overlaps a: .* byte [0-9]+, and a ends"),
    "gap": ({"a": row(0, 7), "b": row(8, 16)}, "b leaves a gap behind a"),
    "late start": ({"a": row(1, 16)}, "a leaves a gap behind the header"),
    "out of range": ({"a": row(0, 17)}, "complete.* a, ends at byte [0-9]+, the file at"),
    "bytes left": ({"a": row(0, 15)}, "its tensors end at byte"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_header_is_refused_by_file_and_tensor(tmp_path: Path, kind: str) -> None:
    header, expected = BROKEN[kind]
    file = write(tmp_path / "a.safetensors", header)
    with pytest.raises(wanoffload.CheckpointError, match=expected) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


def test_a_header_without_fault_is_read(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "b": row(8, 16, "F32", [2, 1]), "a": row(0, 8)}
    header |= {"none": row(8, 8, "F32", [0, 3]), "scalar": row(16, 20, "F32", [])}
    text = json.dumps(header).encode() + b"   "
    file = write(tmp_path / "a.safetensors", text, 20)
    first = 8 + len(text)
    assert read_header(file) == {
        "a": StoredTensor(file, "a", "U8", (8,), first, 8),
        "none": StoredTensor(file, "none", "F32", (0, 3), first + 8, 0),
        "b": StoredTensor(file, "b", "F32", (2, 1), first + 8, 8),
        "scalar": StoredTensor(file, "scalar", "F32", (), first + 16, 4),
    }


@pytest.mark.parametrize("less", [1, 2, 4096])
def test_a_truncated_file_is_refused_with_both_numbers(folder: Path, less: int) -> None:
    file = folder / "transformer" / WEIGHTS
    size = file.stat().st_size
    os.truncate(file, size - less)
    assert f"ends at byte {size}, the file at byte {size - less}" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 7, 8, 100])
def test_a_file_truncated_in_its_header_is_refused(folder: Path, keep: int) -> None:
    file = folder / "transformer" / WEIGHTS
    os.truncate(file, keep)
    assert f"{file} can't be read, is it complete?" in refusal(folder)


def test_a_header_longer_than_the_format_permits_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes((LARGEST_HEADER + 1).to_bytes(8, "little") + b"{}")
    with pytest.raises(wanoffload.CheckpointError, match=f"have {LARGEST_HEADER + 1} bytes"):
        read_header(file)


def test_a_pointer_of_git_lfs_is_told_from_weights(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "transformer" / WEIGHTS).write_text(pointer)
    assert "git lfs pull" in refusal(folder)


def test_a_file_that_cannot_be_opened_is_named(folder: Path) -> None:
    with pytest.raises(wanoffload.CheckpointError, match="transformer can't be read"):
        read_header(folder / "transformer")
    with pytest.raises(wanoffload.CheckpointError, match=r"none.safetensors is missing"):
        read_header(folder / "none.safetensors")


# The model that is described.


def filled(described: Described) -> nn.Module:
    """The described module with its weights read by the table, cast as it says."""
    files = {tensor.file: load_file(tensor.file) for tensor in described.stored.values()}
    values = {
        name: files[stored.file][stored.name].to(described.dtypes[name])
        for name, stored in described.stored.items()
    }
    described.module.load_state_dict(values, assign=True)
    return described.module


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    assert type(found) is type(expected)
    assert dict(found.config) == dict(expected.config)  # type: ignore[arg-type, call-overload]
    for kind in ("named_parameters", "named_buffers", "state_dict"):
        ours, theirs = dict(getattr(found, kind)()), dict(getattr(expected, kind)())
        assert list(ours) == list(theirs), kind
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype, name
            assert ours[name].stride() == value.stride(), name
            assert ours[name].requires_grad == value.requires_grad, name
            assert ours[name].device.type == value.device.type, name
            assert torch.equal(ours[name].float(), value.float()), name
    flags = [(name, module.training) for name, module in expected.named_modules()]
    assert [(name, module.training) for name, module in found.named_modules()] == flags


DTYPES = [None, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_the_described_model_is_that_of_from_pretrained(
    tmp_path: Path, kind: str, dtype: torch.dtype | None
) -> None:
    model = MODELS[kind].make()
    save(model, tmp_path)
    expected = type(model).from_pretrained(  # type: ignore[attr-defined]
        tmp_path, subfolder="transformer", torch_dtype=dtype
    )
    described = describe(type(model), Checkpoint.open(tmp_path), dtype)
    assert all(parameter.is_meta for parameter in described.module.parameters())
    assert not any(buffer.is_meta for buffer in described.module.buffers())
    for name, parameter in described.module.named_parameters():
        assert parameter.dtype == described.dtypes[name]
    assert_same(filled(described), expected)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("way", WAYS[:-1])
def test_it_is_so_however_the_checkpoint_was_saved(
    tmp_path: Path, way: str, stored: torch.dtype, dtype: torch.dtype | None
) -> None:
    options = save(MODELS["wan21_t2v"].make().to(stored), tmp_path, way)
    expected = WanTransformer3DModel.from_pretrained(
        str(tmp_path), subfolder="transformer", torch_dtype=dtype, **options
    )
    checkpoint = Checkpoint.open(str(tmp_path), **options)
    assert_same(filled(describe(WanTransformer3DModel, checkpoint, dtype)), expected)


class Odd(ModelMixin, ConfigMixin):
    """What the small models lack: buffers of both kinds, whole numbers, strides, a tie, renames."""

    _keep_in_fp32_modules = "kept"
    _keys_to_ignore_on_load_unexpected = [r"^old_"]  # noqa: RUF012  # as diffusers declares it

    @register_to_config
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.kept = nn.Linear(width, width)
        self.other_kept = nn.Linear(width, width)
        self.turned = nn.Parameter(torch.ones(3, width).t())
        self.whole = nn.Parameter(torch.ones(width, dtype=torch.int32), requires_grad=False)
        self.wide = nn.Parameter(torch.ones(width, dtype=torch.float64))
        self.tied = nn.Linear(width, width)
        self.tied.weight = self.other_kept.weight
        self.frozen = nn.Parameter(torch.ones(width), requires_grad=False)
        self.empty = nn.Parameter(torch.ones(0, width))
        self.register_buffer("saved", torch.ones(width))
        self.register_buffer("count", torch.ones(1, dtype=torch.int64))
        self.register_buffer("made", torch.arange(width) / 3, persistent=False)

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, Any]) -> None:
        if "wide_of_old" in state_dict:
            state_dict["wide"] = state_dict.pop("wide_of_old")


def odd_state() -> dict[str, torch.Tensor]:
    values = torch.arange(16.0).reshape(4, 4) / 7
    return {
        "kept.weight": values.double(),
        "kept.bias": values[0].half(),
        "other_kept.weight": values.bfloat16(),
        "other_kept.bias": values[1].clone(),
        "turned": values[:, :3].contiguous(),
        "whole": torch.arange(4),
        "wide_of_old": values[2].clone(),
        "tied.weight": values + 1,
        "tied.bias": torch.arange(4),
        "frozen": values[1] + 2,
        "empty": torch.ones(0, 4),
        "saved": values[3].clone(),
        "count": torch.tensor([3]),
        "old_thing": torch.ones(2),
    }


def save_odd(folder: Path, **changes: torch.Tensor) -> Path:
    Odd().save_config(folder)
    save_file({**odd_state(), **changes}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rules_for_odd_tensors_are_those_of_from_pretrained(
    tmp_path: Path, dtype: torch.dtype | None
) -> None:
    save_odd(tmp_path)
    expected = Odd.from_pretrained(tmp_path, torch_dtype=dtype)
    described = describe(Odd, Checkpoint.open(tmp_path), dtype)
    for name, parameter in described.module.named_parameters():
        assert parameter.stride() == expected.get_parameter(name).stride()
    assert_same(filled(described), expected)


def test_float8_reaches_the_buffers_of_classes_that_keep_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_odd(tmp_path)
    monkeypatch.setattr(Odd, "_keep_in_fp32_modules", None)
    expected = Odd.from_pretrained(tmp_path, torch_dtype=torch.float8_e4m3fn)
    assert expected.made.dtype == torch.float8_e4m3fn
    found = describe(Odd, Checkpoint.open(tmp_path), torch.float8_e4m3fn)
    assert_same(filled(found), expected)


def test_describing_leaves_the_process_as_it_was(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    init, register = nn.init.normal_, nn.Module.register_parameter
    with torch.inference_mode():
        found = describe(WanTransformer3DModel, checkpoint, torch.bfloat16)
    assert not any(buffer.is_inference() for buffer in found.module.buffers())
    with pytest.raises(wanoffload.CheckpointError):
        describe(QwenImageTransformer2DModel, checkpoint, torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32
    assert nn.init.normal_ is init
    assert nn.Module.register_parameter is register


# What doesn't fit.


def misfit(folder: Path, cls: Any = Odd, dtype: Any = None) -> str:
    with pytest.raises(wanoffload.CheckpointError) as caught:
        describe(cls, Checkpoint.open(folder), dtype)
    return str(caught.value)


def test_all_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    save_odd(tmp_path, extra=torch.ones(2, 3), saved=torch.ones(5))
    state = load_file(tmp_path / WEIGHTS)
    del state["kept.bias"]
    save_file(state, tmp_path / WEIGHTS)
    message = misfit(tmp_path)
    file = tmp_path / WEIGHTS
    assert f"kept.bias, of shape (4,), is missing in {file}" in message
    assert f"saved has shape (5,) in {file}, not (4,)" in message
    assert f"extra, of shape (2, 3) in {file}, is not in the model" in message
    assert "old_thing" not in message
    assert message.count("\n") == 3


def test_of_many_misfits_ten_are_told(folder: Path) -> None:
    config = folder / "transformer" / "config.json"
    text = json.loads(config.read_text()) | {"num_layers": 4, "_class_name": "Another"}
    config.write_text(json.dumps(text))
    message = misfit(folder, WanTransformer3DModel, torch.bfloat16)
    assert "(which is one of Another)" in message
    first, *tensors, last = message.splitlines()
    assert len(tensors) == 10
    assert f"of {folder} are not those of a WanTransformer3DModel by {config}" in first
    assert tensors[0].startswith("  blocks.3.scale_shift_table, of shape (1, 6, 48), is missing")
    assert last == "  and 17 more"


def test_a_config_of_which_the_class_can_not_be_made_is_named(folder: Path) -> None:
    message = misfit(folder, QwenImageTransformer2DModel, torch.bfloat16)
    config = folder / "transformer" / "config.json"
    assert f"no QwenImageTransformer2DModel can be made from {config}" in message
    assert "a model of class WanTransformer3DModel: TypeError" in message


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.int8, 16], ids=str)
def test_what_is_no_floating_dtype_is_refused(folder: Path, dtype: Any) -> None:
    assert "torch_dtype is a" in misfit(folder, WanTransformer3DModel, dtype)


@pytest.mark.parametrize("cls", [nn.Linear, 7, "WanTransformer3DModel"], ids=str)
def test_what_is_no_model_class_is_refused(folder: Path, cls: Any) -> None:
    assert "is no model class of diffusers" in misfit(folder, cls)


def test_a_quantized_checkpoint_is_refused(folder: Path) -> None:
    config = folder / "transformer" / "config.json"
    text = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "torchao"}}
    config.write_text(json.dumps(text))
    assert f"{config} describes a quantized model" in misfit(folder, WanTransformer3DModel)


def test_parts_of_bytes_have_no_dtype_in_torch(tmp_path: Path) -> None:
    Odd().save_config(tmp_path)
    save_odd(tmp_path)
    file = tmp_path / WEIGHTS
    header = header_of(file)
    header["kept.bias"] |= {"dtype": "F4", "shape": [16]}
    write(file, header, 8)
    data = max(row["data_offsets"][1] for name, row in header.items() if name != "__metadata__")
    write(file, header, data)
    assert "kept.bias has shape (16,)" in misfit(tmp_path, dtype=torch.bfloat16)
