"""Models whose blocks stream in parts, and what their tests ask of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

import wanoffload
from tests.small_models import MODELS, forward
from wanoffload import (
    Offloader,
)
from wanoffload.residency import allocated

PARTS = {
    "wan21_t2v": 15,
    "wan21_i2v": 12,
    "wan22_i2v": 21,
    "wan22_5b": 9,
    "vace": 21,
    "animate": 20,
    "qwen_image": 15,
}
STORED: dict[str, dict[str, Any]] = {
    "pinned": {"host": "pinned"},
    "pageable": {"host": "pageable"},
    "disk": {"host": "disk"},
    "pinned packed": {"host": "pinned", "pack": True},
    "pageable packed": {"host": "pageable", "pack": True},
    "disk packed": {"host": "disk", "pack": True},
}
MIB = 1 << 20
KIND = MODELS["wan22_5b"]
X = torch.linspace(-1, 1, 128).view(2, 64)


def wrap(model: Any, device: str, **options: Any) -> Any:
    wanoffload.wrap(model, device=device, **{"granularity": "part", **options})
    wanoffload.offloader(model).poison_slots()
    return model


def wrapped(name: str = "wan22_5b", device: str = "cpu", **options: Any) -> Any:
    return wrap(MODELS[name].make(), device, **options)


def stored(name: str, device: str, how: str, folder: Path, **options: Any) -> Any:
    """Wrapped, with its weights as STORED says. On disk they stand in a cache file."""
    options = {**STORED[how], **options}
    if options["host"] == "disk":
        options["cache"] = folder / "cache"
    model = wrapped(name, device, **options)
    assert set(wanoffload.offloader(model).tiers) == {options["host"]}
    return model


def resident(name: str, device: str) -> Tensor:
    """The output of the model that was never wrapped."""
    return forward(MODELS[name].make().to(device), MODELS[name].inputs(device))


def check(model: Any, name: str = "wan22_5b", forwards: int = 3) -> None:
    """Every forward gives what the resident model gives, from bytes that the plan says."""
    offloader = wanoffload.offloader(model)
    device = offloader.device.type
    inputs, expected = MODELS[name].inputs(device), resident(name, device)
    for number in range(forwards):
        before, at_home = offloader.stats(), offloader.at_home
        assert torch.equal(forward(model, inputs), expected), number
        after = offloader.stats()
        assert after.units == PARTS[name]
        assert after.acquires - before.acquires == (0 if at_home else after.units)
        if number > 1:
            fetched = after.bytes_fetched - before.bytes_fetched
            assert fetched == offloader.residency.streamed_bytes
    check_memory(offloader)


def check_memory(offloader: Offloader) -> None:
    """What the device holds is what the plan says, and no more than it may."""
    plan, stats = offloader.residency, offloader.stats()
    assert stats.slots == 0
    if offloader.paused:  # it has learned another order
        return
    assert stats.slot_bytes == (256 + plan.ring_bytes if plan.ring_bytes else 0)
    assert offloader.device_bytes == plan.device_bytes
    if offloader.budget.nbytes is not None:
        assert plan.device_bytes <= offloader.budget.nbytes


def budget_for(name: str, staying: int, **options: Any) -> int:
    """Enough for the ring, and for so many parts more. Each takes 2 MiB as the allocator counts."""
    offloader = wanoffload.offloader(wrapped(name, **options))
    return offloader.device_bytes + staying * 2 * MIB


class Stop(Exception):
    """What a test throws from inside a forward."""


def stop(*_: object) -> None:
    raise Stop


class Shuffled(nn.Module):
    """A block that calls its parts in another order than they are registered in."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(64, 64) for _ in range(3))
        self.small = nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.two(self.three(x) + self.small))


class Rows(nn.Module):
    """Blocks in a row, backwards."""

    def __init__(self, make: Callable[[], nn.Module] = Shuffled, count: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            x = block(x)
        return x


def of_rows(device: str, make: Callable[[], nn.Module] = Shuffled, **options: Any) -> Any:
    """(wrapped, resident, input)."""
    model = Rows(make).requires_grad_(False)
    twin = copy.deepcopy(model).to(device)
    return wrap(model, device, **options), twin, X.to(device)


def together(place: Any, other: Any) -> bool:
    return any(
        a.start < b.start + b.nbytes and b.start < a.start + a.nbytes for a in place for b in other
    )


def layer(model: Any) -> nn.Linear:
    return model.blocks[1].ffn.net[2]  # type: ignore[no-any-return]


def first_layer(model: Any) -> nn.Linear:
    """Of the part that is fetched between forwards."""
    return model.blocks[0].attn1.to_q  # type: ignore[no-any-return]


def _replace(model: Any) -> None:
    for each in (layer(model), first_layer(model)):
        each.weight = nn.Parameter(each.weight * 3, requires_grad=False)


WRITES: dict[str, Callable[[Any], object]] = {
    "in place": lambda model: layer(model).weight.mul_(2),
    "in place, the first": lambda model: first_layer(model).weight.mul_(2),
    "data": lambda model: first_layer(model).weight.data.add_(1),
    "data assigned": lambda model: setattr(
        layer(model).weight, "data", torch.full_like(layer(model).weight, 0.25)
    ),
    "replaced": _replace,
    "state dict": lambda model: model.load_state_dict(KIND.make(seed=9).state_dict()),
    "state dict assigned": lambda model: model.load_state_dict(
        {k: v.to(model.device) for k, v in KIND.make(seed=9).state_dict().items()}, assign=True
    ),
    "all": lambda model: [p.data.mul_(1.5) for p in model.blocks.parameters()],
}
TARGETS: dict[str, list[str] | str] = {
    "wan21_t2v": ["to_q", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"],
    "vace": ["to_q", "proj_in", "proj_out"],  # these two are parts themselves
    "animate": r".*\.to_q|face_adapter\.\d\.to_out|.*\.ffn\.net\.2",  # and so are face blocks'
    "qwen_image": ["to_q", "img_mlp.net.2"],
}


def adapt(name: str) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[name], init_lora_weights=False)


def add_adapter(model: Any, name: str) -> None:
    torch.manual_seed(7)
    model.add_adapter(adapt(name), "first")


def calls_of(model: Any, modules: list[nn.Module]) -> list[tuple[Any, Any, Any]]:
    """(arguments, keywords, output) of each module in a forward of a resident model."""
    seen: list[tuple[Any, Any, Any]] = []
    handles = [
        module.register_forward_hook(
            lambda _, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True
        )
        for module in modules
    ]
    forward(model, KIND.inputs(model.device))
    for handle in handles:
        handle.remove()
    return seen


class Large(Shuffled):
    """A block whose parts take a MiB each, so that budgets tell them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(512, 512) for _ in range(3))
        self.small = nn.Parameter(torch.randn(512))


def large_rows(device: str, **options: Any) -> Any:
    return wrap(Rows(Large).requires_grad_(False), device, **options)


def ring_budget(model: Any, together: bool) -> int:
    """The least: for one part, or for a block."""
    offloader = wanoffload.offloader(model)
    sizes = [binding.layout.nbytes for binding in offloader.bindings[:3]]
    ring = allocated(256 + (sum(sizes) if together else max(sizes)))
    ends = 2 * MIB * together  # what those of places cost
    return offloader.streaming.planner.others + ring + ends
