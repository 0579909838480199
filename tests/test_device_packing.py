"""Packing on the device: the same bytes as the CPU's, wherever a unit's weights come from."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wanoffload
from tests.small_models import MODELS
from tests.test_checkpoint import save
from wanoffload import packing, placing, wrapping
from wanoffload._C import HostBackend, HostImage, HostStore, Image, PackedImage
from wanoffload.device_memory import SlotMemory
from wanoffload.device_packing import DevicePacking
from wanoffload.engine import backend_for
from wanoffload.image import ImageLayout, lay_out, leave_unlocked
from wanoffload.loading.checkpoint import Checkpoint
from wanoffload.loading.describing import describe
from wanoffload.loading.stored_weights import StoredWeights
from wanoffload.packing import pack_on_host
from wanoffload.units import Unit, find_units
from wanoffload.weights import OwnTensors, Weights

KIND = MODELS["wan22_5b"]
BF16 = torch.bfloat16
CPU = torch.device("cpu")


def layouts_of(units: list[Unit]) -> list[ImageLayout]:
    return [lay_out((g[0].name, g[0].tensor) for g in unit.groups) for unit in units]


class World:
    """Weights from somewhere, and what packs them."""

    def __init__(self, model: nn.Module, weights: Weights, device: str, slots: int = 2) -> None:
        self.units = find_units(model)
        self.layouts = layouts_of(self.units)
        self.weights = weights
        target = torch.device(device)
        self.backend = backend_for(torch.device(device, 0) if target.type == "cuda" else target)
        self.store = HostStore(self.backend)
        self.slots = SlotMemory(slots, max(layout.nbytes for layout in self.layouts), target)
        self.slots.memory.fill_(0xA5)
        todo = list(zip(self.units, self.layouts, strict=True))
        self.packing = DevicePacking(weights, todo, self.backend, target, self.slots)

    def pack_all(self, lock: Callable[[HostImage, bool], None] = leave_unlocked) -> list[bytes]:
        """As they come out, one after the other."""
        found = []
        for unit, layout in zip(self.units, self.layouts, strict=True):
            memory = self.packing.pack(unit, layout, self.store.allocate, lock)
            found.append(bytes(memoryview(memory)))
        self.packing.close()
        return found


def expected_of(model: nn.Module) -> list[bytes]:
    """Of the CPU's packer."""
    units = find_units(model)
    weights = OwnTensors(model, CPU, move_others=False)
    store = HostStore(HostBackend())
    found = []
    for unit, layout in zip(units, layouts_of(units), strict=True):
        plain = store.allocate(layout.nbytes)
        weights.write(unit, layout, plain, leave_unlocked)
        found.append(bytes(memoryview(pack_on_host(layout, plain, store))))
    return found


def strided(model: nn.Module) -> nn.Module:
    """Some weights have gaps, or are conjugated views of nothing: no run of bytes has them."""
    for block in model.blocks:  # type: ignore[union-attr]
        weight = block.ffn.net[2].weight
        wide = torch.zeros(weight.shape[0], 2 * weight.shape[1], dtype=weight.dtype)
        wide[:, ::2] = weight.data
        weight.data = wide[:, ::2]
    return model


@pytest.mark.parametrize(
    ("place", "slots"), [("host", 1), ("host", 3), ("device", 2), ("strided", 1), ("strided", 2)]
)
def test_the_models_own_tensors_are_packed_as_on_the_cpu(
    place: str, slots: int, device: str
) -> None:
    model = KIND.make()
    if place == "device":
        model.to(device)
    if place == "strided":
        strided(model)
    weights = OwnTensors(model, torch.device(device), move_others=False)
    world = World(model, weights, device, slots)
    source = weights.source(world.units[0], world.layouts[0])
    on_host = place == "host" or (place == "device" and device == "cpu")
    assert isinstance(source, Image) == on_host
    assert world.pack_all() == expected_of(KIND.make())


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("stored", ["as it runs", "cast"])
def test_a_checkpoint_is_packed_as_on_the_cpu(
    tmp_path: Path, stored: str, slots: int, device: str
) -> None:
    save(KIND.make() if stored == "as it runs" else KIND.make().float(), tmp_path)
    described = describe(type(KIND.make()), Checkpoint.open(tmp_path), BF16)
    weights = StoredWeights(described, torch.device(device))
    weights.open_files()
    world = World(described.module, weights, device, slots)
    source = weights.source(world.units[0], world.layouts[0])
    assert (source is None) == (stored == "cast")
    assert world.pack_all() == expected_of(KIND.make())


