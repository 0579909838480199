"""Blocks or their parts: what the cost model predicts of parts, when a plan takes them, and what it
says of it (rule 10)."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

import wanoffload
from tests.small_models import MODELS, kept_dtype
from wanoffload import image
from wanoffload.facts.look import look
from wanoffload.facts.model import ComponentFacts, ModelFacts
from wanoffload.machine.hardware import Hardware
from wanoffload.policy import cost, within
from wanoffload.policy.cost import RESIDENT, STREAM, WHOLE, Around, Placement
from wanoffload.policy.explain import taken
from wanoffload.policy.planning import Plan, plan
from wanoffload.residency import ALIGN_BYTES, UnitBytes, allocated
from wanoffload.ring_plan import choose_parts, parts_of
from wanoffload.units import find_units
from wanoffload.workload import Workload

GB = 10**9
SMALL = Workload(480, 832, 1)
MEDIUM = Workload(480, 832, 17)
PIPELINE = look("Wan-AI/Wan2.1-T2V-14B-Diffusers")
WAN_14B = replace(PIPELINE, text_encoder=None, vae=None)  # so that nothing else is the peak
A14B = replace(WAN_14B, a14b=True, dits=WAN_14B.dits * 2)
(DIT,) = WAN_14B.dits
PARTS = Placement(STREAM, None, 0.0, "part")
BLOCKS = Placement(STREAM, 1)


def card(device: str | None, **more: Any) -> Hardware:
    rates = {name: getattr(cost.ASSUMED, name) for name in cost.RATES}
    return Hardware(device_memory=device, host_memory="400GB", **{**rates, **more})


def predicted(
    placement: Placement, facts: ModelFacts = WAN_14B, budget: int | None = None
) -> cost.Candidate:
    return cost.predict(facts, placement, Around(), MEDIUM, card(None), budget)


def in_parts(facts: ModelFacts, hardware: Hardware | None, **choices: Any) -> Plan:
    made = plan(facts, MEDIUM, hardware, **choices)
    assert taken(made).granularity == made.granularity == "part"
    return made


# Predictions.


def real_parts() -> list[Any]:
    """Of the real class, without memory, as the runtime has them."""
    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=40)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(kept_dtype(model, name))
    units = find_units(model, "part")
    layouts = [image.lay_out((g[0].name, g[0].tensor) for g in unit.groups) for unit in units]
    return parts_of(units, layouts, [UnitBytes(each.nbytes, each.nbytes) for each in layouts])


@pytest.mark.parametrize("budget", [None, 900_000_000, 2 * GB, 12 * GB, 40 * GB])
def test_device_memory_is_what_the_runtime_will_choose(budget: int | None) -> None:
    others = DIT.other_bytes + DIT.loose_bytes
    expected = choose_parts(real_parts(), budget, others=others, prefetch=None)
    found = predicted(PARTS, budget=budget)
    assert found.device_weight_bytes == expected.device_bytes
    assert found.link_bytes == expected.streamed_bytes
    assert found.resident_units == len(expected.resident)


@pytest.mark.parametrize("name", MODELS)
def test_the_ring_of_a_wrapped_model_is_the_predicted_one(name: str) -> None:
    model = MODELS[name].make()
    (dit,) = look(model).streamed_in("part").dits
    wanoffload.wrap(model, device="cpu", granularity="part")
    expected = within.residency(dit, 0.0, None, None, "part")
    found = wanoffload.offloader(model).residency
    assert expected is not None
    assert (found.ring_bytes, found.places) == (expected.ring_bytes, expected.places)


def test_parts_take_less_of_the_device_and_their_rest_is_locked_nowhere() -> None:
    parts, blocks = predicted(PARTS), predicted(BLOCKS)
    assert parts.device_weight_bytes == pytest.approx(1.13 * GB, rel=0.01)
    assert blocks.device_weight_bytes == pytest.approx(1.93 * GB, rel=0.01)
    assert parts.device_peak_bytes < blocks.device_peak_bytes
    assert parts.device_need_bytes < blocks.device_need_bytes
    assert blocks.host_locked_bytes - parts.host_locked_bytes == DIT.loose_bytes


def test_a_step_in_parts_is_one_in_blocks_one_ahead() -> None:
    assert predicted(PARTS).step_seconds == pytest.approx(predicted(BLOCKS).step_seconds, rel=1e-3)
    deeper = replace(PARTS, prefetch=4)
    assert predicted(deeper).step_seconds == predicted(PARTS).step_seconds


def test_a_budget_for_one_part_alone_adds_copies_to_compute() -> None:
    ahead, alone = (predicted(PARTS, budget=b).step_seconds for b in (12 * GB // 10, 9 * GB // 10))
    assert ahead is not None
    assert alone is not None
    assert alone > 1.3 * ahead


def test_two_experts_have_the_rest_of_both_on_the_device() -> None:
    one, two = predicted(PARTS), predicted(PARTS, A14B)
    others = DIT.other_bytes + DIT.loose_bytes
    assert two.device_weight_bytes == one.device_weight_bytes + others
    made = plan(A14B, MEDIUM, card("24GiB"), vram_budget="6GB", granularity="part")
    assert made.budget_of_one == 6 * GB - others


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_while_others_run_parts_that_stay_are_there_and_the_ring_is_not(share: float) -> None:
    facts = A14B.streamed_in("part")
    stay = [within.residency(dit, share, None, 12 * GB, "part") for dit in facts.dits]
    (found, _) = (each for each in stay if each is not None)
    homes = (DIT.parts[number].nbytes + ALIGN_BYTES for number in found.resident)
    kept = sum(map(allocated, homes))
    assert within.kept_bytes(facts, [found, found]) == [kept, kept]


def test_packed_parts_take_staging_and_less_of_link_and_host() -> None:
    plain, packed = predicted(PARTS), predicted(replace(PARTS, packed=1.0))
    assert packed.staging_bytes == 3 * 48 * 2**20
    assert packed.link_bytes == pytest.approx(plain.link_bytes * 0.703, rel=1e-3)
    assert packed.host_locked_bytes == pytest.approx(plain.host_locked_bytes * 0.72, rel=1e-3)
    some = predicted(replace(PARTS, packed=0.25))
    assert packed.link_bytes < some.link_bytes < plain.link_bytes


def test_compiled_blocks_gain_nothing_by_parts() -> None:
    compiled = replace(WAN_14B, dits=(replace(DIT, compiled=True),))
    least = predicted(PARTS, compiled).device_weight_bytes
    assert least >= predicted(BLOCKS, compiled).device_weight_bytes - 2 * DIT.loose_bytes
    assert plan(compiled, MEDIUM, card("24GiB"), mode="memory").granularity == "block"
    one_block = predicted(PARTS, compiled, budget=13 * GB // 10).step_seconds
    assert one_block is not None
    assert one_block > 1.3 * (predicted(PARTS, compiled).step_seconds or 0)


# Decisions.


@pytest.mark.parametrize("chosen", [None, "auto"])
@pytest.mark.parametrize("mode", ["auto", "speed", "manual"])
def test_parts_are_taken_where_no_plan_with_blocks_fits(mode: str, chosen: str | None) -> None:
    options: dict[str, Any] = {"mode": mode, "granularity": chosen, "dit_layerwise_offload": True}
    for facts, budget in ((WAN_14B, "1.5GB"), (A14B, "2.2GB")):
        made = in_parts(facts, card("24GiB"), vram_budget=budget, **options)
        assert made.fits
        assert made.reasons["granularity"].startswith("rule 10: parts, since what is streamed,")
        assert f"vram_budget is {budget[:-2]}0 GB" in made.reasons["granularity"]
    assert plan(WAN_14B, MEDIUM, card("24GiB"), vram_budget="4GB", **options).granularity == "block"


def test_parts_are_taken_where_the_device_is_too_small_for_blocks() -> None:
    need = predicted(BLOCKS).device_need_bytes
    made = in_parts(WAN_14B, card(f"{need - 10**8}B"))
    assert made.fits
    assert "needs" in made.reasons["granularity"]
    assert plan(WAN_14B, MEDIUM, card(f"{need}B")).granularity == "block"


def test_parts_that_no_rule_streams_are_streamed_where_nothing_else_fits() -> None:
    made = in_parts(replace(WAN_14B, family="other"), card("24GiB"), vram_budget="1.5GB")
    assert "resident does not fit" in made.reasons["dit_layerwise_offload"]
    assert made.reasons["dit_offload_prefetch_size"].startswith("rule 10")


@pytest.mark.parametrize("budget", ["4GB", "16GB", 0.9, "auto"])
def test_parts_are_taken_where_they_are_quicker_within_the_budget(budget: str | float) -> None:
    made = plan(WAN_14B, SMALL, card("24GiB"), vram_budget=budget, pack=False)
    assert made.granularity == taken(made).granularity == "part"
    assert re.fullmatch(
        r"rule 10: parts, quicker within the budget than streamed, prefetch [12], "
        r"0\.\d+ s a step against 0\.\d+ s",
        made.reasons["granularity"],
    )
    assert made.reasons["dit_offload_prefetch_size"].startswith("rule 10: as many parts")
    assert {c.candidate.placement.granularity for c in made.considered} >= {"block", "part"}
    usable = [c.candidate for c in made.considered if c.obstacle is None]
    assert made.step_seconds == min(each.step_seconds or 0 for each in usable) > 0


@pytest.mark.parametrize(
    ("workload", "choices"),
    [
        (SMALL, {}),  # packed blocks are quicker
        (MEDIUM, {"pack": False}),  # both hide behind compute
        (SMALL, {"pack": False, "mode": "memory", "granularity": "block"}),
        (SMALL, {"pack": False, "mode": "manual", "dit_layerwise_offload": True}),
        (SMALL, {"pack": False, "vram_budget": None, "dit_layerwise_offload": True}),
        (None, {"pack": False}),
    ],
)
def test_blocks_are_kept_where_parts_gain_nothing_or_nobody_asked(
    workload: Workload | None, choices: dict[str, Any]
) -> None:
    made = plan(WAN_14B, workload, card("24GiB"), **{"vram_budget": "16GB", **choices})
    assert made.granularity == "block"
    streamed = [c for c in made.considered if c.candidate.placement.kind == STREAM]
    assert {c.candidate.placement.granularity for c in streamed} == {"block"}


UNKNOWN_WORK = replace(WAN_14B, dits=(replace(DIT, matmul_flops_per_token=0.0),))


@pytest.mark.parametrize(
    ("facts", "workload", "choices"),
    [
        (WAN_14B, SMALL, {"vram_budget": None}),
        (WAN_14B, MEDIUM, {}),  # compute alone takes as long
        (WAN_14B, SMALL, {"dit_offload_prefetch_size": 0.5}),  # of blocks, as it was meant
        (UNKNOWN_WORK, SMALL, {}),  # nothing is timed
    ],
)
def test_parts_that_will_not_be_taken_are_not_even_looked_at(
    facts: ModelFacts,
    workload: Workload,
    choices: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A plan of them takes longer than all others."""
    monkeypatch.delattr(within, "choose_parts")
    options = {"vram_budget": "16GB", "pack": False, **choices}
    assert plan(facts, workload, card("24GiB"), **options).granularity == "block"


