"""granularity="part": parts of blocks pass through a ring of bytes, and all is as if blocks passed
through slots."""

from __future__ import annotations

import copy
import gc
import io
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

import wanoffload
from tests.parted import (
    KIND,
    MIB,
    PARTS,
    STORED,
    TARGETS,
    WRITES,
    Large,
    Rows,
    Shuffled,
    Stop,
    X,
    add_adapter,
    budget_for,
    calls_of,
    check,
    check_memory,
    first_layer,
    large_rows,
    of_rows,
    resident,
    ring_budget,
    stop,
    stored,
    together,
    wrap,
    wrapped,
)
from tests.peers import Peer
from tests.small_models import MODELS, forward
from tests.small_pipelines import PIPELINES
from tests.test_activations import GIB, Card
from tests.test_budget import out_of_memory_at
from tests.test_compile_and_caches import broadcast, first_block, magnitudes, traces
from tests.test_pipeline import HERE
from tests.test_share import build_with, output, stats
from wanoffload import (
    CacheFileError,
    ClosedError,
    ConcurrentForwardError,
    ShareError,
    UnboundWeightError,
    VerifyError,
    WrapError,
    host_memory,
    runtime,
    wrapping,
)
from wanoffload._C import HostBackend
from wanoffload.pipelines.adopting import find_wrapped, why_not
from wanoffload.residency import allocated
from wanoffload.units import CALLED


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


# --- outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [None, 0, 1, 3, 50])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_resident_model(
    name: str, prefetch: int | None, device: str
) -> None:
    model = wrapped(name, device, prefetch=prefetch)
    check(model, name)
    wanoffload.unwrap(model, device)
    assert torch.equal(forward(model, MODELS[name].inputs(device)), resident(name, device))
    assert traces(model) == []


@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_same_however_the_weights_are_stored(
    name: str, how: str, device: str, tmp_path: Path
) -> None:
    check(stored(name, device, how, tmp_path), name)
    if "disk" in how:  # and now the cache file is there
        check(stored(name, device, how, tmp_path), name)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("staying", [0, 1, 4, 100])
@pytest.mark.parametrize("name", ["wan22_5b", "vace", "animate", "qwen_image"])
def test_outputs_are_the_same_with_parts_that_stay_between_those_that_stream(
    name: str, staying: int, pack: bool, device: str
) -> None:
    budget = budget_for(name, staying, pack=pack)
    model = wrapped(name, device, vram_budget=budget, pack=pack)
    stats = wanoffload.offloader(model).stats()
    assert stats.resident_units >= min(staying, 1)
    assert stats.resident_units == stats.units or staying < 100
    check(model, name, forwards=4)


def test_a_checkpoint_is_streamed_in_parts_from_its_own_files(device: str, tmp_path: Path) -> None:
    KIND.make().save_pretrained(tmp_path)
    model = wanoffload.load(
        WanTransformer3DModel,
        tmp_path,
        None,
        torch_dtype=torch.bfloat16,
        device=device,
        host="disk",
        granularity="part",
    )
    assert set(wanoffload.offloader(model).tiers) == {"disk"}
    check(model)


def test_a_steady_forward_is_never_cold() -> None:
    for name in MODELS:
        model = wrapped(name)
        offloader = wanoffload.offloader(model)
        check(model, name, forwards=2)
        offloader.reset_stats()
        check(model, name)
        assert offloader.stats().cold == 0, name


def test_the_ring_is_a_part_of_what_two_slots_take() -> None:
    parts = wanoffload.offloader(wrapped(prefetch=1)).stats()
    blocks = wanoffload.offloader(wrapped(prefetch=1, granularity="block")).stats()
    assert parts.slot_bytes < 0.5 * blocks.slot_bytes
    assert parts.plain_bytes < blocks.plain_bytes <= 1.1 * parts.plain_bytes


# --- the truth outside of forwards ----------------------------------------------------------------


@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("name", ["vace", "qwen_image"])
def test_outside_of_forwards_the_weights_are_true(name: str, how: str, tmp_path: Path) -> None:
    model, twin = stored(name, "cpu", how, tmp_path), MODELS[name].make()
    for _ in range(2):
        values = twin.state_dict()
        assert list(model.state_dict()) == list(values)
        for key, value in model.state_dict().items():
            assert torch.equal(value, values[key]), key
        for (key, found), (own, right) in zip(
            model.named_parameters(), twin.named_parameters(), strict=True
        ):
            assert key == own
            assert isinstance(found, nn.Parameter)
            assert torch.equal(found, right), key
        forward(model, MODELS[name].inputs())


