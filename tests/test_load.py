"""`load`: from files straight into place, beside `wrap(from_pretrained(...))`."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn

import wanoffload
from tests.small_models import MODELS, Inputs, forward
from tests.test_checkpoint import WAYS, WEIGHTS, Odd, assert_same, save, save_odd
from wanoffload import host_memory, wrapping
from wanoffload.host_tensor import HostTensor
from wanoffload.image import lay_out
from wanoffload.loading import stored_weights
from wanoffload.units import find_units

KIND = MODELS["wan22_5b"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(KIND.make(), tmp_path)
    return tmp_path


def on(device: str, inputs: Inputs) -> Inputs:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def both(
    folder: Path, kind: type[nn.Module], dtype: torch.dtype | None, device: str, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """A loaded model, and the same by way of from_pretrained and wrap."""
    loaded = wanoffload.load(kind, folder, torch_dtype=dtype, device=device, **options)
    model = kind.from_pretrained(  # type: ignore[attr-defined]
        folder, subfolder="transformer", torch_dtype=dtype, variant=options.get("variant")
    )
    for parameter in model.parameters():
        # Those that were not cast stand in the file's mapping, aligned to 8 bytes: the CPU's fp32
        # kernels then round in another way.
        parameter.data = parameter.data.clone()
    return loaded, wanoffload.wrap(model, device=device)


def assert_same_outputs(loaded: nn.Module, wrapped: nn.Module, inputs: Inputs) -> None:
    """Of two forwards, with as many blocks fetched."""
    for _ in range(2):
        assert torch.equal(forward(loaded, inputs), forward(wrapped, inputs))
    ours, theirs = (wanoffload.offloader(model).stats() for model in (loaded, wrapped))
    assert ours.acquires == theirs.acquires == 2 * ours.units
    assert (ours.host_bytes, ours.slot_bytes) == (theirs.host_bytes, theirs.slot_bytes)
    assert ours.locked_bytes == theirs.locked_bytes == ours.host_bytes


# What is loaded.


@pytest.mark.parametrize("dtype", [torch.bfloat16, None, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_a_loaded_model_is_that_of_from_pretrained_wrapped(
    tmp_path: Path, kind: str, dtype: torch.dtype | None, device: str
) -> None:
    model, inputs = MODELS[kind]()
    save(model, tmp_path, "sharded")
    loaded, wrapped = both(tmp_path, type(model), dtype, device)
    assert_same(loaded, wrapped)
    assert len([p for p in loaded.parameters() if isinstance(p, HostTensor)]) > 20
    cast = {
        name: value.to(dtype or torch.float32) if torch.is_floating_point(value) else value
        for name, value in on(device, inputs).items()
        if isinstance(value, torch.Tensor) and name != "timestep"
    }
    assert_same_outputs(loaded, wrapped, {**on(device, inputs), **cast})


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_it_is_so_however_the_checkpoint_was_saved(
    tmp_path: Path, way: str, stored: torch.dtype
) -> None:
    model, inputs = KIND()
    options = save(model.to(stored), tmp_path, way)
    if way == "one file":
        only = tmp_path / "transformer" / WEIGHTS
        loaded = wanoffload.load(type(model), only, torch_dtype=torch.bfloat16, device="cpu")
        loaded.register_to_config(_name_or_path=tmp_path)
        _, wrapped = both(tmp_path, type(model), torch.bfloat16, "cpu")
    else:
        loaded, wrapped = both(tmp_path, type(model), torch.bfloat16, "cpu", **options)
    assert_same(loaded, wrapped)
    assert_same_outputs(loaded, wrapped, inputs)


def test_options_are_those_of_wrap(folder: Path) -> None:
    model = wanoffload.load(
        WanTransformer3DModel,
        str(folder),
        torch_dtype=torch.bfloat16,
        prefetch=0,
        host="pageable",
        verify=True,
        device="cpu",
    )
    assert torch.equal(forward(model, KIND.inputs()), forward(KIND.make(), KIND.inputs()))
    runtime = wanoffload.offloader(model)
    assert runtime.verify
    stats = runtime.stats()
    assert stats.slots == 1
    assert stats.locked_bytes == stats.ring_bytes > 0


def test_loading_under_inference_mode_makes_ordinary_tensors(folder: Path) -> None:
    with torch.inference_mode():
        model = wanoffload.load(
            WanTransformer3DModel, folder, torch_dtype=torch.bfloat16, device="cpu"
        )
    values = [*model.parameters(), *model.buffers()]
    assert not any(value.is_inference() for value in values)


class OddBlocks(Odd):
    """Odd tensors in blocks, and beside them."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.blocks = nn.ModuleList(Odd(width) for _ in range(2))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_odd_tensors_of_blocks_are_loaded_by_the_same_rules(
    tmp_path: Path, dtype: torch.dtype | None
) -> None:
    """Whole numbers, other dtypes, no elements, buffers that are saved and such that are not."""
    inner = tmp_path / "transformer"
    inner.mkdir()
    save_odd(inner)
    state = load_file(inner / WEIGHTS)
    blocks = {
        f"blocks.{i}.{name.replace('wide_of_old', 'wide')}": value + i
        for name, value in state.items()
        for i in range(2)
        if name != "old_thing"
    }
    save_file({**state, **blocks}, inner / WEIGHTS)
    loaded, wrapped = both(tmp_path, OddBlocks, dtype, "cpu")
    assert_same(loaded, wrapped)
    assert len([p for p in loaded.parameters() if isinstance(p, HostTensor)]) == 22


