"""`share=`: several processes run one model over one copy of its images."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import wanoffload
from tests.peers import Peer, State, is_kept_waiting, mapped_arenas
from tests.small_models import MODELS, forward
from tests.test_checkpoint import save
from wanoffload import host_memory, shared_memory, weights, wrapping
from wanoffload._C import HostBackend, HostImage
from wanoffload.errors import HostMemoryError, ShareError, WrapError
from wanoffload.placing import Placing
from wanoffload.shared_arena import SharedArena

KIND = MODELS["wan21_t2v"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    save(KIND.make(), path, "sharded")
    return path


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """What the resident model gives."""
    model, inputs = KIND()
    return forward(model, inputs).float().numpy()


# What peers do.


def build(
    state: State, name: str | None, source: Path | int, moment: float = 0.0, **options: Any
) -> None:
    """Loads from a folder, or wraps a model made from a seed."""
    torch.set_num_threads(1)
    model = KIND.make(source) if isinstance(source, int) else KIND.make()
    time.sleep(max(0.0, moment - time.time()))
    if isinstance(source, int):
        state["model"] = wanoffload.wrap(model, device="cpu", share=name, **options)
    else:
        state["model"] = wanoffload.load(
            type(model), source, torch_dtype=torch.bfloat16, device="cpu", share=name, **options
        )


def build_with(state: State, name: str, source: Path | int, options: dict[str, Any]) -> None:
    build(state, name, source, **options)


def output(state: State) -> np.ndarray:
    return forward(state["model"], KIND.inputs()).float().numpy()


def write_slowly(
    state: State, name: str, source: Path | int, options: dict[str, Any] | None = None
) -> None:
    """Says so when it has written three blocks, and does not go on."""
    real = Placing.place
    placed = 0

    def place(self: Any, number: int) -> Any:
        nonlocal placed
        placed += 1
        if placed > 3:
            Path(state["note"]).touch()
            time.sleep(3600)
        return real(self, number)

    Placing.place = place  # type: ignore[method-assign]
    build(state, name, source, **(options or {}))


def keep(state: State, key: str, value: Any) -> None:
    state[key] = value


def memory_of_arenas(state: State) -> tuple[int, int]:
    """(Rss, Pss) of the mappings of arenas, each page of which is touched first."""
    for binding in wanoffload.offloader(state["model"]).bindings:
        binding.image.lock()  # type: ignore[attr-defined]
    return mapped_arenas()


def stats(state: State) -> tuple[wanoffload.Stats, list[str], str]:
    offloader = wanoffload.offloader(state["model"])
    return offloader.stats(), offloader.tiers, offloader.host_plan.sentence


def add_to_a_weight(state: State) -> np.ndarray:
    """As a LoRA that is fused does. Returns the block's weight."""
    weight = state["model"].blocks[1].attn1.to_q.weight
    with torch.inference_mode():
        weight += 1.0
    return weight.detach().float().numpy()


def replace_a_weight(state: State) -> None:
    to_q = state["model"].blocks[0].attn1.to_q
    to_q.weight = nn.Parameter(torch.zeros_like(to_q.weight), requires_grad=False)


def unwrap_and_scribble(state: State) -> bool:
    """Whether all weights are ordinary ones with the values that they had."""
    before = {key: value.clone() for key, value in state["model"].state_dict().items()}
    model = wanoffload.unwrap(state["model"])
    same = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for parameter in model.parameters():
        assert type(parameter) is nn.Parameter
        parameter.data.zero_()
    return same


def fails_to_connect(state: State, name: str, seed: int) -> bool:
    """Wraps, and fails at the end; whether the model is as it was."""
    model = KIND.make(seed)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def fail(self: Any) -> None:
        raise RuntimeError("injected")

    real, wrapping._Wrapping._connect = wrapping._Wrapping._connect, fail  # type: ignore
    try:
        with pytest.raises(RuntimeError, match="injected"):
            wanoffload.wrap(model, device="cpu", share=name)
    finally:
        wrapping._Wrapping._connect = real  # type: ignore[method-assign]
    for parameter in model.parameters():
        parameter.data.add_(0)  # writable
    return all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def share_all(peers: list[Peer], name: str, source: Path | int) -> None:
    for peer in peers:
        peer.run(build, name, source)