@pytest.mark.parametrize("staying", [0, 3, 100])
@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("way", WRITES)
def test_a_write_takes_effect_in_the_next_forward(
    way: str, how: str, staying: int, device: str, tmp_path: Path
) -> None:
    budget = budget_for("wan22_5b", staying, pack="packed" in how)
    model = stored("wan22_5b", device, how, tmp_path, vram_budget=budget)
    twin, inputs = KIND.make().to(device), KIND.inputs(device)
    unchanged = forward(model, inputs)
    with torch.no_grad():
        for changed in (model, twin):
            WRITES[way](changed)
    expected = forward(twin, inputs)
    assert not torch.equal(expected, unchanged)
    for _ in range(3):
        assert torch.equal(forward(model, inputs), expected)
    wanoffload.unwrap(model, device)
    assert torch.equal(forward(model, inputs), expected)


@pytest.mark.parametrize("pack", [False, True])
def test_a_write_while_paused_takes_effect_in_the_next_forward(pack: bool, device: str) -> None:
    for keep in (False, True):
        model = wrapped(device=device, vram_budget=budget_for("wan22_5b", 4, pack=pack), pack=pack)
        twin, inputs = KIND.make().to(device), KIND.inputs(device)
        forward(model, inputs)
        wanoffload.offloader(model).pause(keep_residents=keep)
        with torch.no_grad():
            for changed in (model, twin):
                WRITES["all"](changed)
        for _ in range(2):
            assert torch.equal(forward(model, inputs), forward(twin, inputs))


# Adapters.


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("before_wrap", [False, True])
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("granularity", ["part", "block"])
def test_adapters_are_those_of_the_resident_model(
    granularity: str, name: str, before_wrap: bool, pack: bool, device: str
) -> None:
    kind = MODELS[name]
    twin, model, inputs = kind.make().to(device), kind.make(), kind.inputs(device)
    if before_wrap:
        add_adapter(model, name)
    wrap(model, device, pack=pack, granularity=granularity)
    if not before_wrap:
        last = forward(model, inputs)
        add_adapter(model, name)
    else:
        last = forward(twin, inputs)
    add_adapter(twin, name)
    operations = [None, "disable_lora", "enable_lora"]
    if device == "cpu" or not before_wrap:  # what is fused on a CPU rounds in another way
        operations += ["fuse_lora", "unfuse_lora"]
    for operation in [*operations, "unload_lora"]:
        if operation is not None:
            getattr(model, operation)()
            getattr(twin, operation)()
        now = forward(model, inputs)
        assert torch.equal(now, forward(twin, inputs)), operation
        if operation not in ("fuse_lora", "unfuse_lora"):
            assert not torch.equal(now, last), operation
        last = now
    values = twin.state_dict()
    assert all(torch.equal(v.cpu(), values[k].cpu()) for k, v in model.state_dict().items())
    wanoffload.unwrap(model, device)
    assert torch.equal(forward(model, inputs), last)


# --- a forward may end anywhere -------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [None, 0, 3])
@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("where", ["", "attn1", "attn1.to_k", "attn2", "norm2", "ffn.net.2"])
def test_after_an_exception_anywhere_in_a_block_the_next_forward_is_right(
    where: str, block: int, prefetch: int | None, device: str
) -> None:
    model = wrapped(device=device, prefetch=prefetch)
    inputs, expected = KIND.inputs(device), resident("wan22_5b", device)
    for register in ("register_forward_pre_hook", "register_forward_hook"):
        handle = getattr(model.blocks[block].get_submodule(where), register)(stop)
        with pytest.raises(Stop):
            forward(model, inputs)
        handle.remove()
        assert not wanoffload.offloader(model).in_forward()
        values = KIND.make().state_dict()
        assert all(torch.equal(v.cpu(), values[k]) for k, v in model.state_dict().items())
        assert torch.equal(forward(model, inputs), expected)


@pytest.mark.parametrize("prefetch", [None, 0, 3])
def test_blocks_and_parts_called_by_themselves_are_right(prefetch: int | None, device: str) -> None:
    model = KIND.make().to(device)
    parts = [part for block in model.blocks for part in (block.attn1, block.attn2, block.ffn)]
    of_parts, of_blocks = calls_of(model, parts), calls_of(model, list(model.blocks))
    expected = resident("wan22_5b", device)
    wrap(model, device, prefetch=prefetch)
    offloader = wanoffload.offloader(model)
    with torch.inference_mode():
        for number in [2, 0, 0, 1]:
            args, kwargs, output = of_blocks[number]
            assert torch.equal(model.blocks[number](*args, **kwargs), output)
        for number in [8, 0, 4, 4, 1, 7]:
            args, kwargs, output = of_parts[number]
            assert torch.equal(parts[number](*args, **kwargs), output)
        with pytest.raises(TypeError):
            model.blocks[1]()
        with pytest.raises(TypeError):
            parts[4]()
    assert offloader.stats().acquires == 4 * 3 + 6 + 1
    assert not offloader.in_forward()
    assert torch.equal(forward(model, KIND.inputs(device)), expected)


