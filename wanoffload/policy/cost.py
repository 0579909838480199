"""The cost model: what each way of running the DiT takes. Pure arithmetic on plain values.

A *placement* is a way to run the DiT. `predict` gives a `Candidate`: the placement with seconds a
step, bytes on the device and on the host. The constants below were measured on an H200 by
`python -m benchmarks predict`; `docs/policy.md` has the comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from wanoffload.apart import BLOCK, PART
from wanoffload.facts.model import ComponentFacts, DitFacts, ModelFacts
from wanoffload.host_tiers import READ_AHEAD_BYTES
from wanoffload.machine.hardware import RATES, Hardware
from wanoffload.policy import packed, within
from wanoffload.residency import Rates, Residency
from wanoffload.workload import Workload

RESIDENT = "resident"
WHOLE = "whole"
STREAM = "stream"

RESERVE_BYTES = 512 << 20
"""Device memory left to libraries (cuBLAS workspaces, kernels) and to others."""
RESERVE_OF_ACTIVATIONS = 0.1
"""Part of the activations that fragments may take on top where memory is tight. Where there is room
torch's allocator reserves up to half of them on top; it gives that back when it runs short."""
HOST_RESERVE_BYTES = 1 << 30
"""Host memory left to the process itself."""
LOCK_GB_PER_S = 9.0
"""Moving weights into page-locked images: 28.1 GB took 3.2 s."""
CONTENTION = {1: 0.015}
"""What copies cost compute when both take the same time, for each prefetch; see `_streamed`."""
CONTENTION_DEEPER = 0.011
LAUNCH_FACTOR = 1.7
"""Host time of an operation inside a diffusers model, in launches of a bare one: 1.6 and 1.95 were
measured on two machines of one kind. Only small models on fast cards wait for it."""
TRAFFIC_EFFICIENCY = 0.95
"""Part of the rate of one large elementwise kernel with which those of a block move their bytes."""
TRAFFIC_PER_FLOP = 0.012
"""And what the same bytes take besides, whatever the memory: bytes in the time of a product's FLOP.
Both are fitted to what is left of compute beside products and attention on an H200 (three models,
1,560 to 32,760 tokens) and on an H100, which differ in their memory alone: together 0.57 to 0.75 of
the memory's rate."""
CONVOLUTION_WORKSPACES = 0.155
"""What cuDNN's workspaces add, of a VAE's activations: 0.148 to 0.155 was measured."""
SLOT_LEAD_BYTES = 256
ENCODER_PREFETCH = 2
"""Blocks of an encoder fetched ahead."""

ASSUMED = Hardware(
    link_gb_per_s=55.2,
    pageable_gb_per_s=6.9,
    matmul_tflops=670.0,
    attention_tflops=592.0,
    device_gb_per_s=4298.0,
    launch_us=10.0,
    name="an H200",
)
"""Rates that stand in for unknown ones."""


@dataclass(frozen=True)
class Placement:
    """A way to run the DiT.

    `kind`: RESIDENT, on the device; WHOLE, the DiT goes to the device for its use and back, one
    expert at a time; STREAM, block by block, `prefetch` blocks ahead, of which the share `packed`
    is packed; or, with granularity PART, part by part: `prefetch` counts these, and None is as many
    as their ring has room for, which is one.
    """

    kind: str
    prefetch: int | None = None
    packed: float = 0.0
    granularity: str = BLOCK

    def __str__(self) -> str:
        if self.kind == STREAM:
            some = f"{100 * self.packed:.3g} % " if self.packed < 1 else ""
            form = f", {some}packed" if self.packed else ""
            how = " in parts of blocks" if self.granularity == PART else ""
            ahead = f", prefetch {self.prefetch}" if self.prefetch is not None else ""
            return f"streamed{how}{ahead}{form}"
        return {RESIDENT: "resident", WHOLE: "whole, to the device and back"}[self.kind]


@dataclass(frozen=True)
class Around:
    """How the other components are run: RESIDENT, WHOLE or STREAM."""

    text_encoder: str = RESIDENT
    image_encoder: str = RESIDENT
    vae: str = RESIDENT


