"""Packed images, read and written slowly and plainly, from docs/packing.md alone.

Another opinion than csrc/'s on what the format is, and on when a chunk is spoilt: nothing here is
shared with it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TILE = 1024
SIGN_ORDER = [0, 2, 1, 3, 4, 6, 5, 7]
"""The place in a weight's group of eight whose byte stands at each place."""

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint16]


def align(nbytes: int, to: int) -> int:
    return -(-nbytes // to) * to


@dataclass(frozen=True)
class Run:
    codec: int
    first_block: int
    plain_offset: int
    plain_bytes: int
    sections: int
    escapes: int
    checksum: int


@dataclass(frozen=True)
class Chunk:
    offset: int
    nbytes: int
    blocks: int
    runs: list[Run]


@dataclass(frozen=True)
class Packed:
    """The tables of a packed image."""

    plain_bytes: int
    fingerprint: int
    chunks: list[Chunk]


def read_tables(packed: bytes) -> Packed:
    magic, version, count, plain, nbytes, fingerprint = struct.unpack_from("<8sIIQQQ", packed)
    assert magic == b"WOPACKED"
    assert version == 1
    assert nbytes == len(packed)
    chunks = []
    end = align(40 + 16 * count, 256)
    assert not any(packed[40 + 16 * count : end])
    for c in range(count):
        offset, chunk_bytes, blocks = struct.unpack_from("<QII", packed, 40 + 16 * c)
        assert offset == end
        end = offset + chunk_bytes
        runs = _read_runs(packed[offset:end])
        assert blocks == sum(align(run.plain_bytes, 16384) // 16384 for run in runs)
        chunks.append(Chunk(offset, chunk_bytes, blocks, runs))
    assert end == len(packed)
    return Packed(plain, fingerprint, chunks)


def _read_runs(chunk: bytes) -> list[Run]:
    count, _, nbytes, zero = struct.unpack_from("<IIII", chunk)
    assert (nbytes, zero) == (len(chunk), 0)
    assert nbytes % 256 == 0
    runs = []
    for r in range(count):
        codec, first, at, plain, sections, escapes, zero, checksum, zeros = struct.unpack_from(
            "<IIQIIIIQQ", chunk, 16 + 48 * r
        )
        assert zero == zeros == 0
        runs.append(Run(codec, first, at, plain, sections, escapes, checksum))
    return runs


def unpack(packed: bytes) -> bytes:
    """The plain image. Its runs must cover it in order."""
    tables = read_tables(packed)
    plain = bytearray()
    for chunk in tables.chunks:
        for run in chunk.runs:
            assert run.plain_offset == len(plain)
            sections = packed[chunk.offset + run.sections : chunk.offset + chunk.nbytes]
            part = _unpack_run(run, sections)
            assert part is not None
            plain += part
    assert len(plain) == tables.plain_bytes
    return bytes(plain)


def _unpack_run(run: Run, sections: bytes) -> bytes | None:
    """What the run covers, or None if its sections contradict themselves."""
    if run.codec == 0:
        return sections[: run.plain_bytes]
    tiles = run.plain_bytes // (2 * TILE)
    table = struct.unpack_from(f"<{tiles + 1}I", sections)
    signs = align(4 * (tiles + 1), 16)
    codes = signs + 1024 * tiles
    raw = sections[codes + 384 * tiles :][: run.escapes]
    parts = []
    for t in range(tiles):
        first, end = table[t] & 0xFFFFFF, table[t + 1] & 0xFFFFFF
        if not first <= end <= run.escapes:
            return None
        tile = unpack_tile(
            sections[signs + 1024 * t :][:1024],
            sections[codes + 384 * t :][:384],
            table[t] >> 24,
            raw[first:end],
        )
        if tile is None:
            return None
        parts.append(tile)
    return b"".join(parts)


def _section_bytes(codec: int, plain_bytes: int, escapes: int) -> int:
    if codec == 0:
        return align(plain_bytes, 16)
    tiles = plain_bytes // (2 * TILE)
    return align(4 * (tiles + 1), 16) + 1408 * tiles + align(escapes, 16)


def checked_runs(chunk: bytes, image_bytes: int) -> list[Run] | None:
    """The runs of a chunk of a plain image of so many bytes, or None if its table is spoilt."""
    if len(chunk) < 16:
        return None
    count, blocks, nbytes, zero = struct.unpack_from("<IIII", chunk)
    table = 16 + 48 * count
    if not 1 <= count <= 64 or nbytes != len(chunk) or zero != 0 or table > len(chunk):
        return None
    runs = []
    first = 0
    for r in range(count):
        fields = struct.unpack_from("<IIQIIIIQQ", chunk, 16 + 48 * r)
        run = Run(*fields[:6], fields[7])
        if fields[6] != 0 or fields[8] != 0 or run.codec > 1 or run.first_block != first:
            return None
        if not 0 < run.plain_bytes <= 2**22 or run.plain_bytes % (2048 if run.codec else 256):
            return None
        if run.plain_offset % 256 or run.plain_offset + run.plain_bytes > image_bytes:
            return None
        if run.escapes > (run.plain_bytes // 2 if run.codec else 0):
            return None
        size = _section_bytes(run.codec, run.plain_bytes, run.escapes)
        if run.sections % 16 or run.sections < table or run.sections + size > len(chunk):
            return None
        if runs and run.plain_offset != runs[-1].plain_offset + runs[-1].plain_bytes:
            return None
        first += align(run.plain_bytes, 16384) // 16384
        runs.append(run)
    return runs if blocks == first else None


def unpack_chunk(chunk: bytes, image_bytes: int) -> list[tuple[Run, bytes]] | None:
    """Each run with the plain bytes that it covers, or None if the chunk contradicts itself.

    The runs' checksums are not looked at.
    """
    unpacked = []
    for run in checked_runs(chunk, image_bytes) or []:
        plain = _unpack_run(run, chunk[run.sections :])
        if plain is None:
            return None
        unpacked.append((run, plain))
    return unpacked or None


def _group_codes(codes: bytes) -> npt.NDArray[np.uint32]:
    """G(k) of every lane: [k, lane]."""
    words = np.frombuffer(codes, "<u4").reshape(3, 32)
    last = sum(((words[p] >> 3) & 0x11111111) << p for p in range(3))
    return np.stack([*(words & 0x77777777), np.asarray(last, np.uint32)])


def unpack_tile(signs: bytes, codes: bytes, base: int, escapes: bytes) -> bytes | None:
    """The tile's weights, or None if the codes do not ask for just these escapes."""
    groups = _group_codes(codes)
    code = np.stack([groups.T >> (4 * (j // 2) + 16 * (j % 2)) & 7 for j in range(8)], axis=2)
    # By lane, group, place: the order of escapes. Not ==, whose operands the fuzzer never lets go.
    escaped = np.equal(code, 7)
    if int(escaped.sum()) != len(escapes):
        return None
    exponents = (code + base) & 0xFF
    exponents[escaped] = np.frombuffer(escapes, np.uint8)
    byte = np.frombuffer(signs, np.uint8).reshape(4, 32, 8)[:, :, np.argsort(SIGN_ORDER)]
    sign = byte.astype(np.uint16)
    exponent = exponents.transpose(1, 0, 2).astype(np.uint16)
    return (sign >> 7 << 15 | exponent << 7 | sign & 0x7F).astype("<u2").tobytes()


def fingerprint_part(data: bytes, offset: int) -> int:
    """What bytes that stand at `offset` add to the fingerprint of a plain image."""
    words = np.frombuffer(data, "<u4")
    place = np.arange(offset // 4, offset // 4 + len(words), dtype=np.uint32)
    x = words ^ (place * np.uint32(0x9E3779B1))
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return int((x ^ (x >> 16)).sum(dtype=np.uint64))


def best_base(weights: Words) -> tuple[int, int]:
    """The base of a tile, and how many escapes it leaves."""
    counts = np.bincount(weights >> 7 & 0xFF, minlength=256)
    inside = [int(counts[base : base + 7].sum()) for base in range(249)]
    return inside.index(max(inside)), TILE - max(inside)


def pack_tile(weights: Words) -> tuple[int, bytes, bytes, bytes]:
    """Base, signs and mantissas, codes, escapes."""
    base, _ = best_base(weights)
    signs = bytearray(1024)
    groups = [[0] * 32 for _ in range(4)]
    escapes = bytearray()
    for lane in range(32):
        for k in range(4):
            for j in range(8):
                weight = int(weights[256 * k + 8 * lane + j])
                exponent = weight >> 7 & 0xFF
                code = exponent - base if 0 <= exponent - base < 7 else 7
                groups[k][lane] |= code << (4 * (j // 2) + 16 * (j % 2))
                signs[256 * k + 8 * lane + SIGN_ORDER.index(j)] = weight >> 15 << 7 | weight & 0x7F
                if code == 7:
                    escapes.append(exponent)
    words = [
        groups[p][lane] | ((groups[3][lane] >> p) & 0x11111111) << 3
        for p in range(3)
        for lane in range(32)
    ]
    return base, bytes(signs), struct.pack("<96I", *words), bytes(escapes)
