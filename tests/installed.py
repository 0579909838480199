"""Run by `make sdist` in a folder that is not the repository: does an installed package work?"""

from pathlib import Path

import torch
from torch import nn

import wanoffload
from wanoffload import _C
from wanoffload.kernels import fingerprint

HERE = Path.cwd() / "site"
for module in (wanoffload, _C, fingerprint):
    assert module.__file__ is not None
    assert Path(module.__file__).is_relative_to(HERE), module.__file__


class Model(nn.Module):
    """Three blocks in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


x = torch.randn(2, 8)
model = Model()
with torch.inference_mode():
    expected = model(x)
    wanoffload.wrap(model, 1, device="cpu")
    assert torch.equal(model(x), expected)
assert wanoffload.offloader(model).stats().acquires == 3
print(f"wanoffload {wanoffload.__version__} from {HERE.name}: a wrapped model runs")