def test_parts_are_worth_it_from_2_percent_on() -> None:
    seen: list[float] = []
    for tenths in (270, 280, 420, 490, 500, 520):
        here = card("24GiB", link_gb_per_s=tenths / 10)
        for budget in (4 * GB, 8 * GB, 16 * GB):
            options: dict[str, Any] = {"vram_budget": budget, "pack": False}
            made = plan(WAN_14B, MEDIUM, here, **options)
            parts, blocks = (
                plan(WAN_14B, MEDIUM, here, granularity=each, **options).step_seconds
                for each in ("part", "block")
            )
            assert parts is not None
            assert blocks is not None
            seen.append(parts / blocks)
            assert made.granularity == ("part" if parts <= blocks * 0.98 else "block")
    assert any(0.96 < share < 0.98 for share in seen)
    assert any(0.98 < share < 0.99 for share in seen)


def test_what_stands_in_parts_becomes_blocks_where_these_are_quicker_within_the_budget() -> None:
    standing = replace(WAN_14B, granularity="part", packed=0.0)
    long = replace(SMALL, steps=1000)
    made = plan(standing, long, card("24GiB"), vram_budget="12GB")
    assert (made.granularity, made.pack) == ("block", True)
    assert "blocks, quicker within the budget than" in made.reasons["granularity"]
    # It takes seconds to bring them into another form.
    assert in_parts(standing, card("24GiB"), vram_budget="12GB")
    once = plan(standing, replace(SMALL, steps=1), card("24GiB"), vram_budget="12GB")
    assert once.granularity == "part"
    streamed = [c for c in once.considered if c.candidate.placement.kind == STREAM]
    assert {c.candidate.placement.granularity for c in streamed} == {"part"}


