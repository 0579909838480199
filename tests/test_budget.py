"""`vram_budget`: blocks that fit stay on the device, and everything is as if they did not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import wanoffload
from tests.small_models import MODELS, forward
from wanoffload import (
    ClosedError,
    ConcurrentForwardError,
    HostMemoryError,
    Offloader,
    WrapError,
    residency,
    ring_plan,
)
from wanoffload._C import Prefetcher
from wanoffload.budget import Budget
from wanoffload.device_memory import SlotMemory
from wanoffload.residency import ALIGN_BYTES, Residency, UnitBytes, allocated, least
from wanoffload.residency_planner import ResidencyPlanner

KIND = MODELS["wan22_5b"]
MIB = 1 << 20


def wrapped(name: str = "wan22_5b", device: str = "cpu", **options: Any) -> nn.Module:
    model = MODELS[name].make().to(device)
    return wanoffload.wrap(model, **{"device": device, "prefetch": 1, **options})


def units_of(runtime: Offloader) -> list[UnitBytes]:
    return [UnitBytes(b.layout.nbytes, b.image.nbytes, b.packed) for b in runtime.bindings]


def budget_for(name: str, resident: int, packed: bool = False, prefetch: int = 1) -> int:
    """The least, and room for so many blocks more. Each takes 2 MiB as the allocator counts."""
    runtime = wanoffload.offloader(wrapped(name, pack=packed, prefetch=prefetch))
    unplanned = runtime.device_bytes - runtime.residency.device_bytes
    others = unplanned + runtime.streaming.planner.others
    need = least(units_of(runtime), others=others, prefetch=prefetch)
    return need + resident * allocated(ALIGN_BYTES + runtime.bindings[0].layout.nbytes)


def check(model: nn.Module, name: str = "wan22_5b", forwards: int = 3) -> None:
    """Every forward gives what the resident model gives, from bytes that the plan says."""
    runtime = wanoffload.offloader(model)
    inputs = MODELS[name].inputs(runtime.device.type)
    expected = forward(MODELS[name].make().to(runtime.device), inputs)
    runtime.poison_slots()
    for number in range(forwards):
        before, at_home = runtime.stats(), runtime.at_home
        assert torch.equal(forward(model, inputs), expected)
        after = runtime.stats()
        assert after.acquires - before.acquires == (0 if at_home else after.units)
        assert runtime.at_home == (after.resident_units == after.units)
        if number > 1:
            fetched = after.bytes_fetched - before.bytes_fetched
            assert fetched == runtime.residency.streamed_bytes
    if runtime.budget.nbytes is not None:
        assert runtime.device_bytes <= runtime.residency.device_bytes <= runtime.budget.nbytes


@pytest.mark.parametrize("host", ["pinned", "pageable"])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("resident", [0, 1, 2, 100])
@pytest.mark.parametrize("name", ["wan22_5b", "vace", "animate"])
def test_outputs_are_the_same_under_any_budget(
    name: str, resident: int, pack: bool, host: str, device: str
) -> None:
    budget = budget_for(name, resident, pack)
    model = wrapped(name, device, vram_budget=budget, pack=pack, host=host)
    stats = wanoffload.offloader(model).stats()
    stay = stats.resident_units + stats.kept_packed_units
    assert stay >= min(resident, 1)
    assert stay == stats.units or resident < 100
    check(model, name)


def test_what_stays_comes_over_the_link_once() -> None:
    model = wrapped(vram_budget=budget_for("wan22_5b", 100))
    runtime = wanoffload.offloader(model)
    check(model)
    stats = runtime.stats()
    assert (stats.slots, stats.resident_units) == (0, stats.units)
    assert stats.fetches == stats.units
    assert stats.bytes_fetched == stats.host_bytes == stats.plain_bytes
    assert stats.resident_bytes >= stats.plain_bytes


def test_what_is_kept_packed_is_unpacked_for_each_use_and_comes_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = wrapped("wan22_5b", pack=True)
    runtime = wanoffload.offloader(model)
    total = len(runtime.bindings)
    # Room for all of them packed: small blocks take as much plain, so plain ones are refused here.
    kept = replace(runtime.residency, kept_packed=frozenset(range(total)), resident=frozenset())
    monkeypatch.setattr(ResidencyPlanner, "choose", lambda *_: kept)
    before = runtime.stats()
    runtime._rebuild()
    check_outputs(model, 3)
    after = runtime.stats()
    assert after.kept_packed_units == total
    assert after.bytes_fetched - before.bytes_fetched == after.host_bytes
    assert after.fetches - before.fetches >= 3 * total  # into slots, from the device
    assert after.staging_bytes == 0


def test_packed_blocks_come_through_one_staging_slot_where_there_is_room_for_one(
    device: str, unrounded: None
) -> None:
    model = wrapped(device=device, pack=True, vram_budget=budget_for("wan22_5b", 0, packed=True))
    runtime = wanoffload.offloader(model)
    assert runtime.residency.staging_slots == runtime.memory.staging.count == 1
    assert runtime.stats().slots == 2
    check_outputs(model, 3)
    assert runtime.budget.nbytes is not None
    assert runtime.device_bytes <= runtime.residency.device_bytes <= runtime.budget.nbytes


def check_outputs(model: nn.Module, forwards: int) -> None:
    runtime = wanoffload.offloader(model)
    inputs = KIND.inputs(runtime.device.type)
    expected = forward(KIND.make().to(runtime.device), inputs)
    runtime.poison_slots()
    for _ in range(forwards):
        assert torch.equal(forward(model, inputs), expected)


WRITES: dict[str, Callable[[nn.Linear], None]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "data": lambda layer: layer.weight.data.add_(1),
    "replaced": lambda layer: setattr(
        layer, "weight", nn.Parameter(layer.weight * 3, requires_grad=False)
    ),
}


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("way", WRITES)
def test_a_write_to_a_block_that_stays_takes_effect_in_the_next_forward(
    way: str, pack: bool, paused: bool, device: str
) -> None:
    twin = KIND.make().to(device)
    model = wrapped(device=device, vram_budget=budget_for("wan22_5b", 100, pack), pack=pack)
    runtime = wanoffload.offloader(model)
    inputs = KIND.inputs(device)
    unchanged = forward(model, inputs)
    if paused:
        runtime.pause(keep_residents=True)
    with torch.no_grad():
        for changed in (model, twin):
            WRITES[way](changed.blocks[1].ffn.net[2])
    expected = forward(twin, inputs)
    assert not torch.equal(expected, unchanged)
    for _ in range(2):
        assert torch.equal(forward(model, inputs), expected)


@pytest.mark.parametrize("pack", [False, True])
def test_another_budget_moves_only_the_difference(pack: bool, device: str) -> None:
    budgets = [budget_for("wan22_5b", n, pack) for n in (0, 1, 100)]
    model = wrapped(device=device, vram_budget=budgets[0], pack=pack)
    runtime = wanoffload.offloader(model)
    check_outputs(model, 2)
    for budget in (budgets[1], budgets[2], budgets[1], budgets[2], budgets[0]):
        had = dict(runtime.memory.homes.units)
        runtime.set_budget(budget)
        kept = {n: home for n, home in runtime.memory.homes.units.items() if had.get(n) is home}
        new = runtime.memory.homes.units.keys() - kept.keys()
        assert kept.keys() == {n for n in had if n in runtime.memory.homes.units}
        before = runtime.stats().bytes_fetched
        check_outputs(model, 1)
        streamed = [
            b for n, b in enumerate(runtime.bindings) if n not in runtime.memory.homes.units
        ]
        ahead = sum(b.image.nbytes for b in streamed[: runtime.residency.slots])
        fetched = runtime.stats().bytes_fetched - before
        bringing = sum(runtime.bindings[n].image.nbytes for n in new)
        passing = sum(b.image.nbytes for b in streamed)
        assert fetched <= bringing + passing + ahead
        assert runtime.device_bytes <= budget


def test_a_budget_below_the_least_names_it_and_the_model_is_as_it_was() -> None:
    model = KIND.make()
    before = [id(p) for p in model.parameters()]
    with pytest.raises(WrapError, match=r"at least \d[\d,]* bytes .* vram_budget is 1,000 bytes"):
        wanoffload.wrap(model, device="cpu", vram_budget=1000)
    assert [id(p) for p in model.parameters()] == before
    forward(model, KIND.inputs())


@pytest.mark.parametrize("value", ["much", -1, 1.5, 0.0, True, [], "12GiBs"])
def test_what_is_no_budget_is_refused(value: object) -> None:
    with pytest.raises(WrapError, match="vram_budget"):
        wrapped(vram_budget=value)


def test_a_fraction_is_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanoffload.budget.free_bytes", lambda _: 1000 * MIB)
    assert Budget.of(0.5, torch.device("cpu")).nbytes == 500 * MIB
    assert Budget.of(0.5, torch.device("cpu"), held=1000 * MIB).nbytes == 1000 * MIB
    assert Budget.of(1.0, torch.device("cpu")).nbytes == 1000 * MIB


def test_a_refused_budget_changes_nothing() -> None:
    model = wrapped(vram_budget=budget_for("wan22_5b", 1))
    runtime = wanoffload.offloader(model)
    check(model)
    homes, budget = dict(runtime.memory.homes.units), runtime.budget
    with pytest.raises(WrapError, match="vram_budget"):
        runtime.set_budget(1000)
    assert (runtime.memory.homes.units, runtime.budget, runtime.paused) == (homes, budget, False)
    check(model)


def test_a_budget_is_not_set_during_a_forward_nor_after_the_end() -> None:
    model = wrapped(vram_budget=budget_for("wan22_5b", 1))
    runtime = wanoffload.offloader(model)
    errors = []

    def set_it(*_: object) -> None:
        try:
            runtime.set_budget(None)
        except ConcurrentForwardError as error:
            errors.append(error)

    handle = model.blocks[1].register_forward_hook(set_it)
    check(model, forwards=1)
    handle.remove()
    assert len(errors) == 1
    runtime.close()
    with pytest.raises(ClosedError, match="closed"):
        runtime.set_budget(None)


def test_pausing_gives_the_blocks_back_or_keeps_them() -> None:
    model = wrapped(vram_budget=budget_for("wan22_5b", 100))
    runtime = wanoffload.offloader(model)
    check(model)
    runtime.pause(keep_residents=True)
    assert runtime.stats().resident_bytes > 0
    before = runtime.stats().bytes_fetched
    check_outputs(model, 1)
    assert runtime.stats().bytes_fetched == before
    runtime.pause()
    assert runtime.stats().resident_bytes == 0
    check_outputs(model, 1)
    assert runtime.stats().bytes_fetched == before + runtime.stats().host_bytes


@pytest.mark.parametrize("granularity", ["block", "part"])
def test_what_is_paused_is_not_planned_anew(
    granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts of a pipeline take turns like that, and a plan of parts may take a quarter of a
    second."""
    model = wrapped(vram_budget=budget_for("wan22_5b", 100), granularity=granularity)
    check_outputs(model, 1)
    runtime = wanoffload.offloader(model)
    planned: list[str] = []
    for module in (residency, ring_plan):
        real = module._Planner.plan

        def plan(*args: Any, real: Any = real) -> Residency:
            planned.append(granularity)
            made: Residency = real(*args)
            return made

        monkeypatch.setattr(module._Planner, "plan", plan)
    for keeps in (True, False):
        runtime.pause(keep_residents=keeps)
        check_outputs(model, 1)
    assert not planned
    runtime.set_budget(runtime.device_bytes - 1)
    assert planned


