"""The disk tier: blocks that stand in the checkpoint's files and are read for each use."""

from __future__ import annotations

import dataclasses
import errno
import gc
import logging
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

import wanoffload
from tests.small_models import MODELS, forward
from tests.test_checkpoint import WAYS, save
from wanoffload import _C, host_memory, locking, wrapping
from wanoffload.host_tensor import HostTensor
from wanoffload.loading import stored_weights

KIND = MODELS["wan22_5b"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(KIND.make(), tmp_path, "sharded")
    return tmp_path


def load(folder: Path, **options: Any) -> nn.Module:
    options = {"torch_dtype": torch.bfloat16, "device": "cpu", "host": "disk", **options}
    return wanoffload.load(WanTransformer3DModel, folder, **options)


def tiers(model: nn.Module) -> list[str]:
    return wanoffload.offloader(model).tiers


@pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
@pytest.mark.parametrize("way", WAYS)
def test_outputs_are_the_resident_models(
    tmp_path: Path, way: str, prefetch: int, device: str
) -> None:
    options = save(KIND.make(), tmp_path, way)
    model = load(tmp_path, prefetch=prefetch, device=device, verify=prefetch == 2, **options)
    inputs = KIND.inputs(device)
    resident = KIND.make().to(device)
    for _ in range(2):
        assert torch.equal(forward(model, inputs), forward(resident, inputs))
    stats = wanoffload.offloader(model).stats()
    assert (stats.host_bytes, stats.locked_bytes) == (0, stats.ring_bytes)
    assert stats.bytes_fetched >= (2 if stats.slots < stats.units else 1) * stats.disk_bytes > 0


def some_of_each(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> nn.Module:
    """A model of which one block is page-locked, one pageable, one on disk."""
    plan = wrapping.assign

    def mixed(*args: Any) -> Any:
        made = plan(*args)
        return dataclasses.replace(made, tiers=("pinned", "pageable", "disk"))

    monkeypatch.setattr(wrapping, "assign", mixed)
    return load(folder, **options)


def test_one_model_may_be_part_one_and_part_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    model = some_of_each(folder, monkeypatch, device=device)
    assert tiers(model) == ["pinned", "pageable", "disk"]
    inputs = KIND.inputs(device)
    for _ in range(3):
        assert torch.equal(forward(model, inputs), forward(KIND.make().to(device), inputs))
    for _, weight in model.named_parameters():
        with torch.no_grad():
            weight.mul_(0.5)
    expected = KIND.make().to(device)
    for weight in expected.parameters():
        weight.data.mul_(0.5)
    assert torch.equal(forward(model, inputs), forward(expected, inputs))
    assert tiers(model) == ["pinned", "pageable", "pageable"]


def test_a_budget_decides_which_blocks_are_on_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanoffload.host_tiers.RING_BYTES", 8)
    monkeypatch.setattr("wanoffload.host_tiers.READ_AHEAD_BYTES", 8)
    whole = load(folder, host="auto")
    assert tiers(whole) == ["pinned"] * 3
    budget = wanoffload.offloader(whole).stats().host_bytes - 1
    assert tiers(load(folder, host="auto", host_budget=budget)) == ["disk", "pinned", "pinned"]


def test_a_host_with_less_memory_than_the_model_runs_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanoffload.host_tiers.RING_BYTES", 8)
    monkeypatch.setattr("wanoffload.host_tiers.READ_AHEAD_BYTES", 8)
    model = load(folder)
    blocks = wanoffload.offloader(model).stats().disk_bytes
    others = [p.nbytes for p in model.parameters() if not isinstance(p, HostTensor)]
    room = host_memory.RESERVE + sum(others) + max(others) + int(0.9 * blocks)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: room)
    model = load(folder, host="auto")
    assert sorted(set(tiers(model))) == ["disk", "pinned"]
    inputs = KIND.inputs()
    assert torch.equal(forward(model, inputs), forward(KIND.make(), inputs))


def test_values_that_are_cast_can_not_stand_in_the_checkpoint(tmp_path: Path) -> None:
    save(KIND.make().float(), tmp_path)
    with pytest.raises(wanoffload.WrapError, match=r"to_q.weight is stored as .*float32 .*cache="):
        load(tmp_path)
    assert tiers(load(tmp_path, host="auto")) == ["pinned"] * 3


# Writing.


def test_a_block_that_is_written_to_comes_into_memory_and_the_others_stay(folder: Path) -> None:
    model, expected = load(folder), KIND.make()
    inputs = KIND.inputs()
    forward(model, inputs)
    held = model.get_parameter("blocks.1.attn1.to_q.weight")
    part, other = held[3:5], model.get_parameter("blocks.1.ffn.net.2.bias")
    for changed in (model, expected):
        with torch.no_grad():
            changed.get_parameter("blocks.1.ffn.net.2.weight").mul_(3)
    assert tiers(model) == ["disk", "pageable", "disk"]
    assert torch.equal(forward(model, inputs), forward(expected, inputs))
    with torch.no_grad():  # what was held before stands on the block's weights still
        part.add_(1)
        other.add_(1)
        expected.get_parameter("blocks.1.attn1.to_q.weight")[3:5].add_(1)
        expected.get_parameter("blocks.1.ffn.net.2.bias").add_(1)
    assert torch.equal(held, expected.get_parameter("blocks.1.attn1.to_q.weight"))
    assert torch.equal(forward(model, inputs), forward(expected, inputs))


def test_too_little_memory_for_a_write_is_an_error_and_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder)
    inputs = KIND.inputs()
    monkeypatch.setattr(host_memory, "available_bytes", lambda: host_memory.RESERVE)
    weight = model.get_parameter("blocks.1.ffn.net.2.weight").data
    with pytest.raises(wanoffload.HostMemoryError, match=r"bringing blocks\.1 into memory"):
        weight.mul_(3)
    with pytest.raises(wanoffload.HostMemoryError, match="bringing 3 blocks into own memory"):
        wanoffload.unwrap(model)
    assert tiers(model) == ["disk"] * 3
    assert torch.equal(forward(model, inputs), forward(KIND.make(), inputs))


