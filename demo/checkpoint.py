"""A small Wan2.2-A14B-style checkpoint with random weights, in the folder layout of the hub.

Everything that the real one has is there, only smaller: two experts in bf16 with diffusers' fp32
modules, a UMT5 text encoder and its tokenizer, the VAE with its 16 latent channels, the scheduler.
So the real `WanPipeline` loads it, and whatever works on it is the real way.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import diffusers
import psutil
import torch
import transformers
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from demo import DemoError

RECIPE_VERSION = 1  # raise it whenever this file writes another checkpoint from the same sizes
RECIPE_FILE = "demo_recipe.json"
BOUNDARY_RATIO = 0.875  # Wan2.2 T2V A14B: the first expert runs while t >= 0.875 * 1000
SHARD_SIZE = "32MB"  # small enough that the experts are sharded, as the real ones are
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # in this order they are 0, 1 and 2, as in T5
SENTENCES = (  # only to learn a few merges from; any text can be written in single bytes
    "a red fox walks through fresh snow at dawn, soft light, slow camera",
    "two dancers on a rooftop in the rain, neon signs, reflections in the water",
    "waves break on the rocks below the lighthouse, wide shot, clouds move fast",
    "the chef throws the dough into the air and catches it with both hands",
)

Module = TypeVar("Module", bound=torch.nn.Module)


class CheckpointError(DemoError):
    """The folder can't take the demo's checkpoint; the message says why."""


@dataclass(frozen=True)
class Sizes:
    """What sets the size of the checkpoint. The defaults make experts of about 60 MB each."""

    layers: int = 8
    heads: int = 8
    head_dim: int = 64
    ffn_dim: int = 1536
    text_dim: int = 128
    text_layers: int = 2
    vae_dim: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


TINY = Sizes(layers=3, heads=2, head_dim=32, ffn_dim=128, text_dim=32, text_layers=1, vae_dim=4)


def make_checkpoint(folder: Path, *, seed: int = 0, sizes: Sizes | None = None) -> Path:
    """Write the checkpoint into `folder` unless it is there already, and return the folder.

    A checkpoint of another recipe (sizes, seed, version of this file or of the libraries) is built
    anew. The folder appears whole or not at all: all is written beside it and renamed at the end.

    Raises:
        CheckpointError: `folder` holds something that this function did not write.
    """
    folder = folder.absolute()
    recipe = _recipe(sizes or Sizes(), seed)
    if _recipe_in(folder) == recipe:
        return folder
    _refuse_foreign(folder)
    with _built_beside(folder) as partial:
        _write_components(partial, sizes or Sizes(), seed)
        (partial / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n")
    return folder


def _recipe(sizes: Sizes, seed: int) -> dict[str, object]:
    return {
        "version": RECIPE_VERSION,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "seed": seed,
        "sizes": asdict(sizes),
    }


def _recipe_in(folder: Path) -> object:
    """The recipe that `folder` was made by; None where none can be read."""
    try:
        return json.loads((folder / RECIPE_FILE).read_text())
    except (OSError, ValueError):
        return None


def _refuse_foreign(folder: Path) -> None:
    """Only a checkpoint of the demo, or an empty folder, may be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; name another place for the checkpoint")
    if any(folder.iterdir()) and not (folder / RECIPE_FILE).is_file():
        raise CheckpointError(
            f"{folder} is not empty and was not written by the demo, so it is not replaced; "
            "name another place for the checkpoint"
        )


@contextmanager
def _built_beside(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` if all went well, and is gone if not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(folder)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_left_over(folder: Path) -> None:
    """Remove what builds left that were killed; a build still running keeps its own."""
    for partial in folder.parent.glob(f".{folder.name}.partial-[0-9]*"):
        process = int(partial.name.rpartition("-")[2])
        if process == os.getpid() or not psutil.pid_exists(process):
            shutil.rmtree(partial, ignore_errors=True)


def _write_components(folder: Path, sizes: Sizes, seed: int) -> None:
    tokenizer = _tokenizer()
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=_seeded(seed, lambda: _text_encoder(sizes, len(tokenizer))),
        transformer=_seeded(seed + 1, lambda: _expert(sizes)),
        transformer_2=_seeded(seed + 2, lambda: _expert(sizes)),
        vae=_seeded(seed + 3, lambda: AutoencoderKLWan(base_dim=sizes.vae_dim)),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        boundary_ratio=BOUNDARY_RATIO,
    )
    pipeline.save_pretrained(folder, max_shard_size=SHARD_SIZE)


def _seeded(seed: int, build: Callable[[], Module]) -> Module:
    """`build()` with random weights from `seed`; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def _expert(sizes: Sizes) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_dim,
        ffn_dim=sizes.ffn_dim,
        num_layers=sizes.layers,
        text_dim=sizes.text_dim,
    )
    return _stored_as_on_the_hub(model)


def _stored_as_on_the_hub(model: WanTransformer3DModel) -> WanTransformer3DModel:
    """bf16, but for the modules that diffusers keeps in fp32 when it loads the model."""
    in_fp32 = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if in_fp32.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _text_encoder(sizes: Sizes, vocabulary: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=sizes.text_dim,
        d_kv=sizes.text_dim // 4,
        d_ff=2 * sizes.text_dim,
        num_heads=4,
        num_layers=sizes.text_layers,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config).to(torch.bfloat16)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: every prompt, in any script, is written in known tokens and ends in `END`."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[PAD, END, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=512,
    )
