"""The command line: what is typed becomes a plan's arguments, errors become one line."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

import wanoffload
from tests.small_models import MODELS
from tests.test_cache_file import flip
from tests.test_checkpoint import save
from wanoffload import Hardware, Workload, arguments, cli
from wanoffload.loading.cache_file import CacheFile
from wanoffload.machine import probe
from wanoffload.machine.hardware import RATES
from wanoffload.policy import planning as policy
from wanoffload.policy.choices import Choices
from wanoffload.policy.explain import taken

A14B = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
GIB = 1 << 30
README = Path(__file__).parents[1] / "README.md"


class Recorded:
    """Stands where `policy.plan` does: keeps what it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(policy, "plan", self)

    def __call__(self, *values: Any, **choices: Any) -> Recorded:
        self.model, self.workload, self.hardware = values
        self.mode, self.choices = choices.pop("mode"), choices
        return self

    def explain(self) -> str:
        return "because"

    def as_dict(self) -> dict[str, Any]:
        return {"fits": True}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return Recorded(monkeypatch)


def run(*argv: str) -> int:
    return cli.main(["plan", A14B, *argv])


def test_nothing_given_is_nothing_known_and_nothing_chosen(planned: Recorded) -> None:
    assert run() == 0
    assert (planned.model, planned.workload, planned.hardware) == (A14B, None, None)
    assert (planned.mode, planned.choices) == ("auto", {})


def test_size_is_width_by_height(planned: Recorded) -> None:
    run("--size", "832x480", "--frames", "81")
    assert planned.workload == Workload(480, 832, 81)
    run("--size", "832x480", "--frames", "81", "--steps", "4", "--guidance", "1")
    assert planned.workload == Workload(480, 832, 81, 4, 1.0)


def test_values_by_hand_make_the_machine(planned: Recorded) -> None:
    by_hand = "--vram 24GiB --host-memory 64GiB --link 25 --tflops 100 --platform rocm"
    run(*by_hand.split())
    assert planned.hardware == Hardware(
        device_memory=24 * GIB,
        host_memory=64 * GIB,
        link_gb_per_s=25.0,
        matmul_tflops=100.0,
        attention_tflops=100.0,
        platform="rocm",
    )
    run("--vram", "24GiB")
    assert planned.hardware == Hardware(device_memory=24 * GIB)


