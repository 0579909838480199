"""wrap and unwrap: every kind of model gives the resident model's output, bit for bit, and the
blocks really came through the engine."""

from __future__ import annotations

import gc
import time
import weakref

import psutil
import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from torch import nn

import wanoffload
from tests.small_models import MODELS, Backwards, Inputs, forward
from wanoffload import WrapError, host_memory, wrapping
from wanoffload.runtime import Offloader


def expected_fetches(runtime: Offloader, forwards: int) -> int:
    """Every block once a forward, and those that the last forward fetched for the next."""
    stats = runtime.stats()
    if stats.slots >= stats.units:
        return stats.units
    return forwards * stats.units + stats.slots - (0 if stats.slots > 1 else 1)


def image_bytes(model: nn.Module) -> list[int]:
    return [binding.image.nbytes for binding in wanoffload.offloader(model).bindings]


@pytest.mark.parametrize("host", ["pinned", "pageable"])
@pytest.mark.parametrize("prefetch", [0, 1, 2, 3, 50])
@pytest.mark.parametrize("name", MODELS)
def test_output_is_that_of_the_resident_model(
    name: str, prefetch: int, host: str, device: str
) -> None:
    model, _ = MODELS[name]()
    inputs = [MODELS[name].inputs(device, text=text) for text in (0, 1)]
    model.to(device)
    expected = [forward(model, x) for x in inputs]
    model.to("cpu")
    assert not torch.equal(*expected)

    assert wanoffload.wrap(model, prefetch, device=device, host=host) is model
    runtime = wanoffload.offloader(model)
    runtime.poison_slots()
    for _ in range(3):
        for x, y in zip(inputs, expected, strict=True):
            assert torch.equal(forward(model, x), y)
    stats = runtime.stats()
    assert stats.units == MODELS[name].units
    assert stats.slots == min(prefetch + 1, stats.units)
    assert stats.forwards == 6
    assert stats.acquires == 6 * stats.units
    # The first forward of a model whose order was not known may fetch some blocks twice.
    assert stats.fetches >= expected_fetches(runtime, 6) - stats.slots
    assert stats.fetches <= expected_fetches(runtime, 6) + 2 * stats.slots
    if prefetch > 0 and name != "qwen_image":
        assert stats.cold == 0
    assert stats.bytes_fetched >= stats.host_bytes

    wanoffload.unwrap(model, device)
    for x, y in zip(inputs, expected, strict=True):
        assert torch.equal(forward(model, x), y)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_fetched_in_the_order_of_the_calls(name: str) -> None:
    """Wan's classes declare their order, so that even the first forward is never cold."""
    model, inputs = MODELS[name]()
    wanoffload.wrap(model, 1, device="cpu")
    forward(model, inputs)
    assert wanoffload.offloader(model).stats().cold == 0


def test_the_order_of_an_unknown_model_is_learned_in_its_first_forward() -> None:
    model = Backwards()
    x = torch.randn(2, 8)
    with torch.no_grad():
        expected = model(x)
        wanoffload.wrap(model, 1, device="cpu")
        runtime = wanoffload.offloader(model)
        assert torch.equal(model(x), expected)
        runtime.reset_stats()
        for _ in range(3):
            assert torch.equal(model(x), expected)
    assert runtime.stats().cold == 0
    assert runtime.stats().fetches == 15


def test_a_model_on_the_device_is_wrapped_too(device: str) -> None:
    model, inputs = MODELS["wan21_t2v"]()
    inputs = MODELS["wan21_t2v"].inputs(device)
    model.to(device)
    expected = forward(model, inputs)
    wanoffload.wrap(model, device=device)
    assert torch.equal(forward(model, inputs), expected)
    assert wanoffload.offloader(model).stats().acquires == MODELS["wan21_t2v"].units


def test_wrap_defaults_to_the_current_device() -> None:
    model, _ = MODELS["wan21_t2v"]()
    wanoffload.wrap(model)
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert wanoffload.offloader(model).device.type == expected
    assert model.device.type == expected


def test_mixed_dtypes_are_kept() -> None:
    model, _ = MODELS["wan21_t2v"]()
    before = {name: p.dtype for name, p in model.named_parameters()}
    assert len(set(before.values())) == 2
    wanoffload.wrap(model, device="cpu")
    assert {name: p.dtype for name, p in model.named_parameters()} == before
    wanoffload.unwrap(model)
    assert {name: p.dtype for name, p in model.named_parameters()} == before