@pytest.mark.parametrize("workload", [None, SMALL, MEDIUM])
@pytest.mark.parametrize("hardware", [None, card("24GiB"), card("141GiB")])
def test_mode_memory_takes_parts_where_they_take_less(
    workload: Workload | None, hardware: Hardware | None
) -> None:
    made = plan(PIPELINE, workload, hardware, mode="memory")
    assert made.granularity == "part"
    assert "1.13 GB of the device in parts, 1.93 GB in blocks" in made.reasons["granularity"]
    assert plan(PIPELINE, workload, hardware, mode="auto").granularity == "block"
    whole = replace(DIT, parts=(), loose_bytes=0).in_parts()  # each block is one part
    of_one = plan(replace(PIPELINE, dits=(whole,)), workload, hardware, mode="memory")
    assert of_one.granularity == "block"
    assert "not take less" in of_one.reasons["granularity"]
    unknown = replace(PIPELINE, dits=(replace(DIT, parts=()),))
    assert plan(unknown, workload, hardware, mode="memory").granularity == "block"


@pytest.mark.parametrize("mode", ["auto", "memory", "speed", "manual"])
def test_a_chosen_granularity_wins(mode: str) -> None:
    options: dict[str, Any] = {"mode": mode, "dit_layerwise_offload": True}
    for hardware in (None, card("24GiB"), card("141GiB")):
        for chosen in ("block", "part"):
            made = plan(WAN_14B, MEDIUM, hardware, granularity=chosen, **options)
            assert made.granularity == taken(made).granularity == chosen
            assert made.reasons["granularity"] == "chosen"
            streamed = [c for c in made.considered if c.candidate.placement.kind == STREAM]
            assert {c.candidate.placement.granularity for c in streamed} == {chosen}
    with pytest.raises(ValueError, match=r"vram_budget=1\.50 GB is too small.* 1\.9\d GB"):
        plan(WAN_14B, MEDIUM, vram_budget="1.5GB", granularity="block", mode="auto")


