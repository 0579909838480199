"""What packing takes and gives: bytes over the link and on the host, time of the device, staging.

Pure arithmetic, part of the cost model (`cost`). `share`: the part of a DiT's blocks that is
packed, 0 to 1; packed blocks stand evenly between the others. `docs/packing.md` has the format.
"""

from __future__ import annotations

import math

from wanoffload.facts.model import DitFacts
from wanoffload.machine.hardware import Hardware
from wanoffload.staging import CHUNK_BYTES, STAGING_SLOTS

RATIO = 0.703
"""Of a bf16 tensor's bytes. A weight takes 11 of 16 bits, a tile of 1,024 its base, and escapes 2.1
to 2.8 % of a byte each: 0.700 to 0.704, whatever the scales of the rows. 0.703 of a 14B's."""
HOST_RATIO = 0.72
"""What is planned to be page-locked: room for weights that pack a little worse than that."""
DECODE_EFFICIENCY = 0.79
"""Part of the rate of one large elementwise kernel that decoding reaches: 2,000 GB/s of output, and
with them 1,410 GB/s of packed bytes read, of 4,298 on an H200."""
DECODE_EXPOSED = 1.0
"""Part of the decoding that the compute stream is slowed by. All of it: both want the device's
memory. Of 36 ms a step (14B on an H100) 32 show at 480x832x17 and 38 at 81 frames."""
SETUP_FACTOR = 1.5
"""Times as long to set up as a plain block: it goes to the device and back."""
MARGIN = 0.03
"""By so much the link is to be quicker than compute where only some blocks are packed. Too many
cost their decoding; too few cost ten times as much, by their copies."""


def link_bytes(dit: DitFacts, share: float) -> int:
    """Bytes of the blocks as they come over the link, in one forward."""
    return sum(dit.block_bytes) - round(share * dit.bf16_bytes * (1 - RATIO))


def host_bytes(dit: DitFacts, share: float) -> int:
    """Bytes of the blocks as they stand on the host."""
    return sum(dit.block_bytes) - round(share * dit.bf16_bytes * (1 - HOST_RATIO))


def staging_bytes(dit: DitFacts, share: float) -> int:
    """Device memory through which packed chunks pass."""
    if not share or not dit.block_bytes:
        return 0
    return round(STAGING_SLOTS * min(CHUNK_BYTES, RATIO * max(dit.block_bytes)))


def decode_seconds(dit: DitFacts, share: float, machine: Hardware) -> float:
    """What decoding takes away from compute, in one forward."""
    return seconds_to_decode(round(share * dit.bf16_bytes), machine)


def seconds_to_decode(nbytes: int, machine: Hardware) -> float:
    """What unpacking so many plain bytes takes away from compute."""
    assert machine.device_gb_per_s is not None
    moved = nbytes * (RATIO + 1)
    return DECODE_EXPOSED * moved / (machine.device_gb_per_s * 1e9 * DECODE_EFFICIENCY)


def copy_seconds(dit: DitFacts, share: float, machine: Hardware) -> float:
    """The link's time for the blocks of one forward."""
    assert machine.link_gb_per_s is not None
    return link_bytes(dit, share) / (machine.link_gb_per_s * 1e9)


def setup_bytes(dit: DitFacts, share: float) -> float:
    """Bytes of plain blocks that take as long to set up."""
    return sum(dit.block_bytes) * (1 + share * (SETUP_FACTOR - 1))


def share_needed(dit: DitFacts, compute: float, machine: Hardware) -> float:
    """The least share of packed blocks with which the link is quicker than compute by MARGIN.

    `compute`: seconds of a forward without decoding. 0 where plain blocks are quick enough, 1 where
    all must be packed (and even then the link may be the slower).
    """
    blocks = len(dit.block_bytes)
    if not blocks or not dit.bf16_bytes:
        return 0.0
    kept = 1 - MARGIN
    too_long = copy_seconds(dit, 0, machine) - kept * compute
    saved = copy_seconds(dit, 0, machine) - copy_seconds(dit, 1, machine)
    needed = too_long / (saved + kept * decode_seconds(dit, 1, machine))
    return min(max(math.ceil(needed * blocks), 0), blocks) / blocks
