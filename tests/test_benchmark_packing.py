"""The benchmark case ``packing`` on a toy model: forms, rows, verdicts; never times."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks import __main__ as command
from benchmarks import contenders, models, packing, predictions
from benchmarks.harness import ResultStore, Row
from benchmarks.loading.claims import AT_LEAST, AT_MOST, Claim
from benchmarks.packing import bench as packing_bench
from benchmarks.packing import fresh, micro, peers, step, wrap
from benchmarks.packing.bench import PACKED, PLAIN, PLANNED
from benchmarks.turns import Turns
from tests import plain_packing
from wanoffload.policy import packed
from wanoffload.policy.cost import STREAM, Placement

pytestmark = pytest.mark.timeout(600)  # processes of their own, which import everything

TINY = models.MODELS["tiny"]


def bench(results: Path, *arguments: str) -> int:
    small = ("--tiny", "--device", "cpu", "--repeats", "2", "--rounds", "2")
    return command.main(["packing", *arguments, "--results", str(results), *small])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of all parts, measured once."""
    path = tmp_path_factory.mktemp("packing") / "results.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        assert bench(path) == 0
    return path


def rows(results: Path, part: str) -> list[Row]:
    """The measured rows of a part."""
    found = [row for row in ResultStore(results).rows("packing") if row.key["part"] == part]
    return [row for row in found if not row.values.get("complete")]


def bounds(row: Row) -> list[tuple[str, str, float]]:
    claims = [Claim(**claim) for claim in row.values["claims"]]
    return [(c.what, c.sense, c.bound) for c in claims if c.bound is not None]


# A run.


def test_every_part_has_verified_rows(results: Path) -> None:
    store = ResultStore(results)
    assert all(row.verified for row in store.rows("packing"))
    complete = [row.key["part"] for row in store.rows("packing") if row.values.get("complete")]
    assert complete == list(packing.PARTS)


def test_parts_that_are_there_are_not_measured_again(results: Path) -> None:
    before = results.read_text()
    assert bench(results, "--parts", "micro,step,peers") == 0
    assert results.read_text() == before


def test_plain_and_packed_blocks_take_turns_with_the_resident_model(results: Path) -> None:
    one, nine = rows(results, "step")
    assert [row.key["size"] for row in (one, nine)] == list(map(str, TINY.sizes))
    assert list(one.values["by_form"]) == ["resident", PLAIN, PACKED]
    assert list(nine.values["by_form"]) == ["resident", PLAIN, PACKED, PLANNED]
    forms = one.values["by_form"]
    blocks = models.model_bytes(TINY)
    assert forms["resident"]["bytes_per_step"] == 0
    assert forms[PLAIN]["bytes_per_step"] >= 2 * blocks.blocks > forms[PACKED]["bytes_per_step"]
    assert forms[PLAIN]["stats"]["packed_units"] == 0
    assert forms[PACKED]["stats"]["packed_units"] == blocks.block_count
    for form in forms.values():
        link_ms = form["bytes_per_step"] / one.values["link_gbps"]["median"] / 1e6
        floor = max(forms["resident"]["step_ms"]["median"], link_ms)
        assert form["floor_ms"] == pytest.approx(floor)
        assert form["equal"]
        assert form["fetches_right"]


def test_wrapping_tells_seconds_and_bytes_of_both_forms(results: Path) -> None:
    (row,) = rows(results, "wrap")
    values = row.values
    assert values["plain_s"]["count"] == values["packed_s"]["count"] == 2
    plain, both = values["plain_held"], values["packed_held"]
    assert both["host_bytes"] == both["locked_bytes"] < plain["host_bytes"] == both["plain_bytes"]
    assert values["first_use_s"] > 0
    assert bounds(row) == [
        ("wrapping, packed", AT_MOST, 1.5),
        ("bytes of the blocks, packed", AT_MOST, 0.705),
    ]


def test_two_experts_hold_twice_what_one_does(results: Path) -> None:
    (row,) = rows(results, "host")
    first, second = row.values["held"]
    assert first["locked_bytes"] == second["locked_bytes"]
    (claim,) = (Claim(**claim) for claim in row.values["claims"])
    assert claim.value == pytest.approx(2 * first["locked_bytes"] / 1e9)