def test_without_a_budget_no_block_stays_and_without_a_prefetch_two_are_ahead() -> None:
    runtime = wanoffload.offloader(wrapped("animate", prefetch=None))
    assert (runtime.residency.depth, runtime.stats().slots) == (2, 3)
    assert runtime.stats().resident_units == runtime.stats().kept_packed_units == 0


def test_an_unwrapped_model_is_ordinary_and_holds_nothing() -> None:
    model = wrapped(vram_budget=budget_for("wan22_5b", 100), pack=True)
    check_outputs(model, 1)
    runtime = wanoffload.offloader(model)
    wanoffload.unwrap(model)
    assert not runtime.memory.homes.units
    values = KIND.make().state_dict()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_verify_looks_at_the_blocks_that_stay(device: str) -> None:
    model = wrapped(device=device, vram_budget=budget_for("wan22_5b", 100), verify=True)
    runtime = wanoffload.offloader(model)
    check_outputs(model, 2)
    runtime.memory.homes[1].place.memory[300] ^= 1
    with pytest.raises(wanoffload.VerifyError, match=r"blocks\.1"):
        forward(model, KIND.inputs(device))
    check_outputs(model, 1)  # what was spoilt is fetched again


# Too little memory.


@contextmanager
def out_of_memory_at(nth: int, once: bool = False) -> Iterator[list[int]]:
    """The n-th allocation of device memory fails, and all behind it, or only this one."""
    made: list[int] = []
    real = SlotMemory.__init__

    def init(self: SlotMemory, count: int, slot_bytes: int, device: torch.device) -> None:
        if count:
            made.append(count * slot_bytes)
            if len(made) == nth + 1 or (len(made) > nth and not once):
                raise torch.OutOfMemoryError("injected")
        real(self, count, slot_bytes, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotMemory, "__init__", init)
        yield made


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("nth", range(6))
def test_a_wrap_that_runs_out_of_memory_leaves_the_model_as_it_was(nth: int, pack: bool) -> None:
    budget = budget_for("wan22_5b", 1, pack)
    model = KIND.make()
    with out_of_memory_at(nth) as made:
        try:
            wanoffload.wrap(model, 1, device="cpu", vram_budget=budget, pack=pack)
        except torch.OutOfMemoryError:
            pass
        else:
            assert len(made) <= nth
    if len(made) > nth:
        assert torch.equal(forward(model, KIND.inputs()), forward(KIND.make(), KIND.inputs()))
        wanoffload.wrap(model, 1, device="cpu", vram_budget=budget, pack=pack)
    check_outputs(model, 2)


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("nth", range(6))
def test_a_budget_that_the_device_lacks_is_refused_and_the_model_goes_on(
    nth: int, pack: bool, once: bool
) -> None:
    small, large = (budget_for("wan22_5b", n, pack) for n in (0, 100))
    model = wrapped(vram_budget=small, pack=pack)
    runtime = wanoffload.offloader(model)
    check_outputs(model, 1)
    with out_of_memory_at(nth, once) as made:
        try:
            runtime.set_budget(large)
        except torch.OutOfMemoryError:
            assert runtime.budget.nbytes == small
        else:
            assert len(made) <= nth
    check_outputs(model, 2)
    assert runtime.device_bytes <= (runtime.budget.nbytes or 0)


