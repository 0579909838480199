"""enable and packing: what the plan says of it is done, kept, and undone; videos stay the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import wanoffload
from tests.poison import poisoned_homes
from tests.small_pipelines import PIPELINES
from tests.test_adopting import ON_CPU, experts, wrapped_pipeline
from tests.test_load_pipeline import load_it, ordinary, saved
from tests.test_pipeline import (
    HERE,
    PARKING,
    STREAMING,
    enabled_of,
    planned,
    treatments,
    values,
)
from wanoffload import Hardware, Workload, disable, enable, offloader
from wanoffload.pipelines import acting, components, pipeline_source
from wanoffload.pipelines.components import STREAMED
from wanoffload.pipelines.enabling import plan_of, with_own_weights

__all__ = ["planned", "poisoned_homes", "saved"]

PACKING = replace(STREAMING, pack_share=1.0)
STREAM: dict[str, Any] = {"dit_layerwise_offload": True}
CARD = Hardware("200GB", "200GB", 0.001, name="a card with a slow link")  # copies take longest
KIND = PIPELINES["a14b"]
ALL, NONE = [3, 4], [0, 0]  # blocks of the two experts


def images(module: Any) -> list[int]:
    """Where packed images stand."""
    return [binding.image.stored.address for binding in offloader(module).bindings]


def packed_units(pipe: Any) -> list[int]:
    return [offloader(expert).stats().packed_units for expert in experts(pipe)]


def runtimes(pipe: Any) -> list[Any]:
    return [offloader(expert) for expert in experts(pipe)]


def enabled(plan: Any = PACKING, **options: Any) -> tuple[Any, torch.Tensor]:
    pipe = KIND.make()
    expected = KIND.run(pipe)
    return enable(pipe, **ON_CPU, **options), expected


@pytest.mark.usefixtures("poisoned_homes")
@pytest.mark.parametrize("name", ["t2v", "a14b", "i2v", "vace", "animate"])
def test_a_packed_pipeline_makes_the_resident_ones_video_and_holds_the_same_values(
    name: str, planned
) -> None:
    kind = PIPELINES[name]
    pipe = kind.make()
    expected, truth = kind.run(pipe), values(pipe)
    planned(PACKING)
    enable(pipe, **ON_CPU)
    for _ in range(2):
        assert torch.equal(kind.run(pipe), expected)
    stats = offloader(pipe.transformer).stats()
    assert stats.packed_units == stats.units
    assert stats.locked_bytes == stats.host_bytes < stats.plain_bytes
    assert all(torch.equal(value, truth[key]) for key, value in values(pipe).items())
    disable(pipe)
    assert torch.equal(kind.run(pipe), expected)
    assert all(torch.equal(value, truth[key]) for key, value in values(pipe).items())


@pytest.mark.parametrize(
    ("share", "units"), [(1 / 3, [1, 1]), (0.5, [2, 2]), (1.0, ALL), (0.0, NONE), (None, NONE)]
)
def test_a_share_of_the_blocks_of_each_expert_is_packed(
    share: float | None, units: list[int], planned
) -> None:
    planned(replace(STREAMING, pack_share=share))
    pipe, expected = enabled()
    assert torch.equal(KIND.run(pipe), expected)
    assert packed_units(pipe) == units


def test_encoders_are_not_packed(planned) -> None:
    planned(PACKING)
    pipe, _ = enabled()
    encoder = enabled_of(pipe).components["text_encoder"].runtime
    assert encoder.stats().units > 0
    assert encoder.stats().packed_units == 0


def by_height(workload: Workload | None) -> Any:
    """Packed at 48, plain at 32, another prefetch at 64, a part at 80, nothing said at 96."""
    plans = {
        48: PACKING,
        32: replace(STREAMING, pack_share=0.0),
        96: STREAMING,
        64: replace(PACKING, dit_offload_prefetch_size=2),
        80: replace(STREAMING, pack_share=1 / 3),
    }
    return plans.get(workload.height if workload else 32, PACKING)


@pytest.mark.usefixtures("poisoned_homes")
def test_another_form_at_a_later_call_and_back(planned) -> None:
    planned(by_height)
    pipe, _ = enabled()
    resident = KIND.make()
    for height, units in ((32, NONE), (48, ALL), (64, ALL), (80, [1, 1]), (32, NONE), (48, ALL)):
        assert torch.equal(KIND.run(pipe, height=height), KIND.run(resident, height=height))
        assert packed_units(pipe) == units


def test_what_only_gets_another_prefetch_stays_packed_where_it_is(planned) -> None:
    planned(by_height)
    pipe, _ = enabled()
    KIND.run(pipe, height=48)
    before = [images(expert) for expert in experts(pipe)]
    KIND.run(pipe, height=64)
    assert [images(expert) for expert in experts(pipe)] == before
    assert [runtime.prefetch for runtime in runtimes(pipe)] == [2, 2]


def seen_by_the_plan(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """How the blocks stand when it is decided, each time."""
    seen: list[float | None] = []
    decide = acting.decide
    monkeypatch.setattr(
        acting, "decide", lambda facts, *a: (seen.append(facts.packed), decide(facts, *a))[1]
    )
    return seen


def test_the_plan_is_told_in_which_form_blocks_stand(
    planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(by_height)
    seen = seen_by_the_plan(monkeypatch)
    pipe, _ = enabled()
    assert set(seen) == {None}
    for height in (32, 48, 80, 64):
        seen.clear()
        KIND.run(pipe, height=height)
    assert seen == [pytest.approx(1 / 3)]


def test_where_nothing_is_said_packed_blocks_stay_where_they_are(planned) -> None:
    planned(by_height)
    pipe, _ = enabled()
    KIND.run(pipe, height=48)
    before = [images(expert) for expert in experts(pipe)]
    KIND.run(pipe, height=96)
    assert [images(expert) for expert in experts(pipe)] == before


def test_a_real_plan_packs_where_the_link_binds_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipe = KIND.make()
    expected = KIND.run(pipe)
    with caplog.at_level("INFO", "wanoffload"):
        enable(pipe, workload=Workload(32, 32, 5, 1000), hardware=CARD, device="cpu", **STREAM)
    assert "blocks of the DiT are stored packed: all blocks; the link binds" in caplog.text
    assert plan_of(pipe).pack_share == 1.0
    assert packed_units(pipe) == ALL
    assert torch.equal(KIND.run(pipe), expected)


def test_a_chosen_form_is_obeyed_by_enable() -> None:
    workload = Workload(32, 32, 5, 1000)
    for pack, units in ((False, NONE), (True, ALL)):
        pipe = KIND.make()
        enable(pipe, workload=workload, hardware=CARD, device="cpu", pack=pack, **STREAM)
        assert packed_units(pipe) == units
    quick = replace(CARD, link_gb_per_s=1000.0)
    pipe = enable(KIND.make(), hardware=quick, device="cpu", pack=True, workload=workload, **STREAM)
    assert packed_units(pipe) == ALL


# Transformers that were wrapped before.


def test_one_that_was_wrapped_packed_stays_so_where_it_is() -> None:
    pipe, expected = wrapped_pipeline(pack=True)
    before = [(offloader(expert), images(expert)) for expert in experts(pipe)]
    enable(pipe, **ON_CPU, **STREAM)
    assert plan_of(pipe).pack_share == 1.0
    assert plan_of(pipe).reasons["pack"] == "chosen"
    assert [(offloader(expert), images(expert)) for expert in experts(pipe)] == before
    assert torch.equal(KIND.run(pipe), expected)
    assert packed_units(pipe) == ALL


@pytest.mark.parametrize(("was", "chosen"), [(True, False), (False, True)])
def test_a_chosen_form_wins_over_the_one_that_was_found(was: bool, chosen: bool) -> None:
    pipe, expected = wrapped_pipeline(pack=was)
    enable(pipe, **ON_CPU, pack=chosen, **STREAM)
    assert torch.equal(KIND.run(pipe), expected)
    assert packed_units(pipe) == (ALL if chosen else NONE)


def test_where_one_was_packed_and_one_was_not_the_plan_decides() -> None:
    pipe, expected = wrapped_pipeline(pack=True)
    wanoffload.unwrap(pipe.transformer_2)
    wanoffload.wrap(pipe.transformer_2, device="cpu")
    enable(pipe, **ON_CPU, **STREAM)
    assert plan_of(pipe).reasons["pack"] != "chosen"
    assert torch.equal(KIND.run(pipe), expected)


def test_one_that_was_wrapped_packed_is_packed_again_when_enabling_fails(
    planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, expected = wrapped_pipeline(pack=True)
    planned(PARKING)
    become = components.Component.become

    def ending(self: Any, *args: Any) -> None:
        become(self, *args)
        if self.name == "transformer_2":
            raise KeyboardInterrupt

    monkeypatch.setattr(components.Component, "become", ending)
    with pytest.raises(KeyboardInterrupt):
        enable(pipe, **ON_CPU)
    assert packed_units(pipe) == ALL
    assert torch.equal(KIND.run(pipe), expected)


def test_room_of_packed_weights_is_what_they_hold() -> None:
    pipe, _ = wrapped_pipeline(pack=True)
    machine = Hardware(host_memory=1000, platform="cpu")
    stats = offloader(pipe.transformer).stats()
    tensors = (*pipe.transformer.parameters(), *pipe.transformer.buffers())
    own = sum(tensor.nbytes for tensor in tensors)
    seen = with_own_weights(machine, [pipe.transformer]).host_memory
    assert stats.host_bytes < stats.plain_bytes
    assert seen == 1000 + own - (stats.plain_bytes - stats.host_bytes)


# From files.


def test_a_pipeline_is_read_packed(saved: Any, planned) -> None:
    planned(PACKING)
    ours = load_it(saved("a14b"))
    assert packed_units(ours) == ALL
    assert treatments(ours)["transformer"] == STREAMED
    assert torch.equal(KIND.run(ours), KIND.run(ordinary(saved("a14b"))))


def test_packed_cache_files_are_taken_as_they_are(saved: Any, tmp_path: Path, planned) -> None:
    folder = saved("a14b")
    planned(PACKING)
    load_it(folder, cache=tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "transformer.images",
        "transformer_2.images",
    ]
    planned(STREAMING)
    ours = load_it(folder, cache=tmp_path)
    assert packed_units(ours) == ALL
    before = [images(expert) for expert in experts(ours)]
    assert enabled_of(ours).components["transformer"].packed == 1.0
    planned(PACKING)
    assert torch.equal(KIND.run(ours), KIND.run(ordinary(folder)))
    assert [images(expert) for expert in experts(ours)] == before


def test_what_is_read_from_the_checkpoints_own_files_stays_plain(saved: Any) -> None:
    slow = {"hardware": CARD, "workload": Workload(32, 32, 5, 1000)}
    ours = load_it(saved("a14b"), host="disk", **slow, **STREAM)
    assert plan_of(ours).pack_share == 0.0
    assert all(set(runtime.tiers) == {"disk"} for runtime in runtimes(ours))
    assert packed_units(ours) == NONE


def test_packed_blocks_in_the_checkpoints_own_files_are_refused_before_anything_is_loaded(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(pipeline_source.Source, "assemble")
    with pytest.raises(wanoffload.WrapError, match="host='disk' is not to be had here"):
        load_it(saved("a14b"), host="disk", pack=True, workload=Workload(32, 32, 5), **STREAM)


def test_a_transformer_alone_is_packed_as_planned() -> None:
    transformer = KIND.make().transformer
    enable(transformer, hardware=CARD, device="cpu", workload=Workload(32, 32, 5, 1000), **STREAM)
    assert offloader(transformer).pack == 1.0
    assert HERE.platform == "cpu"
    plain = KIND.make().transformer
    enable(plain, hardware=HERE, device="cpu", workload=Workload(32, 32, 5, 1000), **STREAM)
    assert offloader(plain).pack == 0.0
