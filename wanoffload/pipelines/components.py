"""How one component of a pipeline is run: resident, parked or streamed; and back."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from wanoffload import hooks, wrapping
from wanoffload.host_tensor import HostTensor, ordinary_tensors
from wanoffload.pipelines import tenancy
from wanoffload.pipelines.parking import Parked
from wanoffload.pipelines.tenancy import ComponentHook, Floor, StreamedTenant
from wanoffload.policy import cost
from wanoffload.policy.choices import DIT
from wanoffload.runtime import Offloader
from wanoffload.units import check_wrappable

logger = logging.getLogger(__name__)

RESIDENT = "resident"
PARKED = "parked"
STREAMED = "streamed"
UNTOUCHED = "untouched"

TEXT_ENCODER, IMAGE_ENCODER, VAE = "text_encoder", "image_encoder", "vae"
OTHER = "other"


@dataclass(frozen=True)
class Treatment:
    """How a component is run. `prefetch`: of a streamed one, in blocks.

    Parked: the component goes to the device as a whole for its use. Streamed: a DiT's blocks pass
    through slots and the rest stays on the device; of an encoder, the rest goes to the device and
    back with its use. Untouched: somebody else moves it.
    """

    kind: str
    prefetch: int = 0


class Acted(Protocol):
    """The attributes of a plan that are acted on."""

    @property
    def dit_layerwise_offload(self) -> bool: ...
    @property
    def dit_cpu_offload(self) -> bool: ...
    @property
    def dit_offload_prefetch_size(self) -> int | None: ...
    @property
    def layerwise_offload_components(self) -> list[str]: ...
    @property
    def text_encoder_cpu_offload(self) -> bool: ...
    @property
    def image_encoder_cpu_offload(self) -> bool: ...
    @property
    def vae_cpu_offload(self) -> bool: ...
    @property
    def use_fsdp_inference(self) -> bool: ...


def role(name: str) -> str:
    """What a component of this name is to the plan."""
    for start, found in (("transformer", DIT), ("text_encoder", TEXT_ENCODER)):
        if name.startswith(start):
            return found
    return name if name in (IMAGE_ENCODER, VAE) else OTHER


def treatment(plan: Acted, name: str) -> Treatment:
    """What the plan means for the component of this name."""
    what = role(name)
    if what == DIT:
        return _dit(plan)
    if what == OTHER:
        return Treatment(RESIDENT)  # nothing says when it is used
    layerwise = what in plan.layerwise_offload_components
    if layerwise and what != VAE:
        return Treatment(STREAMED, cost.ENCODER_PREFETCH)
    # A VAE, half a gigabyte at most, has no repeated blocks worth a ring: it moves as a whole.
    coarse: bool = getattr(plan, f"{what}_cpu_offload")
    return Treatment(PARKED if layerwise or coarse else RESIDENT)


def _dit(plan: Acted) -> Treatment:
    if plan.use_fsdp_inference:
        return Treatment(UNTOUCHED)
    if plan.dit_layerwise_offload:  # with dit_cpu_offload too: its weights start on the host
        assert plan.dit_offload_prefetch_size is not None
        return Treatment(STREAMED, plan.dit_offload_prefetch_size)
    return Treatment(PARKED if plan.dit_cpu_offload else RESIDENT)


def find_stack(component: nn.Module) -> nn.Module | None:
    """The part of an encoder whose blocks are worth streaming; None: move the whole.

    It is the module whose direct ModuleLists hold most bytes, if that is more than half of the
    component. The component's root itself, where the parked rest is hooked, can't be it.
    """
    held = {module: _bytes_in_lists(module) for module in component.modules()}
    best = max(held, key=lambda module: held[module])
    enough = 2 * held[best] > sum(tensor.nbytes for tensor in _tensors([component]))
    return best if enough and best is not component else None


def _bytes_in_lists(module: nn.Module) -> int:
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    return sum(tensor.nbytes for tensor in _tensors(lists))


def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters and buffers of modules, each once."""
    found = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            found[id(tensor)] = tensor
    return list(found.values())


