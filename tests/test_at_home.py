"""A model all of whose blocks stay on the device: its blocks are ordinary modules, and it can
become a streaming one again, with what was done to it meanwhile."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import wanoffload
from tests.small_models import MODELS, forward
from wanoffload import (
    ConcurrentForwardError,
    HostMemoryError,
    MoveError,
    Offloader,
    WrapError,
    hooks,
)
from wanoffload.binding import Binding
from wanoffload.host_tensor import HostTensor

KIND = MODELS["wan22_5b"]
ALL = "1GiB"
NONE = None
WAYS = [
    {},
    {"pack": True},
    {"host": "pageable"},
    {"granularity": "part"},
    {"pack": True, "granularity": "part"},
]


def wrapped(device: str, **options: Any) -> Any:
    return wanoffload.wrap(
        KIND.make(), **{"device": device, "prefetch": 1, "vram_budget": ALL, **options}
    )


def at_home(device: str, **options: Any) -> tuple[Any, Offloader]:
    """A model that is there, after one forward."""
    model = wrapped(device, **options)
    runtime = wanoffload.offloader(model)
    assert not runtime.at_home
    forward(model, KIND.inputs(device))
    assert runtime.at_home
    return model, runtime


def twin(device: str) -> Any:
    return KIND.make().to(device)


def check(model: Any, other: Any) -> None:
    """Both give the same, from the same values."""
    device = next(other.parameters()).device.type
    for number in range(2):
        inputs = KIND.inputs(device, seed=number)
        assert torch.equal(forward(model, inputs), forward(other, inputs))
    right = other.state_dict()
    found = model.state_dict()
    assert found.keys() == right.keys()
    for name, value in found.items():
        assert torch.equal(value.cpu(), right[name].cpu()), name


def hooked(model: Any) -> list[str]:
    """The modules below the model whose calls somebody is in the way of."""
    return [
        name
        for name, module in model.named_modules()
        if name and ("forward" in module.__dict__ or hooks._is_ours(module._compiled_call_impl))
    ]


LEAVING: dict[str, Callable[[Any, Offloader], object]] = {
    "set_budget": lambda model, runtime: runtime.set_budget(NONE),
    "pause": lambda model, runtime: runtime.pause(),
    "pause, keep": lambda model, runtime: runtime.pause(keep_residents=True),
    "set_prefetch": lambda model, runtime: runtime.set_prefetch(2),
    "unwrap": lambda model, runtime: wanoffload.unwrap(model, runtime.device),
}


def query(model: Any, block: int) -> Any:
    return model.blocks[block].attn1.to_q


def block_weight(model: Any) -> nn.Parameter:
    weight: nn.Parameter = model.blocks[1].attn1.to_q.weight
    return weight


def replace(model: Any) -> None:
    layer = model.blocks[1].attn1.to_q
    layer.weight = nn.Parameter(layer.weight.detach() * 3, requires_grad=False)


def set_data(model: Any) -> None:
    block_weight(model).data = block_weight(model).data * 2


def load(model: Any) -> None:
    model.load_state_dict({name: value * 2 for name, value in KIND.make().state_dict().items()})


@torch.no_grad()
def in_place(model: Any) -> None:
    block_weight(model).mul_(2)


WRITES: dict[str, Callable[[Any], object]] = {
    "in place": in_place,
    "data, in place": lambda model: block_weight(model).data.add_(1),
    "data": set_data,
    "replaced": replace,
    "load_state_dict": load,
}


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_blocks_are_ordinary_modules_on_the_device(options: dict[str, Any], device: str) -> None:
    model, runtime = at_home(device, **options)
    assert hooked(model) == []
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    assert {p.device.type for p in model.parameters()} == {device}
    before = runtime.stats()
    check(model, twin(device))
    after = runtime.stats()
    assert after.acquires == before.acquires == after.units
    assert after.bytes_fetched == before.bytes_fetched
    assert after.forwards == before.forwards + 2
    assert after.at_home


@pytest.mark.parametrize("way", LEAVING)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_what_is_written_there_is_not_lost_whatever_ends_it(
    options: dict[str, Any], write: str, way: str, device: str
) -> None:
    model, runtime = at_home(device, **options)
    other = twin(device)
    for each in (model, other):
        WRITES[write](each)
    check(model, other)
    assert runtime.at_home
    LEAVING[way](model, runtime)
    assert not runtime.at_home
    check(model, other)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_moving_it_to_where_it_is_changes_nothing_and_elsewhere_is_refused(
    options: dict[str, Any], device: str
) -> None:
    model, runtime = at_home(device, **options)
    other = twin(device)
    for each in (model, other):
        in_place(each)
    for module in (model, model.blocks[1]):
        assert module.to(runtime.device) is module
        with pytest.raises(MoveError):
            module.to(torch.float16)
        with pytest.raises(MoveError):
            module.to("meta")
    assert runtime.at_home
    check(model, other)
    runtime.set_budget(NONE)
    check(model, other)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_it_comes_back_when_all_fits_again(options: dict[str, Any], device: str) -> None:
    model, runtime = at_home(device, **options)
    for budget, home in [(NONE, False), (ALL, True), (ALL, True), (NONE, False), (ALL, True)]:
        runtime.set_budget(budget)
        assert isinstance(block_weight(model), HostTensor)
        check(model, twin(device))
        assert runtime.at_home == home
        assert hooked(model) == [] or not home


def test_another_budget_brings_nothing_that_is_there(device: str) -> None:
    model, runtime = at_home(device)
    before = runtime.stats().bytes_fetched
    runtime.set_budget("2GiB")
    check(model, twin(device))
    assert runtime.at_home
    assert runtime.stats().bytes_fetched == before


def test_only_what_was_written_crosses_the_link_again(device: str) -> None:
    model, runtime = at_home(device)
    before = runtime.stats()
    in_place(model)
    runtime.pause(keep_residents=True)
    forward(model, KIND.inputs(device))
    after = runtime.stats()
    assert after.fetches - before.fetches == 1


def test_an_old_reference_is_true_and_writes_to_it_take_effect(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = wrapped(device), twin(device)
    kept = block_weight(model)
    assert isinstance(kept, HostTensor)
    forward(model, KIND.inputs(device))
    runtime = wanoffload.offloader(model)
    assert runtime.at_home
    for each in (model, other):
        in_place(each)
    real, written = Binding.write, []
    monkeypatch.setattr(Binding, "write", lambda *given: (written.append(1), real(*given)))
    for _ in range(2):
        assert torch.equal(kept.clone().cpu(), block_weight(other).cpu())
        assert runtime.at_home
    assert len(written) == 1
    with torch.no_grad():
        kept.add_(1)
        block_weight(other).add_(1)
    assert torch.equal(block_weight(model).cpu(), block_weight(other).cpu())
    check(model, other)
    assert runtime.at_home
    assert hooked(model) == []


def test_one_that_is_being_written_to_is_not_lost_with_what_was_written_there(device: str) -> None:
    """On the device first, in another weight of the same block."""
    model, other = wrapped(device), twin(device)
    kept = block_weight(model)
    forward(model, KIND.inputs(device))
    for each in (model, other):
        with torch.no_grad():
            each.blocks[1].ffn.net[2].weight.mul_(2)
    with torch.no_grad():
        kept.add_(1)
        block_weight(other).add_(1)
    check(model, other)


@pytest.mark.parametrize("some", [1, 3])
def test_what_was_kept_of_units_that_leave_alone_stays_as_it_was(some: int, device: str) -> None:
    model, other = wrapped(device), twin(device)
    old = [query(model, n).weight for n in range(some)]
    forward(model, KIND.inputs(device))
    kept = [query(model, n).weight.detach() for n in range(some)]
    with torch.no_grad():
        for number, tensor in enumerate(old):
            tensor.add_(1)
            query(other, number).weight.add_(1)
    check(model, other)
    assert wanoffload.offloader(model).at_home
    for number, tensor in enumerate(kept):
        assert torch.equal(tensor, query(twin(device), number).weight)


def test_gradients_flow_as_in_an_ordinary_model_and_are_not_lost(device: str) -> None:
    model, runtime = at_home(device)
    other = twin(device)
    grads = []
    for each in (model, other):
        weight = block_weight(each).requires_grad_()
        each(**KIND.inputs(device))[0].float().square().mean().backward()
        assert weight.grad is not None
        grads.append(weight.grad)
    assert torch.equal(*grads)
    with pytest.raises(WrapError, match=r"blocks\.1\.attn1\.to_q\.weight has a gradient"):
        runtime.set_budget(NONE)
    assert runtime.at_home
    assert runtime.budget.nbytes is not None
    model.zero_grad(set_to_none=True)
    runtime.set_budget(NONE)
    assert block_weight(model).requires_grad
    check(model, other)


def test_too_little_host_memory_to_take_in_what_was_written_loses_nothing(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, runtime = at_home(device, pack=True)
    other = twin(device)
    for each in (model, other):
        in_place(each)

    def refuse(nbytes: int, what: str) -> None:
        raise HostMemoryError(f"{what} takes {nbytes} bytes")

    with monkeypatch.context() as patch:
        patch.setattr("wanoffload.host_memory.require", refuse)
        patch.setattr("wanoffload.packed_view.PackedView.bring_to_stay", lambda _: refuse(1, "it"))
        with pytest.raises(HostMemoryError):
            runtime.set_budget(NONE)
        assert runtime.at_home
        assert hooked(model) == []
    check(model, other)
    runtime.set_budget(NONE)
    check(model, other)


def test_a_copy_is_an_ordinary_module(device: str) -> None:
    model, runtime = at_home(device)
    alone = copy.deepcopy(model)
    in_place(alone)
    check(model, twin(device))
    runtime.set_budget(NONE)
    check(model, twin(device))


def test_saving_one_weight_saves_one_weight(device: str, tmp_path: Path) -> None:
    model, _ = at_home(device)
    bias = model.blocks[0].attn1.to_q.bias
    file = io.BytesIO()
    torch.save(bias, file)
    assert len(file.getvalue()) < bias.nbytes + 4096
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    check(again.to(device), twin(device))


def test_a_weight_that_is_held_outlives_the_model(device: str) -> None:
    model, runtime = at_home(device)
    kept, right = block_weight(model), block_weight(model).clone()
    runtime.set_budget(NONE)
    forward(model, KIND.inputs(device))
    wanoffload.unwrap(model)
    del model, runtime
    junk = [torch.full_like(right, 7) for _ in range(50)]
    assert torch.equal(kept, right)
    del junk


@pytest.mark.parametrize("order", ["before", "at home"])
@pytest.mark.parametrize("granularity", ["block", "part"])
def test_compiled_blocks_are_one_graph_and_never_recompiled(
    granularity: str, order: str, device: str
) -> None:
    torch.compiler.reset()
    backend = CompileCounterWithBackend("eager")
    model = wrapped(device, granularity=granularity)
    runtime = wanoffload.offloader(model)
    if order == "at home":
        forward(model, KIND.inputs(device))
        assert runtime.at_home
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    forward(model, KIND.inputs(device))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for budget in (ALL, NONE, ALL):
            runtime.set_budget(budget)
            check(model, twin(device))
            assert runtime.at_home == (budget == ALL)
            assert all(block._compiled_call_impl is not None for block in model.blocks)
            assert hooked(model) == [] or budget is NONE
    assert backend.frame_count == 1
    torch.compiler.reset()


def test_a_step_cache_that_comes_there_goes_there_or_goes_later(device: str) -> None:
    model, runtime = at_home(device)
    other = twin(device)
    for each in (model, other):
        each.enable_cache(FirstBlockCacheConfig(threshold=0.1))

    def step(each: Any, number: int) -> Tensor:
        with each.cache_context("cond"):
            return forward(each, KIND.inputs(device, seed=number))

    for number in range(2):
        assert torch.equal(step(model, number), step(other, number))
    runtime.set_budget(NONE)
    for number in range(2):
        assert torch.equal(step(model, number), step(other, number))
    for each in (model, other):
        each.disable_cache()
    check(model, other)
    runtime.set_budget(ALL)
    check(model, other)
    assert runtime.at_home
    assert hooked(model) == []


def test_a_forward_that_skips_blocks_does_not_go_home_without_them(device: str) -> None:
    model, other = wrapped(device), twin(device)
    runtime = wanoffload.offloader(model)
    for each in (model, other):
        each.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    for number, home in ((0, True), (0, False), (1, True)):
        outputs = []
        for each in (model, other):
            with each.cache_context("cond"):
                outputs.append(forward(each, KIND.inputs(device, seed=number)))
        assert torch.equal(*outputs)
        assert runtime.at_home == home
        runtime.pause()


def test_what_others_put_around_a_hook_is_left_and_the_hook_does_nothing(device: str) -> None:
    model = wrapped(device)
    block = model.blocks[0]
    inner, calls = block.forward, []

    def around(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    block.forward = around
    forward(model, KIND.inputs(device))
    runtime = wanoffload.offloader(model)
    assert runtime.at_home
    acquires = runtime.stats().acquires
    check(model, twin(device))
    assert len(calls) == 3
    assert runtime.stats().acquires == acquires
    runtime.set_budget(NONE)
    check(model, twin(device))
    assert len(calls) == 5


@pytest.mark.parametrize("at", [0, 2])
def test_a_forward_that_ends_early_does_not_go_home_nor_leave(at: int, device: str) -> None:
    def fail(*_: object) -> None:
        raise KeyError("on purpose")

    model = wrapped(device)
    runtime = wanoffload.offloader(model)
    for home in (False, True):
        handle = model.blocks[at].register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            forward(model, KIND.inputs(device))
        assert runtime.at_home == home
        handle.remove()
        check(model, twin(device))


def test_a_weight_that_is_replaced_during_the_forward_is_taken_in_by_the_next(device: str) -> None:
    model, other = wrapped(device), twin(device)
    replace(other)
    new = nn.Parameter(block_weight(other).detach().clone(), requires_grad=False)

    def put(*_: object) -> None:
        model.blocks[1].attn1.to_q.weight = new

    handle = model.blocks[-1].register_forward_hook(put)
    forward(model, KIND.inputs(device))
    handle.remove()
    runtime = wanoffload.offloader(model)
    assert not runtime.at_home
    check(model, other)
    assert runtime.at_home


def test_during_a_forward_it_is_not_left(device: str) -> None:
    model, runtime = at_home(device)
    seen: list[BaseException] = []

    def try_all(*_: object) -> None:
        for way in (lambda: runtime.set_budget(NONE), lambda: wanoffload.unwrap(model)):
            try:
                way()
            except ConcurrentForwardError as error:
                seen.append(error)

    handle = model.blocks[1].register_forward_pre_hook(try_all)
    forward(model, KIND.inputs(device))
    handle.remove()
    assert len(seen) == 2
    assert runtime.at_home
    check(model, twin(device))


def test_a_debugged_model_stays_hooked(device: str) -> None:
    model = wrapped(device, verify=True)
    check(model, twin(device))
    assert not wanoffload.offloader(model).at_home


def test_a_closed_one_has_what_was_written_and_runs_no_more(device: str) -> None:
    model, runtime = at_home(device)
    in_place(model)
    right = block_weight(model).cpu().clone()
    runtime.close()
    assert torch.equal(block_weight(model).cpu(), right)
    with pytest.raises(wanoffload.ClosedError):
        forward(model, KIND.inputs(device))


def test_a_shared_or_stored_image_is_not_written_to(device: str, tmp_path: Path) -> None:
    cache = tmp_path / "images"
    model, runtime = at_home(device, host="disk", cache=cache)
    before = cache.read_bytes()
    other = twin(device)
    for each in (model, other):
        in_place(each)
    runtime.set_budget(NONE)
    check(model, other)
    assert cache.read_bytes() == before
    assert runtime.tiers.count("disk") == len(runtime.tiers) - 1
