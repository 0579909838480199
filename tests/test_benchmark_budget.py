"""The benchmark case ``budget`` on a toy model: rows, verdicts, the picture; never times."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import wanoffload
from benchmarks import __main__ as command
from benchmarks import budget, contenders, models, step_bench
from benchmarks.budget import bench as budget_bench
from benchmarks.budget import ceiling, experts, parts, peers, picture, predicted, steps, tables
from benchmarks.budget.bench import FORMS, PARTS
from benchmarks.harness import ResultStore, Row, Session, Spread
from benchmarks.loading.claims import AT_MOST, WITHIN, Claim
from benchmarks.packing.bench import PACKED, PLAIN
from benchmarks.predictions import inputs_of_prediction
from wanoffload import Offloader
from wanoffload.policy import cost

pytestmark = pytest.mark.timeout(600)

TINY = models.MODELS["tiny"]
WAN_14B = models.MODELS["14b"]
PNG = b"\x89PNG\r\n\x1a\n"


def bench(results: Path, *arguments: str) -> int:
    small = ("--tiny", "--device", "cpu", "--forwards", "24", "--results", str(results))
    return command.main(["budget", *small, *arguments])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of all parts, measured once."""
    path = tmp_path_factory.mktemp("budget") / "results.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        assert bench(path) == 0
    return path


def rows(results: Path, part: str) -> list[Row]:
    """The measured rows of a part."""
    found = [row for row in ResultStore(results).rows("budget") if row.key["part"] == part]
    return [row for row in found if not row.values.get("complete")]


# A run.


def test_every_part_has_verified_rows(results: Path) -> None:
    store = ResultStore(results)
    assert all(row.verified for row in store.rows("budget"))
    complete = [row.key["part"] for row in store.rows("budget") if row.values.get("complete")]
    assert complete == list(budget.PARTS)
    assert not rows(results, "peers")  # streams need a GPU


def test_parts_that_are_there_are_not_measured_again(results: Path) -> None:
    before = results.read_text()
    assert bench(results) == 0
    assert results.read_text() == before


@pytest.mark.parametrize("size", [str(size) for size in TINY.sizes])
@pytest.mark.parametrize("form", [PLAIN, PACKED])
def test_budgets_go_from_none_over_too_little_to_everything(
    results: Path, form: str, size: str
) -> None:
    found = [r for r in rows(results, "steps") if (r.key["form"], r.key["size"]) == (form, size)]
    none, too_small, *others = found
    assert none.key["budget"] == "none"
    assert none.values["plan"]["resident"] == none.values["plan"]["kept_packed"] == 0
    assert f"vram_budget is {too_small.values['budget']:,} bytes" in too_small.values["too_small"]
    assert "plan" not in too_small.values
    budgets = [row.values["budget"] for row in others]
    assert budgets == sorted(budgets)
    assert budgets[0] == too_small.values["budget"] + 1  # the least that is accepted
    stayed = [r.values["plan"]["resident"] + r.values["plan"]["kept_packed"] for r in others]
    assert stayed == sorted(stayed)
    assert others[-1].values["plan"]["resident"] == TINY.config["num_layers"]
    assert others[-1].values["plan"]["streamed_bytes"] == 0
    for row in others:
        assert row.values["device_bytes"] <= row.values["budget"]


def test_a_row_has_its_floor_and_the_plan_of_the_run(results: Path) -> None:
    for row in rows(results, "steps"):
        if "plan" not in row.values:
            continue
        values, plan = row.values, row.values["plan"]
        streamed = 2 * plan["streamed_bytes"] / values["link_gbps"]["median"] / 1e6
        assert values["floor_ms"] == pytest.approx(max(values["resident_ms"], streamed))
        units = plan["resident"] + plan["kept_packed"] + plan["streamed"]
        blocks = TINY.config["num_layers"]
        assert units == plan["units"] == (3 * blocks if row.key["form"] == PARTS else blocks)
        assert values["equal"]
        assert values["fetches_right"]


def test_mixed_shapes_run_under_a_budget_and_under_an_automatic_one(results: Path) -> None:
    fixed, auto = rows(results, "ceiling")
    assert auto.key["budget"] == "auto"
    for row in (fixed, auto):
        assert row.values["forwards"] == 24
        assert row.values["wrong"] == row.values["out_of_memory"] == 0
    assert fixed.values["device_bytes"] <= fixed.values["budget"]
    assert auto.values["stayed"][1] == TINY.config["num_layers"]


