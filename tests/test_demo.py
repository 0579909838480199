"""The demo: its checkpoint, its command line, and the whole flow with a tiny model."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image

from demo import DemoError, checkpoint, run, source
from demo.checkpoint import TINY, CheckpointError, Sizes, make_checkpoint
from demo.options import Options, parse
from demo.run import main, same_bits, why_resident_does_not_fit
from demo.video import write_video
from demo.worker import Expert, Figures, Job, load
from demo.worker import run as run_in_this_process

CLIP = ["--size", "64x48", "--frames", "5", "--steps", "4"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("demo") / "checkpoint", sizes=TINY)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def files_of(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


# The checkpoint


@pytest.mark.usefixtures("no_network")
def test_checkpoint_loads_offline_as_a_pipeline_with_two_experts(tiny: Path) -> None:
    pipe = load(tiny)
    assert pipe.config.boundary_ratio == 0.875
    assert pipe.vae.config.z_dim == 16
    assert pipe.vae.dtype == torch.float32
    for expert in (pipe.transformer, pipe.transformer_2):
        assert len(expert.blocks) == TINY.layers
        assert expert.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
        assert expert.blocks[0].scale_shift_table.dtype == torch.float32
        assert expert.blocks[0].norm2.weight.dtype == torch.float32
    first, second = (e.blocks[0].attn1.to_q.weight for e in (pipe.transformer, pipe.transformer_2))
    assert not torch.equal(first, second)


def test_checkpoint_stores_the_dtypes_that_loading_gives(tiny: Path) -> None:
    from safetensors import safe_open

    expert = load(tiny).transformer
    with safe_open(tiny / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as stored:
        assert {name: stored.get_tensor(name).dtype for name in stored.keys()} == {  # noqa: SIM118
            name: tensor.dtype for name, tensor in expert.state_dict().items()
        }


@pytest.mark.parametrize(
    "prompt", ["", "a red fox", "Füchsin im Schnee", "雪の中の狐 🦊", "ﬁ\u0000\n\t"]
)
def test_tokenizer_knows_every_prompt(tiny: Path, prompt: str) -> None:
    tokenizer = load(tiny).tokenizer
    tokens = tokenizer(prompt, padding="max_length", max_length=64, truncation=True)
    ids = [i for i, used in zip(tokens.input_ids, tokens.attention_mask, strict=True) if used]
    assert tokenizer.unk_token_id not in ids
    assert ids[-1] == tokenizer.eos_token_id
    assert set(tokens.input_ids[len(ids) :]) == {tokenizer.pad_token_id}


def test_long_prompt_is_cut_and_still_ends(tiny: Path) -> None:
    tokenizer = load(tiny).tokenizer
    ids = tokenizer("狐" * 1000, max_length=512, truncation=True).input_ids
    assert len(ids) == 512
    assert ids[-1] == tokenizer.eos_token_id


def test_same_seed_writes_the_same_files(tiny: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    again = files_of(make_checkpoint(tmp_path / "again", sizes=TINY))
    other = files_of(make_checkpoint(tmp_path / "other", sizes=TINY, seed=1))
    assert again == files_of(tiny)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert other[weights] != again[weights]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_second_call_reuses_the_checkpoint(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_write_components", None)  # calling it would fail
    assert make_checkpoint(tiny, sizes=TINY) == tiny


@pytest.mark.parametrize("change", [{"version": -1}, {"seed": 7}, {"diffusers": "0.0.1"}])
def test_stale_recipe_is_built_anew(tiny: Path, tmp_path: Path, change: dict[str, object]) -> None:
    folder = shutil.copytree(tiny, tmp_path / "checkpoint")
    recipe = folder / checkpoint.RECIPE_FILE
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | change))
    (folder / "left_from_before").touch()
    make_checkpoint(folder, sizes=TINY)
    assert files_of(folder) == files_of(tiny)


def test_other_sizes_are_built_anew(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint", sizes=TINY)
    larger = Sizes(**asdict(TINY) | {"layers": TINY.layers + 1})
    assert len(load(make_checkpoint(tmp_path / "checkpoint", sizes=larger)).transformer.blocks) == 4


def interrupt_while_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(_: object, folder: Path, **__: object) -> None:
        (folder / "transformer").mkdir()
        (folder / "transformer" / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(WanPipeline, "save_pretrained", save)


def test_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_while_saving(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path / "checkpoint", sizes=TINY)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_rebuild_keeps_the_one_before(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "checkpoint")
    interrupt_while_saving(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(folder, sizes=TINY, seed=1)
    assert list(tmp_path.iterdir()) == [folder]
    assert files_of(folder) == files_of(tiny)


def test_next_build_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    process_that_is_no_more = 2**31 - 1
    left = tmp_path / f".checkpoint.partial-{process_that_is_no_more}"
    (left / "transformer").mkdir(parents=True)
    running = tmp_path / ".checkpoint.partial-1"
    running.mkdir()
    make_checkpoint(tmp_path / "checkpoint", sizes=TINY)
    assert not left.exists()
    assert running.exists()


def test_folder_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not written by the demo"):
        make_checkpoint(tmp_path, sizes=TINY)
    with pytest.raises(CheckpointError, match="not a folder"):
        make_checkpoint(tmp_path / "thesis.tex", sizes=TINY)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        Sizes(layers=0)


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "832"], "--size must read like 832x480 (width x height), got '832'"),
        (["--size", "256x-16"], "--size must read like"),
        (["--size", "256x150"], "the height must be a multiple of 16, got 150"),
        (["--size", "0x144"], "the width must be a multiple of 16, got 0"),
        (["--frames", "16"], "--frames must be 4k+1 (1, 5, 9, ...), got 16"),
        (["--frames", "-3"], "--frames must be 4k+1"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--prefetch", "0"], "--prefetch must be at least 1, got 0"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--model", ""], "--model is empty"),
    ],
)
def test_mistake_on_the_command_line_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_real_weights_get_a_real_size_unless_one_is_given() -> None:
    def size(options: Options) -> tuple[int, int, int, int]:
        return options.width, options.height, options.frames, options.steps

    assert size(parse([])) == (256, 144, 17, 8)
    assert size(parse(["--model", "owner/model"])) == (832, 480, 17, 20)
    given = parse(["--model", "owner/model", "--size", "64x32", "--steps", "1", "--frames", "1"])
    assert size(given) == (64, 32, 1, 1)


@pytest.mark.parametrize("name", ["/no/such/folder", "./wan", "~/no_such_model", "wan"])
def test_missing_folder_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", name, "--out", str(tmp_path)]) == 1
    assert f"demo: there is no folder {name}" in capsys.readouterr().err


def test_unknown_hub_id_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> str:
        raise OSError("no route to the hub")

    monkeypatch.setattr(source, "hf_hub_download", unreachable)
    with pytest.raises(DemoError, match=r"no folder owner/model.*no route to the hub"):
        source.find_model("owner/model")


def test_model_of_another_kind_is_refused_before_its_weights_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DemoError, match=r"no model_index\.json"):
        source.find_model(str(tmp_path))
    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "QwenImagePipeline"}')
    with pytest.raises(DemoError, match="no WanPipeline but a QwenImagePipeline"):
        source.find_model(str(tmp_path))
    monkeypatch.setattr(source, "hf_hub_download", lambda *_: str(index))
    with pytest.raises(DemoError, match="no WanPipeline but a QwenImagePipeline"):
        source.find_model("owner/model")
    index.write_text("[]")
    with pytest.raises(DemoError, match="holds no JSON object"):
        source.find_model(str(tmp_path))


def test_size_is_checked_against_the_model(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    config = model / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scale_factor_spatial": 16}))
    arguments = ["--model", str(model), "--size", "64x48", "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "the height must be a multiple of 32, got 48" in capsys.readouterr().err


def test_out_that_is_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").touch()
    assert main(["--out", str(tmp_path / "out")]) == 1
    assert f"--out: {tmp_path / 'out'} can't be made" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--device", "cuda", "--out", str(tmp_path)]) == 1
    assert "torch sees no CUDA device" in capsys.readouterr().err


# The flow


def test_offloaded_and_resident_frames_are_equal(
    device: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path), "--prompt", "a fox 🦊", "--prefetch", "1", *CLIP]
    code = main([*arguments, "--device", device], sizes=TINY)
    printed = capfd.readouterr()
    assert code == 0, printed.err
    assert "frames equal bit for bit: yes" in printed.out
    assert "offloaded: 100%" in printed.err
    assert "resident: 100%" in printed.err
    assert "of blocks of transformer and transformer_2 by wanoffload.load_pipeline" in printed.out

    offloaded = Figures.read(tmp_path / "offloaded.json")
    assert [(expert.name, expert.steps) for expert in offloaded.experts] == [
        ("transformer", 2),
        ("transformer_2", 2),
    ]
    for expert in offloaded.experts:
        assert expert.stats["forwards"] == expert.forwards == 2 * expert.steps  # two passes a step
        assert expert.stats["acquires"] == expert.forwards * TINY.layers
        # Three blocks through two slots: every acquire needs a fetch.
        assert expert.stats["fetches"] >= expert.stats["acquires"]
        block = expert.stats["host_bytes"] / TINY.layers
        assert offloaded.slot_bytes == pytest.approx(2 * block, abs=512)
        assert expert.stats["bytes_fetched"] >= expert.stats["acquires"] * block > 0
    resident = Figures.read(tmp_path / "resident.json")
    assert all(expert.stats == {} for expert in resident.experts)
    for run_figures in (offloaded, resident):
        # Each is a process of its own, in which at least the libraries had to be loaded.
        assert run_figures.host_peak_bytes > 100e6
        on_device = (run_figures.device_free_bytes, run_figures.device_allocated_bytes)
        assert all(on_device) if device == "cuda" else on_device == (None, None)

    frames = np.load(tmp_path / "offloaded.npy")
    assert frames.shape == (5, 48, 64, 3)
    assert frames.std() > 0.01  # a picture, so that equality says something
    assert (tmp_path / "video.mp4").read_bytes()[4:8] == b"ftyp"


def test_model_with_one_transformer_runs_all_steps_on_it(tiny: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    index = model / "model_index.json"
    alone = {"transformer_2": [None, None], "boundary_ratio": None}
    index.write_text(json.dumps(json.loads(index.read_text()) | alone))
    job = Job(
        model=str(model),
        offloaded=True,
        prompt="a fox",
        steps=2,
        frames=1,
        width=32,
        height=32,
        prefetch=1,
        device="cpu",
        seed=0,
        frames_file=str(tmp_path / "frames.npy"),
        figures_file=str(tmp_path / "figures.json"),
    )
    (expert,) = run_in_this_process(job).experts
    assert (expert.name, expert.steps, expert.forwards) == ("transformer", 2, 4)
    assert expert.stats["fetches"] >= 4 * TINY.layers


def figures(**changes: Any) -> Figures:
    stats: dict[str, float] = {
        "forwards": 8,
        "acquires": 24,
        "fetches": 24,
        "bytes_fetched": 240_000,
        "host_bytes": 40_000,
        "locked_bytes": 40_000,
    }
    whole: dict[str, Any] = {
        "device_free_bytes": 200_000,
        "device_allocated_bytes": 9_000,
        "device_reserved_bytes": 10_000,
        "slot_bytes": 3_000,
        "experts": (Expert("transformer", 4, 8, stats),),
    }
    return Figures(**whole | changes)


@pytest.fixture
def pretend_runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figures]:
    """What each run's process leaves behind; a run that is not named here must not start."""
    left: dict[str, Figures] = {}

    def start(name: str, job_file: Path) -> None:
        job = json.loads(job_file.read_text())
        Path(job["figures_file"]).write_text(json.dumps(asdict(left[name])))
        np.save(job["frames_file"], np.zeros((5, 48, 64, 3), dtype=np.float32))

    monkeypatch.setattr(run, "_start", start)
    return left