@pytest.mark.parametrize("nth", [0, 1, 2])
def test_an_engine_that_could_not_take_all_units_is_given_up_and_made_again(
    nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped(vram_budget=budget_for("wan22_5b", 100, False))
    runtime = wanoffload.offloader(model)
    check_outputs(model, 1)
    assert nth < len(runtime.memory.homes.units) == len(runtime.bindings)
    runtime.pause(keep_residents=True)

    class Refusing(Prefetcher):
        def add_unit(self, *args: Any, **options: Any) -> int:
            if self.unit_count == nth:
                raise HostMemoryError("injected")
            return super().add_unit(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("wanoffload.engine.Prefetcher", Refusing)
        for _ in range(2):
            with pytest.raises(HostMemoryError, match="injected"):
                forward(model, KIND.inputs())
        assert runtime.paused
        runtime.pause(keep_residents=True)
    before = runtime.stats().fetches
    check_outputs(model, 2)
    assert runtime.stats().fetches == before  # they have stood in their homes all the while


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("nth", range(3))
def test_less_stays_where_a_forward_finds_less_memory(
    nth: int, pack: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = wrapped(vram_budget=budget_for("wan22_5b", 100, pack), pack=pack)
    runtime = wanoffload.offloader(model)
    check_outputs(model, 1)
    stayed = len(runtime.memory.homes.units)
    runtime.pause()
    slots_and_staging = 1 if pack else 0  # where all stay there are no slots
    with caplog.at_level(logging.WARNING), out_of_memory_at(slots_and_staging + nth, once=True):
        if nth == 0:  # none of what is to stay could be had
            with pytest.raises(torch.OutOfMemoryError):
                forward(model, KIND.inputs())
            assert runtime.paused
        else:
            check_outputs(model, 2)
            assert 0 <= len(runtime.memory.homes.units) < stayed
            assert "too little memory" in caplog.text
    check_outputs(model, 2)


def test_a_home_that_was_not_filled_yet_is_filled_by_the_next_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = SlotMemory.__init__

    def poisoned(self: SlotMemory, *given: Any) -> None:
        real(self, *given)
        self.memory.fill_(0xFF)

    monkeypatch.setattr(SlotMemory, "__init__", poisoned)
    model = wrapped(vram_budget=budget_for("wan22_5b", 0))
    runtime = wanoffload.offloader(model)
    check_outputs(model, 1)
    for _ in range(2):
        runtime.set_budget(budget_for("wan22_5b", 100))
        runtime.pause(keep_residents=True)
        check_outputs(model, 1)
        runtime.set_budget(budget_for("wan22_5b", 0))


def test_what_is_not_in_blocks_counts(device: str) -> None:
    model = wrapped(device=device)
    runtime = wanoffload.offloader(model)
    inside = {id(p) for block in model.blocks for p in block.parameters()}
    tensors = [*model.parameters(), *model.buffers()]
    others = sum(tensor.nbytes for tensor in tensors if id(tensor) not in inside)
    counted = runtime.device_bytes - allocated(runtime.stats().slot_bytes)
    assert others <= counted < others + 512 * len(tensors)
    assert runtime.device_bytes == runtime.residency.device_bytes


class Piece(nn.Module):
    """A block that gives out a piece of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 64), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table[:2]


class Pieces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Piece(), Piece()])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [block(x) for block in self.blocks]


def test_what_a_block_gives_out_of_its_weights_stays_as_it_was(device: str) -> None:
    model = wanoffload.wrap(Pieces().to(device), device=device, vram_budget="1GiB")
    assert wanoffload.offloader(model).stats().resident_units == 2
    expected = [block.table[:2].clone() for block in model.blocks]
    with torch.no_grad():
        pieces = model(torch.zeros(1, device=device))
        for block in model.blocks:
            block.table.zero_()
        assert all(not piece.any() for piece in model(torch.zeros(1, device=device)))
    for piece, was in zip(pieces, expected, strict=True):
        assert torch.equal(piece.cpu(), was)
