"""load_pipeline: from a folder to an enabled pipeline, beside `enable(from_pretrained(...))`."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from torch import nn

import wanoffload
from tests.poison import poisoned_homes
from tests.small_pipelines import PIPELINES
from tests.test_checkpoint import hub_cache
from tests.test_load import open_files
from tests.test_pipeline import (
    CALL,
    HERE,
    StandIn,
    _lora,
    at_home,
    enabled_of,
    entries,
    planned,
    treatments,
    values,
)
from wanoffload import (
    CheckpointError,
    PipelineError,
    disable,
    enable,
    host_memory,
    load_pipeline,
    offloader,
    wrapping,
)
from wanoffload.hooks import attached
from wanoffload.host_tensor import HostTensor
from wanoffload.loading import stored_weights
from wanoffload.loading.stored_weights import StoredWeights
from wanoffload.pipelines import acting, components, parking, pipeline_source
from wanoffload.pipelines.components import PARKED, RESIDENT, STREAMED
from wanoffload.pipelines.enabling import plan_of
from wanoffload.policy import cost

__all__ = ["planned", "poisoned_homes"]

BF16 = torch.bfloat16
STREAM = {"dit_layerwise_offload": True}
CARD = replace(HERE, platform="cuda", device_memory="24GiB")


def cast(pipe: Any) -> Any:
    """In the dtypes that from_pretrained(torch_dtype=bfloat16) gives, so that nothing is cast."""
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            kept = set(getattr(component, "_keep_in_fp32_modules", None) or ())
            for name, parameter in component.named_parameters():
                if kept.isdisjoint(name.split(".")):
                    parameter.data = parameter.data.to(BF16)
    return pipe


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a small pipeline, which nobody changes."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            cast(PIPELINES[name].make()).save_pretrained(folders[name], max_shard_size="60KB")
        return folders[name]

    return folder


@pytest.fixture
def a14b(saved: Any, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(saved("a14b"), tmp_path / "model"))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_it(folder: Path, kind: Any = WanPipeline, *mode: str, **options: Any) -> Any:
    wanted = {"hardware": HERE, "device": "cpu", "torch_dtype": BF16, **options}
    return quiet(load_pipeline(kind, folder, *mode, **wanted))


def ordinary(folder: Path, kind: Any = WanPipeline, **options: Any) -> Any:
    return quiet(kind.from_pretrained(str(folder), **{"torch_dtype": BF16, **options}))


def same_enabled(ours: Any, theirs: Any) -> None:
    """Everything that is not the way it was loaded."""
    assert type(ours).__bases__ == type(theirs).__bases__
    assert {**ours.config} == {**theirs.config}
    assert treatments(ours) == treatments(theirs)
    assert entries(ours) == entries(theirs)
    truth = values(theirs)
    found = values(ours)
    assert found.keys() == truth.keys()
    for name, value in found.items():
        assert value.dtype == truth[name].dtype, name
        assert torch.equal(value, truth[name]), name
    for name, module in ours.components.items():
        if not isinstance(module, nn.Module):
            continue
        other = getattr(theirs, name)
        assert module.training == other.training
        assert {**vars(module.config)} == {**vars(other.config)} or module.config == other.config
        if attached(other) is not None:
            same_stats(offloader(module).stats(), offloader(other).stats())


def same_stats(ours: Any, theirs: Any) -> None:
    assert ours.host_bytes == theirs.host_bytes > 0
    assert ours.locked_bytes == theirs.locked_bytes == ours.host_bytes
    assert (ours.units, ours.slots, ours.slot_bytes) == (theirs.units, theirs.slots, 0)
    assert (ours.acquires, ours.forwards) == (theirs.acquires, theirs.forwards)


# What is loaded.


@pytest.mark.usefixtures("poisoned_homes")
@pytest.mark.parametrize("components", ["all", "dit"])
@pytest.mark.parametrize("name", PIPELINES)
def test_it_is_what_enable_makes_of_the_pipeline_of_diffusers(
    name: str, components: str, saved: Any
) -> None:
    small, folder = PIPELINES[name], saved(name)
    kind = type(small.make())
    choices = {**STREAM, "layerwise_offload_components": components}
    ours = load_it(folder, kind, "manual", **choices)
    theirs = ordinary(folder, kind)
    enable(theirs, "manual", hardware=HERE, device="cpu", **choices)
    same_enabled(ours, theirs)
    expected = small.run(theirs)
    for _ in range(2):
        assert torch.equal(small.run(ours), expected)
        assert at_home(ours)
    small.run(theirs)
    same_enabled(ours, theirs)
    assert ours.config._name_or_path == str(folder)
    dits = [c for c in enabled_of(ours).components.values() if c.name.startswith("transformer")]
    assert all(c.treatment.kind == STREAMED for c in dits)
    assert all(c.runtime.stats().acquires > 0 for c in dits)

    disable(ours)
    disable(theirs)
    assert type(ours) is kind
    for dit in dits:
        assert not any(isinstance(p, HostTensor) for p in dit.module.parameters())
    assert entries(ours) == entries(theirs)
    assert torch.equal(small.run(ours), expected)
    enable(ours, "manual", hardware=HERE, device="cpu", **choices)
    assert torch.equal(small.run(ours), expected)


@pytest.mark.usefixtures("poisoned_homes")
@pytest.mark.parametrize("workload", [None, CALL], ids=["later", "given"])
@pytest.mark.parametrize("mode", ["auto", "memory"])
@pytest.mark.parametrize("name", ["t2v", "a14b"])
def test_it_is_planned_as_enable_plans(
    name: str, mode: str, workload: Any, saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real plan: A14B is streamed while the size is unknown, and resident at a call."""
    small, folder = PIPELINES[name], saved(name)
    described: list[Any] = []
    describe = pipeline_source.describe
    monkeypatch.setattr(
        pipeline_source, "describe", lambda *a: (described.append(a), describe(*a))[1]
    )
    ours = load_it(folder, WanPipeline, mode, hardware=CARD, workload=workload)
    theirs = ordinary(folder)
    enable(theirs, mode, hardware=CARD, device="cpu", workload=workload)
    first, second = plan_of(ours), plan_of(theirs)
    assert replace(first, facts=second.facts, hardware=None) == replace(second, hardware=None)
    streams = first.dit_layerwise_offload
    assert len(described) == (len(first.facts.dits) if streams else 0)
    if workload is None:
        assert streams == (name == "a14b" or mode == "memory")
        now = {n: t for n, t in treatments(ours).items() if n.startswith("transformer")}
        assert set(now.values()) == {STREAMED if streams else "as found"}
    else:
        assert treatments(ours) == treatments(theirs)
    assert torch.equal(small.run(ours), small.run(theirs))
    assert treatments(ours) == treatments(theirs)
    same_decision = replace(plan_of(ours), facts=second.facts, hardware=None)
    assert same_decision == replace(plan_of(theirs), hardware=None)


