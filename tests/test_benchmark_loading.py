"""The benchmark case ``loading`` on a toy model: files, processes, rows; never times."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import WanTransformer3DModel

from benchmarks import __main__ as command
from benchmarks import contenders, loading, machine, models
from benchmarks.harness import ResultStore, Row, peer_fingerprint
from benchmarks.loading import cgroup, checkpoint, page_cache, reading, tiers
from benchmarks.loading.claims import AT_LEAST, AT_MOST, Claim
from benchmarks.loading.remote import Remote, WorkerError
from benchmarks.loading.worker import Worker

pytestmark = pytest.mark.timeout(600)  # many processes, each of which imports everything

CPU = torch.device("cpu")
TINY = models.MODELS["tiny"]
SHARD_BYTES = 100_000


def ensure(folder: Path) -> checkpoint.Checkpoint:
    return checkpoint.ensure(TINY, folder, CPU, SHARD_BYTES)


def bench(results: Path, *arguments: str) -> int:
    where = ("--results", str(results), "--checkpoint", str(results.parent / "checkpoint"))
    small = ("--tiny", "--device", "cpu", "--repeats", "1", "--shard-bytes", str(SHARD_BYTES))
    return command.main(["loading", *arguments, *where, *small])


def skip_without_disk(folder: Path) -> None:
    """Skips where files stand in memory for good, so that the page cache can't forget them."""
    device = folder.stat().st_dev
    number = f" {os.major(device)}:{os.minor(device)} "
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    if any(number in mount and " - tmpfs " in mount for mount in mounts):
        pytest.skip(f"{folder} is on a tmpfs")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of all parts, measured once."""
    path = tmp_path_factory.mktemp("loading") / "results.jsonl"
    skip_without_disk(path.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        assert bench(path) == 0
    return path


def rows(results: Path, part: str) -> list[Row]:
    """The measured rows of a part."""
    found = [row for row in ResultStore(results).rows("loading") if row.key["part"] == part]
    return [row for row in found if not row.values.get("complete")]


def bounds(row: Row) -> list[tuple[str, float | None]]:
    claims = [Claim(**claim) for claim in row.values["claims"]]
    assert all(claim.value > 0 and claim.against > 0 for claim in claims)
    return [(claim.sense, claim.bound) for claim in claims]


# A run.


def test_every_part_has_verified_rows(results: Path) -> None:
    store = ResultStore(results)
    assert all(row.verified for row in store.rows("loading"))
    complete = [row.key["part"] for row in store.rows("loading") if row.values.get("complete")]
    assert complete == list(loading.PARTS)


def test_bounds_are_those_that_were_asked(results: Path) -> None:
    (warm,), (cold,), (share,) = (rows(results, part) for part in ("warm", "cold", "share"))
    assert bounds(warm) == [(AT_MOST, 1.3), (AT_MOST, 1.03), (AT_MOST, 1.03)]
    assert bounds(cold) == [("at least", 0.95)]
    assert bounds(share) == [(AT_MOST, 1.05), (AT_MOST, None)]
    assert bounds(rows(results, "cgroup")[0]) == [(AT_MOST, 1.0)]
    assert rows(results, "first-step")[0].values["claims"] == []  # no peer without a GPU


def test_each_tier_has_a_row_for_each_of_its_sizes(results: Path) -> None:
    found = {(r.key["tier"], r.key["source"], r.key["size"]): r for r in rows(results, "tiers")}
    one, nine = map(str, TINY.sizes)
    assert list(found) == [
        ("pinned", "memory", one),
        ("pageable", "memory", one),
        ("pageable", "memory", nine),
        ("disk", "page cache", one),
        ("disk", "page cache", nine),
        ("disk", "disk", one),
    ]
    blocks = models.model_bytes(TINY).blocks
    assert found["pinned", "memory", one].values["locked_bytes"] >= blocks
    disk = found["disk", "disk", one].values
    assert disk["locked_bytes"] == disk["ring_bytes"] > 0
    assert bounds(found["pageable", "memory", one])[1] == (AT_LEAST, 0.7)
    assert bounds(found["disk", "disk", one])[1] == (AT_MOST, 1.0)


def test_four_processes_stream_at_once_from_one_arena(results: Path) -> None:
    (row,) = rows(results, "share")
    assert len(row.values["gbps_together"]) == len(row.values["load_s"]) == 4
    assert min(row.values["gbps_together"]) > 0


def test_resident_outputs_are_measured_once_for_all_parts(results: Path) -> None:
    found = rows(results, "resident")
    assert [row.key["size"] for row in found] == [str(size) for size in TINY.sizes]


def test_the_table_has_a_line_for_each_claim(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["table", "--results", str(results), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    claims = [c for row in ResultStore(results).rows() for c in row.values.get("claims", ())]
    table = printed.split("**Loading, asked and measured**")[1].split("**")[0]
    assert len([line for line in printed.splitlines() if "| tiny | " in line]) > len(claims)
    assert "at least 0.95, " in printed
    assert "| tiny | disk | page cache | 32x48x9 |" in printed
    assert "first-step, first step: " in printed
    assert table.startswith("\n")


def test_parts_that_are_there_are_not_measured_again(results: Path) -> None:
    before = results.read_text()
    assert bench(results, "--parts", "cold,first-step") == 0
    assert results.read_text() == before


def test_other_outputs_than_the_resident_models_are_not_verified(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    store = ResultStore(results)
    for size in TINY.sizes:
        key = {"model": "tiny", "part": "resident", "size": str(size)}
        values = {"verified": True, "claims": [], "forward_ms": {"median": 1.0}, "digest": "other"}
        store.add(Row("loading", key, peer_fingerprint(), values, machine.describe(CPU), "now"))
    assert bench(results, "--parts", "cold") == 1
    (row,) = rows(results, "cold")
    assert not row.verified


def test_a_part_or_tier_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench(tmp_path / "results.jsonl", "--parts", "lukewarm")
    assert "lukewarm: no such part" in capsys.readouterr().err
    assert bench(tmp_path / "results.jsonl", "--parts", "tiers", "--tiers", "tape") == 1
    assert "no tier is called tape; there are " in capsys.readouterr().err


def test_blocks_that_were_not_fetched_are_noticed_though_outputs_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ensure(tmp_path)
    worker = Worker("wanoffload-p1", TINY, CPU)
    worker.load(made.folder, made.subfolder)
    right = worker.forwards(TINY.sizes[0], count=2)
    counted = worker._models[made.subfolder]
    dead = contenders.Wanoffload(1).counters(counted)
    monkeypatch.setattr(contenders.Wanoffload, "counters", lambda *_: dead)
    wrong = worker.forwards(TINY.sizes[0], count=2)
    assert right["digest"] == wrong["digest"]
    assert (right["fetches_right"], wrong["fetches_right"]) == (True, False)


def test_forwards_end_within_their_budget_but_one_is_measured(tmp_path: Path) -> None:
    made = ensure(tmp_path)
    worker = Worker("wanoffload-p1", TINY, CPU)
    worker.load(made.folder, made.subfolder)
    size = TINY.sizes[0]
    assert len(worker.forwards(size, count=3, warm=1, budget_s=0.0)["forward_ms"]) == 1
    assert len(worker.forwards(size, count=3, warm=1)["forward_ms"]) == 3


# The checkpoint.


def test_the_checkpoint_is_the_harness_own_model_in_shards(tmp_path: Path) -> None:
    made = ensure(tmp_path)
    assert len(made.files) > 2
    model = WanTransformer3DModel.from_pretrained(
        tmp_path, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    expected = models.build(TINY, CPU).state_dict()
    found = model.state_dict()
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in expected.items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert found["blocks.0.scale_shift_table"].dtype == torch.float32


def test_a_whole_checkpoint_is_kept_and_a_cut_off_one_made_again(tmp_path: Path) -> None:
    files = ensure(tmp_path).files
    before = [file.stat().st_mtime_ns for file in files]
    assert [file.stat().st_mtime_ns for file in ensure(tmp_path).files] == before
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-1])
    ensure(tmp_path)
    assert files[1].read_bytes() == whole
    index = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.unlink()
    ensure(tmp_path)
    assert json.loads(index.read_text())["metadata"]["total_size"] == models.model_bytes(TINY).all


def test_the_second_expert_takes_no_disk(tmp_path: Path) -> None:
    made = ensure(tmp_path)
    for _ in range(2):
        second = checkpoint.second_expert(made)
    assert [f.stat().st_ino for f in second.files] == [f.stat().st_ino for f in made.files]
    assert (tmp_path / "transformer_2" / "config.json").exists()


# Files and the page cache.


def test_the_page_cache_forgets_files_and_reads_them_in(tmp_path: Path) -> None:
    skip_without_disk(tmp_path)
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(bytes(1 << 20))
    page_cache.drop(files)
    assert page_cache.cached_bytes(files) == 0
    page_cache.warm(files)
    assert page_cache.cached_bytes(files) == 2 << 20
    page_cache.drop(files[:1])
    assert page_cache.cached_bytes(files) == 1 << 20


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_each_piece_is_read_once_to_its_place(tmp_path: Path, threads: int, direct: bool) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 16 * 5 + b"end")  # five pages and three bytes
    pieces = reading.pieces_of([file], 8192, whole_pages=direct)
    assert [piece.nbytes for piece in pieces] == [8192, 8192, 4096 if direct else 4099]
    places = reading.own_buffers(len(pieces), 8192)
    seen: list[reading.Piece] = []

    def place(_: int, piece: reading.Piece) -> memoryview:
        seen.append(piece)
        return places(pieces.index(piece), piece)

    try:
        with reading.Reader(direct=direct) as reader:
            assert reader.gb_per_s(pieces, threads, place) > 0
    except OSError as error:
        pytest.skip(f"no O_DIRECT here: {error}")
    assert sorted(piece.offset for piece in seen) == [piece.offset for piece in pieces]
    found = b"".join(bytes(places(n, p)[: p.nbytes]) for n, p in enumerate(pieces))
    assert found == file.read_bytes()[: -3 if direct else None]


# Processes.


def test_a_workers_error_and_its_end_are_told(tmp_path: Path) -> None:
    with Remote("wanoffload-p1", "tiny", CPU) as worker:
        with pytest.raises(WorkerError, match="neither a folder"):
            worker.ask("load", folder=tmp_path / "nothing", subfolder="transformer")
        assert worker.ask("memory")["anon"] > 0
        worker._process.send_signal(signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"ended with -9 \(killed, perhaps for memory\)"):
            worker.ask("memory")


def in_group(launcher: Sequence[str], code: str) -> subprocess.CompletedProcess[str]:
    program = [*launcher, sys.executable, "-c", code]
    return subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)


def test_a_process_under_the_limit_cannot_take_more() -> None:
    with cgroup.memory_limit(64 << 20) as limit:
        if not limit.launcher:
            pytest.skip(limit.how)
        tell = "from benchmarks.loading import cgroup; print(cgroup.own_group()['limit'])"
        little = in_group(limit.launcher, "print(len(bytearray(8 << 20)))")
        much = in_group(limit.launcher, "print(len(bytearray(256 << 20)))")
        group = Path(limit.launcher[3]).parent
        assert (little.stdout, little.returncode) == ("8388608\n", 0)
        assert much.returncode != 0
    assert not group.exists()
    with cgroup.memory_limit(4 << 30) as limit:
        assert in_group(limit.launcher, tell).stdout == f"{4 << 30}\n"


# Claims.


@pytest.mark.parametrize(
    ("value", "sense", "kept"),
    [
        (1.3, AT_MOST, True),
        (1.31, AT_MOST, False),
        (1.3, AT_LEAST, True),
        (1.2, AT_LEAST, False),
    ],
)
def test_a_claim_says_whether_its_bound_was_kept(value: float, sense: str, kept: bool) -> None:
    claim = Claim("load", 2 * value, 2.0, "floor", "s", 1.3, sense)
    assert claim.kept is kept
    assert claim.asked == f"{sense} 1.3, {'kept' if kept else '**missed**'}"
    assert Claim(**claim.as_json()) == claim


def claims_of(forward_ms: float, resident_ms: float, bytes_ms: float) -> list[Claim]:
    values: dict[str, Any] = {
        "forward_ms": {"median": forward_ms},
        "resident_ms": resident_ms,
        "bytes_ms": bytes_ms,
        "source_gbps": 2.0,
    }
    tier = tiers.TIERS["disk-cached"]
    return tiers._claims(tier, False, values, tiers.Rates(link=50.0))


def test_a_tier_is_held_to_its_source_or_to_compute_whichever_is_slower() -> None:
    (bound_by_source,) = claims_of(104.0, 50.0, 100.0)
    assert (bound_by_source.ratio, bound_by_source.bound) == (1.04, 1.05)
    (hidden,) = claims_of(104.0, 100.0, 50.0)
    assert (hidden.ratio, hidden.bound, hidden.kept) == (1.04, 1.01, False)


def test_the_rate_that_bounds_a_tier_is_the_slower_of_source_and_link() -> None:
    rates = tiers.Rates(link=50.0, page_cache=40.0, disk=2.0)
    assert [rates.of(tier) for tier in tiers.TIERS.values()] == [50.0, 50.0, 40.0, 2.0]
