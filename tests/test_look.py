"""Looking at models: in memory, in folders, and by the ids of published ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    WanAnimatePipeline,
    WanImageToVideoPipeline,
    WanPipeline,
    WanVACEPipeline,
    WanVideoToVideoPipeline,
)
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

import wanoffload
from demo.checkpoint import TINY, make_checkpoint
from tests.small_models import MODELS
from wanoffload.facts.folder import look_at_folder
from wanoffload.facts.look import look
from wanoffload.facts.model import MOVA, OTHER, QWEN_IMAGE, WAN, ModelFacts
from wanoffload.facts.parts import model_facts
from wanoffload.facts.published import PUBLISHED
from wanoffload.image import lay_out
from wanoffload.units import find_units
from wanoffload.workload import Workload


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An A14B pipeline in the hub's layout."""
    return make_checkpoint(tmp_path_factory.mktemp("look") / "checkpoint", sizes=TINY)


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def loaded(checkpoint: Path) -> WanPipeline:
    """As Wan's pipelines are loaded: bf16, the VAE in fp32."""
    vae = AutoencoderKLWan.from_pretrained(checkpoint, subfolder="vae", torch_dtype=torch.float32)
    return WanPipeline.from_pretrained(checkpoint, vae=vae, torch_dtype=torch.bfloat16)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler()


def umt5() -> UMT5EncoderModel:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 4, "num_layers": 2}
    return UMT5EncoderModel(UMT5Config(**sizes, vocab_size=50)).to(torch.bfloat16)


def clip() -> CLIPVisionModel:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    config = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=4)
    return CLIPVisionModel(config).to(torch.bfloat16)


def wan_pipeline(kind: type = WanPipeline, **parts: Any) -> Any:
    """A pipeline of this class around small parts; tokenizer and the like left out."""
    empty = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": scheduler()}
    return kind(**{**empty, **parts})


# Published models.


@pytest.mark.parametrize(
    ("name", "gb", "blocks", "first_mb", "other_mb"),
    [
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", 28.64, 40, 702.87, 520),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 28.64, 40, 702.87, 520),
        ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", 32.85, 40, 807.76, 538),
        ("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", 32.85, 40, 807.76, 538),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 2.84, 30, 92.91, 57),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", 10.02, 30, 327.36, 201),
        ("Wan-AI/Wan2.1-VACE-14B-diffusers", 34.73, 48, 807.75, 524),
        ("Wan-AI/Wan2.2-Animate-14B-Diffusers", 34.61, 48, 807.76, 619),
    ],
)
def test_published_models_weigh_what_the_real_ones_were_seen_to(
    name: str, gb: float, blocks: int, first_mb: float, other_mb: float
) -> None:
    dit = look(name).dits[0]
    assert dit.bytes / 1e9 == pytest.approx(gb, abs=0.006)
    assert len(dit.block_bytes) == blocks
    assert dit.block_bytes[0] / 1e6 == pytest.approx(first_mb, abs=0.006)
    assert dit.other_bytes / 1e6 == pytest.approx(other_mb, abs=1.5)


def test_blocks_of_vace_and_animate_stand_in_the_order_of_use() -> None:
    vace = look("Wan-AI/Wan2.1-VACE-14B-diffusers").dits[0].block_bytes
    assert [round(size / 1e6) for size in vace[:9]] == [808, *[755] * 7, 703]
    animate = look("Wan-AI/Wan2.2-Animate-14B-Diffusers").dits[0].block_bytes
    assert [round(size / 1e6) for size in animate[:8]] == [808, 210, *[808] * 5, 210]


def test_parts_of_published_pipelines_weigh_what_the_real_ones_do() -> None:
    facts = look("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers")
    assert facts.text_encoder is not None
    assert facts.text_encoder.bytes / 1e9 == pytest.approx(11.36, abs=0.005)
    assert len(facts.text_encoder.block_bytes) == 24
    assert facts.vae is not None
    assert facts.vae.bytes / 1e9 == pytest.approx(0.51, abs=0.005)
    assert facts.image_encoder is not None
    assert len(facts.image_encoder.block_bytes) == 32
    assert look("Qwen/Qwen-Image-Edit-2509").dits[0].bytes / 2**30 == pytest.approx(38.1, abs=0.06)


