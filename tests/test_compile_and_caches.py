"""Compiled blocks, step caches, and every order in which they and wrap and unwrap can come."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import wanoffload
from tests.small_models import MODELS, SmallModel, forward

STEPS = 3
PREFETCH = 1
Cache = Callable[[], Any]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def resident(kind: SmallModel, device: str) -> Any:
    return kind.make().to(device)


def wrapped(kind: SmallModel, device: str) -> Any:
    return wrap(kind.make(), device)


def wrap(model: Any, device: str) -> Any:
    wanoffload.wrap(model, PREFETCH, device=device)
    wanoffload.offloader(model).poison_slots()
    return model


def a_step(model: Any, kind: SmallModel, device: str, number: int = 0) -> list[Tensor]:
    """Both passes of a denoising step, told to the caches as the pipeline does."""
    outputs = []
    for text, name in enumerate(("cond", "uncond")):
        with model.cache_context(name, step_index=number, sigma=0.5, num_inference_steps=STEPS + 1):
            outputs.append(forward(model, kind.inputs(device, seed=number, text=text)))
    return outputs


def steps(model: Any, kind: SmallModel, device: str) -> list[Tensor]:
    return [x for number in range(STEPS) for x in a_step(model, kind, device, number)]


def check_equal(outputs: list[Tensor], expected: list[Tensor]) -> None:
    assert len(outputs) == len(expected)
    for number, (output, right) in enumerate(zip(outputs, expected, strict=True)):
        assert torch.equal(output, right), f"output {number} differs"


@contextmanager
def fetching(model: nn.Module, acquires: int) -> Iterator[None]:
    """So many blocks are acquired in here; more than there are slots can not all be there yet."""
    runtime = wanoffload.offloader(model)
    before = runtime.stats()
    yield
    after = runtime.stats()
    assert after.acquires - before.acquires == acquires
    if acquires > after.slots:
        assert after.bytes_fetched > before.bytes_fetched


def counting(backend: str = "eager") -> Any:
    return CompileCounterWithBackend(backend)


# Compiled blocks.


@pytest.mark.parametrize("name", MODELS)
def test_compiled_blocks_are_as_many_graphs_as_in_the_resident_model_and_never_recompile(
    name: str, device: str
) -> None:
    kind = MODELS[name]
    graphs = {}
    outputs = {}
    for order in ("resident", "compile, wrap", "wrap, compile"):
        torch.compiler.reset()
        model = kind.make().to(device if order == "resident" else "cpu")
        backend = counting()
        if order == "wrap, compile":
            wrap(model, device)
        model.compile_repeated_blocks(fullgraph=True, backend=backend)  # type: ignore[operator]
        if order == "compile, wrap":
            wrap(model, device)
        first = a_step(model, kind, device)
        with torch._dynamo.config.patch(error_on_recompile=True):
            outputs[order] = first + steps(model, kind, device)
        graphs[order] = backend.frame_count
        if order != "resident":
            stats = wanoffload.offloader(model).stats()
            assert stats.acquires == len(outputs[order]) * kind.units
            assert stats.bytes_fetched > stats.host_bytes
        check_equal(outputs[order], outputs["resident"])
    assert not counters["graph_break"]
    assert set(graphs.values()) == {3 if name == "vace" else 1}, graphs


def test_blocks_compiled_by_inductor_give_what_the_compiled_resident_model_gives(
    device: str,
) -> None:
    kind = MODELS["wan22_5b"]
    model = resident(kind, device)
    model.compile_repeated_blocks(fullgraph=True)
    expected = steps(model, kind, device)
    for compiled_first in (True, False):
        torch.compiler.reset()
        counters.clear()
        model = kind.make() if compiled_first else wrapped(kind, device)
        model.compile_repeated_blocks(fullgraph=True)
        if compiled_first:
            wrap(model, device)
        with fetching(model, acquires=len(expected) * kind.units):
            check_equal(steps(model, kind, device), expected)
        assert counters["stats"]["unique_graphs"] == 1


def test_parameters_that_require_grad_do_not_make_more_graphs(device: str) -> None:
    kind = MODELS["wan21_t2v"]
    model = resident(kind, device)
    expected = steps(model, kind, device)
    model = wrap(model.requires_grad_(True), device)
    backend = counting()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    with fetching(model, acquires=len(expected) * kind.units):
        check_equal(steps(model, kind, device), expected)
    assert backend.frame_count == 1


def test_blocks_compiled_again_are_still_fetched(device: str) -> None:
    kind = MODELS["wan21_t2v"]
    expected = steps(resident(kind, device), kind, device)
    model = wrapped(kind, device)
    for _ in range(2):
        backend = counting()
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
        with fetching(model, acquires=len(expected) * kind.units):
            check_equal(steps(model, kind, device), expected)
        assert backend.frame_count == 1


# The whole model compiled.


def compile_whole(model: Any, in_place: bool, **options: Any) -> Any:
    if in_place:
        model.compile(backend="eager", **options)
        return model
    return torch.compile(model, backend="eager", **options)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("when", ["after wrap", "before wrap", "and run before wrap"])
def test_a_model_that_is_compiled_as_a_whole_is_right(
    when: str, in_place: bool, device: str
) -> None:
    kind = MODELS["wan22_5b"]
    inputs = [kind.inputs(device, text=text) for text in range(3)]
    model = resident(kind, device)
    expected = [forward(model, x) for x in inputs]
    if when == "after wrap":
        wrap(model, device)
    whole = compile_whole(model, in_place)
    if when == "and run before wrap":
        check_equal([forward(whole, x) for x in inputs], expected)
    if when != "after wrap":
        wrap(model, device)
    with fetching(model, acquires=3 * kind.units):
        check_equal([forward(whole, x) for x in inputs], expected)
    wanoffload.unwrap(model, device)
    check_equal([forward(whole, x) for x in inputs], expected)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_whole_model_as_one_graph_is_refused_with_advice(in_place: bool, device: str) -> None:
    kind = MODELS["wan22_5b"]
    model = resident(kind, device)
    expected = forward(model, kind.inputs(device))
    whole = compile_whole(wrap(model, device), in_place, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile_repeated_blocks"):
        forward(whole, kind.inputs(device))
    model._compiled_call_impl = None
    with fetching(model, acquires=kind.units):
        assert torch.equal(forward(model, kind.inputs(device)), expected)


# Step caches.


def first_block() -> FirstBlockCacheConfig:
    return FirstBlockCacheConfig(threshold=10.0)


def magnitudes() -> MagCacheConfig:
    return MagCacheConfig(
        threshold=10.0,
        max_skip_steps=1,
        retention_ratio=0.0,
        num_inference_steps=100,
        mag_ratios=[1.0] * 100,
    )


def broadcast() -> PyramidAttentionBroadcastConfig:
    """Skips attentions, not blocks: every second self-attention, two of three cross-attentions."""
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(0, 1000),
        cross_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
    )


def attention_series() -> TaylorSeerCacheConfig:
    return TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"blocks\.\d+\.attn\d"],
    )


def output_series() -> TaylorSeerCacheConfig:
    return TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=True,
    )


def spectra() -> SeaCacheConfig:
    return SeaCacheConfig(threshold=10.0, max_consecutive_cached=1)


# Blocks acquired in each step's two forwards; in a step of less, the cache stood in for blocks.
CACHES: dict[str, tuple[str, Cache, list[int]]] = {
    "first block": ("wan21_t2v", first_block, [10, 2, 2]),
    "first block, vace": ("vace", first_block, [12, 6, 6]),
    "first block, qwen": ("qwen_image", first_block, [6, 2, 2]),
    "magnitudes": ("wan21_t2v", magnitudes, [10, 0, 10]),
    "magnitudes, i2v": ("wan21_i2v", magnitudes, [8, 0, 8]),
    "attention broadcast": ("wan21_t2v", broadcast, [10, 10, 10]),
    "series of attentions": ("wan22_i2v", attention_series, [14, 14, 14]),
    "series of outputs": ("wan21_t2v", output_series, [10, 0, 10]),
    "spectra": ("wan22_5b", spectra, [6, 0, 6]),
}


@pytest.mark.parametrize("enabled", ["before wrap", "after wrap"])
@pytest.mark.parametrize("cache", CACHES)
def test_a_step_cache_is_right_and_blocks_it_skips_are_not_acquired(
    cache: str, enabled: str, device: str
) -> None:
    kind, config, acquires = MODELS[CACHES[cache][0]], *CACHES[cache][1:]
    model = resident(kind, device)
    without = steps(model, kind, device)
    model.enable_cache(config())
    expected = steps(model, kind, device)
    assert any(not torch.equal(x, y) for x, y in zip(expected, without, strict=True))

    model = kind.make()
    if enabled == "before wrap":
        model.enable_cache(config())
    wrap(model, device)
    if enabled == "after wrap":
        model.enable_cache(config())
    for number, count in enumerate(acquires):
        with fetching(model, acquires=count):
            outputs = a_step(model, kind, device, number)
        check_equal(outputs, expected[2 * number : 2 * number + 2])


@pytest.mark.parametrize("cache", ["first block", "magnitudes"])
def test_a_step_of_skipped_blocks_fetches_nothing_for_them(cache: str, device: str) -> None:
    kind, config, acquires = MODELS[CACHES[cache][0]], *CACHES[cache][1:]
    model = wrapped(kind, device)
    model.enable_cache(config())
    runtime = wanoffload.offloader(model)
    a_step(model, kind, device, 0)
    full = runtime.stats().bytes_fetched
    a_step(model, kind, device, 1)
    skipping = runtime.stats().bytes_fetched - full
    block = max(binding.image.nbytes for binding in runtime.bindings)
    # What the cache's own block needs, and what is fetched ahead behind it.
    assert skipping <= acquires[1] * (PREFETCH + 1) * block < full


def test_blocks_skipped_by_a_cache_are_right_again_when_it_stops_skipping(device: str) -> None:
    kind = MODELS["wan22_i2v"]
    model = resident(kind, device)
    expected = steps(model, kind, device)
    wrap(model, device)
    for _ in range(2):
        model.enable_cache(first_block())
        steps(model, kind, device)
        model.disable_cache()
        with fetching(model, acquires=len(expected) * kind.units):
            check_equal(steps(model, kind, device), expected)


def test_a_cache_on_compiled_blocks_is_right_and_fetches_also_what_it_skips(device: str) -> None:
    """What is skipped is decided inside of a compiled block: after the fetch."""
    kind = MODELS["wan22_5b"]
    model = resident(kind, device)
    model.enable_cache(magnitudes())
    model.compile_repeated_blocks(backend="eager")
    expected = [*a_step(model, kind, device, 0), *a_step(model, kind, device, 1)]

    model = wrapped(kind, device)
    model.compile_repeated_blocks(backend="eager")
    model.enable_cache(magnitudes())
    with fetching(model, acquires=len(expected) * kind.units):
        outputs = [*a_step(model, kind, device, 0), *a_step(model, kind, device, 1)]
    check_equal(outputs, expected)


# Every order.


def traces(model: nn.Module) -> list[str]:
    """Where something of this package can still be reached from a module's own attributes."""
    return [
        f"{name or 'model'}.{attribute}"
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in ("_modules", "_buffers") and _reaches_us(value, depth=8)
    ]