def test_every_tensor_of_a_slot_is_aligned_to_256_bytes() -> None:
    """Bug 10."""
    model, inputs = MODELS["wan21_t2v"]()
    wanoffload.wrap(model, device="cpu")
    seen: list[int] = []
    block = model.blocks[0]
    block.attn1.to_q.register_forward_pre_hook(
        lambda module, _: seen.extend(p.data_ptr() for p in block.parameters())
    )
    forward(model, inputs)
    start = wanoffload.offloader(model).memory.slots.memory.data_ptr()
    assert len(seen) == 27
    assert {(pointer - start) % 256 for pointer in seen} == {0}


@pytest.mark.parametrize("prefetch", [1, 2, 3])
def test_a_steady_forward_does_not_wait_allocate_or_make_events(
    prefetch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 3: five calls a block, each once: the reader's wait and record, and, for the fetch, the
    wait for the slot, one copy, the record. The host asks about no event."""
    backend = wanoffload._C.HostBackend()
    monkeypatch.setattr(wrapping, "backend_for", lambda _: backend)
    model, inputs = MODELS["wan21_t2v"]()
    wanoffload.wrap(model, prefetch, device="cpu")
    for _ in range(prefetch + 1):  # by then each slot has held something
        forward(model, inputs)
    calls, queries = backend.calls, backend.queries
    for _ in range(4):
        forward(model, inputs)
    assert backend.calls - calls == 4 * 5 * MODELS["wan21_t2v"].units
    assert backend.queries == queries


@pytest.mark.parametrize("prefetch", [0, 1, 2, 50])
def test_device_memory_is_known_before_the_first_forward(prefetch: int) -> None:
    """Rule 4: one slot more than is fetched ahead, of the largest block's size, and no more."""
    model, inputs = MODELS["vace"]()
    wanoffload.wrap(model, prefetch, device="cpu")
    runtime = wanoffload.offloader(model)
    slots = min(prefetch + 1, MODELS["vace"].units)
    expected = 256 + slots * max(image_bytes(model))
    assert runtime.stats().slot_bytes == expected
    memory = runtime.memory.slots.memory.data_ptr()
    for _ in range(3):
        forward(model, inputs)
    assert runtime.stats().slot_bytes == runtime.memory.slots.memory.numel() == expected
    assert runtime.memory.slots.memory.data_ptr() == memory


def test_the_tree_of_modules_is_untouched() -> None:
    """Rule 12."""
    model, _ = MODELS["wan21_t2v"]()
    before = [(name, type(module), id(module)) for name, module in model.named_modules()]
    keys = list(model.state_dict())
    wanoffload.wrap(model, device="cpu")
    assert [(name, type(module), id(module)) for name, module in model.named_modules()] == before
    assert list(model.state_dict()) == keys


def test_unwrap_leaves_nothing_behind() -> None:
    model, inputs = MODELS["wan21_t2v"]()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    expected = forward(model, inputs)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanoffload.wrap(model, device="cpu")
    forward(model, inputs)
    assert wanoffload.unwrap(model) is model
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    for name, parameter in model.named_parameters():
        assert type(parameter) is nn.Parameter
        assert torch.equal(parameter, values[name])
    assert torch.equal(forward(model, inputs), expected)
    with pytest.raises(WrapError, match="not wrapped"):
        wanoffload.offloader(model)


def test_ties_within_a_block_are_stored_once_and_ties_across_stay_on_the_device() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.shared = (nn.Linear(16, 16) for _ in range(3))
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.shared(self.two(self.one(x)))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))
            for block in self.blocks:
                block.shared = self.blocks[0].shared
            self.head = nn.Linear(16, 16)
            self.head.bias = self.blocks[2].one.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    model = Model()
    x = torch.randn(2, 16)
    with torch.no_grad():
        expected = model(x)
        wanoffload.wrap(model, 1, device="cpu")
        # Block 0: one matrix (stored once) and two biases.
        assert image_bytes(model) == [16 * 16 * 4 + 2 * 256] * 2 + [16 * 16 * 4 + 256]
        assert torch.equal(model(x), expected)
        assert model.blocks[0].two.weight is model.blocks[0].one.weight
        assert model.blocks[1].shared.weight is model.blocks[0].shared.weight
        assert model.head.bias is model.blocks[2].one.bias
        model.blocks[0].one.weight.zero_()
        changed = model(x)
        wanoffload.unwrap(model)
        assert model.blocks[0].two.weight is model.blocks[0].one.weight
        assert model.head.bias is model.blocks[2].one.bias
        assert torch.equal(model(x), changed)
    assert not torch.equal(changed, expected)


