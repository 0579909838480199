"""Which of a model's blocks are packed. Pure: from what was asked, sizes and room to an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wanoffload.errors import CacheFileError, WrapError
from wanoffload.host_tiers import DISK, PAGEABLE, RING_BYTES, HostChoice, evenly
from wanoffload.sizes import gb

Pack = bool | float | str | None
"""What is asked for. True, False, AUTO_PACK or None: not chosen. A plan may ask for a share of the
blocks, from 0.0 to 1.0."""
AUTO_PACK = "auto"


@dataclass(frozen=True)
class Cached:
    """How the images of a model's units, in their order, stand in a cache file that is there."""

    path: Path
    packed: tuple[bool, ...]
    sizes: tuple[int, ...]

    @property
    def packed_units(self) -> frozenset[int]:
        return frozenset(number for number, packed in enumerate(self.packed) if packed)


@dataclass(frozen=True)
class Packable:
    """What is known of a model's units, in their order, before it is decided whether to pack them.

    `plain`: bytes of their images. `packed`: about what they take packed, None for one in which
    nothing can be packed. `why_not_in_files`: why plain images of the model can't stand in files;
    None: they can. `cached`: the cache file, if it is there; `to_be_cached`: one is to be written.
    `called`: what units are.
    """

    plain: Sequence[int]
    packed: Sequence[int | None]
    why_not_in_files: str | None = None
    cached: Cached | None = None
    to_be_cached: bool = False
    called: str = "blocks"

    @property
    def units(self) -> frozenset[int]:
        """The units that can be packed."""
        return frozenset(number for number, size in enumerate(self.packed) if size is not None)

    def sizes(self, packed: frozenset[int]) -> list[int]:
        """Bytes of the images if these units are packed; as they are where a cache file tells."""
        if self.cached is not None:
            return list(self.cached.sizes)
        pairs = enumerate(zip(self.plain, self.packed, strict=True))
        return [coded or plain if number in packed else plain for number, (plain, coded) in pairs]


def check_pack(pack: object) -> None:
    """Raises WrapError for what a user can't ask for."""
    if pack is not None and not isinstance(pack, bool) and pack != AUTO_PACK:
        raise WrapError(f"pack is True, False, 'auto' or None, not {pack!r}")


def choose(
    pack: Pack, of: Packable, host: HostChoice, room: int, lockable: int
) -> tuple[frozenset[int], str]:
    """The units that are packed, and why, in a few words for the log.

    Args:
        pack: None: as the cache file is; plain without one. A share: so many units, evenly; as the
            cache file is where one is there. "auto": the same where one is there; else packed if
            the host can't hold all blocks plain, page-locked unless `host` says otherwise, and can
            hold them packed, or can have them in no other way.
        room, lockable: bytes of host memory that are to be had, and that may be page-locked.

    Raises:
        WrapError: all units are to be packed, and nothing can be.
        CacheFileError: the cache file holds packed images and plain ones are asked for, or the
            other way round.
    """
    if pack == 1 and not of.units:
        raise WrapError(
            "pack=True: no block of this model holds bf16 weights, and nothing else is packed; "
            "leave pack out, or load the model with torch_dtype=torch.bfloat16"
        )
    if of.cached is not None:
        return _as_cached(pack, of.cached, of)
    if pack == AUTO_PACK:
        packed, why = _automatic(of, host, room, lockable)
        return (of.units if packed else frozenset()), why
    share = float(pack or 0)
    units = evenly(round(share * len(of.plain)), len(of.plain)) & of.units
    return units, f"packed: {len(units)} of {len(of.plain)} {of.called}, as asked" if units else ""


def _as_cached(pack: Pack, cached: Cached, of: Packable) -> tuple[frozenset[int], str]:
    packed = cached.packed_units
    if (pack is not None and pack == 0 and packed) or (pack == 1 and packed != of.units):
        there = f"{len(packed)} of {len(cached.packed)}" if packed else "no"
        raise CacheFileError(
            f"the cache file {cached.path} holds {there} packed images, and pack={bool(pack)} asks "
            f"for {'packed' if pack else 'plain'} ones. Leave pack out to use it as it is, give "
            "another path, or delete the file to have it written anew."
        )
    what = f"packed: {len(packed)} of {len(cached.packed)} {of.called}" if packed else "plain"
    return packed, f"{what}, as in the cache file" if packed or pack is not None else ""


def _automatic(of: Packable, host: HostChoice, room: int, lockable: int) -> tuple[bool, str]:
    if not of.units:
        return False, "plain: no block holds bf16 weights"
    if host.kind == DISK:
        if of.to_be_cached:
            return True, "packed: so less is read from the disk for each use"
        return False, "plain: packed blocks stand on disk in a cache file only, and none is given"
    plain, packed = sum(of.plain), sum(of.sizes(of.units))
    limit = _limit(host, room, lockable)
    if plain <= limit:
        return False, f"plain: the host holds {gb(plain)}"
    lack = f"{gb(plain)} are more than the {gb(max(0, limit))} that the host may hold"
    if packed > limit and not of.to_be_cached and of.why_not_in_files is None:
        return False, f"plain: {lack}, and packed, which is {gb(packed)}, they can't be on disk"
    return True, f"packed: {lack}"


def _limit(host: HostChoice, room: int, lockable: int) -> int:
    """Bytes that images may take if all are in memory, as the choice asks for it."""
    pageable = host.kind == PAGEABLE
    most = room if pageable else min(room, lockable)
    most = most if host.budget is None else min(most, host.budget)
    return most - RING_BYTES if pageable else most