@dataclass(frozen=True)
class Candidate:
    """A placement with what it takes. Times are None where compute is not known.

    `device_peak_bytes`: weights and activations at the worst moment of a generation.
    `device_weight_bytes`: of the DiT at most, slots and staging included. `device_need_bytes`: the
    peak with the stated reserve. `host_locked_bytes`: page-locked, of all components.
    `link_bytes`: of the DiT's weights that come over the link in each forward. `resident_units`,
    `kept_packed_units`: blocks of a DiT (or parts) that stay on the device under a budget, plain or
    packed; `residents_stay`: also while other components run.
    """

    placement: Placement
    step_seconds: float | None
    start_seconds: float
    device_peak_bytes: int
    device_need_bytes: int
    device_weight_bytes: int
    host_locked_bytes: int
    link_bytes: int = 0
    staging_bytes: int = 0
    resident_units: int = 0
    kept_packed_units: int = 0
    residents_stay: bool = True

    @property
    def staying_units(self) -> int:
        """Blocks, or parts, that stay on the device, plain or packed."""
        return self.resident_units + self.kept_packed_units


@dataclass(frozen=True)
class Stage:
    """A time of a generation in which one component runs: what is on the device meanwhile.

    `workspaces`: what convolutions take beside their activations where there is room.
    """

    weights: int
    activations: int
    workspaces: int = 0

    @property
    def peak_bytes(self) -> int:
        return self.weights + self.activations + self.workspaces

    @property
    def need_bytes(self) -> int:
        """What must be there. Without workspaces: cuDNN takes another algorithm then."""
        return self.weights + round(self.activations * (1 + RESERVE_OF_ACTIVATIONS))


def with_assumed_rates(hardware: Hardware) -> tuple[Hardware, list[str]]:
    """The machine with ASSUMED rates where its own are unknown, and the names of these."""
    missing = [name for name in RATES if getattr(hardware, name) is None]
    return replace(hardware, **{name: getattr(ASSUMED, name) for name in missing}), missing


def forward_seconds(dit: DitFacts, tokens: int, machine: Hardware) -> float | None:
    """One forward of the resident DiT; None where its work is not known.

    The device's time for products, attention and everything else, or the host's for launching.
    """
    if not dit.matmul_flops_per_token:
        return None
    products = dit.matmul_flops_per_token * tokens + dit.matmul_flops
    attention = (
        dit.attention_flops_per_token_squared * tokens + dit.attention_flops_per_token
    ) * tokens + dit.attention_flops
    traffic = dit.traffic_bytes_per_token * tokens + dit.traffic_bytes
    flops = _rate(machine.matmul_tflops) * 1e12
    device = (
        products / flops
        + attention / (_rate(machine.attention_tflops) * 1e12 * dit.attention_efficiency)
        + traffic / (_rate(machine.device_gb_per_s) * 1e9 * TRAFFIC_EFFICIENCY)
        + traffic / (flops * TRAFFIC_PER_FLOP)
    )
    return max(device, dit.kernels * _rate(machine.launch_us) * LAUNCH_FACTOR / 1e6)


def _rate(value: float | None) -> float:
    assert value is not None  # with_assumed_rates() has filled it in
    return value


def predict(
    facts: ModelFacts,
    placement: Placement,
    around: Around,
    workload: Workload | None,
    machine: Hardware,
    budget: int | None = None,
    *,
    outlasts: bool = True,
) -> Candidate:
    """What a generation takes with this placement, on a machine whose rates are all known.

    `budget`: what the DiTs' weights may take on the device, if that was chosen: blocks of a
    streamed one that fit stay there. `outlasts`: also while others run, if there is room.
    """
    facts = facts.streamed_in(placement.granularity)
    tokens = facts.tokens(workload) if workload else 0
    videos = workload.videos if workload else 1
    against = rates(facts, placement, workload, machine)
    stay = _what_stays(facts, placement, budget, against)
    # Before it is known what a forward is up against, and again for other shapes of inputs.
    unsettled = _what_stays(facts, placement, budget) if any(against) else stay
    activations = videos * max((_activations(dit, tokens) for dit in facts.dits), default=0)
    weights = _weights_while_denoising(facts, placement, budget, stay)
    denoising = Stage(weights + _standing(facts, around), activations)
    most = _weights_while_denoising(facts, placement, budget, unsettled)
    at_worst = Stage(most + _standing(facts, around), activations)
    others = _other_stages(facts, placement, around, workload)
    kept = max(within.kept_bytes(facts, stay), default=0)
    kept_at_worst = max(kept, *within.kept_bytes(facts, unsettled), 0)
    need = max((stage.need_bytes for stage in others), default=0)
    room = machine.device_memory
    stays = outlasts and (room is None or need + kept_at_worst + RESERVE_BYTES <= int(room))
    if stays:
        need += kept_at_worst
        others = [replace(stage, weights=stage.weights + kept) for stage in others]
    need = max(need, denoising.need_bytes, at_worst.need_bytes)
    return Candidate(
        placement=placement,
        step_seconds=_step_seconds(facts, placement, tokens, workload, machine, stay, stays),
        start_seconds=_start_seconds(facts, placement, around, machine),
        device_peak_bytes=max(stage.peak_bytes for stage in (denoising, *others)),
        device_need_bytes=need + RESERVE_BYTES,
        device_weight_bytes=weights,
        host_locked_bytes=_locked(facts, placement, around),
        link_bytes=_link_bytes(facts, placement, stay),
        staging_bytes=_staging(facts, placement, stay),
        resident_units=max((len(residency.resident) for residency in stay), default=0),
        kept_packed_units=max((len(residency.kept_packed) for residency in stay), default=0),
        residents_stay=stays,
    )


