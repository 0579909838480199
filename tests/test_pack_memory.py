"""What packing takes of the host's memory on its way: the model, and one unit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.small_models import MODELS
from tests.test_checkpoint import save
from tests.test_load import LARGE

SPARE = 24 << 20
"""Bytes that allocators, threads and modules may keep."""

START = """
import gc, json, psutil, torch, wanoffload
from diffusers import WanTransformer3DModel

torch.set_default_dtype(torch.bfloat16)

def high_water():
    with open("/proc/self/status") as status:
        return next(int(l.split()[1]) << 10 for l in status if l.startswith("VmHWM"))

def forget_high_water():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

def rss():
    gc.collect()
    return psutil.Process().memory_info().rss

def report(before, model):
    stats = wanoffload.offloader(model).stats()
    print(json.dumps([high_water() - before, rss() - before, *(getattr(stats, name) for name in
          ("host_bytes", "plain_bytes", "slot_bytes", "staging_bytes"))]))
"""


def measured(code: str) -> list[int]:
    result = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    numbers: list[int] = [int(n) for n in result.stdout.strip("[]\n").split(",")]
    return numbers


@pytest.fixture
def warm(tmp_path: Path) -> Path:
    """A checkpoint for a first load, which brings threads and modules."""
    save(MODELS["wan22_5b"].make(), tmp_path / "warm")
    return tmp_path / "warm"


def test_wrapping_takes_the_memory_of_one_unit_plain_and_packed() -> None:
    peak, after, host, plain, slots, staging = measured(f"""
def wrap(model):
    return wanoffload.wrap(model, 0, device="cpu", pack=True)

wrap(WanTransformer3DModel(**{{**{LARGE!r}, "num_attention_heads": 2, "num_layers": 2}}))
model = WanTransformer3DModel(**{LARGE!r})
before = rss()
forget_high_water()
report(before, wrap(model))
""")
    unit = plain // LARGE["num_layers"]
    assert 190e6 < plain < 220e6
    assert 0.69 < host / plain < 0.71
    assert peak < 1.71 * unit + slots + SPARE
    assert after < host - plain + slots + staging + SPARE


@pytest.mark.parametrize("way", ["load", "cache"])
def test_loading_takes_the_packed_blocks_and_one_unit(tmp_path: Path, warm: Path, way: str) -> None:
    cache = f", cache={str(tmp_path / 'cache')!r}" if way == "cache" else ""
    before = torch.get_default_dtype()
    peak, _, host, plain, slots, staging = measured(f"""
def load(folder, **options):
    options = dict(torch_dtype=torch.bfloat16, prefetch=0, device="cpu", pack=True, **options)
    return wanoffload.load(WanTransformer3DModel, folder, **options)

model = WanTransformer3DModel(**{LARGE!r})
model.save_pretrained({str(tmp_path / "model")!r}, max_shard_size="50MB")
del model
load({str(warm)!r})
before = rss()
forget_high_water()
report(before, load({str(tmp_path / "model")!r}{cache}))
""")
    assert torch.get_default_dtype() == before
    unit = plain // LARGE["num_layers"]
    others = 8 << 20
    assert peak < 1.03 * host + 1.71 * unit + slots + staging + others + SPARE
    assert peak < plain + slots + staging