def by_height(workload: Any) -> StandIn:
    kinds = {32: StandIn(False, True, None, []), 48: StandIn(), 64: StandIn(True, False, 2, [])}
    return kinds.get(workload.height, StandIn()) if workload else StandIn(True, False, 1, [])


@pytest.mark.usefixtures("poisoned_homes")
@pytest.mark.parametrize("host", ["auto", "disk"])
def test_another_treatment_at_a_later_call_and_back(host: str, planned, saved: Any) -> None:
    """What was on disk came into memory meanwhile, with what was changed there, and stays."""
    small, folder = PIPELINES["a14b"], saved("a14b")
    planned(by_height)
    ours, theirs = load_it(folder, host=host), ordinary(folder)
    enable(theirs, hardware=HERE, device="cpu")
    assert treatments(ours)["transformer_2"] == STREAMED
    for height, kind in ((64, STREAMED), (32, PARKED), (48, RESIDENT), (64, STREAMED)):
        expected = small.run(theirs, height=height)
        assert torch.equal(small.run(ours, height=height), expected)
        assert treatments(ours) == treatments(theirs)
        assert treatments(ours)["transformer_2"] == kind
        for pipe in (ours, theirs):
            with torch.no_grad():
                pipe.transformer_2.blocks[1].ffn.net[2].bias.add_(0.5)
    right = values(theirs)
    assert all(torch.equal(value, right[name]) for name, value in values(ours).items())


def test_a_lora_loaded_afterwards_counts(saved: Any, tmp_path: Path) -> None:
    small, folder = PIPELINES["t2v"], saved("t2v")
    ours, theirs = load_it(folder, WanPipeline, "manual", **STREAM), ordinary(folder)
    enable(theirs, "manual", hardware=HERE, device="cpu", **STREAM)
    plain = small.run(ours)
    path = _lora(tmp_path, ours)
    results = []
    for pipe in (ours, theirs):
        pipe.load_lora_weights(path)
        results.append([small.run(pipe)])
        pipe.fuse_lora()
        results[-1].append(small.run(pipe))
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
    assert all(torch.equal(*both) for both in zip(*results, strict=True))
    assert not torch.equal(results[0][0], plain)
    disable(ours)
    assert type(ours.transformer.blocks[0].attn1.to_q) is nn.Linear


