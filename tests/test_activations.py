"""`vram_budget="auto"`: the weights take what activations leave, and give it back in time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import wanoffload
from tests.small_models import MODELS, forward
from wanoffload import Offloader, runtime
from wanoffload.activations import MARGIN, RESERVE_BYTES, Activations
from wanoffload.residency_planner import ResidencyPlanner

KIND = MODELS["wan22_5b"]
GIB = 1 << 30


@dataclass
class Card:
    """A device of so many bytes, as torch's allocator has it. `foreign`: of other processes."""

    total: int = 64 * GIB
    tensors: int = 0
    kept: int = 0
    foreign: int = 0
    tidied: int = 0

    def free(self) -> int:
        return self.total - self.foreign - self.tensors

    def reserved(self) -> int:
        return self.tensors + self.kept

    def allocated(self) -> int:
        return self.tensors

    def tidy(self) -> None:
        self.kept = 0
        self.tidied += 1


def inputs(*shape: int) -> tuple[tuple[torch.Tensor], dict[str, torch.Tensor]]:
    return (torch.empty(shape, device="meta"),), {"timestep": torch.empty(1, device="meta")}


def run(activations: Activations, card: Card, given: Any, takes: int, held: int = 0) -> int | None:
    """A forward that takes so much beside the weights; the room that it had."""
    card.tensors = held
    room = activations.room(given, held)
    activations.begin()
    card.kept = max(card.kept, takes)
    activations.end(completed=True)
    return room


def left(card: Card, takes: int) -> int:
    return card.total - card.foreign - round(takes * (1 + MARGIN)) - RESERVE_BYTES


def test_nothing_is_known_of_the_first_forward_and_then_what_it_took() -> None:
    card = Card()
    activations = Activations(card)
    assert run(activations, card, inputs(4, 8), 10 * GIB) is None
    assert run(activations, card, inputs(4, 8), 10 * GIB) == left(card, 10 * GIB)
    assert run(activations, card, inputs(4, 8), 10 * GIB, held=7 * GIB) == left(card, 10 * GIB)


def test_a_smaller_shape_has_the_room_of_a_larger_one_until_it_was_seen() -> None:
    card = Card()
    activations = Activations(card)
    run(activations, card, inputs(4, 8), 10 * GIB)
    assert run(activations, card, inputs(2, 8), 3 * GIB) == left(card, 10 * GIB)
    assert run(activations, card, inputs(2, 8), 3 * GIB) == left(card, 3 * GIB)
    assert run(activations, card, inputs(9, 8), 20 * GIB) is None


def test_a_prompt_larger_than_the_latents_does_not_hide_that_these_are_larger() -> None:
    card = Card()
    activations = Activations(card)
    prompt = torch.empty(1000, 8, device="meta")

    def with_prompt(frames: int) -> Any:
        return (), {"latents": torch.empty(frames, 8, device="meta"), "prompt": prompt}

    run(activations, card, with_prompt(2), 3 * GIB)
    assert run(activations, card, with_prompt(9), 20 * GIB) is None
    assert run(activations, card, with_prompt(4), 8 * GIB) == left(card, 20 * GIB)


def test_inputs_of_which_one_is_larger_and_one_smaller_are_not_known() -> None:
    card = Card()
    activations = Activations(card)
    run(activations, card, (torch.empty(4, device="meta"), torch.empty(9, device="meta")), GIB)
    crossed = (torch.empty(9, device="meta"), torch.empty(4, device="meta"))
    assert run(activations, card, crossed, GIB) is None
    assert run(activations, card, (torch.empty(4, device="meta"),), GIB) is None


def test_what_the_allocator_kept_for_others_is_not_taken_for_a_new_shape() -> None:
    card = Card(kept=30 * GIB)
    activations = Activations(card)
    run(activations, card, inputs(4, 8), 10 * GIB)
    assert card.tidied == 1
    assert run(activations, card, inputs(4, 8), 10 * GIB) == left(card, 10 * GIB)
    assert card.tidied == 1


def test_memory_that_others_took_is_no_longer_there() -> None:
    card = Card()
    activations = Activations(card)
    run(activations, card, inputs(4, 8), GIB)
    card.foreign = 40 * GIB
    assert run(activations, card, inputs(4, 8), GIB) == left(card, GIB)
    card.foreign = 64 * GIB
    assert run(activations, card, inputs(4, 8), GIB) == 0


