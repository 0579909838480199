"""Uses that are rare and went wrong once: each was silent, or left a model half changed."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

import wanoffload
from tests.small_models import MODELS, forward
from wanoffload import (
    ConcurrentForwardError,
    GradientError,
    VerifyError,
    WeightChangeError,
    WrapError,
    host_memory,
    wrapping,
)
from wanoffload._C import HostBackend

KIND = MODELS["wan21_t2v"]


class Chain(nn.Module):
    """Blocks in a row, made by a function."""

    def __init__(self, make: Callable[[], nn.Module], count: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def linear() -> nn.Module:
    return nn.Linear(8, 8)


def wrapped(make: Callable[[], nn.Module] = linear, prefetch: int = 1) -> Chain:
    model = Chain(make).requires_grad_(False)
    wanoffload.wrap(model, prefetch, device="cpu")
    return model


X = torch.linspace(-1, 1, 16).view(2, 8)


# Replaced weights, and who holds the old ones.


def test_a_replaced_weight_that_is_held_keeps_its_values_and_can_be_put_back() -> None:
    model = wrapped()
    expected = model(X)
    old = model.blocks[1].weight
    values = old.clone()
    model.blocks[1].weight = nn.Parameter(torch.eye(8), requires_grad=False)
    changed = model(X)
    assert not torch.equal(changed, expected)
    assert torch.equal(old, values)
    model.blocks[1].weight = old
    assert torch.equal(model(X), expected)


def test_data_that_is_kept_and_put_back_restores_the_weight() -> None:
    """What averaging weights does: keep p.data, put another in, evaluate, put it back."""
    model = wrapped()
    expected = model(X)
    kept = {name: p.data for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = torch.full_like(parameter, 0.5)
    assert not torch.equal(model(X), expected)
    for name, parameter in model.named_parameters():
        parameter.data = kept[name]
    assert torch.equal(model(X), expected)


def test_a_function_applied_in_place_takes_effect_in_the_next_forward() -> None:
    """Torch does it without telling anybody."""
    model = wrapped()
    resident = Chain(linear).requires_grad_(False)
    resident.load_state_dict(model.state_dict())
    model(X)
    for each in (model, resident):
        each.blocks[0].weight.apply_(lambda value: 2 * value)
    assert torch.equal(model(X), resident(X))


def test_functional_call_changes_nothing_for_good() -> None:
    model = wrapped()
    expected = model(X)
    other = {name: torch.full_like(p, 0.25) for name, p in model.named_parameters()}
    resident = Chain(linear)
    resident.load_state_dict(other)
    assert torch.equal(torch.func.functional_call(model, other, (X,)), resident(X))
    assert torch.equal(model(X), expected)


def test_a_state_dict_survives_what_is_assigned_over_it() -> None:
    model = wrapped()
    expected = model(X)
    old = model.state_dict()
    values = {name: value.clone() for name, value in old.items()}
    model.load_state_dict(Chain(linear).state_dict(), assign=True)
    assert not torch.equal(model(X), expected)
    assert all(torch.equal(old[name], value) for name, value in values.items())
    model.load_state_dict(old, assign=True)
    assert torch.equal(model(X), expected)


def test_weights_of_two_blocks_can_be_exchanged() -> None:
    model = wrapped()
    resident = Chain(linear).requires_grad_(False)
    resident.load_state_dict(model.state_dict())
    for each in (model, resident):
        a, b = each.blocks[0], each.blocks[3]
        a.weight, b.weight = b.weight, a.weight
    assert torch.equal(model(X), resident(X))
    assert torch.equal(model(X), resident(X))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_a_tie_that_is_untied_after_wrapping_is_refused() -> None:
    model = wrapped(Tied)
    new = nn.Parameter(torch.eye(8), requires_grad=False)
    model.blocks[0].b.weight = new
    with pytest.raises(WeightChangeError, match=r"blocks\.0\.a\.weight stood in 2 places"):
        model(X)
    model.blocks[0].a.weight = new
    model(X)


def test_a_weight_shared_by_blocks_can_be_assigned() -> None:
    model = Chain(linear).requires_grad_(False)
    for block in model.blocks:
        block.bias = model.blocks[0].bias
    wanoffload.wrap(model, 1, device="cpu")
    state = {name: value.clone() for name, value in Chain(linear).state_dict().items()}
    for name in state:
        if name.endswith("bias"):
            state[name] = state["blocks.0.bias"]
    model.load_state_dict(state, assign=True)
    resident = Chain(linear)
    resident.load_state_dict(state)
    assert torch.equal(model(X), resident(X))


# Other processes, other threads.


def test_sending_weights_to_another_process_leaves_them_with_the_engine() -> None:
    model = wrapped()
    before = model(X)
    ForkingPickler.dumps(model.state_dict())
    model.blocks[0].weight.zero_()
    assert not torch.equal(model(X), before)
    with pytest.raises(WeightChangeError, match="shared memory"):
        model.blocks[0].weight.share_memory_()


def in_a_thread_during_a_forward(model: Chain, work: Callable[[], object]) -> list[BaseException]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    def hook(*_: object) -> None:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    handle = model.blocks[2].register_forward_hook(hook)
    model(X)
    handle.remove()
    return errors


def test_other_threads_neither_read_nor_write_all_weights_during_a_forward() -> None:
    model = wrapped()
    expected = model(X)
    state = Chain(linear).state_dict()
    uses: list[Callable[[], object]] = [
        model.state_dict,
        lambda: model.load_state_dict(state),
        lambda: model.blocks[0].weight.zero_(),
        lambda: wanoffload.unwrap(model),
        wanoffload.offloader(model).close,
    ]
    for use in uses:
        assert [type(e) for e in in_a_thread_during_a_forward(model, use)] == [
            ConcurrentForwardError
        ]
    assert torch.equal(model(X), expected)
    model.load_state_dict(state)
    assert not torch.equal(model(X), expected)


def test_another_way_of_offloading_put_on_top_is_named() -> None:
    model, inputs = KIND()
    wanoffload.wrap(model, 1, device="cpu")
    apply_group_offloading(
        model, torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    with pytest.raises(WrapError, match="group_offloading"):
        forward(model, inputs)


def test_a_forked_process_is_told_to_wrap_for_itself() -> None:
    model = wrapped()
    model(X)
    child = os.fork()
    if child == 0:
        try:
            model(X)
        except WrapError:
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    model(X)


# Tensors of unusual kinds, and blocks that do unusual things.


def test_conjugated_and_negated_weights_have_their_values() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conj = nn.Parameter(torch.randn(4096, dtype=torch.complex64).conj())
            self.imag = nn.Parameter(torch.randn(4096, dtype=torch.complex64).conj().imag)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conj.sum().real + self.imag.sum()

    model = Chain(Block).requires_grad_(False)
    assert model.blocks[0].conj.is_conj()
    values = {name: p.clone().resolve_conj().resolve_neg() for name, p in model.named_parameters()}
    expected = model(X)
    wanoffload.wrap(model, 1, device="cpu")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name]), name
    assert torch.allclose(model(X), expected)


def test_a_block_that_returns_its_own_weight_returns_a_copy() -> None:
    class Block(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.weight[:2] if x.shape == (2, 8) else x

    class Model(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([block(x) for block in self.blocks])

    model = Model(Block).requires_grad_(False)
    expected = model(X)
    wanoffload.wrap(model, 1, device="cpu")
    for _ in range(2):
        assert torch.equal(model(X), expected)


def test_gradients_of_nested_inputs_are_refused() -> None:
    class Block(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)

        def forward(self, x: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
            return [super().forward(x[0])]

    class Model(Chain):
        def forward(self, x: Tensor) -> Tensor:
            values = [x]
            for block in self.blocks:
                values = block(values)
            return values[0]

    model = Model(Block).requires_grad_(False)
    wanoffload.wrap(model, 1, device="cpu")
    with pytest.raises(GradientError, match="an input of blocks"):
        model(X.clone().requires_grad_())


def test_tracing_and_exporting_a_wrapped_model_are_refused() -> None:
    model = wrapped()
    expected = model(X)
    with pytest.raises(WrapError, match="traced"):
        torch.jit.trace(model, X, check_trace=False)
    with pytest.raises(Exception, match="export"):
        torch.export.export(model, (X,))
    assert torch.equal(model(X), expected)


def test_blocks_of_a_list_that_is_turned_round_are_fetched_ahead_again() -> None:
    model = wrapped()
    runtime = wanoffload.offloader(model)
    model(X)
    model.blocks = nn.ModuleList(reversed(list(model.blocks)))
    model(X)
    runtime.reset_stats()
    model(X)
    assert runtime.stats().cold == 0


def test_fetching_far_more_ahead_than_there_are_blocks_is_fetching_all() -> None:
    model = Chain(linear).requires_grad_(False)
    wanoffload.wrap(model, 10**12, device="cpu")
    model(X)
    assert wanoffload.offloader(model).stats().slots == 4


def test_wrapping_does_not_care_about_default_devices() -> None:
    class Block(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.nothing = nn.Parameter(torch.empty(0, 3))

    model = Chain(Block).requires_grad_(False)
    expected = model(X)
    with torch.device("meta"):
        wanoffload.wrap(model, 1, device="cpu")
    assert torch.equal(model(X), expected)
    assert torch.equal(wanoffload.unwrap(model)(X), expected)
    with torch.device("meta"):
        buffered = Chain(lambda: nn.BatchNorm1d(8, affine=False)).to_empty(device="meta")
    buffered.blocks.append(nn.Linear(8, 8, device="cpu"))
    with pytest.raises(WrapError, match=r"running_mean is on the meta device"):
        wanoffload.wrap(buffered, device="cpu")


# Interrupted, spoilt, given up.


def test_an_interrupted_unwrap_can_be_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped()
    expected = model(X)
    binding = wanoffload.offloader(model).bindings[2]

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(binding, "give_back", interrupt)
        with pytest.raises(KeyboardInterrupt):
            wanoffload.unwrap(model)
    assert torch.equal(wanoffload.unwrap(model)(X), expected)
    assert not any("_wanoffload" in vars(module) for module in model.modules())


def test_an_interrupted_wrap_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Chain(linear).requires_grad_(False)
    expected = model(X)
    made = 0
    real = wanoffload.host_tensor.HostTensor.parameter

    def interrupted(*args: object) -> object:
        nonlocal made
        made += 1
        if made == 4:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(wanoffload.host_tensor.HostTensor, "parameter", interrupted)
        with pytest.raises(KeyboardInterrupt):
            wanoffload.wrap(model, 1, device="cpu")
    assert torch.equal(model(X), expected)
    assert not any("_wanoffload" in vars(module) for module in model.modules())
    wanoffload.wrap(model, 1, device="cpu")
    assert torch.equal(model(X), expected)


def test_a_spoilt_slot_is_fetched_anew_by_the_next_forward() -> None:
    model = Chain(linear).requires_grad_(False)
    expected = model(X)
    wanoffload.wrap(model, 3, device="cpu", verify=True)  # every block stays in its slot
    model(X)
    wanoffload.offloader(model).memory.slots.memory[300] ^= 1
    with pytest.raises(VerifyError):
        model(X)
    for _ in range(2):
        assert torch.equal(model(X), expected)


def test_close_gives_back_slots_ring_and_locks_at_once() -> None:
    """Without waiting for a garbage collection."""
    backend = HostBackend()
    model = Chain(linear).requires_grad_(False)
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wrapping, "backend_for", lambda _: backend)
            wanoffload.wrap(model, 1, device="cpu", host="pageable")
        model(X)
        runtime = wanoffload.offloader(model)
        slots = weakref.ref(runtime.memory.slots.memory)
        assert backend.locked_bytes > 0
        runtime.close()
        assert slots() is None
        assert backend.locked_bytes == 0
        assert runtime.stats().ring_bytes == runtime.stats().locked_bytes == 0
    finally:
        gc.enable()


def test_a_held_weight_does_not_hold_the_engine() -> None:
    model = wrapped()
    held = model.state_dict()["blocks.0.weight"]
    values = held.clone()
    slots = weakref.ref(wanoffload.offloader(model).memory.slots.memory)
    del model
    gc.collect()
    assert slots() is None
    assert torch.equal(held, values)
    held.zero_()
    assert not held.any()


def test_host_memory_of_a_checkpoint_that_is_mapped_from_its_file_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Letting a mapping of a file go frees no memory: the images come on top, all of them."""
    KIND.make().save_pretrained(tmp_path)
    model = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    inputs = KIND.inputs()
    expected = forward(model, inputs)
    blocks = sum(p.nbytes for p in model.blocks.parameters())
    largest = max(sum(p.nbytes for p in block.parameters()) for block in model.blocks)
    enough = host_memory.RESERVE + blocks // 2 + largest
    monkeypatch.setattr(host_memory, "available_bytes", lambda: enough)
    before = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(wanoffload.HostMemoryError, match="wrapping WanT"):
        wanoffload.wrap(model, device="cpu", host="pinned")
    with pytest.raises(wanoffload.HostMemoryError, match="wrap WanT"):
        wanoffload.wrap(model, device="cpu")
    assert [p.data_ptr() for p in model.parameters()] == before
    assert torch.equal(forward(model, inputs), expected)
