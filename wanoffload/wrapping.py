"""`wrap` and `unwrap`: from an ordinary model to a streamed one in place, and back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import nn
from tqdm import tqdm

from wanoffload import hooks, host_memory, image
from wanoffload._C import Backend, HostStore
from wanoffload.binding import Binding
from wanoffload.errors import WrapError
from wanoffload.host_tensor import ordinary_tensors
from wanoffload.runtime import Offloader, SlotMemory, backend_for
from wanoffload.units import Unit, check_wrappable, find_units
from wanoffload.weights import OwnTensors, Weights

logger = logging.getLogger(__name__)

HOST_KINDS = ("pinned", "pageable")
MOVE, LEAVE = "move", "leave"


def wrap(
    transformer: nn.Module,
    prefetch: int = 2,
    *,
    device: torch.device | str | int | None = None,
    host: str = "pinned",
    verify: bool = False,
) -> nn.Module:
    """Streams a transformer's blocks through a few slots of device memory. In place.

    The weights of the blocks move into host memory of this package, one exact image a block, and
    the tensors they came from are let go one block at a time. Everything else of the model moves to
    `device`. Outputs are those of the resident model, bit for bit.

    Outside a forward the model tells the truth: parameters, `state_dict()`, `save_pretrained()`
    give the true values (block weights as CPU tensors), and writes to them take effect in the next
    forward. `.to(device)` works for the same device only.

    Args:
        transformer: a diffusers transformer, or any module whose repeated blocks are the items of
            ModuleLists that are its direct children. Its weights may be on the host or on a device.
        prefetch: blocks fetched ahead of the one that computes; the device holds `prefetch + 1`
            slots of the largest block's size (never more than there are blocks). 0 fetches each
            block when it is needed. 1 is enough to hide copies behind compute; 2 evens out blocks
            of different length.
        device: where it computes. Default: the current CUDA device, else the CPU, where the same
            engine runs on threads.
        host: "pinned" (page-locked memory, one copy at the link's rate) or "pageable" (ordinary
            memory, copied through a page-locked ring of 128 MiB).
        verify: debug. Every block is checked against a fingerprint of its host bytes before use
            and after; waits for the device at every block.

    Returns:
        The same module.

    Raises:
        WrapError: the model or an argument can't be used; says what to do.
        HostMemoryError: too little host memory. The model is as it was.
        torch.OutOfMemoryError: too little device memory for the slots. The model is as it was.
    """
    stream(transformer, prefetch, device=device, host=host, verify=verify)
    return transformer


def stream(
    module: nn.Module,
    prefetch: int,
    *,
    device: torch.device | str | int | None = None,
    host: str = "pinned",
    verify: bool = False,
    rest: str = MOVE,
    progress: tqdm[NoReturn] | None = None,
) -> Offloader:
    """What `wrap` does, with two choices more. Internal.

    `rest`: what is not streamed is moved to the device to stay there (MOVE), or is left where it is
    (LEAVE): then the caller brings it to the device before each forward. `progress`: a bar that
    counts the bytes of the blocks, instead of one of its own.
    """
    _check_module(module)
    check_options(prefetch, host, verify)
    assert rest in (MOVE, LEAVE)
    check_wrappable(module)
    target = resolve_device(device)
    weights = OwnTensors(module, target, move_others=rest == MOVE)
    return start(module, weights, prefetch, target, host=host, verify=verify, progress=progress)


def start(
    module: nn.Module,
    weights: Weights,
    prefetch: int,
    device: torch.device,
    *,
    host: str,
    verify: bool,
    progress: tqdm[NoReturn] | None = None,
    title: str = "wrap",
) -> Offloader:
    """Brings `weights` to their places and the module's hooks to theirs. Internal.

    Whatever fails, `weights` is undone, and nothing stays. `progress`: as of `stream`, else a bar
    of this title.
    """
    found = find_units(module)
    backend = backend_for(device)
    with ordinary_tensors(), _bar(progress, found, title) as bar:
        return _Wrapping(module, weights, found, device, backend, host, prefetch, verify, bar).run()


@contextmanager
def _bar(given: tqdm[NoReturn] | None, found: list[Unit], title: str) -> Iterator[tqdm[NoReturn]]:
    """The caller's progress bar, or one over the bytes of the blocks."""
    if given is not None:
        yield given
        return
    total = sum(group[0].tensor.nbytes for unit in found for group in unit.groups)
    with tqdm(total=total, unit="B", unit_scale=True, desc=title, leave=False, delay=1.0) as own:
        yield own


def unwrap(transformer: nn.Module, device: torch.device | str | int = "cpu") -> nn.Module:
    """Makes a wrapped transformer an ordinary module again, in place, and moves it to `device`.

    Values are the same; on "cpu" the block weights stay in the memory where they are, without a
    copy, no longer page-locked. Hooks of others (caches, compiled blocks, LoRA) stay. A module that
    is not wrapped raises WrapError.
    """
    runtime = offloader(transformer)
    with ordinary_tensors():
        runtime.close()
        for binding in runtime.bindings:
            hooks.remove(binding.unit.module)
            binding.give_back()
        hooks.remove(transformer)  # last: until here unwrap can be called again
        runtime.bindings.clear()
        transformer.to(torch.device(device))
    return transformer