# One copy.


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("way", ["wrap", "load"])
def test_processes_give_equal_outputs_and_hold_one_copy(
    peers: list[Peer], name: str, folder: Path, expected: np.ndarray, way: str, count: int
) -> None:
    peers = peers[:count]
    share_all(peers, name, folder if way == "load" else 0)
    for _ in range(2):
        for peer in peers:
            peer.start(output)
        for peer in peers:
            assert np.array_equal(peer.result(), expected)
    found = [peer.run(memory_of_arenas) for peer in peers]
    held, tiers, sentence = peers[-1].run(stats)
    assert held.fetches >= 2 * held.units
    assert tiers == ["pinned"] * KIND.units
    assert f"; {KIND.units} of them shared" in sentence
    assert all(held.host_bytes <= rss <= held.host_bytes + 4096 * held.units for rss, _ in found)
    assert sum(pss for _, pss in found) <= 1.05 * held.host_bytes + 4096 * held.units


@pytest.mark.parametrize("host", ["pinned", "pageable"])
def test_each_process_has_its_own_tier(
    peers: list[Peer], name: str, folder: Path, expected: np.ndarray, host: str
) -> None:
    first, second, *_ = peers
    first.run(build, name, folder)
    second.run(build_with, name, folder, {"host": host})
    assert second.run(stats)[1] == [host] * KIND.units
    for peer in (first, second):
        assert np.array_equal(peer.run(output), expected)


@pytest.mark.parametrize("way", ["wrap", "load"])
def test_a_cache_file_is_made_by_the_first_and_read_by_the_others(
    peers: list[Peer], name: str, folder: Path, tmp_path: Path, expected: np.ndarray, way: str
) -> None:
    source = folder if way == "load" else 0
    for peer in peers[:3]:
        peer.start(build_with, name, source, {"cache": tmp_path / "cache"})
    for peer in peers[:3]:
        peer.result()
    assert len(shared_memory.find(name)) == 1
    peers[3].run(build, name, source)  # the same bytes, with a cache or without
    for peer in peers:
        assert np.array_equal(peer.run(output), expected)


def test_a_joiner_needs_no_memory_for_what_others_have_filled(
    peers: list[Peer], name: str, folder: Path, expected: np.ndarray
) -> None:
    peers[0].run(build, name, folder)
    peers[1].run(pretend_there_is_little_memory)
    with pytest.raises(HostMemoryError):
        peers[1].run(build_with, f"{name}-2", folder, {"host": "pinned"})
    for host in ("pinned", "auto"):
        peers[1].run(build_with, name, folder, {"host": host})
        assert peers[1].run(stats)[1] == ["pinned"] * KIND.units
        assert np.array_equal(peers[1].run(output), expected)
    peers[1].run(end_pretending)


def pretend_there_is_little_memory(state: State) -> None:
    state["real"] = host_memory.available_bytes
    host_memory.available_bytes = lambda: host_memory.RESERVE + (300 << 10)


def end_pretending(state: State) -> None:
    host_memory.available_bytes = state["real"]


def test_units_that_the_first_left_on_disk_are_on_disk_or_own(
    peers: list[Peer], name: str, folder: Path, expected: np.ndarray
) -> None:
    peers[0].run(put_on_disk, {1, 3})
    peers[0].run(build, name, folder)
    peers[0].run(take_back_put_on_disk)
    assert peers[0].run(stats)[1] == ["pinned", "disk", "pinned", "disk", "pinned"]
    peers[1].run(build, name, folder)
    _, tiers, sentence = peers[1].run(stats)
    assert tiers == ["pinned"] * KIND.units
    assert "; 3 of them shared" in sentence
    for peer in peers[:2]:
        assert np.array_equal(peer.run(output), expected)
    rss, _ = peers[1].run(memory_of_arenas)
    assert rss < 0.7 * peers[1].run(stats)[0].host_bytes


def put_on_disk(state: State, chosen: set[int]) -> None:
    """As `auto` does where memory is short."""
    state["assign"] = real = wrapping.assign

    def assign(*arguments: Any) -> Any:
        plan = real(*arguments)
        tiers = tuple("disk" if i in chosen else tier for i, tier in enumerate(plan.tiers))
        return dataclasses.replace(plan, tiers=tiers, ring_bytes=128 << 20)

    wrapping.assign = assign


def take_back_put_on_disk(state: State) -> None:
    wrapping.assign = state["assign"]


def test_four_that_start_at_the_same_instant_share_one_copy(
    peers: list[Peer], name: str, folder: Path, expected: np.ndarray
) -> None:
    moment = time.time() + 0.5
    for peer in peers:
        peer.start(build, name, folder, moment)
    for peer in peers:
        peer.result()
    assert len(shared_memory.find(name)) == 1
    for peer in peers:
        assert np.array_equal(peer.run(output), expected)


# Changes.


