"""A transformer that was wrapped before its pipeline is enabled: taken over as it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from wanoffload import hooks, wrapping
from wanoffload.budget import Budget
from wanoffload.host_tiers import DISK, HostChoice
from wanoffload.runtime import Offloader


@dataclass(frozen=True)
class Found:
    """How a transformer was wrapped when it was found."""

    module: nn.Module
    runtime: Offloader
    prefetch: int | None
    pack: float
    budget: Budget

    def give_back(self) -> Found:
        """Wrapped as it was: by the same runtime, or, if it was unwrapped since, by a new one."""
        if hooks.attached(self.module) is self.runtime:
            self.runtime.before_forward = None
            self.runtime.set_prefetch(self.prefetch)
            return self
        runtime = wrapping.stream(
            self.module,
            self.prefetch,
            device=self.runtime.device,
            vram_budget=self.budget,
            granularity=self.runtime.granularity,
            host=self._host(),
            pack=self.pack,
            verify=self.runtime.verify,
        )
        return replace(self, runtime=runtime)

    def _host(self) -> HostChoice:
        """As it was, if it was one; what was on disk came into memory when it was unwrapped."""
        tiers = set(self.runtime.host_plan.tiers)
        alike = len(tiers) == 1 and DISK not in tiers
        return HostChoice(tiers.pop()) if alike else HostChoice()


def find_wrapped(module: nn.Module) -> Found | None:
    """None: the module is not wrapped."""
    runtime = hooks.attached(module)
    if not isinstance(runtime, Offloader):
        return None
    return Found(module, runtime, runtime.prefetch, runtime.pack, runtime.budget)


def why_not(module: nn.Module, device: torch.device, *, is_dit: bool) -> str | None:
    """Why `enable` can't have a module, said of it. None: it can, or nothing in it is wrapped."""
    inside = {id(part) for part in module.modules() if hooks.attached(part) is not None}
    if not inside:
        return None
    runtime = hooks.attached(module)
    if not isinstance(runtime, Offloader) or not is_dit:
        return "is wrapped already, in part" if runtime is None else "is wrapped already"
    if runtime.closed:
        return "is wrapped already, and closed"
    if runtime.before_forward is not None:
        return "is streamed by another pipeline that is enabled (disable that one, if it is there)"
    own = {id(module), *(id(binding.unit.module) for binding in runtime.bindings)}
    if inside != own | {id(whole.block) for whole in runtime.together}:
        return "was changed since it was wrapped: blocks were exchanged, or wrapped by themselves"
    if runtime.device != device:
        return f"is wrapped already, for {runtime.device} and not for {device}"
    return None


def packed(modules: Iterable[nn.Module]) -> bool | None:
    """Whether wrapped transformers are packed; None: none is wrapped, or not all are alike."""
    shares = {known.pack for known in map(find_wrapped, modules) if known is not None}
    return bool(shares.pop()) if shares in ({0.0}, {1.0}) else None


def granularity(modules: Iterable[nn.Module]) -> str | None:
    """Of wrapped transformers, what is fetched at once; None: none is wrapped, or they differ."""
    found = {known.runtime.granularity for known in map(find_wrapped, modules) if known is not None}
    return found.pop() if len(found) == 1 else None


def blocks_ahead(modules: Iterable[nn.Module]) -> int | None:
    """The prefetch with which transformers were wrapped, the largest; None: none was, or none with
    a number."""
    found = [known.prefetch for known in map(find_wrapped, modules) if known is not None]
    return max((ahead for ahead in found if ahead is not None), default=None)
