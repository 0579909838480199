"""A model that was at home streams again: what others still see of its homes is theirs, and writes
and interrupts at odd moments lose nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import wanoffload
from tests.small_models import forward
from tests.test_at_home import (
    KIND,
    NONE,
    WAYS,
    at_home,
    block_weight,
    check,
    in_place,
    query,
    replace,
    twin,
    wrapped,
)
from wanoffload import Offloader, WeightChangeError, hooks
from wanoffload.binding import Binding

# What others still see of a home.

KEEPING: dict[str, Callable[[Any, Offloader], object]] = {
    "pause": lambda model, runtime: runtime.pause(keep_residents=True),
    "set_budget": lambda model, runtime: runtime.set_budget("2GiB"),
}


def swap(model: Any) -> None:
    a, b = query(model, 0), query(model, 2)
    a.weight, b.weight = b.weight, a.weight


def swap_data(model: Any) -> None:
    a, b = query(model, 0).weight, query(model, 2).weight
    a.data, b.data = b.data, a.data


@pytest.mark.parametrize("way", KEEPING)
@pytest.mark.parametrize("change", [swap, swap_data])
def test_weights_that_change_places_are_each_taken_in_as_they_were(
    change: Callable[[Any], None], way: str, device: str
) -> None:
    model, runtime = at_home(device)
    other = twin(device)
    for each in (model, other):
        change(each)
    KEEPING[way](model, runtime)
    check(model, other)
    assert runtime.at_home


@pytest.mark.parametrize("way", KEEPING)
def test_what_was_kept_of_the_weights_stays_as_it_was(way: str, device: str) -> None:
    model, runtime = at_home(device)
    other = twin(device)
    kept = {
        "detached": block_weight(model).detach(),
        "data": block_weight(model).data,
        "state_dict": model.state_dict()["blocks.1.attn1.to_q.weight"],
    }
    right = block_weight(other).detach().clone()
    KEEPING[way](model, runtime)
    for each in (model, other):
        replace(each)
    check(model, other)
    for name, tensor in kept.items():
        assert torch.equal(tensor, right), name
    assert runtime.budget.nbytes is not None
    assert runtime.device_bytes <= runtime.budget.nbytes


@pytest.mark.parametrize("way", KEEPING)
def test_values_that_are_put_away_come_back_as_they_were(way: str, device: str) -> None:
    model, runtime = at_home(device)
    other = twin(device)
    stored = {}
    for name, each in (("ours", model), ("other", other)):
        stored[name] = block_weight(each).data
        block_weight(each).data = stored[name] * 0.5
    KEEPING[way](model, runtime)
    check(model, other)
    for name, each in (("ours", model), ("other", other)):
        block_weight(each).data = stored[name]
    check(model, other)


@pytest.mark.parametrize("way", KEEPING)
def test_a_parameter_from_before_is_the_model_s_no_more(way: str, device: str) -> None:
    model, runtime = at_home(device)
    dead = block_weight(model)
    KEEPING[way](model, runtime)
    with torch.no_grad():
        dead.mul_(2)
    check(model, twin(device))
    runtime.set_budget(NONE)
    check(model, twin(device))


def test_a_backward_has_the_weights_of_its_forward(device: str) -> None:
    model, runtime = at_home(device)
    other = twin(device)
    inputs, grads, losses = KIND.inputs(device), [], []
    for each in (model, other):
        x = inputs["hidden_states"].clone().requires_grad_()
        grads.append(x)
        losses.append(each(**{**inputs, "hidden_states": x})[0].float().square().mean())
    model.zero_grad(set_to_none=True)
    runtime.pause(keep_residents=True)
    replace(model)
    forward(model, inputs)
    for loss in losses:
        loss.backward()
    assert torch.equal(*[x.grad for x in grads])


# Writes and errors that come at odd moments.


def test_data_that_is_set_during_a_forward_is_not_forgotten(device: str) -> None:
    model, other = wrapped(device), twin(device)
    new = block_weight(other).data * 3

    def put(*_: object) -> None:
        block_weight(model).data = new

    handle = model.blocks[-1].register_forward_hook(put)
    forward(model, KIND.inputs(device))
    handle.remove()
    block_weight(other).data = new.clone()
    assert not wanoffload.offloader(model).at_home
    check(model, other)
    assert wanoffload.offloader(model).at_home


def test_one_unit_that_comes_back_keeps_no_other_from_it(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = wrapped(device), twin(device)
    kept = [query(model, n).weight for n in range(3)]
    forward(model, KIND.inputs(device))
    for each in (model, other):
        with torch.no_grad():
            for n in range(3):
                query(each, n).weight.mul_(2)
    real, inside = Binding.write, []

    def write(self: Binding, values: Any) -> None:
        if not inside:
            inside.append(self)
            assert torch.equal(kept[2].clone().cpu(), query(other, 2).weight.cpu())
        real(self, values)

    monkeypatch.setattr(Binding, "write", write)
    assert torch.equal(kept[1].clone().cpu(), query(other, 1).weight.cpu())
    check(model, other)


def test_weights_that_pack_badly_and_were_written_there_are_packed_by_the_next_forward(
    device: str,
) -> None:
    model, other = wrapped(device, pack=True), twin(device)
    kept = [query(model, n).weight for n in range(3)]
    forward(model, KIND.inputs(device))
    runtime = wanoffload.offloader(model)
    for each in (model, other):
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, weight in each.named_parameters():
                if name.startswith("blocks.") and weight.dim() == 2:
                    bits = torch.randint(0x3000, 0x3F00, weight.shape, generator=draw)
                    value = bits.to(torch.int16).view(torch.bfloat16)
                    weight.copy_(value.to(weight.dtype))
    for tensor in kept:
        tensor.clone()
    assert runtime.at_home
    assert not runtime.paused
    runtime.set_budget(NONE)
    assert not runtime.at_home
    for tensor in kept:
        tensor.clone()
    check(model, other)


def test_a_write_that_was_undone_after_it_came_back_in_part_is_undone(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, runtime = at_home(device)
    old = block_weight(model).detach().clone()
    in_place(model)
    real = Binding.write

    def interrupted(self: Binding, values: Any) -> None:
        real(self, values)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Binding, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runtime.set_budget(NONE)
    with torch.no_grad():
        block_weight(model).copy_(old)
    runtime.set_budget(NONE)
    check(model, twin(device))


def test_a_weight_that_was_removed_there_is_an_error_by_name(device: str) -> None:
    model, runtime = at_home(device)
    layer = query(model, 1)
    layer.weight.data = layer.weight.data * 2
    layer.weight = None
    runtime.set_budget(NONE)
    with pytest.raises(WeightChangeError, match=r"blocks\.1\.attn1\.to_q\.weight was removed"):
        forward(model, KIND.inputs(device))


def test_a_gradient_that_stands_nowhere_in_the_model_is_in_nobody_s_way(device: str) -> None:
    model, runtime = at_home(device)
    weight = block_weight(model).requires_grad_()
    model(**KIND.inputs(device))[0].float().square().mean().backward()
    assert weight.grad is not None
    replace(model)
    model.zero_grad(set_to_none=True)
    other = twin(device)
    replace(other)
    wanoffload.unwrap(model, runtime.device)
    check(model, other)


def interrupt(at: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook of the package is interrupted, behind what it does, the nth time that it is used."""
    real, left = getattr(hooks, at), [times]

    def interrupted(*given: Any) -> Any:
        result = real(*given)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(hooks, at, interrupted)


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", WAYS[::3], ids=str)
def test_an_interrupted_way_home_or_back_is_made_good(
    options: dict[str, Any],
    compiled: bool,
    times: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, other = wrapped(device, **options), twin(device)
    if compiled:
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
    in_parts = "granularity" in options
    runtime = wanoffload.offloader(model)
    with monkeypatch.context() as patch:
        interrupt("step_aside", times, patch)
        with pytest.raises(KeyboardInterrupt):
            forward(model, KIND.inputs(device))
    assert not runtime.at_home
    check(model, other)
    assert runtime.at_home
    for each in (model, other):
        in_place(each)
    with monkeypatch.context() as patch:
        interrupt("step_in_whole" if compiled and in_parts else "step_in", times, patch)
        with pytest.raises(KeyboardInterrupt):
            runtime.set_budget(NONE)
    check(model, other)
    runtime.set_budget(NONE)
    check(model, other)
    assert not runtime.at_home