def test_the_least_budget_is_that_of_parts_unless_blocks_were_chosen() -> None:
    with pytest.raises(ValueError, match="the least that is possible") as failure:
        plan(WAN_14B, MEDIUM, vram_budget="0.5GB")
    least = choose_parts(
        real_parts(), 9 * GB // 10, others=DIT.other_bytes + DIT.loose_bytes, prefetch=None
    )
    assert least.depth == 0
    largest = max(part.nbytes for part in DIT.parts)
    nbytes = DIT.other_bytes + DIT.loose_bytes + -(-(largest + 256) // 2**21) * 2**21
    assert f"with these choices is {nbytes / GB:.2f} GB" in str(failure.value)
    assert in_parts(WAN_14B, card("24GiB"), vram_budget=nbytes).fits
    with pytest.raises(ValueError, match="the least that is possible"):
        plan(WAN_14B, MEDIUM, vram_budget=nbytes - 1)


def test_a_chosen_prefetch_counts_parts() -> None:
    for chosen, ahead in ((3, 3), (0.1, 13), (1, 1)):
        made = in_parts(
            WAN_14B,
            card("24GiB"),
            granularity="part",
            mode="memory",
            dit_offload_prefetch_size=chosen,
        )
        assert made.dit_offload_prefetch_size == ahead
        assert made.reasons["dit_offload_prefetch_size"] == "chosen"
    unset = in_parts(WAN_14B, card("24GiB"), granularity="part", mode="memory")
    assert unset.dit_offload_prefetch_size is None
    assert unset.reasons["dit_offload_prefetch_size"].startswith("rule 10")


def test_what_stands_in_parts_stays_so_and_changes_where_it_must() -> None:
    standing = replace(A14B, granularity="part", packed=0.0)
    assert plan(standing, MEDIUM, card("24GiB")).reasons["granularity"].endswith("stand already")
    assert in_parts(standing, card("24GiB"))
    as_blocks = plan(replace(standing, granularity="block"), MEDIUM, card("24GiB"))
    assert as_blocks.granularity == "block"


@pytest.mark.parametrize("kind", [RESIDENT, WHOLE])
def test_a_choice_of_parts_has_no_effect_where_nothing_is_streamed(kind: str) -> None:
    options = {"dit_layerwise_offload": False, "dit_cpu_offload": kind == WHOLE}
    made = plan(WAN_14B, MEDIUM, card("141GiB"), granularity="part", **options)
    assert (made.dit_layerwise_offload, made.granularity) == (False, "block")
    assert made.reasons["granularity"] == "rule 10: the DiT is not streamed"
    assert made.messages[-1] == (
        "granularity='part' has no effect: the DiT is not streamed (chosen)"
    )


@pytest.mark.parametrize("wrong", ["parts", 1, True, "Block"])
def test_what_is_no_granularity_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="granularity is 'block', 'part', 'auto' or None"):
        plan(WAN_14B, granularity=wrong)


