"""Packing in the plan: what the cost model predicts of it, when it is taken, and what is said."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tests.test_policy import A14B as PLAIN_A14B
from tests.test_policy import DIT, GB, LARGE, MEDIUM, SMALL, TEXT_ENCODER, VAE, card, decided
from wanoffload.facts.model import DitFacts
from wanoffload.machine.hardware import Hardware
from wanoffload.policy import cost, packed, within
from wanoffload.policy.cost import RESIDENT, STREAM, WHOLE, Around, Placement
from wanoffload.policy.planning import Plan, plan
from wanoffload.workload import Workload

# 28 GB in blocks, all but 40 MB of it in bf16: 0.56 s plain and 0.395 s packed at 50 GB/s.
BF16 = 27_960_000_000
PACKABLE = replace(DIT, bf16_bytes=BF16)
A14B = replace(PLAIN_A14B, dits=(PACKABLE, PACKABLE))
DECODING = BF16 * 1.703 / (4000e9 * 0.79)  # 15 ms
NEAR = replace(MEDIUM, frames=9)  # 4,680 tokens: 0.468 s, between packed and plain copies
PARKED = TEXT_ENCODER.bytes + VAE.bytes


def predicted(share: float, workload: Workload = SMALL, prefetch: int = 2, **rates: Any) -> Any:
    placement = Placement(STREAM, prefetch, share)
    around = Around(WHOLE, WHOLE, WHOLE)
    return cost.predict(A14B, placement, around, workload, card(None, **rates))


# What packing takes.


def test_packed_blocks_send_their_ratio_of_bf16_and_all_of_the_rest() -> None:
    plain = 40 * 700_000_000
    assert predicted(0.0).link_bytes == plain
    assert predicted(1.0).link_bytes == plain - BF16 + BF16 * 0.703
    assert predicted(0.25).link_bytes == pytest.approx(plain - 0.25 * 0.297 * BF16)
    resident = cost.predict(A14B, Placement(RESIDENT), Around(), SMALL, card(None))
    assert (resident.link_bytes, resident.staging_bytes) == (0, 0)


def test_blocks_of_which_nothing_is_bf16_gain_nothing_by_packing() -> None:
    assert packed.link_bytes(DIT, 1.0) == packed.host_bytes(DIT, 1.0) == sum(DIT.block_bytes)
    assert packed.decode_seconds(DIT, 1.0, card(None)) == 0


def test_a_packed_step_is_never_quicker_than_its_link_or_compute_and_decoding() -> None:
    copies = (40 * 700_000_000 - 0.297 * BF16) / 50e9
    for workload, floor in ((SMALL, copies), (MEDIUM, 0.78 + DECODING), (LARGE, 3.276 + DECODING)):
        for prefetch in (1, 2):
            step = predicted(1.0, workload, prefetch).step_seconds
            assert 2 * floor <= step <= 2 * floor * 1.02


def test_where_the_link_binds_a_packed_step_takes_at_most_073_of_the_plain_one() -> None:
    tiny = replace(SMALL, frames=1)
    assert predicted(1.0, tiny).step_seconds <= 0.73 * predicted(0.0, tiny).step_seconds


def test_decoding_takes_longer_on_a_device_with_slower_memory() -> None:
    fast, slow = (predicted(1.0, LARGE, device_gb_per_s=rate) for rate in (4000, 1000))
    assert slow.step_seconds - fast.step_seconds == pytest.approx(2 * 3 * DECODING, rel=0.02)


def test_an_h200_decodes_2000_gigabytes_of_weights_a_second() -> None:
    seconds = packed.decode_seconds(PACKABLE, 1.0, cost.ASSUMED)
    assert BF16 / seconds / 1e9 == pytest.approx(2000, rel=0.01)


def test_fetching_when_needed_adds_copies_and_decoding_to_the_compute() -> None:
    copies = (40 * 700_000_000 - 0.297 * BF16) / 50e9
    assert predicted(1.0, SMALL, 0).step_seconds == pytest.approx(2 * (0.312 + DECODING + copies))


def test_several_videos_at_once_are_decoded_for_once() -> None:
    one, two = (predicted(1.0, replace(LARGE, videos=n)).step_seconds for n in (1, 2))
    assert two - one == pytest.approx(2 * 3.276, rel=1e-3)


def test_staging_is_three_chunks_whatever_the_share_and_at_most_160_megabytes() -> None:
    for share in (0.025, 1.0):
        candidate = predicted(share)
        assert candidate.staging_bytes == 3 * 48 * 2**20 <= 160e6
        beside = candidate.device_weight_bytes - predicted(0.0).device_weight_bytes
        assert beside == candidate.staging_bytes
    assert predicted(0.0).staging_bytes == 0
    small = DitFacts((1_000_000,) * 3, bf16_bytes=3_000_000)
    assert packed.staging_bytes(small, 1.0) == 3 * 703_000


def test_host_memory_is_planned_with_072_of_the_packed_bytes() -> None:
    assert predicted(0.0).host_locked_bytes == PARKED + 2 * 28 * GB
    saved = round(BF16 * 0.28)
    assert predicted(1.0).host_locked_bytes == PARKED + 2 * (28 * GB - saved)


def test_setting_up_packed_takes_half_as_long_again() -> None:
    plain, both = predicted(0.0).start_seconds, predicted(1.0).start_seconds
    assert both - plain == pytest.approx(0.5 * 56 / cost.LOCK_GB_PER_S)


# What stays under a budget.

ONE = replace(A14B, dits=(PACKABLE,), text_encoder=None, vae=None)
BUDGET = 12 * GB
UNSETTLED = 8 * GB  # that much of it is used at least as long as no rates are known
LITTLE = 3 * GB  # 2 slots, staging memory and what is in no block


def under(budget: int, workload: Workload | None = LARGE, share: float = 1.0, **rates: Any) -> Any:
    machine = card(None, **rates)
    return cost.predict(ONE, Placement(STREAM, 1, share), Around(), workload, machine, budget)


def test_no_more_of_a_budget_is_used_by_packed_blocks_than_makes_a_forward_quicker() -> None:
    assert under(BUDGET).device_weight_bytes < LITTLE
    assert UNSETTLED < under(BUDGET, SMALL).device_weight_bytes <= BUDGET
    faster = 20.0  # times as fast a device: copies take longer
    small = under(BUDGET, matmul_tflops=100 * faster, device_gb_per_s=4000 * faster)
    assert UNSETTLED < small.device_weight_bytes <= BUDGET


@pytest.mark.parametrize(("workload", "share"), [(None, 1.0), (LARGE, 0.0)])
def test_a_budget_is_used_up_where_compute_is_not_known_and_by_plain_blocks(
    workload: Workload | None, share: float
) -> None:
    assert UNSETTLED < under(BUDGET, workload, share).device_weight_bytes <= BUDGET


def test_what_a_budget_allows_must_fit_though_less_may_be_used_in_the_end() -> None:
    found = under(BUDGET)
    activations = 32760 * 100_000
    assert found.device_peak_bytes < LITTLE + activations
    assert found.device_need_bytes > UNSETTLED + activations


def test_several_videos_at_once_compute_longer_so_that_less_of_a_budget_is_used() -> None:
    assert under(BUDGET, replace(SMALL, videos=16)).device_weight_bytes < LITTLE


def test_what_a_budget_allows_must_fit_beside_other_components_to_stay_there() -> None:
    decoding = 480 * 832 * 20_000 * 1.1 + VAE.bytes + cost.RESERVE_BYTES
    for room, stays in ((decoding + BUDGET, True), (decoding + 6 * GB, False)):
        machine = card(f"{room / 1e9}GB")
        placement = Placement(STREAM, 1, 1.0)
        facts = replace(ONE, vae=VAE)
        found = cost.predict(facts, placement, Around(vae=WHOLE), LARGE, machine, BUDGET)
        assert found.kept_packed_units + found.resident_units < 3
        assert found.residents_stay is stays


@pytest.mark.parametrize("workload", [SMALL, MEDIUM, LARGE])
@pytest.mark.parametrize("budget", [BUDGET, 24 * GB, 40 * GB])
def test_a_packed_step_under_a_budget_is_that_of_the_residency(
    workload: Workload, budget: int
) -> None:
    compute = cost.forward_seconds(PACKABLE, A14B.tokens(workload), card(None))
    assert compute is not None
    rates = within.rates(compute, card(None))
    stays = within.residency(PACKABLE, 1.0, 1, budget, "block", rates)
    assert stays is not None
    assert stays.seconds is not None
    found = under(budget, workload)
    moved = sum(within.kept_bytes(ONE, [stays])) / 50e9
    again = 0 if found.residents_stay else moved / workload.steps
    assert found.step_seconds == pytest.approx(2 * stays.seconds + again)
    assert found.device_weight_bytes == stays.device_bytes
    assert found.link_bytes == stays.streamed_bytes
    assert found.kept_packed_units == len(stays.kept_packed)


def test_a_plan_tells_what_the_forwards_of_each_expert_are_up_against() -> None:
    chosen: dict[str, Any] = {"dit_layerwise_offload": True, "pack": True}
    made = plan(A14B, MEDIUM, card("80GB"), vram_budget="12GB", **chosen)
    assert made.rates == [within.rates(0.78, card("80GB"))] * 2
    two = plan(A14B, replace(MEDIUM, videos=2), card("80GB"), vram_budget="12GB", **chosen)
    assert two.rates == [within.rates(2 * 0.78, card("80GB"))] * 2
    plain = {**chosen, "pack": False}
    for workload, machine, options in (
        (None, card("80GB"), {**chosen, "vram_budget": "12GB"}),
        (MEDIUM, None, {**chosen, "vram_budget": "12GB"}),
        (MEDIUM, card("80GB"), chosen),
        (MEDIUM, card("80GB"), {**plain, "vram_budget": "12GB"}),
        (MEDIUM, card("80GB"), {**chosen, "vram_budget": "12GB", "granularity": "part"}),
    ):
        assert plan(A14B, workload, machine, **options).rates == [None, None]


def test_a_forward_is_up_against_what_the_machine_has() -> None:
    rates = within.rates(0.3, card(None))
    assert (rates.link_gb_per_s, rates.compute_s) == (50, 0.3)
    assert BF16 / rates.decode_gb_per_s / 1e9 == pytest.approx(DECODING)


# As many blocks as the link needs.


def quicker(share: float, compute: float) -> bool:
    """Whether the link is quicker than compute, by the margin."""
    machine = card(None)
    busy = compute + packed.decode_seconds(PACKABLE, share, machine)
    return packed.copy_seconds(PACKABLE, share, machine) <= (1 - packed.MARGIN) * busy


@pytest.mark.parametrize("compute", [0.4, 0.42, 0.45, 0.5, 0.55, 0.57])
def test_no_more_blocks_are_packed_than_the_link_needs(compute: float) -> None:
    share = packed.share_needed(PACKABLE, compute, card(None))
    count = share * 40
    assert count == pytest.approx(round(count))
    assert 0 < share < 1
    assert quicker(share, compute)
    assert not quicker(share - 1 / 40, compute)


def test_none_are_needed_where_plain_copies_hide_and_all_where_not_even_packed_ones_do() -> None:
    machine = card(None)
    assert packed.share_needed(PACKABLE, 0.6, machine) == 0
    assert packed.share_needed(PACKABLE, 0.1, machine) == 1
    assert packed.share_needed(DIT, 0.1, machine) == 0
    assert packed.share_needed(DitFacts(), 0.1, machine) == 0


def test_the_slower_expert_says_how_many_are_needed() -> None:
    larger = replace(A14B, dits=(PACKABLE, replace(PACKABLE, matmul_flops_per_token=5e9)))
    assert cost.share_needed(larger, NEAR, card(None)) == 1
    unknown = replace(A14B, dits=(PACKABLE, DitFacts()))
    assert cost.share_needed(unknown, NEAR, card(None)) is None


def test_packing_some_is_quicker_than_packing_none_or_all_where_copies_are_as_long_as_compute() -> (
    None
):
    share = cost.share_needed(A14B, NEAR, card(None))
    assert share is not None
    none, some, every = (predicted(s, NEAR).step_seconds for s in (0.0, share, 1.0))
    assert some < every < none


# What is taken.


@pytest.mark.parametrize(
    ("workload", "share"), [(SMALL, 1.0), (MEDIUM, None), (LARGE, None)], ids=str
)
def test_auto_packs_where_the_link_binds_and_nothing_else(
    workload: Workload, share: float | None
) -> None:
    made, found = decided(A14B, workload, card("24GiB"))
    assert found.kind == STREAM
    assert (made.pack, made.pack_share) == (share is not None, share)
    assert found.packed == (share or 0.0)


def test_auto_packs_some_where_that_is_enough() -> None:
    made, found = decided(A14B, NEAR, card("24GiB"))
    assert made.pack
    assert made.pack_share == cost.share_needed(A14B, NEAR, card(None))
    count = round(40 * found.packed)
    assert 10 < count < 40
    assert f"{count} of 40 blocks packed" in made.explain()
    assert (
        f"cost model: {count} of 40 blocks, evenly spread; the link binds" in made.reasons["pack"]
    )


def test_nothing_is_packed_that_is_not_streamed() -> None:
    made, found = decided(A14B, SMALL, card("141GiB"))
    assert found == Placement(RESIDENT)
    assert (made.pack, made.pack_share, made.forms) == (False, None, ())
    assert made.reasons["pack"] == "rule 9: the DiT is not streamed"
    both, _ = decided(A14B, SMALL, card("141GiB"), pack=True)
    assert not both.pack
    assert "pack=True has no effect: the DiT is not streamed (cost model" in both.messages[-1]


def test_what_streams_by_the_cost_model_is_packed_by_it_too() -> None:
    one = replace(A14B, a14b=False, dits=(PACKABLE,))
    made, found = decided(one, SMALL, card("20GB"))
    assert found == Placement(STREAM, 1, 1.0)
    assert made.reasons["dit_layerwise_offload"].startswith("cost model over rule 2: streamed")
    assert made.reasons["pack"].startswith("cost model: all blocks; the link binds")


def test_a_choice_wins_over_the_cost_model_both_ways() -> None:
    kept, found = decided(A14B, SMALL, card("24GiB"), pack=False)
    assert (kept.pack, kept.pack_share, found.packed) == (False, 0.0, 0.0)
    made, found = decided(A14B, LARGE, card("24GiB"), pack=True)
    assert (made.pack, made.pack_share, found.packed) == (True, 1.0, 1.0)
    assert kept.reasons["pack"] == made.reasons["pack"] == "chosen"
    assert kept.messages == made.messages == ()
    assert {each.candidate.placement.packed for each in kept.considered} == {0.0}


def test_memory_mode_packs_only_for_the_host() -> None:
    made, _ = decided(A14B, SMALL, card("24GiB"), mode="memory")
    assert not made.pack
    assert "plain takes less device memory" in made.reasons["pack"]
    short, _ = decided(A14B, SMALL, card("24GiB", host="64GB"), mode="memory")
    assert short.pack_share == 1.0


@pytest.mark.parametrize("workload", [None, LARGE])
def test_auto_packs_where_the_host_has_too_little_for_plain_blocks(
    workload: Workload | None,
) -> None:
    made, found = decided(A14B, workload, card("24GiB", host="64GB"))
    assert made.fits
    assert found.packed == 1.0
    assert "plain does not fit: locks 68.10 GB of host memory" in made.reasons["pack"]
    (message,) = (m for m in made.messages if m.startswith("blocks of the DiT are stored packed"))
    assert "plain does not fit" in message
    refused, _ = decided(A14B, workload, card("24GiB", host="64GB"), pack=False)
    assert not refused.fits
    assert "leaving out pack" in refused.messages[-1]


def test_a_prefetch_that_the_rules_set_stays_where_the_form_alone_changes() -> None:
    made, found = decided(A14B, None, card("24GiB", host="64GB"))
    assert found == Placement(STREAM, 2, 1.0)
    assert made.reasons["dit_offload_prefetch_size"].startswith("rule 3")


def test_packed_in_memory_is_taken_before_plain_on_disk() -> None:
    in_files = replace(A14B, blocks_in_files=True)
    made, _ = decided(in_files, LARGE, card("24GiB", host="64GB"))
    assert made.pack
    assert made.step_seconds is not None
    short, _ = decided(in_files, LARGE, card("24GiB", host="32GB"))
    assert (short.fits, short.pack, short.step_seconds) == (True, False, None)
    assert short.reasons["pack"] == "rule 9: plain, as in the files"
    assert {each.candidate.placement.packed for each in short.considered} == {0.0}
    chosen, found = decided(in_files, LARGE, card("24GiB", host="32GB"), pack=True)
    assert (chosen.fits, found.packed) == (True, 1.0)


@pytest.mark.parametrize("mode", ["speed", "manual"])
def test_speed_and_manual_pack_only_if_asked(mode: str) -> None:
    streamed = {"mode": mode, "dit_layerwise_offload": True, "dit_offload_prefetch_size": 3}
    made, found = decided(A14B, SMALL, card("24GiB"), **streamed)
    assert found == Placement(STREAM, 3)
    asked, found = decided(A14B, SMALL, card("24GiB"), pack="auto", **streamed)
    assert found == Placement(STREAM, 3, 1.0)
    plain, found = decided(A14B, LARGE, card("24GiB"), pack="auto", **streamed)
    assert found == Placement(STREAM, 3)
    assert made.reasons["pack"].startswith("rule 9")
    assert asked.reasons["pack"].startswith("cost model: all blocks")
    assert plain.reasons["pack"].startswith("cost model: plain; packing would gain nothing")


def test_where_a_mode_does_not_pack_by_itself_packing_is_the_advice() -> None:
    streamed = {"dit_layerwise_offload": True, "mode": "manual", "text_encoder_cpu_offload": True}
    made, _ = decided(A14B, LARGE, card("24GiB", host="64GB"), **streamed)
    assert not made.fits
    assert "What fits: pack=True, which needs" in made.messages[-1]
    helped, _ = decided(A14B, LARGE, card("24GiB", host="64GB"), **streamed, pack=True)
    assert helped.fits


@pytest.mark.parametrize("platform", ["cpu", "rocm"])
def test_nothing_is_packed_by_itself_where_there_is_no_cuda(platform: str) -> None:
    machine = Hardware(platform=platform, host_memory="64GB")
    made = plan(A14B, LARGE, machine, dit_layerwise_offload=True, text_encoder_cpu_offload=True)
    assert not made.pack
    assert made.reasons["pack"] == f"rule 9: platform {platform} is not supported"
    chosen = plan(A14B, LARGE, machine, dit_layerwise_offload=True, pack=True)
    assert chosen.pack


# What stands packed already.


def seen_before(share: float, workload: Workload, **arguments: Any) -> Plan:
    return plan(replace(A14B, packed=share), workload, card("24GiB", **arguments))


def test_blocks_are_not_brought_into_another_form_for_little() -> None:
    assert not plan(A14B, LARGE, card("24GiB")).pack
    for workload in (LARGE, MEDIUM):
        kept = seen_before(1.0, workload)
        assert kept.pack_share == 1.0
        assert "as they stand already" in kept.reasons["pack"]
    assert seen_before(0.25, NEAR).pack_share == 0.25


def test_blocks_are_brought_into_another_form_where_one_generation_gains_by_it() -> None:
    assert seen_before(0.0, replace(SMALL, steps=100)).pack_share == 1.0
    few = seen_before(0.0, replace(SMALL, steps=10))
    assert few.pack_share is None
    assert "plain, as they stand already" in few.reasons["pack"]
    assert seen_before(1.0, replace(MEDIUM, steps=10_000)).pack_share == 0.0
    needed = cost.share_needed(A14B, NEAR, card(None))
    assert seen_before(0.25, replace(NEAR, steps=1000)).pack_share == needed


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_what_stands_packed_stays_so_where_nothing_decides(share: float) -> None:
    facts = replace(A14B, packed=share)
    streamed: dict[str, Any] = {"dit_layerwise_offload": True}
    cpu = Hardware(platform="cpu")
    for made in (
        plan(facts),
        plan(facts, None, card("24GiB")),
        plan(facts, LARGE, card("24GiB"), mode="manual", **streamed),
        plan(facts, LARGE, cpu, **streamed),
    ):
        assert made.pack_share == share
        assert made.reasons["pack"] == "rule 9: as the blocks stand already"
        assert not any("packed" in message for message in made.messages)
    assert plan(facts, pack=False).pack_share == 0.0
    resident = plan(facts, SMALL, card("141GiB"))
    assert (resident.pack, resident.pack_share) == (False, None)


def test_packing_that_the_host_needs_is_done_whatever_it_takes() -> None:
    assert seen_before(0.0, replace(SMALL, steps=1), host="64GB").pack_share == 1.0


# What is said.


def test_the_text_shows_plain_and_packed_beside_each_other() -> None:
    text = plan(A14B, SMALL, card("24GiB")).explain()
    assert "streamed block by block, 1 ahead, packed" in text
    table = text.split("Plain or packed:\n")[1].split("\n\n")[0].splitlines()
    plain, both = (" ".join(line.split()) for line in table)
    assert plain.startswith("plain 28.00 GB over the link a forward, 1.129 s")
    assert plain.endswith("68.10 GB page-locked: fits")
    assert both.startswith("packed 19.70 GB over the link a forward, 0.7976 s")
    assert both.endswith("52.44 GB page-locked, 0.15 GB of staging on the device: taken")
    assert "pack = True " in text


def test_the_text_shows_both_where_one_was_chosen_and_where_nothing_is_known() -> None:
    for made in (plan(A14B, SMALL, card("24GiB"), pack=False), plan(A14B)):
        table = made.explain().split("Plain or packed:\n")[1]
        assert "plain   28.00 GB over the link a forward" in table
        assert "packed  19.70 GB over the link a forward" in table
    assert "Plain or packed" not in plan(PLAIN_A14B).explain()


def test_packing_is_said_in_the_log_with_the_times() -> None:
    (message,) = plan(A14B, SMALL, card("24GiB")).messages
    assert message.startswith("blocks of the DiT are stored packed: all blocks; the link binds, ")
    assert message.endswith(" s packed")
    assert plan(A14B, LARGE, card("24GiB")).messages == ()


def test_what_does_not_fit_packed_either_is_said_of_both() -> None:
    made = plan(A14B, LARGE, card("24GiB", host="32GB"))
    assert not made.fits
    assert "68.10 GB of host memory" in made.messages[-1]
    assert "streamed, prefetch 1, packed: locks 52.44 GB" in made.messages[-1]
    assert made.pack_share is None


def test_the_dictionary_has_the_forms_and_the_share() -> None:
    again = json.loads(json.dumps(plan(A14B, SMALL, card("24GiB")).as_dict()))
    assert again["choices"]["pack"] is True
    assert again["pack_share"] == 1.0
    shares = [form["placement"]["packed"] for form in again["forms"]]
    assert shares == [0.0, 1.0]
    assert again["forms"][1]["link_bytes"] < again["forms"][0]["link_bytes"]