@pytest.mark.parametrize(
    ("cache", "acquires"),
    [(first_block, [9, 3, 3]), (magnitudes, [9, 0, 9]), (broadcast, [9, 3, 6])],
    ids=["first block", "magnitudes", "attention broadcast"],
)
def test_what_a_step_cache_skips_is_not_acquired(
    cache: Callable[[], Any], acquires: list[int], device: str
) -> None:
    model, twin = wrapped(device=device), KIND.make().to(device)
    for each in (model, twin):
        each.enable_cache(cache())
    stats = wanoffload.offloader(model).stats
    for number, count in enumerate(acquires):
        before, outputs = stats().acquires, []
        for each in (model, twin):
            with each.cache_context("cond", step_index=number, sigma=0.5, num_inference_steps=4):
                outputs.append(forward(each, KIND.inputs(device, seed=number)))
        assert torch.equal(*outputs)
        assert stats().acquires - before == count
    for each in (model, twin):
        each.disable_cache()
    check(model, forwards=2)


def test_a_second_thread_is_refused_wherever_it_comes_in() -> None:
    model = wrapped()
    errors: list[type] = []

    def second() -> None:
        for call in (model.blocks[2], model.blocks[0].ffn, wanoffload.offloader(model).pause):
            try:
                call(X) if call is not wanoffload.offloader(model).pause else call()
            except ConcurrentForwardError as error:
                errors.append(type(error))
            except Exception as error:
                errors.append(type(error))

    def start(*_: object) -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    handle = model.blocks[1].attn2.register_forward_hook(start)
    check(model, forwards=1)
    handle.remove()
    assert errors[1:] == [ConcurrentForwardError] * 2
    check(model, forwards=1)


# --- the order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("staying", [0, 2])
@pytest.mark.parametrize("prefetch", [None, 2])
def test_the_order_is_learned_and_places_follow_it(
    prefetch: int | None, staying: int, device: str
) -> None:
    budget = wanoffload.offloader(of_rows("cpu", prefetch=prefetch)[0]).device_bytes
    model, twin, x = of_rows(device, prefetch=prefetch, vram_budget=budget + staying * 2 * MIB)
    offloader = wanoffload.offloader(model)
    called = [f"blocks.{n}.{part}" for n in (3, 2, 1, 0) for part in ("three", "two", "one")]
    for number in range(4):
        offloader.reset_stats()
        assert torch.equal(model(x), twin(x))
        assert offloader.stats().acquires == 12
        if number > 1:
            assert offloader.stats().cold == 0
    names = [offloader.bindings[n].name for n in offloader.streaming.order]
    assert names == called
    places = offloader.residency.places
    assert list(places) == [n for n in offloader.streaming.order if n in places]
    row = list(places.values())
    ahead = prefetch or 1
    for number, place in enumerate(row):
        assert not any(together(place, other) for other in row[max(0, number - ahead) : number])


def test_the_order_of_qwen_is_learned() -> None:
    model = wrapped("qwen_image")
    offloader = wanoffload.offloader(model)
    registered = list(offloader.residency.places)
    check(model, "qwen_image", forwards=1)
    assert offloader.stats().cold > 0
    check(model, "qwen_image", forwards=1)
    assert list(offloader.residency.places) == offloader.streaming.order != registered
    offloader.reset_stats()
    check(model, "qwen_image")
    assert offloader.stats().cold == 0


def test_the_learned_order_survives_pauses_and_budgets() -> None:
    model, twin, x = of_rows("cpu")
    offloader = wanoffload.offloader(model)
    model(x)
    order = list(offloader.streaming.order)
    offloader.pause()
    assert torch.equal(model(x), twin(x))
    offloader.set_budget(offloader.device_bytes + 6 * MIB)
    assert torch.equal(model(x), twin(x))
    assert offloader.streaming.order == order
    assert list(offloader.residency.places) == [
        n for n in order if n not in offloader.residency.resident
    ]
    assert offloader.residency.resident


# --- life -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
def test_another_budget_moves_only_the_difference(pack: bool, device: str) -> None:
    budgets = {n: budget_for("wan22_5b", n, pack=pack) for n in (0, 4, 100)}
    model = wrapped(device=device, vram_budget=budgets[0], pack=pack)
    offloader = wanoffload.offloader(model)
    check(model)
    for staying in (4, 100, 4, 0, 100, 0):
        had = dict(offloader.memory.homes.units)
        offloader.set_budget(budgets[staying])
        check_memory(offloader)
        kept = {n for n, home in offloader.memory.homes.units.items() if had.get(n) is home}
        assert kept == had.keys() & offloader.residency.resident
        check(model)


