"""`wrap` and `unwrap`: from an ordinary model to a streamed one in place, and back."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn
from tqdm import tqdm

from wanoffload import hooks, host_memory
from wanoffload._C import Backend, HostImage, HostStore
from wanoffload.binding import Binding
from wanoffload.budget import Budget, BudgetLike
from wanoffload.device_memory import SlotMemory
from wanoffload.engine import backend_for
from wanoffload.errors import WrapError
from wanoffload.granularity import bytes_of_others, granularity_for, lay_out
from wanoffload.host_tensor import ordinary_tensors
from wanoffload.host_tiers import AUTO, DISK, HostChoice, HostPlan, assign
from wanoffload.image import ImageLayout
from wanoffload.loading.cached_weights import CachedWeights
from wanoffload.pack_choice import AUTO_PACK, Pack, Packable, check_pack, choose
from wanoffload.packing import estimated_bytes, packs, stored_image
from wanoffload.placing import Placing
from wanoffload.residency_planner import ResidencyPlanner
from wanoffload.runtime import Offloader
from wanoffload.shared_arena import SharedArena, check_name
from wanoffload.sharing import joined
from wanoffload.together import wholes
from wanoffload.units import AUTO as AUTO_GRANULARITY
from wanoffload.units import (
    BLOCK,
    CALLED,
    PART,
    Unit,
    any_compiled,
    check_wrappable,
    find_units,
    granularity_of,
)
from wanoffload.weights import OwnTensors, Weights

logger = logging.getLogger(__name__)

MOVE, LEAVE = "move", "leave"
NOT_LOCKED = 0.1
"""Of the host memory that is to be had, what `host="auto"` does not page-lock."""


def wrap(
    transformer: nn.Module,
    prefetch: int | None = None,
    *,
    device: torch.device | str | int | None = None,
    vram_budget: int | str | float | None = None,
    granularity: str = BLOCK,
    host: str = AUTO,
    host_budget: int | str | None = None,
    cache: str | os.PathLike[str] | None = None,
    share: str | None = None,
    pack: bool | str | None = None,
    verify: bool = False,
) -> nn.Module:
    """Streams a transformer's blocks through a few slots of device memory. In place.

    The weights of the blocks move into host memory of this package, one exact image a block, and
    the tensors they came from are let go one block at a time. Everything else of the model moves to
    `device`. Outputs are those of the resident model, bit for bit.

    Outside a forward the model tells the truth: parameters, `state_dict()`, `save_pretrained()`
    give the true values (block weights as CPU tensors, unless all are on the device), and writes to
    them take effect in the next forward. `.to(device)` works for the same device only.

    Args:
        transformer: a diffusers transformer, or any module whose repeated blocks are the items of
            ModuleLists that are its direct children. Its weights may be on the host or on a device.
        prefetch: blocks fetched ahead of the one that computes; the device holds `prefetch + 1`
            slots of the largest block's size (never more than there are blocks). 0 fetches each
            block when it is needed. 1 is enough to hide copies behind compute; 2 evens out blocks
            of different length. None: as is best within `vram_budget`; 2 without one. With parts
            it counts parts, and None is 1.
        device: where it computes. Default: the current CUDA device, else the CPU, where the same
            engine runs on threads.
        vram_budget: what the weights may take on the device, all together, slots included: bytes,
            text such as "12GiB", or a fraction of what is free there now. As many blocks as fit
            stay on the device once they have come, evenly between those that are streamed; with
            `pack`, packed, so that 1.4 times as many do. "auto": what activations leave, found out
            from forward to forward. A hard ceiling: what activations take
            comes on top. None: no block stays. See `offloader(transformer).residency` for what was
            chosen, and `.set_budget()` to change it. Where all blocks stay they are ordinary
            modules from the end of the first forward on (`.at_home`): parameters on the device, no
            hook in the way.
        granularity: what is fetched at once. "block": a whole block. "part": the modules that a
            block calls, such as `attn1`, `attn2` and `ffn`, which pass through a ring of bytes and
            are cut into pieces there: blocks of 0.70 GB through 0.60 GB, where two slots take 1.41,
            at the same speed. Blocks that are compiled need all their parts at once, and twice
            that. Nothing is kept packed on the device. "auto": parts, if under `vram_budget` less
            has to be streamed so, or there is no room to fetch one block while another computes.
        host: where the weights stand on the host. "pinned": page-locked memory, one copy at the
            link's rate. "pageable": ordinary memory, copied through a page-locked ring of 128 MiB.
            "disk": in a file, read for each use through a ring of 1 GiB at most. "auto": pinned, as
            far as the budget and the machine permit; see `offloader(transformer).tiers` for what
            was chosen. A weight on disk that is written to comes into memory first.
        host_budget: bytes, or text such as "40GiB": what images and ring may take of the host's
            memory. Default: what is to be had, a part of it left to others.
        cache: a file that holds the blocks as they are streamed, so that they can stand on disk
            (docs/cache-file.md). Written if it is not there; else all weights are compared with it.
        share: a name, under which all processes of this user on this host hold one copy of the
            images together: the first that asks for the name fills them, the others wait and map
            them. A block that a process writes to becomes that process's own first. Nothing is
            left when the last one ends, however it ends. Processes that can't see each other in
            /proc (of other containers) don't meet, and each holds a copy.
        pack: True: blocks stand on the host packed, bit for bit, in about 0.70 of their bytes, and
            are unpacked on the device behind their copy (docs/packing.md). It takes at most 160 MB
            of the device's memory more. What is not bf16 is not packed; a model without bf16 is
            refused. False: plain; a cache file with packed images is then refused. "auto": packed
            if the host lacks memory to hold all blocks page-locked, with the reason in the log.
            None: as the cache file is, and plain without one.
        verify: debug. Every block is checked against a fingerprint of its host bytes before use
            and after; waits for the device at every block.

    Returns:
        The same module.

    Raises:
        WrapError: the model or an argument can't be used; says what to do.
        HostMemoryError: too little host memory. The model is as it was.
        CacheFileError: the cache file is spoilt or another model's, or can't be written. The model
            is as it was, and so is the file.
        ShareError: under this name the processes of this user share another model, or can't share.
        torch.OutOfMemoryError: too little device memory for the slots, or for what is to stay. The
            model is as it was.
    """
    choice = HostChoice.of(host, host_budget)
    check_pack(pack)
    stream(
        transformer,
        prefetch,
        device=device,
        vram_budget=vram_budget,
        granularity=granularity,
        host=choice,
        cache=cache,
        share=share,
        pack=pack,
        verify=verify,
    )
    return transformer


def stream(
    module: nn.Module,
    prefetch: int | None,
    *,
    device: torch.device | str | int | None = None,
    vram_budget: BudgetLike = None,
    granularity: str = BLOCK,
    host: HostChoice = HostChoice(),  # noqa: B008 (it is frozen)
    cache: str | os.PathLike[str] | None = None,
    share: str | None = None,
    pack: Pack = None,
    verify: bool = False,
    rest: str = MOVE,
    progress: tqdm[NoReturn] | None = None,
) -> Offloader:
    """What `wrap` does, with two choices more. Internal.

    `pack`: also a share of the blocks, from 0.0 to 1.0, evenly spread. `rest`: what is not streamed
    is moved to the device to stay there (MOVE), or is left where it is (LEAVE): then the caller
    brings it to the device before each forward. `progress`: a bar that counts the bytes of the
    blocks, instead of one of its own.
    """
    _check_module(module)
    check_options(prefetch, granularity, cache, share, verify)
    assert rest in (MOVE, LEAVE)
    check_wrappable(module)
    target = resolve_device(device)
    weights: Weights = OwnTensors(module, target, move_others=rest == MOVE)
    if cache is not None:
        weights = CachedWeights(weights, module, Path(cache))
    return start(
        module,
        weights,
        prefetch,
        target,
        vram_budget=vram_budget,
        granularity=granularity,
        host=host,
        share=share,
        pack=pack,
        verify=verify,
        progress=progress,
    )


def start(
    module: nn.Module,
    weights: Weights,
    prefetch: int | None,
    device: torch.device,
    *,
    vram_budget: BudgetLike = None,
    granularity: str = BLOCK,
    host: HostChoice,
    share: str | None = None,
    pack: Pack = None,
    verify: bool,
    progress: tqdm[NoReturn] | None = None,
    title: str = "wrap",
) -> Offloader:
    """Brings `weights` to their places and the module's hooks to theirs. Internal.

    Whatever fails, `weights` is undone, and nothing stays. `pack`, `progress`: as of `stream`, but
    the bar has this title.
    """
    _check_share(share, host, pack)
    budget = Budget.of(vram_budget, device)
    what = f"{title} {type(module).__name__}"
    granularity = granularity_for(module, granularity, budget.nbytes, prefetch, bool(pack))
    units = find_units(module, granularity)
    layouts = lay_out(units)
    packable = _look_at_packing(weights, units, layouts)
    room, lockable = _room(weights, units, layouts)
    packed, why = choose(pack, packable, host, room, lockable)
    if why:
        logger.info("%s: %s", what, why)
    backend = backend_for(device)
    store = HostStore(backend)
    with (
        ordinary_tensors(),
        joined(share, module, weights, units, layouts, packed, store) as arena,
        _bar(progress, units, title) as bar,
    ):
        plan = _plan(what, weights, units, layouts, packable.sizes(packed), packed, host, arena)
        placing = Placing(weights, units, layouts, plan, host, backend, store, arena)
        runtime = _Wrapping(
            module,
            weights,
            units,
            layouts,
            placing,
            device,
            backend,
            arena,
            prefetch,
            budget,
            granularity,
            verify,
            bar,
        ).run()
    whole = bool(packed) and packed == packable.units
    runtime.pack = 1.0 if whole else len(packed) / len(units)
    return runtime


def _check_share(share: str | None, host: HostChoice, pack: Pack) -> None:
    if share is not None and host.kind == DISK:
        raise WrapError("share: with host='disk' there is nothing in memory that could be shared")
    if share is not None and pack == AUTO_PACK:
        raise WrapError(
            "share: with pack='auto' each process would decide by the memory that it finds, and "
            "they share what is alike in all; give pack=True or pack=False"
        )


def _look_at_packing(weights: Weights, units: list[Unit], layouts: list[ImageLayout]) -> Packable:
    """What decides whether the blocks are packed."""

    def why_not_in_files(packed: bool) -> str | None:
        reasons = (weights.why_not_in_files(unit, packed) for unit in units)
        return next((reason for reason in reasons if reason is not None), None)

    return Packable(
        plain=[layout.nbytes for layout in layouts],
        packed=[estimated_bytes(layout) if packs(layout) else None for layout in layouts],
        why_not_in_files=why_not_in_files(packed=False),
        cached=weights.cached(units, layouts),
        to_be_cached=why_not_in_files(packed=True) is None,
        called=CALLED[granularity_of(units)],
    )


def _room(weights: Weights, units: list[Unit], layouts: list[ImageLayout]) -> tuple[int, int]:
    """Bytes that images may take of the host's memory, and that may be page-locked.

    What is page-locked the machine can't take back: `auto` leaves a part of the free memory.
    """
    room = weights.room(units, layouts)
    return room, room - int(host_memory.to_be_had() * NOT_LOCKED)


def _plan(
    what: str,
    weights: Weights,
    units: list[Unit],
    layouts: list[ImageLayout],
    sizes: list[int],
    packed: frozenset[int],
    host: HostChoice,
    arena: SharedArena | None,
) -> HostPlan:
    """The tier of each unit. Of the room, a unit that is packed needs its plain image's."""
    numbers = range(len(units))
    shared = frozenset(n for n in numbers if arena and arena.filled and arena.holds(n))
    packing = max((layouts[n].nbytes for n in packed), default=0)
    room, lockable = (size - packing for size in _room(weights, units, layouts))
    reasons = [weights.why_not_in_files(units[n], n in packed) for n in numbers]
    called = CALLED[granularity_of(units)]
    plan = assign(what, sizes, host, room, lockable, reasons, shared, packed, called)
    logger.info("%s: %s", what, plan.sentence)
    return plan


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
    copy, no longer page-locked; those on disk, or shared, are read into memory. Hooks of others
    (caches, compiled blocks, LoRA) stay. A module that is not wrapped raises WrapError; too little
    host memory, HostMemoryError, and the model is as it was.
    """
    runtime = offloader(transformer)
    target = torch.device(device)
    with ordinary_tensors():
        _bring_into_memory(runtime, target)
        runtime.close()
        for whole in runtime.together:
            hooks.remove(whole.block)
        while runtime.bindings:
            _give_back(runtime.bindings[0], target)
            del runtime.bindings[0]  # now, so that one block at a time is in memory
        hooks.remove(transformer)  # last: until here unwrap can be called again
        transformer.to(target)
    return transformer


def _give_back(binding: Binding, target: torch.device) -> None:
    """The block is an ordinary one again, and on its way if it does not stay on the host."""
    hooks.remove(binding.unit.module)
    moves = not binding.owned and target.type != "cpu"
    binding.give_back()
    if moves:
        binding.unit.module.to(target)


def _bring_into_memory(runtime: Offloader, target: torch.device) -> None:
    """What is not in own memory and will stay on the host, while the model is still whole. What
    leaves the host passes through it, a block at a time."""
    missing = [binding for binding in runtime.bindings if not binding.owned]
    if missing and target.type != "cpu":
        largest = max(binding.owning_takes for binding in missing)
        host_memory.require(largest, "bringing a block into own memory, on its way,")
    if missing and target.type == "cpu":
        taken = sum(binding.owning_takes - binding.owning_gives for binding in missing)
        called = runtime.host_plan.called
        total = max(0, taken + max(binding.owning_gives for binding in missing))
        host_memory.require(total, f"bringing {len(missing)} {called} into own memory")
        if any(binding.packed for binding in missing):
            runtime.pause()  # so that packed bytes go one by one, as nobody else has them
        for binding in missing:
            binding.take_ownership()


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


def check_options(
    prefetch: int | None,
    granularity: str,
    cache: str | os.PathLike[str] | None,
    share: str | None,
    verify: bool,
) -> None:
    """Raises WrapError for an option of `wrap` and `load` that can't be used."""
    number = isinstance(prefetch, int) and not isinstance(prefetch, bool) and prefetch >= 0
    if prefetch is not None and not number:
        raise WrapError(f"prefetch is a number of blocks, 0 or more, or None, not {prefetch!r}")
    if granularity not in (BLOCK, PART, AUTO_GRANULARITY):
        raise WrapError(f"granularity is 'block', 'part' or 'auto', not {granularity!r}")
    if cache is not None and not isinstance(cache, (str, os.PathLike)):
        raise WrapError(f"cache is the path of a file, not {cache!r}")
    if not isinstance(verify, bool):
        raise WrapError(f"verify is True or False, not {verify!r}")
    if share is not None:
        check_name(share)


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
        units: list[Unit],
        layouts: list[ImageLayout],
        placing: Placing,
        device: torch.device,
        backend: Backend,
        arena: SharedArena | None,
        prefetch: int | None,
        budget: Budget,
        granularity: str,
        verify: bool,
        progress: tqdm[NoReturn],
    ) -> None:
        self.model = model
        self.weights = weights
        self.units = units
        self.layouts = layouts
        self.placing = placing
        self.device = device
        self.backend = backend
        self.arena = arena
        self.planner = ResidencyPlanner(
            bytes_of_others(model, units), prefetch, granularity, any_compiled(units)
        )
        self.budget = budget
        self.verify = verify
        self.progress = progress
        self.runtime: Offloader | None = None
        self.bound: list[Binding] = []

    def run(self) -> Offloader:
        try:
            self.weights.prepare(self.units, self.layouts, self.placing.plan)
            self.runtime = self._make_runtime()
            self.placing.prepare(self.device, self.runtime.memory.slots)
            self._place_others(self.runtime)
            self._write_units(self.runtime)
            self._connect()
        except BaseException:
            self._take_back()
            raise
        self.weights.finish()
        return self.runtime

    def _make_runtime(self) -> Offloader:
        slot_bytes = max(layout.nbytes for layout in self.layouts)
        expected = self.planner.expect(
            self.units, self.layouts, self.placing.plan, self.budget.nbytes
        )
        # One at least, of the largest size: blocks are packed there.
        slots = SlotMemory(max(1, expected.slots), slot_bytes, self.device)
        return Offloader(
            device=self.device,
            backend=self.backend,
            slots=slots,
            planner=self.planner,
            host_plan=self.placing.plan,
            verify=self.verify,
            budget=self.budget,
        )

    def _place_others(self, runtime: Offloader) -> None:
        """What is not streamed: it is noted, so that what is added later is told from it."""
        streamed = {
            id(entry.tensor) for unit in self.units for group in unit.groups for entry in group
        }
        for owner in self.model.modules():
            for key, parameter in owner._parameters.items():
                if parameter is not None and id(parameter) not in streamed:
                    runtime.residents.add((id(owner), key))
        self.weights.place_others(streamed)

    def _write_units(self, runtime: Offloader) -> None:
        for number, (unit, layout) in enumerate(zip(self.units, self.layouts, strict=True)):
            placed = self.placing.place(number)
            self.bound.append(Binding(runtime, unit, layout, placed))
            del placed  # or whoever keeps the next unit's error keeps this one too
            self.bound[-1].make_weights()
            self.progress.update(sum(spec.nbytes for spec in layout.specs))
            self.placing.check_locks()
        self.placing.finish()
        runtime.host_plan = self.placing.plan
        self._share()

    def _share(self) -> None:
        """All is written: from here on shared images can't be, and others may use them."""
        for binding in self.bound:
            stored = stored_image(binding.image)
            if isinstance(stored, HostImage):
                stored.protect()
        if self.arena is not None:
            self.arena.publish()

    def _connect(self) -> None:
        runtime = self.runtime
        assert runtime is not None
        runtime.connect(self.bound)
        for binding in self.bound:
            hooks.install_on_block(binding.unit.module, binding)
        for whole in wholes(runtime):
            hooks.install_on_whole(whole.block, whole)
            runtime.together.append(whole)
        hooks.install_on_model(self.model, runtime)
        runtime.start()

    def _take_back(self) -> None:
        """No hooks, nothing page-locked, and the weights undone."""
        hooks.remove(self.model)
        for unit in self.units:
            hooks.remove(unit.module)
            hooks.remove(unit.block)
        try:
            self.placing.close()
            if self.runtime is not None:
                self.runtime.close()
            if self.arena is not None:
                self.arena.close()  # an image that nobody else has seen is the model's to keep
        finally:
            self.weights.undo(self.bound)
