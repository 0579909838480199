"""The benchmark harness on a toy model without a GPU: rows, bytes and structure, never times."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks import __main__ as command
from benchmarks import contenders, link, models, predictions, step_bench, tables, turns
from benchmarks.harness import ResultStore, Row, Spread
from benchmarks.machine import DevicePeak
from wanoffload import Hardware
from wanoffload.pipelines.parking import Parked
from wanoffload.policy import cost

CPU = torch.device("cpu")
TINY = models.MODELS["tiny"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Toy models on many threads only wait for each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def bench(results: Path, *arguments: str) -> int:
    return command.main([*arguments, "--tiny", "--device", "cpu", "--results", str(results)])


def step(results: Path, names: str = "resident,wanoffload-p1", *more: str) -> int:
    quick = ("--frames", "1", "--rounds", "2", "--run-seconds", "0.001")
    return bench(results, "step", "--contenders", names, *quick, *more)


def row(case: str = "step", **values: Any) -> Row:
    return Row(case, {"a": 1}, "code", {"verified": True, **values}, "a machine", "now")


def test_step_rows_are_verified_and_every_block_is_fetched_in_every_forward(results: Path) -> None:
    assert step(results) == 0
    by_name = {each.key["contender"]: each for each in ResultStore(results).rows("step")}
    assert set(by_name) == {"resident", "wanoffload-p1"}
    ours, weights = by_name["wanoffload-p1"].values, models.model_bytes(TINY)
    assert ours["verified"]
    assert ours["equal"]
    assert ours["fetches_right"]
    assert ours["bytes_per_step"] >= 2 * weights.blocks
    assert ours["slot_bytes"] >= 2 * weights.largest_block
    assert ours["step_ms"]["count"] == ours["rounds"] * ours["steps_per_turn"]
    floor = max(ours["resident_ms"]["median"], ours["link_ms"])
    assert ours["floor_ms"] == floor
    assert 0 < ours["x_floor"] <= ours["x_resident"]


def test_a_steady_drift_of_the_device_cancels_over_a_pair_of_rounds() -> None:
    alone = {"resident": 100.0, "first": 100.0, "second": 130.0}
    took: dict[str, list[float]] = {name: [] for name in alone}
    slowdown = 1.0
    for number in range(2):
        for name in turns.forth_and_back(list(alone), number):
            took[name].append(alone[name] * slowdown)
            slowdown += 0.002
    for name, milliseconds in alone.items():
        assert turns.beside(took[name], took["resident"]) == pytest.approx(milliseconds / 100, 1e-4)
    assert took["first"][0] / took["resident"][0] > 1.0019


def test_rounds_go_forth_and_back_and_every_turn_follows_the_links(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    take, measure = turns.Measure.take, link.LinkProbe.measure

    def note_turn(self: turns.Measure, live: contenders.Live, taken: turns.Turns) -> None:
        seen.append(live.contender.name)
        take(self, live, taken)

    def note_link(self: link.LinkProbe, copies: int = 6) -> float:
        seen.append("link")
        return measure(self, copies)

    monkeypatch.setattr(turns.Measure, "take", note_turn)
    monkeypatch.setattr(link.LinkProbe, "measure", note_link)
    assert step(results, "wanoffload-p1") == 0
    forth = ["link", "resident", "link", "wanoffload-p1"]
    back = ["link", "wanoffload-p1", "link", "resident"]
    assert seen[-8:] == [*forth, *back]
    assert "resident" not in seen[:-8]


def test_contenders_set_up_together_share_the_resident_model(results: Path) -> None:
    assert step(results, "wanoffload-p0,wanoffload-p9,wanoffload-pageable-p1", "--together") == 0
    rows = ResultStore(results).rows("step")
    assert [each.key["contender"] for each in rows] == [
        "resident",
        "wanoffload-p0",
        "wanoffload-p9",
        "wanoffload-pageable-p1",
    ]
    assert len({json.dumps(each.values["resident_ms"]) for each in rows}) == 1
    assert all(each.verified for each in rows)


def test_measured_rows_are_not_measured_again(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert step(results) == 0
    before = results.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(step_bench.StepBench, "__init__", lambda *_: pytest.fail("measured again"))
        assert step(results) == 0
    assert results.read_text() == before
    assert step(results, "wanoffload-p1", "--again") == 0
    assert len(ResultStore(results).rows()) == 4


def test_other_code_is_measured_again_and_peers_are_not(results: Path) -> None:
    assert step(results, "resident,wanoffload-p1", "--label", "first") == 0
    assert step(results, "resident,wanoffload-p1", "--label", "second") == 0
    rows = ResultStore(results).rows()
    assert [each.key["contender"] for each in rows] == [
        "resident",
        "wanoffload-p1",
        "wanoffload-p1",
    ]
    assert [each.fingerprint for each in rows[1:]] == ["first", "second"]


def test_wrong_output_is_not_verified_and_does_not_count_as_measured(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = contenders.Wanoffload.apply

    def spoil(self: contenders.Wanoffload, model: torch.nn.Module, device: torch.device) -> None:
        model.get_parameter("blocks.3.ffn.net.2.weight").data[0] += 1
        apply(self, model, device)

    monkeypatch.setattr(contenders.Wanoffload, "apply", spoil)
    assert step(results, "wanoffload-p1") == 1
    (spoiled,) = [r for r in ResultStore(results).rows() if r.key["contender"] != "resident"]
    assert not spoiled.values["equal"]
    assert spoiled.values["fetches_right"]
    monkeypatch.undo()
    assert step(results, "wanoffload-p1") == 0


def test_right_output_without_fetches_is_not_verified(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = contenders.Wanoffload.counters

    def dead(self: contenders.Wanoffload, model: torch.nn.Module) -> contenders.Counters:
        return dataclasses.replace(counters(self, model), acquires=0, bytes_fetched=0)

    monkeypatch.setattr(contenders.Wanoffload, "counters", dead)
    assert step(results, "wanoffload-p1") == 1
    ours = ResultStore(results).rows()[-1].values
    assert ours["equal"]
    assert not ours["fetches_right"]
    assert not ours["verified"]


def test_parts_of_blocks_are_each_fetched_in_every_forward(results: Path) -> None:
    assert step(results, "wanoffload-parts,wanoffload-packed-parts-p2") == 0
    ours = [r for r in ResultStore(results).rows("step") if r.key["contender"] != "resident"]
    assert [r.key["contender"] for r in ours] == ["wanoffload-parts", "wanoffload-packed-parts-p2"]
    before = contenders.Counters(0, 0, 0, 0, 6, 0, 1, 0, units=18)
    after = dataclasses.replace(before, acquires=2 * 18, bytes_fetched=2 * 6)
    assert turns.fetches_are_right(before, after, forwards=2, blocks=6)
    blocks_alone = dataclasses.replace(after, acquires=2 * 6)
    assert not turns.fetches_are_right(before, blocks_alone, forwards=2, blocks=6)
    at_home = dataclasses.replace(before, at_home=True)
    assert turns.fetches_are_right(at_home, at_home, forwards=2, blocks=6)
    for wrong in ({"at_home": False}, {"acquires": 1}, {"bytes_fetched": 1}):
        other = dataclasses.replace(at_home, **wrong)
        assert not turns.fetches_are_right(at_home, other, forwards=2, blocks=6)


def test_one_contenders_failure_does_not_cost_the_others(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = contenders.Wanoffload.apply

    def fail(self: contenders.Wanoffload, model: torch.nn.Module, device: torch.device) -> None:
        if self.prefetch == 1:
            raise MemoryError("no memory")
        apply(self, model, device)

    monkeypatch.setattr(contenders.Wanoffload, "apply", fail)
    assert step(results, "wanoffload-p1,wanoffload-p2") == 1
    names = [each.key["contender"] for each in ResultStore(results).rows()]
    assert names == ["resident", "wanoffload-p2"]


def test_nothing_is_begun_after_the_deadline(results: Path) -> None:
    assert step(results, "resident", "--deadline", "0") == 1
    assert not results.exists()


def test_memory_rows_compare_processes_through_a_hash(results: Path) -> None:
    names = ("--contenders", "resident,wanoffload-p1", "--frames", "1")
    assert bench(results, "memory", *names) == 0
    resident, ours = ResultStore(results).rows("memory")
    assert resident.values["output_sha256"] == ours.values["output_sha256"]
    assert ours.verified
    assert ours.values["acquires_right"]
    weights = models.model_bytes(TINY)
    assert ours.values["locked_bytes"] >= weights.blocks
    assert ours.values["rss_peak_wrap"] >= ours.values["rss_before_wrap"] > 0
    margin = weights.all + weights.largest_block + 10**9
    assert ours.values["rss_ceiling"] == ours.values["rss_empty"] + margin


def test_wrapping_and_micro_rows_are_verified_and_printed(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ("--repeats", "1", "--parts", "link,locking,acquire")
    assert bench(results, "wrapping", "micro", *quick) == 0
    rows = ResultStore(results).rows()
    assert all(each.verified for each in rows)
    assert {each.key.get("part") for each in rows} == {None, "link", "locking", "acquire"}
    assert bench(results, "table") == 0
    printed = capsys.readouterr().out
    assert "Setting up from a model in host memory" in printed
    assert "| acquire | 27 |" in printed


def test_table_has_a_line_for_the_newest_row_of_each_key(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step(results, "resident,wanoffload-p1", "--label", "first") == 0
    assert step(results, "resident,wanoffload-p1", "--label", "second") == 0
    capsys.readouterr()
    assert bench(results, "table") == 0
    table = capsys.readouterr().out.split("**A step (two forwards)**")[1].split("**")[0]
    head, rule, *lines = table.strip().splitlines()
    assert len(lines) == 2
    assert len({line.count("|") for line in (head, rule, *lines)}) == 1
    assert "wanoffload-p1" in lines[1]
    assert lines[1].endswith("| yes |")


def test_predict_measures_every_plan_at_every_size_and_prints_both_tables(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(results, "predict", "table") == 0
    rows = {(r.key["size"], r.key["plan"]): r for r in ResultStore(results).rows("predict")}
    assert len(rows) == len(TINY.sizes) * len(predictions.PLANS) == 12
    assert all(each.verified for each in rows.values())
    for size in map(str, TINY.sizes):
        resident, whole = rows[size, "resident"].values, rows[size, "whole"].values
        added = whole["move_ms"] / whole["workload"]["steps"]
        assert whole["move_ms"] > 0
        assert whole["step_ms"]["median"] == pytest.approx(resident["step_ms"]["median"] + added)
    printed = capsys.readouterr().out
    assert printed.count("| tiny | 32x48x9 | streamed-p1 |") == 1
    assert printed.count("| tiny | 32x48x9 | this, ") == 1
    assert "Inside: " in printed
    assert " of 12 steps (10%" in printed


def test_predict_goes_on_with_the_rows_that_are_missing(results: Path) -> None:
    assert bench(results, "predict", "--frames", "9", "--label", "same") == 0
    kept = [each for each in results.read_text().splitlines() if '"plan": "whole"' not in each]
    results.write_text("\n".join(kept) + "\n")
    assert bench(results, "predict", "--frames", "9", "--label", "same") == 0
    assert [each.key["plan"] for each in ResultStore(results).rows()] == [*predictions.PLANS]


def test_predict_does_not_verify_wrong_bits_of_any_plan(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, bring_in = contenders.Wanoffload.apply, Parked.bring_in

    def spoil_streamed(self: contenders.Wanoffload, model: torch.nn.Module, device: Any) -> None:
        model.get_parameter("blocks.3.ffn.net.2.weight").data[0] += self.prefetch
        apply(self, model, device)

    def spoil_whole(self: Parked) -> None:
        bring_in(self)
        self.module.get_parameter("blocks.3.ffn.net.2.weight").data[0] -= 4

    monkeypatch.setattr(contenders.Wanoffload, "apply", spoil_streamed)
    monkeypatch.setattr(Parked, "bring_in", spoil_whole)
    assert bench(results, "predict", "--frames", "1") == 1
    equal = {r.key["plan"]: r.values["equal"] for r in ResultStore(results).rows()}
    assert equal == {plan: plan == "resident" for plan in predictions.PLANS}


def test_predict_does_not_verify_right_bits_without_fetches(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = contenders.Wanoffload.counters

    def dead(self: contenders.Wanoffload, model: torch.nn.Module) -> contenders.Counters:
        return dataclasses.replace(counters(self, model), acquires=0, bytes_fetched=0)

    monkeypatch.setattr(contenders.Wanoffload, "counters", dead)
    assert bench(results, "predict", "--frames", "1") == 1
    verified = {r.key["plan"]: r.verified for r in ResultStore(results).rows()}
    assert verified == {plan: plan in ("resident", "whole") for plan in predictions.PLANS}


def test_slow_sizes_are_measured_only_by_name() -> None:
    model = models.MODELS["14b"]
    assert all(size.height == 480 for size in models.chosen_sizes(model, [81]))
    (slow,) = models.named_sizes(model, ["720x1280x81", "1x1x1"])
    assert model.tokens(slow) == 75600


def test_a_size_that_no_model_has_makes_predict_fail(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(results, "predict", "--sizes", "64x64x5") == 1
    assert "no model has a size 64x64x5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench(results, "predict", "--models", "14b,15b")
    assert "models are 14b, " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["14b", "1.3b", "5b"])
def test_facts_of_a_model_have_its_bytes_and_tokens(name: str) -> None:
    spec = models.MODELS[name]
    facts, weights = predictions.facts_of(spec), models.model_bytes(spec)
    assert facts.dits[0].bytes == weights.all
    assert facts.dits[0].block_bytes == (weights.largest_block,) * weights.block_count
    for size in (*spec.sizes, *spec.slow_sizes):
        assert facts.tokens(predictions.workload_of(size)) == spec.tokens(size)


H200 = Hardware(
    device_memory=150_000_000_000,
    host_memory=100_000_000_000,
    link_gb_per_s=50.0,
    pageable_gb_per_s=7.0,
    matmul_tflops=600.0,
    attention_tflops=500.0,
    device_gb_per_s=4000.0,
    launch_us=6.0,
)


def measured(plan: str, step_ms: float, peak: int = 0, name: str = "14b", nth: int = 2) -> Row:
    """A row as if measured on an H200, at the size with this number."""
    spec = models.MODELS[name]
    size = spec.sizes[nth]
    values = {
        "verified": True,
        "step_ms": Spread.of([step_ms]).as_json(),
        "device_peak_allocated": peak,
        "device_peak_reserved": peak,
        **predictions.inputs_of_prediction(spec, size, H200),
    }
    return Row("predict", {"model": name, "size": str(size), "plan": plan}, "c", values, "m", "t")


def test_predictions_are_those_of_the_cost_model_as_it_is_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_frame = measured("whole", 300.0, peak=2 * 28_635_351_168, nth=0)
    before = predictions.Predicted.of(one_frame)
    move_ms = 1e3 * 28_635_351_168 / 50e9 / predictions.STEPS_A_USE
    resident = predictions.Predicted.of(measured("resident", 300.0, nth=0))
    assert before.step_ms == pytest.approx(resident.step_ms + move_ms)
    assert before.step_ratio == pytest.approx(before.step_ms / 300)
    assert before.peak_ratio is not None
    assert 0.5 < before.peak_ratio < 0.52
    predict = cost.predict
    changed = lambda *args: dataclasses.replace(predict(*args), step_seconds=0.6)  # noqa: E731
    monkeypatch.setattr(cost, "predict", changed)
    assert predictions.Predicted.of(one_frame).step_ratio == 2


def test_auto_is_compared_with_what_fits_on_each_card() -> None:
    rows = [measured("resident", 6000), measured("streamed-p1", 6600), measured("whole", 5000)]
    taken = predictions.what_auto_takes(map(predictions.Predicted.of, rows))
    assert [each.card for each in taken] == [*predictions.CARDS, "this, 150.00 GB"]
    small, *_, this = taken
    assert (small.plan, small.best, small.best_ms) == ("streamed-p1", "streamed-p1", 6600)
    assert small.slower == 0
    assert (this.best, this.best_ms) == ("whole", 5000)
    assert this.step_ms is not None
    assert this.slower == pytest.approx(this.step_ms / 5000 - 1)


def test_tables_say_what_is_outside_and_count_it(results: Path) -> None:
    right = predictions.Predicted.of(measured("resident", 1.0))
    peak = right.candidate.device_peak_bytes
    store = ResultStore(results)
    store.add(measured("resident", right.step_ms * 1.05, peak=round(peak * 1.06)))
    store.add(measured("streamed-p1", right.step_ms * 2, peak=0))
    printed = tables.render(store)
    (resident,) = [line for line in printed.splitlines() if "480x832x81 | resident" in line]
    assert "0.952, inside" in resident
    assert "0.943, **OUTSIDE**" in resident
    assert "Inside: 1 of 2 steps (10%" in printed
    assert "; 0 of 1 peaks (5%, the worst is off by 5.7%)" in printed


def test_store_passes_over_a_line_that_was_cut_off(results: Path) -> None:
    store = ResultStore(results)
    store.add(row(value=1))
    with results.open("a") as file:
        file.write('{"case": "step", "key"')
    assert [each.values["value"] for each in ResultStore(results).rows()] == [1]


def test_store_goes_on_in_a_new_line_after_one_that_was_cut_off(results: Path) -> None:
    results.write_text('{"case": "step", "key"')
    ResultStore(results).add(row(value=2))
    assert [each.values["value"] for each in ResultStore(results).rows()] == [2]


def test_row_must_say_whether_it_was_verified() -> None:
    with pytest.raises(ValueError, match="verified"):
        Row("step", {}, "code", {}, "a machine", "now")


def test_spread_is_median_least_and_greatest() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    with pytest.raises(ValueError, match="at least one"):
        Spread.of([])


def test_peak_of_a_model_leaves_out_the_others() -> None:
    earlier, later = DevicePeak(CPU, own=(10, 20)), DevicePeak(CPU, own=(3, 4))
    earlier.other_came(later)
    assert earlier.base == (3, 4)
    earlier.other_left(later)
    assert earlier.base == (0, 0)


@pytest.mark.parametrize(
    ("name", "whole", "block", "count", "tensors"),
    [
        ("14b", 28_635_351_168, 702_870_528, 40, 27),
        ("1.3b", 2_844_248_192, 92_905_984, 30, 27),
        ("5b", 10_021_521_792, 327_362_560, 30, 27),
    ],
)
def test_models_have_the_real_shapes_and_dtypes(
    name: str, whole: int, block: int, count: int, tensors: int
) -> None:
    assert models.model_bytes(models.MODELS[name]) == models.ModelBytes(
        whole, block * count, block, count
    )
    described = models.describe_only(models.MODELS[name])
    assert len(list(models.blocks(described)[0].parameters())) == tensors
    assert described.get_parameter("blocks.0.norm2.weight").dtype == torch.float32
    assert described.get_parameter("blocks.0.attn1.to_q.weight").dtype == torch.bfloat16


def test_tokens_of_the_sizes() -> None:
    model = models.MODELS["14b"]
    assert [model.tokens(size) for size in model.sizes] == [1560, 7800, 32760]
    small = models.MODELS["5b"]
    assert small.tokens(small.sizes[0]) == 4400


def test_same_weights_come_from_every_way_of_building() -> None:
    first, second = models.build(TINY, CPU), models.build_on_host(TINY, CPU)
    copy = models.copy_to_host(TINY, first)
    addresses = set()
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))
        assert torch.equal(parameter, copy.get_parameter(name))
        addresses |= {parameter.data_ptr(), copy.get_parameter(name).data_ptr()}
    assert len(addresses) == 2 * len(list(first.parameters()))


def test_each_pass_of_a_step_and_each_block_change_the_output() -> None:
    inputs = models.make_inputs(TINY, TINY.sizes[1], CPU)
    model = models.build(TINY, CPU)
    with torch.inference_mode():
        cond, uncond = models.step(model, inputs)
    assert cond.isfinite().all()
    assert not torch.equal(cond, uncond)
    for block in models.blocks(model):
        weight = block.get_parameter("attn2.to_v.weight")
        kept = weight.clone()
        weight.zero_()
        with torch.inference_mode():
            assert not torch.equal(models.forward(model, inputs, "cond"), cond)
        weight.copy_(kept)


def test_unknown_names_are_refused(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no contender is called 'other'"):
        contenders.by_name("other")
    with pytest.raises(SystemExit):
        bench(results, "other")
    assert "no such case" in capsys.readouterr().err


def test_list_names_cases_models_and_contenders(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    printed = capsys.readouterr().out
    for name in ("step", "memory", "wrapping", "micro", "14b", "diffusers-leaf-stream"):
        assert name in printed
