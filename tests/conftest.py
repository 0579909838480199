"""Fixtures: the device a test runs on, and the backend of an engine without a model."""

from __future__ import annotations

import gc
import os
import uuid
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.peers import Peer

# Kernels run in Triton's interpreter where there is no GPU. Before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# On tensors of this size threads only wait for each other: a forward takes ten times as long.
torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What is imported and collected stays: looking through it in every collection of garbage takes
    a seventh of the tests' time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests for a GPU are deselected where there is none; pytest's summary counts them."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Where the model computes: the host backend, and CUDA where there is one."""
    return str(request.param)


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Allocations count as what is asked for: small blocks take what they have."""
    from wanoffload import residency, ring_plan

    caches = (residency._choose, ring_plan._choose, ring_plan._choices)
    monkeypatch.setattr("wanoffload.residency.ROUND_BYTES", 256)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:  # of the plans made meanwhile none is right
        each.cache_clear()


@pytest.fixture(scope="session", autouse=True)
def _no_rates_are_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests measure of the machine, beside each other, is not kept for others to believe."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers in every run; a test that wants others seeds again."""
    torch.manual_seed(20260)


@pytest.fixture(scope="module")
def reused_peers() -> Iterator[list[Peer]]:
    started = [Peer() for _ in range(4)]
    yield started
    for peer in started:
        peer.kill()


@pytest.fixture
def peers(reused_peers: list[Peer]) -> Iterator[list[Peer]]:
    """Four processes, for tests that leave them as they are."""
    yield reused_peers
    for peer in reused_peers:
        peer.forget()


@pytest.fixture
def mortal() -> Iterator[Callable[[], Peer]]:
    """Makes processes that a test may kill."""
    made: list[Peer] = []

    def make() -> Peer:
        made.append(Peer())
        return made[-1]

    yield make
    for peer in made:
        peer.kill()


@pytest.fixture
def name() -> str:
    """Of a shared arena, that nobody else uses."""
    return f"test/{uuid.uuid4().hex}"
