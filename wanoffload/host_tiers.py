"""Where on the host each unit's image stands. Pure: from sizes and room to a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from wanoffload.errors import HostMemoryError, WrapError
from wanoffload.sizes import gb, parse_bytes

PINNED, PAGEABLE, DISK = "pinned", "pageable", "disk"
AUTO = "auto"
HOST_KINDS = (AUTO, PINNED, PAGEABLE, DISK)

CHUNK_BYTES = 8 << 20
RING_BYTES = 128 << 20
"""Of the ring of a model of which something is pageable, and nothing on disk."""
READ_AHEAD_BYTES = 1 << 30
"""Of the ring of a model of which something is on disk, at most: so far ahead is read."""


@dataclass(frozen=True)
class HostChoice:
    """What was asked: `kind`, one of HOST_KINDS, and the bytes that images and ring may take.

    Raises WrapError for what can't be asked.
    """

    kind: str = AUTO
    budget: int | None = None

    @staticmethod
    def of(host: str, budget: int | str | None) -> HostChoice:
        if host not in HOST_KINDS:
            raise WrapError(f"host is one of {', '.join(map(repr, HOST_KINDS))}, not {host!r}")
        try:
            return HostChoice(host, None if budget is None else parse_bytes(budget, "host_budget"))
        except ValueError as error:
            raise WrapError(str(error)) from None


@dataclass(frozen=True)
class HostPlan:
    """The tier of each unit, the bytes of the pinned ring, and what was chosen in a sentence.

    `shared`: units whose images another process has filled: they take no memory of this one.
    `packed`: units whose images are packed. `sizes`: bytes of the images; of those that are still
    to be packed, an estimate. `called`: what units are.
    """

    tiers: tuple[str, ...]
    ring_bytes: int
    sentence: str
    shared: frozenset[int] = frozenset()
    packed: frozenset[int] = frozenset()
    sizes: tuple[int, ...] = ()
    called: str = "blocks"

    def takes_memory(self, unit: int) -> bool:
        """Whether the unit's image is new memory of the host."""
        return self.tiers[unit] != DISK and unit not in self.shared

    @property
    def host_bytes(self) -> int:
        """Of the images and the ring, in host memory."""
        return host_bytes(self.sizes, self)

    @property
    def ring_chunks(self) -> int:
        """Also where no ring is planned: a unit that is written to, or not locked, may need one."""
        return -(-max(RING_BYTES, self.ring_bytes) // CHUNK_BYTES)


def assign(
    what: str,
    sizes: Sequence[int],
    choice: HostChoice,
    room: int,
    lockable: int,
    why_not_in_files: Sequence[str | None],
    shared: frozenset[int] = frozenset(),
    packed: frozenset[int] = frozenset(),
    called: str = "blocks",
) -> HostPlan:
    """The tier of each unit, in the order in which they are used.

    `auto` page-locks as much as is `lockable`. What is too much stands on disk, spread evenly
    between the others, so that it is read while they are used; where that can't be, it is pageable.

    Args:
        what: is done, for messages.
        sizes: of the units' images, in bytes.
        room, lockable: bytes of host memory that are to be had, and how many of them may be
            page-locked. They count for `auto` alone: what other kinds need is looked at before
            their bytes are moved.
        why_not_in_files: for each unit, what keeps it from standing in a file; None: nothing.
        shared: units whose images are in memory already, filled by another process.
        packed: units whose images are packed.
        called: what units are, for messages.

    Raises:
        WrapError: "disk", and a unit can't stand in a file.
        HostMemoryError: the budget, or with "auto" the room, is less than the least; names it.
    """
    if choice.kind == AUTO:
        limit = room if choice.budget is None else min(room, choice.budget)
        lockable = min(limit, lockable)
        tiers = _automatic(what, sizes, limit, lockable, why_not_in_files, shared, called)
    else:
        tiers = (choice.kind,) * len(sizes)
        _check_files(choice, why_not_in_files)
    plan = HostPlan(tiers, ring_bytes(sizes, tiers), "", shared, packed, tuple(sizes), called)
    need = host_bytes(sizes, plan)
    if choice.budget is not None and need > choice.budget:
        raise HostMemoryError(
            f"{what}: host={choice.kind!r} needs {gb(need)} of host memory"
            f"{_of_which_ring(plan)}; host_budget is {gb(choice.budget)}: raise it"
            + ("" if choice.kind in (AUTO, DISK) else ", or choose host='auto'")
        )
    return with_sizes(plan, sizes)


def with_sizes(plan: HostPlan, sizes: Sequence[int]) -> HostPlan:
    """The plan with images of these sizes, and the sentence that says so."""
    return replace(plan, sizes=tuple(sizes), sentence=_sentence(sizes, plan))


def host_bytes(sizes: Sequence[int], plan: HostPlan) -> int:
    """Bytes of host memory that a plan takes: images and ring."""
    images = sum(size for unit, size in enumerate(sizes) if plan.takes_memory(unit))
    return images + plan.ring_bytes


def ring_bytes(sizes: Sequence[int], tiers: Sequence[str]) -> int:
    """Of the ring that these units pass through; 0 where all are page-locked."""
    through = [size for size, tier in zip(sizes, tiers, strict=True) if tier != PINNED]
    if not through:
        return 0
    if DISK not in tiers:
        return RING_BYTES
    whole_chunks = -(-sum(through) // CHUNK_BYTES) * CHUNK_BYTES
    return min(READ_AHEAD_BYTES, max(RING_BYTES, whole_chunks))


def _automatic(
    what: str,
    sizes: Sequence[int],
    limit: int,
    lockable: int,
    why_not: Sequence[str | None],
    shared: frozenset[int],
    called: str,
) -> tuple[str, ...]:
    sizes = [0 if unit in shared else size for unit, size in enumerate(sizes)]
    everything = [unit for unit in range(len(sizes)) if unit not in shared]
    may_be_in_files = [unit for unit in everything if why_not[unit] is None]
    tried = [(PINNED,) * len(sizes)]
    for tier, may, most in ((DISK, may_be_in_files, lockable), (PAGEABLE, everything, limit)):
        for count in range(len(may) + 1):
            tiers = _spread(len(sizes), tier, may, count)
            plan = HostPlan(tiers, ring_bytes(sizes, tiers), "")
            locked = sum(s for s, own in zip(sizes, tiers, strict=True) if own == PINNED)
            if locked + plan.ring_bytes <= lockable and host_bytes(sizes, plan) <= most:
                return tiers
        tried.append(tiers)
    least = min(host_bytes(sizes, HostPlan(t, ring_bytes(sizes, t), "")) for t in tried)
    reason = next((text for text in why_not if text is not None), None)
    raise HostMemoryError(
        f"{what}: its {len(sizes)} {called}, {gb(sum(sizes))} in all, need at least {gb(least)} of "
        f"host memory; {gb(max(limit, 0))} may be taken. Free host memory or raise host_budget"
        + (f"; what is on disk needs none, but {reason}" if reason else "")
    )


def _spread(units: int, tier: str, may: Sequence[int], count: int) -> tuple[str, ...]:
    """`count` of those that may are of this tier, evenly between the others, which are pinned."""
    chosen = {may[place] for place in evenly(count, len(may))}
    return tuple(tier if number in chosen else PINNED for number in range(units))


def evenly(count: int, total: int) -> frozenset[int]:
    """`count` of the numbers below `total`, evenly between the others."""
    return frozenset(step * total // count for step in range(count))


def _check_files(choice: HostChoice, why_not_in_files: Sequence[str | None]) -> None:
    if choice.kind != DISK:
        return
    for reason in why_not_in_files:
        if reason is not None:
            raise WrapError(f"host='disk' is not to be had here: {reason}")


def _of_which_ring(plan: HostPlan) -> str:
    return f" ({gb(plan.ring_bytes)} of it for the pinned ring)" if plan.ring_bytes else ""


def _sentence(sizes: Sequence[int], plan: HostPlan) -> str:
    parts = []
    for tier, words in ((PINNED, "page-locked"), (PAGEABLE, "pageable"), (DISK, "on disk")):
        chosen = [s for s, own in zip(sizes, plan.tiers, strict=True) if own == tier]
        if chosen:
            parts.append(f"{len(chosen)} of {len(sizes)} {plan.called} {words} ({gb(sum(chosen))})")
    ring = f", through a pinned ring of {gb(plan.ring_bytes)}" if plan.ring_bytes else ""
    shared = f"; {len(plan.shared)} of them shared" if plan.shared else ""
    packed = f"; {len(plan.packed)} of them packed" if plan.packed else ""
    return ", ".join(parts) + ring + shared + packed