@pytest.mark.parametrize("size", [str(size) for size in TINY.sizes])
def test_parts_of_blocks_are_measured_beside_blocks_and_the_resident_model(
    results: Path, size: str
) -> None:
    found = [row for row in rows(results, "parts") if row.key["size"] == size]
    names = ["resident", "wanoffload-p2", "wanoffload-parts", "wanoffload-packed-parts"]
    assert [row.key["contender"] for row in found] == names  # the peer's streams need a GPU
    resident, blocks, plain, packed = (row.values for row in found)
    assert resident["device_bytes"] == models.model_bytes(TINY).all
    assert (blocks["units"], plain["units"], packed["units"]) == (6, 18, 18)
    assert blocks["ring_bytes"] == 0
    for values in (plain, packed):
        assert 0 < values["ring_bytes"] <= values["slot_bytes"] < values["device_bytes"]
        assert values["slot_bytes"] < blocks["slot_bytes"] / 2
    assert packed["staging_bytes"] > plain["staging_bytes"] == 0
    for values in (resident, blocks, plain, packed):
        step_ms = values["step_ms"]["median"]
        assert values["x_resident"] == pytest.approx(step_ms / resident["step_ms"]["median"])
        assert values["x_blocks"] == pytest.approx(step_ms / blocks["step_ms"]["median"])
        assert values["equal"]
        assert values["fetches_right"]


def test_the_peer_has_its_turn_when_parts_are_taken_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    live: list[list[str]] = []
    close = contenders.Wanoffload.close

    def note(self: contenders.Wanoffload, model: Any) -> None:
        closed.append(self.name)
        close(self, model)

    class Peer(step_bench.Resident):
        """Stands for diffusers' leaf level, which needs a GPU."""

        name = peers.LEAF

        def __init__(self, name: str) -> None:
            assert name == self.name

        def apply(self, model: torch.nn.Module, device: Any) -> None:
            live.append([*closed])

    monkeypatch.setattr(contenders.Wanoffload, "close", note)
    monkeypatch.setattr(parts, "DiffusersGroupOffload", Peer)
    path = tmp_path / "results.jsonl"
    assert bench(path, "--parts", "parts") == 0
    assert live == [[parts.PARTS, parts.PACKED_PARTS]]
    assert closed == [parts.PARTS, parts.PACKED_PARTS, parts.BLOCKS]
    found = [row for row in rows(path, "parts") if row.key["contender"] == peers.LEAF]
    assert [row.key["size"] for row in found] == [str(size) for size in TINY.sizes]
    for row in found:
        values = row.values
        assert row.verified
        assert values["step_ms"]["count"] == parts.STEPS_OF_LEAF
        assert values["x_blocks"] == values["step_ms"]["median"] / values["blocks_ms"]
        assert values["x_resident"] == values["step_ms"]["median"] / values["resident_ms"]