# What is said.


def test_parts_are_in_the_table_only_where_they_matter() -> None:
    def compared(made: Plan) -> set[str]:
        streamed = [c for c in made.considered if c.candidate.placement.kind == STREAM]
        return {c.candidate.placement.granularity for c in streamed}

    assert compared(plan(A14B, MEDIUM, card("24GiB"))) == {"block"}
    assert compared(plan(A14B, MEDIUM, card("24GiB"), vram_budget="2.2GB")) == {"block", "part"}
    assert compared(plan(A14B, MEDIUM, card("24GiB"), mode="memory")) == {"part"}
    # The host is short, or the encoder's turn is what does not fit: parts would not help.
    short = replace(card("24GiB"), host_memory="10GB")
    assert compared(plan(A14B, MEDIUM, short)) == {"block"}
    encoder = ComponentFacts(other_bytes=30 * GB)
    with_encoder = replace(A14B, text_encoder=encoder)
    made = plan(with_encoder, MEDIUM, card("24GiB"))
    assert not made.fits
    assert compared(made) == {"block"}


def test_the_text_and_the_dictionary_have_the_granularity() -> None:
    made = in_parts(A14B, card("24GiB"), vram_budget="6GB", granularity="part", pack=False)
    text = made.explain()
    assert "The DiT is streamed in parts of its blocks; " in text
    assert "of 120 parts stay on the device" in text
    assert "granularity = part" in text
    assert "streamed in parts of blocks" in text
    values = json.loads(json.dumps(made.as_dict()))
    assert values["choices"]["granularity"] == "part"
    assert values["reasons"]["granularity"] == "chosen"
    assert values["considered"][0]["placement"]["granularity"] == "part"
    ahead = in_parts(A14B, None, granularity="part", dit_offload_prefetch_size=2)
    assert "in parts of its blocks, 2 ahead" in ahead.explain()