def test_a_refused_budget_changes_nothing() -> None:
    model = wrapped(vram_budget=budget_for("wan22_5b", 4))
    offloader = wanoffload.offloader(model)
    check(model)
    homes, ring, budget = (
        dict(offloader.memory.homes.units),
        offloader.memory.ring,
        offloader.budget,
    )
    with pytest.raises(WrapError, match=r"at least .* part by part; vram_budget is 1,000 bytes"):
        offloader.set_budget(1000)
    assert (offloader.memory.homes.units, offloader.memory.ring, offloader.budget) == (
        homes,
        ring,
        budget,
    )
    check(model)


@pytest.mark.parametrize("vram_budget", [None, "5GB"])
def test_another_prefetch_makes_another_ring(vram_budget: str | None, device: str) -> None:
    model = wrapped(device=device)
    offloader = wanoffload.offloader(model)
    rings = []
    for prefetch in (None, 0, 1, 3, 50, None):
        offloader.set_prefetch(prefetch)
        check(model)
        rings.append(offloader.residency.ring_bytes)
    assert rings[1] < rings[0] == rings[2] == rings[5] < rings[3] < rings[4]
    assert rings[4] >= offloader.stats().plain_bytes


def test_a_paused_model_holds_no_ring_and_the_next_forward_is_right(device: str) -> None:
    model = wrapped(device=device, vram_budget=budget_for("wan22_5b", 4))
    offloader = wanoffload.offloader(model)
    for keep in (False, True):
        check(model)
        offloader.pause(keep_residents=keep)
        stats = offloader.stats()
        assert (stats.slot_bytes, stats.resident_units > 0) == (0, keep)
        others = offloader.streaming.planner.others
        assert offloader.device_bytes == others + offloader.memory.homes.nbytes
        values = KIND.make().state_dict()
        assert all(torch.equal(v.cpu(), values[k]) for k, v in model.state_dict().items())
    check(model)


def test_a_closed_model_says_so_and_can_be_unwrapped() -> None:
    model = wrapped()
    offloader = wanoffload.offloader(model)
    check(model)
    offloader.close()
    assert offloader.stats().slot_bytes == offloader.stats().locked_bytes == 0
    for call in (lambda: forward(model, KIND.inputs()), lambda: model.blocks[0].ffn(X)):
        with pytest.raises(ClosedError, match="closed"), torch.no_grad():
            call()
    with pytest.raises(ClosedError):
        offloader.set_budget(None)
    wanoffload.unwrap(model)
    assert torch.equal(forward(model, KIND.inputs()), resident("wan22_5b", "cpu"))


def test_an_unwrapped_model_is_ordinary_and_can_be_wrapped_in_another_way(device: str) -> None:
    model = KIND.make()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    for granularity in ("part", "block", "part"):
        wrap(model, device, granularity=granularity)
        assert torch.equal(forward(model, KIND.inputs(device)), resident("wan22_5b", device))
        wanoffload.unwrap(model)
        assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
        assert all(type(p) is nn.Parameter for p in model.parameters())


def test_moving_a_model_its_block_or_its_part_elsewhere_is_refused(device: str) -> None:
    model = wrapped(device=device)
    for module in (model, model.blocks[1], model.blocks[1].attn2, model.blocks[1].norm2):
        module.to(device)
    for module in (model, model.blocks[1], model.blocks[1].attn2):
        with pytest.raises(wanoffload.MoveError, match="can't be moved"):
            module.to("meta")
        with pytest.raises(wanoffload.MoveError, match="cast"):
            module.half()
    check(model)


