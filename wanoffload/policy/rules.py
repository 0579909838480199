"""The base rules: what is turned on when nothing is known of workload or machine.

From two changes to a serving engine (sgl-project/sglang, pull requests 25930 and 26925) and what
their reviews asked for. Each decision is recorded with its rule. `docs/policy.md` states them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from wanoffload.apart import BLOCK, PART
from wanoffload.facts.model import WAN, ModelFacts
from wanoffload.policy import within
from wanoffload.policy.choices import AUTO, AUXILIARY, DIT, Choices, blocks_ahead
from wanoffload.sizes import gb

DEFAULT_PREFETCH = 2
SUPPORTED_PLATFORMS = ("cuda",)
AUTOMATIC_MODES = ("auto", "memory")
CHOSEN = "chosen"
NOT_STREAMED = "rule 9: the DiT is not streamed"
PLAIN_WHILE_UNKNOWN = "rule 9: plain, while size or machine are unknown"
AS_IT_STANDS = "rule 9: as the blocks stand already"
NOT_IN_PARTS = "rule 10: the DiT is not streamed"
WHOLE_BLOCKS = "rule 10: blocks, where they fit and parts are not quicker within a budget"
PARTS_AHEAD = "rule 10: as many parts as their ring has room for"
ENOUGH = 1
"""Blocks ahead that hide copies behind compute where blocks are alike; the least to consider."""


@dataclass
class Decision:
    """What was decided, and why; `reasons` has one for each choice, `messages` go to the log.

    `packed`: the share of the DiT's blocks that is packed. `granularity`: BLOCK or PART.
    """

    dit_layerwise: bool = False
    dit_cpu_offload: bool = False
    components: list[str] = field(default_factory=list)
    prefetch: int | None = None
    packed: float = 0.0
    granularity: str = BLOCK
    coarse: dict[str, bool] = field(default_factory=dict)
    fsdp: bool = False
    reasons: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


def decide(facts: ModelFacts, mode: str, choices: Choices, platform: str) -> Decision:
    """The base rules, applied. Raises ValueError where choices and model exclude each other."""
    refuse(facts, choices)
    decision = Decision()
    decide_dit(decision, facts, mode, choices, platform)
    decide_components(decision, mode, choices, platform)
    decide_granularity(decision, facts, mode, choices)
    decide_prefetch(decision, facts, mode, choices)
    decide_packing(decision, facts, mode, choices, platform)
    decide_coarse(decision, choices)
    return decision


def layerwise_chosen(choices: Choices) -> bool:
    """Whether the user asked for the DiT to be streamed."""
    listed = choices.layerwise_offload_components or ()
    return choices.dit_layerwise_offload is True or DIT in listed


def refuse(facts: ModelFacts, choices: Choices) -> None:
    """Rule 7, the part that is an error."""
    if facts.sharded and (layerwise_chosen(choices) or choices.dit_cpu_offload):
        raise ValueError(
            "rule 7: the DiT's parameters are sharded already (DTensor); they can't be offloaded. "
            "Load the model without sharding, or leave dit_layerwise_offload, dit_cpu_offload and "
            "'dit' in layerwise_offload_components out."
        )
    if facts.cache_dit and layerwise_chosen(choices):
        raise ValueError(
            "rule 7: the package cache-dit is active on this model, and it replaces the blocks "
            "that dit_layerwise_offload streams. Disable cache-dit (the step caches of diffusers "
            "work with streaming), or leave dit_layerwise_offload out."
        )


def why_not(facts: ModelFacts, choices: Choices, platform: str) -> str | None:
    """Rule 1: the first condition that keeps the DiT from being turned on, or None.

    All but the last, a chosen `dit_layerwise_offload`: who asks has looked at that.
    """
    chosen = "was chosen, so the DiT is not turned on by itself"
    conditions = (
        (facts.family != WAN, "not a Wan pipeline"),
        (not facts.layerwise_allowed, "the model's deployment config does not allow it"),
        (facts.dmd_denoising_steps is not None, "a step-distilled (DMD) variant"),
        (platform not in SUPPORTED_PLATFORMS, f"platform {platform} is not supported"),
        (facts.cache_dit, "cache-dit is active"),
        (facts.sharded, "the parameters are sharded"),
        (choices.use_fsdp_inference is True, "the caller shards the DiT (use_fsdp_inference)"),
        (choices.made("dit_cpu_offload"), f"dit_cpu_offload {chosen}"),
        (choices.made("layerwise_offload_components"), f"layerwise_offload_components {chosen}"),
    )
    return next((f"rule 1: {text}" for held, text in conditions if held), None)


def decide_dit(
    decision: Decision, facts: ModelFacts, mode: str, choices: Choices, platform: str
) -> None:
    """Rules 1, 2, 5 and 7: whether the DiT is streamed, where its weights start, FSDP."""
    reasons = decision.reasons
    decision.fsdp = bool(choices.use_fsdp_inference)
    reasons["use_fsdp_inference"] = CHOSEN if choices.made("use_fsdp_inference") else "not chosen"
    decision.dit_cpu_offload = bool(choices.dit_cpu_offload)
    reasons["dit_cpu_offload"] = CHOSEN if choices.made("dit_cpu_offload") else "not chosen"
    if layerwise_chosen(choices):
        decision.dit_layerwise = True
        reasons["dit_layerwise_offload"] = CHOSEN
        if choices.dit_cpu_offload:
            reasons["dit_cpu_offload"] = "chosen; rule 5: stays on beside dit_layerwise_offload"
        if decision.fsdp:
            decision.fsdp = False
            reasons["use_fsdp_inference"] = "rule 7: off, layerwise offload of the DiT was chosen"
            decision.messages.append(
                "use_fsdp_inference is turned off: layerwise offload of the DiT was chosen, and a "
                "transformer can't be sharded and streamed at once (rule 7)"
            )
    elif choices.dit_layerwise_offload is False:
        reasons["dit_layerwise_offload"] = CHOSEN
    elif (obstacle := why_not(facts, choices, platform)) is not None:
        reasons["dit_layerwise_offload"] = obstacle
    else:
        decision.dit_layerwise, reasons["dit_layerwise_offload"] = _rule_2(facts, mode)


def _rule_2(facts: ModelFacts, mode: str) -> tuple[bool, str]:
    if mode == "memory":
        return True, "rule 2: mode 'memory' streams every Wan model"
    if mode == "auto" and facts.a14b:
        return True, "rule 2: mode 'auto' streams Wan2.2 A14B"
    if mode == "auto":
        return False, "rule 2: mode 'auto' streams only Wan2.2 A14B"
    return False, f"rule 2: mode {mode!r} never streams by itself"


def decide_components(decision: Decision, mode: str, choices: Choices, platform: str) -> None:
    """Rules 4 and 6: the list of what is offloaded layer by layer, DiT first."""
    chosen = choices.layerwise_offload_components
    name = "layerwise_offload_components"
    if chosen is not None:
        decision.components = list(chosen)
        decision.reasons[name] = CHOSEN
        if decision.dit_layerwise and DIT not in chosen:
            decision.components.insert(0, DIT)
            decision.reasons[name] = "chosen; dit_layerwise_offload=True adds the DiT in front"
    elif choices.dit_layerwise_offload is True:
        decision.components = [DIT]
        decision.reasons[name] = "rule 4: dit_layerwise_offload was chosen alone"
    elif mode not in AUTOMATIC_MODES:
        decision.reasons[name] = f"rule 4: empty in mode {mode!r}"
    elif platform not in SUPPORTED_PLATFORMS:
        decision.reasons[name] = f"rule 1: platform {platform} is not supported"
    else:
        decision.components = automatic_components(decision.dit_layerwise, choices)
        decision.reasons[name] = _rule_4(choices)


def automatic_components(dit: bool, choices: Choices) -> list[str]:
    """Rule 4's list. Rule 6: a component whose coarse flag was chosen leaves it."""
    kept = [name for name in AUXILIARY if choices.coarse(name) is None]
    return [DIT, *kept] if dit else kept