class Component:
    """One component of an enabled pipeline: how it is run now, and where it was found."""

    def __init__(self, name: str, module: nn.Module, device: torch.device, floor: Floor) -> None:
        self.name = name
        self.module = module
        self.device = device
        self.floor = floor
        self.treatment: Treatment | None = None  # None: as it was found
        self.runtime: Offloader | None = None
        self.parked: Parked | None = None
        self._streamed: nn.Module | None = None
        self._origins = {
            (owner, key): tensor.device
            for owner in module.modules()
            for key, tensor in (*owner._parameters.items(), *owner._buffers.items())
            if tensor is not None
        }

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in _tensors([self.module]))

    def bytes_to_move(self, wanted: Treatment) -> int:
        """For the progress bar: what `become` copies."""
        if self._only_prefetch_differs(wanted):
            return 0
        if wanted.kind in (PARKED, STREAMED):
            return self.nbytes
        if wanted.kind == UNTOUCHED:
            return 0
        there = [t for t in _tensors([self.module]) if _stands_on(t, self.device)]
        return self.nbytes - sum(tensor.nbytes for tensor in there)

    def bytes_on_device(self, wanted: Treatment) -> int:
        """What will stand there always, about: to begin with what makes room."""
        return self.nbytes if wanted.kind == RESIDENT else 0

    def in_place(self) -> bool:
        """Whether what moves the weights is still where it was put."""
        if self._streamed is not None and hooks.attached(self._streamed) is not self.runtime:
            return False
        return self.parked is None or tenancy.installed(self.module)

    def become(self, wanted: Treatment, progress: tqdm[NoReturn]) -> None:
        """Changes the treatment. If it raises, `restore()` or another `become` is possible."""
        if self.runtime is not None and self._only_prefetch_differs(wanted):
            self.runtime.set_prefetch(wanted.prefetch)
            self.treatment = wanted
            return
        self.release()
        end = progress.n + self.bytes_to_move(wanted)
        if wanted.kind == STREAMED and role(self.name) == DIT:
            self._stream_dit(wanted.prefetch, progress)
        elif wanted.kind == STREAMED and (stack := find_stack(self.module)) is not None:
            self._stream_encoder(stack, wanted.prefetch, progress)
        elif wanted.kind in (PARKED, STREAMED):
            if wanted.kind == STREAMED:
                logger.info("%s moves as a whole: its blocks are less than half of it", self.name)
            self._park(progress)
        elif wanted.kind == RESIDENT:
            self.module.to(self.device)
        self.treatment = wanted
        progress.update(end - progress.n)

    def _only_prefetch_differs(self, wanted: Treatment) -> bool:
        return (
            self.runtime is not None
            and self.treatment is not None
            and self.treatment.kind == wanted.kind == STREAMED
        )

    def _stream_dit(self, prefetch: int, progress: tqdm[NoReturn]) -> None:
        self._stream(self.module, prefetch, wrapping.MOVE, progress)
        assert self.runtime is not None
        tenant = StreamedTenant(self.runtime)
        self.runtime.before_forward = lambda: self.floor.enter(tenant)

    def _stream_encoder(self, stack: nn.Module, prefetch: int, progress: tqdm[NoReturn]) -> None:
        check_wrappable(self.module)
        self._stream(stack, prefetch, wrapping.LEAVE, progress)
        self._park(progress)

    def _stream(
        self, module: nn.Module, prefetch: int, rest: str, progress: tqdm[NoReturn]
    ) -> None:
        self.runtime = wrapping.stream(
            module, prefetch, device=self.device, rest=rest, progress=progress
        )
        self._streamed = module
        self.runtime.pause()  # until it is the tenant

    def _park(self, progress: tqdm[NoReturn]) -> None:
        if self.runtime is None:
            check_wrappable(self.module)
        self.parked = Parked(self.module, self.device)
        self.parked.park(progress.update)
        stays = role(self.name) in (DIT, VAE)
        tenancy.install(self.module, ComponentHook(self.floor, self.parked, self.runtime, stays))

    def release(self) -> None:
        """An ordinary module again, its weights where they are. Idempotent."""
        tenancy.uninstall(self.module)
        if self.parked is not None:
            self.parked.give_up()
            self.parked = None
        if self.runtime is not None and self._streamed is not None:
            self.runtime.before_forward = None
            if hooks.attached(self._streamed) is self.runtime:
                wrapping.unwrap(self._streamed)
        self.runtime = self._streamed = None
        self.treatment = None

    def restore(self) -> None:
        """As it was found: an ordinary module, each tensor on the device where it was."""
        self.release()
        with ordinary_tensors():
            for (owner, key), device in self._origins.items():
                entries = owner._parameters if key in owner._parameters else owner._buffers
                tensor = entries.get(key)
                if tensor is not None and tensor.device != device:
                    tensor.data = tensor.data.to(device)

    def to_host(self) -> None:
        """An ordinary module on the CPU; one that was never touched stays where it is."""
        touched = self.treatment is not None and self.treatment.kind != UNTOUCHED
        self.release()
        if touched:
            self.module.to("cpu")


def _stands_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device == device and not isinstance(tensor, HostTensor)