@pytest.mark.parametrize("change", [add_to_a_weight, replace_a_weight])
def test_what_one_process_writes_the_others_do_not_see(
    peers: list[Peer], name: str, folder: Path, expected: np.ndarray, change: Any
) -> None:
    first, second, third, alone = peers
    share_all([first, second], name, folder)
    alone.run(build, None, folder)
    before = first.run(output)
    for peer in (second, alone):
        peer.run(change)
    changed = second.run(output)
    assert np.array_equal(changed, alone.run(output))
    assert not np.array_equal(changed, before)
    third.run(build, name, folder)
    for peer in (first, third):
        assert np.array_equal(peer.run(output), expected)
    assert second.run(stats)[1] == ["pinned"] * KIND.units
    assert second.run(stats)[0].locked_bytes == alone.run(stats)[0].locked_bytes


def test_a_written_block_that_can_not_be_locked_again_is_pageable(
    name: str, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process: the outputs are those of the changed model."""
    backend = HostBackend()
    monkeypatch.setattr(wrapping, "backend_for", lambda device: backend)
    model, inputs = KIND()
    wanoffload.wrap(model, device="cpu", share=name)
    plain = KIND.make()
    forward(model, inputs)
    wanoffload.offloader(model).pause()
    forward(model, inputs)
    backend.fail_at(10**9)
    monkeypatch.setattr(HostImage, "make_own", failing_lock(backend, HostImage.make_own))
    for changed in (model, plain):
        with torch.inference_mode():
            changed.blocks[1].attn1.to_q.weight += 1.0
    assert wanoffload.offloader(model).tiers == [
        "pinned",
        "pageable",
        *["pinned"] * (KIND.units - 2),
    ]
    for _ in range(2):
        assert torch.equal(forward(model, inputs), forward(plain, inputs))


def failing_lock(backend: HostBackend, real: Callable[[HostImage], None]) -> Any:
    def make_own(image: HostImage) -> None:
        backend.fail_at(1)
        real(image)

    return make_own


@pytest.mark.parametrize("scribbler", [0, 1])
def test_a_stray_write_ends_its_process_and_changes_nothing_for_the_others(
    mortal: Callable[[], Peer], name: str, folder: Path, expected: np.ndarray, scribbler: int
) -> None:
    """Whether it filled the arena or joined it. Writes by torch move the block first."""
    both = [mortal(), mortal()]
    share_all(both, name, folder)
    both[scribbler].start(write_past_torch)
    assert both[scribbler].wait() == -signal.SIGSEGV
    assert np.array_equal(both[1 - scribbler].run(output), expected)


def write_past_torch(state: State) -> None:
    ctypes.memset(state["model"].blocks[0].attn1.to_q.weight.data_ptr(), 1, 1)


def test_unwrap_in_one_process_leaves_the_others_right(
    peers: list[Peer], name: str, folder: Path, expected: np.ndarray
) -> None:
    share_all(peers[:3], name, folder)
    assert peers[0].run(unwrap_and_scribble)
    assert peers[1].run(unwrap_and_scribble)
    assert np.array_equal(peers[2].run(output), expected)
    peers[3].run(build, name, folder)
    assert np.array_equal(peers[3].run(output), expected)


# Ends.


@pytest.mark.parametrize("way", ["wrap", "load"])
def test_when_the_first_is_killed_while_it_fills_the_second_fills(
    peers: list[Peer],
    mortal: Callable[[], Peer],
    name: str,
    folder: Path,
    tmp_path: Path,
    expected: np.ndarray,
    way: str,
) -> None:
    source = folder if way == "load" else 0
    first = mortal()
    first.run(keep, "note", tmp_path / "note")
    first.start(write_slowly, name, source)
    while not (tmp_path / "note").exists():
        assert not first.has_result(0.01)
    for peer in peers[:2]:
        peer.start(build, name, source)
    for peer in peers[:2]:
        assert is_kept_waiting(peer, name)
    assert first.kill() == -signal.SIGKILL
    for peer in peers[:2]:
        peer.result()
    for peer in peers[:2]:
        assert np.array_equal(peer.run(output), expected)
    assert len(shared_memory.find(name)) == 1


def test_when_the_first_is_killed_afterwards_the_others_go_on_and_serve_who_comes(
    peers: list[Peer], mortal: Callable[[], Peer], name: str, folder: Path, expected: np.ndarray
) -> None:
    first = mortal()
    first.run(build, name, folder)
    peers[0].run(build, name, folder)
    first.kill()
    assert np.array_equal(peers[0].run(output), expected)
    peers[1].run(build, name, folder)
    assert f"; {KIND.units} of them shared" in peers[1].run(stats)[2]
    assert np.array_equal(peers[1].run(output), expected)


def test_nothing_is_left_when_the_last_one_ends(
    mortal: Callable[[], Peer], name: str, folder: Path
) -> None:
    before = {file for file in os.listdir("/dev/shm") if not file.startswith("sem.mp-")}
    peers = [mortal(), mortal()]
    share_all(peers, name, folder)
    assert len(shared_memory.find(name)) == 1
    for peer in peers:
        peer.kill()
    assert shared_memory.find(name) == []
    assert {file for file in os.listdir("/dev/shm") if not file.startswith("sem.mp-")} <= before


def test_memory_comes_back_when_models_end_in_processes_that_live(
    peers: list[Peer], name: str, folder: Path
) -> None:
    for _ in range(3):
        share_all(peers[:2], name, folder)
        for peer in peers[:2]:
            peer.forget()
        assert shared_memory.find(name) == []


@pytest.mark.parametrize("filled", [False, True])
def test_a_wrap_that_fails_gives_the_model_back_and_the_others_a_chance(
    peers: list[Peer], name: str, expected: np.ndarray, filled: bool
) -> None:
    if filled:
        peers[1].run(build, name, 0)
    assert peers[0].run(fails_to_connect, name, 0)
    for peer in peers[1:3]:
        peer.run(build, name, 0)
        assert np.array_equal(peer.run(output), expected)


def test_a_wrap_that_fails_while_it_fills_keeps_its_images_without_a_copy(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the arena is nobody's any more: another fills one of its own."""
    model, inputs = KIND()
    before = forward(model, inputs)
    real, written = weights.OwnTensors.write, []

    def write(self: Any, unit: Any, layout: Any, memory: HostImage, lock: Any) -> None:
        if len(written) == 3:
            monkeypatch.setattr(host_memory, "available_bytes", lambda: 0)
            raise RuntimeError("injected")
        written.append(memory.address)
        real(self, unit, layout, memory, lock)

    monkeypatch.setattr(weights.OwnTensors, "write", write)
    with pytest.raises(RuntimeError, match="injected"):
        wanoffload.wrap(model, device="cpu", share=name)
    monkeypatch.undo()
    assert model.blocks[2].scale_shift_table.data_ptr() - written[2] < 1 << 20
    other = wanoffload.wrap(KIND.make(), device="cpu", share=name)
    for parameter in model.parameters():
        parameter.data.mul_(1.0)
    assert torch.equal(forward(model, inputs), before)
    assert torch.equal(forward(other, inputs), before)


# What is refused.


def test_another_model_under_the_name_is_refused(
    peers: list[Peer], name: str, folder: Path, tmp_path: Path, expected: np.ndarray
) -> None:
    peers[0].run(build, name, folder)
    save(KIND.make(), tmp_path, "sharded")  # the same values, in other files
    for source in (tmp_path, 0):
        with pytest.raises(ShareError, match=rf"'{name}', which process {peers[0].pid} holds"):
            peers[1].run(build, name, source)
    assert np.array_equal(peers[0].run(output), expected)


def test_a_model_with_other_values_is_refused_and_is_as_it_was(
    peers: list[Peer], name: str
) -> None:
    peers[0].run(build, name, 0)
    model, inputs = KIND(seed=1)
    before = forward(model, inputs)
    with pytest.raises(ShareError, match=r"weights\.fingerprints\[0\] is \d+ there and \d+ here"):
        wanoffload.wrap(model, device="cpu", share=name)
    assert torch.equal(forward(model, inputs), before)


def test_a_file_that_is_replaced_meanwhile_is_an_error_of_who_would_share_it(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save(KIND.make(), tmp_path)
    real = SharedArena.join

    def join(*arguments: Any) -> Any:
        save(KIND.make(1), tmp_path)
        return real(*arguments)

    monkeypatch.setattr(SharedArena, "join", join)
    with pytest.raises(wanoffload.CheckpointError, match="replaced while it was being loaded"):
        wanoffload.load(type(KIND.make()), tmp_path, device="cpu", share=name)
    assert shared_memory.find(name) == []


def test_names_and_tiers_that_can_not_be_are_refused(folder: Path, name: str) -> None:
    model = KIND.make()
    with pytest.raises(ShareError, match="letters, digits"):
        wanoffload.wrap(model, device="cpu", share="no name")
    for share in ("", 3):
        with pytest.raises(ShareError, match="letters, digits"):
            wanoffload.load(type(model), folder, device="cpu", share=share)  # type: ignore
    with pytest.raises(WrapError, match="nothing in memory that could be shared"):
        wanoffload.load(
            type(model),
            folder,
            torch_dtype=torch.bfloat16,
            device="cpu",
            host="disk",
            share=name,
        )
