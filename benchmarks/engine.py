"""What the micro parts share: the engine's backend for a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.harness import Session

if TYPE_CHECKING:
    from wanoffload import _C

# The key and the values of each row of a part, as they are measured.
Found = Iterator[tuple[dict[str, Any], dict[str, Any]]]


def is_small(session: Session) -> bool:
    """Whether only the harness is to be tried out."""
    return bool(session.options.model == "tiny")


def backend_for(device: torch.device) -> _C.Backend:
    """The engine's backend for a device, whose context is made first."""
    from wanoffload import _C

    if device.type != "cuda":
        return _C.HostBackend()
    torch.ones(1, device=device)
    return _C.CudaBackend(device.index or 0)