def test_buffers_stay_on_the_device_and_are_not_streamed(device: str) -> None:
    class Block(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.register_buffer("scale", torch.full((8,), 2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model = Model()
    wanoffload.wrap(model, device=device)
    assert image_bytes(model) == [512] * 3
    assert {block.scale.device.type for block in model.blocks} == {device}
    with torch.no_grad():
        model(torch.randn(1, 8, device=device))


# What is refused, and that nothing is changed then.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefetch": -1}, "prefetch is a number of blocks, 0 or more, or None, not -1"),
        ({"prefetch": 1.5}, "prefetch is a number of blocks"),
        ({"prefetch": True}, "prefetch is a number of blocks"),
        ({"host": "tape"}, "host is one of 'auto', 'pinned', 'pageable', 'disk', not 'tape'"),
        ({"host": "disk"}, "the weights of this model are in memory, and in no file"),
        ({"host_budget": "much"}, "host_budget is a number of bytes"),
        ({"verify": "yes"}, "verify is True or False"),
        ({"device": "tpu7"}, "not a device"),
        ({"device": "meta"}, "not supported"),
        ({"device": "cuda:99"}, "no CUDA device|there is no cuda:99"),
    ],
)
def test_a_bad_argument_is_named_and_changes_nothing(
    options: dict[str, object], message: str
) -> None:
    model, inputs = MODELS["wan21_t2v"]()
    before = [id(p) for p in model.parameters()]
    with pytest.raises(WrapError, match=message):
        wanoffload.wrap(model, **options)
    assert [id(p) for p in model.parameters()] == before
    forward(model, inputs)


@pytest.mark.parametrize("option", ["granularities", "reuse_text_kv", "x"])
def test_an_unknown_option_is_an_error(option: str) -> None:
    model, _ = MODELS["wan21_t2v"]()
    with pytest.raises(TypeError, match=option):
        wanoffload.wrap(model, **{option: None})


def test_wrapping_twice_is_an_error() -> None:
    model, inputs = MODELS["wan21_t2v"]()
    wanoffload.wrap(model, device="cpu")
    for device in ("cpu", None):
        with pytest.raises(WrapError, match="already wrapped"):
            wanoffload.wrap(model, device=device)
    with pytest.raises(WrapError, match="already wrapped"):
        wanoffload.wrap(nn.ModuleDict({"inner": model}), device="cpu")
    forward(model, inputs)


def test_unwrapping_what_is_not_wrapped_is_an_error() -> None:
    model, _ = MODELS["wan21_t2v"]()
    for call in (wanoffload.unwrap, wanoffload.offloader):
        with pytest.raises(WrapError, match="not wrapped"):
            call(model)
        with pytest.raises(WrapError, match="not wrapped"):
            call(None)


def test_a_model_that_others_move_is_refused() -> None:
    model, _ = MODELS["wan21_t2v"]()
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(WrapError, match="accelerate hook"):
        wanoffload.wrap(model, device="cpu")

    model, _ = MODELS["wan21_t2v"]()
    apply_group_offloading(
        model, torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    with pytest.raises(WrapError, match="group_offloading"):
        wanoffload.wrap(model, device="cpu")

    model, _ = MODELS["wan21_t2v"]()
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.bfloat16)
    with pytest.raises(WrapError, match="layerwise_casting"):
        wanoffload.wrap(model, device="cpu")


def test_models_that_can_not_be_streamed_are_refused_by_name() -> None:
    with pytest.raises(WrapError, match="takes a transformer"):
        wanoffload.wrap("model")
    with pytest.raises(WrapError, match="no block to stream"):
        wanoffload.wrap(nn.Linear(2, 2), device="cpu")
    with torch.device("meta"):
        model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2)])})
    with pytest.raises(WrapError, match=r"blocks\.0\.weight is on the meta device"):
        wanoffload.wrap(model, device="cpu")

    class Quantized(torch.Tensor):
        pass

    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2)])})
    quantized = nn.Parameter(torch.zeros(2, 2).as_subclass(Quantized), requires_grad=False)
    model["blocks"][0].weight = quantized
    with pytest.raises(WrapError, match=r"blocks\.0\.weight is a Quantized"):
        wanoffload.wrap(model, device="cpu")