def left_by_activations(
    facts: ModelFacts,
    placement: Placement,
    around: Around,
    workload: Workload | None,
    machine: Hardware,
) -> int | None:
    """The budget of a streamed DiT that takes whatever its activations, and what always stands on
    the device, leave. None: that is not known, or is too little for any block to stay."""
    if placement.kind != STREAM or workload is None or machine.device_memory is None:
        return None
    there = facts.streamed_in(placement.granularity)
    tokens = facts.tokens(workload)
    activations = workload.videos * max((_activations(d, tokens) for d in facts.dits), default=0)
    taken = Stage(_standing(facts, around), activations).need_bytes + RESERVE_BYTES
    left = int(machine.device_memory) - taken
    return left if len(_what_stays(there, placement, left)) == len(facts.dits) else None


def _activations(dit: DitFacts, tokens: int) -> int:
    if not tokens:
        return 0
    return round(dit.activation_bytes_per_token * tokens + dit.activation_bytes)


# Weights.


def slots_bytes(component: ComponentFacts, prefetch: int) -> int:
    """Device memory of the slots: `prefetch` + 1 of the largest block, no more than blocks."""
    if not component.block_bytes:
        return 0
    count = min(prefetch + 1, len(component.block_bytes))
    return SLOT_LEAD_BYTES + count * max(component.block_bytes)


def rates(
    facts: ModelFacts, placement: Placement, workload: Workload | None, machine: Hardware
) -> list[Rates | None]:
    """What forwards of each DiT are up against. None: that is not known, or what stays does not
    depend on it: it does where blocks are packed."""
    whole = placement.packed > 0 and placement.granularity == BLOCK
    if workload is None or not whole:
        return [None] * len(facts.dits)
    tokens = facts.tokens(workload)
    alone = [forward_seconds(dit, tokens, machine) for dit in facts.dits]
    return [
        within.rates(workload.videos * each, machine) if each is not None else None
        for each in alone
    ]


def _what_stays(
    facts: ModelFacts,
    placement: Placement,
    budget: int | None,
    against: Sequence[Rates | None] | None = None,
) -> list[Residency]:
    """Of each DiT; nothing where nothing is streamed, or the budget is none or too small. Of parts
    also without a budget: then it says how large their ring is.

    `against`: what forwards are up against; None: it is chosen by bytes alone.
    """
    how = placement.granularity
    if placement.kind != STREAM or (budget is None and how == BLOCK):
        return []
    part = within.share_of_one(facts, budget) if budget is not None else None
    form = placement.packed, placement.prefetch, part, how
    known = against or [None] * len(facts.dits)
    found = (
        within.residency(dit, *form, each) for dit, each in zip(facts.dits, known, strict=True)
    )
    return [residency for residency in found if residency is not None]


