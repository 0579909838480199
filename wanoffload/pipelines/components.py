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
from wanoffload.apart import BLOCK
from wanoffload.budget import AUTO as AUTO_BUDGET
from wanoffload.facts.tally import image_bytes
from wanoffload.host_tensor import HostTensor, ordinary_tensors
from wanoffload.host_tiers import AUTO, DISK, HostChoice
from wanoffload.loading.unread import Unread
from wanoffload.pipelines import tenancy
from wanoffload.pipelines.adopting import Found, find_wrapped
from wanoffload.pipelines.parking import Parked
from wanoffload.pipelines.tenancy import ComponentHook, Floor, StreamedTenant
from wanoffload.policy import cost
from wanoffload.policy.choices import DIT
from wanoffload.runtime import Offloader
from wanoffload.units import check_wrappable, find_units

logger = logging.getLogger(__name__)

RESIDENT = "resident"
PARKED = "parked"
STREAMED = "streamed"
UNTOUCHED = "untouched"

ANYWHERE = HostChoice()

TEXT_ENCODER, IMAGE_ENCODER, VAE = "text_encoder", "image_encoder", "vae"
OTHER = "other"


@dataclass(frozen=True)
class Treatment:
    """How a component is run. `prefetch`: of a streamed one, in blocks, or parts; None: as many as
    `wrap` takes. `pack`: of a streamed DiT, the share of its blocks that is packed; None: nothing
    was said of it. `budget`: of a streamed DiT, what its weights may take on the device, or
    "auto"; None: no block stays there. `residents_stay`: what stays there does so while other
    components run. `granularity`: of a streamed DiT, what is fetched at once, as of `wrap`.

    Parked: the component goes to the device as a whole for its use. Streamed: a DiT's blocks pass
    through slots and the rest stays on the device; of an encoder, the rest goes to the device and
    back with its use. Untouched: somebody else moves it.
    """

    kind: str
    prefetch: int | None = 0
    pack: float | None = None
    budget: int | str | None = None
    residents_stay: bool = True
    granularity: str = BLOCK


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
    @property
    def pack_share(self) -> float | None: ...
    @property
    def budget_of_one(self) -> int | str | None: ...
    @property
    def residents_stay(self) -> bool: ...
    @property
    def granularity(self) -> str: ...


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
        return Treatment(
            STREAMED,
            plan.dit_offload_prefetch_size,
            plan.pack_share,
            plan.budget_of_one,
            plan.residents_stay,
            plan.granularity,
        )
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
    """One component of an enabled pipeline: how it is run now, and where it was found.

    A DiT may be found wrapped; streamed, it keeps its runtime and its images. Or `unread`: without
    its weights, which are then read from their files.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        device: torch.device,
        floor: Floor,
        unread: Unread | None = None,
    ) -> None:
        self.name = name
        self.module = module
        self.device = device
        self.floor = floor
        self.treatment: Treatment | None = None  # None: as it was found
        self.parked: Parked | None = None
        self.runtime: Offloader | None = None
        self._streamed: nn.Module | None = None
        self._unread = unread
        self._was_read = False
        self._found: Found | None = None
        self._find(find_wrapped(module))
        self._origins = {
            (owner, key): tensor.device
            for owner in module.modules()
            for key, tensor in (*owner._parameters.items(), *owner._buffers.items())
            if tensor is not None
        }

    @property
    def unread(self) -> bool:
        return self._unread is not None

    @property
    def block_bytes(self) -> int:
        """Bytes of a DiT's blocks, as images."""
        units = find_units(self.module)
        return sum(image_bytes(group[0].tensor.nbytes for group in u.groups) for u in units)

    @property
    def packed(self) -> float | None:
        """The share of a streamed DiT's blocks that stands packed; None: it is not streamed."""
        if role(self.name) != DIT or self.runtime is None:
            return None
        asked = self.treatment.pack if self.treatment is not None else None
        return self.runtime.pack if asked is None else asked

    @property
    def granularity(self) -> str | None:
        """What is fetched at once of a streamed DiT; None: it is not streamed."""
        streamed = role(self.name) == DIT and self.runtime is not None
        return self.runtime.granularity if streamed and self.runtime is not None else None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in _tensors([self.module]))

    def bytes_to_move(self, wanted: Treatment) -> int:
        """For the progress bar: what `become` copies."""
        if self._is_streamed_as(wanted):
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

    def become(
        self, wanted: Treatment, progress: tqdm[NoReturn], host: HostChoice = ANYWHERE
    ) -> None:
        """Changes the treatment. If it raises, `restore()` or another `become` is possible.

        `host`: where a DiT's blocks stand, if it is streamed and was not before.
        """
        end = progress.n + self.bytes_to_move(wanted)
        was_unread = self._unread is not None
        if self._unread is not None:
            self._read(self._unread, wanted, progress, host)
        if self.runtime is not None and (was_unread or self._is_streamed_as(wanted)):
            self._keep_streaming(self.runtime, wanted)
        else:
            self._let_go()
            self._begin(wanted, progress, host)
        self.treatment = wanted
        progress.update(end - progress.n)

    def _begin(self, wanted: Treatment, progress: tqdm[NoReturn], host: HostChoice) -> None:
        """From an ordinary module."""
        if wanted.kind == STREAMED and role(self.name) == DIT:
            self._stream_dit(wanted, progress, host)
        elif wanted.kind == STREAMED and (stack := find_stack(self.module)) is not None:
            self._stream_encoder(stack, wanted, progress)
        elif wanted.kind in (PARKED, STREAMED):
            if wanted.kind == STREAMED:
                logger.info("%s moves as a whole: its blocks are less than half of it", self.name)
            self._park(progress)
        elif wanted.kind == RESIDENT:
            self.module.to(self.device)

    def _is_streamed_as(self, wanted: Treatment) -> bool:
        """Whether nothing but prefetch and budget differ."""
        if self.runtime is None or wanted.kind != STREAMED:
            return False
        if role(self.name) != DIT:
            return True
        return wanted.pack in (None, self.packed) and wanted.granularity == self.granularity

    def _keep_streaming(self, runtime: Offloader, wanted: Treatment) -> None:
        runtime.set_prefetch(wanted.prefetch)  # which also pauses it, until it is the tenant
        if role(self.name) == DIT:
            kept = wanted.budget == AUTO_BUDGET and runtime.budget.auto  # with what it has seen
            if wanted.budget is not None and not kept:
                runtime.set_budget(wanted.budget)
            self._come_with_forwards(runtime, wanted)

    def _read(
        self, unread: Unread, wanted: Treatment, progress: tqdm[NoReturn], host: HostChoice
    ) -> None:
        """Reads the weights from their files into the images they are streamed from."""
        self._unread = None
        self._was_read = True
        self.runtime = wrapping.start(
            self.module,
            unread.weights(self.device),
            wanted.prefetch,
            self.device,
            vram_budget=wanted.budget,
            granularity=wanted.granularity,
            host=host,
            share=None if host.kind == DISK else unread.share,
            pack=wanted.pack,
            verify=False,
            progress=progress,
            title="load",
        )
        self._streamed = self.module

    def _stream_dit(self, wanted: Treatment, progress: tqdm[NoReturn], host: HostChoice) -> None:
        if self._was_read and host.kind == DISK:  # what came into memory since stays there
            host = HostChoice(AUTO, host.budget)
        self._stream(self.module, wanted, wrapping.MOVE, progress, host)
        assert self.runtime is not None
        self._come_with_forwards(self.runtime, wanted)

    def _come_with_forwards(self, runtime: Offloader, wanted: Treatment) -> None:
        tenant = StreamedTenant(self.floor, runtime, wanted.residents_stay)
        runtime.before_forward = lambda: self.floor.enter(tenant)

    def _stream_encoder(
        self, stack: nn.Module, wanted: Treatment, progress: tqdm[NoReturn]
    ) -> None:
        check_wrappable(self.module)
        self._stream(stack, wanted, wrapping.LEAVE, progress, ANYWHERE)
        self._park(progress)

    def _stream(
        self,
        module: nn.Module,
        wanted: Treatment,
        rest: str,
        progress: tqdm[NoReturn],
        host: HostChoice,
    ) -> None:
        self.runtime = wrapping.stream(
            module,
            wanted.prefetch,
            device=self.device,
            vram_budget=wanted.budget,
            granularity=wanted.granularity,
            host=host,
            pack=wanted.pack,
            rest=rest,
            progress=progress,
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
        """An ordinary module again, its weights where they are. Idempotent.

        One that was found wrapped, and was not touched, stays so.
        """
        if self.treatment is not None or not self._is_as_wrapped():
            self._let_go()

    def begin_restore(self) -> None:
        """Gives memory back where `restore` does not need it as it is. It may be called first."""
        if not self._is_as_wrapped():
            self._let_go()

    def _is_as_wrapped(self) -> bool:
        """Whether the runtime is the one that was found."""
        return self._found is not None and self.runtime is self._found.runtime

    def _let_go(self) -> None:
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
        """As it was found: each tensor on the device where it was, and wrapped if it was.

        One that was unread when it was found is not: its weights stay on the host.
        """
        self.begin_restore()
        with ordinary_tensors():
            for (owner, key), device in self._origins.items():
                entries = owner._parameters if key in owner._parameters else owner._buffers
                tensor = entries.get(key)
                if tensor is not None and device.type != "meta" and tensor.device != device:
                    tensor.data = tensor.data.to(device)
            if self._found is not None:
                self._find(self._found.give_back())
        self.treatment = None

    def _find(self, found: Found | None) -> None:
        self._found = found
        self.runtime = found.runtime if found else None
        self._streamed = self.module if found else None

    def to_host(self) -> None:
        """An ordinary module on the CPU; one that was never touched stays where it is."""
        touched = self.treatment is not None and self.treatment.kind != UNTOUCHED
        self.release()
        if touched:
            self.module.to("cpu")


def _stands_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device == device and not isinstance(tensor, HostTensor)
