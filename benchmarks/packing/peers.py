"""The part ``peers``: what others published of packed weights that are offloaded. Nothing runs.

DFloat11 (dfloat11 0.5.0) keeps Huffman codes of the exponents and, with ``cpu_offload``, copies a
block's to the device in the hook that decodes it, on the stream that computes. It needs cupy, and
its encoder is a loop in Python over every weight.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from benchmarks.engine import Found
from benchmarks.packing.bench import PackingBench


@dataclass(frozen=True)
class Published:
    """A line of somebody's table; `where` names it."""

    who: str
    what: str
    plain_gb: float
    packed_gb: float
    resident: str
    offloaded: str
    where: str


PUBLISHED = (
    Published(
        "DFloat11",
        "Wan2.2-T2V-A14B, 5 s at 720p, A100",
        56.0,
        38.85,
        "42 min, peak 41.06 GB",
        "44 min, peak 22.49 GB",
        "huggingface.co/DFloat11/Wan2.2-T2V-A14B-2-DF11",
    ),
    Published(
        "DFloat11",
        "Qwen-Image, 1328x1328, A100",
        41.0,
        28.42,
        "100 s, peak 29.74 GB",
        "260 s, peak 16.68 GB",
        "huggingface.co/DFloat11/Qwen-Image-DF11",
    ),
)


def peers(bench: PackingBench) -> Found:
    """A row for each line; nothing in it was measured here."""
    for number, each in enumerate(PUBLISHED):
        values = {"verified": True, "published": asdict(each), "claims": []}
        yield {"what": f"published {number + 1}"}, values
