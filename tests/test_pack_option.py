"""`pack=`: blocks stand on the host packed, and everything is as if they did not."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

import wanoffload
from tests.small_models import MODELS, forward
from tests.test_checkpoint import save
from tests.test_load import Watch
from wanoffload import host_memory, packing, wrapping
from wanoffload._C import HostImage, PackedImage, Packer
from wanoffload.engine_memory import EngineMemory
from wanoffload.host_tiers import HostChoice
from wanoffload.image import lay_out
from wanoffload.packing import estimated_bytes, most_bytes
from wanoffload.staging import STAGING_SLOTS
from wanoffload.units import find_units

KIND = MODELS["wan22_5b"]
BF16 = torch.bfloat16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(KIND.make(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    gc.collect()
    return Watch(monkeypatch)


def load(folder: Path, **options: Any) -> nn.Module:
    options = {"torch_dtype": BF16, "device": "cpu", "pack": True, **options}
    return wanoffload.load(WanTransformer3DModel, folder, **options)


def wrap(model: nn.Module | None = None, **options: Any) -> nn.Module:
    return wanoffload.wrap(model or KIND.make(), **{"device": "cpu", "pack": True, **options})


def assert_right(model: nn.Module, forwards: int = 2) -> None:
    """As of the model in memory, every block fetched packed, and no slot read too early."""
    runtime = wanoffload.offloader(model)
    runtime.poison_slots()
    inputs = KIND.inputs(runtime.device.type)
    expected = forward(KIND.make().to(runtime.device), inputs)
    for _ in range(forwards):
        assert torch.equal(forward(model, inputs), expected)
    stats = runtime.stats()
    assert stats.acquires == forwards * stats.units
    assert stats.packed_units == stats.units == 3


def assert_ordinary(model: nn.Module) -> None:
    """An ordinary module, with all its values."""
    values = KIND.make().state_dict()
    assert model.state_dict().keys() == values.keys()
    for name, parameter in model.named_parameters():
        assert type(parameter) is nn.Parameter
        assert parameter.dtype == values[name].dtype
        assert torch.equal(parameter, values[name]), name


# Outputs


@pytest.mark.parametrize("host", ["pinned", "pageable"])
@pytest.mark.parametrize("prefetch", [0, 1, 2, 9])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_the_resident_models(name: str, prefetch: int, host: str, device: str) -> None:
    model = MODELS[name].make().to(device)
    inputs = MODELS[name].inputs(device)
    expected = forward(model, inputs)
    wanoffload.wrap(model, prefetch, device=device, host=host, pack=True, verify=prefetch == 2)
    runtime = wanoffload.offloader(model)
    runtime.poison_slots()
    for _ in range(3):
        assert torch.equal(forward(model, inputs), expected)
    stats = runtime.stats()
    assert stats.packed_units == stats.units == MODELS[name].units
    assert stats.acquires == 3 * stats.units
    assert stats.host_bytes < 0.82 * stats.plain_bytes
    assert set(runtime.tiers) == {host}


@pytest.mark.parametrize("how", ["wrap", "load"])
@pytest.mark.parametrize("host", ["pinned", "pageable", "disk", "auto"])
def test_a_cache_file_is_written_packed_and_read_in_every_tier(
    folder: Path, tmp_path: Path, how: str, host: str, device: str
) -> None:
    cache = tmp_path / "file.cache"
    written = 0
    for _ in range(2):
        options = {"host": host, "cache": cache, "device": device}
        model = wrap(**options) if how == "wrap" else load(folder, **options)
        assert_right(model)
        stats = wanoffload.offloader(model).stats()
        assert stats.disk_bytes + stats.host_bytes < 0.82 * stats.plain_bytes
        assert (stats.disk_bytes > 0) == (host == "disk")
        assert written in (0, cache.stat().st_mtime_ns)
        written = cache.stat().st_mtime_ns
        assert_ordinary(wanoffload.unwrap(model))


@pytest.mark.parametrize("stored", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("host", ["pinned", "pageable"])
def test_a_checkpoint_is_packed_as_it_is_loaded(
    tmp_path: Path, host: str, stored: torch.dtype, device: str
) -> None:
    save(KIND.make() if stored == BF16 else KIND.make().float(), tmp_path)
    model = load(tmp_path, host=host, device=device)
    assert_right(model)
    assert_ordinary(wanoffload.unwrap(model))


class WideBlock(nn.Module):
    """Of more tensors than a chunk has runs, so that it has several chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(*(nn.Linear(64, 64) for _ in range(70)))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(WideBlock() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def wide() -> Wide:
    torch.manual_seed(7)
    return Wide().to(BF16).requires_grad_(False)


@pytest.mark.parametrize("host", ["pinned", "pageable"])
def test_blocks_of_several_chunks_are_right(host: str, device: str) -> None:
    model, x = wide().to(device), torch.randn(3, 64, dtype=BF16).to(device)
    expected = model(x)
    wrap(model, host=host, device=device)
    runtime = wanoffload.offloader(model)
    runtime.poison_slots()
    for _ in range(3):
        assert torch.equal(model(x), expected)
    (image, *_) = [binding.image for binding in runtime.bindings]
    assert isinstance(image, PackedImage)
    assert image.largest_chunk < image.nbytes / 2
    assert runtime.memory.staging.slot_bytes == image.largest_chunk


def test_a_share_of_the_blocks_is_packed_and_the_others_are_plain(device: str) -> None:
    model = KIND.make().to(device)
    runtime = wrapping.stream(model, 2, device=device, pack=0.34)
    inputs = KIND.inputs(device)
    expected = forward(KIND.make().to(device), inputs)
    for _ in range(3):
        assert torch.equal(forward(model, inputs), expected)
    assert [isinstance(b.image, PackedImage) for b in runtime.bindings] == [True, False, False]
    assert runtime.pack == pytest.approx(1 / 3)
    assert runtime.host_plan.sentence.endswith("; 1 of them packed")


def test_unwrap_gives_back_the_same_weights(device: str) -> None:
    model = wrap(device=device)
    assert_right(model)
    wanoffload.unwrap(model)
    assert_ordinary(model)
    assert torch.equal(forward(model, KIND.inputs()), forward(KIND.make(), KIND.inputs()))


# Memory


def test_staging_memory_is_four_of_the_largest_chunk_and_none_where_nothing_is_packed() -> None:
    runtime = wanoffload.offloader(wrap())
    chunks = [b.image.largest_chunk for b in runtime.bindings]  # type: ignore[attr-defined]
    stats = runtime.stats()
    assert stats.staging_bytes == STAGING_SLOTS * max(chunks) + 256
    plain = wanoffload.offloader(wrap(pack=False)).stats()
    assert (plain.staging_bytes, plain.packed_units) == (0, 0)
    assert plain.slot_bytes == stats.slot_bytes


def test_four_of_the_largest_chunk_that_there_can_be_are_at_most_160_mb() -> None:
    """Every weight of it escapes, and the other half of the tensor lets it be packed at all."""
    torch.manual_seed(1)
    hard = torch.randint(-(2**15), 2**15, (8 << 20,), dtype=torch.int16)
    easy = torch.zeros(56 << 20, dtype=torch.int16)
    weights = torch.cat([hard, hard, easy])
    weights[: 16 << 20] = ((torch.arange(16 << 20) % 1024) // 7 * 128).to(torch.int16)
    packer = Packer(weights.data_ptr(), weights.nbytes, [(0, weights.nbytes, True)])
    image = packed_in_memory(packer)
    assert image.largest_chunk > 32 << 20
    assert STAGING_SLOTS * image.largest_chunk + 256 <= 160e6


def packed_in_memory(packer: Packer) -> PackedImage:
    store = wanoffload._C.HostStore(wanoffload._C.HostBackend())
    memory = store.allocate(packer.packed_bytes)
    packer.write(memory.address)
    return PackedImage(memory)


def test_a_pause_gives_staging_memory_back_and_the_next_forward_makes_it_anew(device: str) -> None:
    model = wrap(device=device)
    runtime = wanoffload.offloader(model)
    before = runtime.stats().staging_bytes
    for _ in range(2):
        assert_right_again(model)
        runtime.pause()
        assert (runtime.stats().staging_bytes, runtime.stats().slot_bytes) == (0, 0)
    runtime.set_prefetch(0)
    assert_right_again(model)
    assert runtime.stats().staging_bytes == before > 0
    runtime.close()
    assert runtime.stats().staging_bytes == 0


def assert_right_again(model: nn.Module) -> None:
    inputs = KIND.inputs(wanoffload.offloader(model).device.type)
    expected = forward(KIND.make().to(wanoffload.offloader(model).device), inputs)
    assert torch.equal(forward(model, inputs), expected)


def test_an_image_of_larger_chunks_finds_room_before_the_next_forward() -> None:
    model = wide()
    x = torch.randn(3, 64, dtype=BF16)
    wrap(model)
    runtime = wanoffload.offloader(model)
    model(x)
    small = runtime.memory.staging.slot_bytes
    (_, binding, *_) = runtime.bindings
    weights = [torch.randint(-(2**15), 2**15, s.shape, dtype=torch.int16) for s in specs(binding)]
    larger = packed_like(binding.layout, [w.view(BF16) for w in weights])
    assert larger.largest_chunk > small
    binding.image = larger
    runtime.replace(binding.index, larger)
    assert runtime.paused
    with torch.no_grad():
        model(x)
    assert runtime.memory.staging.slot_bytes == larger.largest_chunk
    assert not runtime.paused


def specs(binding: Any) -> Any:
    return binding.layout.specs


def packed_like(layout: Any, tensors: list[Tensor]) -> PackedImage:
    store = wanoffload._C.HostStore(wanoffload._C.HostBackend())
    plain = store.allocate(layout.nbytes)
    wanoffload.image.write_image(plain, layout, tensors, wanoffload.image.leave_unlocked)
    return PackedImage(packing.pack_on_host(layout, plain, store))


def test_what_is_locked_is_the_packed_bytes_exactly(watch: Watch) -> None:
    model = wrap(host="pinned")
    stats = wanoffload.offloader(model).stats()
    assert stats.host_bytes == stats.locked_bytes
    images = [binding.image for binding in wanoffload.offloader(model).bindings]
    assert stats.host_bytes == sum(image.nbytes for image in images)
    whole_pages = sum(-(-image.nbytes // 4096) * 4096 for image in images)
    assert watch.backend.locked_bytes == whole_pages
    wanoffload.offloader(model).close()
    assert watch.backend.locked_bytes == 0


def test_bounds_hold_the_packed_size() -> None:
    """Whatever the weights are."""
    for kind in MODELS.values():
        for unit in find_units(kind.make()):
            layout = lay_out((g[0].name, g[0].tensor) for g in unit.groups)
            tensors = [g[0].tensor for g in unit.groups]
            hard = [
                torch.randint_like(t.view(torch.int16), -(2**15), 2**15).view(BF16)
                if t.dtype == BF16
                else t
                for t in tensors
            ]
            assert packed_like(layout, hard).nbytes <= most_bytes(layout)
            assert packed_like(layout, tensors).nbytes < layout.nbytes
            assert estimated_bytes(layout) < layout.nbytes


# Too little memory, and other failures


def sizes() -> tuple[int, int]:
    """Bytes of all images as they are expected, and as they are."""
    layouts = [lay_out((g[0].name, g[0].tensor) for g in u.groups) for u in find_units(KIND.make())]
    stats = wanoffload.offloader(wrap()).stats()
    return sum(map(estimated_bytes, layouts)), stats.host_bytes


def test_a_block_that_breaks_the_budget_is_named_and_everything_is_undone(watch: Watch) -> None:
    expected, true = sizes()
    gc.collect()
    assert expected < true
    model = KIND.make()
    with pytest.raises(wanoffload.HostMemoryError) as caught:
        wrap(model, host="pinned", host_budget=true - 1)
    assert f"blocks.2 packs into {true // 3} bytes, more than was expected" in str(caught.value)
    assert f"host_budget is 0.00 GB ({true - 1} bytes): raise it" in str(caught.value)
    assert_ordinary(model)
    assert_gone(caught, model, watch)
    assert_right(wrap(model, host="pinned", host_budget=true))


def assert_gone(caught: Any, model: nn.Module, watch: Watch) -> None:
    """Nothing but the model's own weights, in the memory where they are now, is held."""
    del caught
    gc.collect()
    own = sum(-(-p.nbytes // 256) * 256 for p in model.parameters()) + 3 * 4096
    assert watch.backend.locked_bytes == 0
    assert sum(store.mapped_bytes for store in watch.stores) <= own


def test_a_budget_below_what_is_expected_is_an_error_before_anything_moves(watch: Watch) -> None:
    expected, _ = sizes()
    model = KIND.make()
    pointers = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(wanoffload.HostMemoryError, match="host='pinned' needs"):
        wrap(model, host="pinned", host_budget=expected - 1)
    assert [p.data_ptr() for p in model.parameters()] == pointers


def fails_in_packing(patch: pytest.MonkeyPatch) -> None:
    calls = 0

    def packer(*arguments: Any) -> Packer:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return Packer(*arguments)

    patch.setattr(packing, "Packer", packer)


def fails_in_locking(patch: pytest.MonkeyPatch) -> None:
    calls = 0

    def lock(memory: HostImage) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise wanoffload.BackendError("no more of it")
        memory.lock()

    patch.setattr("wanoffload.locking.lock_image", lock)


def fails_in_connecting(patch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise KeyboardInterrupt

    patch.setattr(wrapping._Wrapping, "_connect", fail)


def fails_in_staging(patch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    patch.setattr(EngineMemory, "_make_staging", fail)


FAILURES = [fails_in_packing, fails_in_locking, fails_in_connecting, fails_in_staging]


@pytest.mark.parametrize("fail", FAILURES)
def test_whatever_fails_the_model_is_as_it_was(
    fail: Callable[[pytest.MonkeyPatch], None], watch: Watch
) -> None:
    model = KIND.make()
    with pytest.MonkeyPatch.context() as patch:
        fail(patch)
        with pytest.raises((KeyboardInterrupt, wanoffload.OffloadError, torch.OutOfMemoryError)):
            wrap(model, host="pinned")
    assert_ordinary(model)
    assert_gone(None, model, watch)
    assert_right(wrap(model))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("fail", FAILURES)
def test_whatever_fails_a_load_holds_nothing(
    folder: Path,
    tmp_path: Path,
    fail: Callable[[pytest.MonkeyPatch], None],
    cached: bool,
    watch: Watch,
) -> None:
    options = {"cache": tmp_path / "file"} if cached else {}
    with pytest.MonkeyPatch.context() as patch:
        fail(patch)
        with pytest.raises((KeyboardInterrupt, wanoffload.OffloadError, torch.OutOfMemoryError)):
            load(folder, host="pinned", **options)
    watch.assert_nothing_is_held()
    assert_right(load(folder, **options))


def test_too_little_memory_for_one_more_block_is_told_of_in_time(
    monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    model = KIND.make()
    real = host_memory.require
    asked: list[str] = []

    def require(nbytes: int, purpose: str) -> None:
        asked.append(purpose)
        if purpose == "the image of blocks.1":
            raise wanoffload.HostMemoryError(purpose)
        real(nbytes, purpose)

    monkeypatch.setattr(host_memory, "require", require)
    with pytest.raises(wanoffload.HostMemoryError, match=r"the image of blocks\.1"):
        wrap(model)
    monkeypatch.undo()
    assert "blocks.1, while it is packed," in asked
    assert_ordinary(model)


def only_free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: host_memory.RESERVE + nbytes)


def test_memory_for_a_units_plain_image_is_asked_for_before_anything_moves(
    monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    """A unit is there twice, and once more: its tensors, what is packed, and into what."""
    model = KIND.make()
    pointers = [p.data_ptr() for p in model.parameters()]
    plain = wanoffload.offloader(wrap()).stats().plain_bytes // 3
    only_free(monkeypatch, 2 * plain - 1)
    with pytest.raises(wanoffload.HostMemoryError, match="wrapping WanTransformer3DModel"):
        wrap(model, host="pinned")
    assert [p.data_ptr() for p in model.parameters()] == pointers
    only_free(monkeypatch, 2 * plain)
    assert_right(wrap(model, host="pinned"))


def test_auto_leaves_room_for_a_units_plain_image(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With less and less memory one block after the other is on disk, and never is it an error
    before all are."""
    monkeypatch.setattr("wanoffload.host_tiers.RING_BYTES", 8)
    monkeypatch.setattr("wanoffload.host_tiers.READ_AHEAD_BYTES", 8)
    monkeypatch.setattr(wrapping, "NOT_LOCKED", 0.0)
    found = []
    for free in range(900_000, 100_000, -4096):
        only_free(monkeypatch, free)
        try:
            model = load(folder, cache=tmp_path / "file", host="auto")
        except wanoffload.HostMemoryError:
            break
        found.append(wanoffload.offloader(model).tiers.count("disk"))
    assert sorted(set(found)) == [0, 1, 2, 3]
    assert found == sorted(found)


# What can't be


def test_what_can_not_be_packed_is_refused() -> None:
    with pytest.raises(wanoffload.WrapError, match="no block of this model holds bf16 weights"):
        wrap(KIND.make().to(torch.float16))
    model = wrap(KIND.make().to(torch.float16), pack="auto")
    assert wanoffload.offloader(model).stats().packed_units == 0


def test_packed_blocks_on_disk_need_a_cache_file(folder: Path) -> None:
    for make in (lambda: load(folder, host="disk"), lambda: wrap(host="disk")):
        with pytest.raises(wanoffload.WrapError, match="packed blocks stand on disk in a cache"):
            make()


def test_auto_needs_one_too_where_memory_is_short(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(wanoffload.HostMemoryError, match="packed blocks stand on disk in a cache"):
        load(folder, host_budget=100_000)


@pytest.mark.parametrize("pack", ["yes", 1, 0.5])
def test_what_pack_can_not_be_is_refused_first(pack: Any) -> None:
    with pytest.raises(wanoffload.WrapError, match="pack is True, False, 'auto' or None, not"):
        wrap(pack=pack)
    with pytest.raises(wanoffload.WrapError, match="pack is True, False, 'auto' or None, not"):
        load(Path("no/model"), pack=pack)


# auto


def test_auto_packs_where_the_host_lacks_memory_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = wrap(pack="auto")
    assert wanoffload.offloader(model).stats().packed_units == 0
    assert "wrap WanTransformer3DModel: plain: the host holds 0.00 GB" in caplog.text
    _, true = sizes()
    model = wrap(pack="auto", host_budget=true)
    assert_right(model)
    assert "wrap WanTransformer3DModel: packed: 0.00 GB are more than the" in caplog.text
    assert "packed: 0.00 GB of 0.00 GB (0.79" in caplog.text


def test_nothing_is_said_where_nothing_was_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    runtime = wanoffload.offloader(wrap(pack=None))
    assert runtime.stats().packed_units == 0
    assert runtime.pack == 0.0
    assert "pack" not in caplog.text.replace("test_pack_option", "")


def test_a_plan_with_packed_blocks_is_described() -> None:
    runtime = wanoffload.offloader(wrap(host="pinned"))
    assert runtime.pack == 1.0
    assert runtime.host_plan.sentence == ("3 of 3 blocks page-locked (0.00 GB); 3 of them packed")
    assert sum(runtime.host_plan.sizes) == runtime.stats().host_bytes
    assert HostChoice().kind == "auto"
