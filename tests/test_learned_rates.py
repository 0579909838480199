"""Rates that are found out while a model runs, and what stays on the device by them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import wanoffload
from tests.small_models import MODELS, forward
from wanoffload import Offloader
from wanoffload.learned_rates import BlockTimes, LearnedRates, TimedForward
from wanoffload.machine import clock
from wanoffload.residency import Rates, forward_seconds
from wanoffload.residency_planner import sizes_of

KIND = MODELS["wan22_i2v"]
CPU = torch.device("cpu")
UNIT = 1
UNPACKED = 7
SLOW_LINK = Rates(link_gb_per_s=0.01, decode_gb_per_s=1000, compute_s=1e-6)
SLOW_COMPUTE = Rates(link_gb_per_s=1000, decode_gb_per_s=0.01, compute_s=1e-3)


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock says: the first of these, then the next."""
    row: list[float] = []
    monkeypatch.setattr(clock.time, "perf_counter", lambda: row.pop(0))
    return row


def run(times: BlockTimes, key: str, completed: bool = True) -> bool:
    """A forward; whether its block was timed."""
    times.begin_forward(key)
    timed = times.timing
    if timed:
        times.come(UNIT)
        times.used(UNIT)
    times.end_forward(completed, UNPACKED)
    return timed


def seconds(times: BlockTimes, key: str) -> dict[int, float] | None:
    timed = times.timed(key)
    return timed and timed.seconds


def test_a_block_is_timed_in_the_second_forward_in_a_row_of_its_shapes(ticks: list[float]) -> None:
    times = BlockTimes(CPU)
    ticks += [1.0, 3.5, 10.0, 11.0]
    assert [run(times, key) for key in "ABAABBAB"] == [False] * 3 + [True, False, True] + [
        False
    ] * 2
    assert [times.timed(key) for key in "ABC"] == [
        TimedForward({UNIT: 2.5}, 2.5, UNPACKED),
        TimedForward({UNIT: 1.0}, 1.0, UNPACKED),
        None,
    ]


def test_a_forward_that_broke_off_is_timed_again(ticks: list[float]) -> None:
    times = BlockTimes(CPU)
    ticks += [1.0, 3.5, 10.0, 11.0]
    run(times, "A")
    assert run(times, "A", completed=False)
    assert times.timed("A") is None
    assert run(times, "A")
    assert seconds(times, "A") == {UNIT: 1.0}


def test_blocks_that_were_left_out_are_not_timed(ticks: list[float]) -> None:
    times = BlockTimes(CPU)
    ticks += [1.0, 2.0, 4.0]
    run(times, "A")
    times.begin_forward("A")
    times.used(UNIT)  # its weights came before
    times.come(2)
    times.used(2)
    times.come(3)
    times.end_forward(completed=True, unpacked=0)
    assert seconds(times, "A") == {2: 1.0}
    assert not times.timing


def test_the_span_goes_from_the_first_block_to_the_last(ticks: list[float]) -> None:
    times = BlockTimes(CPU)
    ticks += [1.0, 3.0, 10.0, 11.0]
    run(times, "A")
    times.begin_forward("A")
    for unit in (5, 2):
        times.come(unit)
        times.used(unit)
    times.end_forward(completed=True, unpacked=0)
    assert times.timed("A") == TimedForward({5: 2.0, 2: 1.0}, 10.0, 0)


def test_the_span_is_right_where_a_unit_is_used_twice(ticks: list[float]) -> None:
    times = BlockTimes(CPU)
    ticks += [1.0, 2.0, 3.0, 4.0, 9.0, 10.0]
    times.begin_forward("A")
    times.end_forward(completed=True, unpacked=0)
    times.begin_forward("A")
    for unit in (0, 1, 0):
        times.come(unit)
        times.used(unit)
    times.end_forward(completed=True, unpacked=0)
    assert times.timed("A") == TimedForward({0: 1.0, 1: 1.0}, 9.0, 0)


