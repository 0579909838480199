"""Rule 8: a forward may end anywhere, and the next one is right. One thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import wanoffload
from tests.small_models import MODELS, forward
from wanoffload import ConcurrentForwardError, GradientError, TransferError, wrapping
from wanoffload._C import HostBackend

KIND = MODELS["wan21_t2v"]


class Stop(Exception):
    """What a test throws from inside a forward."""


def raising(error: BaseException) -> Callable[..., None]:
    def hook(*_: object) -> None:
        raise error

    return hook


@pytest.mark.parametrize("prefetch", [0, 1, 2, 9])
@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt(), SystemExit()])
@pytest.mark.parametrize("block", range(KIND.units))
def test_after_an_exception_in_any_block_the_next_forward_is_right(
    block: int, error: BaseException, prefetch: int, device: str
) -> None:
    model, inputs = KIND.make().to(device), KIND.inputs(device)
    expected = forward(model, inputs)
    wanoffload.wrap(model.to("cpu"), prefetch, device=device)
    wanoffload.offloader(model).poison_slots()
    for module in (model.blocks[block], model.blocks[block].attn2.to_k):
        handle = module.register_forward_pre_hook(raising(error))
        with pytest.raises(type(error)):
            forward(model, inputs)
        handle.remove()
        assert not wanoffload.offloader(model).in_forward()
        # Outside a forward, the truth again.
        assert all(p.device.type == "cpu" for p in model.blocks.parameters())
        assert torch.equal(forward(model, inputs), expected)
    assert wanoffload.offloader(model).stats().forwards == 2


@pytest.mark.parametrize("where", ["acquire", "release"])
@pytest.mark.parametrize("first", range(KIND.units))
def test_interrupts_between_any_two_steps_of_a_hook_are_survived(
    first: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the engine has acquired, or before it releases, but before Python knows. Once
    in each of more forwards than there are slots: what is not let go would fill them."""
    model, inputs = KIND()
    expected = forward(model, inputs)
    wanoffload.wrap(model, 1, device="cpu")
    runtime = wanoffload.offloader(model)
    real = getattr(runtime, where)
    wanted = -1

    def interrupted(index: int, *rest: int) -> object:
        if where == "release" and index == wanted:
            raise KeyboardInterrupt
        result = real(index, *rest)
        if index == wanted:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(runtime, where, interrupted)
    for more in range(4):
        wanted = (first + more) % KIND.units
        with pytest.raises(KeyboardInterrupt):
            forward(model, inputs)
    wanted = -1
    for _ in range(2):
        assert torch.equal(forward(model, inputs), expected)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_after_an_exception_in_a_block_called_alone_all_is_right() -> None:
    model, inputs = KIND()
    expected = forward(model, inputs)
    wanoffload.wrap(model, 1, device="cpu")
    for block in model.blocks:
        with pytest.raises(TypeError), torch.no_grad():
            block()
        assert not wanoffload.offloader(model).in_forward()
    assert torch.equal(forward(model, inputs), expected)


def test_blocks_skipped_or_called_alone_are_right(device: str) -> None:
    model, inputs = KIND.make().to(device), KIND.inputs(device)
    seen: list[tuple[tuple[Tensor, ...], Tensor]] = []
    handles = [
        block.register_forward_hook(lambda _, args, out: seen.append((args, out)))
        for block in model.blocks
    ]
    forward(model, inputs)
    for handle in handles:
        handle.remove()
    wanoffload.wrap(model.to("cpu"), 1, device=device)
    with torch.inference_mode():
        for i in [3, 0, 0, 4, 2, 1, 4]:
            args, expected = seen[i]
            assert torch.equal(model.blocks[i](*args), expected)
    assert wanoffload.offloader(model).stats().acquires == 7


def test_a_failed_copy_is_the_error_of_the_block_that_needs_it_and_the_next_forward_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = KIND()
    expected = forward(model, inputs)
    backend = HostBackend()
    monkeypatch.setattr(wrapping, "backend_for", lambda _: backend)
    wanoffload.wrap(model, 1, device="cpu")
    failures: list[wanoffload.OffloadError] = []
    for nth in range(1, 40):
        backend.fail_at(nth)
        for _ in range(2):  # what a forward prefetches for the next one fails in the next one
            try:
                assert torch.equal(forward(model, inputs), expected)
            except wanoffload.OffloadError as error:
                failures.append(error)
        assert torch.equal(forward(model, inputs), expected)
    assert len(failures) == 39
    transfers = [str(error) for error in failures if isinstance(error, TransferError)]
    assert len(transfers) > 15
    assert all("last events" in text for text in transfers)


def test_a_second_thread_is_an_error_and_disturbs_nobody(device: str) -> None:
    model, inputs = KIND.make().to(device), KIND.inputs(device)
    expected = forward(model, inputs)
    wanoffload.wrap(model.to("cpu"), 1, device=device)
    errors: list[BaseException] = []

    def second() -> None:
        for call in (lambda: forward(model, inputs), lambda: model.blocks[2](None)):
            try:
                call()
            except BaseException as error:
                errors.append(error)

    def start_second(*_: object) -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    handle = model.blocks[2].attn1.register_forward_hook(start_second)
    assert torch.equal(forward(model, inputs), expected)
    handle.remove()
    assert [type(error) for error in errors] == [ConcurrentForwardError] * 2
    assert "second thread" in str(errors[0])
    # In turns, any thread may run it.
    outputs: list[Tensor] = []
    thread = threading.Thread(target=lambda: outputs.append(forward(model, inputs)))
    thread.start()
    thread.join()
    assert torch.equal(outputs[0], expected)


@pytest.mark.gpu
def test_forwards_on_different_streams_follow_each_other() -> None:
    model, inputs = KIND.make().to("cuda"), KIND.inputs("cuda")
    expected = forward(model, inputs)
    wanoffload.wrap(model.to("cpu"), 1, device="cuda")
    wanoffload.offloader(model).poison_slots()
    torch.cuda.synchronize()
    outputs = []
    for stream in [torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()] * 5:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            outputs.append(forward(model, inputs))
    torch.cuda.synchronize()
    assert all(torch.equal(output, expected) for output in outputs)


def test_gradients_through_streamed_weights_are_refused(device: str) -> None:
    model, inputs = KIND.make().requires_grad_(True), KIND.inputs(device)
    wanoffload.wrap(model, device=device)
    with pytest.raises(GradientError, match=r"blocks\.0\..* requires grad.*inference_mode"):
        model(**inputs)
    model.blocks.requires_grad_(False)
    with pytest.raises(GradientError, match=r"an input of blocks\.0 requires grad"):
        model(**inputs)
    with torch.no_grad():
        expected = model(**inputs)[0]
    model.requires_grad_(False)
    assert torch.equal(model(**inputs)[0], expected)


def test_a_closed_offloader_says_so_and_unwrap_still_works() -> None:
    model, inputs = KIND()
    expected = forward(model, inputs)
    wanoffload.wrap(model, device="cpu")
    runtime = wanoffload.offloader(model)
    runtime.close()
    runtime.close()
    assert runtime.closed
    assert runtime.stats().locked_bytes == 0
    with pytest.raises(wanoffload.ClosedError, match="closed"):
        forward(model, inputs)
    model.blocks[0].attn1.to_q.weight.data.mul_(1)
    assert torch.equal(forward(wanoffload.unwrap(model), inputs), expected)
