"""What an enabled pipeline remembers: its plan, its components, and who stands on the device."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from wanoffload import hooks
from wanoffload.errors import DeviceMemoryError, HostMemoryError, PipelineError
from wanoffload.facts.look import look
from wanoffload.facts.model import ModelFacts
from wanoffload.host_tensor import ordinary_tensors
from wanoffload.host_tiers import PINNED, HostChoice
from wanoffload.loading.unread import Unread
from wanoffload.machine.hardware import Hardware
from wanoffload.pipelines.components import Component, Treatment, role, treatment
from wanoffload.pipelines.host_shares import share
from wanoffload.pipelines.tenancy import Floor
from wanoffload.policy.choices import DIT
from wanoffload.policy.cost import HOST_RESERVE_BYTES
from wanoffload.sizes import gb
from wanoffload.workload import Workload

if TYPE_CHECKING:
    from wanoffload.policy.planning import Plan

logger = logging.getLogger(__name__)

SMALLEST = Workload(height=64, width=64, frames=1, steps=1, guidance=0.0)
LONG = replace(SMALLEST, steps=100)  # what comes once a generation is spread over these
LARGEST = Workload(height=2160, width=3840, frames=241, steps=100, guidance=5.0)
"""What is decided alike for all three is decided before the size is known."""


def decide(
    model: object,
    workload: Workload | None,
    hardware: Hardware,
    mode: str,
    choices: Mapping[str, Any],
) -> Plan:
    """`wanoffload.plan`, which is loaded when it is needed."""
    from wanoffload.policy.planning import plan

    return plan(model, workload, hardware, mode=mode, **choices)


class Enabled(hooks.Attached):
    """An enabled pipeline's runtime. Copies and pickles of the pipeline lose it."""

    plan: Plan

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        model: object,
        mode: str,
        hardware: Hardware,
        choices: Mapping[str, Any],
        device: torch.device,
        host: HostChoice,
        unread: Mapping[str, Unread] = MappingProxyType({}),
    ) -> None:
        self.device = device
        self.floor = Floor()
        self.components = {
            name: Component(name, module, device, self.floor, unread.get(name))
            for name, module in modules.items()
        }
        self._unread = tuple(unread)
        self._model = look(model)  # once, before anything is moved
        self._mode = mode
        self._hardware = hardware
        self._choices = dict(choices)
        self._host = host
        self._given = False  # the workload was given, not found at a call
        self._workload: Workload | None = None
        self._undecided = True  # something waits for the first call

    # Deciding.

    def begin(self, workload: Workload | None) -> None:
        """Decides and acts, as far as that is possible. If it raises, nothing has changed.

        Weights that are unread are read, whatever a size may change later.
        """
        plan = self._decide(workload)
        wanted = self._treatments(plan)
        certain = wanted if workload is not None else self._certain(wanted)
        self._adopt(plan, workload, certain | {name: wanted[name] for name in self._unread})
        self._given = workload is not None
        self._undecided = len(certain) < len(self.components)
        self._unread = ()

    def settle(self) -> None:
        """Decides without a size what would wait for a pipeline's first call."""
        if self._undecided:
            self._adopt(self.plan, None, self._treatments(self.plan))
            self._undecided = False

    def _decide(self, workload: Workload | None) -> Plan:
        return decide(self._facts(), workload, self._hardware, self._mode, self._choices)

    def _facts(self) -> ModelFacts:
        """With the form in which blocks stand now: to change it takes seconds."""
        parts = self.components.values()
        shares = [part.packed for part in parts if part.packed is not None]
        standing = {part.granularity for part in parts if part.granularity is not None}
        granularity = standing.pop() if len(standing) == 1 else None
        return replace(self._model, packed=max(shares, default=None), granularity=granularity)

    def _treatments(self, plan: Plan) -> dict[str, Treatment]:
        return {name: treatment(plan, name) for name in self.components}

    def _certain(self, wanted: dict[str, Treatment]) -> dict[str, Treatment]:
        """Those that no size of the workload changes."""
        try:
            extremes = [self._treatments(self._decide(w)) for w in (SMALLEST, LONG, LARGEST)]
        except ValueError:  # a choice that some sizes exclude
            return {}
        return {n: t for n, t in wanted.items() if all(other[n] == t for other in extremes)}

    def _adopt(self, plan: Plan, workload: Workload | None, wanted: dict[str, Treatment]) -> None:
        for message in plan.messages:
            logger.info("%s", message)
        require_fit(plan, self._hardware, self._host)
        self._change(wanted)
        self.plan = plan
        self._workload = workload
        for number, runtime in self._dit_runtimes():
            self._expect(number, runtime)

    def _expect(self, number: int, runtime: Any) -> None:
        """A prediction for this machine, and page-locked weights, is compared with what is
        measured. `number`: of the DiT, in the plan."""
        known = self._workload
        elsewhere = set(runtime.tiers) != {PINNED} or self._hardware.platform != self.device.type
        if known is None or elsewhere:
            runtime.expect(None, 1)
        else:
            # Facts that were given may be of fewer.
            rates = next(iter(self.plan.rates[number:]), None)
            runtime.expect(self.plan.step_seconds, known.forwards_per_step, rates)

    # Acting.

    def _change(self, wanted: dict[str, Treatment]) -> None:
        """Changes the components whose treatment differs; all of them, or, if it raises, none."""
        changed = [n for n, t in wanted.items() if self.components[n].treatment != t]
        if not changed:
            return
        self.floor.clear()
        before = {name: self.components[name].treatment for name in changed}
        # What leaves the device makes room for what comes.
        # What is read takes of the host's memory what others leave.
        parts = self.components
        changed.sort(key=lambda n: (parts[n].unread, parts[n].bytes_on_device(wanted[n])))
        with ordinary_tensors(), self._bar(changed, wanted) as bar:
            done: list[str] = []
            try:
                for name in changed:
                    done.append(name)
                    host = share(name, self.components, wanted, self._host)
                    self.components[name].become(wanted[name], bar, host)
            except BaseException:
                self._take_back(done, before, bar)
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what left the device belongs to others now

    def _bar(self, changed: list[str], wanted: dict[str, Treatment]) -> Any:
        total = sum(self.components[name].bytes_to_move(wanted[name]) for name in changed)
        title = "load" if self._unread else "enable"
        return tqdm(total=total, unit="B", unit_scale=True, desc=title, leave=False, delay=1.0)

    def _take_back(self, done: list[str], before: dict[str, Treatment | None], bar: Any) -> None:
        for name in done:
            component = self.components[name]
            component.begin_restore() if before[name] is None else component.release()
        for name in reversed(done):
            old = before[name]
            if old is None:
                self.components[name].restore()
            else:
                self.components[name].become(old, bar)

    def end(self) -> None:
        """Every component ordinary, on the CPU. If it raises, it can be called again."""
        self._clear_floor()
        with ordinary_tensors():
            for component in self.components.values():
                component.to_host()

    # Calls.

    def before_call(self, pipe: Any, workload: Workload | None) -> None:
        """Decides what waited for the size, or what another size changes."""
        self._check_components(pipe)
        if not self._given and (self._undecided or workload != self._workload):
            plan = self._decide(workload)
            self._adopt(plan, workload, self._treatments(plan))
            self._undecided = False
        for number, runtime in self._dit_runtimes():
            if workload != self._workload:
                runtime.expect(None, 1)
            elif runtime.stats().predicted_step_seconds is None:
                self._expect(number, runtime)

    def after_call(self) -> None:
        """However the call ended."""
        self._clear_floor()
        for _, runtime in self._dit_runtimes():
            runtime.stats()  # which compares the step's time with the predicted one

    def _clear_floor(self) -> None:
        """Between calls: a forward of this thread that has not ended was interrupted in its end."""
        for component in self.components.values():
            if component.runtime is not None:
                component.runtime.forget_forward()
        self.floor.clear()

    def _dit_runtimes(self) -> list[tuple[int, Any]]:
        """Of those that stream, with their numbers in the plan."""
        dits = [each for each in self.components.values() if role(each.name) == DIT]
        return [(n, each.runtime) for n, each in enumerate(dits) if each.runtime is not None]

    def _check_components(self, pipe: Any) -> None:
        """A component that was taken away becomes ordinary; one that was replaced is refused."""
        for name, component in list(self.components.items()):
            now = getattr(pipe, name, None)
            if now is None:
                with ordinary_tensors():
                    component.release()  # whoever holds it can use it, and give it back later
                del self.components[name]
            elif now is not component.module:
                raise PipelineError(
                    f"pipe.{name} was replaced while the pipeline is enabled; call "
                    "wanoffload.disable(pipe), replace it, and enable it again"
                )
            elif not component.in_place():
                raise PipelineError(
                    f"pipe.{name} was unwrapped, or its hook was taken out, while the pipeline is "
                    "enabled; call wanoffload.disable(pipe) and enable it again"
                )


def within(hardware: Hardware, host: HostChoice) -> Hardware:
    """The machine, of whose host memory no more than the budget is to be had."""
    if host.budget is None:
        return hardware
    limit = host.budget + HOST_RESERVE_BYTES
    there = hardware.host_memory
    return replace(hardware, host_memory=limit if there is None else min(limit, int(there)))


def require_fit(plan: Plan, hardware: Hardware, host: HostChoice) -> None:
    """Raises the error that says which memory is too small, before anything is moved."""
    if plan.fits:
        return
    message = plan.messages[-1] if plan.messages else "nothing that is permitted fits"
    if host.budget is not None:
        message += f" (host_budget is {gb(host.budget)}, beside a reserve)"
    locked, there = plan.host_locked_bytes, hardware.host_memory
    if locked is not None and there is not None and locked + HOST_RESERVE_BYTES > int(there):
        raise HostMemoryError(message)
    raise DeviceMemoryError(message)