def test_the_next_units_bytes_come_while_one_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two slots; with one, only behind the kernels that read it."""
    model = KIND.make()
    for slots in (1, 2):
        events: list[str] = []
        world = World(model, OwnTensors(model, CPU, move_others=False), "cpu", slots)
        real_begin, real_encode = world.packing._begin, world.packing._encode

        def begin(may_copy: bool, real: Any = real_begin, to: list[str] = events) -> None:
            to.append("begin")
            real(may_copy)

        def encode(*given: Any, real: Any = real_encode, to: list[str] = events) -> Any:
            to.append("encode")
            return real(*given)

        monkeypatch.setattr(world.packing, "_begin", begin)
        monkeypatch.setattr(world.packing, "_encode", encode)
        world.pack_all()
        first = events[: events.index("encode")]
        assert first == ["begin"] * slots


def test_one_allocation_on_the_device_serves_all_units(monkeypatch: pytest.MonkeyPatch) -> None:
    model = KIND.make()
    world = World(model, OwnTensors(model, CPU, move_others=False), "cpu")
    given = []
    real = world.packing._room_for

    def room_for(nbytes: int) -> torch.Tensor:
        given.append(real(nbytes))
        return given[-1]

    monkeypatch.setattr(world.packing, "_room_for", room_for)
    world.pack_all()
    assert len({tensor.data_ptr() for tensor in given}) == 1
    assert world.packing._packed.numel() == 0


def test_the_memory_is_there_and_locked_before_bytes_come_into_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = KIND.make()
    world = World(model, OwnTensors(model, CPU, move_others=False), "cpu")
    seen = []
    real = world.packing._bring_home

    def bring_home(packed: torch.Tensor, memory: HostImage) -> None:
        seen.append(memory.locked)
        real(packed, memory)

    monkeypatch.setattr(world.packing, "_bring_home", bring_home)
    world.pack_all(lambda memory, now: memory.lock() if now else None)
    assert seen == [True] * 3


def test_what_is_not_locked_comes_in_pieces_through_what_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wanoffload.device_packing.BOUNCE_BYTES", 4096)
    model = KIND.make()
    world = World(model, OwnTensors(model, CPU, move_others=False), "cpu")
    packed = torch.randint(0, 256, (10_000,), dtype=torch.uint8)
    memory = world.store.allocate(10_000)
    world.packing._bring_through(world.packing._page_locked(), packed, memory)
    assert bytes(memoryview(memory)) == packed.numpy().tobytes()
    assert world.backend.locked_bytes == 4096  # type: ignore[attr-defined]
    world.packing.close()
    assert world.backend.locked_bytes == 0  # type: ignore[attr-defined]


def test_a_failure_ends_every_transfer_from_the_models_tensors() -> None:
    model = KIND.make()
    world = World(model, OwnTensors(model, CPU, move_others=False), "cpu")

    def none_left(nbytes: int) -> HostImage:
        raise wanoffload.HostMemoryError("none left")

    with pytest.raises(wanoffload.HostMemoryError):
        world.packing.pack(world.units[0], world.layouts[0], none_left, leave_unlocked)
    world.packing.close()
    world.packing.close()
    assert world.backend.locked_bytes == 0  # type: ignore[attr-defined]
    gc.collect()
    assert world.store.mapped_bytes == 0


def packing_by(monkeypatch: pytest.MonkeyPatch, made: list[DevicePacking]) -> None:
    """The kernels take the place of the CPU's packer."""

    def make(self: placing.Placing, device: torch.device, slots: SlotMemory) -> DevicePacking:
        todo = list(zip(self._units, self._layouts, strict=True))
        made.append(DevicePacking(self._weights, todo, self._backend, device, slots))
        return made[-1]

    monkeypatch.setattr(placing.Placing, "_make_packing", make)
    monkeypatch.setattr(packing, "Packer", None)  # calling it would fail


def test_a_wrap_that_fails_while_it_packs_on_the_device_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = HostBackend()
    monkeypatch.setattr(wrapping, "backend_for", lambda _: backend)
    made: list[DevicePacking] = []
    packing_by(monkeypatch, made)
    real = DevicePacking._bring_home
    calls = 0

    def bring_home(self: DevicePacking, *given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        real(self, *given)

    monkeypatch.setattr(DevicePacking, "_bring_home", bring_home)
    model = KIND.make()
    with pytest.raises(KeyboardInterrupt):
        wanoffload.wrap(model, device="cpu", pack=True)
    gc.collect()
    assert backend.locked_bytes == 0  # the ring's, too
    for name, value in KIND.make().state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_wrap_that_packs_on_the_device_is_the_one_that_packs_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole way, with the kernels in the place of the CPU's packer."""
    model = KIND.make()
    images = expected_of(KIND.make())
    made: list[DevicePacking] = []
    packing_by(monkeypatch, made)
    wanoffload.wrap(model, device="cpu", pack=True)
    assert len(made) == 1
    for binding, expected in zip(wanoffload.offloader(model).bindings, images, strict=True):
        assert isinstance(binding.image, PackedImage)
        assert bytes(memoryview(binding.stored)) == expected  # type: ignore[arg-type]
    inputs = KIND.inputs()
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(model(**inputs)[0], KIND.make()(**inputs)[0])