def test_published_ids_say_kind_and_experts() -> None:
    for name in PUBLISHED:
        facts = look(name)
        assert facts.name == name
        assert facts.a14b == ("A14B" in name)
        assert len(facts.dits) == (2 if facts.a14b else 1)
        assert facts.family == (WAN if "Wan" in name else QWEN_IMAGE)
        assert all(dit.matmul_flops_per_token > 0 for dit in facts.dits)


def test_an_id_is_found_whatever_its_case() -> None:
    assert look("wan-ai/wan2.1-t2v-14b-diffusers") == look("Wan-AI/Wan2.1-T2V-14B-Diffusers")


def test_an_unknown_id_is_told_which_are_known_and_that_a_folder_works() -> None:
    with pytest.raises(ValueError, match=r"'Wan-AI/Wan9'.*Wan2.2-T2V-A14B-Diffusers.*local folder"):
        look("Wan-AI/Wan9")


@pytest.mark.parametrize("name", ["Wan-AI/Wan2.2-T2V-A14B", "wan2.2-t2v-a14b-diffusers"])
def test_a_name_close_to_a_published_id_is_told_that_id(name: str) -> None:
    with pytest.raises(ValueError, match=r"did you mean Wan-AI/Wan2\.2-T2V-A14B-Diffusers\?"):
        look(name)


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_not_the_current_folder(name: str) -> None:
    with pytest.raises(ValueError, match="the name is empty"):
        look(name)


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", (480, 832, 81), 32760),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", (480, 832, 1), 1560),
        # The pipeline makes 81 frames of 80 to 83, and 17 of 19.
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", (480, 832, 80), 32760),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", (480, 832, 83), 32760),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", (480, 832, 19), 7800),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", (704, 1280, 121), 27280),
        ("Qwen/Qwen-Image", (1024, 1024, 1), 4096),
        ("Qwen/Qwen-Image-Edit-2509", (1024, 1024, 1), 8192),
        # A segment of 77 frames and the reference, however long the video.
        ("Wan-AI/Wan2.2-Animate-14B-Diffusers", (480, 832, 200), 32760),
    ],
)
def test_tokens_of_a_forward_follow_from_the_size(
    name: str, size: tuple[int, int, int], tokens: int
) -> None:
    assert look(name).tokens(Workload(*size)) == tokens


# In memory.


def image_sizes(module: nn.Module) -> tuple[int, ...]:
    units = find_units(module)
    groups = [[(group[0].name, group[0].tensor) for group in unit.groups] for unit in units]
    return tuple(lay_out(group).nbytes for group in groups)


def test_model_facts_are_returned_as_they_are() -> None:
    facts = ModelFacts("mine", WAN)
    assert look(facts) is facts


@pytest.mark.parametrize("name", MODELS)
def test_a_bare_transformer_is_known_by_its_class_and_weighed(name: str) -> None:
    model = MODELS[name].make()
    facts = look(model)
    assert facts.family == (QWEN_IMAGE if "qwen" in name else WAN)
    assert not facts.a14b
    assert facts.dits[0].block_bytes == image_sizes(model)
    assert facts.dits[0].bytes >= sum(p.nbytes for p in model.parameters())
    assert facts.dits[0].matmul_flops_per_token > 0


def test_a_subclass_of_a_known_transformer_has_its_formulas() -> None:
    class Mine(type(MODELS["wan21_t2v"].make())):  # type: ignore[misc]
        pass

    model = MODELS["wan21_t2v"].make()
    expected = look(model).dits
    model.__class__ = Mine
    assert look(model).dits == expected


@pytest.mark.parametrize("granularity", ["block", "part"])
@pytest.mark.parametrize("name", ["wan21_t2v", "animate"])
def test_a_wrapped_transformer_has_the_facts_that_it_had_before(
    name: str, granularity: str
) -> None:
    model = MODELS[name].make()
    before = look(model)
    wanoffload.wrap(model, device="cpu", granularity=granularity)
    assert look(model) == before
    wanoffload.unwrap(model)
    assert look(model) == before


def test_compiled_blocks_are_seen() -> None:
    model = MODELS["wan21_t2v"].make()
    assert not look(model).dits[0].compiled
    model.blocks[1].compile()
    assert look(model).dits[0].compiled