# A forward's time is made of its blocks' times.


def test_blocks_are_as_much_longer_as_the_device_unpacks_beside_them() -> None:
    """At 1 GB/s a second of ten goes to unpacking, and so does a tenth of what blocks take."""
    forward = TimedForward({0: 2.0, 1: 2.0}, span=10.0, unpacked=10**9)
    assert forward.compute_s([5, 5], 1.0) == pytest.approx(2 * 2.0 * 0.9)
    assert forward.compute_s([5, 5], 2.0) == pytest.approx(2 * 2.0 * 0.95)


def test_blocks_that_were_not_timed_count_by_their_bytes() -> None:
    forward = TimedForward({0: 2.0, 2: 4.0}, span=6.0, unpacked=0)
    assert forward.compute_s([10, 15, 20], 1.0) == pytest.approx(0.2 * 45)


def test_a_block_that_was_held_up_does_not_count() -> None:
    forward = TimedForward({0: 1.0, 1: 1.2, 2: 9.0}, span=12.0, unpacked=0)
    assert forward.compute_s([1, 1, 1], 1.0) == pytest.approx(3 * 1.1)


def test_no_more_than_half_of_a_device_is_believed_to_unpack() -> None:
    forward = TimedForward({0: 1.0}, span=1.0, unpacked=10**10)
    assert forward.compute_s([1], 1.0) == pytest.approx(0.5)


def test_rates_are_measured_once_from_the_models_own_bytes(device: str) -> None:
    model = wanoffload.wrap(KIND.make(), 1, device=device, vram_budget="6MiB", pack=True)
    learned = wanoffload.offloader(model)._rates.learned
    rates = learned.with_compute(0.5)
    assert rates.compute_s == 0.5
    assert rates.link_gb_per_s > 0
    assert rates.decode_gb_per_s > 0
    assert learned.with_compute(0.5) == rates


@pytest.mark.parametrize("options", [{"pack": False}, {"vram_budget": None}])
def test_nothing_is_measured_where_nothing_depends_on_it(options: dict[str, Any]) -> None:
    given = {"vram_budget": "6MiB", "pack": True, **options}
    model = wanoffload.wrap(KIND.make(), 1, device="cpu", **given)
    assert not wanoffload.offloader(model)._rates.learned.known


# What stays by them.


@pytest.fixture
def told(unrounded: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Rates]:
    """The rates that are found."""
    rates: dict[str, Rates] = {}
    monkeypatch.setattr(BlockTimes, "timed", lambda *_: TimedForward({0: 1.0, 1: 1.5}, 2.5, 0))
    monkeypatch.setattr(LearnedRates, "with_compute", lambda *_: rates["now"])
    return rates


def streamed(resident: float, **options: Any) -> tuple[nn.Module, Offloader]:
    """With room for so many blocks besides what the slots take. 3.3: all can be kept packed, and
    not all but two be resident beside one staging slot."""
    given = {"device": "cpu", "pack": True, **options}
    runtime = wanoffload.offloader(wanoffload.wrap(KIND.make(), 1, **given))
    block = runtime.memory.slots.slot_bytes + 256
    budget = runtime.device_bytes + int(resident * block)
    model = wanoffload.wrap(KIND.make(), 1, **given, vram_budget=budget)
    return model, wanoffload.offloader(model)


def run_model(model: nn.Module, forwards: int) -> None:
    expected = forward(KIND.make(), KIND.inputs())
    wanoffload.offloader(model).poison_slots()
    for _ in range(forwards):
        assert torch.equal(forward(model, KIND.inputs()), expected)