def test_resident_run_that_does_not_fit_is_skipped_with_the_numbers(
    tiny: Path,
    tmp_path: Path,
    pretend_runs: dict[str, Figures],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend_runs["offloaded"] = figures(
        device_reserved_bytes=5 * 10**9,
        device_free_bytes=24 * 10**9,
        experts=(Expert("transformer", 4, 8, figures().experts[0].stats | {"host_bytes": 57e9}),),
    )
    assert main(["--model", str(tiny), "--out", str(tmp_path), *CLIP]) == 0
    printed = capsys.readouterr().out
    assert "the resident run was skipped" in printed
    assert "63.24 GB of device memory, 24.00 GB are free" in printed
    assert "bit for bit" not in printed


def test_resident_run_that_runs_out_of_memory_is_skipped(
    tiny: Path,
    tmp_path: Path,
    pretend_runs: dict[str, Figures],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend_runs["offloaded"] = figures()
    pretend_runs["resident"] = Figures(out_of_memory="CUDA out of memory. Tried 2 GiB")
    assert main(["--model", str(tiny), "--out", str(tmp_path), *CLIP]) == 0
    assert "was skipped, so nothing was compared: CUDA out of memory" in capsys.readouterr().out


def test_offloaded_run_that_runs_out_of_memory_is_an_error(
    tiny: Path,
    tmp_path: Path,
    pretend_runs: dict[str, Figures],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend_runs["offloaded"] = Figures(out_of_memory="CUDA out of memory. Tried 2 GiB")
    assert main(["--model", str(tiny), "--out", str(tmp_path), *CLIP]) == 1
    assert "the offloaded run ran out of device memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        ({"fetches": 0}, "transformer ran 4 steps but fetched nothing"),
        ({"acquires": 0}, "transformer ran 4 steps but fetched nothing"),
        ({"forwards": 0}, "transformer had 8 forwards, the offloader saw 0"),
    ],
)
def test_run_that_did_not_stream_is_an_error(
    tiny: Path,
    tmp_path: Path,
    pretend_runs: dict[str, Figures],
    capsys: pytest.CaptureFixture[str],
    stats: dict[str, float],
    message: str,
) -> None:
    whole = figures().experts[0].stats | stats
    pretend_runs["offloaded"] = figures(experts=(Expert("transformer", 4, 8, whole),))
    assert main(["--model", str(tiny), "--out", str(tmp_path), *CLIP]) == 1
    assert message in capsys.readouterr().err


def test_run_that_fails_is_an_error(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    shutil.rmtree(model / "text_encoder")
    assert main(["--model", str(model), "--out", str(tmp_path / "out"), *CLIP]) == 1
    printed = capfd.readouterr().err
    assert "Traceback" in printed
    assert "demo: the offloaded run failed" in printed


def test_resident_run_fits_up_to_the_last_byte() -> None:
    need = int((10_000 + 40_000 - 3_000) * run.FIT_MARGIN)
    assert why_resident_does_not_fit(figures(device_free_bytes=need)) is None
    assert why_resident_does_not_fit(figures(device_free_bytes=need - 1)) is not None
    assert why_resident_does_not_fit(Figures()) is None  # the device is the host's memory


def test_equal_means_every_bit() -> None:
    frames = np.array([[0.0, 1.0]], dtype=np.float32)
    assert same_bits(frames, frames.copy())
    assert not same_bits(frames, np.array([[-0.0, 1.0]], dtype=np.float32))
    assert not same_bits(frames, frames.T)
    assert not same_bits(frames, frames.astype(np.float64))


def test_frames_that_differ_fail_the_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = np.full((5, 48, 64, 3), 0.5, dtype=np.float32)
    np.save(tmp_path / "offloaded.npy", frames)
    frames[3, 2, 1, 0] = np.nextafter(np.float32(0.5), np.float32(1))
    np.save(tmp_path / "resident.npy", frames)
    assert run.verdict(tmp_path) == 1
    printed = capsys.readouterr().out
    assert "frames equal bit for bit: no" in printed
    assert f"1 of {frames.size} values differ, by at most 5.96e-08" in printed


def test_frames_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    for name in ("offloaded", "resident"):
        np.save(tmp_path / f"{name}.npy", np.full((1, 2, 2, 3), np.nan, dtype=np.float32))
    with pytest.raises(DemoError, match="no numbers"):
        run.verdict(tmp_path)


def test_without_ffmpeg_the_video_is_a_webp_and_the_demo_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("demo.video.find_spec", lambda name: None if "ffmpeg" in name else name)
    frames = np.random.default_rng(0).random((5, 48, 64, 3), dtype=np.float32)
    np.save(tmp_path / "offloaded.npy", frames)
    run._write_video(tmp_path, "offloaded", "video")
    assert "imageio-ffmpeg is not installed" in capsys.readouterr().out
    with Image.open(tmp_path / "video.webp") as video:
        assert getattr(video, "n_frames", 1) == 5
        assert video.size == (64, 48)


@pytest.mark.parametrize("count", [1, 5])
def test_video_is_an_mp4(tmp_path: Path, count: int) -> None:
    path = write_video(np.zeros((count, 48, 64, 3), dtype=np.float32), tmp_path, "video")
    assert path.read_bytes()[4:8] == b"ftyp"