def check_as_it_was(model: nn.Module, inputs: Inputs, expected: torch.Tensor) -> None:
    assert torch.equal(forward(model, inputs), expected)
    assert not any("_wanoffload" in vars(module) for module in model.modules())
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_too_little_host_memory_is_an_error_with_numbers_before_anything_moves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = MODELS["wan21_t2v"]()
    expected = forward(model, inputs)
    before = [p.data_ptr() for p in model.parameters()]
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 300 << 20)
    wanoffload.wrap(model, device="cpu")  # small enough
    wanoffload.unwrap(model)

    model, inputs = MODELS["wan21_t2v"]()
    before = [p.data_ptr() for p in model.parameters()]
    monkeypatch.setattr(host_memory, "available_bytes", lambda: host_memory.RESERVE)
    with pytest.raises(
        wanoffload.HostMemoryError, match=r"wrapping WanT.* needs .* GB .* 0\.27 GB"
    ):
        wanoffload.wrap(model, device="cpu", host="pinned")
    with pytest.raises(
        wanoffload.HostMemoryError, match=r"wrap WanT.* its 5 blocks, .* GB .* may be taken"
    ):
        wanoffload.wrap(model, device="cpu")
    assert [p.data_ptr() for p in model.parameters()] == before
    check_as_it_was(model, inputs, expected)


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever call of the backend fails while wrapping: no weight is lost, no hook stays."""
    model, inputs = MODELS["wan21_t2v"]()
    expected = forward(model, inputs)
    values = {name: p.detach().clone() for name, p in model.state_dict().items()}
    failures = 0
    for nth in range(1, 25):
        backend = wanoffload._C.HostBackend()
        backend.fail_at(nth)
        monkeypatch.setattr(wrapping, "backend_for", lambda _, backend=backend: backend)
        try:
            wanoffload.wrap(model, 1, device="cpu", host="pinned")
        except wanoffload.OffloadError:
            failures += 1
            check_as_it_was(model, inputs, expected)
            assert backend.locked_bytes == 0
        else:
            while True:
                try:
                    wanoffload.unwrap(model)
                    break
                except wanoffload.OffloadError:
                    continue  # the backend failed while closing; the model is still whole
        for name, value in model.state_dict().items():
            assert torch.equal(value, values[name]), name
    assert 8 < failures < 24  # the last ones came after everything was done


def settled_threads(process: psutil.Process, at_most: int) -> int:
    """Threads, after at most a second to settle: Linux counts a joined one a moment longer."""
    deadline = time.monotonic() + 1
    while process.num_threads() > at_most and time.monotonic() < deadline:
        time.sleep(0.01)
    return process.num_threads()


def test_memory_comes_back_after_many_cycles() -> None:
    model, inputs = MODELS["wan21_t2v"]()
    process = psutil.Process()
    sizes, threads = [], []
    for _ in range(30):
        wanoffload.wrap(model, device="cpu", host="pageable")
        forward(model, inputs)
        wanoffload.unwrap(model)
        gc.collect()
        sizes.append(process.memory_info().rss)
        threads.append(settled_threads(process, threads[0] if threads else 0))
    assert max(sizes[10:]) - min(sizes[10:]) < 64 << 20
    assert max(threads[1:]) <= threads[0]


def test_a_dropped_model_gives_its_memory_back() -> None:
    backend = wanoffload._C.HostBackend()
    model, inputs = MODELS["wan21_t2v"]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wrapping, "backend_for", lambda _: backend)
        wanoffload.wrap(model, device="cpu")
    forward(model, inputs)
    assert backend.locked_bytes > 0
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert backend.locked_bytes == 0
