"""The parts ``ring``, ``event`` and ``acquire``: what the engine costs the host."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.engine import Found, backend_for, is_small
from benchmarks.harness import Session, Spread
from benchmarks.models import MODELS
from benchmarks.timing import Clock

if TYPE_CHECKING:
    from wanoffload import _C

REPEATS = 5
UNITS = 40
BATCHES = 25
HOST_CALLS = 2000
HOPS = 1000
TENSORS = 27


def ring(session: Session) -> Found:
    """Host time of a chunk's way: checked out, sent, and free again behind nothing."""
    from wanoffload import _C

    backend = backend_for(session.device)
    made = _C.PinnedRing(backend, 16, 64 * 1024 if is_small(session) else 8 << 20)
    stream = backend.create_stream()

    def send() -> None:
        index, _ = made.check_out()
        made.send(index, stream)

    def give_back() -> None:
        index, _ = made.check_out()
        made.give_back(index)

    for name, work in {"check_out + send": send, "check_out + give_back": give_back}.items():
        spread = _host_us(work)
        free, checked_out, in_flight = made.counts
        whole = free + checked_out + in_flight == made.size and checked_out == 0
        yield {"what": name}, {"host_us": spread.as_json(), "verified": whole}
    Clock(session.device).synchronize()


def _host_us(work: Callable[[], object], calls: int = HOST_CALLS) -> Spread:
    """Microseconds a call takes the host, over runs of many calls."""
    work()
    runs = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(calls // REPEATS):
            work()
        runs.append((time.perf_counter() - start) / (calls // REPEATS) * 1e6)
    return Spread.of(runs)


def event(session: Session) -> Found:
    """Events on the backend: what they cost the host, and how long two streams take to and fro."""
    backend = backend_for(session.device)
    here, there = backend.create_stream(), backend.create_stream()
    go, come = backend.create_event(), backend.create_event()

    def record_and_wait() -> None:
        backend.record(go, here)
        backend.wait(there, go)

    def record_and_synchronize() -> None:
        backend.record(go, here)
        backend.synchronize(go)

    works = {"record + wait": record_and_wait, "record + synchronize": record_and_synchronize}
    for name, work in works.items():
        spread = _host_us(work)
        backend.synchronize(go)
        values = {"host_us": spread.as_json(), "verified": backend.is_complete(go)}
        yield {"what": name}, values

    def round_trip() -> None:
        record_and_wait()
        backend.record(come, there)
        backend.wait(here, come)

    spread = _device_us(round_trip, backend, come)
    verified = backend.is_complete(go) and backend.is_complete(come)
    yield {"what": "round trip of two streams"}, {"us": spread.as_json(), "verified": verified}


def _device_us(hop: Callable[[], None], backend: _C.Backend, last: int) -> Spread:
    """Microseconds for each of many hops until the device has done them all."""
    runs = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(HOPS):
            hop()
        backend.synchronize(last)
        runs.append((time.perf_counter() - start) / HOPS * 1e6)
    return Spread.of(runs)


def acquire(session: Session) -> Found:
    """Host time of acquire + release of a block of 27 tensors: all of it, and the engine's part."""
    engine = _engine_us(session)
    total, verified = _hooks_us(session)
    engine_us = engine["acquire"].median + engine["release"].median
    yield (
        {"tensors": TENSORS},
        {
            "engine_acquire_us": engine["acquire"].as_json(),
            "engine_release_us": engine["release"].as_json(),
            "engine_us": engine_us,
            "total_us": total.as_json(),
            "python_us": total.median - engine_us,
            "verified": verified,
        },
    )


def _engine_us(session: Session) -> dict[str, Spread]:
    """The engine alone, called as the hooks call it; copies are small, so the link never waits."""
    from wanoffload import _C

    backend = backend_for(session.device)
    store = _C.HostStore(backend)
    size = 64 * 1024
    memory = torch.empty(3, size, dtype=torch.uint8, device=session.device)
    slots = [slot.data_ptr() for slot in memory]
    prefetcher = _C.Prefetcher(backend, slots, size, memory, depth=2)
    for _ in range(UNITS):
        image = store.allocate(size)
        image.lock()
        prefetcher.add_unit(image)
    prefetcher.prefetch()
    times: dict[str, list[float]] = {"acquire": [], "release": []}
    for _ in range(BATCHES):
        for unit in range(UNITS):
            _one_acquire(prefetcher, unit, times)
        Clock(session.device).synchronize()
    prefetcher.close()
    return {name: Spread.of(values[UNITS:]) for name, values in times.items()}


def _one_acquire(prefetcher: _C.Prefetcher, unit: int, times: dict[str, list[float]]) -> None:
    start = time.perf_counter_ns()
    _, generation = prefetcher.acquire(unit, 0)
    acquired = time.perf_counter_ns()
    prefetcher.release(unit, 0, generation)
    released = time.perf_counter_ns()
    times["acquire"].append((acquired - start) / 1e3)
    times["release"].append((released - acquired) / 1e3)


class IdleModel(nn.Module):
    """Real transformer blocks that only sum their weights when asked: what is left is overhead."""

    def __init__(self) -> None:
        super().__init__()
        config = MODELS["tiny"].config
        self.blocks = nn.ModuleList(_idle_block(config) for _ in range(UNITS))
        self.sums: list[torch.Tensor] | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Calls every block."""
        for block in self.blocks:
            hidden_states = block(hidden_states, self.sums)
        return hidden_states


def _idle_block(config: dict[str, Any]) -> nn.Module:
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    class IdleBlock(WanTransformerBlock):  # type: ignore[misc]
        def forward(
            self, hidden_states: torch.Tensor, sums: list[torch.Tensor] | None
        ) -> torch.Tensor:
            if sums is not None:
                sums.append(torch.stack([_sum_of_bits(p) for p in self.parameters()]))
            return hidden_states

    dim = config["num_attention_heads"] * config["attention_head_dim"]
    block: nn.Module = IdleBlock(
        dim, config["ffn_dim"], config["num_attention_heads"], "rms_norm_across_heads", True
    )
    assert len(list(block.parameters())) == TENSORS
    return block.requires_grad_(False)


def _sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    """A sum that is the same on every device."""
    return tensor.detach().flatten().view(torch.int32).long().sum()


def _hooks_us(session: Session) -> tuple[Spread, bool]:
    """A forward with hooks less one without, for each block; and whether the weights were right."""
    import wanoffload

    model = IdleModel().eval()
    hidden_states = torch.ones(1, device=session.device)
    expected = _weight_sums(model, hidden_states)
    bare = _forward_us(model, hidden_states, session.device)
    wanoffload.wrap(model, prefetch=2, device=session.device)
    equal = torch.equal(_weight_sums(model, hidden_states), expected)
    offloader = wanoffload.offloader(model)
    before = offloader.stats().acquires
    wrapped = _forward_us(model, hidden_states, session.device)
    acquired = offloader.stats().acquires - before == UNITS * (BATCHES + 1)
    offloader.close()
    overhead = Spread(
        wrapped.median - bare.median,
        wrapped.min - bare.median,
        wrapped.max - bare.median,
        wrapped.count,
    )
    return overhead, equal and acquired


def _weight_sums(model: IdleModel, hidden_states: torch.Tensor) -> torch.Tensor:
    model.sums = []
    with torch.inference_mode():
        model(hidden_states)
    sums = torch.stack([each.cpu() for each in model.sums])
    model.sums = None
    return sums


def _forward_us(model: nn.Module, hidden_states: torch.Tensor, device: torch.device) -> Spread:
    """Host microseconds for each block of a forward; the device is idle before each."""
    runs = []
    gc.collect()
    with torch.inference_mode():
        for _ in range(BATCHES + 1):
            Clock(device).synchronize()
            start = time.perf_counter()
            model(hidden_states)
            runs.append((time.perf_counter() - start) / UNITS * 1e6)
    return Spread.of(runs[1:])