def test_values_by_hand_replace_those_of_the_probed_machine(
    planned: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Hardware("141GB", "128GB", 55.0, name="here")
    monkeypatch.setattr(Hardware, "probe", lambda: here)
    run("--probe")
    assert planned.hardware == here
    run("--probe", "--vram", "24GiB")
    assert planned.hardware == dataclasses.replace(here, device_memory=24 * GIB)


FLAGS = [name for name in Choices.__dataclass_fields__ if name.endswith(("offload", "inference"))]


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_a_choice_in_both_directions(planned: Recorded, name: str) -> None:
    flag = name.replace("_", "-")
    run(f"--{flag}")
    assert planned.choices == {name: True}
    run(f"--no-{flag}")
    assert planned.choices == {name: False}


@pytest.mark.parametrize(
    ("argv", "choice"),
    [
        (
            ["--layerwise-offload-components", "dit, text_encoder"],
            {"layerwise_offload_components": ["dit", "text_encoder"]},
        ),
        (["--layerwise-offload-components", ""], {"layerwise_offload_components": []}),
        (["--dit-offload-prefetch-size", "3"], {"dit_offload_prefetch_size": 3.0}),
        (["--dit-offload-prefetch-size", "0.25"], {"dit_offload_prefetch_size": 0.25}),
        (["--vram-budget", "6GiB"], {"vram_budget": 6 * GIB}),
        (["--vram-budget", "0.5"], {"vram_budget": 0.5}),
        (["--vram-budget", ".25"], {"vram_budget": 0.25}),
        (["--vram-budget", "1.0"], {"vram_budget": 1.0}),
        (["--vram-budget", "auto"], {"vram_budget": "auto"}),
        (["--pack", "yes"], {"pack": True}),
        (["--pack", "no"], {"pack": False}),
        (["--pack", "auto"], {"pack": "auto"}),
        (["--granularity", "block"], {"granularity": "block"}),
        (["--granularity", "part"], {"granularity": "part"}),
        (["--granularity", "auto"], {"granularity": "auto"}),
    ],
)
def test_a_value_is_a_choice(planned: Recorded, argv: list[str], choice: dict[str, Any]) -> None:
    run(*argv)
    assert planned.choices == choice


def test_every_choice_of_a_plan_can_be_made_and_every_mode(planned: Recorded) -> None:
    typed = arguments.make_parser().parse_args(["plan", A14B])
    assert set(Choices.__dataclass_fields__) <= set(vars(typed))
    assert arguments.choices_of(typed) == {}
    for mode in ("auto", "memory", "speed", "manual"):
        run("--mode", mode)
        assert planned.mode == mode


@pytest.mark.parametrize("flag", ["--dit-cpu-offload", "--dit-layerwise-offload"])
def test_help_says_that_the_two_flags_combine_for_the_lowest_peak(
    capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    other = {"--dit-cpu-offload", "--dit-layerwise-offload"} - {flag}
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    words = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    _, _, after = words.partition(f"{flag}, --no-{flag[2:]} ")
    own = after.partition(", --no-")[0]
    assert f"Combines with {other.pop()}: together they give the lowest peak" in own


def test_json_is_the_plan_as_values(planned: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    run("--json")
    assert json.loads(capsys.readouterr().out) == {"fits": True}
    run()
    assert capsys.readouterr().out == "because\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--size", "832x480"], "--size and --frames go together, and --frames is missing"),
        (["--frames", "81"], "--size and --frames go together, and --size is missing"),
        (["--size", "0x480", "--frames", "1"], "Workload.width is a whole number"),
        (["--link", "-1"], "Hardware.link_gb_per_s is a number above 0"),
        (["--dit-offload-prefetch-size", "1.5"], "dit_offload_prefetch_size is a number of blocks"),
        (["--layerwise-offload-components", "unet"], "unknown component 'unet'"),
    ],
)
def test_an_error_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("wanoffload: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [wanoffload.OffloadError, ValueError])
def test_errors_of_this_package_are_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: type[Exception]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("too little\n  memory")

    monkeypatch.setattr(policy, "plan", fail)
    assert run() == 2
    assert capsys.readouterr().err == "wanoffload: error: too little memory\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--size", "832"], "'832' is not a width x height such as 832x480"),
        (["--vram", "24"], "24 of what? Write 24GiB, 24GB or 24B"),
        (["--vram", "lots"], "not 'lots'"),
        (["--mode", "fast"], "invalid choice: 'fast'"),
        (["--platform", "tpu"], "invalid choice: 'tpu'"),
        (["--dit-offload", "1"], "unrecognized arguments: --dit-offload"),
    ],
)
def test_what_cannot_be_read_is_status_2_and_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*argv)
    assert message in capsys.readouterr().err