@pytest.mark.parametrize("pack", [False, True])
def test_an_automatic_budget_has_parts_stay_and_go(
    pack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card()
    monkeypatch.setattr(runtime, "TorchMemory", lambda _: card)
    model = wrapped(vram_budget="auto", pack=pack)
    offloader = wanoffload.offloader(model)

    def run(takes: int = 0) -> int:
        handle = model.blocks[0].register_forward_hook(
            lambda *_: setattr(card, "kept", max(card.kept, takes))
        )
        card.tensors = offloader.device_bytes
        assert torch.equal(forward(model, KIND.inputs()), resident("wan22_5b", "cpu"))
        handle.remove()
        return offloader.stats().resident_units

    assert run(10 * GIB) == 0
    assert run() == PARTS["wan22_5b"]
    fetched = offloader.stats().bytes_fetched
    assert run() == PARTS["wan22_5b"]
    assert offloader.stats().bytes_fetched == fetched
    card.foreign = 64 * GIB  # and nothing is left
    assert run() == 0
    assert offloader.memory.ring.nbytes > 0
    card.foreign = 0
    assert run() == PARTS["wan22_5b"]


def test_verify_looks_at_parts_in_the_ring_and_at_those_that_stay(device: str) -> None:
    model = wrapped(device=device, vram_budget=budget_for("wan22_5b", 4), verify=True)
    offloader = wanoffload.offloader(model)
    check(model)
    number = max(offloader.residency.places, key=lambda n: len(offloader.residency.places[n]))
    name, piece = offloader.bindings[number].name, offloader.residency.places[number][-1]
    memory, at = offloader.memory.ring.memory, 256 + piece.start

    def spoil(*_: object) -> None:
        memory[at + 5] ^= 1

    handle = model.get_submodule(name).register_forward_hook(spoil)
    inner = model.get_submodule(name).get_submodule("to_q").register_forward_pre_hook(spoil)
    handle.remove()
    with pytest.raises(VerifyError, match=rf"{name}.* after use"):
        forward(model, KIND.inputs(device))
    inner.remove()
    check(model)
    stays = min(offloader.memory.homes.units)
    offloader.memory.homes[stays].place.memory[300] ^= 1
    with pytest.raises(VerifyError, match=rf"{offloader.bindings[stays].name} .*before use"):
        forward(model, KIND.inputs(device))
    check(model)


# --- copies ---------------------------------------------------------------------------------------


def test_a_deep_copy_is_an_ordinary_model_with_the_same_values(device: str) -> None:
    model = wrapped(device=device)
    check(model)
    twin = copy.deepcopy(model)
    assert all(type(p) is nn.Parameter for p in twin.parameters())
    with pytest.raises(WrapError, match="not wrapped"):
        wanoffload.offloader(twin)
    first_layer(twin).weight.data.zero_()
    check(model)
    expected = forward(twin.to(device), KIND.inputs(device))
    wrap(twin, device)
    assert torch.equal(forward(twin, KIND.inputs(device)), expected)
    assert wanoffload.offloader(twin).stats().acquires == PARTS["wan22_5b"]
    for module in (model.blocks[1], model.blocks[1].ffn):
        alone = copy.deepcopy(module)
        assert all(type(p) is nn.Parameter for p in alone.parameters())
        assert traces(alone) == [name for name in traces(alone) if name]  # partials only
        for found, right in zip(alone.parameters(), module.parameters(), strict=True):
            assert torch.equal(found.cpu(), right.cpu())
    check(model)


def test_a_pickled_model_is_an_ordinary_one(device: str) -> None:
    model = wrapped(device=device)
    check(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False).to(device)
    assert all(type(p) is nn.Parameter for p in twin.parameters())
    assert torch.equal(forward(twin, KIND.inputs(device)), resident("wan22_5b", device))
    check(model)


# --- what is a part -------------------------------------------------------------------------------


class Tied(Shuffled):
    def __init__(self) -> None:
        super().__init__()
        self.two.bias = self.one.bias


def test_a_tensor_tied_between_two_parts_stays_on_the_device(device: str) -> None:
    model, twin, x = of_rows(device, Tied)
    offloader = wanoffload.offloader(model)
    for block in model.blocks:
        assert block.one.bias is block.two.bias
        assert block.one.bias.device.type == device
    assert all("bias" not in str(b.layout) or "three" in b.name for b in offloader.bindings)
    for _ in range(3):
        assert torch.equal(model(x), twin(x))
    for each in (model, twin):
        each.blocks[1].one.bias.fill_(2)
    assert torch.equal(model(x), twin(x))
    assert wanoffload.unwrap(model).blocks[2].one.bias is model.blocks[2].two.bias


def test_ties_within_a_part_are_stored_once() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = Inner(), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.inner(x))

    model, twin, x = of_rows("cpu", Block)
    assert {b.layout.nbytes for b in wanoffload.offloader(model).bindings} == {
        64 * 64 * 4 + 2 * 256,
        64 * 64 * 4 + 256,
    }
    for _ in range(2):
        assert torch.equal(model(x), twin(x))


