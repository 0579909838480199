"""The planner: what the cost model predicts, what it decides, and what a plan says."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from wanoffload.facts.model import MOVA, QWEN_IMAGE, WAN, ComponentFacts, DitFacts, ModelFacts
from wanoffload.machine.hardware import Hardware
from wanoffload.policy import cost
from wanoffload.policy.cost import RESIDENT, STREAM, WHOLE, Around, Placement
from wanoffload.policy.explain import taken
from wanoffload.policy.planning import Plan, plan
from wanoffload.sizes import gb
from wanoffload.workload import Workload

GB = 10**9

# 40 blocks of 0.7 GB, 10^10 flops a token and nothing else: at 100 TFLOP/s a token takes 0.1 ms.
DIT = DitFacts(
    block_bytes=(700_000_000,) * 40,
    other_bytes=500_000_000,
    matmul_flops_per_token=1e10,
    kernels=1000,
    activation_bytes_per_token=100_000,
)
TEXT_ENCODER = ComponentFacts(block_bytes=(400_000_000,) * 24, other_bytes=2 * GB)
VAE = ComponentFacts(other_bytes=500_000_000, activation_bytes_per_pixel=20_000)
WAN_14B = ModelFacts("wan 14b", WAN, dits=(DIT,), text_encoder=TEXT_ENCODER, vae=VAE)
A14B = replace(WAN_14B, name="a14b", a14b=True, dits=(DIT, DIT))

# Blocks take 28 GB / 50 GB/s = 0.56 s a forward.
RATES: dict[str, Any] = {
    "link_gb_per_s": 50,
    "pageable_gb_per_s": 10,
    "matmul_tflops": 100,
    "attention_tflops": 100,
    "device_gb_per_s": 4000,
    "launch_us": 5,
}
SMALL = Workload(480, 832, 5, steps=40)  # 3,120 tokens: 0.312 s a forward, copies take longer
MEDIUM = Workload(480, 832, 17, steps=40)  # 7,800 tokens: 0.78 s a forward
LARGE = Workload(480, 832, 81, steps=40)  # 32,760 tokens: 3.276 s a forward, copies are nothing


def card(device: str | None, host: str | None = "256GB", **more: Any) -> Hardware:
    return Hardware(device_memory=device, host_memory=host, **{**RATES, **more})


def decided(
    facts: ModelFacts,
    workload: Workload | None,
    hardware: Hardware | None,
    **arguments: Any,
) -> tuple[Plan, Placement]:
    made = plan(facts, workload, hardware, **arguments)
    return made, taken(made)


# Predictions.


def predicted(placement: Placement, facts: ModelFacts = WAN_14B, **arguments: Any) -> Any:
    around = arguments.get("around", Around(WHOLE, WHOLE, WHOLE))
    workload = arguments.get("workload", MEDIUM)
    return cost.predict(facts, placement, around, workload, card(None))


def test_a_resident_step_is_its_flops_over_the_rate_for_both_forwards() -> None:
    assert predicted(Placement(RESIDENT)).step_seconds == pytest.approx(2 * 0.78)
    without_guidance = replace(MEDIUM, guidance=1.0)
    candidate = predicted(Placement(RESIDENT), workload=without_guidance)
    assert candidate.step_seconds == pytest.approx(0.78)


def test_several_videos_at_once_take_the_weights_once() -> None:
    two = replace(SMALL, videos=2)
    assert predicted(Placement(RESIDENT), workload=two).step_seconds == pytest.approx(4 * 0.312)
    streamed = predicted(Placement(STREAM, 2), workload=two).step_seconds
    assert 4 * 0.312 <= streamed <= 4 * 0.312 * 1.02
    only_dit = replace(WAN_14B, vae=None, text_encoder=None)
    one, both = (predicted(Placement(RESIDENT), only_dit, workload=w) for w in (SMALL, two))
    assert both.device_peak_bytes - one.device_peak_bytes == 3120 * 100_000
    with_vae = replace(WAN_14B, text_encoder=None)
    peaks = [predicted(Placement(STREAM, 1), with_vae, workload=w) for w in (SMALL, two)]
    assert peaks[1].device_peak_bytes > 1.8 * peaks[0].device_peak_bytes
    assert "2 at once" in str(two)
    with pytest.raises(ValueError, match="videos"):
        replace(SMALL, videos=0)


def test_attention_and_traffic_add_to_the_products() -> None:
    dit = replace(
        DIT,
        matmul_flops=7e12,
        attention_flops_per_token=1e8,
        attention_flops_per_token_squared=1e5,
        traffic_bytes_per_token=1e6,
    )
    found = cost.forward_seconds(dit, 1000, card(None))
    traffic = 1e9 / 4e12 / cost.TRAFFIC_EFFICIENCY + 1e9 / 1e14 / cost.TRAFFIC_PER_FLOP
    assert found == pytest.approx(0.1 + 0.07 + 0.001 + 0.001 + traffic)


def test_a_forward_takes_at_least_the_time_to_launch_it() -> None:
    few = cost.forward_seconds(DIT, 1, card(None))
    assert few == pytest.approx(1000 * 5e-6 * cost.LAUNCH_FACTOR)


def test_a_streamed_step_is_never_quicker_than_the_link_or_the_device() -> None:
    for workload, floor in ((SMALL, 0.56), (MEDIUM, 0.78), (LARGE, 3.276)):
        for prefetch in (1, 2):
            candidate = predicted(Placement(STREAM, prefetch), workload=workload)
            assert 2 * floor <= candidate.step_seconds <= 2 * floor * 1.02


def test_one_block_ahead_costs_more_than_two_only_where_both_take_the_same_time() -> None:
    def loss(workload: Workload) -> float:
        one, two = (predicted(Placement(STREAM, n), workload=workload) for n in (1, 2))
        return float(one.step_seconds / two.step_seconds - 1)

    near = replace(MEDIUM, frames=13)  # 6,240 tokens, 0.624 s
    assert loss(near) > 0.003 > loss(LARGE) > 0


def test_fetching_when_needed_adds_the_copies_to_the_compute() -> None:
    assert predicted(Placement(STREAM, 0)).step_seconds == pytest.approx(2 * (0.78 + 0.56))


def test_moving_the_whole_dit_is_spread_over_the_steps() -> None:
    both = predicted(Placement(WHOLE), A14B)
    assert both.step_seconds == pytest.approx(2 * 0.78 + 2 * 28.5 / 50 / 40)
    few_steps = predicted(Placement(WHOLE), A14B, workload=replace(MEDIUM, steps=4))
    assert few_steps.step_seconds == pytest.approx(2 * 0.78 + 2 * 28.5 / 50 / 4)


def test_weights_on_the_device_are_both_experts_or_one_or_the_slots() -> None:
    assert predicted(Placement(RESIDENT), A14B).device_weight_bytes == 2 * 28_500_000_000
    assert predicted(Placement(WHOLE), A14B).device_weight_bytes == 28_500_000_000
    slots = 3 * 700_000_000 + cost.SLOT_LEAD_BYTES
    streamed = predicted(Placement(STREAM, 2), A14B)
    assert streamed.device_weight_bytes == slots + 2 * 500_000_000


def test_there_are_no_more_slots_than_blocks() -> None:
    few = replace(DIT, block_bytes=(700_000_000,) * 2)
    candidate = predicted(Placement(STREAM, 5), replace(WAN_14B, dits=(few,)))
    assert candidate.device_weight_bytes == 2 * 700_000_000 + cost.SLOT_LEAD_BYTES + few.other_bytes


def test_the_peak_is_that_of_the_worst_stage() -> None:
    pixels = 480 * 832
    decoding = 500_000_000 + round(pixels * 20_000 * (1 + cost.CONVOLUTION_WORKSPACES))
    streamed = predicted(Placement(STREAM, 1), replace(WAN_14B, text_encoder=None))
    assert streamed.device_peak_bytes == 500_000_000 + decoding
    resident = predicted(Placement(RESIDENT))
    encoding = TEXT_ENCODER.bytes  # parked, it is there as a whole
    assert resident.device_peak_bytes == 28_500_000_000 + max(decoding, encoding)
    denoising = 28_500_000_000 + 7800 * 100_000
    small_vae = replace(WAN_14B, vae=replace(VAE, activation_bytes_per_pixel=1), text_encoder=None)
    assert predicted(Placement(RESIDENT), small_vae).device_peak_bytes == denoising


def test_components_that_stay_on_the_device_count_at_every_stage() -> None:
    only_text = replace(WAN_14B, vae=None)
    large = 32_760 * 100_000
    parked = predicted(Placement(RESIDENT), only_text, workload=LARGE)
    standing = predicted(Placement(RESIDENT), only_text, workload=LARGE, around=Around())
    assert parked.device_peak_bytes == DIT.bytes + max(large, TEXT_ENCODER.bytes)
    assert standing.device_peak_bytes == DIT.bytes + TEXT_ENCODER.bytes + large


def test_a_streamed_encoder_takes_its_slots_and_its_rest() -> None:
    only_text = replace(WAN_14B, vae=None)
    around = Around(STREAM, STREAM, WHOLE)
    workload = Workload(16, 16)
    found = predicted(Placement(STREAM, 1), only_text, around=around, workload=workload)
    text_stage = 500_000_000 + 2 * GB + 3 * 400_000_000 + cost.SLOT_LEAD_BYTES
    assert found.device_peak_bytes == text_stage


def test_what_is_streamed_or_parked_is_locked_once() -> None:
    assert predicted(Placement(RESIDENT), around=Around()).host_locked_bytes == 0
    parked = TEXT_ENCODER.bytes + VAE.bytes
    assert predicted(Placement(RESIDENT)).host_locked_bytes == parked
    assert predicted(Placement(WHOLE), A14B).host_locked_bytes == parked + 57 * GB
    assert predicted(Placement(STREAM, 2), A14B).host_locked_bytes == parked + 56 * GB


# What auto takes when both are known.


@pytest.mark.parametrize(
    ("workload", "device", "expected"),
    [
        (MEDIUM, "141GiB", Placement(RESIDENT)),
        (MEDIUM, "80GiB", Placement(RESIDENT)),
        (MEDIUM, "48GiB", Placement(STREAM, 1)),
        (SMALL, "48GiB", Placement(WHOLE)),
        (SMALL, "24GiB", Placement(STREAM, 1)),
        (LARGE, "141GiB", Placement(STREAM, 1)),
        (LARGE, "24GiB", Placement(STREAM, 1)),
    ],
)
def test_auto_takes_the_fastest_that_fits_and_of_equals_the_smallest(
    workload: Workload, device: str, expected: Placement
) -> None:
    made, found = decided(A14B, workload, card(device))
    assert found == expected
    assert made.fits


def test_a14b_with_room_does_not_lose_time_to_streaming() -> None:
    made, found = decided(A14B, SMALL, card("141GiB"))
    assert found == Placement(RESIDENT)
    assert made.dit_layerwise_offload is False
    assert made.layerwise_offload_components == ["text_encoder", "image_encoder", "vae"]
    reason = made.reasons["dit_layerwise_offload"]
    assert reason.startswith("cost model over rule 2")
    assert "faster than streamed, prefetch 2" in reason
    assert "cost model over rule 2" in made.explain()


def test_a_wan_model_that_no_rule_turns_on_is_streamed_where_that_costs_nothing() -> None:
    made, found = decided(WAN_14B, LARGE, card("80GiB"))
    assert found == Placement(STREAM, 1)
    assert made.layerwise_offload_components[0] == "dit"
    assert "less device memory than resident" in made.reasons["dit_layerwise_offload"]


@pytest.mark.parametrize("family", [QWEN_IMAGE, MOVA])
def test_other_families_are_streamed_only_when_what_the_rules_say_does_not_fit(family: str) -> None:
    facts = replace(WAN_14B, family=family)
    _, roomy = decided(facts, LARGE, card("80GiB"))
    assert roomy.kind != STREAM
    made, tight = decided(facts, LARGE, card("24GiB"))
    assert tight.kind == STREAM
    assert "does not fit" in made.reasons["dit_layerwise_offload"]


def test_a_distilled_variant_is_streamed_only_when_what_the_rules_say_does_not_fit() -> None:
    facts = replace(WAN_14B, dmd_denoising_steps=(1000, 500))
    assert decided(facts, LARGE, card("80GiB"))[1].kind != STREAM
    assert decided(facts, LARGE, card("24GiB"))[1].kind == STREAM


def test_a_dit_of_another_family_that_does_not_fit_is_run_in_the_fastest_way() -> None:
    facts = replace(WAN_14B, family=QWEN_IMAGE)
    few_steps = replace(LARGE, steps=2)
    card_for_whole = card("36GB")  # during decoding the resident DiT has too little room
    made, found = decided(facts, few_steps, card_for_whole)
    verdicts = {str(c.candidate.placement): c.obstacle for c in made.considered}
    assert verdicts["resident"] is not None
    assert verdicts["whole, to the device and back"] is None
    assert found.kind == STREAM
    chosen, found = decided(facts, few_steps, card_for_whole, dit_cpu_offload=True)
    assert found == Placement(WHOLE)
    assert "fits, but rule 1 rules it out" in chosen.explain()


def test_a_dit_whose_weights_alone_do_not_fit_is_streamed_without_a_workload() -> None:
    for facts in (WAN_14B, replace(WAN_14B, family=QWEN_IMAGE)):
        made, found = decided(facts, None, card("24GiB"))
        assert found == Placement(STREAM, 2)
        assert made.dit_offload_prefetch_size == 2
        assert decided(facts, None, card("80GiB"))[1] == Placement(RESIDENT)


def test_memory_mode_takes_the_least_device_memory() -> None:
    made, found = decided(A14B, SMALL, card("141GiB"), mode="memory")
    assert found == Placement(STREAM, 1)
    assert made.device_peak_bytes == min(
        each.candidate.device_peak_bytes for each in made.considered
    )


@pytest.mark.parametrize("mode", ["speed", "manual"])
def test_speed_and_manual_are_not_overruled(mode: str) -> None:
    made, found = decided(A14B, LARGE, card("141GiB"), mode=mode)
    assert found == Placement(RESIDENT)
    tight, found = decided(A14B, LARGE, card("24GiB"), mode=mode)
    assert found == Placement(RESIDENT)
    assert made.fits
    assert not tight.fits
    assert "needs" in tight.messages[-1]
    assert "does not fit" in tight.explain()


# Choices are never overruled.


def test_a_chosen_layerwise_stays_where_resident_is_faster() -> None:
    made, found = decided(A14B, SMALL, card("141GiB"), dit_layerwise_offload=True)
    assert found.kind == STREAM
    assert made.layerwise_offload_components == ["dit"]
    assert made.reasons["dit_layerwise_offload"] == "chosen"


def test_a_refused_layerwise_stays_off_where_nothing_else_fits() -> None:
    made, found = decided(A14B, LARGE, card("24GiB"), dit_layerwise_offload=False)
    assert found == Placement(RESIDENT)
    assert not made.fits
    made, found = decided(A14B, SMALL, card("48GiB"), dit_layerwise_offload=False)
    assert found == Placement(WHOLE)


def test_components_chosen_without_the_dit_keep_it_from_being_streamed() -> None:
    made, found = decided(A14B, LARGE, card("80GiB"), layerwise_offload_components="vae")
    assert found.kind != STREAM
    assert made.layerwise_offload_components == ["vae"]


def test_a_chosen_prefetch_is_obeyed() -> None:
    for size, expected in ((3, 3), (1, 1), (0.1, 5)):
        made, found = decided(A14B, LARGE, card("80GiB"), dit_offload_prefetch_size=size)
        assert found == Placement(STREAM, expected)
        assert made.reasons["dit_offload_prefetch_size"] == "chosen"


def test_a_chosen_prefetch_that_gets_its_use_from_the_cost_model_is_no_message() -> None:
    made, found = decided(WAN_14B, LARGE, card("80GiB"), dit_offload_prefetch_size=3)
    assert found == Placement(STREAM, 3)
    assert not any("no effect" in message for message in made.messages)
    unused, _ = decided(WAN_14B, None, None, dit_offload_prefetch_size=3)
    assert any("no effect" in message for message in unused.messages)


def test_chosen_cpu_offload_is_whole_where_it_fits_and_streamed_where_it_does_not() -> None:
    made, found = decided(A14B, LARGE, card("80GiB"), dit_cpu_offload=True)
    assert (found, made.dit_cpu_offload) == (Placement(WHOLE), True)
    made, found = decided(A14B, LARGE, card("24GiB"), dit_cpu_offload=True)
    assert (found.kind, made.dit_cpu_offload) == (STREAM, True)
    made, found = decided(A14B, SMALL, card("48GiB"), dit_cpu_offload=False)
    assert (found.kind, made.dit_cpu_offload) == (STREAM, False)


def test_a_sharded_dit_and_one_that_its_caller_shards_are_left_alone() -> None:
    for facts, choices in (
        (replace(A14B, sharded=True), {}),
        (A14B, {"use_fsdp_inference": True}),
    ):
        _, found = decided(facts, LARGE, card("24GiB"), **choices)
        assert found == Placement(RESIDENT)


def test_cache_dit_keeps_the_dit_from_being_streamed() -> None:
    made, found = decided(replace(A14B, cache_dit=True), LARGE, card("48GiB"))
    assert found == Placement(WHOLE)
    made, _ = decided(replace(A14B, cache_dit=True), LARGE, card("24GiB"))
    assert not made.fits


def test_other_platforms_are_not_overruled() -> None:
    _, found = decided(A14B, LARGE, card("24GiB", platform="rocm"))
    assert found == Placement(RESIDENT)


# Limits.


def test_a_budget_for_weights_is_kept_whatever_the_rules_say() -> None:
    made, found = decided(WAN_14B, None, None, vram_budget="12GB")
    assert found == Placement(STREAM, 2)
    assert made.vram_budget == 12 * GB
    made, found = decided(A14B, SMALL, card("141GiB"), vram_budget="30GB")
    assert found == Placement(WHOLE)


def test_a_budget_below_the_least_is_an_error_that_names_the_least() -> None:
    with pytest.raises(ValueError, match=r"vram_budget=1\.00 GB .* least .* 1\.90 GB"):
        plan(WAN_14B, vram_budget="1GB")
    with pytest.raises(ValueError, match="vram_budget"):
        plan(WAN_14B, vram_budget="12GB", mode="speed")


def test_a_fraction_is_one_of_the_devices_memory() -> None:
    for fraction, nbytes in ((0.5, 40 * GB), (1.0, 80 * GB), (0.25, 20 * GB)):
        made = plan(A14B, SMALL, card("80GB"), vram_budget=fraction)
        assert made.vram_budget == nbytes
        assert made.reasons["vram_budget"] == f"chosen: {fraction:g} of 80.00 GB"
        same = plan(A14B, SMALL, card("80GB"), vram_budget=nbytes)
        assert (taken(made), made.step_seconds) == (taken(same), same.step_seconds)
    with pytest.raises(ValueError, match=r"vram_budget=0\.80 GB is too small"):
        plan(A14B, SMALL, card("80GB"), vram_budget=0.01)


@pytest.mark.parametrize(
    ("hardware", "missing"),
    [(None, "no hardware was given"), (card(None), "hardware has no device_memory")],
)
def test_a_fraction_of_what_is_not_known_is_an_error_that_says_what_is_missing(
    hardware: Hardware | None, missing: str
) -> None:
    with pytest.raises(ValueError, match=rf"vram_budget=0\.5 is a fraction.*{missing}.*probe"):
        plan(A14B, SMALL, hardware, vram_budget=0.5)


def test_an_automatic_budget_is_predicted_by_what_activations_leave() -> None:
    streamed: dict[str, Any] = {"dit_layerwise_offload": True, "pack": False}
    blocks = []
    for workload in (SMALL, MEDIUM, LARGE):
        made = plan(A14B, workload, card("24GiB"), vram_budget="auto", **streamed)
        assert (made.vram_budget, made.budget_of_one) == ("auto", "auto")
        assert made.reasons["vram_budget"] == "chosen"
        assert made.fits
        assert not made.residents_stay
        assert made.messages == ()
        candidate = next(
            c.candidate for c in made.considered if c.candidate.placement == taken(made)
        )
        blocks.append(candidate.staying_units)
        plain = plan(A14B, workload, card("24GiB"), **streamed)
        assert made.step_seconds is not None
        assert plain.step_seconds is not None
        assert made.step_seconds <= plain.step_seconds * 1.02  # what stays comes once a generation
        assert candidate.device_need_bytes <= 24 * 1024**3
    assert blocks[0] > blocks[1] > blocks[2] > 0
    others = TEXT_ENCODER.bytes + VAE.bytes  # they are not in the list, and stay
    room = 24 * 1024**3 - cost.RESERVE_BYTES - round(1.1 * 3120 * 100_000) - others
    slots = predicted(Placement(STREAM, 1), A14B).device_weight_bytes
    assert slots + 700_000_000 * (blocks[0] - 1) <= room < slots + 700_000_000 * (blocks[0] + 2)


def test_what_an_automatic_budget_keeps_comes_anew_with_each_generation() -> None:
    options: dict[str, Any] = {"dit_layerwise_offload": True, "pack": False, "mode": "manual"}
    only_dit = replace(WAN_14B, text_encoder=None, vae=None)
    auto = plan(only_dit, SMALL, card("24GiB"), vram_budget="auto", **options)
    (candidate,) = (each.candidate for each in auto.considered)
    assert not candidate.residents_stay
    weights = candidate.device_weight_bytes
    given = plan(only_dit, SMALL, card("24GiB"), vram_budget=weights, **options)
    assert auto.step_seconds is not None
    assert given.step_seconds is not None
    moved = candidate.staying_units * 700_000_000
    assert auto.step_seconds - given.step_seconds == pytest.approx(moved / 50e9 / 40, rel=0.02)


def test_an_automatic_budget_that_leaves_nothing_streams_all() -> None:
    options: dict[str, Any] = {
        "vram_budget": "auto",
        "dit_layerwise_offload": True,
        "mode": "manual",
    }
    only_dit = replace(WAN_14B, vae=None, text_encoder=None)
    need = cost.predict(
        only_dit, Placement(STREAM, 2), Around(), LARGE, card(None)
    ).device_need_bytes
    made = plan(only_dit, LARGE, card(f"{need}B"), **options)
    assert made.fits
    assert made.considered[0].candidate.staying_units == 0
    assert not plan(only_dit, LARGE, card(f"{need - 1}B"), **options).fits


def test_an_automatic_budget_is_not_predicted_where_something_is_not_known() -> None:
    streamed: dict[str, Any] = {"dit_layerwise_offload": True, "vram_budget": "auto"}
    for workload, hardware, missing in (
        (None, card("24GiB"), "without workload"),
        (SMALL, None, "without device_memory of hardware"),
        (None, None, "without workload and device_memory of hardware"),
    ):
        made = plan(A14B, workload, hardware, **streamed)
        assert made.vram_budget == made.budget_of_one == "auto"
        assert made.messages[-1].startswith("vram_budget='auto': what stays")
        assert made.messages[-1].endswith(missing)
        assert made.considered[0].candidate.staying_units == 0
    assert plan(A14B, None, None, vram_budget="auto", mode="speed").messages == ()


def test_too_little_host_memory_is_said_with_both_numbers() -> None:
    made, found = decided(A14B, LARGE, card("24GiB", host="32GB"))
    assert not made.fits
    assert found.kind == STREAM
    assert "68.10 GB of host memory" in made.messages[-1]
    assert "32.00 GB" in made.messages[-1]
    assert "69.17 GB with the reserve" in made.messages[-1]


def test_a_plan_that_locks_less_is_taken_where_the_host_has_too_little() -> None:
    made, found = decided(A14B, LARGE, card("141GiB", host="32GB"))
    assert found == Placement(RESIDENT)
    assert "locks" in made.reasons["dit_layerwise_offload"]


def test_what_is_too_little_for_the_host_is_said_with_the_choice_that_fits() -> None:
    made, _ = decided(A14B, LARGE, card("24GiB", host="64GB"))
    assert not made.fits
    (advice,) = (part for part in made.messages[-1].split(". ") if part.startswith("What fits"))
    assert "text_encoder_cpu_offload=False" in advice
    helped, _ = decided(A14B, LARGE, card("24GiB", host="64GB"), text_encoder_cpu_offload=False)
    assert helped.fits
    assert f"locks {gb(helped.host_locked_bytes or 0)} of host memory" in advice


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"mode": "speed"}, "What fits: mode='auto', which needs"),
        ({"dit_layerwise_offload": False}, "What fits: leaving out dit_layerwise_offload, which"),
        (
            {"mode": "manual", "dit_layerwise_offload": False},
            "What fits: mode='auto' and leaving out dit_layerwise_offload, which",
        ),
    ],
)
def test_what_does_not_fit_is_said_with_a_change_that_does(
    given: dict[str, Any], advice: str
) -> None:
    made, _ = decided(A14B, LARGE, card("24GiB"), **given)
    assert not made.fits
    assert advice in made.messages[-1]


def test_what_no_change_makes_fit_is_said_with_what_it_takes() -> None:
    made, _ = decided(A14B, LARGE, card("6GiB"))
    assert "Fewer frames or a smaller size help" in made.messages[-1]
    made, _ = decided(A14B, LARGE, card("1GiB"))
    assert "Other modes and choices do not fit either" in made.messages[-1]
    least = min(c.candidate.device_need_bytes for c in made.considered)
    assert f"needs {gb(least)} of it" in made.messages[-1]


def test_what_does_not_fit_is_the_last_message_that_which_enable_raises() -> None:
    made = plan(A14B, LARGE, Hardware(device_memory="4GiB"))
    assert made.messages[-1].startswith("nothing that is permitted fits")
    assert "taken from" in made.messages[0]


def test_workspaces_are_predicted_but_not_needed() -> None:
    only_vae = replace(WAN_14B, text_encoder=None)
    candidate = predicted(Placement(STREAM, 1), only_vae)
    activations = 480 * 832 * 20_000
    stage = 500_000_000 + 500_000_000  # the VAE, and the rest of the DiT
    assert candidate.device_peak_bytes == stage + round(1.155 * activations)
    assert candidate.device_need_bytes == stage + round(1.1 * activations) + cost.RESERVE_BYTES


def test_a_reserve_is_left_on_the_device() -> None:
    peak = predicted(Placement(RESIDENT), replace(WAN_14B, vae=None, text_encoder=None))
    need = peak.device_need_bytes
    assert need == peak.device_peak_bytes + round(7800 * 100_000 * 0.1) + cost.RESERVE_BYTES
    only_dit = replace(WAN_14B, vae=None, text_encoder=None)
    assert plan(only_dit, MEDIUM, card(f"{need}B"), mode="speed").fits
    assert not plan(only_dit, MEDIUM, card(f"{need - 1}B"), mode="speed").fits


# What is unknown, and what is said.


def test_without_a_machine_the_base_rules_decide_and_no_time_is_predicted() -> None:
    made, found = decided(A14B, SMALL, None)
    assert found == Placement(STREAM, 2)
    assert made.reasons["dit_offload_prefetch_size"].startswith("rule 3")
    assert (made.step_seconds, made.start_seconds) == (None, None)
    assert made.device_peak_bytes is not None


def test_without_a_workload_the_base_rules_decide() -> None:
    made, found = decided(A14B, None, card("141GiB"))
    assert found == Placement(STREAM, 2)
    assert (made.step_seconds, made.device_peak_bytes) == (None, None)
    assert made.host_locked_bytes == 56 * GB + TEXT_ENCODER.bytes + VAE.bytes


def test_a_model_whose_work_is_unknown_is_decided_by_its_bytes() -> None:
    unknown = DitFacts(block_bytes=DIT.block_bytes, other_bytes=DIT.other_bytes)
    facts = ModelFacts("some", dits=(unknown,))
    assert decided(facts, LARGE, card("80GiB"))[1] == Placement(RESIDENT)
    made, found = decided(facts, LARGE, card("24GiB"))
    assert found == Placement(STREAM, 2)
    assert made.step_seconds is None


def test_rates_that_are_assumed_are_named() -> None:
    made = plan(A14B, LARGE, Hardware(device_memory="24GiB", link_gb_per_s=25))
    (message,) = (m for m in made.messages if "taken from" in m)
    assert "matmul_tflops" in message
    assert "link_gb_per_s" not in message
    known = plan(A14B, LARGE, card("24GiB"))
    assert known.messages == ()


def test_nothing_is_timed_by_the_rates_of_a_gpu_where_there_is_none() -> None:
    cpu = Hardware(platform="cpu", host_memory="256GB")
    for choices in ({}, {"dit_layerwise_offload": True}):
        made = plan(A14B, LARGE, cpu, **choices)
        assert made.step_seconds is None
        assert made.messages == ()
        assert " s a step" not in made.explain()


def test_a_dit_that_its_caller_shards_is_not_judged_and_not_predicted() -> None:
    for facts, choices in (
        (replace(A14B, sharded=True), {}),
        (A14B, {"use_fsdp_inference": True}),
    ):
        made = plan(facts, LARGE, card("24GiB"), **choices)
        assert made.fits
        assert (made.step_seconds, made.device_peak_bytes) == (None, None)
        assert made.host_locked_bytes == TEXT_ENCODER.bytes + VAE.bytes
        assert "stays on the device" not in made.explain()
        assert "offloaded beside it: text_encoder, vae." in made.explain()
    assert not plan(A14B, LARGE, card("4GiB"), use_fsdp_inference=True).fits  # the encoder's turn


def test_the_text_names_only_components_that_are_there() -> None:
    assert "offloaded beside it: text_encoder, vae." in plan(A14B).explain()
    assert "There is no DiT; offloaded" in plan(replace(A14B, dits=())).explain()
    parked = plan(A14B, mode="manual", vae_cpu_offload=True)
    assert "offloaded beside it: vae." in parked.explain()


def test_without_a_dit_the_other_components_are_predicted() -> None:
    made = plan(replace(A14B, dits=()), MEDIUM, card("24GiB"))
    assert made.host_locked_bytes == TEXT_ENCODER.bytes + VAE.bytes
    assert made.device_peak_bytes is not None


def test_what_the_cost_model_puts_in_place_of_resident_leaves_the_choice_against_streaming() -> (
    None
):
    made, found = decided(A14B, LARGE, card("48GiB"), dit_layerwise_offload=False)
    assert found == Placement(WHOLE)
    assert made.reasons["dit_layerwise_offload"] == "chosen"
    assert "resident does not fit" in made.reasons["dit_cpu_offload"]


def test_a_chosen_prefetch_that_loses_its_use_to_the_cost_model_is_a_message() -> None:
    made, found = decided(A14B, SMALL, card("141GiB"), dit_offload_prefetch_size=3)
    assert found == Placement(RESIDENT)
    assert "dit_offload_prefetch_size=3 has no effect" in made.messages[-1]


def test_reasons_name_what_is_gained() -> None:
    made, found = decided(A14B, LARGE, card("48GiB"))
    assert found == Placement(STREAM, 1)
    reason = made.reasons["dit_offload_prefetch_size"]
    assert "0.70 GB less for weights than streamed, prefetch 2" in reason
    # All blocks are in slots: the DiT as a whole saves 256 bytes, and time.
    tiny = replace(WAN_14B, text_encoder=None, vae=None)
    made, _ = decided(tiny, SMALL, card("80GiB"), mode="memory", dit_offload_prefetch_size=39)
    assert "slightly less device memory than" in made.reasons["dit_layerwise_offload"]


def test_without_a_workload_what_is_considered_is_weights() -> None:
    text = plan(A14B, None, card("24GiB")).explain()
    assert "GB of weights: taken" in text
    assert "at the peak" not in text


def test_every_choice_has_a_reason_and_the_text_has_all_of_them() -> None:
    made = plan(A14B, SMALL, card("48GiB"))
    text = made.explain()
    for name in made.as_dict()["choices"]:
        assert made.reasons[name]
        assert f"{name} = " in text
    for each in made.considered:
        assert str(each.candidate.placement) in text
    assert "Predicted:" in text


def test_the_dictionary_can_be_written_as_json() -> None:
    made = plan(A14B, SMALL, card("48GiB"))
    again = json.loads(json.dumps(made.as_dict()))
    assert again["choices"]["dit_cpu_offload"] is True
    assert again["predictions"]["step_seconds"] == made.step_seconds
    assert again["workload"]["frames"] == 5


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"workload": (480, 832)}, "Workload"),
        ({"hardware": "24GiB"}, "Hardware"),
        ({"mode": "fast"}, "auto, memory, speed, manual"),
    ],
)
def test_wrong_arguments_are_errors_that_say_what_is_allowed(
    arguments: dict[str, Any], names: str
) -> None:
    with pytest.raises(ValueError, match=names):
        plan(A14B, **arguments)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), "25", True])
def test_a_rate_is_a_finite_number_above_0(rate: Any) -> None:
    with pytest.raises(ValueError, match=r"Hardware\.link_gb_per_s is a number above 0"):
        Hardware(link_gb_per_s=rate)


@pytest.mark.parametrize("scale", [-1, float("nan"), float("inf"), "5", True])
def test_a_scale_of_guidance_is_a_finite_number(scale: Any) -> None:
    with pytest.raises(ValueError, match=r"Workload\.guidance is a number, 0 or more"):
        Workload(480, 832, 81, guidance=scale)
