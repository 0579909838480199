"""Packed weights outside of a forward: unpacked when they are read and no longer than they are
needed, packed again after they were written to, true all the while."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import logging
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

import wanoffload
from tests.small_models import MODELS, forward
from tests.test_odd_uses import Chain
from wanoffload import HostMemoryError, TransferError, UsageError, host_memory, wrapping
from wanoffload._C import HostBackend, HostImage
from wanoffload.binding import Binding
from wanoffload.facts.modules import part_of
from wanoffload.host_tensor import HostTensor
from wanoffload.image import aligned

KIND = MODELS["wan21_t2v"]
UNITS = KIND.units
X = torch.linspace(-1, 1, 128).view(2, 64).bfloat16()


def packed(model: nn.Module, prefetch: int = 1, **options: Any) -> Any:
    wanoffload.wrap(model, prefetch, device="cpu", pack=True, **options)
    runtime = wanoffload.offloader(model)
    runtime.poison_slots()
    assert runtime.stats().packed_units == len(runtime.bindings)
    return model


@pytest.fixture
def model() -> Any:
    return packed(KIND.make())


@pytest.fixture
def twin() -> Any:
    """Of the same values, resident."""
    return KIND.make()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether all parameters are equal."""
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return all(name == key and torch.equal(v, w) for (name, v), (key, w) in pairs)


def unpacked(model: nn.Module) -> int:
    return wanoffload.offloader(model).stats().unpacked_bytes


def bindings(model: nn.Module) -> list[Binding]:
    return wanoffload.offloader(model).bindings


def plain_units(model: nn.Module) -> list[int]:
    return [number for number, binding in enumerate(bindings(model)) if not binding.packed]


def drop(model: nn.Module) -> None:
    """As far as nobody needs it."""
    wanoffload.offloader(model).recently_read.drop_all()


def read_others(model: nn.Module) -> None:
    """So much that what was read before is dropped, unless somebody holds it."""
    for binding in bindings(model)[2:]:
        for weight in binding.weights:
            weight.sum()


def block(model: nn.Module) -> int:
    return max(binding.layout.nbytes for binding in bindings(model))


def linear() -> nn.Module:
    return nn.Linear(64, 64, dtype=torch.bfloat16)


def chain(make: Callable[[], nn.Module] = linear, count: int = 6) -> Any:
    return Chain(make, count).requires_grad_(False)


# Reading.


@pytest.mark.parametrize("name", MODELS)
def test_all_values_are_true_and_stay_true(name: str) -> None:
    expected = values(MODELS[name].make())
    model = packed(MODELS[name].make())
    inputs = MODELS[name].inputs()
    output = forward(MODELS[name].make(), inputs)
    for _ in range(2):
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert torch.equal(forward(model, inputs), output)


def test_reading_one_weight_unpacks_this_one_alone(model: Any) -> None:
    bias = model.blocks[2].attn1.to_q.bias
    assert unpacked(model) == 0
    bias.sum()
    assert unpacked(model) == aligned(bias.nbytes)
    bias[3:].sum()
    assert unpacked(model) == aligned(bias.nbytes)
    model.blocks[2].attn1.to_q.weight.sum()
    assert unpacked(model) == aligned(bias.nbytes) + aligned(
        model.blocks[2].attn1.to_q.weight.nbytes
    )


def test_what_looks_at_no_value_unpacks_nothing(model: Any) -> None:
    for weight in model.blocks.parameters():
        views = [
            weight.detach(),
            weight.view(-1),
            weight[None],
            weight.transpose(0, -1),
        ]
        assert all(view.numel() == weight.numel() for view in views)
        assert (weight.device.type, weight.is_pinned()) == ("cpu", False)
        torch.empty_like(weight)
    model.state_dict()
    model.to("cpu")
    assert model.num_parameters() > 0
    assert part_of("transformer", model).weights == part_of("transformer", KIND.make()).weights
    assert unpacked(model) == 0


def test_operations_that_only_seem_to_give_views_read(model: Any, twin: Any) -> None:
    """In inference mode they come undivided, and copy."""
    weight, right = model.blocks[1].ffn.net[2].weight, twin.blocks[1].ffn.net[2].weight
    operations: list[Callable[[Tensor], Tensor]] = [
        lambda w: w.t().reshape(-1),
        lambda w: w.t().contiguous(),
        lambda w: w.flatten(),
        lambda w: w.view(torch.int16).to(torch.int32),
        lambda w: w.t().flatten(),
    ]
    for inference in (True, False):
        for operation in operations:
            with torch.inference_mode(inference):
                assert torch.equal(operation(weight), operation(right))
            drop(model)
            assert unpacked(model) == 0


def test_at_most_two_blocks_stand_unpacked_because_they_were_read(model: Any) -> None:
    most = 0
    for name, weight in model.named_parameters():
        weight.sum()
        if name.startswith("blocks"):
            most = max(most, unpacked(model))
    assert block(model) < most <= 2 * block(model)
    assert same(model, KIND.make())
    assert unpacked(model) <= 2 * block(model)