def a_card() -> Hardware:
    """Every number another."""
    rates = {name: 10.0 + number for number, name in enumerate(RATES)}
    return Hardware("24GB", "64GB", name="A Card", **rates)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `Hardware.probe` is asked for."""
    calls: list[Any] = []

    def answer(device: str | None, *, refresh: bool) -> Hardware:
        calls.append((device, refresh))
        return a_card()

    monkeypatch.setattr(Hardware, "probe", answer)
    monkeypatch.setattr(probe, "cached_at", lambda _: Path("/cache/rates.json"))
    return calls


def test_probe_prints_name_memory_rates_and_where_they_are_kept(
    asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["probe"]) == 0
    assert cli.main(["probe", "--refresh", "--device", "cuda:1"]) == 0
    assert asked == [(None, False), ("cuda:1", True)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "A Card (cuda)"
    values = [line.partition("  ")[2].strip() for line in lines[1:9]]
    assert values == [
        "24.00 GB",
        "64.00 GB",
        "10.0 GB/s",
        "11.0 GB/s",
        "12.0 TFLOP/s",
        "13.0 TFLOP/s",
        "14.0 GB/s",
        "15.0 us",
    ]
    assert lines[9] == "rates are kept in /cache/rates.json"


@pytest.mark.usefixtures("asked")
def test_probe_prints_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["probe", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("cache") == "/cache/rates.json"
    assert Hardware(**printed) == a_card()


def test_probe_on_a_cpu_says_that_rates_are_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"{probe.processor_name()} (cpu)"
    assert out.count("unknown") == 1 + len(RATES)
    assert "kept" not in out


def test_probing_what_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe", "--device", "gpu"]) == 2
    assert capsys.readouterr().err.startswith("wanoffload: error: 'gpu' is not a device")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save(MODELS["wan22_5b"].make(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("options", "how"), [([], "3 packed, in 0.7975 of 0.00 GB"), (["--plain"], "plain")]
)
def test_pack_writes_what_load_reads_and_check_finds_it_sound(
    checkpoint: Path,
    tmp_path: Path,
    options: list[str],
    how: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert cli.main(["pack", str(checkpoint), str(out), *options]) == 0
    size = out.stat().st_size
    contents = f"3 blocks of WanTransformer3DModel ({how}), 0.00 GB ({size} bytes) in "
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: {contents}")
    assert printed.endswith(" GB/s)\n")
    model = wanoffload.load(
        WanTransformer3DModel,
        checkpoint,
        torch_dtype=torch.bfloat16,
        device="cpu",
        host="disk",
        cache=out,
    )
    assert torch.equal(
        model.blocks[1].attn1.to_q.weight, MODELS["wan22_5b"].make().blocks[1].attn1.to_q.weight
    )
    packed = wanoffload.offloader(model).stats().packed_units
    assert packed == (0 if options else 3)
    assert cli.main(["check", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out} is sound: {contents}")
    assert printed.endswith(", of diffusion_pytorch_model.safetensors\n")


@pytest.mark.parametrize("options", [[], ["--plain"]])
def test_pack_writes_parts_of_blocks_for_models_that_stream_them(
    checkpoint: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = ["pack", str(checkpoint), str(out), "--granularity", "part", *options]
    assert cli.main(asked) == 0
    assert "9 parts of blocks of WanTransformer3DModel" in capsys.readouterr().out
    assert cli.main(["check", str(out)]) == 0
    assert "9 parts of blocks of WanTransformer3DModel" in capsys.readouterr().out
    before = out.stat().st_mtime_ns

    def load(granularity: str) -> torch.nn.Module:
        return wanoffload.load(
            WanTransformer3DModel,
            checkpoint,
            torch_dtype=torch.bfloat16,
            device="cpu",
            host="disk",
            cache=out,
            granularity=granularity,
        )

    assert wanoffload.offloader(load("part")).stats().units == 9
    assert out.stat().st_mtime_ns == before  # it was read
    with pytest.raises(wanoffload.CacheFileError, match="granularity='part' fits it"):
        load("block")


@pytest.mark.parametrize("dtype", arguments.DTYPES)
def test_pack_has_the_choices_of_load(tmp_path: Path, dtype: str) -> None:
    model = MODELS["wan22_5b"].make()
    model.save_pretrained(tmp_path / "model" / "inner", variant="fp16")
    chosen = ["--subfolder", "inner", "--variant", "fp16", "--dtype", dtype, "--plain"]
    assert cli.main(["pack", str(tmp_path / "model"), str(tmp_path / "out"), *chosen]) == 0
    (unit, *_) = CacheFile.open(tmp_path / "out").header.units
    dtypes = {spec.name: str(spec.dtype).removeprefix("torch.") for spec in unit.layout.specs}
    assert dtypes["attn1.to_q.weight"] == dtype
    assert dtypes["scale_shift_table"] == "float32"


def test_a_report_says_what_packing_saves_and_writes_nothing_without_out(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["pack", str(checkpoint), "--report"]) == 0
    table = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    lines = table.splitlines()
    assert " ".join(lines[0].split()) == "tensor of blocks dtype plain packed ratio escapes"
    (row,) = [line for line in lines if line.startswith("ffn.net.0.proj.weight ")]
    assert row.split()[:4] == ["ffn.net.0.proj.weight", "3", "bfloat16", "0.03"]
    (row,) = [line for line in lines if line.startswith("scale_shift_table ")]
    assert row.split()[2:] == ["float32", "0.00", "MB", "0.00", "MB", "1.0000", "-"]
    assert lines[-1].startswith("3 blocks of WanTransformer3DModel: 0.00 GB plain, 0.00 GB packed")
    assert "ratio 0.7975" in lines[-1]
    assert cli.main(["pack", str(checkpoint), str(tmp_path / "out"), "--report"]) == 0
    assert capsys.readouterr().out.startswith(table)
    assert (tmp_path / "out").is_file()


def test_pack_needs_a_file_to_write_and_something_to_pack(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pack", str(checkpoint)]) == 2
    assert "OUT, the file to be written, is missing" in capsys.readouterr().err
    assert cli.main(["pack", str(checkpoint), str(tmp_path / "out"), "--dtype", "float16"]) == 2
    assert "holds bf16 weights in torch.float16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pack_and_check_say_in_one_line_what_is_wrong(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["pack", str(tmp_path / "none"), str(out)]) == 2
    assert "none is neither a folder" in capsys.readouterr().err
    assert cli.main(["pack", str(checkpoint), str(out)]) == 0
    assert cli.main(["pack", str(checkpoint), str(out)]) == 2
    assert f"{out} is there already" in capsys.readouterr().err
    for unit in CacheFile.open(out).header.units[1:]:
        flip(out, unit.offset)
    assert cli.main(["check", str(out)]) == 2
    err = capsys.readouterr().err
    assert "2 of 3 units are spoilt. blocks.1 can't be taken from" in err
    assert "blocks.2 can't be taken from" in err
    assert err.count("\n") == 1
    os.truncate(out, 5000)
    assert cli.main(["check", str(out)]) == 2
    assert "it has 5000 bytes and ends within its header" in capsys.readouterr().err


def test_python_m_runs_the_command() -> None:
    command = [sys.executable, "-m", "wanoffload", "plan", A14B, "--frames", "81"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.endswith("--size is missing\n")


def test_a_plan_needs_no_torch() -> None:
    """So it takes well under a second as a whole process."""
    code = f"""