def _rule_4(choices: Choices) -> str:
    left = [name for name in AUXILIARY if choices.coarse(name) is not None]
    if not left:
        return "rule 4: the automatic list"
    flags = ", ".join(f"{name}_cpu_offload" for name in left)
    return f"rule 4: the automatic list; rule 6: {flags} chosen, so {', '.join(left)} left it"


def decide_granularity(decision: Decision, facts: ModelFacts, mode: str, choices: Choices) -> None:
    """Rule 10: blocks or their parts. `compare` looks at whether they fit, and are quick."""
    if not decision.dit_layerwise:
        decision.reasons["granularity"] = NOT_IN_PARTS
        return
    found, why = granularity_of(facts, mode, choices)
    decision.granularity, decision.reasons["granularity"] = found, why


def granularity_of(facts: ModelFacts, mode: str, choices: Choices) -> tuple[str, str]:
    """Of a DiT that is streamed: the granularity by rule 10, and the reason."""
    chosen = chosen_granularity(choices)
    if chosen is not None:
        return chosen, CHOSEN
    if mode == "memory":
        return of_least_memory(facts, choices)
    if facts.granularity == PART:
        return PART, "rule 10: in parts, as they stand already"
    return BLOCK, WHOLE_BLOCKS


def chosen_granularity(choices: Choices) -> str | None:
    """None: none was, or it was left to be decided."""
    return choices.granularity if choices.granularity in (BLOCK, PART) else None


def of_least_memory(facts: ModelFacts, choices: Choices) -> tuple[str, str]:
    """Of blocks and parts what takes less of the device, and why, in mode "memory"."""
    if not within.known_in_parts(facts):
        return BLOCK, "rule 10: blocks, their parts are not known"
    size = choices.dit_offload_prefetch_size
    ahead = ENOUGH if size is None else blocks_ahead(size, most_units(facts, BLOCK))
    of_blocks = within.streamed_bytes_on_device(facts, ahead, BLOCK)
    ahead_in_parts = None if size is None else blocks_ahead(size, most_units(facts, PART))
    of_parts = within.streamed_bytes_on_device(facts, ahead_in_parts, PART)
    numbers = f"{gb(of_parts)} of the device in parts, {gb(of_blocks)} in blocks"
    if of_parts < of_blocks:
        return PART, f"rule 10: mode 'memory' takes what is less, {numbers}"
    return BLOCK, f"rule 10: parts would not take less, {numbers}"