def test_what_was_given_is_taken_in_place_of_what_is_there(saved: Any, a14b: Path) -> None:
    small = PIPELINES["a14b"]
    vae = AutoencoderKLWan.from_pretrained(saved("a14b"), subfolder="vae")
    expert = wanoffload.load(
        WanTransformer3DModel, saved("a14b"), torch_dtype=BF16, device="cpu", prefetch=1
    )
    runtime = offloader(expert)
    for part in ("vae", "transformer"):
        shutil.rmtree(a14b / part)
    ours = load_it(
        a14b, WanPipeline, "manual", **STREAM, vae=vae, transformer=expert, boundary_ratio=0.5
    )
    assert ours.vae is vae
    assert ours.vae.dtype == torch.float32
    assert offloader(ours.transformer) is runtime
    assert ours.config.boundary_ratio == 0.5
    assert plan_of(ours).dit_offload_prefetch_size == 1
    theirs = ordinary(saved("a14b"), vae=AutoencoderKLWan.from_pretrained(saved("a14b") / "vae"))
    theirs.register_to_config(boundary_ratio=0.5)
    enable(theirs, "manual", hardware=HERE, device="cpu", **STREAM)
    assert torch.equal(small.run(ours), small.run(theirs))


def test_a_component_that_is_left_out_counts_for_nothing(a14b: Path) -> None:
    for part in ("text_encoder", "vae"):
        shutil.rmtree(a14b / part)
    left_out = {"text_encoder": None, "tokenizer": None, "vae": None}
    ours = load_it(a14b, WanPipeline, "manual", **STREAM, **left_out)
    assert plan_of(ours).facts.text_encoder is None
    assert plan_of(ours).facts.vae is None
    assert set(treatments(ours)) == {"transformer", "transformer_2"}


@pytest.mark.parametrize("dtype", [None, torch.float16, {"vae": torch.float32, "default": BF16}])
def test_dtypes_are_those_of_from_pretrained(saved: Any, dtype: Any) -> None:
    folder = saved("a14b")
    ours = load_it(folder, WanPipeline, "manual", torch_dtype=dtype, **STREAM)
    theirs = enable(
        ordinary(folder, torch_dtype=dtype), "manual", hardware=HERE, device="cpu", **STREAM
    )
    same_enabled(ours, theirs)