def test_a_model_on_the_meta_device_has_the_facts_of_the_real_one() -> None:
    model = MODELS["vace"].make()
    assert look(MODELS["vace"].make().to("meta")) == look(model)


def test_a_pipeline_is_weighed_part_by_part() -> None:
    text, image, vae = umt5(), clip(), AutoencoderKLWan(base_dim=4)
    dit = MODELS["wan21_i2v"].make()
    parts = {"text_encoder": text, "image_encoder": image, "vae": vae, "transformer": dit}
    facts = look(wan_pipeline(WanImageToVideoPipeline, **parts, image_processor=None))
    assert facts.dits[0].block_bytes == image_sizes(dit)
    assert facts.text_encoder is not None
    assert facts.text_encoder.block_bytes == image_sizes(text.encoder)
    assert facts.text_encoder.other_bytes == (50 + 1) * 16 * 2
    assert facts.image_encoder is not None
    assert facts.image_encoder.block_bytes == image_sizes(image.encoder)
    assert facts.vae is not None
    assert facts.vae.block_bytes == ()
    assert facts.vae.bytes == sum(p.nbytes for p in vae.parameters())
    assert facts.vae.activation_bytes_per_pixel > 0


@pytest.mark.parametrize("kind", [WanPipeline, WanImageToVideoPipeline])
@pytest.mark.parametrize(
    ("experts", "boundary", "a14b"),
    [
        (("transformer", "transformer_2"), 0.9, True),
        (("transformer",), 0.9, True),
        (("transformer_2",), 0.9, True),
        (("transformer", "transformer_2"), None, True),
        (("transformer",), None, False),
    ],
)
def test_a14b_is_told_by_its_boundary_or_its_second_expert(
    kind: type, experts: tuple[str, ...], boundary: float | None, a14b: bool
) -> None:
    none = {"transformer": None, "transformer_2": None}
    parts = {**none, **{name: MODELS["wan22_i2v"].make() for name in experts}}
    if kind is WanImageToVideoPipeline:
        parts |= {"image_encoder": None, "image_processor": None}
    facts = look(wan_pipeline(kind, **parts, boundary_ratio=boundary))
    assert facts.a14b is a14b
    assert len(facts.dits) == len(experts)
    assert (facts.text_encoder, facts.image_encoder, facts.vae) == (None, None, None)


def mova(**parts: Any) -> Any:
    """A stand-in for a pipeline that is not of diffusers, built from Wan's parts."""
    kind = type("MOVAPipeline", (), {})
    pipe = kind()
    pipe.components, pipe.config = parts, {"boundary_ratio": 0.9}
    return pipe


def test_the_family_is_that_of_the_pipeline_and_not_of_its_parts() -> None:
    dit, parts = MODELS["wan21_t2v"].make(), {}
    for kind in (WanPipeline, WanVideoToVideoPipeline):
        assert look(wan_pipeline(kind, transformer=dit, **parts)).family == WAN
    vace = MODELS["vace"].make()
    assert look(wan_pipeline(WanVACEPipeline, transformer=vace)).family == WAN
    facts = look(mova(video_dit=dit, video_dit_2=dit, vae=None))
    assert (facts.family, facts.a14b, len(facts.dits)) == (MOVA, False, 2)

    class SomeonesPipeline(WanPipeline):
        pass

    facts = look(wan_pipeline(SomeonesPipeline, transformer=dit, transformer_2=dit))
    assert (facts.family, facts.a14b) == (WAN, True)
    stranger = wan_pipeline(QwenImagePipeline, transformer=dit, vae=None)
    assert look(stranger).family == QWEN_IMAGE


def test_animate_and_qwen_pipelines_are_looked_at_too() -> None:
    parts = {"image_encoder": clip(), "image_processor": None}
    facts = look(wan_pipeline(WanAnimatePipeline, transformer=MODELS["animate"].make(), **parts))
    assert (facts.family, facts.segment_frames, facts.reference_frames) == (WAN, 77, 1)
    vae, dit = AutoencoderKLQwenImage(base_dim=4), MODELS["qwen_image"].make()
    facts = look(wan_pipeline(QwenImagePipeline, transformer=dit, vae=vae))
    assert (facts.family, facts.pixels_per_token, facts.token_factor) == (QWEN_IMAGE, 16, 1.0)
    edit = wan_pipeline(QwenImageEditPlusPipeline, transformer=dit, vae=vae, processor=None)
    assert look(edit).token_factor == 2.0