@pytest.mark.parametrize("of_views", [False, True])
def test_threads_may_write_to_the_weights_of_one_block(folder: Path, of_views: bool) -> None:
    for _ in range(10):
        model, expected = load(folder), KIND.make()
        weights = list(model.get_submodule("blocks.0").parameters())
        together = threading.Barrier(len(weights))

        def add(weight: torch.Tensor, together: threading.Barrier = together) -> None:
            together.wait()
            with torch.no_grad():
                (weight.data if of_views else weight).add_(1)

        threads = [threading.Thread(target=add, args=(weight,)) for weight in weights]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        values = expected.get_submodule("blocks.0").parameters()
        for weight, value in zip(weights, values, strict=True):
            assert torch.equal(weight, value + 1)


def test_an_unwrapped_model_needs_the_files_no_more(folder: Path, device: str) -> None:
    model = load(folder, device=device)
    wanoffload.unwrap(model, device)
    for file in (folder / "transformer").glob("*.safetensors"):
        os.truncate(file, 10)
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    inputs = KIND.inputs(device)
    assert torch.equal(forward(model, inputs), forward(KIND.make().to(device), inputs))


def test_files_are_let_go_with_the_model(folder: Path) -> None:
    def files_and_maps() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count(str(folder))
        return len(list(Path("/proc/self/fd").iterdir())), maps

    before = files_and_maps()
    for _ in range(5):
        model = load(folder)
        forward(model, KIND.inputs())
        slots = weakref.ref(wanoffload.offloader(model).memory.slots.memory)
        del model
    assert files_and_maps() == before
    assert slots() is None


def test_a_weight_that_somebody_holds_is_true_after_the_model_has_gone(folder: Path) -> None:
    model = load(folder)
    held = model.get_parameter("blocks.1.ffn.net.2.weight")
    del model
    gc.collect()
    assert torch.equal(held, KIND.make().get_parameter("blocks.1.ffn.net.2.weight"))


# Faults.


