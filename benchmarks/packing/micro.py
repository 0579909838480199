"""The part ``micro``: one block, packed and unpacked, on the device and on the CPU.

Its weights are drawn from normal distributions, each row with a scale of its own between 0.001 and
1, so that the ratio is that of weights whose rows differ as much as they like.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.engine import Found, is_small
from benchmarks.harness import Spread
from benchmarks.loading.claims import AT_LEAST, Claim
from benchmarks.models import SEED, Staging, blocks, describe_only
from benchmarks.packing.bench import PackingBench, as_json
from wanoffload import image
from wanoffload.image import ImageLayout
from wanoffload.packing import tensors_of

if TYPE_CHECKING:
    from wanoffload import _C

REPEATS = 5
DECODE_GBPS = 2000
RATIO = 0.705
ENCODE_GBPS_A_CORE = 1.5


def micro(bench: PackingBench) -> Found:
    """A block's ratio, and the rates of both encoders and both decoders."""
    block = Block(bench.spec.name, bench.device, describe_only(bench.spec))
    yield from _on_the_host(block)
    if bench.device.type == "cuda":
        yield from _on_the_device(block, bench)


class Block:
    """One block's plain image, on the device and on the host, and its packed image on the host."""

    def __init__(self, model: str, device: torch.device, described: torch.nn.Module) -> None:
        from wanoffload import _C

        self.device = device
        named = list(blocks(described)[0].named_parameters())
        self.layout: ImageLayout = image.lay_out(named)
        self.tensors = tensors_of(self.layout)
        self.plain = torch.zeros(self.layout.nbytes, dtype=torch.uint8, device=device)
        generator = torch.Generator(device).manual_seed(SEED)
        for spec in self.layout.specs:
            view = image.device_view(spec, self.plain, 0)
            view.normal_(generator=generator)
            if view.ndim >= 2:
                exponent = torch.rand(len(view), 1, device=device, generator=generator)
                view.mul_(10 ** (-3 * exponent.view(-1, *[1] * (view.ndim - 1))))
        self.on_host = Staging(device, self.plain.nbytes).to_host(self.plain)
        self.packer = _C.Packer(self.on_host.data_ptr(), self.plain.nbytes, self.tensors)
        self.packed = _C.HostStore(_C.HostBackend()).allocate(self.packer.packed_bytes)
        self.packer.write(self.packed.address)

    @property
    def bf16_bytes(self) -> int:
        """Bytes that are packed."""
        return sum(nbytes for _, nbytes, bf16 in self.tensors if bf16)


def _on_the_host(block: Block) -> Found:
    """The ratio, and the CPU's encoder and decoder: all cores, and one."""
    from wanoffload import _C

    yield (
        {"what": "ratio"},
        {
            "verified": True,
            "plain_bytes": block.plain.nbytes,
            "packed_bytes": block.packed.nbytes,
            "claims": as_json(
                [
                    Claim(
                        "a block",
                        block.packed.nbytes / 1e6,
                        block.plain.nbytes / 1e6,
                        "plain",
                        "MB",
                        RATIO,
                    )
                ]
            ),
        },
    )
    encoded = {threads: _encode(block, threads) for threads in (1, os.cpu_count() or 1)}
    one, every = (
        (Spread.of(rates) for rates in encoded.values())
        if len(encoded) > 1
        else (
            Spread.of(encoded[1]),
            Spread.of(encoded[1]),
        )
    )
    yield (
        {"what": "encode, CPU"},
        {
            "verified": True,
            "one_core_gbps": one.as_json(),
            "all_cores_gbps": every.as_json(),
            "cores": os.cpu_count(),
            "claims": as_json(
                [Claim("a core", one.median, ENCODE_GBPS_A_CORE, "asked", "GB/s", 1.0, AT_LEAST)]
            ),
        },
    )
    out = torch.empty_like(block.on_host)
    unpacked = _C.PackedImage(block.packed)
    rates = _rates(
        block.plain.nbytes, lambda: unpacked.unpack(0, out.nbytes, out.data_ptr()), REPEATS
    )
    yield (
        {"what": "decode, CPU"},
        {
            "verified": torch.equal(out, block.on_host),
            "all_cores_gbps": Spread.of(rates).as_json(),
            "claims": [],
        },
    )


def _encode(block: Block, threads: int) -> list[float]:
    from wanoffload import _C

    again = _C.HostStore(_C.HostBackend()).allocate(block.packed.nbytes)
    again.touch()

    def encode() -> None:
        packer = _C.Packer(block.on_host.data_ptr(), block.plain.nbytes, block.tensors, threads)
        packer.write(again.address)

    rates = _rates(block.plain.nbytes, encode, 2)
    if not torch.equal(_bytes_of(again), _bytes_of(block.packed)):
        raise RuntimeError(f"{threads} threads pack into other bytes")
    return rates