class Own(nn.Module):
    """A block of which more than a tenth is in no module below it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
        self.table = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)) @ self.table


@pytest.mark.parametrize("make", [Own, lambda: nn.Linear(64, 64)], ids=["own", "linear"])
def test_a_block_without_parts_is_one_unit(make: Callable[[], nn.Module], device: str) -> None:
    model, twin, x = of_rows(device, make)
    offloader = wanoffload.offloader(model)
    assert [b.name for b in offloader.bindings] == [f"blocks.{n}" for n in range(4)]
    assert offloader.together == []
    for _ in range(3):
        assert torch.equal(model(x), twin(x))
    assert offloader.stats().acquires == 12


def test_what_is_small_in_a_block_stays_on_the_device(device: str) -> None:
    model, twin, x = of_rows(device)
    weights = {id(w) for b in wanoffload.offloader(model).bindings for w in b.weights}
    for block in model.blocks:
        assert block.small.device.type == device
        assert type(block.small) is nn.Parameter
        assert id(block.small) not in weights
    for each in (model, twin):
        each.blocks[1].small.mul_(2)
    assert torch.equal(model(x), twin(x))


def test_a_block_that_reaches_into_a_part_is_told_so() -> None:
    """The part's weights are on the device in its own call only."""

    class Reaches(Shuffled):
        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two.weight.sum()

    model, _, x = of_rows("cpu", Reaches)
    with pytest.raises(UnboundWeightError, match=r"blocks\.3\.two"):
        model(x)
    assert not wanoffload.offloader(model).in_forward()


