"""On the CPU a dead offload still gives the right output; with its source spoilt it does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wanoffload.pipelines.parking import Parked


def _spoil(tensor: Tensor) -> None:
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    elif tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).max)


@pytest.fixture
def poisoned_homes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """While parked weights are in use, their home on the host holds NaN.

    Gives the number of tensors that were spoilt, one entry a use.
    """
    bring_in, send_home = Parked._bring_in, Parked.send_home
    saved: dict[Parked, list[tuple[Tensor, Tensor]]] = {}
    uses: list[int] = []

    def spoiling(self: Parked) -> None:
        bring_in(self)
        homes = [away.home for away in self._away]
        with torch.inference_mode(False), torch.no_grad():
            saved[self] = [(home, home.clone()) for home in homes]
            for home in homes:
                _spoil(home)
        uses.append(len(homes))

    def restoring(self: Parked) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for home, value in saved.pop(self, []):
                home.copy_(value)
        send_home(self)

    monkeypatch.setattr(Parked, "_bring_in", spoiling)
    monkeypatch.setattr(Parked, "send_home", restoring)
    return uses