def _reaches_us(value: Any, depth: int) -> bool:
    if depth == 0 or isinstance(value, (nn.Module, str, int, float, type(None))):
        return False
    if type(value).__module__.startswith("wanoffload"):
        return True
    if isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values(), *vars(value).values()]
    elif isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    elif getattr(value, "__module__", "").startswith("wanoffload"):
        return True
    else:
        closure = getattr(value, "__closure__", None) or ()
        parts = [cell.cell_contents for cell in closure]
        if type(value).__module__.startswith("diffusers.hooks"):
            parts += list(vars(value).values())
    return any(_reaches_us(part, depth - 1) for part in parts)


def legal_orders() -> list[tuple[str, ...]]:
    return [
        order
        for order in itertools.permutations(("wrap", "compile", "enable", "disable", "unwrap"))
        if order.index("wrap") < order.index("unwrap")
        and order.index("enable") < order.index("disable")
    ]


class Sequence:
    """A model that goes through operations, and what it gives between them.

    Resident: the same model at the same places of the same sequence, never wrapped.
    """

    def __init__(self, config: Cache, device: str, *, streamed: bool) -> None:
        self.kind = MODELS["wan22_5b"]
        self.config = config
        self.device = device
        self.streamed = streamed
        self.model: Any = resident(self.kind, device)
        self.wrapped = self.compiled = self.cached = False
        self.number = 0
        self.outputs: list[Tensor] = []
        self.forwards()

    def run(self, order: tuple[str, ...]) -> list[Tensor]:
        for operation in order:
            getattr(self, operation)()
            self.forwards()
        return self.outputs

    def forwards(self) -> None:
        if not self.wrapped:
            self.outputs += self._forwards()
            return
        stats = wanoffload.offloader(self.model).stats
        before = stats().acquires
        self.outputs += self._forwards()
        full, acquires = 2 * self.kind.units, stats().acquires - before
        # A cache skips most of one of the two; in compiled blocks only after the fetch.
        assert acquires < full if self.cached and not self.compiled else acquires == full

    def _forwards(self) -> list[Tensor]:
        outputs = []
        for _ in range(2):
            self.number += 1
            with self.model.cache_context("cond"):
                inputs = self.kind.inputs(self.device, seed=self.number)
                outputs.append(forward(self.model, inputs))
        return outputs

    def wrap(self) -> None:
        if self.streamed:
            wrap(self.model, self.device)
            self.wrapped = True

    def unwrap(self) -> None:
        if self.streamed:
            wanoffload.unwrap(self.model, self.device)
            self.wrapped = False
            assert traces(self.model) == []

    def compile(self) -> None:
        self.model.compile_repeated_blocks(backend="eager")
        self.compiled = True

    def enable(self) -> None:
        self.model.enable_cache(self.config())
        self.cached = True

    def disable(self) -> None:
        self.model.disable_cache()
        self.cached = False


def check_order(order: tuple[str, ...], config: Cache, device: str) -> None:
    expected = Sequence(config, device, streamed=False).run(order)
    streamed = Sequence(config, device, streamed=True)
    check_equal(streamed.run(order), expected)
    assert traces(streamed.model) == []


@pytest.mark.parametrize("order", legal_orders(), ids="-".join)
def test_operations_in_any_order_give_what_the_resident_model_gives(
    order: tuple[str, ...], device: str
) -> None:
    check_order(order, magnitudes, device)


@pytest.mark.parametrize(
    "order", list(itertools.permutations(("wrap", "compile", "enable"))), ids="-".join
)
def test_a_cache_that_the_compiler_looks_into_is_right_in_any_order(
    order: tuple[str, ...], device: str
) -> None:
    """The hooks of the cache above are left alone by the compiler; those of this one are not."""
    check_order((*order, "unwrap", "disable"), first_block, device)


def test_a_compiled_model_with_a_cache_can_be_wrapped_and_unwrapped_again_and_again(
    device: str,
) -> None:
    order = ("compile", *("wrap", "unwrap") * 2, "enable", *("wrap", "unwrap") * 2)
    check_order((*order, "wrap", "disable", "unwrap"), magnitudes, device)
