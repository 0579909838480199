"""The base rules of the policy, in both directions, written from the rules and not the code.

Workload and machine are unknown here, so the rules alone decide. An outcome is told by a word:

    all    the DiT and the rest are layerwise        rest   text encoder, image encoder, VAE
    dit    the DiT alone is                          none   nothing is

and a row of four words is what comes out in the modes of MODES, in their order.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any

import pytest

from wanoffload.facts.model import (
    MOVA,
    OTHER,
    QWEN_IMAGE,
    WAN,
    ComponentFacts,
    DitFacts,
    ModelFacts,
)
from wanoffload.machine.hardware import Hardware
from wanoffload.policy.planning import Plan, plan
from wanoffload.workload import Workload

DIT, TEXT, IMAGE, VAE = "dit", "text_encoder", "image_encoder", "vae"
MODES = ("auto", "memory", "speed", "manual")

LISTS = {"all": [DIT, TEXT, IMAGE, VAE], "rest": [TEXT, IMAGE, VAE], "dit": [DIT], "none": []}
PREFETCH = {"all": 2, "rest": None, "dit": 2, "none": None}

COARSE = {name: f"{name}_cpu_offload" for name in (TEXT, IMAGE, VAE)}
FLAGS = ("dit_layerwise_offload", "dit_cpu_offload", "use_fsdp_inference", *COARSE.values())
SIZES = ("layerwise_offload_components", "dit_offload_prefetch_size", "vram_budget")
NAMES = (*FLAGS, *SIZES, "pack", "granularity")
DECIDED = (
    "dit_layerwise_offload",
    "layerwise_offload_components",
    "dit_offload_prefetch_size",
    "pack",
    "granularity",
)
UNSET: dict[str, Any] = dict.fromkeys(FLAGS, False) | {
    "vram_budget": None,
    "pack": False,
    "granularity": "block",
}


def dit(blocks: int, block_bytes: int = 702_870_000) -> DitFacts:
    in_bf16 = blocks * (block_bytes - 165_000)
    return DitFacts((block_bytes,) * blocks, other_bytes=520_000_000, bf16_bytes=in_bf16)


def wan(name: str, *dits: DitFacts, family: str = WAN, **facts: Any) -> ModelFacts:
    text = ComponentFacts(block_bytes=(385_000_000,) * 24, other_bytes=2_100_000_000)
    vae = ComponentFacts(other_bytes=508_000_000)
    return ModelFacts(name, family, dits=dits, text_encoder=text, vae=vae, **facts)


CLIP = ComponentFacts(block_bytes=(39_000_000,) * 32, other_bytes=20_000_000)
T2V_A14B = wan("T2V-A14B", dit(40), dit(40), a14b=True)
I2V_A14B = wan("I2V-A14B", dit(40), dit(40), a14b=True)
T2V_14B = wan("2.1-T2V-14B", dit(40))
T2V_1_3B = wan("2.1-T2V-1.3B", dit(30, 92_910_000))
I2V_14B = wan("2.1-I2V-14B", dit(40, 807_760_000), image_encoder=CLIP)
TI2V_5B = wan("TI2V-5B", dit(30, 327_360_000))
DMD = replace(T2V_A14B, name="DMD-A14B", dmd_denoising_steps=(1000, 757, 522))
MOVA_LIKE = wan("MOVA", dit(40), dit(40), family=MOVA)
QWEN = wan("Qwen-Image", dit(60, 680_000_000), family=QWEN_IMAGE)

MODELS = (T2V_A14B, I2V_A14B, T2V_14B, T2V_1_3B, I2V_14B, TI2V_5B, DMD, MOVA_LIKE, QWEN)

NOTHING_CHOSEN = {
    #               auto    memory  speed   manual
    "T2V-A14B": "   all     all     none    none",
    "I2V-A14B": "   all     all     none    none",
    "2.1-T2V-14B": "rest    all     none    none",
    "2.1-T2V-1.3B": "rest   all     none    none",
    "2.1-I2V-14B": "rest    all     none    none",
    "TI2V-5B": "    rest    all     none    none",
    "DMD-A14B": "   rest    rest    none    none",
    "MOVA": "       rest    rest    none    none",
    "Qwen-Image": " rest    rest    none    none",
}
DIT_OFF = "rest rest none none"
DIT_ALONE = "dit dit dit dit"


@dataclass(frozen=True)
class Case:
    """A model in a mode."""

    model: ModelFacts
    mode: str

    def __str__(self) -> str:
        return f"{self.model.name}-{self.mode}"

    def plan(self, **given: Any) -> Plan:
        return plan(self.model, mode=self.mode, **given)

    def but(self, **facts: Any) -> Case:
        return replace(self, model=replace(self.model, **facts))

    def of(self, row: str) -> str:
        """The word of a row that is for this mode."""
        return row.split()[MODES.index(self.mode)]

    @property
    def unchosen(self) -> str:
        """The word where nothing is chosen."""
        return self.of(NOTHING_CHOSEN[self.model.name])


CASES = [Case(model, mode) for model in MODELS for mode in MODES]
everywhere = pytest.mark.parametrize("case", CASES, ids=str)
every_automatic_list = pytest.mark.parametrize(
    "case", [case for case in CASES if case.mode in ("auto", "memory")], ids=str
)
every_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
in_auto_and_memory = pytest.mark.parametrize("mode", ["auto", "memory"])
every_flag = pytest.mark.parametrize("flag", FLAGS)
every_coarse_flag = pytest.mark.parametrize(("component", "flag"), COARSE.items())
true_and_false = pytest.mark.parametrize("value", [True, False])


def resolved(decided: Plan) -> dict[str, Any]:
    return {name: getattr(decided, name) for name in NAMES}


def outcome(word: str, **flags: Any) -> dict[str, Any]:
    """What `resolved` gives: the outcome of this word, and flags, False where not given."""
    return UNSET | {
        "dit_layerwise_offload": word in ("all", "dit"),
        "layerwise_offload_components": LISTS[word],
        "dit_offload_prefetch_size": PREFETCH[word],
        **flags,
    }


def says(decided: Plan, name: str) -> bool:
    """Does the log name it?"""
    return any(name in message for message in decided.messages)


def rule_of(decided: Plan, choice: str) -> str:
    """ "rule 2", or "chosen"."""
    found = re.match(r"rule \d+\b|chosen\b", decided.reasons[choice])
    assert found, decided.reasons[choice]
    return found[0]


# Nothing chosen: every model, every mode.


@everywhere
def test_with_nothing_chosen_model_and_mode_decide(case: Case) -> None:
    decided = case.plan()
    assert decided.mode == case.mode
    assert resolved(decided) == outcome(case.unchosen)


@pytest.mark.parametrize("model", [T2V_A14B, I2V_A14B], ids=lambda model: model.name)
def test_a14b_in_auto_adds_the_dit_first_with_prefetch_2(model: ModelFacts) -> None:
    decided = plan(model)
    assert decided.mode == "auto"
    assert decided.dit_layerwise_offload is True
    assert decided.layerwise_offload_components == [DIT, TEXT, IMAGE, VAE]
    assert decided.dit_offload_prefetch_size == 2
    assert rule_of(decided, "dit_layerwise_offload") == "rule 2"
    assert rule_of(decided, "dit_offload_prefetch_size") == "rule 3"
    assert rule_of(decided, "layerwise_offload_components") == "rule 4"


def test_wan21_14b_in_auto_keeps_the_default_without_the_dit() -> None:
    decided = plan(T2V_14B)
    assert decided.layerwise_offload_components == [TEXT, IMAGE, VAE]
    assert decided.dit_layerwise_offload is False
    assert decided.dit_offload_prefetch_size is None
    assert rule_of(decided, "dit_layerwise_offload") == "rule 2"


@in_auto_and_memory
def test_the_dit_of_mova_is_not_touched(mode: str) -> None:
    decided = plan(MOVA_LIKE, mode=mode)
    assert (decided.dit_layerwise_offload, decided.dit_cpu_offload) == (False, False)
    assert DIT not in decided.layerwise_offload_components
    assert rule_of(decided, "dit_layerwise_offload") == "rule 1"


@every_model
def test_auto_is_the_mode_unless_another_is_named(model: ModelFacts) -> None:
    assert plan(model) == plan(model, mode="auto")


def test_the_name_of_a_model_decides_nothing() -> None:
    for name in ("", "MOVA", "Wan2.1"):
        assert resolved(plan(replace(T2V_A14B, name=name))) == outcome("all")
    assert resolved(plan(replace(T2V_14B, name="Wan2.2-T2V-A14B"))) == outcome("rest")


@every_model
def test_where_only_workload_or_only_machine_is_known_the_base_rules_decide(
    model: ModelFacts,
) -> None:
    expected = outcome(Case(model, "auto").unchosen)
    assert resolved(plan(model, Workload(480, 832, 17))) == expected
    assert resolved(plan(model, None, Hardware("141GB", "200GB", 55.0))) == expected


# One choice: every model, mode, flag and value.

ONE_FLAG = {
    #                                  auto memory speed manual; None: as if nothing were chosen
    ("dit_layerwise_offload", True): DIT_ALONE,
    ("dit_layerwise_offload", False): DIT_OFF,
    ("dit_cpu_offload", True): DIT_OFF,
    ("dit_cpu_offload", False): DIT_OFF,
    ("use_fsdp_inference", True): DIT_OFF,
    ("use_fsdp_inference", False): None,
}
ONE_COARSE_FLAG = {
    "text_encoder_cpu_offload": {"all": [DIT, IMAGE, VAE], "rest": [IMAGE, VAE], "none": []},
    "image_encoder_cpu_offload": {"all": [DIT, TEXT, VAE], "rest": [TEXT, VAE], "none": []},
    "vae_cpu_offload": {"all": [DIT, TEXT, IMAGE], "rest": [TEXT, IMAGE], "none": []},
}


@pytest.mark.parametrize(("flag", "value"), ONE_FLAG)
@everywhere
def test_one_flag_chosen(case: Case, flag: str, value: bool) -> None:
    row = ONE_FLAG[flag, value]
    word = case.of(row) if row else case.unchosen
    decided = case.plan(**{flag: value})
    assert resolved(decided) == outcome(word, **{flag: value})
    assert rule_of(decided, flag) == "chosen"


@true_and_false
@pytest.mark.parametrize("flag", ONE_COARSE_FLAG)
@everywhere
def test_a_chosen_coarse_flag_takes_its_component_out_of_the_automatic_list(
    case: Case, flag: str, value: bool
) -> None:
    word = case.unchosen
    left = ONE_COARSE_FLAG[flag][word]
    decided = case.plan(**{flag: value})
    expected = outcome(word, **{flag: value, "layerwise_offload_components": left})
    assert resolved(decided) == expected
    assert rule_of(decided, flag) == "chosen"


@pytest.mark.parametrize("name", NAMES)
@everywhere
def test_none_is_not_a_choice(case: Case, name: str) -> None:
    assert case.plan(**{name: None}) == case.plan()


@every_flag
def test_none_beside_a_choice_is_not_a_choice(flag: str) -> None:
    others: dict[str, Any] = dict.fromkeys(set(NAMES) - {flag})
    for case, value in itertools.product(CASES, (True, False)):
        chosen = {flag: value}
        assert case.plan(**others, **chosen) == case.plan(**chosen)


@every_automatic_list
def test_explicit_false_for_layerwise_wins(case: Case) -> None:
    decided = case.plan(dit_layerwise_offload=False)
    assert decided.dit_layerwise_offload is False
    assert decided.layerwise_offload_components == [TEXT, IMAGE, VAE]
    assert decided.dit_offload_prefetch_size is None
    assert rule_of(decided, "dit_layerwise_offload") == "chosen"


# Rule 1: what keeps the DiT from being turned on. Both sides of each condition, on A14B.

KEPT_OFF = {
    "another family, MOVA": ({"family": MOVA}, {}, "not a wan"),
    "another family, Qwen-Image": ({"family": QWEN_IMAGE}, {}, "not a wan"),
    "another family, unknown": ({"family": OTHER}, {}, "not a wan"),
    "deployment config": ({"layerwise_allowed": False}, {}, "config"),
    "DMD": ({"dmd_denoising_steps": [1000, 757, 522]}, {}, "dmd|distill"),
    "DMD, no steps named": ({"dmd_denoising_steps": []}, {}, "dmd|distill"),
    "cache-dit": ({"cache_dit": True}, {}, "cache.dit"),
    "sharded": ({"sharded": True}, {}, "sharded|dtensor"),
    "FSDP": ({}, {"use_fsdp_inference": True}, "fsdp"),
    "dit_cpu_offload": ({}, {"dit_cpu_offload": True}, "dit_cpu_offload"),
    "dit_cpu_offload, False": ({}, {"dit_cpu_offload": False}, "dit_cpu_offload"),
    "dit_layerwise_offload, False": ({}, {"dit_layerwise_offload": False}, "^chosen"),
}
STILL_ON = {
    "Wan": ({"family": WAN}, {}),
    "deployment config": ({"layerwise_allowed": True}, {}),
    "not DMD": ({"dmd_denoising_steps": None}, {}),
    "no cache-dit": ({"cache_dit": False}, {}),
    "not sharded": ({"sharded": False}, {}),
    "no FSDP": ({}, {"use_fsdp_inference": False}),
    "prefetch": ({}, {"dit_offload_prefetch_size": 2}),
    "budget": ({}, {"vram_budget": "6GiB"}),
    "text encoder": ({}, {"text_encoder_cpu_offload": True}),
    "image encoder": ({}, {"image_encoder_cpu_offload": True}),
    "VAE": ({}, {"vae_cpu_offload": True}),
}


@in_auto_and_memory
@pytest.mark.parametrize(("facts", "choices", "why"), KEPT_OFF.values(), ids=KEPT_OFF)
def test_one_condition_keeps_the_dit_from_being_turned_on_and_is_the_one_named(
    facts: dict[str, Any], choices: dict[str, Any], why: str, mode: str
) -> None:
    decided = plan(replace(T2V_A14B, **facts), mode=mode, **choices)
    reason = decided.reasons["dit_layerwise_offload"]
    assert resolved(decided) == outcome("rest", **choices)
    assert reason.startswith("chosen" if why == "^chosen" else "rule 1")
    named = {other for *_, other in KEPT_OFF.values() if re.search(other, reason, re.IGNORECASE)}
    assert named == {why}, reason


@in_auto_and_memory
@pytest.mark.parametrize(("facts", "choices"), STILL_ON.values(), ids=STILL_ON)
def test_where_no_condition_fails_the_dit_is_turned_on(
    facts: dict[str, Any], choices: dict[str, Any], mode: str
) -> None:
    decided = plan(replace(T2V_A14B, **facts), mode=mode, **choices)
    assert decided.dit_layerwise_offload is True
    assert decided.layerwise_offload_components[0] == DIT
    assert rule_of(decided, "dit_layerwise_offload") == "rule 2"


@in_auto_and_memory
@pytest.mark.parametrize("components", [[], [TEXT], [VAE, IMAGE], "default"])
def test_chosen_components_keep_the_dit_from_being_turned_on(components: Any, mode: str) -> None:
    decided = plan(T2V_A14B, mode=mode, layerwise_offload_components=components)
    assert decided.dit_layerwise_offload is False
    assert decided.dit_offload_prefetch_size is None
    assert "layerwise_offload_components" in decided.reasons["dit_layerwise_offload"]


# Rule 1, the platform.

every_unsupported_platform = pytest.mark.parametrize(
    "platform", ["cpu", "rocm", "npu", "mps", "xpu"]
)


@every_unsupported_platform
@everywhere
def test_on_a_platform_without_support_nothing_turns_itself_on(case: Case, platform: str) -> None:
    decided = case.plan(hardware=Hardware(platform=platform))
    assert resolved(decided) == outcome("none")


@every_unsupported_platform
def test_the_platform_is_named_where_it_keeps_the_dit_off(platform: str) -> None:
    decided = plan(T2V_A14B, None, Hardware(platform=platform))
    assert rule_of(decided, "dit_layerwise_offload") == "rule 1"
    assert platform in decided.reasons["dit_layerwise_offload"].lower()


@everywhere
def test_an_unknown_machine_counts_as_supported(case: Case) -> None:
    cuda = case.plan(hardware=Hardware(platform="cuda"))
    assert resolved(cuda) == resolved(case.plan())


@every_unsupported_platform
@everywhere
def test_a_choice_stands_on_every_platform(case: Case, platform: str) -> None:
    machine = Hardware(platform=platform)
    streamed = case.plan(hardware=machine, dit_layerwise_offload=True)
    assert resolved(streamed) == outcome("dit")
    named = case.plan(hardware=machine, layerwise_offload_components="all")
    assert resolved(named) == outcome("all")
    moved = case.plan(hardware=machine, dit_cpu_offload=True, vae_cpu_offload=True)
    assert resolved(moved) == outcome("none", dit_cpu_offload=True, vae_cpu_offload=True)


# Rule 2: the mode. (The rows are NOTHING_CHOSEN; here, that the plan says which rule it was.)


@pytest.mark.parametrize("case", [case for case in CASES if case.model in MODELS[:6]], ids=str)
def test_rule_2_decides_for_every_wan_model_that_rule_1_lets_through(case: Case) -> None:
    assert rule_of(case.plan(), "dit_layerwise_offload") == "rule 2"


# Rules 3 and 8: prefetch where it is unset. Both give 2.


@everywhere
def test_unset_prefetch_is_2_where_the_dit_is_layerwise(case: Case) -> None:
    decided = case.plan(dit_layerwise_offload=True)
    a14b_in_auto = case.model in (T2V_A14B, I2V_A14B, DMD) and case.mode == "auto"
    assert decided.dit_offload_prefetch_size == 2
    rule = rule_of(decided, "dit_offload_prefetch_size")
    assert rule == ("rule 3" if a14b_in_auto else "rule 8")


@pytest.mark.parametrize("model", MODELS[:6], ids=lambda model: model.name)
def test_unset_prefetch_in_memory_mode_is_2_by_rule_8(model: ModelFacts) -> None:
    decided = plan(model, mode="memory")
    assert decided.dit_offload_prefetch_size == 2
    assert rule_of(decided, "dit_offload_prefetch_size") == "rule 8"


# Prefetch that is chosen: a count from 1, a ratio below.


@pytest.mark.parametrize(
    ("blocks", "chosen", "count"),
    [
        *[(40, n, n) for n in (1, 2, 3, 39, 40, 41)],
        *[(40, 0, 1), (40, 0.0, 1), (40, 0.01, 1), (40, 0.02, 2), (40, 0.1, 5)],
        *[(40, 0.25, 11), (40, 0.5, 21), (40, 0.75, 30), (40, 0.98, 39), (40, 0.99, 40)],
        *[(30, 0.1, 4), (30, 0.25, 8), (30, 0.75, 23), (60, 0.1, 7), (60, 0.5, 31)],
        *[(1, 0, 1), (1, 0.5, 1), (1, 0.99, 1), (2, 0.4, 1), (2, 0.6, 2)],
    ],
)
def test_chosen_prefetch_is_a_count_or_a_ratio_of_the_blocks(
    blocks: int, chosen: float, count: int
) -> None:
    for model in (T2V_A14B, QWEN):
        model = replace(model, dits=(dit(blocks),))
        decided = plan(model, dit_layerwise_offload=True, dit_offload_prefetch_size=chosen)
        assert decided.dit_offload_prefetch_size == count
        assert isinstance(decided.dit_offload_prefetch_size, int)
        assert rule_of(decided, "dit_offload_prefetch_size") == "chosen"


@pytest.mark.parametrize("dits", [(dit(20), dit(40)), (dit(40), dit(20))])
def test_a_ratio_is_of_the_blocks_of_the_largest_dit(dits: tuple[DitFacts, ...]) -> None:
    decided = plan(replace(T2V_A14B, dits=dits), dit_offload_prefetch_size=0.1)
    assert decided.dit_offload_prefetch_size == 5


# Of 40 blocks, of 30.
COUNTS = {1: (1, 1), 2: (2, 2), 7: (7, 7), 0: (1, 1), 0.25: (11, 8)}


@pytest.mark.parametrize("chosen", COUNTS)
@everywhere
def test_chosen_prefetch_turns_nothing_on_or_off(case: Case, chosen: float) -> None:
    word = case.unchosen
    of_40, of_30 = COUNTS[chosen]
    count = of_30 if case.model in (T2V_1_3B, TI2V_5B) else of_40
    expected = outcome(word, dit_offload_prefetch_size=count if word == "all" else None)
    assert resolved(case.plan(dit_offload_prefetch_size=chosen)) == expected


@everywhere
def test_chosen_prefetch_without_a_layerwise_dit_is_none_and_the_log_says_so(case: Case) -> None:
    name = "dit_offload_prefetch_size"
    idle = case.plan(dit_layerwise_offload=False, dit_offload_prefetch_size=3)
    assert idle.dit_offload_prefetch_size is None
    assert says(idle, name)
    assert not says(case.plan(dit_layerwise_offload=False), name)
    used = case.plan(dit_layerwise_offload=True, dit_offload_prefetch_size=3)
    assert used.dit_offload_prefetch_size == 3
    assert not says(used, name)


# Rule 9: packing. Without a machine nothing says that it is needed.


@pytest.mark.parametrize("chosen", [{}, {"pack": None}, {"pack": False}, {"pack": "auto"}])
@everywhere
def test_nothing_is_packed_while_size_and_machine_are_unknown(
    case: Case, chosen: dict[str, Any]
) -> None:
    decided = case.plan(**chosen)
    assert resolved(decided) == outcome(case.unchosen)
    kept = chosen.get("pack") is False
    assert decided.pack_share == (0.0 if kept and decided.dit_layerwise_offload else None)
    assert not says(decided, "pack")
    streamed = decided.dit_layerwise_offload
    assert rule_of(decided, "pack") == ("chosen" if kept and streamed else "rule 9")


@everywhere
def test_chosen_packing_is_obeyed_where_the_dit_is_streamed_and_turns_nothing_on(
    case: Case,
) -> None:
    decided = case.plan(pack=True)
    streamed = case.unchosen == "all"
    assert resolved(decided) == outcome(case.unchosen, pack=streamed)
    assert decided.pack_share == (1.0 if streamed else None)
    assert says(decided, "pack=True has no effect") == (not streamed)
    assert rule_of(decided, "pack") == ("chosen" if streamed else "rule 9")
    made = case.plan(dit_layerwise_offload=True, pack=True)
    assert (made.pack, made.pack_share, made.messages) == (True, 1.0, ())


@everywhere
def test_the_reason_names_why_nothing_is_packed(case: Case) -> None:
    streamed = case.plan(dit_layerwise_offload=True)
    if case.mode in ("speed", "manual"):
        assert streamed.reasons["pack"] == f"rule 9: mode '{case.mode}' packs nothing by itself"
        asked = case.plan(dit_layerwise_offload=True, pack="auto")
        assert asked.reasons["pack"] == "rule 9: plain, while size or machine are unknown"
    else:
        assert streamed.reasons["pack"] == "rule 9: plain, while size or machine are unknown"
    resident = case.plan(dit_layerwise_offload=False)
    assert resident.reasons["pack"] == "rule 9: the DiT is not streamed"


def test_blocks_of_another_dtype_are_not_packed_by_themselves() -> None:
    in_fp16 = replace(T2V_A14B, dits=(replace(dit(40), bf16_bytes=0),))
    decided = plan(in_fp16, None, Hardware("24GB", "20GB"))
    assert decided.reasons["pack"] == "rule 9: plain, none of the blocks is bf16"
    assert plan(in_fp16, pack=True).pack


# Rule 4: components that are chosen.


@pytest.mark.parametrize(
    ("chosen", "components"),
    [
        ("all", [DIT, TEXT, IMAGE, VAE]),
        ("default", [TEXT, IMAGE, VAE]),
        (["all"], [DIT, TEXT, IMAGE, VAE]),
        (["default"], [TEXT, IMAGE, VAE]),
        ([], []),
        ("dit", [DIT]),
        ("vae", [VAE]),
        ([IMAGE], [IMAGE]),
        ("vae,dit", [DIT, VAE]),
        ("image_encoder, text_encoder", [TEXT, IMAGE]),
        ([VAE, IMAGE, TEXT, DIT], [DIT, TEXT, IMAGE, VAE]),
        ([TEXT, DIT], [DIT, TEXT]),
        ([VAE, VAE], [VAE]),
    ],
    ids=str,
)
@everywhere
def test_chosen_components_are_taken_as_given_in_the_usual_order(
    case: Case, chosen: Any, components: list[str]
) -> None:
    decided = case.plan(layerwise_offload_components=chosen)
    word = "dit" if DIT in components else "none"
    assert resolved(decided) == outcome(word, layerwise_offload_components=components)
    assert rule_of(decided, "layerwise_offload_components") == "chosen"


@everywhere
def test_chosen_layerwise_adds_the_dit_in_front_of_chosen_components(case: Case) -> None:
    for chosen, components in [
        ("default", [DIT, TEXT, IMAGE, VAE]),
        ([VAE], [DIT, VAE]),
        ([], [DIT]),
        ("vae,dit", [DIT, VAE]),
        ("all", [DIT, TEXT, IMAGE, VAE]),
    ]:
        choices = {"dit_layerwise_offload": True, "layerwise_offload_components": chosen}
        decided = case.plan(**choices)
        assert resolved(decided) == outcome("dit", layerwise_offload_components=components)


@everywhere
def test_layerwise_chosen_off_agrees_with_components_without_the_dit(case: Case) -> None:
    for chosen, components in [("default", [TEXT, IMAGE, VAE]), ([VAE], [VAE]), ([], [])]:
        choices = {"dit_layerwise_offload": False, "layerwise_offload_components": chosen}
        decided = case.plan(**choices)
        assert resolved(decided) == outcome("none", layerwise_offload_components=components)


@everywhere
@pytest.mark.parametrize("chosen", ["all", "dit", [VAE, DIT]], ids=str)
def test_layerwise_chosen_off_with_the_dit_among_chosen_components_is_an_error(
    case: Case, chosen: Any
) -> None:
    choices = {"dit_layerwise_offload": False, "layerwise_offload_components": chosen}
    with pytest.raises(ValueError, match="dit_layerwise_offload") as failure:
        case.plan(**choices)
    assert "layerwise_offload_components" in str(failure.value)


def test_one_plan_can_be_edited_without_changing_the_next() -> None:
    chosen = [VAE, DIT]
    decided = plan(T2V_A14B, layerwise_offload_components=chosen)
    assert chosen == [VAE, DIT]
    chosen.append(TEXT)
    assert decided.layerwise_offload_components == [DIT, VAE]
    for words in ({}, {"mode": "speed"}, {"dit_layerwise_offload": True}):
        before = plan(T2V_A14B, **words).layerwise_offload_components
        kept = list(before)
        before.append("poison")
        assert plan(T2V_A14B, **words).layerwise_offload_components == kept


# Rule 5: where weights start, and how they move, are two questions.

LAYERWISE_AND_CPU = {
    (True, True): DIT_ALONE,
    (True, False): DIT_ALONE,
    (True, None): DIT_ALONE,
    (False, True): DIT_OFF,
    (False, False): DIT_OFF,
    (False, None): DIT_OFF,
    (None, True): DIT_OFF,
    (None, False): DIT_OFF,
}


@pytest.mark.parametrize(("layerwise", "cpu"), LAYERWISE_AND_CPU, ids=str)
@everywhere
def test_layerwise_and_cpu_offload_of_the_dit_do_not_switch_each_other_off(
    case: Case, layerwise: bool | None, cpu: bool | None
) -> None:
    choices = {"dit_layerwise_offload": layerwise, "dit_cpu_offload": cpu}
    decided = case.plan(**choices)
    word = case.of(LAYERWISE_AND_CPU[layerwise, cpu])
    assert resolved(decided) == outcome(word, dit_cpu_offload=bool(cpu))


@everywhere
def test_both_flags_stay_true(case: Case) -> None:
    decided = case.plan(dit_cpu_offload=True, dit_layerwise_offload=True)
    assert decided.dit_cpu_offload is True
    assert decided.dit_layerwise_offload is True
    assert decided.layerwise_offload_components == [DIT]
    assert rule_of(decided, "dit_cpu_offload") == "chosen"
    assert rule_of(decided, "dit_layerwise_offload") == "chosen"
    assert not says(decided, "dit_cpu_offload")


@true_and_false
@pytest.mark.parametrize(
    ("components", "word"), [("all", "all"), ("dit", "dit"), ("default", "rest"), ([], "none")]
)
@everywhere
def test_chosen_cpu_offload_is_preserved_beside_chosen_components(
    case: Case, components: Any, word: str, value: bool
) -> None:
    choices = {"dit_cpu_offload": value, "layerwise_offload_components": components}
    assert resolved(case.plan(**choices)) == outcome(word, dit_cpu_offload=value)


# Rule 6: a component is moved in one way.


@every_coarse_flag
@everywhere
def test_chosen_layerwise_of_a_component_wins_over_its_coarse_flag_and_the_log_names_the_flag(
    case: Case, component: str, flag: str
) -> None:
    choices = {flag: True, "layerwise_offload_components": [component]}
    decided = case.plan(**choices)
    assert decided.layerwise_offload_components == [component]
    assert resolved(decided)[flag] is False
    assert rule_of(decided, flag) == "rule 6"
    assert says(decided, flag)


@everywhere
def test_every_ignored_coarse_flag_is_named(case: Case) -> None:
    flags = dict.fromkeys(COARSE.values(), True)
    decided = case.plan(layerwise_offload_components="all", **flags)
    assert resolved(decided) == outcome("all")
    for flag in flags:
        assert says(decided, flag)


@every_coarse_flag
@everywhere
def test_a_coarse_flag_is_honoured_where_the_chosen_components_leave_its_component_out(
    case: Case, component: str, flag: str
) -> None:
    others = [name for name in COARSE if name != component]
    for value in (True, False):
        decided = case.plan(layerwise_offload_components=others, **{flag: value})
        assert decided.layerwise_offload_components == others
        assert resolved(decided)[flag] is value
        assert rule_of(decided, flag) == "chosen"
        assert not says(decided, flag)


@true_and_false
@every_coarse_flag
@everywhere
def test_coarse_flags_stand_beside_a_dit_chosen_layerwise(
    case: Case, component: str, flag: str, value: bool
) -> None:
    decided = case.plan(dit_layerwise_offload=True, **{flag: value})
    assert resolved(decided) == outcome("dit", **{flag: value})


SEVERAL_COARSE_FLAGS = [
    ((TEXT, IMAGE), {"all": [DIT, VAE], "rest": [VAE], "none": []}),
    ((TEXT, VAE), {"all": [DIT, IMAGE], "rest": [IMAGE], "none": []}),
    ((IMAGE, VAE), {"all": [DIT, TEXT], "rest": [TEXT], "none": []}),
    ((TEXT, IMAGE, VAE), {"all": [DIT], "rest": [], "none": []}),
]


@pytest.mark.parametrize(("chosen", "left"), SEVERAL_COARSE_FLAGS)
@everywhere
def test_each_component_whose_coarse_flag_is_chosen_leaves_the_automatic_list(
    case: Case, chosen: tuple[str, ...], left: dict[str, list[str]]
) -> None:
    word = case.unchosen
    for values in itertools.product((True, False), repeat=len(chosen)):
        flags = {COARSE[name]: value for name, value in zip(chosen, values, strict=True)}
        expected = outcome(word, layerwise_offload_components=left[word], **flags)
        assert resolved(case.plan(**flags)) == expected


@every_automatic_list
def test_the_coarse_flag_of_what_is_layerwise_is_off_by_rule_6(case: Case) -> None:
    decided = case.plan()
    for flag in COARSE.values():
        assert resolved(decided)[flag] is False
        assert rule_of(decided, flag) == "rule 6"


# Rule 7: what excludes layerwise.

LAYERWISE_DIT = [
    {"dit_layerwise_offload": True},
    {"layerwise_offload_components": "dit"},
    {"layerwise_offload_components": "all"},
    {"dit_layerwise_offload": True, "layerwise_offload_components": "default"},
    {"dit_layerwise_offload": True, "dit_cpu_offload": True},
]
WITH_FSDP = {"dit_layerwise_offload": True, "use_fsdp_inference": True}
NO_LAYERWISE_DIT = [
    {},
    {"dit_layerwise_offload": False},
    {"layerwise_offload_components": "default"},
    {"layerwise_offload_components": []},
    {"dit_cpu_offload": False},
]


@pytest.mark.parametrize("choices", [*LAYERWISE_DIT, WITH_FSDP], ids=str)
@everywhere
def test_cache_dit_with_a_dit_chosen_layerwise_is_an_error(
    case: Case, choices: dict[str, Any]
) -> None:
    case.plan(**choices)
    with pytest.raises(ValueError, match=r"cache.dit"):
        case.but(cache_dit=True).plan(**choices)


@pytest.mark.parametrize("choices", [*NO_LAYERWISE_DIT, {"dit_cpu_offload": True}], ids=str)
@everywhere
def test_cache_dit_without_a_chosen_layerwise_dit_leaves_the_dit_alone(
    case: Case, choices: dict[str, Any]
) -> None:
    decided = case.but(cache_dit=True).plan(**choices)
    assert decided.dit_layerwise_offload is False
    assert decided.dit_cpu_offload is choices.get("dit_cpu_offload", False)


@pytest.mark.parametrize("choices", [*LAYERWISE_DIT, WITH_FSDP, {"dit_cpu_offload": True}], ids=str)
@everywhere
def test_moving_a_sharded_dit_by_choice_is_an_error_that_says_so(
    case: Case, choices: dict[str, Any]
) -> None:
    case.plan(**choices)
    with pytest.raises(ValueError, match=r"(?i)shard|dtensor"):
        case.but(sharded=True).plan(**choices)


@pytest.mark.parametrize("choices", [*NO_LAYERWISE_DIT, {"use_fsdp_inference": True}], ids=str)
@everywhere
def test_a_sharded_dit_is_left_alone(case: Case, choices: dict[str, Any]) -> None:
    decided = case.but(sharded=True).plan(**choices)
    assert (decided.dit_layerwise_offload, decided.dit_cpu_offload) == (False, False)


@pytest.mark.parametrize("choices", LAYERWISE_DIT, ids=str)
@everywhere
def test_fsdp_goes_off_where_layerwise_of_the_dit_is_chosen_and_the_log_says_so(
    case: Case, choices: dict[str, Any]
) -> None:
    alone = case.plan(**choices)
    both = case.plan(use_fsdp_inference=True, **choices)
    assert both.use_fsdp_inference is False
    assert rule_of(both, "use_fsdp_inference") == "rule 7"
    assert says(both, "use_fsdp_inference")
    assert resolved(both) == resolved(alone)
    assert not says(alone, "use_fsdp_inference")
    off = case.plan(use_fsdp_inference=False, **choices)
    assert not says(off, "use_fsdp_inference")


@pytest.mark.parametrize("choices", NO_LAYERWISE_DIT, ids=str)
@everywhere
def test_fsdp_stays_where_layerwise_of_the_dit_is_not_chosen(
    case: Case, choices: dict[str, Any]
) -> None:
    decided = case.plan(use_fsdp_inference=True, **choices)
    assert decided.use_fsdp_inference is True
    assert decided.dit_layerwise_offload is False
    assert rule_of(decided, "use_fsdp_inference") == "chosen"
    assert not says(decided, "use_fsdp_inference")


# All flags together, and what holds for every plan.


@everywhere
def test_every_combination_of_flags_keeps_the_choices_and_moves_nothing_twice(case: Case) -> None:
    for values in itertools.product((True, False, None), repeat=len(FLAGS)):
        chosen = {
            flag: value for flag, value in zip(FLAGS, values, strict=True) if value is not None
        }
        decided = case.plan(**chosen)
        kept = dict(chosen)
        if chosen.get("dit_layerwise_offload") and chosen.get("use_fsdp_inference"):
            kept["use_fsdp_inference"] = False
        got = resolved(decided)
        assert {flag: got[flag] for flag in kept} == kept, chosen
        components = decided.layerwise_offload_components
        assert components == [name for name in LISTS["all"] if name in components], chosen
        assert decided.dit_layerwise_offload == (DIT in components), chosen
        assert (decided.dit_offload_prefetch_size == 2) == decided.dit_layerwise_offload, chosen
        assert not [name for name, flag in COARSE.items() if name in components and got[flag]]


@everywhere
def test_every_choice_has_a_reason(case: Case) -> None:
    """A rule, or that it was chosen, or, where no rule speaks of it, that it was not."""
    for choices in ({}, *LAYERWISE_DIT, *NO_LAYERWISE_DIT, {"vae_cpu_offload": True}):
        reasons = case.plan(**choices).reasons
        assert set(reasons) == set(NAMES)
        for name, reason in reasons.items():
            assert re.match(r"rule ([1-9]|10)\b|chosen\b|not chosen\b", reason), reason
            assert not (name in choices and reason.startswith("not chosen")), name
            assert not (name in FLAGS[1:] and name not in choices and reason == "chosen"), name
        for name in DECIDED:
            assert not reasons[name].startswith("not chosen"), name


def test_a_plan_is_frozen() -> None:
    decided = plan(T2V_A14B)
    for name in (*NAMES, "mode", "reasons", "messages"):
        with pytest.raises(FrozenInstanceError):
            setattr(decided, name, None)


@pytest.mark.parametrize(
    ("chosen", "nbytes"),
    [("200GiB", 200 * 1024**3), ("200 GB", 200 * 10**9), (123_456_789_012, 123_456_789_012)],
)
@everywhere
def test_a_budget_with_room_becomes_bytes_and_changes_nothing_else(
    case: Case, chosen: int | str, nbytes: int
) -> None:
    decided = case.plan(vram_budget=chosen)
    assert resolved(decided) == outcome(case.unchosen, vram_budget=nbytes)
    assert rule_of(decided, "vram_budget") == "chosen"


# Errors.


@pytest.mark.parametrize("name", ["prefetch", "dit_layerwise", "cpu_offload", "Mode"])
@pytest.mark.parametrize("value", [None, True])
def test_an_unknown_choice_is_an_error_that_lists_the_choices(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as failure:
        plan(T2V_A14B, **{name: value})
    for known in NAMES:
        assert known in str(failure.value)


@pytest.mark.parametrize("mode", ["", "Auto", "fast", None, 1])
def test_an_unknown_mode_is_an_error_that_lists_the_modes(mode: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(mode))) as failure:
        plan(T2V_A14B, mode=mode)
    for known in MODES:
        assert known in str(failure.value)


@pytest.mark.parametrize("value", ["true", "false", "", "auto", 0, 1, 1.0, [], [True]])
@every_flag
def test_a_flag_that_is_neither_true_nor_false_is_an_error(flag: str, value: Any) -> None:
    with pytest.raises(ValueError, match=flag) as failure:
        plan(T2V_A14B, **{flag: value})
    assert repr(value) in str(failure.value)
    assert "True" in str(failure.value)


BAD_PREFETCH = [-1, -0.5, 1.5, 2.5, float("nan"), float("inf"), -float("inf"), True, False]


@pytest.mark.parametrize("value", [*BAD_PREFETCH, "2", "half", [2]])
@pytest.mark.parametrize("layerwise", [True, False, None])
def test_prefetch_that_is_neither_a_count_nor_a_ratio_is_an_error(
    value: Any, layerwise: bool | None
) -> None:
    choices = {"dit_offload_prefetch_size": value, "dit_layerwise_offload": layerwise}
    with pytest.raises(ValueError, match="dit_offload_prefetch_size") as failure:
        plan(T2V_A14B, **choices)
    assert repr(value) in str(failure.value)


@pytest.mark.parametrize(
    ("components", "wrong"),
    [
        ("transformer", "transformer"),
        ("dit,unet", "unet"),
        ([VAE, "clip"], "clip"),
        ("defaults", "defaults"),
        ([DIT, 3], "3"),
        ([DIT, [VAE]], "['vae']"),
        (b"dit", "dit"),
        (True, "True"),
        (False, "False"),
        (4, "4"),
    ],
    ids=str,
)
def test_an_unknown_component_is_an_error_that_lists_the_components(
    components: Any, wrong: str
) -> None:
    with pytest.raises(ValueError, match=r"layerwise_offload_components") as failure:
        plan(T2V_A14B, layerwise_offload_components=components)
    assert wrong in str(failure.value)
    for known in (DIT, TEXT, IMAGE, VAE, "default", "all"):
        assert known in str(failure.value)


@pytest.mark.parametrize(
    "size", [-1, "-1GiB", 1.5, 0.0, -0.5, "", "lots", "Auto", "6 parsecs", True, False, [6]]
)
def test_a_budget_that_is_no_size_is_an_error(size: Any) -> None:
    with pytest.raises(ValueError, match="vram_budget") as failure:
        plan(T2V_A14B, vram_budget=size)
    assert repr(size) in str(failure.value)
    assert "a fraction" in str(failure.value)
    assert "'auto'" in str(failure.value)


@pytest.mark.parametrize("value", ["true", "yes", "", 0, 1, 0.5, [], "Auto"])
def test_packing_that_is_neither_true_nor_false_nor_auto_is_an_error(value: Any) -> None:
    with pytest.raises(ValueError, match="pack") as failure:
        plan(T2V_A14B, pack=value)
    assert repr(value) in str(failure.value)
    assert "True, False, 'auto'" in str(failure.value)


# Deciding is pure.

DECIDE = """
import sys
from wanoffload.policy.planning import plan
assert "torch" not in sys.modules, "importing the policy imports torch"
from wanoffload.facts.model import ModelFacts
from wanoffload.machine.hardware import Hardware
facts = ModelFacts(family="wan", a14b=True)
assert plan(facts, None, Hardware(platform="cuda")).dit_layerwise_offload
assert "torch" not in sys.modules, "deciding imports torch"
"""


def test_deciding_needs_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", DECIDE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