def test_more_is_brought_only_for_shapes_that_come_again() -> None:
    card = Card()
    activations = Activations(card)
    for given, again in ((1, False), (1, True), (2, False), (1, False), (1, True)):
        run(activations, card, inputs(given), GIB)
        assert activations.again is again


def test_a_forward_that_ran_out_is_looked_at_again_with_more_left_free() -> None:
    card = Card()
    activations = Activations(card)
    run(activations, card, inputs(4), GIB)
    before = run(activations, card, inputs(4), GIB)
    activations.ran_out(5 * GIB)
    assert run(activations, card, inputs(4), GIB) is None
    after = run(activations, card, inputs(4), GIB)
    assert before is not None
    assert after == before - 5 * GIB


# In a model.


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    monkeypatch.setattr(runtime, "TorchMemory", lambda _: made)
    return made


def wrapped(**options: Any) -> tuple[nn.Module, Offloader]:
    model = wanoffload.wrap(KIND.make(), **{"device": "cpu", "vram_budget": "auto", **options})
    return model, wanoffload.offloader(model)


def run_model(model: nn.Module, card: Card, takes: int = 0) -> None:
    """A right forward that leaves the allocator with so much more than it had."""
    offloader = wanoffload.offloader(model)

    def take(*_: object) -> None:
        card.kept = max(card.kept, takes)

    handle = model.blocks[0].register_forward_hook(take)
    card.tensors = offloader.device_bytes
    assert torch.equal(forward(model, KIND.inputs()), forward(KIND.make(), KIND.inputs()))
    handle.remove()


@pytest.mark.parametrize("pack", [False, True])
def test_blocks_stay_from_the_second_forward_on_and_go_when_memory_is_taken(
    card: Card, pack: bool
) -> None:
    model, offloader = wrapped(pack=pack)
    offloader.poison_slots()
    run_model(model, card, 10 * GIB)
    assert offloader.stats().resident_units == 0
    run_model(model, card)
    assert offloader.stats().resident_units == offloader.stats().units
    fetched = offloader.stats().bytes_fetched
    run_model(model, card)
    assert offloader.stats().bytes_fetched == fetched
    card.foreign = 64 * GIB  # and nothing is left
    run_model(model, card)
    assert offloader.stats().resident_units == offloader.stats().kept_packed_units == 0
    card.foreign = 0
    run_model(model, card)
    assert offloader.stats().resident_units == offloader.stats().units


def test_blocks_are_given_back_behind_a_forward_that_ran_out(card: Card) -> None:
    model, offloader = wrapped()
    run_model(model, card)
    run_model(model, card)
    assert offloader.stats().resident_units > 0

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("injected")

    handle = model.blocks[1].register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        forward(model, KIND.inputs())
    assert offloader.stats().resident_units > 0  # never in the middle
    handle.remove()
    run_model(model, card)
    assert offloader.stats().resident_units == 0
    run_model(model, card)
    assert offloader.stats().resident_units == offloader.stats().units


def test_an_automatic_budget_can_be_set_and_taken_back(card: Card) -> None:
    model, offloader = wrapped(vram_budget=None)
    run_model(model, card)
    offloader.set_budget("auto")
    for _ in range(3):
        run_model(model, card)
    assert offloader.stats().resident_units == offloader.stats().units
    offloader.set_budget(None)
    run_model(model, card)
    assert offloader.stats().resident_units == 0


def test_on_the_host_backend_it_runs_with_the_machine_as_it_is() -> None:
    model, offloader = wrapped()
    for _ in range(3):
        assert torch.equal(forward(model, KIND.inputs()), forward(KIND.make(), KIND.inputs()))
    assert offloader.stats().resident_units == offloader.stats().units


def test_a_shape_that_comes_once_brings_nothing(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To bring blocks for one forward costs what it saves."""
    model, offloader = wrapped()
    shapes = iter("ABAABB")
    monkeypatch.setattr("wanoffload.activations.shapes", lambda _: (next(shapes), [1]))
    stay = []
    for _ in range(6):
        run_model(model, card)
        stay.append(offloader.stats().resident_units > 0)
    assert stay == [False, False, False, True, True, True]


def test_room_that_the_plan_has_no_use_for_makes_no_new_engine(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, offloader = wrapped()
    streaming = offloader.residency
    monkeypatch.setattr(ResidencyPlanner, "choose", lambda *_: streaming)
    engines = []
    for _ in range(5):
        run_model(model, card)
        engines.append(offloader.engine.prefetcher)
    assert len(set(map(id, engines[1:]))) == 1
