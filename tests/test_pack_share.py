"""`share=` with `pack=`: several processes run one model over one packed copy of its images."""

from __future__ import annotations

import signal
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
from tests.test_share import (
    add_to_a_weight,
    build,
    build_with,
    keep,
    output,
    stats,
    unwrap_and_scribble,
    write_slowly,
)
from wanoffload import shared_memory
from wanoffload.errors import ShareError, WrapError

KIND = MODELS["wan21_t2v"]
PACKED: dict[str, Any] = {"pack": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    save(KIND.make(), path, "sharded")
    return path


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    model, inputs = KIND()
    return forward(model, inputs).float().numpy()


def memory_of_arenas(state: State) -> tuple[int, int]:
    """(Rss, Pss) of the mappings of arenas, each page of which is touched first."""
    for binding in wanoffload.offloader(state["model"]).bindings:
        binding.stored.lock()  # type: ignore[attr-defined]
    return mapped_arenas()


@pytest.mark.parametrize("way", ["wrap", "load"])
def test_processes_give_equal_outputs_and_hold_one_packed_copy(
    peers: list[Peer], name: str, folder: Path, expected: np.ndarray, way: str
) -> None:
    peers = peers[:3]
    for peer in peers:
        peer.start(build_with, name, folder if way == "load" else 0, PACKED)
    for peer in peers:
        peer.result()
    for _ in range(2):
        for peer in peers:
            assert np.array_equal(peer.run(output), expected)
    found = [peer.run(memory_of_arenas) for peer in peers]
    held, tiers, _ = peers[-1].run(stats)
    assert held.packed_units == held.units == KIND.units
    assert held.host_bytes < 0.82 * held.plain_bytes
    assert tiers == ["pinned"] * KIND.units
    assert all(held.host_bytes <= rss <= held.host_bytes + 4096 * held.units for rss, _ in found)
    assert sum(pss for _, pss in found) <= 1.05 * held.host_bytes + 4096 * held.units


def test_the_room_that_packed_blocks_leave_takes_no_memory(
    peers: list[Peer], name: str, folder: Path
) -> None:
    peers[0].run(build_with, name, folder, PACKED)
    held, *_ = peers[0].run(stats)
    (memory,) = shared_memory.find(name)
    header = 16 << 10
    assert held.host_bytes <= memory.filled_bytes() <= held.host_bytes + 4096 * 5 + header


def wrap_hard(state: State, name: str) -> np.ndarray:
    """A model of random bits, which packed takes more than plain. Its output."""
    torch.manual_seed(3)
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))
    for block in model.blocks:
        bits = torch.randint(0, 0x4000, block.weight.shape, dtype=torch.int16)
        block.weight = nn.Parameter(bits.view(torch.bfloat16), requires_grad=False)
    state["model"] = wanoffload.wrap(model, device="cpu", share=name, pack=True)
    return np.stack([block.weight.float().numpy().copy() for block in model.blocks])


def test_blocks_that_packed_take_more_than_plain_have_room(peers: list[Peer], name: str) -> None:
    first, second = (peer.run(wrap_hard, name) for peer in peers[:2])
    assert np.array_equal(first, second)
    held, *_ = peers[1].run(stats)
    assert held.host_bytes > held.plain_bytes
    assert len(shared_memory.find(name)) == 1


def test_plain_and_packed_images_are_not_shared(
    peers: list[Peer], name: str, folder: Path, expected: np.ndarray
) -> None:
    peers[0].run(build_with, name, folder, PACKED)
    words = r"packed blocks is \[0, 1, 2, 3, 4\] there and \[\] here"
    with pytest.raises(ShareError, match=words):
        peers[1].run(build, name, folder)
    peers[1].run(build_with, name, folder, PACKED)
    assert np.array_equal(peers[1].run(output), expected)


def test_auto_is_refused_together_with_share(name: str) -> None:
    with pytest.raises(WrapError, match="each process would decide by the memory that it finds"):
        wanoffload.wrap(KIND.make(), device="cpu", share=name, pack="auto")


def test_a_packed_cache_file_fills_the_arena(
    peers: list[Peer], name: str, folder: Path, tmp_path: Path, expected: np.ndarray
) -> None:
    for peer in peers[:2]:
        peer.start(build_with, name, folder, {**PACKED, "cache": tmp_path / "cache"})
    for peer in peers[:2]:
        peer.result()
    peers[2].run(build_with, name, folder, PACKED)  # the same bytes, with a cache or without
    assert len(shared_memory.find(name)) == 1
    for peer in peers[:3]:
        assert np.array_equal(peer.run(output), expected)


def test_what_one_process_writes_the_others_do_not_see(
    peers: list[Peer], name: str, folder: Path, expected: np.ndarray
) -> None:
    first, second, third, alone = peers
    for peer in (first, second):
        peer.run(build_with, name, folder, PACKED)
    alone.run(build, None, folder)
    for peer in (second, alone):
        peer.run(add_to_a_weight)
    changed = second.run(output)
    assert np.array_equal(changed, alone.run(output))
    assert not np.array_equal(changed, expected)
    third.run(build_with, name, folder, PACKED)
    for peer in (first, third):
        assert np.array_equal(peer.run(output), expected)


def test_unwrap_in_one_process_leaves_the_others_right(
    peers: list[Peer], name: str, folder: Path, expected: np.ndarray
) -> None:
    for peer in peers[:2]:
        peer.run(build_with, name, folder, PACKED)
    assert peers[0].run(unwrap_and_scribble)
    assert np.array_equal(peers[1].run(output), expected)


def test_when_the_first_is_killed_while_it_packs_the_second_does(
    peers: list[Peer],
    mortal: Callable[[], Peer],
    name: str,
    tmp_path: Path,
    expected: np.ndarray,
) -> None:
    first = mortal()
    first.run(keep, "note", tmp_path / "note")
    first.start(write_packed_slowly, name)
    while not (tmp_path / "note").exists():
        assert not first.has_result(0.01)
    peers[0].start(build_with, name, 0, PACKED)
    assert is_kept_waiting(peers[0], name)
    assert first.kill() == -signal.SIGKILL
    peers[0].result()
    assert np.array_equal(peers[0].run(output), expected)


def write_packed_slowly(state: State, name: str) -> None:
    write_slowly(state, name, 0, PACKED)
