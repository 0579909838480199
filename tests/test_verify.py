"""verify=True: the fingerprint of a slot against that of its unit's image, on host and device."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wanoffload
from tests.small_models import MODELS, forward
from wanoffload import VerifyError
from wanoffload._C import UsageError
from wanoffload._C import fingerprint as host_fingerprint

KIND = MODELS["wan21_t2v"]


def of_host(memory: torch.Tensor, threads: int = 2) -> int:
    return host_fingerprint(memory.data_ptr(), memory.numel(), threads)


@given(words=st.integers(0, 20_000), seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_kernel_host_and_reference_agree(words: int, seed: int) -> None:
    """On the CPU the kernel runs in Triton's interpreter."""
    fingerprint = pytest.importorskip("wanoffload.kernels.fingerprint")
    generator = torch.Generator().manual_seed(seed)
    memory = torch.randint(0, 256, (4 * words,), dtype=torch.uint8, generator=generator)
    on_device = memory.cuda() if torch.cuda.is_available() else memory
    expected = fingerprint.fingerprint_reference(memory)
    assert of_host(memory) == expected
    assert fingerprint.fingerprint(on_device) == expected


def test_one_flipped_bit_and_two_swapped_words_show() -> None:
    memory = torch.randint(0, 256, (1 << 16,), dtype=torch.uint8)
    before = of_host(memory)
    for byte in (0, 12_345, (1 << 16) - 1):
        for bit in range(8):
            memory[byte] ^= 1 << bit
            assert of_host(memory) != before
            memory[byte] ^= 1 << bit
    words = memory.view(torch.int32)
    words[[5, 6]] = words[[6, 5]]
    assert of_host(memory) != before


def test_the_fingerprint_does_not_depend_on_the_number_of_threads() -> None:
    memory = torch.randint(0, 256, (9 << 20,), dtype=torch.uint8)
    assert len({of_host(memory, threads) for threads in (1, 2, 7)}) == 1


def test_sizes_that_are_no_words_are_refused() -> None:
    with pytest.raises(UsageError, match="multiple of 4"):
        host_fingerprint(0, 3)


def test_a_verified_model_runs_and_gives_the_same_output(device: str) -> None:
    model, inputs = KIND.make().to(device), KIND.inputs(device)
    expected = forward(model, inputs)
    wanoffload.wrap(model.to("cpu"), 1, device=device, verify=True)
    for _ in range(2):
        assert torch.equal(forward(model, inputs), expected)
    model.blocks[0].attn1.to_q.weight.data.mul_(2)
    assert not torch.equal(forward(model, inputs), expected)


def slot_of_first_block(runtime: wanoffload.Offloader) -> int:
    """Where the first block waits for the next forward, once its copy has arrived."""
    image = runtime.bindings[0].image
    expected = host_fingerprint(image.address, image.nbytes)
    for _ in range(1000):
        for slot in range(runtime.memory.slots.count):
            if runtime.memory.fingerprint(0, slot, image.nbytes) == expected:
                return slot
        time.sleep(0.01)
    raise AssertionError("the first block did not arrive")


def test_wrong_bytes_in_a_slot_are_named_with_unit_slot_and_generation(device: str) -> None:
    model, inputs = KIND.make(), KIND.inputs(device)
    wanoffload.wrap(model, 1, device=device, verify=True)
    runtime = wanoffload.offloader(model)
    forward(model, inputs)
    slot = slot_of_first_block(runtime)
    runtime.memory.slots.window(slot, 64)[50] ^= 1
    expected = rf"blocks\.0 in slot {slot}, generation \d+, before use.*last events"
    with pytest.raises(VerifyError, match="(?s)" + expected):
        forward(model, inputs)


def test_bytes_that_change_during_use_are_found_before_the_slot_is_given_up(device: str) -> None:
    model, inputs = KIND.make(), KIND.inputs(device)
    wanoffload.wrap(model, 1, device=device, verify=True)
    handle = model.blocks[2].attn1.register_forward_hook(
        lambda module, *_: module.to_q.weight.data.add_(1)
    )
    with pytest.raises(VerifyError, match=r"blocks\.2 in slot \d, generation \d+, after use"):
        forward(model, inputs)
    handle.remove()
    forward(model, inputs)