def _weights_while_denoising(
    facts: ModelFacts, placement: Placement, budget: int | None, stay: list[Residency]
) -> int:
    """Bytes of the DiTs' weights on the device while one of them runs."""
    if placement.kind == RESIDENT:
        return sum(dit.bytes for dit in facts.dits)
    if placement.kind == WHOLE:
        return max((dit.bytes for dit in facts.dits), default=0)
    if facts.dits and (budget is not None or placement.granularity == PART):
        rest = within.others_beside(facts)
        if len(stay) == len(facts.dits):
            return rest + max(residency.device_bytes for residency in stay)
        form = placement.packed, placement.prefetch, placement.granularity
        return rest + max(within.least_bytes(dit, *form) for dit in facts.dits)
    ahead = placement.prefetch or 0
    slots = max((slots_bytes(dit, ahead) for dit in facts.dits), default=0)
    return slots + _staging(facts, placement, stay) + sum(dit.other_bytes for dit in facts.dits)


def _staging(facts: ModelFacts, placement: Placement, stay: list[Residency]) -> int:
    if placement.granularity == PART and stay:
        return max(residency.staging_slots * residency.staging_bytes for residency in stay)
    return max((packed.staging_bytes(dit, placement.packed) for dit in facts.dits), default=0)


def _link_bytes(facts: ModelFacts, placement: Placement, stay: list[Residency]) -> int:
    if placement.kind != STREAM:
        return 0
    if stay:
        return max(residency.streamed_bytes for residency in stay)
    return max((packed.link_bytes(dit, placement.packed) for dit in facts.dits), default=0)


def _weights_between(facts: ModelFacts, placement: Placement) -> int:
    """Bytes of the DiTs' weights on the device while another component runs."""
    if placement.kind == RESIDENT:
        return sum(dit.bytes for dit in facts.dits)
    if placement.kind == WHOLE:
        return 0
    return sum(dit.other_bytes for dit in facts.dits)


def _auxiliary(facts: ModelFacts, around: Around) -> list[tuple[str, ComponentFacts, str]]:
    found = (
        ("text_encoder", facts.text_encoder, around.text_encoder),
        ("image_encoder", facts.image_encoder, around.image_encoder),
        ("vae", facts.vae, around.vae),
    )
    return [(name, component, how) for name, component, how in found if component is not None]


def _standing(facts: ModelFacts, around: Around, but: str = "") -> int:
    """Bytes of the other components that are always on the device, one of them left out."""
    return sum(
        component.bytes
        for name, component, how in _auxiliary(facts, around)
        if how == RESIDENT and name != but
    )


def _other_stages(
    facts: ModelFacts,
    placement: Placement,
    around: Around,
    workload: Workload | None,
) -> list[Stage]:
    """What is on the device while each of the other components runs."""
    stages = []
    for name, component, how in _auxiliary(facts, around):
        own = component.bytes
        if how == STREAM:
            own = component.other_bytes + slots_bytes(component, ENCODER_PREFETCH)
        fixed = _weights_between(facts, placement) + _standing(facts, around, name) + own
        activations = _image_activations(component, workload)
        workspaces = round(activations * CONVOLUTION_WORKSPACES)
        stages.append(Stage(fixed, activations, workspaces))
    return stages


def _image_activations(component: ComponentFacts, workload: Workload | None) -> int:
    if workload is None:
        return 0
    pixels = workload.height * workload.width * workload.videos
    return round(
        pixels * component.activation_bytes_per_pixel
        + pixels * workload.frames * component.activation_bytes_per_voxel
    )


def _locked(facts: ModelFacts, placement: Placement, around: Around) -> int:
    """Host bytes that will be page-locked: everything that is streamed or parked, once."""
    streamed = 0
    if placement.kind == STREAM:
        streamed = sum(packed.host_bytes(dit, placement.packed) for dit in facts.dits)
    return streamed + _parked(facts, placement, around)


def _parked(facts: ModelFacts, placement: Placement, around: Around) -> int:
    """Bytes of what waits on the host, blocks of the DiTs left out if these are streamed."""
    whole = sum(dit.bytes for dit in facts.dits) if placement.kind == WHOLE else 0
    others = (c.bytes for _, c, how in _auxiliary(facts, around) if how != RESIDENT)
    return whole + sum(others)


def from_disk(candidate: Candidate, facts: ModelFacts) -> Candidate:
    """A streamed candidate whose blocks are read from disk for each use, as few on the host as
    can be. How long that takes is not predicted."""
    dits = facts.streamed_in(candidate.placement.granularity).dits
    blocks = sum(packed.host_bytes(dit, candidate.placement.packed) for dit in dits)
    locked = candidate.host_locked_bytes - blocks + min(blocks, READ_AHEAD_BYTES)
    return replace(candidate, step_seconds=None, host_locked_bytes=locked)