def no_parts(decision: Decision, choices: Choices) -> None:
    """The DiT is not streamed, whoever decided that: a message if it was to be, in parts."""
    decision.reasons["granularity"] = NOT_IN_PARTS
    if choices.granularity == PART:
        decision.messages.append(
            "granularity='part' has no effect: the DiT is not streamed "
            f"({decision.reasons['dit_layerwise_offload']})"
        )


def decide_prefetch(decision: Decision, facts: ModelFacts, mode: str, choices: Choices) -> None:
    """Rules 3, 4, 8 and 10: blocks fetched ahead; None where the DiT is not streamed, and where it
    streams in parts and nothing was chosen."""
    name = "dit_offload_prefetch_size"
    size = choices.dit_offload_prefetch_size
    if not decision.dit_layerwise:
        decision.prefetch = None
        decision.reasons[name] = "rule 4: the DiT is not streamed"
        if size is not None:
            decision.messages.append(no_effect(size, decision))
    elif size is not None:
        decision.prefetch = blocks_ahead(size, most_units(facts, decision.granularity))
        decision.reasons[name] = CHOSEN
    elif decision.granularity == PART:
        decision.prefetch = None
        decision.reasons[name] = PARTS_AHEAD
    elif mode == "auto" and facts.a14b:
        decision.prefetch = DEFAULT_PREFETCH
        decision.reasons[name] = f"rule 3: {DEFAULT_PREFETCH} for Wan2.2 A14B in mode 'auto'"
    else:
        decision.prefetch = DEFAULT_PREFETCH
        decision.reasons[name] = f"rule 8: {DEFAULT_PREFETCH} where it is unset"


def no_effect(prefetch: float, decision: Decision) -> str:
    """The message about a chosen prefetch size where the DiT is not streamed."""
    return (
        f"dit_offload_prefetch_size={prefetch:g} has no effect: the DiT is not streamed "
        f"({decision.reasons['dit_layerwise_offload']})"
    )


def decide_packing(
    decision: Decision, facts: ModelFacts, mode: str, choices: Choices, platform: str
) -> None:
    """Rule 9: whether the DiT's blocks are packed. Where that is open, the cost model decides."""
    reasons, chosen = decision.reasons, choices.pack
    if not decision.dit_layerwise:
        reasons["pack"] = NOT_STREAMED
    elif isinstance(chosen, bool):
        decision.packed = float(chosen)
        reasons["pack"] = CHOSEN
    else:
        decision.packed = facts.packed or 0.0
        settled = why_settled(facts, mode, choices, platform)
        reasons["pack"] = settled or (AS_IT_STANDS if facts.packed else PLAIN_WHILE_UNKNOWN)


def no_packing(decision: Decision, choices: Choices) -> None:
    """The DiT is not streamed, whoever decided that: a message if it was to be packed."""
    decision.reasons["pack"] = NOT_STREAMED
    if choices.pack is True:
        decision.messages.append(
            "pack=True has no effect: the DiT is not streamed "
            f"({decision.reasons['dit_layerwise_offload']})"
        )


def why_settled(facts: ModelFacts, mode: str, choices: Choices, platform: str) -> str | None:
    """Rule 9: what keeps the form of blocks as it is where none was chosen; None: it is open."""
    asked = mode in AUTOMATIC_MODES or choices.pack == AUTO
    conditions = (
        (not asked, f"mode {mode!r} packs nothing by itself"),
        (platform not in SUPPORTED_PLATFORMS, f"platform {platform} is not supported"),
        (not any(dit.bf16_bytes for dit in facts.dits), "plain, none of the blocks is bf16"),
    )
    why = next((f"rule 9: {text}" for held, text in conditions if held), None)
    return AS_IT_STANDS if why is not None and facts.packed else why


def most_units(facts: ModelFacts, granularity: str) -> int:
    """Blocks, or parts of them, of the DiT that has most."""
    dits = facts.streamed_in(granularity).dits
    return max((len(dit.block_bytes) for dit in dits), default=1)


def decide_coarse(decision: Decision, choices: Choices) -> None:
    """Rule 6: what layerwise manages is not also offloaded as a whole."""
    for name in AUXILIARY:
        flag = f"{name}_cpu_offload"
        if name in decision.components:
            decision.coarse[name] = False
            decision.reasons[flag] = f"rule 6: {name} is in layerwise_offload_components"
            if choices.coarse(name):
                decision.messages.append(
                    f"{flag} is ignored: layerwise_offload_components has {name} (rule 6)"
                )
        else:
            decision.coarse[name] = bool(choices.coarse(name))
            decision.reasons[flag] = CHOSEN if choices.made(flag) else "not chosen"
