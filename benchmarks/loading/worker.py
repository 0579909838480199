"""The process in which a model is loaded and run, told what to do over a pipe, one thing at a time.

Started by :mod:`benchmarks.loading.remote`. What is answered are plain values.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
import traceback
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import machine
from benchmarks.contenders import RESIDENT, Counters, Wanoffload, by_name
from benchmarks.engine import backend_for
from benchmarks.loading import cgroup, host_rates
from benchmarks.memory import digest_of
from benchmarks.models import MODELS, Inputs, ModelSpec, Size, forward, make_inputs, model_bytes
from benchmarks.timing import Clock

COMMANDS = ("prepare", "host_rates", "load", "forwards", "memory", "group")


class Worker:
    """What a process holds: a device, and up to two models that take turns (A14B's experts)."""

    def __init__(self, name: str, spec: ModelSpec, device: torch.device) -> None:
        self._contender = None if name == RESIDENT else by_name(name)
        self._spec = spec
        self._weights = model_bytes(spec)
        self._device = device
        self._clock = Clock(device)
        self._models: dict[str, nn.Module] = {}

    def prepare(self) -> dict[str, float]:
        """What must not count as loading: libraries imported, the device's context made.

        The moments (``time.monotonic``) when each was there.
        """
        from diffusers import WanTransformer3DModel  # noqa: F401

        if isinstance(self._contender, Wanoffload):
            import wanoffload  # noqa: F401

        imported = time.monotonic()
        torch.ones(8, 8, device=self._device) @ torch.ones(8, 8, device=self._device)
        self._clock.synchronize()
        return {"imported": imported, "ready": time.monotonic()}

    def host_rates(self, files: list[Path], image_bytes: int) -> dict[str, Any]:
        """See :func:`benchmarks.loading.host_rates.measure`."""
        return host_rates.measure(backend_for(self._device), files, image_bytes)

    def load(self, folder: Path, subfolder: str, **options: Any) -> dict[str, Any]:
        """Brings the checkpoint to where the contender runs it from. Seconds, bytes."""
        before, used = machine.ProcessBytes.now(), machine.host_used_bytes()
        rss = machine.rss_bytes()
        with machine.watch_rss() as peak:
            model, seconds = self._clock.timed(lambda: self._bring(folder, subfolder, options))
        self._models[subfolder] = model
        return {
            "load_s": seconds,
            "rss_before": rss,
            "rss_peak": peak.peak_bytes,
            "rss_peak_method": peak.method,
            "own_before": before.own,
            "own_peak": peak.own_bytes,
            "own_after": machine.ProcessBytes.now().own,
            "host_used": machine.host_used_bytes() - used,
        }

    def _bring(self, folder: Path, subfolder: str, options: dict[str, Any]) -> nn.Module:
        from diffusers import WanTransformer3DModel

        contender = self._contender
        if isinstance(contender, Wanoffload):
            return contender.load(WanTransformer3DModel, folder, subfolder, self._device, **options)
        model: nn.Module = WanTransformer3DModel.from_pretrained(
            folder, subfolder=subfolder, torch_dtype=torch.bfloat16
        )
        if contender is None:
            return self._resident(model)
        contender.apply(model, self._device)
        return model

    def _resident(self, model: nn.Module) -> nn.Module:
        """In memory of its own: tensors of a mapped file are aligned to 8 bytes, with which
        kernels of the CPU round in another way."""
        if self._device.type == "cpu":
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        return model.to(self._device)

    @torch.inference_mode()
    def forwards(
        self,
        size: Size,
        count: int,
        subfolder: str = "transformer",
        warm: int = 2,
        at: float | None = None,
        budget_s: float = math.inf,
    ) -> dict[str, Any]:
        """``warm`` forwards and ``count`` measured ones behind them, without a wait between.

        The two texts take turns, and ``digest`` is of the last output of each. ``at``: not begun
        before this moment of ``time.monotonic``, so that several processes begin together.
        ``budget_s``: about how long they may take; one is measured whatever it is.
        """
        model = self._models[subfolder]
        inputs = make_inputs(self._spec, size, self._device)
        before = self._counts(model)
        self._clock.synchronize()
        time.sleep(max(0.0, at - time.monotonic()) if at else 0.0)
        marks, outputs = self._run(model, inputs, warm, count, budget_s)
        self._clock.synchronize()
        ended = time.monotonic()
        return {
            "forward_ms": self._clock.between_ms(marks),
            "ended": ended,
            "digest": digest_of(outputs),
            "finite": all(bool(output.isfinite().all()) for output in outputs),
            "fetches_right": self._fetched(before, self._counts(model), warm + len(marks) - 1),
        }

    def _run(
        self, model: nn.Module, inputs: Inputs, warm: int, count: int, budget_s: float
    ) -> tuple[list[Any], list[torch.Tensor]]:
        """Marks around the measured forwards, and the last output of each text.

        The host's time is what the budget is compared with: where it runs far ahead of the device,
        forwards are short, and ``count`` ends them.
        """
        marks: list[Any] = []
        outputs: dict[str, torch.Tensor] = {}
        began = time.monotonic()
        for number, text in enumerate(itertools.cycle(inputs.texts)):
            if number >= warm:
                marks.append(self._clock.mark())
            with_next = (time.monotonic() - began) * (number + 1) / max(1, number)
            if len(marks) > count or (len(marks) > 1 and with_next > budget_s):
                break
            outputs[text] = forward(model, inputs, text)
        return marks, [outputs[text] for text in inputs.texts]

    def _counts(self, model: nn.Module) -> Counters | None:
        return self._contender.counters(model) if self._contender else None

    def _fetched(self, before: Counters | None, after: Counters | None, forwards: int) -> bool:
        """Whether every block was acquired, and its bytes came, in each of these forwards.

        Up to as much as the slots hold was there before.
        """
        if before is None or after is None:
            return True
        acquired = after.acquires - before.acquires
        fetched = after.bytes_fetched - before.bytes_fetched
        least = forwards * self._weights.blocks - after.slot_bytes
        return acquired == forwards * self._weights.block_count and fetched >= least

    def memory(self) -> dict[str, int]:
        """Host memory of this process now, and what the offloaders say; bytes."""
        found = {
            **asdict(machine.ProcessBytes.now()),
            "pss": machine.shared_out_bytes(),
            "host_used": machine.host_used_bytes(),
            "torch_locked": machine.torch_locked_bytes(),
        }
        for name in ("host_bytes", "locked_bytes", "ring_bytes", "slot_bytes"):
            found[name] = sum(getattr(stats, name) for stats in self._stats())
        return found

    def _stats(self) -> list[Any]:
        import wanoffload

        found = []
        for model in self._models.values():
            try:
                found.append(wanoffload.offloader(model).stats())
            except wanoffload.WrapError:
                continue  # a contender that counts nothing
        return found

    def group(self) -> dict[str, int]:
        """What this process's cgroup says."""
        return cgroup.own_group()


def main(descriptor: int, name: str, model: str, device: str) -> None:
    """Answers commands until the pipe is closed."""
    pipe = Connection(descriptor)
    worker = Worker(name, MODELS[model], torch.device(device))
    while True:
        try:
            command, arguments = pipe.recv()
        except EOFError:
            return
        assert command in COMMANDS
        try:
            pipe.send((True, getattr(worker, command)(**arguments)))
        except Exception:  # told to the one who asked
            pipe.send((False, traceback.format_exc()))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:5])
