"""Images: whatever the tensors are, they come back bit for bit."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from wanoffload import image
from wanoffload._C import HostBackend, HostStore, UsageError

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.complex64,
]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Any bit pattern, NaNs and infinities included (a bool is 0 or 1)."""
    count = int(torch.tensor(shape).prod()) if shape else 1
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, dtype=torch.uint8).to(torch.bool)
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit; NaNs of one pattern are equal."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.numel() == 0:
        return True
    flat = [torch.empty(x.shape, dtype=x.dtype).copy_(x).reshape(-1) for x in (a, b)]
    return torch.equal(flat[0].view(torch.uint8), flat[1].view(torch.uint8))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any dtype and shape, dense, transposed, with gaps, repeated, or empty."""
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=0, max_size=4)))
    tensor = random_tensor(draw(st.sampled_from(DTYPES)), shape)
    kind = draw(st.sampled_from(["dense", "transposed", "gaps", "expanded", "offset"]))
    if kind == "transposed" and tensor.dim() >= 2:
        tensor = tensor.transpose(0, -1)
    elif kind == "gaps" and tensor.dim() >= 1:
        tensor = tensor[..., ::2]
    elif kind == "expanded":
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    elif kind == "offset" and tensor.dim() >= 1 and tensor.shape[0] > 1:
        tensor = tensor[1:]
    return tensor


def stored(values: list[torch.Tensor], lock: bool) -> tuple[image.ImageLayout, Any]:
    layout = image.lay_out((str(i), tensor) for i, tensor in enumerate(values))
    memory = HostStore(HostBackend()).allocate(layout.nbytes)
    locking = (lambda image, _: image.lock()) if lock else image.leave_unlocked
    image.write_image(memory, layout, values, locking)
    return layout, memory


@given(values=st.lists(tensors(), min_size=1, max_size=6), lock=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_mix_of_tensors_comes_back_from_host_and_slot(
    values: list[torch.Tensor], lock: bool
) -> None:
    layout, memory = stored(values, lock)
    slot = torch.full((256 + layout.nbytes,), 0xA5, dtype=torch.uint8)
    if layout.nbytes:
        slot[256:] = torch.frombuffer(memory, dtype=torch.uint8)
    for spec, tensor in zip(layout.specs, values, strict=True):
        assert spec.offset % image.ALIGNMENT == 0
        host = image.host_view(spec, memory)
        view = image.device_view(spec, slot, 256)
        assert same_bits(host, tensor)
        assert same_bits(view, tensor)
        assert host.stride() == view.stride() == torch.empty_like(tensor, device="meta").stride()


@given(values=st.lists(tensors(), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_tensors_of_an_image_do_not_overlap(values: list[torch.Tensor]) -> None:
    layout, _ = stored(values, lock=False)
    end = 0
    for spec in layout.specs:
        assert spec.offset >= end
        end = spec.offset + spec.nbytes
    assert end <= layout.nbytes


def test_dense_strides_are_kept_and_aligned() -> None:
    """Bug 10: slices aligned to less than 32 bytes, or lost strides, broke fp8 kernels."""
    weight = random_tensor(torch.float8_e4m3fn, (33, 17)).t()
    bias = random_tensor(torch.bfloat16, (3,))
    layout, memory = stored([bias, weight], lock=False)
    found = image.host_view(layout.specs[1], memory)
    assert found.stride() == weight.stride() == (1, 17)
    assert found.data_ptr() % image.ALIGNMENT == 0
    assert same_bits(found, weight)


def test_a_host_view_has_a_storage_of_its_own() -> None:
    layout, memory = stored([torch.randn(1000), torch.randn(3)], lock=False)
    assert image.host_view(layout.specs[1], memory).untyped_storage().nbytes() == 12


def test_a_host_view_keeps_its_image_alive() -> None:
    layout, memory = stored([torch.arange(1000)], lock=True)
    view = image.host_view(layout.specs[0], memory)
    del memory
    assert torch.equal(view, torch.arange(1000))


def test_an_image_is_mapped_and_locked_exactly_to_the_page() -> None:
    """Bug 9: page-locked memory rounded up to powers of two."""
    store = HostStore(HostBackend())
    memory = store.allocate((5 << 20) + 1)
    memory.lock()
    assert store.mapped_bytes == store.locked_bytes == (5 << 20) + 4096
    memory.unlock()
    assert store.locked_bytes == 0
    del memory
    assert store.mapped_bytes == 0


def test_a_piece_outside_of_an_image_is_refused() -> None:
    memory = HostStore(HostBackend()).allocate(100)
    source = torch.zeros(200, dtype=torch.uint8)
    with pytest.raises(UsageError, match="does not fit an image of 100"):
        memory.fill([(source.data_ptr(), 50, 51)])