import sys
from wanoffload.cli import main
command = "plan {A14B} --size 832x480 --frames 81 --vram 24GiB"
assert main(command.split()) == 0
assert main([*command.split(), "--json"]) == 0
assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    text, brace, values = result.stdout.partition("\n{")
    assert "Wan2.2-T2V-A14B" in text
    assert "832x480x81" in text
    printed = json.loads(brace + values)
    assert printed["choices"]["dit_layerwise_offload"] is True  # 57 GB of experts on 24 GiB
    assert printed["choices"]["dit_cpu_offload"] is False
    assert printed["fits"] is True


def test_both_offload_flags_stay_on_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--dit-cpu-offload", "--dit-layerwise-offload", "--json") == 0
    choices = json.loads(capsys.readouterr().out)["choices"]
    assert choices["dit_cpu_offload"] is True
    assert choices["dit_layerwise_offload"] is True
    assert choices["layerwise_offload_components"] == ["dit"]


def test_the_table_in_the_readme_is_what_a_plan_says() -> None:
    sizes = ((480, 832, 1), (480, 832, 17), (480, 832, 81), (720, 1280, 81))
    for height, width, frames in sizes:
        cells = [f"{height}x{width}x{frames}"]
        for memory in ("24GB", "48GB", "80GB", "141GB"):
            made = policy.plan(
                A14B, Workload(height, width, frames), Hardware(device_memory=memory)
            )
            assert made.step_seconds is not None
            assert made.device_peak_bytes is not None
            way = str(taken(made)).replace(", prefetch", "")
            peak = made.device_peak_bytes / 1e9
            cells.append(f"{way}: {made.step_seconds:.3g} s, {peak:.1f} GB")
        assert f"| {' | '.join(cells)} |" in README.read_text()