# What a loaded model is afterwards.


def load_it(folder: Path, **options: Any) -> nn.Module:
    options = {"torch_dtype": torch.bfloat16, "device": "cpu", "host": "pinned", **options}
    return wanoffload.load(WanTransformer3DModel, folder, **options)


def test_what_is_written_after_loading_takes_effect(folder: Path) -> None:
    model, expected = load_it(folder), KIND.make()
    inputs = KIND.inputs()
    forward(model, inputs)
    for changed in (model, expected):
        with torch.no_grad():
            changed.get_parameter("blocks.1.ffn.net.2.weight").mul_(3)
            changed.get_parameter("proj_out.bias").add_(1)
    assert torch.equal(forward(model, inputs), forward(expected, inputs))
    model.load_state_dict(KIND.make(seed=5).state_dict())
    assert torch.equal(forward(model, inputs), forward(KIND.make(seed=5), inputs))


def test_the_files_are_not_what_is_written_to(folder: Path) -> None:
    before = (folder / "transformer" / WEIGHTS).read_bytes()
    model = load_it(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (folder / "transformer" / WEIGHTS).read_bytes() == before
    (folder / "transformer" / WEIGHTS).unlink()
    assert all(not value.any() for value in model.state_dict().values())


def test_a_loaded_model_saves_what_was_loaded(folder: Path, tmp_path: Path) -> None:
    load_it(folder).save_pretrained(tmp_path / "again")
    first, again = (load_file(f / WEIGHTS) for f in (folder / "transformer", tmp_path / "again"))
    assert first.keys() == again.keys()
    for name, value in first.items():
        assert again[name].dtype == value.dtype
        assert torch.equal(again[name], value), name
    configs = [
        json.loads((f / "config.json").read_text())
        for f in (folder / "transformer", tmp_path / "again")
    ]
    assert configs[1].pop("_name_or_path") == str(folder)
    assert configs[0] == configs[1]


def test_an_unwrapped_loaded_model_is_ordinary(folder: Path) -> None:
    model = wanoffload.unwrap(load_it(folder))
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    inputs = KIND.inputs()
    assert torch.equal(forward(model, inputs), forward(KIND.make(), inputs))


# What is refused, and what stays then: nothing.


def open_files() -> set[str]:
    return {file.path for file in psutil.Process().open_files()}


class Watch:
    """What a load has taken: page locks, mapped images, open files."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.backend = wanoffload._C.HostBackend()
        self.stores: list[wanoffload._C.HostStore] = []
        self.files = open_files()
        patch.setattr(wrapping, "backend_for", lambda _: self.backend)
        patch.setattr(wrapping, "HostStore", self._store)
        patch.setattr(stored_weights, "HostStore", self._store)

    def _store(self, backend: wanoffload._C.Backend) -> wanoffload._C.HostStore:
        self.stores.append(wanoffload._C.HostStore(backend))
        return self.stores[-1]

    def assert_nothing_is_held(self, but_mapped: int = 0) -> None:
        gc.collect()
        assert self.backend.locked_bytes == 0
        assert sum(store.mapped_bytes for store in self.stores) <= but_mapped
        assert open_files() == self.files


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def one_image() -> int:
    """Bytes that the image of a block of KIND is mapped to."""
    layouts = [lay_out((g[0].name, g[0].tensor) for g in u.groups) for u in find_units(KIND.make())]
    return max(layout.nbytes for layout in layouts) + 4095


def refusal(folder: Path, watch: Watch, error: type[Exception], buffer: int = 0) -> str:
    """The message of the error. `buffer`: bytes of the buffer that may be in use when it comes."""
    with pytest.raises(error) as caught:
        load_it(folder)
    message = str(caught.value)
    # Who keeps the error keeps its frames, and with them what was being written.
    watch.assert_nothing_is_held(but_mapped=one_image() + buffer)
    del caught
    watch.assert_nothing_is_held()
    return message


def rewrite(file: Path, **changes: torch.Tensor | None) -> None:
    state: dict[str, torch.Tensor | None] = {**load_file(file), **changes}
    save_file({name: value for name, value in state.items() if value is not None}, file)


BIAS = "blocks.1.ffn.net.2.bias"


def test_a_checkpoint_of_another_model_is_refused_before_a_byte_is_read(
    folder: Path, watch: Watch
) -> None:
    file = folder / "transformer" / WEIGHTS
    rewrite(file, **{BIAS: torch.ones(49), "extra": torch.ones(2)})
    message = refusal(folder, watch, wanoffload.CheckpointError)
    assert f"{BIAS} has shape (49,) in {file}, not (48,)" in message
    assert f"extra, of shape (2,) in {file}, is not in the model" in message
    rewrite(file, **{BIAS: None, "extra": None})
    message = refusal(folder, watch, wanoffload.CheckpointError)
    assert f"{BIAS}, of shape (48,), is missing in {file}" in message
    assert not watch.stores


def test_a_truncated_or_missing_file_is_refused_before_a_byte_is_read(
    tmp_path: Path, watch: Watch
) -> None:
    save(KIND.make(), tmp_path, "sharded")
    shard = sorted((tmp_path / "transformer").glob("*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size - 1)
    assert str(shard) in refusal(tmp_path, watch, wanoffload.CheckpointError)
    shard.unlink()
    assert shard.name in refusal(tmp_path, watch, wanoffload.CheckpointError)
    assert not watch.stores


def between(monkeypatch: pytest.MonkeyPatch, unit: int, action: Any) -> None:
    """Does something before the weights of this unit are read."""
    write = stored_weights.StoredWeights.write
    count = iter(range(100))

    def writing(self: Any, *args: Any) -> None:
        if next(count) == unit:
            action(self)
        write(self, *args)

    monkeypatch.setattr(stored_weights.StoredWeights, "write", writing)


@pytest.mark.parametrize("unit", [0, 2])
def test_a_file_that_is_truncated_while_it_is_read_is_named(
    folder: Path, watch: Watch, unit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "transformer" / WEIGHTS
    between(monkeypatch, unit, lambda _: os.truncate(file, file.stat().st_size - 10))
    message = refusal(folder, watch, wanoffload.TransferError)
    assert f"blocks.{unit}." in message
    assert str(file) in message


def test_a_read_that_fails_in_the_middle_is_named(
    folder: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "transformer" / WEIGHTS
    between(monkeypatch, 1, lambda weights: weights._files[file].fail_at(1))
    message = refusal(folder, watch, wanoffload.TransferError)
    assert "blocks.1." in message
    assert str(file) in message


def test_a_read_that_fails_where_values_are_cast_names_the_tensor(
    tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(KIND.make().double(), tmp_path)
    file = tmp_path / "transformer" / WEIGHTS
    between(monkeypatch, 1, lambda weights: weights._files[file].fail_at(2))
    largest = max(tensor.nbytes for tensor in load_file(file).values())
    message = refusal(tmp_path, watch, wanoffload.TransferError, buffer=largest + 4095)
    assert message.startswith("blocks.1.attn1.to_q.weight could not be read")


def test_a_file_that_is_replaced_after_its_header_was_read_is_refused(
    folder: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "transformer" / WEIGHTS
    open_source = stored_weights.SourceFile

    def replace(path: str) -> wanoffload._C.SourceFile:
        rewrite(file, **{BIAS: torch.ones(48, dtype=torch.float32)})
        return open_source(path)

    monkeypatch.setattr(stored_weights, "SourceFile", replace)
    message = refusal(folder, watch, wanoffload.CheckpointError)
    assert f"{file} was replaced" in message


def test_too_little_host_memory_is_an_error_with_numbers_before_a_byte_is_read(
    folder: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr(host_memory, "require", lambda nbytes, _: needed.append(nbytes))
    model = load_it(folder)
    stats = wanoffload.offloader(model).stats()
    others = sum(p.nbytes for p in model.parameters() if not isinstance(p, HostTensor))
    largest = max(p.nbytes for p in model.parameters() if not isinstance(p, HostTensor))
    assert needed[0] == stats.host_bytes + others + largest
    monkeypatch.undo()

    again = Watch(monkeypatch)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: host_memory.RESERVE + needed[0] - 1)
    message = refusal(folder, again, wanoffload.HostMemoryError)
    assert (
        "loading WanTransformer3DModel (3 blocks of 0.00 GB in all: 3 of 3 blocks page-l" in message
    )
    assert sum(store.mapped_bytes for store in again.stores) == 0
    monkeypatch.setattr(host_memory, "available_bytes", lambda: host_memory.RESERVE + needed[0])
    load_it(folder)


def test_whatever_call_of_the_backend_fails_nothing_is_held(
    folder: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 0
    for nth in range(1, 22):
        watch.backend = wanoffload._C.HostBackend()
        watch.backend.fail_at(nth)
        try:
            model = load_it(folder, prefetch=1)
        except wanoffload.OffloadError:
            failures += 1
        else:
            watch.backend.fail_at(0)
            del model
        watch.assert_nothing_is_held()
    assert 5 < failures < 21


def test_an_interrupt_leaves_nothing(
    folder: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    between(monkeypatch, 2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_it(folder)
    watch.assert_nothing_is_held()


def test_files_are_closed_when_the_model_is_loaded(folder: Path) -> None:
    before = open_files()
    model = load_it(folder)
    assert open_files() == before
    assert wanoffload.offloader(model).stats().units == 3


def test_a_class_without_blocks_is_refused(tmp_path: Path, watch: Watch) -> None:
    save_odd(tmp_path)
    with pytest.raises(wanoffload.WrapError, match="Odd has no block to stream"):
        wanoffload.load(Odd, tmp_path, device="cpu")
    watch.assert_nothing_is_held()


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"prefetch": -1}, "prefetch is a number of blocks"),
        ({"host": "disc"}, "host is one of"),
        ({"verify": 1}, "verify is True or False"),
        ({"device": "nowhere"}, "is not a device"),
    ],
)
def test_options_that_can_not_be_used_are_refused_before_files_are_looked_for(
    option: dict[str, Any], expected: str
) -> None:
    with pytest.raises(wanoffload.WrapError, match=expected):
        wanoffload.load(WanTransformer3DModel, "no/model", **{"device": "cpu", **option})


def test_unknown_options_are_errors(folder: Path) -> None:
    with pytest.raises(TypeError, match="low_cpu_mem_usage"):
        load_it(folder, low_cpu_mem_usage=True)


# What it costs.


def test_a_bar_counts_the_bytes_of_the_blocks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Any] = []

    class Bar(wrapping.tqdm):  # type: ignore[name-defined, misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            bars.append(self)

    monkeypatch.setattr(wrapping, "tqdm", Bar)
    model = load_it(folder)
    nbytes = sum(p.nbytes for p in model.parameters() if isinstance(p, HostTensor))
    (bar,) = bars
    assert (bar.desc, bar.unit, bar.total, bar.n) == ("load", "B", nbytes, nbytes)


LARGE = {
    "num_attention_heads": 16,
    "attention_head_dim": 64,
    "ffn_dim": 4096,
    "num_layers": 6,
    "text_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
}
"""About 200 MB in 2 bytes, 34 a block; the largest tensor is of 8."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = WanTransformer3DModel(**LARGE)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder / "transformer", max_shard_size="50MB")
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_loading_takes_the_memory_of_the_model_and_little_more(
    large: Path, tmp_path: Path, dtype: str
) -> None:
    """Read as it is, and cast. On the CPU the one slot counts too, and the weights that stay."""
    save(KIND.make(), tmp_path)
    code = f"""
import gc, psutil, torch, wanoffload
from diffusers import WanTransformer3DModel

def high_water():
    with open("/proc/self/status") as status:
        return next(int(l.split()[1]) << 10 for l in status if l.startswith("VmHWM"))

def load(folder):
    options = dict(torch_dtype=torch.{dtype}, prefetch=0, device="cpu")
    return wanoffload.load(WanTransformer3DModel, folder, **options)

first = load({str(tmp_path)!r})  # what loading itself brings with it: modules, threads
del first
gc.collect()
before = psutil.Process().memory_info().rss
model = load({str(large)!r})
stats = wanoffload.offloader(model).stats()
others = sum(p.nbytes for p in model.parameters()) - stats.host_bytes
print(high_water() - before, stats.host_bytes, stats.slot_bytes + max(others, 0))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    taken, blocks, others = map(int, result.stdout.split())
    assert 190e6 < blocks < 220e6
    assert taken < 1.03 * blocks + others + (24 << 20)