def test_the_table_has_a_line_for_each_budget_and_each_thing_asked(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["table", "--results", str(results), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    asked, by_budget, mixed, in_parts = (
        printed.split(f"**{title}**")[1].split("\n\n**")[0]
        for title in (
            "Budgets, asked and measured",
            "Steps under a budget",
            "Forwards of mixed shapes",
            "Parts of blocks, beside whole blocks",
        )
    )
    measured = rows(results, "steps")
    with_claims = [*measured, *rows(results, "parts")]
    claims = [claim for row in with_claims for claim in tables.all_claims(row) if claim.asked]
    assert asked.count("\n| tiny |") == len(claims)
    assert by_budget.count("\n| tiny |") == len(measured)
    assert by_budget.count("| too small |") == len(FORMS) * len(TINY.sizes)
    assert "| 18 + 0 + 0 |" in by_budget
    assert "| 6 + 0 + 0 |" in by_budget
    assert mixed.count("\n| tiny |") == 2
    assert in_parts.count("\n| tiny |") == 4 * len(TINY.sizes)


def test_experts_have_their_first_forward_beside_one_with_nothing_staying(results: Path) -> None:
    found = rows(results, "experts")
    names = [(row.key["form"], row.key["size"], row.key["expert"]) for row in found]
    sizes = [str(size) for size in TINY.sizes]
    assert names == list(product((PLAIN, PACKED), sizes, experts.NAMES))
    for row in found:
        assert row.values["stays"].startswith("2 of 6" if row.key["form"] == PLAIN else "0 of 6")
        stall = row.values["first_ms"]["min"] - row.values["streamed_ms"]["min"]
        assert row.values["stall_ms"] == pytest.approx(stall)
        assert row.values["first_units_ms"] > 0


def test_experts_have_the_device_to_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them and another model would be more than a GPU has."""
    alive: list[int] = []
    made: list[weakref.ref[Any]] = []
    build = models.build

    def counted(*given: Any) -> Any:
        model = build(*given)
        made.append(weakref.ref(model))
        alive.append(sum(each() is not None for each in made))
        return model

    for module in ("packing.bench", "budget.experts"):
        monkeypatch.setattr(f"benchmarks.{module}.build", counted)
    assert bench(tmp_path / "results.jsonl", "--parts", "ceiling,experts", "--frames", "1") == 0
    assert alive == [1, 1, 2]


def test_an_experts_first_forward_and_its_others_are_told_apart() -> None:
    calls = experts._Calls(TINY.sizes[0])
    calls.ran = [[0, 0, 0, 1, 1, 1, 1]] * 2
    calls.forward_ms = [[float(10 * call + at) for at in range(7)] for call in (1, 2)]
    assert [calls.first(expert) for expert in (0, 1)] == [[10.0, 20.0], [13.0, 23.0]]
    assert [calls.steady(expert) for expert in (0, 1)] == [[12.0, 22.0], [15.0, 16.0, 25.0, 26.0]]


@pytest.mark.parametrize("spoilt", ["nothing", "streamed", "calls"])
def test_all_calls_of_experts_are_looked_at(spoilt: str) -> None:
    def made() -> experts._Calls:
        return experts._Calls(TINY.sizes[0], [torch.zeros(2), torch.zeros(2)], [], [[0, 1], [0, 1]])

    named = {name: made() for name in ("resident", "streamed", "calls")}
    values: dict[str, Any] = {"form": PLAIN, "budget": 1, "gbps": [1.0], "says": []}
    measured = experts._Measured(**values, **named, nothing_stayed=True)
    assert measured.equal()
    assert measured.as_intended()
    assert not dataclasses.replace(measured, nothing_stayed=False).as_intended()
    if spoilt == "nothing":
        for calls in named.values():
            calls.ran[:] = [[0, 0]] * 2
        assert not measured.as_intended()
        return
    named[spoilt].ran[0] = [1, 0]
    assert not measured.as_intended()
    named[spoilt].latents[1][0] = 1
    assert not measured.equal()


def test_a_stall_is_asked_to_be_no_longer_than_the_copy_of_the_first_units() -> None:
    values: dict[str, Any] = {"forward_ms": {"median": 3.0}, "resident_ms": 2.0}
    for stall, kept in ((24.0, True), (26.0, False)):
        (found, _) = experts._claims({**values, "stall_ms": stall, "first_units_ms": 25.0})
        assert found.kept is kept


def test_the_picture_is_a_png_of_the_rows(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "picture.png"
    options = ("--tiny", "--results", str(results), "--picture", str(path), "--device", "cpu")
    assert command.main(["picture", *options]) == 0
    assert path.read_bytes().startswith(PNG)
    assert capsys.readouterr().out.strip() == str(path)


def test_a_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    options = ("--results", str(tmp_path / "none.jsonl"), "--picture", str(path))
    assert command.main(["picture", "--tiny", "--device", "cpu", *options]) == 1
    assert not path.exists()


def test_the_list_names_the_case_and_the_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert "parts: steps, ceiling, parts, experts, peers" in printed
    assert "  picture " in printed


# What must not pass.


def test_other_bits_under_a_budget_are_not_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = contenders.Wanoffload.apply

    def spoil(self: contenders.Wanoffload, model: Any, device: Any) -> None:
        if self.pack:
            model.get_parameter("blocks.0.ffn.net.2.weight").data[0] += 1
        apply(self, model, device)

    monkeypatch.setattr(contenders.Wanoffload, "apply", spoil)
    path = tmp_path / "results.jsonl"
    assert bench(path, "--parts", "steps,ceiling", "--frames", "1") == 1
    measured = [row for row in rows(path, "steps") if "plan" in row.values]
    right = {PLAIN: True, PACKED: False, PARTS: True}
    assert {row.key["form"]: row.verified for row in measured} == right
    assert not any(row.verified for row in rows(path, "ceiling"))


def test_forwards_that_fetch_another_number_of_bytes_are_not_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = contenders.Wanoffload.counters

    def one_more(self: contenders.Wanoffload, model: torch.nn.Module) -> contenders.Counters:
        true = counters(self, model)
        return dataclasses.replace(true, bytes_fetched=true.bytes_fetched + true.forwards)

    monkeypatch.setattr(contenders.Wanoffload, "counters", one_more)
    path = tmp_path / "results.jsonl"
    assert bench(path, "--parts", "steps", "--frames", "1") == 1
    measured = [row for row in rows(path, "steps") if "plan" in row.values]
    assert all(row.values["equal"] for row in measured)
    assert not any(row.verified for row in measured)


def test_experts_with_other_bits_are_not_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enable = wanoffload.enable

    def spoil(pipe: Any, **options: Any) -> Any:
        if options["pack"]:
            pipe.transformer_2.get_parameter("blocks.0.ffn.net.2.weight").data[0] += 1
        return enable(pipe, **options)

    monkeypatch.setattr(wanoffload, "enable", spoil)
    path = tmp_path / "results.jsonl"
    assert bench(path, "--parts", "experts", "--frames", "1") == 1
    found = {row.key["form"]: row.verified for row in rows(path, "experts")}
    assert found == {PLAIN: True, PACKED: False}


def test_parts_with_other_bits_are_not_verified_and_the_table_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    apply = contenders.Wanoffload.apply

    def spoil(self: contenders.Wanoffload, model: Any, device: Any) -> None:
        if self.name == "wanoffload-parts":
            model.get_parameter("blocks.0.ffn.net.2.weight").data[0] += 1
        apply(self, model, device)

    monkeypatch.setattr(contenders.Wanoffload, "apply", spoil)
    path = tmp_path / "results.jsonl"
    assert bench(path, "--parts", "parts", "--frames", "1") == 1
    found = {row.key["contender"]: row.verified for row in rows(path, "parts")}
    assert found.pop("wanoffload-parts") is False
    assert all(found.values())
    assert command.main(["table", "--results", str(path), "--device", "cpu"]) == 0
    in_parts = capsys.readouterr().out.split("**Parts of blocks, beside whole blocks**")[1]
    (wrong,) = [line for line in in_parts.splitlines() if line.endswith("| **no** |")]
    assert "| wanoffload-parts |" in wrong


def test_parts_that_fetch_more_than_their_plan_says_are_not_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = contenders.Wanoffload.counters

    def one_more(self: contenders.Wanoffload, model: torch.nn.Module) -> contenders.Counters:
        true = counters(self, model)
        return dataclasses.replace(true, bytes_fetched=true.bytes_fetched + true.forwards)

    monkeypatch.setattr(contenders.Wanoffload, "counters", one_more)
    path = tmp_path / "results.jsonl"
    assert bench(path, "--parts", "parts", "--frames", "1") == 1
    resident, *ours = rows(path, "parts")
    assert resident.verified
    assert all(row.values["equal"] and not row.verified for row in ours)


def test_a_deadline_keeps_what_was_measured_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.jsonl"
    out_of_time, asked = Session.out_of_time, []

    def at_the_second_size(self: Session) -> bool:
        asked.append(self)  # in front of each part, and of each size of this one
        self.options.deadline = 0.0 if len(asked) == 3 else None
        return out_of_time(self)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "out_of_time", at_the_second_size)
        assert bench(path, "--parts", "parts") == 1
    assert {row.key["size"] for row in rows(path, "parts")} == {str(TINY.sizes[0])}
    assert not any(row.values.get("complete") for row in ResultStore(path).rows("budget"))
    assert bench(path, "--parts", "parts") == 0
    assert {row.key["size"] for row in rows(path, "parts")} == {str(size) for size in TINY.sizes}


def test_running_out_of_memory_is_counted_and_not_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = ceiling.forward, []

    def fail_once(model: Any, *args: Any) -> torch.Tensor:
        calls.append(model)
        if len(calls) == 30:  # the first 24 are the resident model's
            raise torch.OutOfMemoryError("no memory")
        return forward(model, *args)

    monkeypatch.setattr(ceiling, "forward", fail_once)
    path = tmp_path / "results.jsonl"
    assert bench(path, "--parts", "ceiling") == 1
    fixed, auto = rows(path, "ceiling")
    assert (fixed.values["out_of_memory"], fixed.verified) == (1, False)
    assert (auto.values["out_of_memory"], auto.verified) == (0, True)


def test_models_are_left_without_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one part leaves on the device would count as another's."""
    given: list[Any] = []
    set_budget = Offloader.set_budget

    def note(self: Offloader, vram_budget: Any) -> None:
        given.append(vram_budget)
        set_budget(self, vram_budget)

    monkeypatch.setattr(Offloader, "set_budget", note)
    assert bench(tmp_path / "results.jsonl", "--parts", "ceiling") == 0
    assert given[1:] == ["auto", None]


# What was asked, and what it is compared with.


def test_bounds_are_those_that_were_asked() -> None:
    assert [size / 1e9 for size in budget_bench.BUDGETS] == [2, 4, 6, 8, 12, 16, 24, 30]
    assert (steps.BESIDE_FLOOR, steps.MONOTONE, steps.BESIDE_NO_BUDGET) == (1.03, 1.01, 1.01)
    assert (predicted.STEP_WITHIN, predicted.MEMORY_WITHIN) == (0.05, 0.01)
    assert budget_bench.LEAST == {
        (PACKED, 1): (21_500_000_000, 1.14),
        (PACKED, 17): (3_000_000_000, 1.025),
    }
    assert (ceiling.FORWARDS, ceiling.BUDGET, ceiling.MARGIN) == (200, 8_000_000_000, 1.02)
    assert (parts.ON_DEVICE, parts.BESIDE_BLOCKS) == (1_150_000_000, 1.02)


def test_least_memory_is_measured_in_the_form_and_at_the_size_it_was_asked_of() -> None:
    made: Any = type("Bench", (), {})()
    made.session = type("Session", (), {"options": type("Options", (), {"model": "14b"})})
    budgets = {
        (form, size.frames): budget_bench.BudgetBench.budgets(made, form, size)
        for form in (PLAIN, PACKED)
        for size in WAN_14B.sizes[:2]
    }
    usual = list(budget_bench.BUDGETS)
    assert budgets[PLAIN, 1] == budgets[PLAIN, 17] == usual
    assert budgets[PACKED, 1] == sorted([*usual, 21_500_000_000])
    assert budgets[PACKED, 17] == sorted([*usual, 3_000_000_000])


def values(nbytes: int | None, x_resident: float = 1.02, **more: Any) -> dict[str, Any]:
    """Of a row of `steps`, as if measured on a GPU."""
    step = Spread.of([1000 * x_resident]).as_json()
    hardware = dataclasses.replace(cost.ASSUMED, device_memory="80GiB", host_memory="128GiB")
    return {
        "verified": True,
        "budget": nbytes,
        "step_ms": step,
        "resident_ms": 1000.0,
        "floor_ms": 1000.0,
        "x_resident": x_resident,
        "x_floor": x_resident,
        "link_gbps": Spread.of([55.0]).as_json(),
        "device_bytes": nbytes or 2_700_000_000,
        "plan": {"depth": 1 if nbytes else 2},
        "claims": [],
        **inputs_of_prediction(WAN_14B, WAN_14B.sizes[1], hardware),
        **more,
    }


def test_a_budget_is_judged_beside_the_floor_the_smaller_one_and_none() -> None:
    seen = steps._Seen(no_budget=1.0, smaller=1.03)
    size = WAN_14B.sizes[1]
    claims = steps._claims(PACKED, size, values(3_000_000_000), seen)
    assert [(c.against_is, c.bound, c.kept) for c in claims] == [
        ("its floor, max(C, S / R)", 1.03, True),
        ("resident", 1.025, True),
        ("budget", 1.0, True),
        ("the next smaller budget", 1.01, True),
        ("no budget", 1.01, False),
    ]
    plain = steps._claims(PLAIN, size, values(3_000_000_000), steps._Seen())
    assert {c.against_is: c.bound for c in plain}["resident"] is None
    none = steps._claims(PACKED, size, values(None), steps._Seen())
    assert [c.against_is for c in none] == ["its floor, max(C, S / R)", "resident"]


@pytest.mark.parametrize(
    ("ratio", "kept"), [(0.94, False), (0.96, True), (1.04, True), (1.06, False)]
)
def test_a_prediction_may_be_off_on_either_side(ratio: float, kept: bool) -> None:
    claim = Claim("step, predicted", ratio, 1.0, "measured", "ms", 0.05, WITHIN)
    assert claim.kept is kept
    assert claim.asked.startswith("within 0.05, ")
    assert Claim("step", ratio, 1.0, "resident", "ms", 1.05, AT_MOST).kept is (ratio <= 1.05)


def test_predictions_are_the_cost_models_for_the_budget_of_the_row() -> None:
    row = budget_row(PACKED, values(8_000_000_000))
    step, memory = predicted.claims(row)
    assert (step.bound, memory.bound) == (0.05, 0.01)
    says = predicted.Predicted.of("14b", PACKED, row.values)
    assert (step.value, memory.value) == (says.step_ms, says.device_bytes / 1e9)
    plain = predicted.Predicted.of("14b", PLAIN, row.values)
    assert 7_000_000_000 < plain.device_bytes <= 8_000_000_000
    # Where compute binds, packed blocks gain little by more.
    assert says.device_bytes < 0.8 * plain.device_bytes
    everything = values(30_000_000_000, plan={"depth": 0})
    whole = predicted.Predicted.of("14b", PLAIN, everything)
    assert whole.device_bytes == pytest.approx(models.model_bytes(WAN_14B).all, rel=0.005)
    assert predicted.claims(budget_row(PLAIN, {"verified": True, "claims": []})) == []


def test_reserved_memory_is_judged_against_budget_and_activations() -> None:
    ran = ceiling._Ran(forwards=200, reserved=10_400_000_000)
    (claim,) = ceiling._claims(ran, 8_000_000_000, 2_200_000_000)
    assert claim.against == pytest.approx(10.2)
    assert (claim.bound, claim.kept) == (1.02, True)
    ran.reserved = 10_405_000_000
    (claim,) = ceiling._claims(ran, 8_000_000_000, 2_200_000_000)
    assert claim.kept is False


BLOCK_GRANULARITY = "block granularity"


def part_values(x_blocks: float, gb: float, **more: Any) -> dict[str, Any]:
    """Of a row of `parts`, as if measured on a GPU."""
    return {
        "verified": True,
        "step_ms": Spread.of([1000 * x_blocks]).as_json(),
        "resident_ms": 1000.0,
        "blocks_ms": 1000.0,
        "x_resident": x_blocks,
        "x_blocks": x_blocks,
        "link_gbps": Spread.of([55.0]).as_json(),
        "device_bytes": round(gb * 1e9),
        "ring_bytes": 600_000_000,
        "slot_bytes": 600_000_256,
        "device_peak_allocated": 0,
        "device_peak_reserved": 0,
        **more,
    }


def part_row(contender: str, measured: dict[str, Any], size: str = "480x832x17") -> Row:
    claims = [claim.as_json() for claim in parts._claims(contender, measured)]
    key = {"model": "14b", "part": "parts", "size": size, "contender": contender}
    return Row("budget", key, "code", {**measured, "claims": claims}, "a machine", "now")


@pytest.mark.parametrize(
    ("name", "x_blocks", "gb", "kept"),
    [
        (parts.PARTS, 1.02, 1.15, [True, True]),
        (parts.PARTS, 1.021, 1.15, [False, True]),
        (parts.PARTS, 1.02, 1.151, [True, False]),
        (parts.PACKED_PARTS, 1.5, 1.3, []),
        (peers.LEAF, 1.5, 0.5, []),
        (parts.BLOCKS, 1.0, 2.63, []),
        ("resident", 0.2, 28.6, []),
    ],
)
def test_plain_parts_are_asked_to_keep_up_with_blocks_in_less_memory(
    name: str, x_blocks: float, gb: float, kept: list[bool]
) -> None:
    claims = parts._claims(name, part_values(x_blocks, gb))
    assert [claim.kept for claim in claims if claim.asked] == kept
    beside = [claim.against_is for claim in claims if claim.what == "step"]
    assert beside == ([] if name in (parts.BLOCKS, "resident") else [BLOCK_GRANULARITY, "resident"])


def test_a_claim_of_parts_that_is_missed_shows_as_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    stored(path, part_row(parts.PARTS, part_values(1.03, 1.2)))
    assert command.main(["table", "--results", str(path), "--device", "cpu"]) == 0
    asked = capsys.readouterr().out.split("**Budgets, asked and measured**")[1].split("\n\n**")[0]
    assert "| 1030 ms | 1000 ms: block granularity | 1.030 | at most 1.02, **missed** |" in asked
    assert "| 1.2 GB | 1.15 GB: what is asked | 1.043 | at most 1, **missed** |" in asked


@pytest.mark.parametrize(
    ("frames", "asked"), [(None, [1, 17]), ([1], [1]), ([81], [81]), ([1, 17, 81], [1, 17, 81])]
)
def test_parts_are_measured_at_81_frames_only_where_that_is_asked_for(
    frames: list[int] | None, asked: list[int]
) -> None:
    made: Any = type("Session", (), {"device": torch.device("cpu")})()
    made.options = type("Options", (), {"model": "14b", "frames": frames})
    sizes = budget_bench.BudgetBench(made).asked_sizes
    assert [size.frames for size in sizes] == asked


# The picture.


def budget_row(form: str, measured: dict[str, Any], **more: Any) -> Row:
    key = {"model": "14b", "part": "steps", "form": form, "size": "480x832x17", **more}
    return Row("budget", key, "code", {"verified": True, **measured}, "a machine", "now")


def step_row(contender: str, allocated: int, ms: float) -> Row:
    key = {"model": "14b", "size": "480x832x17", "contender": contender, "compiled": False}
    measured = {
        "verified": True,
        "step_ms": Spread.of([ms]).as_json(),
        "device_peak_allocated": allocated,
        "model_bytes": 28_600_000_000,
    }
    return Row("step", key, "code", measured, "a machine", "now")


def stored(path: Path, *given: Row) -> ResultStore:
    store = ResultStore(path)
    for row in given:
        store.add(row)
    return store


def test_a_chart_has_both_forms_their_floors_and_the_peers(tmp_path: Path) -> None:
    given = [
        budget_row(form, values(nbytes, x), budget=f"{nbytes}")
        for form in (PLAIN, PACKED)
        for nbytes, x in ((8_000_000_000, 1.1), (4_000_000_000, 1.2))
    ]
    given.append(budget_row(PLAIN, {"budget": 2 * 10**9, "claims": []}, budget="too small"))
    given += [
        step_row("resident", 29_600_000_000, 1000.0),
        step_row("diffusers-leaf-stream", 1_500_000_000, 1190.0),
        step_row("wanoffload-p2", 3_600_000_000, 1010.0),
    ]
    (chart,) = picture.compose(stored(tmp_path / "rows.jsonl", *given), "14b").charts
    assert chart.title == "14b, 480x832x17"
    for form in (PLAIN, PACKED):
        assert chart.ours[form] == [picture.Point(4.0, 1200.0), picture.Point(8.0, 1100.0)]
        assert chart.floors[form] == [picture.Point(4.0, 1000.0), picture.Point(8.0, 1000.0)]
    assert chart.resident is not None
    assert chart.resident.step_ms == 1000.0
    assert chart.peers == {"diffusers-leaf-stream": picture.Point(0.5, 1190.0)}


def test_a_peer_measured_beside_budgets_wins_over_that_of_another_case(tmp_path: Path) -> None:
    key = {
        "model": "14b",
        "part": "peers",
        "size": "480x832x17",
        "contender": "diffusers-leaf-stream",
    }
    measured = {**values(None), "device_bytes": 450_000_000}
    given = [
        budget_row(PLAIN, values(4_000_000_000), budget="4 GB"),
        step_row("resident", 29_600_000_000, 1000.0),
        step_row("diffusers-leaf-stream", 1_500_000_000, 1190.0),
        Row("budget", key, "code", measured, "a machine", "now"),
    ]
    (chart,) = picture.compose(stored(tmp_path / "rows.jsonl", *given), "14b").charts
    assert chart.peers == {"diffusers-leaf-stream": picture.Point(0.45, 1020.0)}


def test_parts_are_points_beside_the_budgets(tmp_path: Path) -> None:
    given = [
        budget_row(PLAIN, values(4_000_000_000), budget="4 GB"),
        part_row("resident", part_values(0.9, 28.6)),
        part_row(parts.BLOCKS, part_values(1.0, 2.63)),
        part_row(parts.PARTS, part_values(1.01, 1.1)),
        part_row(parts.PACKED_PARTS, part_values(1.2, 1.3)),
        part_row(peers.LEAF, part_values(1.3, 0.5)),
    ]
    made = picture.compose(stored(tmp_path / "rows.jsonl", *given), "14b")
    (chart,) = made.charts
    assert chart.parts == {PLAIN: picture.Point(1.1, 1010.0), PACKED: picture.Point(1.3, 1200.0)}
    assert chart.peers == {peers.LEAF: picture.Point(0.5, 1300.0)}
    assert chart.ours == {PLAIN: [picture.Point(4.0, 1020.0)]}
    assert made.warning == ""


def test_parts_alone_make_a_picture(tmp_path: Path) -> None:
    given = [
        part_row(parts.PARTS, part_values(1.01, 1.1, resident_ms=990.0), size)
        for size in ("480x832x81", "480x832x1")
    ]
    small, large = picture.compose(stored(tmp_path / "rows.jsonl", *given), "14b").charts
    assert (small.title, large.title) == ("14b, 480x832x1", "14b, 480x832x81")
    assert small.resident is not None
    assert small.resident.step_ms == 990.0
    assert small.ours == {}


def test_the_picture_says_how_many_rows_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    wrong = {"verified": False}
    path = tmp_path / "rows.jsonl"
    store = stored(
        path,
        budget_row(PLAIN, values(4_000_000_000), budget="4 GB"),
        budget_row(PLAIN, values(8_000_000_000, **wrong), budget="8 GB"),
        part_row(parts.PARTS, part_values(1.01, 1.1, **wrong)),
        part_row(peers.LEAF, part_values(1.3, 0.5, **wrong)),
    )
    made = picture.compose(store, "14b")
    (chart,) = made.charts
    assert chart.ours == {PLAIN: [picture.Point(4.0, 1020.0)]}
    assert not chart.parts
    assert not chart.peers
    assert (made.left_out, made.warning) == (3, "3 rows that are not verified are left out")
    drawn = tmp_path / "p.png"
    options = ("--results", str(path), "--picture", str(drawn), "--device", "cpu")
    assert command.main(["picture", *options]) == 0
    assert "3 rows that are not verified are left out" in capsys.readouterr().err
    assert drawn.read_bytes().startswith(PNG)

    stored(path, part_row(parts.PARTS, part_values(1.01, 1.1)))  # measured again, and right
    assert picture.compose(ResultStore(path), "14b").left_out == 2


def test_a_picture_without_any_row_that_is_right_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    stored(path, budget_row(PLAIN, values(4_000_000_000, verified=False), budget="4 GB"))
    options = ("--results", str(path), "--picture", str(tmp_path / "p.png"), "--device", "cpu")
    assert command.main(["picture", *options]) == 1
    assert "1 row that is not verified is left out" in capsys.readouterr().err


def test_weights_at_a_peak_are_what_activations_leave() -> None:
    assert peers.weight_bytes(1500, resident_peak=29_600, model=28_600) == 500
    assert peers.weight_bytes(900, resident_peak=29_600, model=28_600) == 0


def test_only_drawing_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = tmp_path / "rows.jsonl"
    stored(path, budget_row(PLAIN, values(4_000_000_000), budget="4 GB"))
    options = ("--results", str(path), "--picture", str(tmp_path / "p.png"), "--device", "cpu")
    assert command.main(["picture", *options]) == 1
    assert not (tmp_path / "p.png").exists()