def test_expand_timesteps_is_taken_from_the_pipeline() -> None:
    dit = MODELS["wan22_5b"].make()
    each = look(wan_pipeline(transformer=dit, expand_timesteps=True)).dits[0]
    once = look(wan_pipeline(transformer=dit, expand_timesteps=False)).dits[0]
    assert once.activation_bytes_per_token < each.activation_bytes_per_token
    assert once.block_bytes == each.block_bytes


def test_dmd_denoising_steps_are_found_in_each_config_that_may_hold_them() -> None:
    steps = (1000, 757, 522)

    for where in ("transformer", "scheduler"):
        pipe = wan_pipeline(transformer=MODELS["wan21_t2v"].make())
        assert look(pipe).dmd_denoising_steps is None
        getattr(pipe, where).register_to_config(dmd_denoising_steps=list(steps))
        assert look(pipe).dmd_denoising_steps == steps
    other = mova(transformer=MODELS["wan21_t2v"].make())
    other.config = {"dmd_denoising_steps": list(steps)}
    assert look(other).dmd_denoising_steps == steps


def test_marks_of_cache_dit_are_seen_on_transformer_pipeline_and_blocks() -> None:
    dit = MODELS["wan21_t2v"].make()
    pipe = wan_pipeline(transformer=dit)
    assert not look(pipe).cache_dit
    dit._is_cached = True  # type: ignore[assignment]
    assert look(pipe).cache_dit
    assert look(dit).cache_dit
    del dit._is_cached
    pipe._context_manager = object()
    assert look(pipe).cache_dit
    del pipe._context_manager
    assert not look(pipe).cache_dit
    dit.blocks[0].__class__ = type(
        "CachedBlock", (type(dit.blocks[0]),), {"__module__": "cache_dit.x"}
    )
    assert look(pipe).cache_dit


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_parameters_that_are_dtensors_make_a_model_sharded(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dit = MODELS["wan21_t2v"].make()
    before = look(dit)
    assert not before.sharded
    weight = dit.blocks[0].ffn.net[2].weight
    mesh = init_device_mesh("cpu", (1,))
    sharded = nn.Parameter(distribute_tensor(weight.data, mesh, [Shard(0)]), requires_grad=False)
    dit.blocks[0].ffn.net[2].weight = sharded
    assert look(dit) == replace(before, sharded=True)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a diffusers pipeline.*not int"):
        look(3)
    with pytest.raises(ValueError, match="not SimpleNamespace"):
        look(SimpleNamespace())


# In folders.


def test_a_folder_with_weights_has_the_facts_of_the_loaded_pipeline(checkpoint: Path) -> None:
    expected = replace(look(loaded(checkpoint)), name=str(checkpoint))
    assert look(checkpoint) == expected
    assert look(str(checkpoint)) == expected


def test_a_folder_without_weights_has_the_same_facts(checkpoint: Path, folder: Path) -> None:
    for file in folder.rglob("*.safetensors*"):
        file.unlink()
    assert look(folder) == replace(look(checkpoint), name=str(folder))


def test_bytes_are_those_of_a_load_in_bf16_whatever_the_checkpoint_was_saved_in(
    checkpoint: Path, tmp_path: Path
) -> None:
    pipe = loaded(checkpoint)
    for part in (pipe.transformer, pipe.transformer_2, pipe.text_encoder):
        for parameter in part.parameters():
            parameter.data = parameter.data.float()
    pipe.save_pretrained(tmp_path)
    assert look(tmp_path) == replace(look(checkpoint), name=str(tmp_path))


def test_bf16_bytes_are_those_of_the_blocks_and_none_after_a_load_in_another_dtype(
    checkpoint: Path,
) -> None:
    transformer = loaded(checkpoint).transformer
    tensors = [group[0].tensor for unit in find_units(transformer) for group in unit.groups]
    bf16 = sum(tensor.nbytes for tensor in tensors if tensor.dtype == torch.bfloat16)
    fp32 = sum(tensor.nbytes for tensor in tensors if tensor.dtype == torch.float32)
    assert look(checkpoint).dits[0].bf16_bytes == bf16 > fp32 > 0
    for dtype in ("F16", "F32"):
        parts = look_at_folder(checkpoint, dtypes={"transformer": dtype})
        assert model_facts(parts).dits[0].bf16_bytes == 0
        assert look(transformer.to(torch.float16)).dits[0].bf16_bytes == 0
    text_encoder = look(checkpoint).text_encoder
    assert text_encoder is not None
    assert text_encoder.bf16_bytes == 0  # encoders are not packed


@pytest.mark.parametrize("name", MODELS)
def test_blocks_in_a_folder_stand_in_the_order_of_the_units(name: str, tmp_path: Path) -> None:
    model = MODELS[name].make()
    model.save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    index = {"_class_name": "Any", "transformer": ["diffusers", type(model).__name__]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert look(tmp_path).dits[0] == look(model).dits[0]


def test_components_that_were_left_out_are_none(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer": [None, None], "vae": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "vae")
    facts = look(folder)
    assert (len(facts.dits), facts.a14b, facts.vae) == (1, True, None)


def test_dmd_denoising_steps_are_found_in_model_index_and_scheduler(folder: Path) -> None:
    for file in ("scheduler/scheduler_config.json", "model_index.json"):
        config = json.loads((folder / file).read_text())
        assert look(folder).dmd_denoising_steps is None
        (folder / file).write_text(json.dumps({**config, "dmd_denoising_steps": [1000, 500]}))
        assert look(folder).dmd_denoising_steps == (1000, 500)
        (folder / file).write_text(json.dumps(config))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder .*nowhere"):
        look(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"):
        look(tmp_path / "file")


def test_a_folder_without_model_index_is_told_what_is_expected(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"transformer has no model_index.json"):
        look(folder / "transformer")


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
def test_broken_json_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text('{"_class_name": ')
    with pytest.raises(ValueError, match=rf"{name} can't be read as JSON"):
        look(folder)
    (folder / name).write_text("[]")
    with pytest.raises(ValueError, match=rf"{name} holds no JSON object"):
        look(folder)


def test_a_missing_config_is_named(folder: Path) -> None:
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"vae/config.json is missing"):
        look(folder)


@pytest.mark.parametrize("keep", [0, 4, 20, 3000])
def test_a_truncated_file_of_weights_is_named(folder: Path, keep: int) -> None:
    file = next((folder / "vae").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"vae/{file.name} can't be read, is it complete"):
        look(folder)


def test_a_missing_shard_is_named(tmp_path: Path, folder: Path) -> None:
    shutil.rmtree(folder / "transformer")
    MODELS["wan21_t2v"].make().save_pretrained(folder / "transformer", max_shard_size="20KB")
    shard = sorted((folder / "transformer").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"transformer lacks {shard.name}"):
        look(folder)


def test_several_files_without_an_index_are_not_guessed_among(folder: Path) -> None:
    file = next((folder / "vae").glob("*.safetensors"))
    shutil.copy(file, file.with_name("other.safetensors"))
    with pytest.raises(ValueError, match=r"other.safetensors and no index"):
        look(folder)


def test_a_variant_beside_the_model_is_not_counted(checkpoint: Path, folder: Path) -> None:
    file = next((folder / "vae").glob("*.safetensors"))
    shutil.copy(file, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert look(folder) == replace(look(checkpoint), name=str(folder))


def test_unknown_classes_with_weights_are_weighed_as_stored(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "SomePipeline", "transformer": ["diffusers", "SomeTransformer"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    facts = look(folder)
    assert (facts.family, facts.a14b) == (OTHER, False)
    assert facts.dits[0].block_bytes == facts.dits[1].block_bytes
    assert facts.dits[0].matmul_flops_per_token == 0


def test_unknown_classes_without_weights_are_refused_by_name(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "SomeTransformer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    for file in (folder / "transformer").glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ValueError, match="no formula for the transformer class 'SomeTransformer'"):
        look(folder)


def test_folders_and_ids_are_looked_at_without_torch(checkpoint: Path) -> None:
    code = f"""
import sys
from wanoffload.facts.folder import look_at_folder
from wanoffload.facts.look import look
assert look("Wan-AI/Wan2.2-T2V-A14B-Diffusers").a14b
assert look({str(checkpoint)!r}).a14b
assert "torch" not in sys.modules, "torch was imported"
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
