"""A paused offloader holds no device memory, and its next forward is right; step times."""

from __future__ import annotations

import gc
import logging
import threading
import weakref

import pytest
import torch
from torch import nn

import wanoffload
from tests.small_models import MODELS, Backwards, forward
from wanoffload import ConcurrentForwardError, Offloader, engine_memory
from wanoffload._C import HostBackend
from wanoffload.machine import clock as machine_clock


def wrapped(name: str = "wan21_t2v", **options: object) -> tuple[nn.Module, dict, Offloader]:
    model, inputs = MODELS[name]()
    wanoffload.wrap(model, device="cpu", **options)  # type: ignore[arg-type]
    return model, inputs, wanoffload.offloader(model)


@pytest.mark.parametrize("host", ["pinned", "pageable"])
@pytest.mark.parametrize("prefetch", [0, 1, 2, 50])
@pytest.mark.parametrize("name", MODELS)
def test_a_forward_after_a_pause_fetches_everything_again(
    name: str, prefetch: int, host: str, device: str
) -> None:
    model = MODELS[name].make().to(device)
    inputs = MODELS[name].inputs(device)
    expected = forward(model, inputs)
    wanoffload.wrap(model, prefetch, device=device, host=host)
    offloader = wanoffload.offloader(model)
    offloader.poison_slots()
    for _ in range(2):
        assert torch.equal(forward(model, inputs), expected)
        fetched = offloader.stats().bytes_fetched
        offloader.pause()
        assert offloader.paused
        assert torch.equal(forward(model, inputs), expected)
        assert not offloader.paused
        assert offloader.stats().bytes_fetched >= fetched + offloader.stats().host_bytes


def test_a_paused_offloader_holds_no_slots_and_no_ring_but_its_page_locks() -> None:
    _, _, offloader = wrapped(host="pageable")
    assert offloader.stats().ring_bytes > 0
    offloader.pause()
    stats = offloader.stats()
    assert (stats.slots, stats.slot_bytes, stats.ring_bytes, stats.locked_bytes) == (0, 0, 0, 0)

    model, inputs, offloader = wrapped(host="pinned")
    forward(model, inputs)
    before = offloader.stats()
    memory = weakref.ref(offloader.memory.slots.memory)
    offloader.pause()
    gc.collect()
    assert memory() is None
    stats = offloader.stats()
    assert stats.locked_bytes == before.locked_bytes == stats.host_bytes > 0
    forward(model, inputs)
    assert offloader.stats().slot_bytes == before.slot_bytes > 0


@pytest.mark.gpu
def test_device_memory_is_given_back_on_a_gpu() -> None:
    model = MODELS["wan21_t2v"].make()
    wanoffload.wrap(model, device="cuda")
    offloader = wanoffload.offloader(model)
    forward(model, MODELS["wan21_t2v"].inputs("cuda"))
    before, held = torch.cuda.memory_allocated(), offloader.stats().slot_bytes
    offloader.pause()
    assert before - torch.cuda.memory_allocated() >= held


def test_weights_stay_true_while_paused() -> None:
    model, inputs = MODELS["wan21_t2v"]()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    wanoffload.wrap(model, device="cpu")
    forward(model, inputs)
    wanoffload.offloader(model).pause()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert values.keys() == model.state_dict().keys()


@pytest.mark.parametrize("way", ["in place", "data", "replaced"])
def test_writes_while_paused_take_effect_in_the_next_forward(way: str) -> None:
    model, inputs = MODELS["wan21_t2v"]()
    twin, _ = MODELS["wan21_t2v"]()
    wanoffload.wrap(model, device="cpu")
    unchanged = forward(model, inputs)
    wanoffload.offloader(model).pause()
    for changed in (model, twin):
        layer = changed.blocks[0].ffn.net[2]
        with torch.no_grad():
            if way == "in place":
                layer.weight.mul_(2)
            elif way == "data":
                layer.weight.data += layer.weight.data
            else:
                layer.weight = nn.Parameter(layer.weight * 2, requires_grad=False)
    expected = forward(twin, inputs)
    assert not torch.equal(expected, unchanged)
    assert torch.equal(forward(model, inputs), expected)


def test_pausing_twice_is_pausing_once_and_counts_go_on() -> None:
    model, inputs, offloader = wrapped()
    units = offloader.stats().units
    forward(model, inputs)
    offloader.pause()
    once = offloader.stats()
    offloader.pause()
    assert offloader.stats() == once
    assert (once.forwards, once.acquires) == (1, units)
    forward(model, inputs)
    offloader.pause()
    forward(model, inputs)
    after = offloader.stats()
    assert (after.forwards, after.acquires) == (3, 3 * units)
    assert after.fetches >= 3 * units
    offloader.pause()
    offloader.reset_stats()
    assert offloader.stats().acquires == offloader.stats().bytes_fetched == 0


