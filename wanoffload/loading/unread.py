"""A model whose weights are still in their files, and the way that they will take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from wanoffload.loading.cached_weights import CachedWeights
from wanoffload.loading.describing import Described
from wanoffload.loading.stored_weights import StoredWeights
from wanoffload.units import find_units
from wanoffload.weights import Weights


@dataclass(frozen=True)
class Unread:
    """`files`: those of its checkpoint. `cache`, `share`: as of `load`."""

    described: Described
    files: tuple[Path, ...]
    cache: Path | None = None
    share: str | None = None

    def why_not_in_files(self, packed: bool = False) -> str | None:
        """What keeps some block from standing on disk, plain or packed."""
        if self.cache is not None:
            return None
        stored = StoredWeights(self.described, torch.device("cpu"))
        reasons = (
            stored.why_not_in_files(unit, packed) for unit in find_units(self.described.module)
        )
        return next((reason for reason in reasons if reason is not None), None)

    def weights(self, device: torch.device) -> Weights:
        """The weights, to be read once."""
        stored = StoredWeights(self.described, device)
        if self.cache is None:
            return stored
        return CachedWeights(stored, self.described.module, self.cache, self.files)