@pytest.fixture
def planned_by(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The facts of each decision: of the files, of the pipeline."""
    seen: list[Any] = []
    decide = acting.decide
    monkeypatch.setattr(
        acting, "decide", lambda facts, *a: (seen.append(facts), decide(facts, *a))[1]
    )
    return seen


@pytest.mark.parametrize("dtype", [None, BF16, {"vae": torch.float32, "default": BF16}])
def test_what_it_is_planned_by_is_what_is_loaded(
    saved: Any, dtype: Any, planned_by: list[Any]
) -> None:
    """The facts of the files are those of the pipeline, in the dtypes that it is loaded in."""
    load_it(saved("i2v"), type(PIPELINES["i2v"].make()), "manual", torch_dtype=dtype, **STREAM)
    of_files, of_pipeline = planned_by[:2]
    assert of_files.dits == of_pipeline.dits
    assert of_files.vae == of_pipeline.vae
    assert of_files.text_encoder.bytes == of_pipeline.text_encoder.bytes
    if dtype is None:  # values are cast: the second plan knows that no block can stay on disk
        assert (of_files.blocks_in_files, of_pipeline.blocks_in_files) == (True, False)
    assert replace(of_files, name="", image_encoder=None) == replace(
        of_pipeline, name="", image_encoder=None, blocks_in_files=True
    )


def test_it_is_so_with_another_class_and_with_what_is_given(
    saved: Any, planned_by: list[Any]
) -> None:
    load_it(saved("t2v"), WanVideoToVideoPipeline, "manual", workload=CALL, **STREAM)
    larger = AutoencoderKLWan(base_dim=8, z_dim=16)
    one = ordinary(saved("i2v"), type(PIPELINES["i2v"].make())).transformer
    given = {"boundary_ratio": 0.5, "vae": larger, "transformer": one}
    load_it(saved("t2v"), WanPipeline, "manual", workload=CALL, **STREAM, **given)
    load_it(saved("a14b"), WanVideoToVideoPipeline, "manual", workload=CALL, **STREAM)
    found = [replace(facts, name="", blocks_in_files=True) for facts in planned_by]
    assert [facts.a14b for facts in found[::2]] == [False, True, False]
    assert found[::2] == found[1::2]


@pytest.mark.parametrize("kind", [DiffusionPipeline, WanVideoToVideoPipeline])
def test_the_class_is_the_one_that_is_asked_for(kind: Any, saved: Any) -> None:
    folder = saved("t2v")
    ours = load_it(folder, kind, "manual", **STREAM)
    theirs = enable(ordinary(folder, kind), "manual", hardware=HERE, device="cpu", **STREAM)
    same_enabled(ours, theirs)
    assert type(ours).__name__ == ("WanPipeline" if kind is DiffusionPipeline else kind.__name__)


def test_a_variant_is_taken_of_those_components_that_have_it(a14b: Path, saved: Any) -> None:
    pipe = ordinary(saved("a14b"))
    with torch.no_grad():
        pipe.transformer_2.blocks[1].ffn.net[2].bias.add_(1)
    shutil.rmtree(a14b / "transformer_2")
    pipe.transformer_2.save_pretrained(a14b / "transformer_2", variant="fp16")
    ours = load_it(a14b, WanPipeline, "manual", variant="fp16", **STREAM)
    theirs = enable(ordinary(a14b, variant="fp16"), "manual", hardware=HERE, device="cpu", **STREAM)
    same_enabled(ours, theirs)


def test_of_the_hub_it_is_read_from_the_cache(saved: Any, tmp_path: Path) -> None:
    hub_cache(saved("a14b"), tmp_path / "cache", "some/model", "a" * 40)
    there = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    ours = load_it("some/model", WanPipeline, "manual", **there, **STREAM)  # type: ignore[arg-type]
    theirs = enable(
        ordinary("some/model", **there),  # type: ignore[arg-type]
        "manual",
        hardware=HERE,
        device="cpu",
        **STREAM,
    )
    same_enabled(ours, theirs)
    assert ours.config._name_or_path == "some/model"
    with pytest.raises(CheckpointError, match=r"some/other is no pipeline's folder"):
        load_it("some/other", WanPipeline, **there)  # type: ignore[arg-type]


def test_only_what_is_needed_is_downloaded_and_nothing_for_a_wrong_choice(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_cache(saved("a14b"), tmp_path / "cache", "some/model", "a" * 40)
    vae = AutoencoderKLWan.from_pretrained(saved("a14b"), subfolder="vae")
    asked: list[Any] = []

    def download(model: str, **options: Any) -> str:
        asked.append((model, options))
        return str(saved("a14b"))

    monkeypatch.setattr(WanPipeline, "download", download)
    there: dict[str, Any] = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    name: Any = "some/model"
    with pytest.raises(ValueError, match="unknown choice 'dit_layer'"):
        load_it(name, WanPipeline, "manual", **there, dit_layer=True)
    assert not asked
    load_it(name, WanPipeline, "manual", **there, **STREAM, vae=vae, revision="main")
    ((model, options),) = asked
    assert model == "some/model"
    assert {name: value for name, value in options.items() if value is not None} == {
        **there,
        "vae": vae,
        "revision": "main",
    }


# Where it stands on the host.


def experts(pipe: Any) -> list[Any]:
    return [offloader(pipe.transformer), offloader(pipe.transformer_2)]


@pytest.mark.parametrize("host", ["pinned", "pageable", "disk"])
def test_blocks_stand_where_they_are_asked_for(saved: Any, host: str) -> None:
    small, folder = PIPELINES["a14b"], saved("a14b")
    ours = load_it(folder, WanPipeline, "manual", host=host, **STREAM)
    theirs = enable(ordinary(folder), "manual", hardware=HERE, device="cpu", **STREAM)
    for runtime in experts(ours):
        assert set(runtime.tiers) == {host}
        assert (runtime.stats().host_bytes == 0) == (host == "disk")
    assert torch.equal(small.run(ours), small.run(theirs))
    assert all(runtime.stats().bytes_fetched > 0 for runtime in experts(ours))
    disable(ours)
    assert torch.equal(small.run(ours), small.run(theirs))


def test_with_a_cache_blocks_of_another_dtype_stand_on_disk(saved: Any, tmp_path: Path) -> None:
    """Published experts are fp32: what is streamed is in the cache files, one of each."""
    folder = tmp_path / "fp32"
    ordinary(saved("a14b"), torch_dtype=torch.float32).save_pretrained(folder)
    small = PIPELINES["a14b"]
    expected = small.run(enable(ordinary(folder), "manual", hardware=HERE, device="cpu", **STREAM))
    caches = tmp_path / "some" / "where"
    for _ in range(2):
        pipe = load_it(folder, WanPipeline, "manual", host="disk", cache=caches, **STREAM)
        assert sorted(file.name for file in caches.iterdir()) == [
            "transformer.images",
            "transformer_2.images",
        ]
        written = [file.stat().st_mtime_ns for file in sorted(caches.iterdir())]
        for name in ("transformer", "transformer_2"):
            assert set(offloader(getattr(pipe, name)).tiers) == {"disk"}
        assert torch.equal(small.run(pipe), expected)
    assert [file.stat().st_mtime_ns for file in sorted(caches.iterdir())] == written
    with pytest.raises(wanoffload.WrapError, match=r"can't be a folder of cache files"):
        load_it(folder, host="disk", cache=caches / "transformer.images", **STREAM)


def test_experts_are_shared_under_a_name_each(saved: Any) -> None:
    pipes = [
        load_it(saved("a14b"), WanPipeline, "manual", share="both-experts", **STREAM)
        for _ in range(2)
    ]
    for name in ("transformer", "transformer_2"):
        images = [offloader(getattr(pipe, name)).bindings[0].image for pipe in pipes]
        assert all(image.shared for image in images)  # type: ignore[attr-defined]
    small, folder = PIPELINES["a14b"], saved("a14b")
    expected = small.run(enable(ordinary(folder), "manual", hardware=HERE, device="cpu", **STREAM))
    for pipe in pipes:
        assert torch.equal(small.run(pipe), expected)
    with pytest.raises(wanoffload.WrapError, match="nothing in memory that could be shared"):
        load_it(saved("a14b"), host="disk", share="x", **STREAM)


def test_experts_share_by_bytes_what_others_leave_of_the_budget(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit stays in the files, and what is written to comes into memory."""
    chosen: list[Any] = []
    start = wrapping.start

    def starting(module: nn.Module, *args: Any, **options: Any) -> Any:
        chosen.append(options["host"].budget)
        return start(module, *args, **options)

    small, folder = PIPELINES["a14b"], saved("a14b")
    whole = load_it(folder, WanPipeline, "manual", **STREAM, text_encoder_cpu_offload=True)
    first, second = (runtime.stats().host_bytes for runtime in experts(whole))
    parked = sum(c.nbytes for c in enabled_of(whole).components.values() if c.parked)
    assert second > first > 0 < parked
    monkeypatch.setattr(wrapping, "start", starting)
    budget = parked + 3 * (128 << 20)  # each has a ring
    ours = load_it(
        folder,
        WanPipeline,
        "manual",
        host_budget=budget,
        host="disk",
        text_encoder_cpu_offload=True,
        **STREAM,
    )
    room = budget - parked
    assert chosen == [room * first // (first + second), room * second // (first + second)]
    assert torch.equal(small.run(ours), small.run(whole))


def test_without_a_budget_they_share_what_the_host_has(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Any] = []
    start = wrapping.start

    def starting(module: nn.Module, *args: Any, **options: Any) -> Any:
        chosen.append(options["host"].budget)
        return start(module, *args, **options)

    monkeypatch.setattr(wrapping, "start", starting)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: host_memory.RESERVE + 10**9)
    ours = load_it(saved("a14b"), WanPipeline, "manual", **STREAM)
    first, second = (runtime.stats().host_bytes for runtime in experts(ours))
    assert chosen == [10**9 * first // (first + second), 10**9]


def test_a_host_too_small_for_the_blocks_reads_them_from_disk(
    saved: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "READ_AHEAD_BYTES", 1000)  # the blocks are smaller than a real ring
    small, folder = PIPELINES["a14b"], saved("a14b")
    plain = load_it(folder, hardware=CARD, **STREAM)
    needed = plan_of(plain).host_locked_bytes
    assert needed is not None
    short = replace(CARD, host_memory=needed + (1 << 30) - 1)
    with pytest.raises(wanoffload.HostMemoryError, match="nothing that is permitted fits"):
        enable(ordinary(folder), hardware=short, device="cpu", pack=False, **STREAM)
    with pytest.raises(wanoffload.HostMemoryError, match="nothing that is permitted fits"):
        load_it(folder, hardware=short, host="pinned", pack=False, **STREAM)
    with caplog.at_level("INFO", "wanoffload"):
        ours = load_it(folder, hardware=short, host="disk", **STREAM)
    assert "host memory is short: blocks of the DiT are read from disk" in caplog.text
    assert plan_of(ours).step_seconds is None
    assert torch.equal(small.run(ours), small.run(plain))
    assert all(set(runtime.tiers) == {"disk"} for runtime in experts(ours))


def test_what_is_read_comes_after_all_that_is_in_memory(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    become = components.Component.become
    monkeypatch.setattr(
        components.Component, "become", lambda self, *a: (names.append(self.name), become(self, *a))
    )
    kind = type(PIPELINES["i2v"].make())
    load_it(saved("i2v"), kind, "manual", **STREAM, vae_cpu_offload=True)
    assert names[-1] == "transformer"
    assert len(names) == 4


@pytest.mark.parametrize("host", ["pinned", "pageable"])
def test_steps_are_compared_with_their_prediction_where_weights_are_page_locked(
    host: str, planned, saved: Any
) -> None:
    planned(StandIn(True, False, 1, [], step_seconds=0.5))
    pipe = load_it(saved("t2v"), host=host, workload=CALL)
    PIPELINES["t2v"].run(pipe)
    predicted = offloader(pipe.transformer).stats().predicted_step_seconds
    assert predicted == (0.5 if host == "pinned" else None)


def test_a_budget_that_is_too_small_is_an_error_before_anything_is_read(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WanPipeline, "from_pretrained", None)  # calling it would fail
    with pytest.raises(
        wanoffload.HostMemoryError, match=r"nothing that is permitted fits .*host_budget is 0.00 GB"
    ):
        load_it(saved("a14b"), WanPipeline, host_budget=100_000, host="pinned", **STREAM)


# What can't be loaded. Nothing is held then.


class Watch:
    """What is mapped, page-locked and open, by all stores together."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.backend = wanoffload._C.HostBackend()
        self.stores: list[wanoffload._C.HostStore] = []
        self.files = open_files()
        for module in (wrapping, parking):
            patch.setattr(module, "backend_for", lambda _: self.backend)
        for module in (wrapping, parking, stored_weights):
            patch.setattr(module, "HostStore", self._store)

    def _store(self, backend: wanoffload._C.Backend) -> wanoffload._C.HostStore:
        self.stores.append(wanoffload._C.HostStore(backend))
        return self.stores[-1]

    @property
    def mapped(self) -> int:
        return sum(store.mapped_bytes for store in self.stores)

    def assert_nothing_is_held(self) -> None:
        gc.collect()
        assert self.backend.locked_bytes == 0
        assert self.mapped == 0
        assert open_files() == self.files
        assert not [o for o in gc.get_objects() if isinstance(o, torch.nn.Parameter) and own(o)]


BEFORE: set[int] = set()


def own(parameter: Any) -> bool:
    return parameter.device.type != "meta" and parameter.nbytes > 0 and id(parameter) not in BEFORE


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, saved: Any) -> Watch:
    saved("a14b")
    gc.collect()
    BEFORE.clear()
    BEFORE.update(id(o) for o in gc.get_objects() if isinstance(o, torch.nn.Parameter))
    return Watch(monkeypatch)


def refusal(folder: Path, watch: Watch, error: type[BaseException], *args: Any, **more: Any) -> str:
    with pytest.raises(error) as caught:
        load_it(folder, *(args or (WanPipeline, "manual")), **{**STREAM, **more})
    watch.assert_nothing_is_held()  # whoever keeps the error
    return str(caught.value)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def shard(folder: Path, part: str, number: int = 1) -> Path:
    return sorted((folder / part).glob("*.safetensors"))[number]


@pytest.mark.parametrize("part", ["transformer", "transformer_2"])
def test_a_truncated_transformer_is_named_before_anything_is_loaded(
    a14b: Path, part: str, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WanPipeline, "from_pretrained", None)  # calling it would fail
    cut(shard(a14b, part))
    assert str(shard(a14b, part)) in refusal(a14b, watch, CheckpointError)
    shard(a14b, part).unlink()
    assert f"{a14b / part} lacks" in refusal(a14b, watch, CheckpointError)
    shutil.rmtree(a14b / part)
    assert f"{a14b / part / 'config.json'} is missing" in refusal(a14b, watch, CheckpointError)


def test_a_transformer_of_another_class_is_named_before_anything_is_loaded(
    a14b: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WanPipeline, "from_pretrained", None)  # calling it would fail
    index = a14b / "model_index.json"
    found = json.loads(index.read_text())
    found["transformer_2"][1] = "WanVACETransformer3DModel"
    index.write_text(json.dumps(found))
    assert "WanVACETransformer3DModel" in refusal(a14b, watch, CheckpointError)
    found["transformer_2"][1] = "WanTransformer4DModel"
    index.write_text(json.dumps(found))
    assert "diffusers has no WanTransformer4DModel" in refusal(a14b, watch, CheckpointError)


def test_other_components_that_are_missing_or_cut_are_named(a14b: Path, watch: Watch) -> None:
    vae = shard(a14b, "vae")
    kept = vae.read_bytes()
    cut(vae)
    assert str(vae) in refusal(a14b, watch, CheckpointError)
    vae.unlink()
    assert f"{a14b / 'vae'} lacks {vae.name}" in refusal(a14b, watch, CheckpointError)
    vae.write_bytes(kept)
    (a14b / "tokenizer" / "tokenizer.json").write_text("{")
    message = refusal(a14b, watch, CheckpointError)
    assert f"diffusers could not load the rest of {a14b}" in message
    shutil.rmtree(a14b / "text_encoder")
    assert "text_encoder/config.json is missing" in refusal(a14b, watch, CheckpointError)


def test_what_is_no_pipeline_is_named(a14b: Path, watch: Watch) -> None:
    assert "WanTransformer3DModel is no pipeline class" in refusal(
        a14b, watch, PipelineError, WanTransformer3DModel
    )
    assert "no pipeline's folder" in refusal(a14b / "vae", watch, CheckpointError)
    assert "unknown choice 'dit_layerwise'" in refusal(a14b, watch, ValueError, dit_layerwise=True)
    assert "mode is one of" in refusal(a14b, watch, ValueError, WanPipeline, "fast")
    assert "host is one of" in refusal(a14b, watch, wanoffload.WrapError, host="disc")
    assert "is not a device" in refusal(a14b, watch, wanoffload.WrapError, device="nowhere")
    index = a14b / "model_index.json"
    index.write_text(index.read_text().replace('"WanPipeline"', '"WonPipeline"'))
    assert "no pipeline WonPipeline" in refusal(a14b, watch, PipelineError, DiffusionPipeline)


def test_a_read_that_fails_in_the_second_expert_leaves_nothing(
    a14b: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = StoredWeights.write, iter(range(100))

    def writing(self: Any, *args: Any) -> None:
        if next(count) == 5:  # the third of its blocks
            path = shard(a14b, "transformer_2", 2)
            os.truncate(path, 10)
        write(self, *args)

    monkeypatch.setattr(StoredWeights, "write", writing)
    with pytest.raises(wanoffload.TransferError, match=r"blocks\.\d.* could not be read"):
        load_it(a14b, WanPipeline, "manual", **STREAM)
    watch.assert_nothing_is_held()


@pytest.mark.parametrize("failing", ["text_encoder", "vae", "transformer", "transformer_2"])
def test_an_interrupt_leaves_nothing_and_what_was_given_as_it_was(
    saved: Any, failing: str, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("a14b")
    small = PIPELINES["a14b"]
    expected = small.run(load_it(folder, WanPipeline, "manual", **STREAM))
    gc.collect()
    expert = wanoffload.load(
        WanTransformer3DModel, folder, torch_dtype=BF16, device="cpu", prefetch=2
    )
    runtime = offloader(expert)
    become = components.Component.become

    def ending(self: Any, *args: Any) -> None:
        become(self, *args)
        if self.name == failing:
            raise KeyboardInterrupt

    held = watch.mapped, watch.backend.locked_bytes
    choices = {**STREAM, "layerwise_offload_components": "all", "transformer": expert}
    with monkeypatch.context() as patch:
        patch.setattr(components.Component, "become", ending)
        with pytest.raises(KeyboardInterrupt):
            load_it(folder, WanPipeline, "manual", **choices)
    gc.collect()
    assert (watch.mapped, watch.backend.locked_bytes) == held
    assert offloader(expert) is runtime
    assert runtime.before_forward is None
    assert torch.equal(small.run(load_it(folder, WanPipeline, "manual", **choices)), expected)


def test_one_that_can_not_be_enabled_is_refused_before_anything_is_loaded(
    saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = wanoffload.load(WanTransformer3DModel, saved("a14b"), torch_dtype=BF16, device="cpu")
    offloader(expert).close()
    monkeypatch.setattr(WanPipeline, "from_pretrained", None)  # calling it would fail
    with pytest.raises(PipelineError, match="transformer of this WanPipeline is wrapped already"):
        load_it(saved("a14b"), transformer=expert)


def test_weights_of_another_dtype_can_not_stay_on_disk(
    saved: Any, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is found out before anything is loaded."""
    monkeypatch.setattr(pipeline_source.Source, "assemble", None)
    message = refusal(
        saved("a14b"), watch, wanoffload.WrapError, host="disk", torch_dtype=torch.float16
    )
    assert "host='disk' is not to be had here" in message
    monkeypatch.setattr(cost, "READ_AHEAD_BYTES", 1000)
    short = replace(CARD, host_memory=(1 << 30) + 200_000)
    message = refusal(
        saved("a14b"), watch, wanoffload.HostMemoryError, hardware=short, torch_dtype=torch.float16
    )
    assert "nothing that is permitted fits" in message


# What it costs.


def test_one_bar_counts_every_byte(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar(acting.tqdm):  # type: ignore[name-defined, misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            bars.append(self)

    for module in (acting, wrapping):
        monkeypatch.setattr(module, "tqdm", Bar)
    choices = {**STREAM, "layerwise_offload_components": "all"}
    pipe = load_it(saved("a14b"), WanPipeline, "manual", **choices)
    total = sum(component.nbytes for component in enabled_of(pipe).components.values())
    (bar,) = bars
    assert (bar.desc, bar.unit, bar.total, bar.n) == ("load", "B", total, total)


LARGE = {
    "num_attention_heads": 16,
    "attention_head_dim": 64,
    "ffn_dim": 4096,
    "num_layers": 3,
    "text_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
}
"""About 100 MB in 2 bytes, 34 a block."""


def test_no_second_copy_of_the_transformers_is_made(a14b: Path, saved: Any) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    try:
        model = WanTransformer3DModel(**LARGE)
    finally:
        torch.set_default_dtype(before)
    for name in ("transformer", "transformer_2"):
        shutil.rmtree(a14b / name)
        model.save_pretrained(a14b / name, max_shard_size="50MB")
    code = f"""
import gc, psutil, torch, wanoffload
from diffusers import WanPipeline

def high_water():
    with open("/proc/self/status") as status:
        return next(int(l.split()[1]) << 10 for l in status if l.startswith("VmHWM"))

def load(folder):
    options = dict(torch_dtype=torch.bfloat16, device="cpu", dit_layerwise_offload=True)
    return wanoffload.load_pipeline(WanPipeline, folder, "manual", **options)

first = load({str(saved("a14b"))!r})  # what loading itself brings with it: modules, threads
del first
gc.collect()
before = psutil.Process().memory_info().rss
pipe = load({str(a14b)!r})
experts = [pipe.transformer, pipe.transformer_2]
stats = [wanoffload.offloader(expert).stats() for expert in experts]
blocks = sum(s.host_bytes for s in stats)
others = sum(p.nbytes for c in pipe.components.values() if isinstance(c, torch.nn.Module)
             for p in c.parameters()) - blocks
slots = 3 * max(s.host_bytes // s.units for s in stats)  # one at a time takes them
print(high_water() - before, blocks, others + slots)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    taken, blocks, others = map(int, result.stdout.splitlines()[-1].split())
    assert 190e6 < blocks < 220e6
    assert taken < 1.03 * blocks + others + (24 << 20)


@pytest.mark.parametrize("name", ["a14b", "i2v"])
@pytest.mark.gpu
def test_it_is_the_same_on_a_gpu(name: str, saved: Any) -> None:
    small, folder = PIPELINES[name], saved(name)
    kind = type(small.make())
    choices = {**STREAM, "layerwise_offload_components": "all"}
    ours = load_it(folder, kind, "manual", device="cuda", **choices)
    theirs = enable(ordinary(folder, kind), "manual", hardware=HERE, device="cuda", **choices)
    resident = small.run(ordinary(folder, kind).to("cuda"))
    same_enabled(ours, theirs)
    for _ in range(2):
        assert torch.equal(small.run(ours).cpu(), resident.cpu())
        assert at_home(ours)
    disable(ours)
    assert ours.device == torch.device("cpu")