def test_the_learned_order_and_the_poison_survive_a_pause() -> None:
    model = Backwards()
    wanoffload.wrap(model, 1, device="cpu")
    offloader = wanoffload.offloader(model)
    offloader.poison_slots(0)
    with torch.no_grad():
        model(torch.randn(2, 8))
        offloader.pause()
        offloader.reset_stats()
        model(torch.randn(2, 8))
        backend = offloader.engine.backend
        assert isinstance(backend, HostBackend)
        calls = backend.calls
        model(torch.randn(2, 8))
    # The order is known, so no block is fetched in vain, and only the first wait is not hidden.
    assert offloader.stats().fetches == 2 * 5 + 1
    assert offloader.stats().cold == 0
    # A block takes five calls of the backend (wait, copy, record, wait, record), and one to poison.
    assert backend.calls - calls == 6 * 5


def test_pausing_inside_a_forward_is_refused() -> None:
    model, inputs, offloader = wrapped()
    errors = []

    def pause(*_: object) -> None:
        try:
            offloader.pause()
        except ConcurrentForwardError as error:
            errors.append(str(error))
        thread = threading.Thread(target=pause_elsewhere)
        thread.start()
        thread.join()

    def pause_elsewhere() -> None:
        with pytest.raises(ConcurrentForwardError, match="second thread"):
            offloader.pause()
        errors.append("thread")

    handle = model.blocks[1].register_forward_hook(pause)
    expected = forward(MODELS["wan21_t2v"].make(), inputs)
    assert torch.equal(forward(model, inputs), expected)
    assert errors == ["a forward of this model is running: pause it afterwards", "thread"]
    handle.remove()
    offloader.pause()
    assert offloader.paused


def test_a_block_alone_resumes_too() -> None:
    linear = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    holder = nn.Module()
    holder.layers = linear
    x = torch.randn(1, 4)
    with torch.inference_mode():
        expected = linear[1](x)
        wanoffload.wrap(holder, device="cpu")
        offloader = wanoffload.offloader(holder)
        offloader.pause()
        assert torch.equal(linear[1](x), expected)
    assert not offloader.paused
    assert offloader.stats().acquires == 1


@pytest.mark.parametrize("end", ["close", "unwrap"])
def test_closing_and_unwrapping_while_paused(end: str) -> None:
    model, inputs, offloader = wrapped()
    expected = forward(model, inputs)
    offloader.pause()
    if end == "close":
        offloader.close()
        offloader.pause()
        with pytest.raises(wanoffload.ClosedError):
            forward(model, inputs)
    wanoffload.unwrap(model)
    assert torch.equal(forward(model, inputs), expected)
    assert offloader.stats().locked_bytes == 0


def test_too_little_memory_to_resume_leaves_it_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, offloader = wrapped()
    expected = forward(model, inputs)
    offloader.pause()

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        # An empty SlotMemory is made on the way: only one with slots is refused.
        real = engine_memory.SlotMemory
        patch.setattr(engine_memory, "SlotMemory", lambda n, *a: full() if n else real(n, *a))
        with pytest.raises(torch.OutOfMemoryError):
            forward(model, inputs)
    assert offloader.paused
    assert torch.equal(forward(model, inputs), expected)


def test_slots_made_in_inference_mode_are_ordinary_tensors() -> None:
    model, inputs, offloader = wrapped()
    offloader.pause()
    forward(model, inputs)
    assert not offloader.memory.slots.memory.is_inference()
    with torch.no_grad():
        model(**inputs)


def test_the_second_step_is_measured_and_compared(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs, offloader = wrapped()
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(machine_clock.time, "perf_counter", lambda: next(clock))
    assert offloader.stats().predicted_step_seconds is None
    offloader.expect(2.0, forwards_per_step=2)
    for done in range(4):
        assert offloader.stats().measured_step_seconds is None, done
        forward(model, inputs)
    with caplog.at_level(logging.INFO, "wanoffload"):
        stats = offloader.stats()
        offloader.stats()
    assert (stats.predicted_step_seconds, stats.measured_step_seconds) == (2.0, 2.5)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "a step takes 2.500 s; 2.000 s were predicted (+25.0 %)")
    ]
    offloader.pause()
    forward(model, inputs)
    assert offloader.stats().measured_step_seconds == 2.5


def test_a_prediction_that_holds_is_no_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs, offloader = wrapped()
    clock = iter([10.0, 11.0])
    monkeypatch.setattr(machine_clock.time, "perf_counter", lambda: next(clock))
    offloader.expect(1.05, forwards_per_step=1)
    for _ in range(2):
        forward(model, inputs)
    with caplog.at_level(logging.INFO, "wanoffload"):
        offloader.stats()
    assert [r.levelname for r in caplog.records] == ["INFO"]


@pytest.mark.parametrize("end", ["pause", "error"])
def test_a_generation_that_ends_within_its_second_step_is_not_measured(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, offloader = wrapped()
    clock = iter([10.0, 30.0, 33.0])
    monkeypatch.setattr(machine_clock.time, "perf_counter", lambda: next(clock))
    offloader.expect(1.0, forwards_per_step=2)
    for _ in range(3):
        forward(model, inputs)  # the second step begins at 10.0
    if end == "pause":
        offloader.pause()
    else:
        with pytest.raises(TypeError):
            model()
    for _ in range(4):
        forward(model, inputs)
    assert offloader.stats().measured_step_seconds == 3.0
