"""The kernels that pack on a device: their bytes are those of the CPU's encoder.

In Triton's interpreter, and on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests import plain_packing
from tests.kernel_chunks import DEVICE
from tests.packed_images import Plain, gaussian, packed_bytes, plain_image
from tests.test_packing import ALL_PATTERNS
from wanoffload._C import PackingPlan, fingerprint

pack = pytest.importorskip("wanoffload.kernels.pack")
tile_kernel = pytest.importorskip("wanoffload.kernels.tiles")


def tiles_of(plain: Plain) -> Any:
    return pack.tile_escapes(plain.image.to(DEVICE), plain.tensors)


def plan_of(plain: Plain, tiles: Any) -> PackingPlan:
    return PackingPlan(plain.image.numel(), plain.tensors, memoryview(tiles.escapes.cpu().numpy()))


def packed_on_device(plain: Plain) -> torch.Tensor:
    image = plain.image.to(DEVICE)
    tiles = pack.tile_escapes(image, plain.tensors)
    plan = plan_of(plain, tiles)
    packed = torch.full((plan.packed_bytes,), 0xA5, dtype=torch.uint8, device=DEVICE)
    checksums = pack.write_sections(image, tiles, plan.runs, packed)
    on_host = packed.cpu()
    plan.write_heads(on_host.data_ptr(), [sum % 2**64 for sum in checksums.tolist()])
    return on_host


def check_same_bytes(tensors: Sequence[torch.Tensor]) -> None:
    plain = plain_image(tensors)
    assert torch.equal(packed_on_device(plain), packed_bytes(plain))


@pytest.mark.parametrize("weights", [0, 1, 128, 1023, 1024, 1025, 4096, 8192, 8193, 17 * 1024 + 3])
def test_weights_of_any_number_give_the_bytes_of_the_cpu(weights: int) -> None:
    check_same_bytes([gaussian(weights)])


def test_mixed_tensors_give_the_bytes_of_the_cpu() -> None:
    check_same_bytes(
        [
            torch.randn(3, 5),
            gaussian(3 * 1024 + 77),
            torch.empty(0, dtype=torch.bfloat16),
            torch.randint(-100, 100, (16384 + 777,), dtype=torch.int8),
            ALL_PATTERNS[torch.randperm(65_536)[:2048]],
            gaussian(9 * 1024, 5.0),
            torch.zeros(2048, dtype=torch.bfloat16),
        ]
    )


def test_a_chunk_of_more_than_32_tensors_gives_the_bytes_of_the_cpu() -> None:
    check_same_bytes([gaussian(1024 + 8 * i, 2.0 ** (i - 20)) for i in range(40)])


def test_tiles_of_any_weights_among_others_give_the_bytes_of_the_cpu() -> None:
    tiles = gaussian(64 * 1024).view(torch.int16).view(64, 1024)
    tiles[3] = ALL_PATTERNS[torch.randperm(65_536)[:1024]]
    tiles[4] = 0x7FC0
    tiles[9, ::7] = 0
    tiles[17].view(4, 32, 8)[:, 5] = -1
    tiles[63, :500] = ALL_PATTERNS[:500]
    check_same_bytes([tiles])


def test_no_tensors_give_the_bytes_of_the_cpu() -> None:
    check_same_bytes([])


@pytest.mark.gpu
def test_many_weights_give_the_bytes_of_the_cpu() -> None:
    weights = torch.randn(5120, 5120) * torch.rand(5120, 1) * 0.1
    check_same_bytes(
        [
            weights.to(torch.bfloat16),
            torch.randn(5_000_001),
            gaussian(12_345_678),
            ALL_PATTERNS.repeat(20),
            gaussian(40_000_000, 1e-3),
        ]
    )


def exponents(*parts: tuple[int, int]) -> torch.Tensor:
    """A tile with as many weights of each exponent, mixed."""
    of_each = torch.cat([torch.full((count,), exponent) for exponent, count in parts])
    noise = torch.randint(0, 128, (1024,)) | (torch.randint(-1, 1, (1024,)) << 15)
    return ((of_each[torch.randperm(1024)] << 7) | noise).to(torch.int16)


HARD_TILES = {
    "one exponent": [(120, 1024)],
    "the lowest": [(0, 1024)],
    "the highest": [(255, 1024)],
    "both ends": [(0, 512), (255, 512)],
    "two of the same weight": [(30, 512), (90, 512)],
    "the higher of two by one weight": [(30, 511), (90, 513)],
    "just within seven": [(100, 512), (106, 512)],
    "just beyond seven": [(100, 512), (107, 512)],
    "beyond seven, the higher": [(100, 511), (107, 513)],
    "seven and one on each side": [(99, 1), (100, 300), (106, 722), (107, 1)],
    "all the same": [(e, 4) for e in range(256)],
    "248 and 255": [(248, 512), (255, 512)],
    "249 to 255": [(249, 300), (252, 300), (255, 424)],
}


def test_bases_are_those_of_the_rule_and_so_are_escapes() -> None:
    tiles = torch.stack([exponents(*parts) for parts in HARD_TILES.values()])
    found = tiles_of(plain_image([tiles]))
    rule = [plain_packing.best_base(tile) for tile in tiles.numpy().view(np.uint16)]
    assert list(zip(found.bases.tolist(), found.escapes.tolist(), strict=True)) == rule
    references = tile_kernel.tiles_reference(tiles)
    assert list(zip(*(r.tolist() for r in references), strict=True)) == rule


def test_tiles_of_several_tensors_are_counted_in_order() -> None:
    tensors = [gaussian(3000), torch.randn(100), gaussian(900), gaussian(10_240, 9.0)]
    tensors[3].view(torch.int16)[5 * 1024 : 5 * 1024 + 77] = 0
    found = tiles_of(plain_image(tensors))
    whole = torch.cat([tensors[0][:2048], tensors[3]]).view(torch.int16).view(-1, 1024)
    bases, escapes = tile_kernel.tiles_reference(whole)
    assert found.bases.tolist() == bases.tolist()
    assert found.escapes.tolist() == escapes.tolist()
    assert escapes[7] >= 77


def test_checksums_of_runs_add_up_to_the_fingerprint() -> None:
    plain = plain_image([gaussian(9000), torch.randn(5000)])
    tiles = tiles_of(plain)
    plan = plan_of(plain, tiles)
    packed = torch.empty(plan.packed_bytes, dtype=torch.uint8, device=DEVICE)
    checksums = pack.write_sections(plain.image.to(DEVICE), tiles, plan.runs, packed)
    assert len(plan.runs) == 3
    wanted = fingerprint(plain.image.data_ptr(), plain.image.numel())
    assert int(checksums.sum()) % 2**64 == wanted


def test_nothing_beside_the_packed_image_is_written() -> None:
    plain = plain_image([gaussian(9 * 1024 + 5), torch.randn(3000)])
    image, tiles = plain.image.to(DEVICE), tiles_of(plain)
    runs = plan_of(plain, tiles).runs
    nbytes = plan_of(plain, tiles).packed_bytes
    around = torch.full((nbytes + 8192,), 0xA5, dtype=torch.uint8, device=DEVICE)
    pack.write_sections(image, tiles, runs, around[4096:-4096])
    assert (around[:4096] == 0xA5).all()
    assert (around[-4096:] == 0xA5).all()


def test_the_reference_gives_the_sections_of_the_cpu() -> None:
    weights = torch.cat([gaussian(12 * 1024).view(torch.int16), ALL_PATTERNS[::64]])
    plain = plain_image([weights])
    packed = packed_bytes(plain)
    ((_, _, _, sections, _, _),) = plan_of(plain, tiles_of(plain)).runs
    wanted = pack.sections_reference(weights.view(13, 1024))
    assert torch.equal(packed[sections : sections + wanted.numel()], wanted)