def test_what_was_read_last_stays_unpacked(model: Any) -> None:
    for binding in bindings(model):
        for weight in binding.weights:
            weight.sum()
        assert bindings(model)[0].view.nbytes > 0  # type: ignore[union-attr]
        bindings(model)[0].weights[0].sum()
    read = [binding.view.nbytes > 0 for binding in bindings(model)]  # type: ignore[union-attr]
    assert read[0]
    assert read[-1]
    assert sum(read) == 2


def test_a_forward_drops_what_was_unpacked(model: Any) -> None:
    model.blocks[0].attn1.to_q.weight.sum()
    kept = model.state_dict()
    assert unpacked(model) > 0
    forward(model, KIND.inputs())
    assert unpacked(model) == 0
    assert torch.equal(
        kept["blocks.0.norm2.weight"], KIND.make().state_dict()["blocks.0.norm2.weight"]
    )


def test_dropping_gives_the_memory_back() -> None:
    model = packed(chain(lambda: nn.Linear(1024, 1024, dtype=torch.bfloat16), 3))
    weight = model.blocks[0].weight
    expected = weight.clone()
    view = bindings(model)[0].view
    assert view is not None

    def resident() -> int:
        """Bytes of the view that have memory."""
        for part in Path("/proc/self/smaps").read_text().split("VmFlags")[:-1]:
            fields = part.strip().splitlines()
            head = next(line for line in fields if "-" in line.split()[0] and ":" not in line[:12])
            start, end = (int(number, 16) for number in head.split()[0].split("-"))
            if start <= view.memory.address < end:
                return next(int(f.split()[1]) << 10 for f in fields if f.startswith("Rss:"))
        raise AssertionError("not mapped")

    assert resident() >= weight.nbytes
    drop(model)
    assert resident() == 0
    assert torch.equal(weight, expected)