class Gives(nn.Module):
    """A part that gives out a piece of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.table[:2]


class Given(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Gives(), Gives()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.one(x), self.two(x)])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("vram_budget", [None, "1GiB"])
def test_what_a_part_gives_out_of_its_weights_stays_as_it_was(
    vram_budget: str | None, compiled: bool, device: str
) -> None:
    class First(Given):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.one(x)

    model = Rows(First).requires_grad_(False)
    twin = copy.deepcopy(model).to(device)
    wrap(model, device, vram_budget=vram_budget)
    if compiled:
        for block in model.blocks:
            block.compile(backend="eager")
    x = X.to(device)
    with torch.no_grad():
        given = [block(x) for block in model.blocks]
        expected = [block(x).clone() for block in twin.blocks]
        for block in model.blocks:
            block.one.table.zero_()
            assert not block(x).any()
    for one, other in zip(given, expected, strict=True):
        assert torch.equal(one, other)


# --- granularity="auto" ---------------------------------------------------------------------------


def auto(device: str, vram_budget: int | None, **options: Any) -> tuple[Any, str]:
    """(model, what it chose)."""
    model = large_rows(device, granularity="auto", vram_budget=vram_budget, **options)
    return model, wanoffload.offloader(model).granularity


def test_automatic_granularity_takes_blocks_where_they_fit_and_parts_where_they_do_not(
    device: str,
) -> None:
    parts, blocks = (large_rows("cpu", granularity=each) for each in ("part", "block"))
    others = wanoffload.offloader(blocks).streaming.planner.others
    two_slots = others + allocated(256 + 2 * wanoffload.offloader(blocks).memory.slots.slot_bytes)
    everything = wanoffload.offloader(blocks).stats().plain_bytes + two_slots
    x = torch.linspace(-1, 1, 1024, device=device).view(2, 512)
    for budget, chosen in (
        (None, "block"),
        (everything, "block"),
        (two_slots, "part"),  # some of which stay
        (two_slots - 1, "part"),
        (ring_budget(parts, together=False), "part"),
    ):
        model, granularity = auto(device, budget)
        assert granularity == chosen
        twin = copy.deepcopy(model).to(device)
        for _ in range(2):
            assert torch.equal(model(x), twin(x))
        assert wanoffload.offloader(model).device_bytes <= (budget or 1 << 40)
    with pytest.raises(WrapError, match="at least"):
        auto(device, ring_budget(parts, together=False) - 1)


def test_automatic_granularity_takes_blocks_where_these_are_asked_for_one_by_one() -> None:
    blocks = wanoffload.offloader(large_rows("cpu", granularity="block", prefetch=0))
    assert auto("cpu", blocks.device_bytes, prefetch=0)[1] == "block"
    assert auto("cpu", blocks.device_bytes - 1, prefetch=0)[1] == "part"


def test_automatic_granularity_takes_blocks_that_are_compiled(device: str) -> None:
    model = Rows(Large).requires_grad_(False)
    model.blocks[0].compile(backend="eager")
    one_slot = wanoffload.offloader(large_rows("cpu", granularity="block", prefetch=0)).device_bytes
    wrap(model, device, granularity="auto", vram_budget=one_slot)
    assert wanoffload.offloader(model).granularity == "block"


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["parts", "PART", "", None, 1, True])
def test_what_is_no_granularity_is_refused_by_name(value: object, tmp_path: Path) -> None:
    model = KIND.make()
    before = [id(p) for p in model.parameters()]
    words = rf"granularity is 'block', 'part' or 'auto', not {value!r}"
    with pytest.raises(WrapError, match=words):
        wanoffload.wrap(model, device="cpu", granularity=value)  # type: ignore[arg-type]
    assert [id(p) for p in model.parameters()] == before
    with pytest.raises(WrapError, match=words):
        wanoffload.load(WanTransformer3DModel, tmp_path, granularity=value)  # type: ignore


@pytest.mark.parametrize("there", ["block", "part"])
@pytest.mark.parametrize("pack", [False, True])
def test_a_cache_file_of_the_other_granularity_is_refused_with_what_to_do(
    there: str, pack: bool, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    wrapped(granularity=there, cache=cache, host="disk", pack=pack)
    model, asked = KIND.make(), "part" if there == "block" else "block"
    with pytest.raises(CacheFileError) as error:
        wanoffload.wrap(model, device="cpu", granularity=asked, cache=cache, host="disk")
    assert f"it holds {CALLED[there]}, and {CALLED[asked]} are asked for" in str(error.value)
    assert f"granularity={there!r} fits it" in str(error.value)
    assert "Give another path" in str(error.value)
    assert torch.equal(forward(model, KIND.inputs()), resident("wan22_5b", "cpu"))
    check(wrap(KIND.make(), "cpu", granularity="part", cache=tmp_path / "other", host="disk"))


@pytest.mark.parametrize("there", ["block", "part"])
def test_a_shared_name_of_the_other_granularity_is_refused_with_what_to_do(
    there: str, name: str
) -> None:
    held = wrapped(granularity=there, share=name)
    model, asked = KIND.make(), "part" if there == "block" else "block"
    with pytest.raises(ShareError) as error:
        wanoffload.wrap(model, device="cpu", granularity=asked, share=name)
    assert f'granularity is "{there}" there and "{asked}" here' in str(error.value)
    assert "Use another name" in str(error.value)
    for each in (model, held):
        assert torch.equal(forward(each, KIND.inputs()), resident("wan22_5b", "cpu"))


def test_processes_share_the_parts_of_a_model(peers: list[Peer], name: str) -> None:
    for peer in peers[:2]:
        peer.run(build_with, name, 0, {"granularity": "part"})
    expected = forward(MODELS["wan21_t2v"].make(), MODELS["wan21_t2v"].inputs())
    for _ in range(2):
        for peer in peers[:2]:
            assert (peer.run(output) == expected.float().numpy()).all()
    assert "15 of them shared" in peers[1].run(stats)[2]


def test_a_transformer_given_back_by_a_pipeline_streams_in_parts_again() -> None:
    model = wrapped()
    found = find_wrapped(model)
    assert found is not None
    assert why_not(model, torch.device("cpu"), is_dit=True) is None
    wanoffload.unwrap(model)
    found.give_back()
    assert wanoffload.offloader(model).granularity == "part"
    check(model)


# --- what is said and counted ---------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["part", "block"])
def test_the_log_speaks_of_parts_where_parts_stream(
    granularity: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    units = {"part": "9 of 9 parts of blocks", "block": "3 of 3 blocks"}[granularity]
    with caplog.at_level(logging.INFO):
        model = wrapped(granularity=granularity, vram_budget="1GiB")
    assert f"{units} page-locked" in caplog.text
    assert f"{units} resident" in caplog.text
    assert units in wanoffload.offloader(model).host_plan.sentence
    for how, words in (("pageable", "pageable"), ("disk packed", "on disk")):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            model = stored("wan22_5b", "cpu", how, tmp_path, granularity=granularity)
        assert f"{units} {words}" in caplog.text
        assert f"{units} {words}" in wanoffload.offloader(model).host_plan.sentence


def test_too_little_host_memory_is_said_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: host_memory.RESERVE)
    with pytest.raises(wanoffload.HostMemoryError, match="its 9 parts of blocks, "):
        wrapped()


def test_what_the_device_holds_is_counted_to_the_byte(device: str) -> None:
    for options in ({}, {"vram_budget": "1GiB"}, {"pack": True}):
        offloader = wanoffload.offloader(wrapped(device=device, **options))
        stats = offloader.stats()
        memories = [offloader.memory.ring, offloader.memory.staging]
        memories += [home.place for home in offloader.memory.homes.units.values()]
        taken = sum(allocated(memory.memory.nbytes) for memory in memories)
        expected = offloader.streaming.planner.others + taken
        assert offloader.device_bytes == stats.device_bytes == expected
        assert stats.slot_bytes == offloader.memory.ring.memory.nbytes


@pytest.mark.gpu
@pytest.mark.parametrize("share", [None, 0.3, 0.6, 1.0])
def test_device_bytes_are_what_torch_allocates(share: float | None) -> None:
    """Of weights large enough that torch allocates each alone."""

    class Block(Shuffled):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(2048, 2048) for _ in range(3))
            self.small = nn.Parameter(torch.randn(2048))

    model = Rows(Block).requires_grad_(False)
    plain = sum(p.nbytes for p in model.parameters())
    budget = None if share is None else int(share * plain) + 30 * MIB
    gc.collect()  # models of other tests
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    wrap(model, "cuda", vram_budget=budget)
    offloader = wanoffload.offloader(model)
    small = 2 * MIB  # one segment for all that is small, and it may have been there
    torch.cuda.empty_cache()
    taken = torch.cuda.memory_reserved() - before
    large = offloader.device_bytes - offloader.streaming.planner.others
    assert large <= taken <= large + small
    offloader.pause()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before <= small


# --- what fails -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("nth", range(8))
def test_a_wrap_that_runs_out_of_memory_leaves_the_model_as_it_was(nth: int, pack: bool) -> None:
    budget = budget_for("wan22_5b", 3, pack=pack)
    model = KIND.make()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with out_of_memory_at(nth) as made:
        try:
            wanoffload.wrap(model, device="cpu", vram_budget=budget, pack=pack, granularity="part")
        except torch.OutOfMemoryError:
            assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
        else:
            assert len(made) <= nth
    if len(made) > nth:
        assert torch.equal(forward(model, KIND.inputs()), resident("wan22_5b", "cpu"))
        wrap(model, "cpu", vram_budget=budget, pack=pack)
    check(model)


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("nth", range(6))
def test_a_budget_that_the_device_lacks_is_refused_and_the_model_goes_on(
    nth: int, pack: bool, once: bool
) -> None:
    small, large = (budget_for("wan22_5b", n, pack=pack) for n in (1, 5))
    model = wrapped(vram_budget=small, pack=pack)
    offloader = wanoffload.offloader(model)
    check(model)
    with out_of_memory_at(nth, once) as made:
        try:
            offloader.set_budget(large)
        except torch.OutOfMemoryError:
            assert offloader.budget.nbytes == small
        else:
            assert len(made) <= nth
    check(model)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("nth", range(4))
def test_less_stays_where_a_forward_finds_less_memory(
    nth: int, pack: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = wrapped(vram_budget=budget_for("wan22_5b", 5, pack=pack), pack=pack)
    offloader = wanoffload.offloader(model)
    check(model)
    stayed = len(offloader.memory.homes.units)
    offloader.pause()
    passing = 1 + pack  # the ring, and staging memory
    with caplog.at_level(logging.WARNING), out_of_memory_at(passing + nth, once=True):
        if nth == 0:  # none of what is to stay could be had
            with pytest.raises(torch.OutOfMemoryError):
                forward(model, KIND.inputs())
            assert offloader.paused
        else:
            assert torch.equal(forward(model, KIND.inputs()), resident("wan22_5b", "cpu"))
            assert 0 <= len(offloader.memory.homes.units) < stayed
            assert "too little memory" in caplog.text
    assert torch.equal(forward(model, KIND.inputs()), resident("wan22_5b", "cpu"))


@pytest.mark.parametrize("pack", [False, True])
def test_whatever_call_of_the_backend_fails_the_next_forward_is_right(
    pack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With bytes of a failed copy, or of one that never came, under those of its successors."""
    budget = budget_for("wan22_5b", 2, pack=pack)
    backend = HostBackend()
    monkeypatch.setattr(wrapping, "backend_for", lambda _: backend)
    model = wrapped(vram_budget=budget, pack=pack)
    inputs, expected = KIND.inputs(), resident("wan22_5b", "cpu")
    assert torch.equal(forward(model, inputs), expected)
    failures = 0
    for nth in range(1, 120):
        backend.fail_at(nth)
        for _ in range(3):  # what is fetched for the next forward fails there
            try:
                assert torch.equal(forward(model, inputs), expected), nth
            except wanoffload.OffloadError:
                failures += 1
        assert torch.equal(forward(model, inputs), expected), nth
    assert failures > 100


@pytest.mark.parametrize("name", ["a14b", "vace", "qwen_image"])
def test_a_pipeline_is_enabled_around_a_transformer_that_streams_in_parts(name: str) -> None:
    kind = PIPELINES[name]
    pipe = kind.make()
    expected = kind.run(pipe)
    parts = [p for n, p in pipe.components.items() if n.startswith("transformer") and p is not None]
    for part in parts:
        wrap(part, "cpu")
    runtimes = [wanoffload.offloader(part) for part in parts]
    wanoffload.enable(pipe, "manual", device="cpu", hardware=HERE, dit_layerwise_offload=True)
    assert [wanoffload.offloader(part) for part in parts] == runtimes
    for _ in range(2):
        assert torch.equal(kind.run(pipe), expected)
    assert all(each.granularity == "part" and each.stats().acquires for each in runtimes)
    wanoffload.disable(pipe)
    assert torch.equal(kind.run(pipe), expected)