def test_a_block_has_a_ratio_and_rates_of_the_cpu(results: Path) -> None:
    found = {row.key["what"]: row for row in rows(results, "micro")}
    assert list(found) == ["ratio", "encode, CPU", "decode, CPU"]
    assert bounds(found["ratio"]) == [("a block", AT_MOST, 0.705)]
    assert bounds(found["encode, CPU"]) == [("a core", AT_LEAST, 1.0)]
    assert found["ratio"].values["packed_bytes"] < found["ratio"].values["plain_bytes"]


def test_fresh_processes_give_the_same_output_plain_and_packed(results: Path) -> None:
    *sizes, wrapping = rows(results, "memory")
    assert [row.key["size"] for row in sizes] == list(map(str, TINY.sizes))
    for row in sizes:
        assert row.values[PLAIN]["output_sha256"] == row.values[PACKED]["output_sha256"]
    assert wrapping.values[PACKED]["locked_bytes"] < wrapping.values[PLAIN]["locked_bytes"]


def test_the_table_has_a_line_for_each_claim_and_form_and_names_what_was_only_read(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["table", "--results", str(results), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    asked, steps, read = (
        printed.split(f"**{title}**")[1].split("\n\n**")[0]
        for title in (
            "Packing, asked and measured",
            "Steps, plain and packed",
            "Published by others, not measured here",
        )
    )
    claims = [c for row in ResultStore(results).rows() for c in row.values.get("claims", ())]
    assert asked.count("\n| tiny |") == len(claims)
    assert steps.count("\n| tiny |") == 7
    assert "| packed | 6 of 6 |" in steps
    assert "| planned | 0 of 6 |" in steps  # nothing packs itself without CUDA
    assert read.count("DFloat11 | ") == len(peers.PUBLISHED)
    for cell in ("38.85", "44 min, peak 22.49 GB", "260 s, peak 16.68 GB"):
        assert cell in read


# What must not pass.


def test_a_packed_model_with_other_bits_is_not_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = contenders.Wanoffload.apply

    def spoil(self: contenders.Wanoffload, model: Any, device: Any) -> None:
        if self.pack:
            model.get_parameter("blocks.0.ffn.net.2.weight").data[0] += 1
        apply(self, model, device)

    monkeypatch.setattr(contenders.Wanoffload, "apply", spoil)
    path = tmp_path / "results.jsonl"
    assert bench(path, "--parts", "wrap,step,host", "--frames", "1") == 1
    found = ResultStore(path).rows("packing")
    assert not any(row.verified for row in found)
    (steps,) = rows(path, "step")
    equal = {name: form["equal"] for name, form in steps.values["by_form"].items()}
    assert equal == {"resident": True, PLAIN: True, PACKED: False, PLANNED: True}


def test_right_bits_without_fetches_are_not_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = contenders.Wanoffload.counters

    def dead(self: contenders.Wanoffload, model: torch.nn.Module) -> contenders.Counters:
        return dataclasses.replace(counters(self, model), acquires=0, bytes_fetched=0)

    monkeypatch.setattr(contenders.Wanoffload, "counters", dead)
    path = tmp_path / "results.jsonl"
    assert bench(path, "--parts", "wrap,step", "--frames", "1") == 1
    assert not any(row.verified for row in ResultStore(path).rows("packing"))


def test_a_part_that_fails_does_not_keep_the_others_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> Any:
        raise MemoryError("no memory")

    monkeypatch.setitem(packing.PARTS, "micro", fail)
    path = tmp_path / "results.jsonl"
    assert bench(path, "--parts", "micro,peers") == 1
    assert {row.key["part"] for row in ResultStore(path).rows("packing")} == {"peers"}


def test_models_that_were_set_up_are_closed_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up: list[str] = []
    set_up, tear_down = packing_bench.set_up, packing_bench.tear_down

    def note_up(contender: Any, *args: Any) -> Any:
        up.append(contender.name)
        return set_up(contender, *args)

    def note_down(live: Any) -> None:
        up.remove(live.contender.name)
        tear_down(live)

    monkeypatch.setattr(packing_bench, "set_up", note_up)
    monkeypatch.setattr(packing_bench, "tear_down", note_down)
    assert bench(tmp_path / "results.jsonl", "--parts", "wrap,step,host") == 0
    assert up == []


# What was asked, and what it is compared with.


def test_bounds_of_steps_are_those_that_were_asked() -> None:
    assert step.BESIDE_PLAIN == {1: 0.73}
    assert step.BESIDE_RESIDENT == {17: 1.025, 81: 1.005}
    assert (wrap.RATIO, wrap.SETUP, wrap.TWO_EXPERTS_GB) == (0.705, 1.5, 40.5)
    assert (micro.DECODE_GBPS, micro.ENCODE_GBPS_A_CORE) == (2000, 1.5)
    assert fresh.BEYOND_PLAIN_MB == 160


@pytest.mark.parametrize(("frames", "asked"), [(1, {"packed": 0.73}), (17, {}), (81, {})])
def test_a_bound_belongs_to_the_size_it_was_asked_of(frames: int, asked: dict[str, float]) -> None:
    size = models.Size(480, 832, frames)
    form = {"step_ms": {"median": 1.0}, "x_resident": 1.0, "floor_ms": 1.0}
    found = dict.fromkeys(("resident", PLAIN, PACKED, PLANNED), form)
    turn = Turns(1, True)
    turn.add_turn([1.0])
    claims = step._claims(size, found, dict.fromkeys(found, turn))
    of_plain = {c.what: c.bound for c in claims if c.against_is == "plain streamed" and c.bound}
    of_resident = {c.what: c.bound for c in claims if c.against_is == "resident" and c.bound}
    assert of_plain == asked
    bound = step.BESIDE_RESIDENT.get(frames)
    assert of_resident == ({PACKED: bound, PLANNED: bound} if bound else {})


def test_device_memory_is_judged_against_what_was_asked_and_the_three_chunks() -> None:
    made: Any = type("Bench", (), {})()
    made.device = torch.device("cuda")
    made.bytes = models.model_bytes(models.MODELS["14b"])
    plain = {"allocated_peak": 10**9, "reserved_peak": 2 * 10**9}
    both = {"allocated_peak": 10**9 + 95 * 10**6, "reserved_peak": 2 * 10**9 + 161 * 10**6}
    claims = fresh._device_claims(made, plain, both)
    kept = {c.what.rpartition(" ")[2]: c.kept for c in claims if c.bound}
    assert kept == {"use": True, "reserved": False}
    chunks = packed.staging_bytes(predictions.facts_of(models.MODELS["14b"]).dits[0], 1.0)
    assert {round(c.against, 3) for c in claims if not c.bound} == {round(chunks / 1e6, 3)}


def test_chunks_of_a_packed_block_are_those_of_its_head() -> None:
    block = micro.Block("tiny", torch.device("cpu"), models.describe_only(TINY))
    packed_bytes = bytes(micro._bytes_of(block.packed).numpy())
    chunks = plain_packing.read_tables(packed_bytes).chunks
    expected = [(packed_bytes[c.offset :][: c.nbytes], c.blocks) for c in chunks]
    assert [(bytes(c.numpy()), count) for c, count in micro._chunks(block)] == expected


def test_contenders_are_named_by_form_tier_and_unit() -> None:
    for name, pack, host, unit, prefetch in (
        ("wanoffload-p2", False, "pinned", "block", 2),
        ("wanoffload-packed-p2", True, "pinned", "block", 2),
        ("wanoffload-packed-pageable-p1", True, "pageable", "block", 1),
        ("wanoffload-disk-p3", False, "disk", "block", 3),
        ("wanoffload-parts", False, "pinned", "part", None),
        ("wanoffload-packed-parts", True, "pinned", "part", None),
        ("wanoffload-pageable-parts-p3", False, "pageable", "part", 3),
    ):
        made = contenders.by_name(name)
        assert isinstance(made, contenders.Wanoffload)
        assert made == contenders.Wanoffload(prefetch, host, pack, unit)
        assert made.name == name


@pytest.mark.parametrize("name", ["wanoffload", "wanoffload-packed", "wanoffload-parts-p"])
def test_names_that_say_too_little_are_no_contenders(name: str) -> None:
    with pytest.raises(ValueError, match="no contender is called"):
        contenders.by_name(name)


def test_plans_are_called_by_their_form_and_back() -> None:
    for name in predictions.PLANS:
        assert predictions.plan_name(predictions.placement_of(name)) == name
    assert predictions.plan_name(Placement(STREAM, 1, 0.175)) == "streamed-p1-packed-17.5%"
