"""Fuzzes the decoder of packed bytes, with atheris: `make fuzz`.

    python -m tests.fuzz_packing [--seconds 600] [FILE ...]

The fuzzer makes chunks and images out of good ones. Chunks and what they are unpacked into stand in
memory that is exactly theirs, between pages that end the process when they are touched. For each
chunk `tests/plain_packing.py` says whether it is spoilt, and what is in it; the decoder must say
the same. The fuzzer sees which lines of that file an input reaches, and which numbers it compares:
so it finds its way past the checks. Of a chunk whose checksums alone are wrong, another one with
right checksums is tried too, so that the fuzzer is not held up there.

FILE: inputs that failed before; they alone are run.
"""

from __future__ import annotations

import argparse
import struct
import sys
import tempfile
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["tests.plain_packing"]):
    from tests import plain_packing

from tests.guarded import Guarded
from tests.packed_images import gaussian, packed_bytes, plain_image, raw, stored
from wanoffload._C import PackedImage, TransferError, fingerprint, unpack_chunk

MOST_INPUT = 40_000
MOST_PLAIN = 256 * 255
ARTIFACTS = Path("build/fuzz")

CHUNK = Guarded(MOST_INPUT)
PLAIN = Guarded(MOST_PLAIN)


def check_chunk(chunk: bytes, plain_bytes: int, at_end: bool, right: list[bytes] | None) -> None:
    """`right`: what the runs cover, one after the other; None: the chunk is spoilt."""
    at = CHUNK.put(chunk, at_end)
    image = PLAIN.put(b"\xa5" * plain_bytes, at_end)
    assert unpack_chunk(at, len(chunk), image, plain_bytes) == (right is not None)
    if right is not None:
        begin = struct.unpack_from("<Q", chunk, 24)[0]
        wanted = b"\xa5" * begin + b"".join(right)
        assert PLAIN.get(image, plain_bytes) == wanted.ljust(plain_bytes, b"\xa5")


def fuzz_chunk(chunk: bytes, plain_bytes: int) -> None:
    found = plain_packing.unpack_chunk(chunk, plain_bytes)
    parts = [part for _, part in found or []]
    sums = [plain_packing.fingerprint_part(part, run.plain_offset) for run, part in found or []]
    right = bool(parts) and sums == [run.checksum for run, _ in found or []]
    for at_end in (True, False):
        check_chunk(chunk, plain_bytes, at_end, parts if right else None)
    if parts and not right:
        signed = bytearray(chunk)
        for r, checksum in enumerate(sums):
            struct.pack_into("<Q", signed, 16 + 48 * r + 32, checksum)
        check_chunk(bytes(signed), plain_bytes, True, parts)


def fuzz_image(packed: bytes) -> None:
    """Whatever the head says: it is refused, or what comes out has the head's fingerprint."""
    try:
        image = PackedImage(stored(torch.frombuffer(bytearray(packed), dtype=torch.uint8)))
        if image.plain_bytes > MOST_PLAIN:
            return
        for at_end in (True, False):
            address = PLAIN.put(bytes(image.plain_bytes), at_end)
            image.unpack(0, image.plain_bytes, address, 1)
            assert fingerprint(address, image.plain_bytes, 1) == image.plain_fingerprint
    except TransferError:
        return


def test_one_input(data: bytes) -> None:
    """The first byte: 0 for an image; else a chunk, of a plain image of 256 times as many bytes."""
    if len(data) < 2:
        return
    if data[0] == 0:
        fuzz_image(data[1:])
    else:
        fuzz_chunk(data[1:], 256 * data[0])


def seeds() -> list[bytes]:
    """Good images and chunks, small, with all that a table can hold."""
    torch.manual_seed(1)
    patterns = torch.arange(0, 2**16, 64).to(torch.int16)
    good = []
    for tensors in [
        [torch.randn(64)],
        [gaussian(1024)],
        [gaussian(2500), torch.randn(300), gaussian(1024)],
        [torch.cat([patterns, torch.zeros(4096, dtype=torch.int16)])],
        [torch.randn(64)] * 66,
        [gaussian(12_000), gaussian(1), torch.empty(0)],
    ]:
        plain = plain_image(tensors)
        packed = raw(packed_bytes(plain))
        good.append(b"\0" + packed)
        for chunk in plain_packing.read_tables(packed).chunks:
            content = packed[chunk.offset : chunk.offset + chunk.nbytes]
            good.append(bytes([plain.image.numel() // 256]) + content)
            good.append(b"\xff" + content)  # more room than the chunk fills
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("files", nargs="*")
    options = parser.parse_args()
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    flags = [f"-max_len={MOST_INPUT}", f"-artifact_prefix={ARTIFACTS}/", "-print_final_stats=1"]
    with tempfile.TemporaryDirectory() as corpus:
        for i, seed in enumerate(seeds()):
            (Path(corpus) / f"seed-{i}").write_bytes(seed)
        inputs = options.files or [corpus, f"-max_total_time={options.seconds}"]
        atheris.Setup([sys.argv[0], *flags, *inputs], test_one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