def offloader(transformer: nn.Module) -> Offloader:
    """The runtime of a wrapped transformer: its statistics, its events, `close()`."""
    runtime = hooks.attached(transformer) if isinstance(transformer, nn.Module) else None
    if not isinstance(runtime, Offloader):
        raise WrapError(f"this {type(transformer).__name__} is not wrapped: see wanoffload.wrap()")
    return runtime


def _check_module(transformer: nn.Module) -> None:
    if not isinstance(transformer, nn.Module):
        raise WrapError(
            f"wrap() takes a transformer (an nn.Module), not a {type(transformer).__name__}; of a "
            "pipeline, wrap pipe.transformer (and pipe.transformer_2)"
        )
    for name, module in transformer.named_modules():
        if hooks.attached(module) is not None:
            where = f"its part {name}" if name else "it"
            raise WrapError(
                f"this {type(transformer).__name__} is already wrapped ({where}). Call "
                "wanoffload.unwrap() first to wrap it in another way or on another device."
            )


def check_options(prefetch: int, host: str, verify: bool) -> None:
    """Raises WrapError for an option of `wrap` and `load` that can't be used."""
    if isinstance(prefetch, bool) or not isinstance(prefetch, int) or prefetch < 0:
        raise WrapError(f"prefetch is a number of blocks, 0 or more, not {prefetch!r}")
    if host not in HOST_KINDS:
        raise WrapError(f"host is one of {', '.join(map(repr, HOST_KINDS))}, not {host!r}")
    if not isinstance(verify, bool):
        raise WrapError(f"verify is True or False, not {verify!r}")


def resolve_device(device: torch.device | str | int | None) -> torch.device:
    """The device meant, with its index. None: the current CUDA device, else the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise WrapError(f"{device!r} is not a device: {error}") from None
    if target.type == "cpu":
        return torch.device("cpu")
    if target.type != "cuda":
        raise WrapError(f"device {target} is not supported: use a CUDA device or 'cpu'")
    if not torch.cuda.is_available():
        raise WrapError(f"device {target} was asked for, but torch sees no CUDA device")
    if (target.index or 0) >= torch.cuda.device_count():
        raise WrapError(f"there is no {target}: torch sees {torch.cuda.device_count()} devices")
    index = torch.cuda.current_device() if target.index is None else target.index
    torch.cuda.init()
    return torch.device("cuda", index)


class _Wrapping:
    """One call of `wrap` or `load`: what it has made so far, so that it can be taken back."""

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        found: list[Unit],
        device: torch.device,
        backend: Backend,
        host: str,
        prefetch: int,
        verify: bool,
        progress: tqdm[NoReturn],
    ) -> None:
        self.model = model
        self.weights = weights
        self.units = found
        self.device = device
        self.backend = backend
        self.lock = host == "pinned"
        self.prefetch = prefetch
        self.verify = verify
        self.progress = progress
        self.layouts = [
            image.lay_out((group[0].name, group[0].tensor) for group in unit.groups)
            for unit in found
        ]
        self.runtime: Offloader | None = None
        self.bound: list[Binding] = []

    def run(self) -> Offloader:
        try:
            self.weights.prepare(self.units, self.layouts)
            self._make_runtime()
            self._place_others()
            self._write_units()
            self._connect()
        except BaseException:
            self._take_back()
            raise
        self.weights.finish()
        assert self.runtime is not None
        return self.runtime

    def _make_runtime(self) -> None:
        slot_bytes = max(layout.nbytes for layout in self.layouts)
        count = min(self.prefetch + 1, len(self.units))
        self.runtime = Offloader(
            device=self.device,
            backend=self.backend,
            slots=SlotMemory(count, slot_bytes, self.device),
            prefetch=min(self.prefetch, len(self.units)),
            verify=self.verify,
        )

    def _place_others(self) -> None:
        """What is not streamed: it is noted, so that what is added later is told from it."""
        assert self.runtime is not None
        streamed = {
            id(entry.tensor) for unit in self.units for group in unit.groups for entry in group
        }
        for owner in self.model.modules():
            for key, parameter in owner._parameters.items():
                if parameter is not None and id(parameter) not in streamed:
                    self.runtime.residents.add((id(owner), key))
        self.weights.place_others(streamed)

    def _write_units(self) -> None:
        assert self.runtime is not None
        store = HostStore(self.backend)
        for unit, layout in zip(self.units, self.layouts, strict=True):
            host_memory.require(layout.nbytes, f"the image of {unit.name}")
            memory = store.allocate(layout.nbytes)
            self.weights.write(unit, layout, memory, self.lock)
            self.bound.append(Binding(self.runtime, unit, layout, memory))
            self.bound[-1].make_weights()
            self.progress.update(sum(spec.nbytes for spec in layout.specs))

    def _connect(self) -> None:
        assert self.runtime is not None
        for binding in self.bound:
            self.runtime.add(binding)
        for binding in self.bound:
            hooks.install_on_block(binding.unit.module, binding)
        hooks.install_on_model(self.model, self.runtime)
        self.runtime.start()

    def _take_back(self) -> None:
        """No hooks, nothing page-locked, and the weights undone."""
        hooks.remove(self.model)
        for unit in self.units:
            hooks.remove(unit.module)
        try:
            if self.runtime is not None:
                self.runtime.close()
        finally:
            self.weights.undo(self.bound)