def test_too_little_memory_to_read_is_an_error_with_the_weights_name(
    model: Any, twin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, right = model.blocks[1].ffn.net[2].weight, twin.blocks[1].ffn.net[2].weight
    with monkeypatch.context() as patch:
        patch.setattr(host_memory, "available_bytes", lambda: host_memory.RESERVE + 1000)
        with pytest.raises(HostMemoryError, match=r"unpacking blocks\.1\.ffn\.net\.2\.weight"):
            weight.sum()
        assert unpacked(model) == 0
    assert torch.equal(weight, right)


def test_what_was_read_before_makes_room_for_what_is_read_now(
    model: Any, twin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = model.blocks[1].ffn.net[2].weight
    room = aligned(weight.nbytes)

    def available() -> int:
        return host_memory.RESERVE + room - unpacked(model)

    monkeypatch.setattr(host_memory, "available_bytes", available)
    for number in (1, 2, 3):
        found = model.blocks[number].ffn.net[2].weight
        assert torch.equal(found, twin.blocks[number].ffn.net[2].weight)


@pytest.mark.parametrize("name", ["ffn.net.0.proj.weight", "attn1.to_q.bias", "norm2.weight"])
def test_spoilt_bytes_are_an_error_with_the_weights_name(name: str, model: Any, twin: Any) -> None:
    """Of a matrix, of a tensor that is less than a tile, of one that is not bf16. All others are
    read."""
    stored = bindings(model)[1].stored
    assert isinstance(stored, HostImage)
    expected = values(twin)
    memory = memoryview(stored)
    right = expected[f"blocks.1.{name}"]
    if name.startswith("ffn"):
        first = right.view(torch.int16).flatten()[:8].tolist()
        marks = [(v >> 8 & 0x80) | (v & 0x7F) for v in first]  # signs and mantissas
        at = bytes(memory).index(bytes(marks[i] for i in (0, 2, 1, 3, 4, 6, 5, 7)))
    else:
        at = bytes(memory).index(bytes(right.untyped_storage()))
    memory[at + 3] ^= 4
    for key, value in expected.items():
        if key == f"blocks.1.{name}":
            with pytest.raises(TransferError, match=f"{key} could not be unpacked"):
                model.state_dict()[key].sum()
        else:
            assert torch.equal(model.state_dict()[key], value), key
    memory[at + 3] ^= 4
    assert torch.equal(model.state_dict()[f"blocks.1.{name}"], right)


def on_disk(folder: Path) -> Any:
    KIND.make().save_pretrained(folder / "checkpoint")
    model: Any = wanoffload.load(
        WanTransformer3DModel,
        folder / "checkpoint",
        torch_dtype=torch.bfloat16,
        device="cpu",
        host="disk",
        cache=folder / "cache",
        pack=True,
    )
    assert set(wanoffload.offloader(model).tiers) == {"disk"}
    assert wanoffload.offloader(model).stats().packed_units == UNITS
    return model.requires_grad_(False)


def test_a_cache_file_that_changed_is_an_error_unless_the_weight_is_there(
    tmp_path: Path, twin: Any
) -> None:
    model = on_disk(tmp_path)
    norm, right = model.blocks[1].norm2.weight, twin.blocks[1].norm2.weight
    assert torch.equal(norm, right)
    with (tmp_path / "cache").open("r+b") as file:
        file.truncate(10_000)
    with pytest.raises(TransferError, match=r"blocks\.1\.norm2\.bias could not be unpacked"):
        model.blocks[1].norm2.bias.sum()
    assert torch.equal(norm, right)


def test_threads_that_read_all_weights_at_once_find_them_true(model: Any) -> None:
    expected = values(KIND.make())
    errors: list[BaseException] = []

    def read(order: int) -> None:
        try:
            for _ in range(6):
                for name, value in list(model.state_dict().items())[::order]:
                    assert torch.equal(value, expected[name]), name
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(order,)) for order in (1, -1, 3, -2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert unpacked(model) <= 2 * block(model)


def test_a_weight_is_true_and_can_be_written_when_the_model_is_gone(twin: Any) -> None:
    model = packed(KIND.make())
    held = model.state_dict()["blocks.0.attn1.to_q.weight"]
    other = model.blocks[0].attn1.to_k.weight
    del model
    gc.collect()
    assert torch.equal(held, twin.blocks[0].attn1.to_q.weight)
    held.zero_()
    held._home.view._recent.drop_all()
    assert not held.any()
    assert torch.equal(other, twin.blocks[0].attn1.to_k.weight)


def test_a_closed_model_is_true(model: Any, twin: Any) -> None:
    wanoffload.offloader(model).close()
    expected = values(twin)
    assert all(torch.equal(v, expected[n]) for n, v in model.state_dict().items())


# Addresses, and whatever has one.


def at(address: int, like: Tensor) -> Tensor:
    """What stands at an address."""
    memory = (ctypes.c_char * like.nbytes).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape).clone()


@pytest.mark.parametrize("take", [lambda w: w, lambda w: w.contiguous(), lambda w: w.view(-1)])
def test_bytes_stay_where_a_tensor_said_as_long_as_it_lives(
    take: Callable[[Tensor], Tensor], model: Any, twin: Any
) -> None:
    right = twin.blocks[0].attn1.to_q.weight
    held = take(model.state_dict()["blocks.0.attn1.to_q.weight"])
    address = held.data_ptr()
    for _ in range(2):
        read_others(model)
        drop(model)
        assert unpacked(model) == aligned(right.nbytes)
        assert torch.equal(at(address, right), right)
        forward(model, KIND.inputs())
    del held
    drop(model)
    assert unpacked(model) == 0


@pytest.mark.parametrize(
    "ask",
    [
        lambda w: w.data_ptr(),
        lambda w: w.data.data_ptr(),
        lambda w: w.detach().data_ptr(),
        lambda w: w.view(-1).data_ptr(),
        lambda w: w.data[:].view(-1).data_ptr(),
    ],
)
def test_bytes_stay_where_a_parameter_said_until_the_next_forward(
    ask: Callable[[Tensor], int], model: Any, twin: Any
) -> None:
    right = twin.blocks[0].attn1.to_q.weight
    address = ask(model.blocks[0].attn1.to_q.weight)
    read_others(model)
    drop(model)
    assert torch.equal(at(address, right), right)
    forward(model, KIND.inputs())
    assert unpacked(model) == 0


def test_addresses_never_change(model: Any) -> None:
    before = [weight.data_ptr() for weight in model.blocks.parameters()]
    assert len(set(before)) == len(before)
    forward(model, KIND.inputs())
    with torch.no_grad():
        for weight in model.blocks.parameters():
            weight.mul_(2)
    assert [weight.data_ptr() for weight in model.blocks.parameters()] == before
    forward(model, KIND.inputs())
    wanoffload.unwrap(model)
    assert [weight.data_ptr() for weight in model.blocks.parameters()] == before


def test_bytes_stay_as_long_as_a_storage_and_no_longer(model: Any, twin: Any) -> None:
    weight, right = model.blocks[0].attn1.to_q.weight, twin.blocks[0].attn1.to_q.weight
    storage = weight.untyped_storage()
    assert storage.nbytes() == right.nbytes
    assert storage.data_ptr() == weight.untyped_storage().data_ptr()
    over = torch.empty(0, dtype=right.dtype).set_(storage, 0, right.shape, right.stride())
    del storage
    for _ in range(2):
        forward(model, KIND.inputs())
        assert torch.equal(over, right)
    del over
    drop(model)
    assert unpacked(model) == 0


def test_an_array_stays_true_and_can_not_be_written(model: Any, twin: Any) -> None:
    norm, right = model.blocks[0].norm2.weight, twin.blocks[0].norm2.weight.clone()
    arrays = [norm.numpy(), np.asarray(norm), np.from_dlpack(norm.detach())]
    for _ in range(2):
        forward(model, KIND.inputs())
        assert all(torch.equal(torch.tensor(array), right) for array in arrays)
    with pytest.raises(ValueError, match="read-only"):
        arrays[0][0] = 1
    with pytest.raises(ValueError, match="read-only"):
        arrays[1][0] = 1
    with torch.no_grad():
        norm.mul_(2)
    forward(model, KIND.inputs())
    assert all(torch.equal(torch.tensor(array), right * 2) for array in arrays)
    del arrays
    drop(model)
    assert unpacked(model) == 0


def test_a_tensor_by_dlpack_stays_true(model: Any, twin: Any) -> None:
    weight, right = model.blocks[0].attn1.to_q.weight, twin.blocks[0].attn1.to_q.weight
    taken = torch.from_dlpack(weight)
    forward(model, KIND.inputs())
    assert torch.equal(taken, right)


def test_conjugated_and_negated_views_have_their_values() -> None:
    class Block(nn.Linear):
        def __init__(self) -> None:
            super().__init__(64, 64, dtype=torch.bfloat16)
            self.turn = nn.Parameter(torch.randn(300, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.turn.abs().mean()

    resident = chain(Block, 2)
    model = packed(copy.deepcopy(resident))
    turn, right = model.blocks[1].turn, resident.blocks[1].turn
    assert torch.equal(turn.conj(), right.conj())
    assert torch.equal(turn.conj().imag, right.conj().imag)
    assert turn.conj().is_conj()
    assert turn.conj().imag.is_neg()
    assert np.array_equal(turn.conj().resolve_conj().numpy(), right.conj().resolve_conj().numpy())
    assert np.array_equal(turn.conj().numpy(force=True), right.conj().numpy(force=True))
    assert turn.conj().imag.tolist() == right.conj().imag.tolist()
    assert torch.equal(copy.copy(turn.conj()).resolve_conj(), right.conj().resolve_conj())
    assert torch.equal(model(X), resident(X))


def test_the_data_of_a_weight_stays_true_as_the_data_of_an_ordinary_tensor(
    model: Any, twin: Any
) -> None:
    weight, right = next(
        (w, t)
        for w, t in zip(model.parameters(), twin.parameters(), strict=True)
        if isinstance(w, HostTensor) and w.numel() > 1
    )
    ordinary = nn.Parameter(torch.zeros_like(right), requires_grad=False)
    ordinary.data = weight.data
    drop(model)
    read_others(model)
    assert torch.equal(ordinary, right)
    assert isinstance(weight.data, HostTensor)


def test_who_goes_past_the_tensor_gets_an_error_and_not_zeros(model: Any) -> None:
    norm = model.blocks[0].norm2.weight
    for tensor in (norm, norm.detach(), norm.view(4, -1)[1:]):
        with pytest.raises(RuntimeError, match="data pointer"):
            torch.utils.dlpack.to_dlpack(tensor)
    assert unpacked(model) == 0


def test_an_ordinary_tensor_set_on_a_weight_keeps_it(model: Any, twin: Any) -> None:
    weight, right = model.blocks[0].norm2.weight, twin.blocks[0].norm2.weight
    part = torch.empty(0, dtype=right.dtype)
    whole = torch.empty(0, dtype=right.dtype).set_(weight)
    assert type(whole) is Tensor
    part.set_(weight[4:])
    drop(model)
    assert torch.equal(whole, right)
    assert torch.equal(part, right[4:])
    del whole, part
    drop(model)
    assert unpacked(model) == 0


def test_ties_are_seen_and_saved_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = linear(), linear()
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model = packed(chain(Tied, 2))
    twin = chain(Tied, 2)
    twin.load_state_dict(model.state_dict())
    sizes = []
    for each in (model, twin):
        file = io.BytesIO()
        torch.save(each.state_dict(), file)
        sizes.append(file.tell())
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert loaded["blocks.0.a.weight"].data_ptr() == loaded["blocks.0.b.weight"].data_ptr()
        assert torch.equal(loaded["blocks.1.b.weight"], twin.blocks[1].a.weight)
    assert abs(sizes[0] - sizes[1]) < 1000
    with pytest.raises(RuntimeError, match="share memory"):
        safetensors.torch.save(model.state_dict())


# Saving.


@pytest.mark.parametrize(
    "save",
    [
        lambda m, path: m.save_pretrained(path),
        lambda m, path: m.save_pretrained(path, safe_serialization=False),
        lambda m, path: torch.save(m.state_dict(), path),
        lambda m, path: safetensors.torch.save_file(
            {name: value.contiguous() for name, value in m.state_dict().items()}, path
        ),
    ],
)
def test_what_saving_unpacked_goes_when_it_is_saved(
    save: Callable[[Any, Path], None], model: Any, tmp_path: Path
) -> None:
    save(model, tmp_path / "saved")
    assert 0 < unpacked(model) <= 2 * block(model)


@pytest.mark.parametrize("safe", [True, False])
def test_save_pretrained_takes_memory_for_one_shard(
    safe: bool, model: Any, twin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = 50_000
    seen: list[int] = []
    module, name = (safetensors.torch, "save_file") if safe else (torch, "save")
    real = getattr(module, name)

    def save(tensors: dict[str, Tensor], *args: Any, **options: Any) -> None:
        real(tensors, *args, **options)
        seen.append(unpacked(model))

    monkeypatch.setattr(module, name, save)
    for part, each in (("packed", model), ("resident", twin)):
        seen.clear()
        each.save_pretrained(tmp_path / part, max_shard_size=shard, safe_serialization=safe)
        if each is model:
            assert len(seen) > 5
            # What the shard holds, and what was read before it.
            assert 0 < max(seen) <= shard + 30 * 256 + 2 * block(model)
    plain = wanoffload.offloader(model).stats().plain_bytes
    assert plain > 4 * shard
    drop(model)
    assert unpacked(model) == 0
    for file in (tmp_path / "resident").iterdir():
        found = (tmp_path / "packed" / file.name).read_bytes()
        if file.suffix == ".bin":
            loaded, expected = (
                torch.load(tmp_path / p / file.name, weights_only=True)
                for p in ("packed", "resident")
            )
            assert all(torch.equal(loaded[key], value) for key, value in expected.items())
        elif file.suffix == ".safetensors":
            assert found == file.read_bytes(), file


def test_tensors_are_saved_whole_by_whatever_takes_their_addresses(
    model: Any, twin: Any, tmp_path: Path
) -> None:
    expected = values(twin)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "a")
    safetensors.torch.save_model(model, str(tmp_path / "b"))
    safetensors.torch.save_file(dict(model.named_parameters()), tmp_path / "c")
    (tmp_path / "d").write_bytes(safetensors.torch.save(model.state_dict()))
    for name in "abcd":
        found = safetensors.torch.load_file(tmp_path / name)
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name
    torch.save(model.state_dict(), tmp_path / "e")
    found = torch.load(tmp_path / "e", weights_only=True)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    forward(model, KIND.inputs())
    assert unpacked(model) == 0


def test_copies_are_ordinary_and_hold_nothing_unpacked(model: Any, twin: Any) -> None:
    copied = copy.deepcopy(model)
    assert all(type(parameter) is nn.Parameter for parameter in copied.parameters())
    assert same(copied, twin)
    assert unpacked(model) <= 2 * block(model)
    drop(model)
    assert unpacked(model) == 0


# Writing.


def test_a_written_block_is_packed_again_where_it_stood(twin: Any) -> None:
    backend = HostBackend()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wrapping, "backend_for", lambda _: backend)
        model = packed(KIND.make(), host="pinned")
    forward(model, KIND.inputs())
    before = wanoffload.offloader(model).stats()
    for each in (model, twin):
        with torch.no_grad():
            each.blocks[1].attn1.to_q.weight.mul_(1.5)
    assert plain_units(model) == [1]
    assert torch.equal(forward(model, KIND.inputs()), forward(twin, KIND.inputs()))
    after = wanoffload.offloader(model).stats()
    assert plain_units(model) == []
    assert wanoffload.offloader(model).tiers == ["pinned"] * UNITS
    assert abs(after.host_bytes - before.host_bytes) < 2000
    assert after.locked_bytes == after.host_bytes
    # Pages: each image is rounded up to 4096; the staging memory is the device's.
    assert backend.locked_bytes <= after.host_bytes + UNITS * 4096
    assert after.ring_bytes == 0
    assert unpacked(model) == 0


def test_a_pageable_block_and_one_on_disk_are_packed_again_in_memory(
    tmp_path: Path, twin: Any
) -> None:
    models = [packed(KIND.make(), host="pageable"), on_disk(tmp_path)]
    for each in (*models, twin):
        with torch.no_grad():
            each.blocks[1].attn1.to_q.weight.mul_(1.5)
    for model in models:
        assert torch.equal(forward(model, KIND.inputs()), forward(twin, KIND.inputs()))
        assert plain_units(model) == []
        assert wanoffload.offloader(model).tiers[1] == "pageable"
    assert wanoffload.offloader(models[1]).tiers.count("disk") == UNITS - 1
    (tmp_path / "cache").unlink()  # nobody needs it for this block
    assert torch.equal(models[1].blocks[1].attn1.to_q.weight, twin.blocks[1].attn1.to_q.weight)


def test_a_shared_block_that_is_written_is_others_as_it_was(name: str, twin: Any) -> None:
    one, two = (packed(KIND.make(), share=name) for _ in range(2))
    expected = forward(twin, KIND.inputs())
    assert torch.equal(forward(two, KIND.inputs()), expected)
    for each in (one, twin):
        with torch.no_grad():
            each.blocks[1].attn1.to_q.weight.mul_(1.5)
    assert torch.equal(forward(one, KIND.inputs()), forward(twin, KIND.inputs()))
    shared = [b.stored.shared for b in bindings(one) if isinstance(b.stored, HostImage)]
    assert shared == [number != 1 for number in range(UNITS)]
    assert plain_units(one) == []
    assert torch.equal(forward(two, KIND.inputs()), expected)
    assert torch.equal(two.blocks[1].attn1.to_q.weight, KIND.make().blocks[1].attn1.to_q.weight)


def test_a_walk_over_all_blocks_leaves_two_of_them_plain() -> None:
    """As fusing a LoRA does."""
    model, resident = packed(chain()), chain()
    resident.load_state_dict(model.state_dict())
    for number in range(6):
        for each in (model, resident):
            for weight in each.blocks[number].parameters():
                weight.data += weight.data
        assert plain_units(model) == [max(number - 1, 0), number][-(number + 1) :]
        assert unpacked(model) <= 2 * block(model)
    assert torch.equal(model(X), resident(X))
    assert plain_units(model) == []
    assert same(model, resident)


def test_one_operation_may_write_all_blocks(model: Any, twin: Any) -> None:
    for each in (model, twin):
        torch._foreach_mul_(list(each.blocks.parameters()), 0.5)
    assert torch.equal(forward(model, KIND.inputs()), forward(twin, KIND.inputs()))
    assert plain_units(model) == []


@pytest.mark.parametrize("prefetch", [0, 1, 5])
@pytest.mark.parametrize("host", ["pinned", "pageable"])
def test_bytes_of_before_a_write_are_never_used(prefetch: int, host: str) -> None:
    """Whatever comes between the write and the fetch."""
    model, resident = packed(chain(), prefetch, host=host), chain()
    resident.load_state_dict(model.state_dict())
    runtime = wanoffload.offloader(model)

    def both(change: Callable[[Any], object]) -> None:
        before = resident(X)
        for each in (model, resident):
            with torch.no_grad():
                change(each)
        assert not torch.equal(resident(X), before)

    def check() -> None:
        assert torch.equal(model(X), resident(X))

    check()
    both(lambda m: m.blocks[0].weight.mul_(1.5))
    runtime.start()  # prefetches
    check()
    both(lambda m: m.blocks[1].weight.mul_(1.5))
    runtime.pause()
    check()
    runtime.pause()
    both(lambda m: m.blocks[1].weight.mul_(1.5))
    check()
    both(lambda m: m.blocks[2].weight.mul_(1.5))
    assert torch.equal(model.blocks[2](X), resident.blocks[2](X))  # a block alone
    runtime.pause()
    both(lambda m: m.blocks[3].weight.mul_(1.5))
    assert torch.equal(model.blocks[3](X), resident.blocks[3](X))
    check()
    both(lambda m: m.load_state_dict(chain_state(seed=3), assign=True))
    check()
    both(lambda m: m.load_state_dict(chain_state(seed=4)))
    check()
    runtime.set_prefetch(3)
    both(lambda m: m.blocks[5].weight.mul_(1.5))
    check()


def chain_state(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return chain().state_dict()


def test_weights_of_two_blocks_can_be_exchanged_and_assigned(model: Any, twin: Any) -> None:
    for each in (model, twin):
        a, b = each.blocks[0].attn1.to_q, each.blocks[3].attn1.to_q
        a.weight, b.weight = b.weight, a.weight
    assert torch.equal(forward(model, KIND.inputs()), forward(twin, KIND.inputs()))
    drop(model)
    for each in (model, twin):
        each.blocks[1].norm2.weight.data = each.blocks[2].norm2.weight.data.clone()
        each.blocks[4].ffn.net[2].weight.data = each.blocks[3].ffn.net[2].weight.data
    assert plain_units(model) == [1, 4]
    assert same(model, twin)
    assert torch.equal(forward(model, KIND.inputs()), forward(twin, KIND.inputs()))
    assert plain_units(model) == []


def test_a_replaced_weight_that_is_held_keeps_its_values(model: Any, twin: Any) -> None:
    layer, right = model.blocks[0].attn1.to_q, twin.blocks[0].attn1.to_q.weight
    held = [layer.weight, layer.weight.data, model.state_dict()["blocks.0.attn1.to_q.weight"]]
    layer.weight = nn.Parameter(torch.zeros_like(right), requires_grad=False)
    for _ in range(2):
        forward(model, KIND.inputs())
        for old in held:
            assert torch.equal(old, right)
            assert torch.equal(at(old.data_ptr(), right), right)
            storage = old.untyped_storage()
            assert torch.equal(torch.empty(0, dtype=right.dtype).set_(storage), right.flatten())
    assert not layer.weight.any()


def test_a_write_within_a_forward_takes_effect_in_the_blocks_that_follow() -> None:
    """Block 3 was fetched ahead when block 0 writes to it, and again before it is its turn."""
    model, resident = packed(chain(), 3), chain()
    resident.load_state_dict(model.state_dict())
    new = torch.full((64, 64), 0.25).bfloat16()
    for each in (model, resident):

        def write(*_: object, each: Any = each) -> None:
            each.blocks[3].weight.data = new

        each.blocks[0].register_forward_pre_hook(write)
    expected = resident(X)
    model(X)
    assert torch.equal(model(X), expected)
    assert torch.equal(model(X), expected)


def test_a_written_block_that_there_is_no_memory_to_pack_stays_plain_and_true(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, resident = packed(chain()), chain()
    resident.load_state_dict(model.state_dict())
    for each in (model, resident):
        each.blocks[1].weight.mul_(2)
        each.blocks[4].weight.mul_(2)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "wanoffload"):
        patch.setattr(host_memory, "available_bytes", lambda: host_memory.RESERVE)
        for _ in range(2):
            assert torch.equal(model(X), resident(X))
        assert plain_units(model) == [1, 4]
        messages = [record.getMessage() for record in caplog.records]
        assert all("stays unpacked: packing blocks." in message for message in messages)
        assert len(messages) == 4
        for each in (model, resident):
            each.blocks[1].weight.mul_(2)
        assert torch.equal(model(X), resident(X))
    assert torch.equal(model(X), resident(X))
    assert plain_units(model) == []


def test_a_refused_page_lock_leaves_the_block_pageable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = HostBackend()
    with monkeypatch.context() as patch:
        patch.setattr(wrapping, "backend_for", lambda _: backend)
        model, resident = packed(chain(), host="pinned"), chain()
    resident.load_state_dict(model.state_dict())
    for each in (model, resident):
        each.blocks[1].weight.mul_(2)
    backend.fail_at(1)
    with caplog.at_level(logging.WARNING, "wanoffload"):
        bindings(model)[1].settle()
    assert "blocks.1 could not be page-locked again" in caplog.text
    assert wanoffload.offloader(model).tiers == ["pinned", "pageable", *["pinned"] * 4]
    assert plain_units(model) == []
    assert torch.equal(model(X), resident(X))


def test_too_little_memory_to_write_is_an_error_and_nothing_is_changed(
    model: Any, twin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = model.blocks[1].ffn.net[2].weight
    with monkeypatch.context() as patch:
        patch.setattr(host_memory, "available_bytes", lambda: host_memory.RESERVE + 30_000)
        with torch.no_grad(), pytest.raises(HostMemoryError, match=r"unpacking blocks\.1 needs"):
            weight.mul_(2)
    assert plain_units(model) == []
    assert torch.equal(weight, twin.blocks[1].ffn.net[2].weight)
    assert torch.equal(forward(model, KIND.inputs()), forward(twin, KIND.inputs()))


@pytest.mark.parametrize("way", ["written", "replaced"])
def test_weights_that_do_not_pack_any_more_are_right(way: str) -> None:
    """Their chunks are larger than the memory from where they are unpacked. What was replaced is
    found so when a forward has begun."""
    model, resident = packed(chain()), chain()
    resident.load_state_dict(model.state_dict())
    before = wanoffload.offloader(model).stats()
    noise = (torch.randint(0, 1 << 15, (64, 64)) & ~0x4000).short().view(torch.bfloat16)
    for each in (model, resident):
        for number in (1, 3):
            if way == "written":
                each.blocks[number].weight.copy_(noise)
            else:
                each.blocks[number].weight = nn.Parameter(noise.clone(), requires_grad=False)
    for _ in range(2):
        assert torch.equal(model(X).view(torch.int16), resident(X).view(torch.int16))
    after = wanoffload.offloader(model).stats()
    assert plain_units(model) == []
    assert after.staging_bytes > before.staging_bytes
    assert after.forwards == 2


def test_a_weight_can_not_be_written_while_its_block_computes(model: Any, twin: Any) -> None:
    weight = model.blocks[1].norm2.weight
    errors = []

    def write(*_: object) -> None:
        try:
            weight.data = torch.zeros_like(twin.blocks[1].norm2.weight)
        except UsageError as error:
            errors.append(str(error))

    handle = model.blocks[1].attn1.to_q.register_forward_pre_hook(write)
    expected = forward(twin, KIND.inputs())
    assert torch.equal(forward(model, KIND.inputs()), expected)
    handle.remove()
    assert "is in use: its weights can't be changed" in errors[0]
    assert plain_units(model) == []
    assert torch.equal(forward(model, KIND.inputs()), expected)
    assert same(model, twin)


# Unwrapping.


def test_unwrap_gives_ordinary_parameters_and_takes_memory_for_what_packing_saved(
    twin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = HostBackend()
    monkeypatch.setattr(wrapping, "backend_for", lambda _: backend)
    model = packed(KIND.make(), host="pinned")
    stats = wanoffload.offloader(model).stats()
    largest = max(binding.stored.nbytes for binding in bindings(model))
    needed = stats.plain_bytes - stats.host_bytes + largest
    held = model.state_dict()
    asked: list[int] = []
    real = host_memory.require

    def require(nbytes: int, purpose: str) -> None:
        if "blocks into own memory" in purpose:
            asked.append(nbytes)
        real(nbytes, purpose)

    monkeypatch.setattr(host_memory, "require", require)
    take_ownership = Binding.take_ownership

    def take(self: Binding) -> None:
        packed_bytes = self.stored.nbytes if self.packed else 0
        locked = backend.locked_bytes
        take_ownership(self)
        assert locked - backend.locked_bytes >= packed_bytes, "they go one by one"

    runtime = wanoffload.offloader(model)
    monkeypatch.setattr(Binding, "take_ownership", take)
    wanoffload.unwrap(model)
    assert asked == [needed]
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert same(model, twin)
    assert torch.equal(forward(model, KIND.inputs()), forward(twin, KIND.inputs()))
    model.blocks[0].norm2.weight.data.zero_()
    assert not held["blocks.0.norm2.weight"].any()
    assert runtime.stats().locked_bytes == 0


@pytest.mark.parametrize("tier", ["pageable", "pinned"])
def test_unwrap_to_a_device_has_one_block_at_a_time_on_the_host(
    tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the device is torch's "meta": any that is not the host."""
    model = packed(KIND.make(), host=tier)
    alive: list[weakref.ref[Any]] = []
    give_back = Binding.give_back

    def spy(self: Binding) -> None:
        assert all(memory() is None for memory in alive), "the block before is on the host still"
        give_back(self)
        assert isinstance(self.image, HostImage)
        assert self.view is not None
        alive.append(weakref.ref(self.view))

    monkeypatch.setattr(Binding, "give_back", spy)
    wanoffload.unwrap(model, "meta")
    assert len(alive) == UNITS
    assert all(view() is None for view in alive)


def test_too_little_memory_to_unwrap_to_a_device_leaves_the_model_packed(
    model: Any, twin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(host_memory, "available_bytes", lambda: host_memory.RESERVE + 1_000)
        with pytest.raises(HostMemoryError, match="bringing a block"):
            wanoffload.unwrap(model, "meta")
    assert torch.equal(forward(model, KIND.inputs()), forward(twin, KIND.inputs()))
    assert plain_units(model) == []


def test_too_little_memory_to_unwrap_leaves_the_model_packed(
    model: Any, twin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(host_memory, "available_bytes", lambda: host_memory.RESERVE + 30_000)
        with pytest.raises(HostMemoryError, match="bringing 5 blocks"):
            wanoffload.unwrap(model)
    assert torch.equal(forward(model, KIND.inputs()), forward(twin, KIND.inputs()))
    assert plain_units(model) == []


def test_an_unwrap_that_fails_half_way_leaves_a_model_that_runs_and_packs_again(
    model: Any, twin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Binding.take_ownership
    done: list[str] = []

    def failing(self: Binding) -> None:
        if len(done) == 3:
            raise HostMemoryError("no room")
        done.append(self.name)
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Binding, "take_ownership", failing)
        with pytest.raises(HostMemoryError, match="no room"):
            wanoffload.unwrap(model)
    assert torch.equal(forward(model, KIND.inputs()), forward(twin, KIND.inputs()))
    assert plain_units(model) == []
    assert torch.equal(
        forward(wanoffload.unwrap(model), KIND.inputs()), forward(twin, KIND.inputs())
    )


def test_what_was_written_is_unwrapped_as_it_is(model: Any, twin: Any) -> None:
    for each in (model, twin):
        with torch.no_grad():
            each.blocks[1].norm2.weight.mul_(2)
    runtime, held, kept = wanoffload.offloader(model), model.state_dict(), [*bindings(model)]
    wanoffload.unwrap(model)
    assert same(model, twin)
    assert len(runtime.written) == 0
    held["blocks.1.norm2.weight"].mul_(2)  # what was taken before is the same memory still
    assert torch.equal(model.blocks[1].norm2.weight, 2 * twin.blocks[1].norm2.weight)
    assert len(runtime.written) == 0
    assert not any(binding.packed for binding in kept)


# Looking.


def test_stats_say_what_packing_saves_and_what_reading_takes(model: Any) -> None:
    stats = wanoffload.offloader(model).stats()
    assert stats.plain_bytes == sum(binding.layout.nbytes for binding in bindings(model))
    assert stats.host_bytes == sum(binding.image.nbytes for binding in bindings(model))
    assert stats.host_bytes < 0.9 * stats.plain_bytes
    assert stats.unpacked_bytes == 0
    with torch.no_grad():
        model.blocks[1].norm2.weight.mul_(2)
    written = wanoffload.offloader(model).stats()
    layout, image = bindings(model)[1].layout, bindings(model)[0].image
    assert written.packed_units == UNITS - 1
    assert written.host_bytes == stats.host_bytes - image.nbytes + layout.nbytes
    assert written.unpacked_bytes == 0


def test_verify_compares_the_slot_with_what_was_packed(twin: Any) -> None:
    verified = packed(KIND.make(), prefetch=UNITS, verify=True)
    inputs = KIND.inputs()
    for _ in range(2):
        assert torch.equal(forward(verified, inputs), forward(twin, inputs))
    for each in (verified, twin):
        with torch.no_grad():
            each.blocks[1].norm2.weight.mul_(2)
    assert torch.equal(forward(verified, inputs), forward(twin, inputs))
    wanoffload.offloader(verified).memory.slots.memory[300] ^= 1
    with pytest.raises(wanoffload.VerifyError):
        forward(verified, inputs)
    assert torch.equal(forward(verified, inputs), forward(twin, inputs))