def test_a_file_that_is_cut_off_is_named_by_whoever_reads_it(folder: Path) -> None:
    model = load(folder, prefetch=0)
    shard = max((folder / "transformer").glob("*.safetensors"))
    os.truncate(shard, 100)
    with pytest.raises(wanoffload.TransferError, match=rf"{shard.name}.* has 100 bytes"):
        forward(model, KIND.inputs())
    looks: list[Callable[[torch.Tensor], object]] = [
        torch.sum,
        lambda weight: weight.tolist(),
        lambda weight: weight.data_ptr(),
        repr,
        lambda weight: weight.untyped_storage()[0],
        lambda weight: torch.empty_like(weight).copy_(weight),
    ]
    refused = [0] * len(looks)
    for weight in (p for p in model.parameters() if isinstance(p, HostTensor)):
        for number, look in enumerate(looks):
            try:
                look(weight)
            except wanoffload.TransferError as error:
                refused[number] += shard.name in str(error)
    assert min(refused) > 0, refused


def test_a_file_that_is_written_to_is_noticed(folder: Path) -> None:
    model = load(folder, prefetch=0)
    for shard in (folder / "transformer").glob("*.safetensors"):
        content = shard.read_bytes()
        shard.write_bytes(content[:-1] + b"x")
    with pytest.raises(wanoffload.TransferError, match="was written to after it was opened"):
        forward(model, KIND.inputs())
    with pytest.raises(wanoffload.TransferError, match="was written to after it was opened"):
        model.get_parameter("blocks.0.ffn.net.2.weight").clone()


def test_a_file_that_is_replaced_by_another_is_still_read_as_it_was(folder: Path) -> None:
    model = load(folder)
    for shard in list((folder / "transformer").glob("*.safetensors")):
        other = shard.with_suffix(".new")
        other.write_bytes(b"another model")
        other.rename(shard)
    inputs = KIND.inputs()
    assert torch.equal(forward(model, inputs), forward(KIND.make(), inputs))


def test_a_read_that_fails_surfaces_at_its_block_and_the_next_forward_is_right(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[_C.SourceFile] = []

    def opening(path: str) -> _C.SourceFile:
        files.append(_C.SourceFile(path))
        return files[-1]

    monkeypatch.setattr(stored_weights, "SourceFile", opening)
    model = load(folder, prefetch=1)
    inputs = KIND.inputs()
    expected = forward(KIND.make(), inputs)
    assert torch.equal(forward(model, inputs), expected)
    for file in files:
        file.fail_at(2, errno.EIO)
    failed = 0
    for _ in range(8):
        try:
            assert torch.equal(forward(model, inputs), expected)
        except wanoffload.TransferError as error:
            failed += 1
            assert "Input/output error" in str(error)  # noqa: PT017
    assert failed > 0
    assert torch.equal(forward(model, inputs), expected)


def test_a_machine_that_locks_no_more_is_told_of_and_the_rest_is_pageable(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    locks = 0

    def lock(memory: _C.HostImage) -> None:
        nonlocal locks
        locks += 1
        if locks > 1:
            raise wanoffload.BackendError("cuMemHostRegister: no more of it")
        memory.lock()

    monkeypatch.setattr(locking, "lock_image", lock)
    with caplog.at_level(logging.WARNING):
        model = load(folder, host="auto")
    assert tiers(model) == ["pinned", "pageable", "pageable"]
    assert locks == 2
    assert "locks no more memory (cuMemHostRegister: no more of it)" in caplog.text
    inputs = KIND.inputs()
    assert torch.equal(forward(model, inputs), forward(KIND.make(), inputs))
    locks = 0
    with pytest.raises(wanoffload.HostMemoryError, match=r"no more of it\. host='pinned' needs"):
        load(folder, host="pinned")


def test_a_paused_model_and_a_closed_one_read_true(folder: Path) -> None:
    model = load(folder)
    inputs = KIND.inputs()
    runtime = wanoffload.offloader(model)
    expected = forward(KIND.make(), inputs)
    runtime.pause()
    with torch.no_grad():
        model.get_parameter("blocks.1.ffn.net.2.weight").mul_(1)
    assert tiers(model) == ["disk", "pageable", "disk"]
    assert torch.equal(forward(model, inputs), expected)
    runtime.close()
    for name, value in KIND.make().state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(forward(wanoffload.unwrap(model), inputs), expected)