# Time.


def _step_seconds(
    facts: ModelFacts,
    placement: Placement,
    tokens: int,
    workload: Workload | None,
    machine: Hardware,
    stay: list[Residency],
    stays: bool,
) -> float | None:
    """Seconds of one denoising step, of the slower expert; moves are spread over all steps."""
    if workload is None or not facts.dits:
        return None
    known_of = stay if len(stay) == len(facts.dits) else [None] * len(facts.dits)
    times = [
        _forward(dit, placement, tokens, workload.videos, machine, residency)
        for dit, residency in zip(facts.dits, known_of, strict=True)
    ]
    known = [time for time in times if time is not None]
    if len(known) < len(times):
        return None
    step = max(known) * workload.forwards_per_step
    return step + _link_seconds(_moved(facts, placement, stay, stays), machine) / workload.steps


def _moved(facts: ModelFacts, placement: Placement, stay: list[Residency], stays: bool) -> int:
    """Bytes that come to the device once in each generation."""
    if placement.kind == WHOLE:
        return sum(dit.bytes for dit in facts.dits)
    # One expert's blocks give way to the other's; a single DiT's may stay from one to the next.
    again = len(facts.dits) > 1 or not stays
    return sum(within.kept_bytes(facts, stay)) if again else 0


def _link_seconds(nbytes: int, machine: Hardware) -> float:
    return nbytes / (_rate(machine.link_gb_per_s) * 1e9)


def _forward(
    dit: DitFacts,
    placement: Placement,
    tokens: int,
    videos: int,
    machine: Hardware,
    stay: Residency | None,
) -> float | None:
    alone = forward_seconds(dit, tokens, machine)
    if alone is None:
        return None
    compute = videos * alone  # the weights come once for all of them
    if placement.kind != STREAM:
        return compute
    if stay is not None and stay.seconds is not None:
        return stay.seconds
    ahead = placement.prefetch or 0
    if stay is not None:
        ahead = within.blocks_ahead(dit, stay) if placement.granularity == PART else ahead
        compute += packed.seconds_to_decode(stay.decoded_bytes, machine)
        copy = _link_seconds(stay.streamed_bytes, machine)
    else:
        compute += packed.decode_seconds(dit, placement.packed, machine)
        copy = packed.copy_seconds(dit, placement.packed, machine)
    return _streamed(compute, copy, ahead)


def share_needed(facts: ModelFacts, workload: Workload, machine: Hardware) -> float | None:
    """The share of packed blocks with which the link binds no longer; None: not known."""
    tokens = facts.tokens(workload)
    shares = []
    for dit in facts.dits:
        alone = forward_seconds(dit, tokens, machine)
        if alone is None:
            return None
        shares.append(packed.share_needed(dit, workload.videos * alone, machine))
    return max(shares, default=0.0)


def _streamed(compute: float, copy: float, prefetch: int) -> float:
    """The slower of compute and copies, and a little for how they get in each other's way.

    They share memory and power, and with one block ahead a late block is waited for. It shows where
    both take the same time: 1.5 % with one block ahead, 1.1 % with more, as does a resident model
    beside copies that nobody needs.
    """
    if prefetch == 0:
        return compute + copy
    slower, faster = max(compute, copy), min(compute, copy)
    return slower * (1 + CONTENTION.get(prefetch, CONTENTION_DEEPER) * faster / slower)


def _start_seconds(
    facts: ModelFacts, placement: Placement, around: Around, machine: Hardware
) -> float:
    """Seconds to set up from ordinary host memory: page-locking, and copies to the device."""
    moved = _standing(facts, around)
    if placement.kind == RESIDENT:
        moved += sum(dit.bytes for dit in facts.dits)
    pageable = _rate(machine.pageable_gb_per_s)
    parked = _parked(facts, placement, around)
    streaming = streaming_seconds(facts, placement)
    return streaming + parked / (LOCK_GB_PER_S * 1e9) + moved / (pageable * 1e9)


def streaming_seconds(facts: ModelFacts, placement: Placement) -> float:
    """Seconds to bring the blocks of the DiTs into the form in which they are streamed."""
    if placement.kind != STREAM:
        return 0.0
    setup = sum(packed.setup_bytes(dit, placement.packed) for dit in facts.dits)
    return setup / (LOCK_GB_PER_S * 1e9)
