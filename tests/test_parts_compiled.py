"""Compiled blocks that stream in parts: all parts are fetched in front of the call."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import wanoffload
from tests.parted import (
    KIND,
    PARTS,
    WRITES,
    Stop,
    budget_for,
    check,
    check_memory,
    large_rows,
    resident,
    ring_budget,
    together,
    wrap,
    wrapped,
)
from tests.small_models import MODELS, forward
from tests.test_compile_and_caches import magnitudes, traces
from wanoffload import (
    WrapError,
)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


def compiled(name: str, device: str, order: str, backend: Any, **options: Any) -> Any:
    """A model whose blocks are compiled: "never" wrapped, or wrapped "before" or "after" that."""
    model = MODELS[name].make()
    if order == "never":
        model.to(device)
    if order == "before":
        wrap(model, device, **options)
    model.compile_repeated_blocks(fullgraph=True, backend=backend)  # type: ignore[operator]
    if order == "after":
        wrap(model, device, **options)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_compiled_blocks_are_as_many_graphs_as_in_the_resident_model_and_never_recompile(
    name: str, device: str
) -> None:
    graphs, outputs = {}, {}
    for order in ("never", "before", "after"):
        torch.compiler.reset()
        backend = CompileCounterWithBackend("eager")
        model = compiled(name, device, order, backend)
        inputs = [MODELS[name].inputs(device, text=text) for text in (0, 1)]
        first = forward(model, inputs[0])
        with torch._dynamo.config.patch(error_on_recompile=True):
            outputs[order] = [first, *(forward(model, each) for each in inputs * 2)]
        graphs[order] = backend.frame_count
        if order != "never":
            stats = wanoffload.offloader(model).stats()
            assert stats.acquires == 5 * PARTS[name]
            # Of three blocks all have room in a ring for two and what lets a forward close.
            assert stats.bytes_fetched > stats.host_bytes or stats.units <= 15
    assert len(set(graphs.values())) == 1, graphs
    for order in ("before", "after"):
        for found, right in zip(outputs[order], outputs["never"], strict=True):
            assert torch.equal(found, right), order


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("pack", [False, True])
def test_blocks_compiled_by_inductor_give_what_the_compiled_resident_model_gives(
    pack: bool, order: str, device: str
) -> None:
    inputs = KIND.inputs(device)
    expected = forward(compiled("wan22_5b", device, "never", "inductor"), inputs)
    torch.compiler.reset()
    model = compiled("wan22_5b", device, order, "inductor", pack=pack)
    for _ in range(3):
        assert torch.equal(forward(model, inputs), expected)
    assert wanoffload.offloader(model).stats().acquires == 3 * PARTS["wan22_5b"]
    check_memory(wanoffload.offloader(model))


@pytest.mark.parametrize("prefetch", [None, 0, 1, 5])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("staying", [0, 4, 100])
def test_parts_of_a_compiled_block_are_on_the_device_together(
    staying: int, order: str, prefetch: int | None, device: str
) -> None:
    inputs = KIND.inputs(device)
    budget = budget_for("wan22_5b", staying + 1)  # 2 MiB more, for rings that are larger
    model = compiled("wan22_5b", device, order, "eager", vram_budget=budget, prefetch=prefetch)
    offloader = wanoffload.offloader(model)
    held: list[int] = []

    def look(*_: object) -> None:
        held.append(sum(binding.held for binding in offloader.bindings))

    real = offloader.release
    offloader.release = lambda *given: (look(), real(*given))[1]  # type: ignore[method-assign]
    for _ in range(3):
        assert torch.equal(forward(model, inputs), resident("wan22_5b", device))
    assert max(held) >= 2  # the first of a block is let go while the others are still held
    forwards = 1 if staying == 100 else 3  # where all stay, no hook runs from the second on
    assert offloader.stats().acquires == forwards * PARTS["wan22_5b"]
    places = offloader.residency.places
    for block in range(3):
        row = [places[n] for n in range(3 * block, 3 * block + 3) if n in places]
        assert not any(together(a, b) for i, a in enumerate(row) for b in row[:i])
    check_memory(offloader)


def test_compiled_blocks_are_fetched_while_the_one_before_computes() -> None:
    model = compiled("wan22_i2v", "cpu", "after", "eager")
    offloader = wanoffload.offloader(model)
    for number in range(3):
        forward(model, MODELS["wan22_i2v"].inputs())
        if number == 0:
            offloader.reset_stats()
    assert offloader.stats().cold == 0


def test_compiling_a_block_that_the_budget_has_no_room_for_is_refused_before_anything_changed(
    device: str,
) -> None:
    model = large_rows(device)
    offloader = wanoffload.offloader(model)
    least = ring_budget(model, together=False)
    offloader.set_budget(least)
    x = torch.linspace(-1, 1, 1024, device=device).view(2, 512)
    for _ in range(2):  # the order is learned in the first
        expected = model(x)
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    ring, residency = offloader.memory.ring, offloader.residency
    with pytest.raises(WrapError, match=r"at least .* part by part; vram_budget is"):
        model.blocks[1].compile(backend="eager")
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == attributes
    assert (offloader.memory.ring, offloader.residency, offloader.paused) == (
        ring,
        residency,
        False,
    )
    assert torch.equal(model(x), expected)
    offloader.set_budget(ring_budget(model, together=True))
    model.blocks[1].compile(backend="eager")
    assert torch.equal(model(x), expected)
    with pytest.raises(WrapError, match="at least"):
        offloader.set_budget(least)  # now it is too little
    assert torch.equal(model(x), expected)


def test_a_single_part_can_be_compiled(device: str) -> None:
    for order in ("before", "after"):
        model = KIND.make()
        backend = CompileCounterWithBackend("eager")
        if order == "before":
            wrap(model, device)
        for block in model.blocks:
            block.attn1.compile(backend=backend, fullgraph=True)
        if order == "after":
            wrap(model, device)
        check(model)
        assert backend.frame_count == 1
        assert wanoffload.offloader(model).streaming.planner.compiled is False
        wanoffload.unwrap(model, device)
        assert torch.equal(forward(model, KIND.inputs(device)), resident("wan22_5b", device))
        assert traces(model) == []


@pytest.mark.parametrize("wrapped_at", [0, 1, 2])
def test_a_block_can_be_compiled_whose_part_is_compiled(wrapped_at: int, device: str) -> None:
    model = KIND.make().to(device)
    inputs, expected = KIND.inputs(device), resident("wan22_5b", device)
    for step in range(3):
        if step == wrapped_at:
            wrap(model, device)
        if step == 0:
            model.blocks[1].attn1.compile(backend="eager")
        if step == 1:
            model.blocks[1].compile(backend="eager")
        for _ in range(2):
            assert torch.equal(forward(model, inputs), expected)
    check(model, forwards=2)
    wanoffload.unwrap(model, device)
    assert torch.equal(forward(model, inputs), expected)
    assert traces(model) == []


@pytest.mark.parametrize("granularity", ["block", "part"])
def test_a_compile_that_fails_leaves_the_block_as_it_was(granularity: str, device: str) -> None:
    model = wrapped(device=device, granularity=granularity)
    inputs, expected = KIND.inputs(device), resident("wan22_5b", device)
    for module in (model.blocks[1], model.blocks[1].ffn):
        with pytest.raises(Exception, match="nonesuch"):
            module.compile(backend="nonesuch")
        for _ in range(2):
            assert torch.equal(forward(model, inputs), expected)
    model.blocks[1].compile(backend="eager")
    assert torch.equal(forward(model, inputs), expected)


@pytest.mark.parametrize("pack", [False, True])
def test_writes_to_compiled_blocks_take_effect_in_the_next_forward(pack: bool, device: str) -> None:
    for way in WRITES.values():
        torch.compiler.reset()
        model = compiled("wan22_5b", device, "before", "eager", pack=pack)
        twin, inputs = KIND.make().to(device), KIND.inputs(device)
        assert torch.equal(forward(model, inputs), forward(twin, inputs))
        with torch.no_grad():
            for changed in (model, twin):
                way(changed)
        for _ in range(2):
            assert torch.equal(forward(model, inputs), forward(twin, inputs))


def test_a_weight_of_a_compiled_block_that_no_longer_fits_packed_is_right(device: str) -> None:
    """It is packed again into more than the staging memory holds, which ends the engine: before
    any part of the block is on the device."""
    model = compiled("wan22_5b", device, "before", "eager", pack=True)
    twin, inputs = KIND.make().to(device), KIND.inputs(device)
    offloader = wanoffload.offloader(model)
    forward(model, inputs)
    engines = offloader.engine.prefetcher
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for changed in (model, twin):
            for linear in (changed.blocks[1].ffn.net[0].proj, changed.blocks[1].ffn.net[2]):
                scale = torch.exp(torch.randn(linear.weight.shape, generator=generator) * 9)
                signs = torch.randn(linear.weight.shape, generator=generator).sign()
                values = (scale.clamp(1e-6, 0.2) * signs).to(torch.bfloat16)
                linear.weight = nn.Parameter(values.to(linear.weight.device), requires_grad=False)
            generator.manual_seed(3)
    for _ in range(3):
        assert torch.equal(forward(model, inputs), forward(twin, inputs))
    assert offloader.engine.prefetcher is not engines


@pytest.mark.parametrize("block", [0, 1, 2])
def test_after_an_exception_in_a_compiled_block_the_next_forward_is_right(
    block: int, device: str
) -> None:
    model = compiled("wan22_5b", device, "before", "eager")
    inputs, expected = KIND.inputs(device), resident("wan22_5b", device)
    offloader = wanoffload.offloader(model)
    for number in range(3 * block, 3 * block + 3):
        binding = offloader.bindings[number]
        for name in ("take_in_changes", "exit"):
            real = getattr(binding, name)

            def failing(*given: Any, real: Any = real, name: str = name) -> None:
                if name == "exit":
                    real(*given)
                raise Stop

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(binding, name, failing)
                with pytest.raises(Stop):
                    forward(model, inputs)
            assert not offloader.in_forward()
            assert not any(each.held for each in offloader.bindings)
            assert torch.equal(forward(model, inputs), expected)
    with torch.no_grad(), pytest.raises(TypeError):
        model.blocks[block]()
    assert torch.equal(forward(model, inputs), expected)


def test_operations_in_any_order_give_what_the_resident_model_gives(device: str) -> None:
    def enable(model: Any) -> None:
        model.enable_cache(magnitudes())

    def disable(model: Any) -> None:
        model.disable_cache()

    def compile_it(model: Any) -> None:
        model.compile_repeated_blocks(backend="eager")

    def unwrap(model: Any) -> None:
        if wanoffload.hooks.attached(model) is not None:
            wanoffload.unwrap(model, device)
            assert traces(model) == []

    def wrap_it(model: Any) -> None:
        if getattr(model, "streamed", False):
            wrap(model, device)

    steps = {"wrap": wrap_it, "compile": compile_it, "enable": enable, "unwrap": unwrap}
    for order in itertools.permutations(steps):
        if order.index("wrap") > order.index("unwrap"):
            continue
        outputs: list[list[Tensor]] = []
        for streamed in (False, True):
            torch.compiler.reset()
            model = KIND.make().to(device)
            model.streamed = streamed
            outputs.append([])
            for number, name in enumerate((*order, "disable")):
                {**steps, "disable": disable}[name](model)
                with model.cache_context("cond"):
                    outputs[-1].append(forward(model, KIND.inputs(device, seed=number)))
        for name, found, right in zip((*order, "disable"), *outputs, strict=True):
            assert torch.equal(found, right), (order, name)