def _rates(nbytes: int, work: Callable[[], object], repeats: int) -> list[float]:
    """GB/s of plain bytes, by the wall clock."""
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        rates.append(nbytes / (time.perf_counter() - start) / 1e9)
    return rates


def _bytes_of(memory: _C.HostImage) -> Tensor:
    return torch.frombuffer(memoryview(memory), dtype=torch.uint8)


# On the device.


def _on_the_device(block: Block, bench: PackingBench) -> Found:
    """The kernels: chunk by chunk, as the engine launches them, in a graph."""
    yield {"what": "encode, device"}, _device_encode(block)
    yield {"what": "decode, device"}, _device_decode(block, small=is_small(bench.session))


def _device_encode(block: Block) -> dict[str, Any]:
    from wanoffload import _C
    from wanoffload.kernels.pack import tile_escapes, write_sections

    def encode() -> tuple[Tensor, Tensor, _C.PackingPlan]:
        tiles = tile_escapes(block.plain, block.tensors)
        escapes = memoryview(tiles.escapes.cpu().numpy())  # type: ignore[arg-type]
        plan = _C.PackingPlan(block.plain.nbytes, block.tensors, escapes)
        packed = torch.zeros(plan.packed_bytes, dtype=torch.uint8, device=block.device)
        return packed, write_sections(block.plain, tiles, plan.runs, packed), plan

    packed, sums, plan = encode()  # compiles
    torch.cuda.synchronize()
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        encode()
        torch.cuda.synchronize()
        rates.append(block.plain.nbytes / (time.perf_counter() - start) / 1e9)
    on_host = _C.HostStore(_C.HostBackend()).allocate(plan.packed_bytes)
    _bytes_of(on_host).copy_(packed)
    plan.write_heads(on_host.address, [number % (1 << 64) for number in sums.tolist()])
    return {
        "verified": torch.equal(_bytes_of(on_host), _bytes_of(block.packed)),
        "gbps": Spread.of(rates).as_json(),
        "claims": [],
    }


def _device_decode(block: Block, small: bool) -> dict[str, Any]:
    """Rates in GB/s of output, beside that of a copy of as many bytes within the device."""
    from wanoffload.kernels.unpack import unpack_chunk

    chunks = _chunks(block)
    out = torch.zeros_like(block.plain)

    def decode() -> None:
        for chunk, count in chunks:
            unpack_chunk(chunk, out, count)

    decode()  # compiles
    torch.cuda.synchronize()
    equal = torch.equal(out, block.plain)
    rate = _graph_rate(decode, block.plain.nbytes)
    moved = block.plain.nbytes + block.packed.nbytes
    source = torch.empty(moved // 2, dtype=torch.uint8, device=block.device)
    target = torch.empty_like(source)
    copy = _graph_rate(lambda: target.copy_(source), block.plain.nbytes)
    claims = [
        Claim("decode", rate.median, DECODE_GBPS, "asked", "GB/s of output", 1.0, AT_LEAST),
        Claim("decode", rate.median, copy.median, "a copy of as many bytes", "GB/s of output"),
    ]
    return {
        "verified": equal,
        "gbps": rate.as_json(),
        "copy_gbps": copy.as_json(),
        "chunks": len(chunks),
        "ms": block.plain.nbytes / rate.median / 1e6,
        "claims": as_json([] if small else claims),
    }


def _chunks(block: Block) -> Sequence[tuple[Tensor, int]]:
    """The packed chunks on the device, and the blocks of each, by the head (docs/packing.md)."""
    data = _bytes_of(block.packed)
    count = int(data[12:16].view(torch.int32))
    found = []
    for number in range(count):
        entry = data[40 + 16 * number : 56 + 16 * number].clone()
        offset, (nbytes, blocks_in_it) = (
            int(entry[:8].view(torch.int64)),
            entry[8:].view(torch.int32),
        )
        chunk = data[offset : offset + int(nbytes)].to(block.device)
        found.append((chunk, int(blocks_in_it)))
    return found


def _graph_rate(work: Callable[[], object], nbytes: int) -> Spread:
    """GB/s over replays of a graph: launches from Python would take longer than the kernels."""
    make_graph: Any = torch.cuda.CUDAGraph
    graph = make_graph()
    work()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        work()
    rates = []
    for _ in range(3 + REPEATS):
        make_event: Any = torch.cuda.Event
        start, end = make_event(enable_timing=True), make_event(enable_timing=True)
        start.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        rates.append(10 * nbytes / start.elapsed_time(end) / 1e6)
    return Spread.of(rates[3:])
