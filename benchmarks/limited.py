"""Case ``limited``: a DiT of 38 GiB in a process that may take 31.36 GiB of device memory.

The shapes are those of Qwen-Image-Edit-2509, the weights random, the limit a card's of 32 GB.
The transformer alone: moved to the device it runs out of memory; with both flags chosen, and with
nothing chosen, it loads and runs, and gives the output of the resident model without the limit.
"""

from __future__ import annotations

import gc
from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Session, code_fingerprint, say
from benchmarks.models import Staging

NAME = "limited"
HELP = "a DiT of 38 GiB under a limit of 31.36 GiB of device memory, by enable()"
LIMIT_BYTES = int(31.36 * 2**30)
CEILING_BYTES = 25 * 2**30
SIDE = 64  # latent patches of a 1024 x 1024 image, twice: the image to edit, and the edited one
TEXT_TOKENS = 512
TREATMENTS: dict[str, dict[str, Any] | None] = {
    "to(device)": None,
    "enable(), both flags chosen": {"dit_cpu_offload": True, "dit_layerwise_offload": True},
    "enable(), nothing chosen": {},
}


def add_options(parser: ArgumentParser) -> None:
    """No options of its own."""


def run(session: Session) -> None:
    """Measures the missing treatments; needs a GPU with room for the resident model."""
    fingerprint = code_fingerprint(session.options.label)
    wanted = {
        name: choices
        for name, choices in TREATMENTS.items()
        if session.missing(NAME, {"treatment": name}, fingerprint)
    }
    if not wanted:
        return
    if session.device.type != "cuda":
        session.failures.append(f"{NAME}: the limit is one of CUDA; this needs a GPU")
        return
    bench = Limited(session.device, {})
    for name, choices in wanted.items():
        values = bench.measure(choices)
        session.record(NAME, {"treatment": name}, fingerprint, values)
        say(f"{name}: {values}")


@dataclass(frozen=True)
class Outcome:
    """What a treatment led to; bytes of device memory at the peak, loading included."""

    fits: bool
    equal: bool
    allocated: int
    reserved: int


class Limited:
    """The model in host memory, and what it gave when it was resident and unlimited."""

    def __init__(self, device: torch.device, config: dict[str, Any]) -> None:
        self._device = device
        model = _random_model(device, config)
        self._inputs = _inputs(device, model)
        self._expected = self._forward(model)
        self._weights = sum(parameter.nbytes for parameter in model.parameters())
        say(f"resident output of {self._weights / 2**30:.2f} GiB; moving it to the host")
        self._model = _to_host(model, device)

    def measure(self, choices: dict[str, Any] | None) -> dict[str, Any]:
        """A row: what happens under the limit, with these choices, or without offload (None)."""
        total = torch.cuda.get_device_properties(self._device).total_memory
        torch.cuda.set_per_process_memory_fraction(LIMIT_BYTES / total, self._device)
        try:
            outcome = self._outcome(choices)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)
        as_asked = not outcome.fits
        if choices is not None:
            as_asked = outcome.fits and outcome.equal and outcome.reserved < CEILING_BYTES
        return {
            "verified": as_asked,
            "weights": self._weights,
            "limit": LIMIT_BYTES,
            "ceiling": CEILING_BYTES,
            "fits": outcome.fits,
            "equal": outcome.equal,
            "allocated_peak": outcome.allocated,
            "reserved_peak": outcome.reserved,
        }

    def _outcome(self, choices: dict[str, Any] | None) -> Outcome:
        _free()
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            output = self._run(choices)
        except torch.OutOfMemoryError as error:
            say(f"out of memory, as a card of this size would be: {error}")
            output = None
        equal = output is not None and torch.equal(output, self._expected)
        peak = torch.cuda.max_memory_allocated(self._device)
        reserved = torch.cuda.max_memory_reserved(self._device)
        return Outcome(output is not None, equal, peak, reserved)

    def _run(self, choices: dict[str, Any] | None) -> torch.Tensor:
        if choices is None:
            try:
                return self._forward(self._model.to(self._device))
            finally:
                self._model.to("cpu")
        import wanoffload

        wanoffload.enable(self._model, **choices)
        try:
            return self._forward(self._model)
        finally:
            wanoffload.disable(self._model)

    @torch.inference_mode()
    def _forward(self, model: nn.Module) -> torch.Tensor:
        output: torch.Tensor = model(**self._inputs, return_dict=False)[0]
        torch.cuda.synchronize(self._device)
        return output


def _random_model(device: torch.device, config: dict[str, Any]) -> nn.Module:
    """Qwen's transformer in bf16; what a config leaves out is as published."""
    from diffusers import QwenImageTransformer2DModel
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    make: Any = QwenImageTransformer2DModel
    with torch.device("meta"):
        model = make(**config).to(torch.bfloat16)
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(20260101)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    rope = model.config
    model.pos_embed = QwenEmbedRope(
        theta=10000, axes_dim=list(rope.axes_dims_rope), scale_rope=True
    )
    made: nn.Module = model.requires_grad_(False).eval()
    return made


def _to_host(model: nn.Module, device: torch.device) -> nn.Module:
    """Moves the weights to ordinary host memory, one tensor at a time, and frees the device's."""
    staging = Staging(device, max(parameter.nbytes for parameter in model.parameters()))
    for parameter in model.parameters():
        parameter.data = staging.to_host(parameter.data)
    _free()
    return model


def _inputs(device: torch.device, model: Any) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)

    config = model.config
    return {
        "hidden_states": draw(1, 2 * SIDE * SIDE, config.in_channels),
        "encoder_hidden_states": draw(1, TEXT_TOKENS, config.joint_attention_dim),
        "encoder_hidden_states_mask": torch.ones(1, TEXT_TOKENS, dtype=torch.bool, device=device),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16, device=device),
        "img_shapes": [[(1, SIDE, SIDE)] * 2],
    }


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