def test_plain_blocks_stay_where_the_link_does_not_bind(told: dict[str, Rates]) -> None:
    told["now"] = SLOW_COMPUTE
    model, runtime = streamed(3.3)
    before = runtime.residency
    assert before.kept_packed
    run_model(model, 1)
    assert runtime.residency == before  # no forward has come again yet
    run_model(model, 2)
    now = runtime.residency
    assert len(now.resident) > len(before.resident)
    assert now.decoded_bytes < before.decoded_bytes
    assert runtime.device_bytes <= runtime.budget.nbytes  # type: ignore[operator]
    sizes = sizes_of(runtime.bindings)
    assert forward_seconds(sizes, now, SLOW_COMPUTE) < forward_seconds(sizes, before, SLOW_COMPUTE)


def test_what_is_expected_counts_until_it_is_found_out(told: dict[str, Rates]) -> None:
    told["now"] = SLOW_LINK
    model, runtime = streamed(3.3)
    before = runtime.residency
    runtime.expect(None, 1, SLOW_LINK)
    assert not runtime.paused  # that is how blocks stay already
    runtime.expect(None, 1, SLOW_COMPUTE)
    run_model(model, 1)
    now = runtime.residency
    assert len(now.resident) > len(before.resident)
    assert now.decoded_bytes < before.decoded_bytes
    run_model(model, 4)
    assert runtime.residency.decoded_bytes > now.decoded_bytes


@pytest.mark.parametrize("options", [{"pack": False}, {"granularity": "part"}])
def test_rates_are_expected_of_packed_blocks_alone(
    told: dict[str, Rates], options: dict[str, Any]
) -> None:
    model, runtime = streamed(2, **options)
    before = runtime.residency
    runtime.expect(None, 1, SLOW_COMPUTE)
    assert runtime.streaming.planner.rates is None
    run_model(model, 3)
    assert runtime.residency == before


def test_blocks_say_how_long_all_of_them_take(
    told: dict[str, Rates], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def with_compute(_: LearnedRates, compute_s: float) -> Rates:
        asked.append(compute_s)
        return SLOW_LINK

    monkeypatch.setattr(LearnedRates, "with_compute", with_compute)
    model, runtime = streamed(3.3)
    run_model(model, 4)
    assert asked == [pytest.approx(1.25 * len(runtime.bindings))]  # of 1 s and 1.5 s


def test_what_is_unpacked_beside_blocks_is_what_streams_packed(told: dict[str, Rates]) -> None:
    _, runtime = streamed(2)
    plan = runtime.residency
    assert plan.streamed_bytes > 0
    one = next(iter(plan.resident))
    stays = plan.resident - {one}
    runtime.memory.residency = replace(plan, resident=stays, kept_packed=frozenset({one}))
    plain = [binding.layout.nbytes for binding in runtime.bindings]
    streams = [number for number in range(len(plain)) if number not in plan.resident]
    assert runtime.streaming.unpacked_beside == sum(plain[number] for number in streams)
    runtime.memory.residency = replace(plan, depth=0, resident=frozenset())
    assert runtime.streaming.unpacked_beside == 0
    runtime.set_budget(sum(plain) * 2)
    assert runtime.streaming.unpacked_beside == 0


def test_a_plan_stays_where_another_would_gain_nothing(told: dict[str, Rates]) -> None:
    told["now"] = SLOW_LINK
    model, runtime = streamed(3.3)
    before = runtime.residency
    engine = runtime.engine.prefetcher
    run_model(model, 4)
    assert runtime.residency == before
    assert runtime.engine.prefetcher is engine


def test_a_model_that_found_too_little_memory_does_not_ask_for_more(told: dict[str, Rates]) -> None:
    told["now"] = SLOW_COMPUTE
    model, runtime = streamed(3.3)
    runtime.streaming.short = True
    before = runtime.residency
    run_model(model, 4)
    assert runtime.residency == before


def test_a_larger_budget_is_spent_by_what_was_found(told: dict[str, Rates]) -> None:
    told["now"] = SLOW_COMPUTE
    model, runtime = streamed(3.3)
    run_model(model, 4)
    runtime.set_budget(runtime.budget.nbytes + runtime.memory.slots.slot_bytes)  # type: ignore[operator]
    run_model(model, 3)
    assert not runtime.residency.kept_packed
