"""`load` and `wrap` with a cache file: read, written or refused, and never the wrong weights."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import wanoffload
from tests.small_models import MODELS, forward
from tests.test_cache_file import Parts, flip, largest_file, only
from tests.test_checkpoint import WEIGHTS, assert_same, save
from tests.test_load import KIND, Watch, both, on, open_files
from wanoffload import host_memory, wrapping
from wanoffload._C import HostImage
from wanoffload.host_tensor import HostTensor
from wanoffload.host_tiers import HostPlan
from wanoffload.image import ImageLayout
from wanoffload.loading import cache_identity, cache_writer, stored_weights
from wanoffload.loading.cache_file import CacheFile
from wanoffload.loading.cached_weights import CachedWeights
from wanoffload.loading.packing import check, pack
from wanoffload.units import Unit, find_units
from wanoffload.weights import OwnTensors

TIERS = ["pinned", "pageable", "disk"]
BF16 = torch.bfloat16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in fp32, so that what is streamed stands nowhere but in a cache."""
    folder = tmp_path / "model"
    save(KIND.make().float(), folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Where a cache file is to be; its folder has nothing else in it."""
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache" / "file"


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    gc.collect()  # models of other tests that stand on disk have files open
    return Watch(monkeypatch)


def load_it(folder: Path, cache: Path, **options: Any) -> nn.Module:
    options = {"torch_dtype": BF16, "device": "cpu", **options}
    return wanoffload.load(WanTransformer3DModel, folder, cache=cache, **options)


def wrap_it(cache: Path, seed: int = 0, **options: Any) -> nn.Module:
    return wanoffload.wrap(KIND.make(seed), cache=cache, **{"device": "cpu", **options})


def assert_right(model: nn.Module, seed: int = 0) -> None:
    """Two forwards, as of the model in memory, with every block fetched."""
    inputs = KIND.inputs()
    for _ in range(2):
        assert torch.equal(forward(model, inputs), forward(KIND.make(seed), inputs))
    stats = wanoffload.offloader(model).stats()
    assert stats.acquires == 2 * stats.units == 6
    assert stats.fetches >= stats.units
    assert stats.bytes_fetched > 150_000


class Reads:
    """How often weights of units came from where they come from without a cache."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for weights in (stored_weights.StoredWeights, OwnTensors):
            self._count(patch, weights)

    def _count(self, patch: pytest.MonkeyPatch, weights: Any) -> None:
        write = weights.write

        def counted(*args: Any) -> None:
            self.count += 1
            write(*args)

        patch.setattr(weights, "write", counted)

    def taken(self) -> int:
        count, self.count = self.count, 0
        return count


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


# Written where there is none, read where there is one.


@pytest.mark.parametrize("dtype", [torch.bfloat16, None, torch.float16], ids=str)
@pytest.mark.parametrize("host", TIERS)
def test_load_writes_a_cache_file_and_then_reads_it(
    folder: Path, cache: Path, host: str, dtype: torch.dtype | None, device: str, reads: Reads
) -> None:
    for times in (KIND.units, 0):
        loaded, wrapped = both(folder, WanTransformer3DModel, dtype, device, cache=cache, host=host)
        assert reads.taken() == times + KIND.units  # the last ones are those of `wrapped`
        only(cache.parent, "file")
        assert_same(loaded, wrapped)
        inputs = on(device, KIND.inputs())
        if dtype is not BF16:
            inputs = {
                k: v.to(dtype or torch.float32) if _floats(v) else v for k, v in inputs.items()
            }
        for _ in range(2):
            assert torch.equal(forward(loaded, inputs), forward(wrapped, inputs))
        runtime = wanoffload.offloader(loaded)
        assert {binding.tier for binding in runtime.bindings} == {host}
        stats = runtime.stats()
        assert stats.acquires == 2 * stats.units
        assert stats.bytes_fetched >= sum(
            unit.layout.nbytes for unit in CacheFile.open(cache).header.units
        )


def _floats(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == BF16


@pytest.mark.parametrize("host", TIERS)
def test_wrap_writes_a_cache_file_and_then_compares_with_it(
    cache: Path, host: str, device: str, reads: Reads
) -> None:
    inputs = KIND.inputs(device)
    expected = forward(wanoffload.wrap(KIND.make(), device=device), inputs)
    reads.taken()
    for _ in range(2):
        model = wrap_it(cache, host=host, device=device)
        assert reads.taken() == (KIND.units if host == "disk" else 2 * KIND.units)
        only(cache.parent, "file")
        assert torch.equal(forward(model, inputs), expected)
        assert torch.equal(forward(model, inputs), expected)
        assert_same(wanoffload.unwrap(model), KIND.make())


def test_a_packed_file_is_the_one_that_load_writes_byte_for_byte(
    folder: Path, cache: Path, reads: Reads
) -> None:
    header = pack(folder, cache, torch_dtype=BF16, plain=True)
    assert reads.taken() == KIND.units
    assert CacheFile.open(cache).header == header
    assert_right(load_it(folder, cache, host="disk"))
    assert reads.taken() == 0
    load_it(folder, cache.with_name("other"))
    assert cache.read_bytes() == cache.with_name("other").read_bytes()


def test_pack_closes_its_files_and_takes_the_class_that_the_config_names(
    tmp_path: Path, cache: Path, watch: Watch
) -> None:
    save(MODELS["vace"].make(), tmp_path, "sharded")
    header = pack(tmp_path, cache, torch_dtype=BF16, plain=True)
    watch.assert_nothing_is_held()
    assert header.identity.model == "WanVACETransformer3DModel"
    assert len(header.identity.sources) > 3


def test_units_of_all_tiers_come_from_one_cache(folder: Path, cache: Path) -> None:
    pack(folder, cache, torch_dtype=BF16, plain=True)
    for host in TIERS:
        assert_right(load_it(folder, cache, host=host))


def test_a_cache_survives_that_its_checkpoint_moves(tmp_path: Path, folder: Path) -> None:
    pack(folder, folder / "cache", torch_dtype=BF16, plain=True)
    moved = folder.rename(tmp_path / "moved")
    assert_right(load_it(moved, moved / "cache"))


def test_a_file_written_by_wrap_is_compared_by_load(
    folder: Path, cache: Path, reads: Reads, caplog: pytest.LogCaptureFixture
) -> None:
    wrap_it(cache)
    reads.taken()
    assert_right(load_it(folder, cache, host="disk"))
    assert reads.taken() == KIND.units
    assert "All their weights were compared" in caplog.text


def test_a_file_written_by_pack_is_compared_by_wrap(folder: Path, cache: Path) -> None:
    pack(folder, cache, torch_dtype=BF16, plain=True)
    assert_right(wrap_it(cache, host="disk"))
    with pytest.raises(wanoffload.CacheFileError, match=r"the weights of blocks.0 are others"):
        wrap_it(cache, seed=1)


# Refused, and nothing is lost.


def refused(folder: Path, cache: Path, **options: Any) -> str:
    before = cache.read_bytes()
    with pytest.raises(wanoffload.CacheFileError) as caught:
        load_it(folder, cache, **options)
    assert cache.read_bytes() == before
    only(cache.parent, "file")
    assert str(cache) in str(caught.value)
    return str(caught.value)


def test_a_foreign_file_is_refused_and_kept(folder: Path, cache: Path, watch: Watch) -> None:
    cache.write_text("the only copy of somebody's thesis")
    assert "no cache file of wanoffload" in refused(folder, cache)
    watch.assert_nothing_is_held()
    model = KIND.make()
    with pytest.raises(wanoffload.CacheFileError, match="no cache file"):
        wanoffload.wrap(model, cache=cache, device="cpu")
    assert_same(model, KIND.make())
    assert cache.read_text().endswith("thesis")


def test_a_truncated_cache_is_refused(folder: Path, cache: Path, watch: Watch) -> None:
    pack(folder, cache, torch_dtype=BF16, plain=True)
    os.truncate(cache, cache.stat().st_size - 4096)
    assert "and was written with" in refused(folder, cache)
    watch.assert_nothing_is_held()


@pytest.mark.parametrize("host", TIERS)
def test_a_cache_of_another_dtype_or_model_is_refused(
    tmp_path: Path, folder: Path, cache: Path, host: str
) -> None:
    pack(folder, cache, torch_dtype=torch.float16, plain=True)
    assert "torch.float16 there, and torch.bfloat16 here" in refused(folder, cache, host=host)
    save(MODELS["wan21_t2v"].make(), tmp_path / "other")
    assert "another config" in refused(tmp_path / "other", cache, host=host)


def test_the_other_expert_is_refused(tmp_path: Path, folder: Path, cache: Path) -> None:
    """Of the same config, names and sizes; diffusers' disk offload runs it with the first's."""
    pack(folder, cache, torch_dtype=BF16, plain=True)
    save(KIND.make(seed=1).float(), tmp_path / "second")
    assert f"{WEIGHTS} holds other bytes" in refused(tmp_path / "second", cache, host="disk")


def test_a_source_that_was_touched_is_believed_after_all_weights_were_compared(
    folder: Path, cache: Path, reads: Reads, caplog: pytest.LogCaptureFixture
) -> None:
    pack(folder, cache, torch_dtype=BF16, plain=True)
    os.utime(folder / "transformer" / WEIGHTS)
    for _ in range(2):  # the cache file is not written anew: each time
        reads.taken()
        caplog.clear()
        assert_right(load_it(folder, cache, host="disk"))
        assert reads.taken() == KIND.units
        assert [record.levelno for record in caplog.records].count(logging.WARNING) == 1
        assert f"{cache}: the checkpoint's files are not those" in caplog.text


def test_a_source_with_one_other_weight_is_found_by_its_time_and_named(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    monkeypatch.setattr(cache_identity, "SAMPLES", 2)
    file = folder / "transformer" / WEIGHTS
    pack(folder, cache, torch_dtype=BF16, plain=True)
    weight = wanoffload.loading.header.read_header(file)["blocks.1.ffn.net.2.weight"]
    flip(file, weight.offset + 3, bit=6)
    message = refused(folder, cache)
    assert "the weights of blocks.1 are others than those in the file" in message
    watch.assert_nothing_is_held()


# Bytes that went bad.


def spoil(cache: Path, name: str) -> None:
    unit = CacheFile.open(cache).units[name]
    flip(cache, unit.offset + unit.layout.nbytes // 2)


@pytest.mark.parametrize("host", ["pinned", "pageable"])
def test_a_flipped_bit_is_found_when_an_image_is_read_into_memory(
    folder: Path, cache: Path, host: str, watch: Watch
) -> None:
    pack(folder, cache, torch_dtype=BF16, plain=True)
    spoil(cache, "blocks.1")
    with pytest.raises(wanoffload.TransferError, match=r"blocks.1 can't be taken") as caught:
        load_it(folder, cache, host=host)
    assert str(cache) in str(caught.value)
    del caught
    watch.assert_nothing_is_held()


def test_a_flipped_bit_on_disk_is_the_error_of_the_forward_that_needs_the_block(
    folder: Path, cache: Path
) -> None:
    pack(folder, cache, torch_dtype=BF16, plain=True)
    spoil(cache, "blocks.2")
    model = load_it(folder, cache, host="disk")
    for _ in range(2):
        with pytest.raises(wanoffload.TransferError, match="checksum differs") as caught:
            forward(model, KIND.inputs())
        assert str(cache) in str(caught.value)
    with pytest.raises(wanoffload.TransferError, match="checksum differs"):
        model.state_dict()["blocks.2.ffn.net.2.bias"].sum()
    with pytest.raises(wanoffload.CacheFileError, match=r"1 of 3 units are spoilt. blocks.2"):
        check(cache)


# Writing that fails.


@pytest.mark.parametrize("error", [KeyboardInterrupt, wanoffload.TransferError, OSError])
def test_an_end_while_writing_leaves_no_file_and_the_model_as_it_was(
    folder: Path,
    cache: Path,
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    write = cache_writer._write_at
    calls = iter(range(100))

    def failing(*args: Any) -> None:
        if next(calls) == 2:
            raise error("now")
        write(*args)

    monkeypatch.setattr(cache_writer, "_write_at", failing)
    expected = wanoffload.CacheFileError if error is OSError else error
    with pytest.raises(expected, match="now"):
        load_it(folder, cache)
    only(cache.parent)
    watch.assert_nothing_is_held()
    calls = iter(range(100))
    model = KIND.make()
    with pytest.raises(expected, match="now"):
        wanoffload.wrap(model, cache=cache, device="cpu")
    only(cache.parent)
    assert_same(model, KIND.make())
    assert not any(isinstance(p, HostTensor) for p in model.parameters())


def test_a_full_disk_is_an_error_and_leaves_nothing(
    folder: Path, cache: Path, watch: Watch
) -> None:
    with (
        largest_file(50_000),
        pytest.raises(wanoffload.CacheFileError, match="can't be written"),
    ):
        load_it(folder, cache)
    only(cache.parent)
    watch.assert_nothing_is_held()


def test_an_undo_that_has_too_little_memory_hides_no_error_and_loses_no_value(
    cache: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt(_: object) -> None:
        monkeypatch.setattr(host_memory, "available_bytes", lambda: 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(wrapping._Wrapping, "_connect", interrupt)
    model = KIND.make()
    with pytest.raises(KeyboardInterrupt):
        wanoffload.wrap(model, cache=cache, device="cpu", host="disk")
    assert "blocks.2 stays where it is: bringing blocks.2 into" in caplog.text
    for name, value in KIND.make().state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("host", TIERS)
def test_whatever_fails_after_the_cache_was_written_the_model_is_as_it_was(
    cache: Path, watch: Watch, host: str
) -> None:
    failures = 0
    for nth in range(1, 60, 4):  # a ring of 32 chunks makes as many events
        watch.backend = wanoffload._C.HostBackend()
        watch.backend.fail_at(nth)
        model = KIND.make()
        before = dict(model.named_parameters())
        try:
            wanoffload.wrap(model, cache=cache, device="cpu", host=host, prefetch=1)
        except wanoffload.OffloadError:
            failures += 1
            assert not any(isinstance(p, HostTensor) for p in model.parameters())
            assert {n: p.device for n, p in model.named_parameters()} == {
                n: p.device for n, p in before.items()
            }
            assert_same(model, KIND.make())
        else:
            watch.backend.fail_at(0)
            del model
            gc.collect()
    assert 1 < failures < 15


def test_two_processes_may_write_one_cache_at_once(folder: Path, cache: Path) -> None:
    code = f"""
import sys, torch
from pathlib import Path
from tests.test_cached_weights import *
sys.stdin.read(1)
assert_right(load_it(Path({str(folder)!r}), Path({str(cache)!r}), host="disk"))
"""
    command = [sys.executable, "-c", code]
    both = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    for process in both:
        assert process.stdin is not None
        process.stdin.write(b".")
        process.stdin.flush()
    for process in both:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    only(cache.parent, "file")
    check(cache)


# What it is afterwards.


def test_what_is_written_to_a_weight_is_not_written_to_the_cache(folder: Path, cache: Path) -> None:
    model = load_it(folder, cache, host="disk")
    before = cache.read_bytes()
    model.load_state_dict(KIND.make(seed=5).state_dict())
    assert_right(model, seed=5)
    assert cache.read_bytes() == before
    check(cache)


def test_a_cache_on_disk_may_be_deleted_while_it_is_used(folder: Path, cache: Path) -> None:
    model = load_it(folder, cache, host="disk")
    cache.unlink()
    assert_right(model)
    state = wanoffload.unwrap(model).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in KIND.make().state_dict().items())


def test_a_wrapped_model_lets_go_of_the_tensors_that_stand_in_the_cache(cache: Path) -> None:
    model = KIND.make()
    blocks = [group[0].tensor for unit in find_units(model) for group in unit.groups]
    before = [StorageWeakRef(tensor.untyped_storage()) for tensor in blocks]
    del blocks
    assert not any(storage.expired() for storage in before)
    wanoffload.wrap(model, cache=cache, device="cpu", host="disk")
    gc.collect()
    assert all(storage.expired() for storage in before)
    assert_right(model)


class Inner:
    """Weights of a model in memory that note what they are asked for."""

    def __init__(self, parts: Parts) -> None:
        self.calls: list[str] = []
        self._parts = parts

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return lambda *_: None

    def write(self, unit: Unit, layout: ImageLayout, memory: HostImage, lock: Any) -> None:
        self.calls.append("write")
        self._parts.fill(unit, layout, memory)


@pytest.mark.parametrize("end", ["finish", "undo"])
def test_at_the_end_the_file_is_let_go_of_and_who_stands_behind_is_told(
    cache: Path, end: str
) -> None:
    model = KIND.make()
    parts = Parts(model)
    inner = Inner(parts)
    weights = CachedWeights(inner, model, cache)  # type: ignore[arg-type]
    gc.collect()
    before = open_files()
    weights.prepare(parts.units, parts.layouts, HostPlan((), 0, ""))
    assert open_files() == before | {str(cache)}
    weights.finish() if end == "finish" else weights.undo([])
    assert open_files() == before
    assert inner.calls == ["prepare", "write", "write", "write", end]


@pytest.mark.parametrize("cache", [7, True, b"file"])
def test_a_cache_that_is_no_path_is_refused(cache: Any) -> None:
    with pytest.raises(wanoffload.WrapError, match="cache is the path of a file, not"):
        wrap_it(cache)
    with pytest.raises(wanoffload.WrapError, match="cache is the path of a file, not"):
        load_it(Path("no/model"), cache)


def test_pack_does_not_write_over_a_file(folder: Path, cache: Path) -> None:
    cache.write_text("there")
    with pytest.raises(wanoffload.CacheFileError, match="is there already"):
        pack(folder, cache, torch_dtype=BF16, plain=True)
    assert cache.read_text() == "there"


def test_a_pack_that_fails_holds_nothing_although_its_error_is_kept(
    folder: Path, cache: Path, watch: Watch
) -> None:
    with largest_file(50_000), pytest.raises(wanoffload.CacheFileError) as caught:
        pack(folder, cache, torch_dtype=BF16, plain=True)
    assert open_files() == watch.files
    only(cache.parent)
    assert "File too large" in str(caught.value)


def test_pack_names_a_class_that_is_not_to_be_had(folder: Path, cache: Path) -> None:
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace("WanTransformer3DModel", "WanTransformer9DModel"))
    with pytest.raises(wanoffload.CheckpointError, match="class WanTransformer9DModel, which this"):
        pack(folder, cache, torch_dtype=BF16, plain=True)
    only(cache.parent)
