"""What each streamed transformer of a pipeline may take of the host's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from wanoffload import host_memory
from wanoffload.host_tiers import AUTO, HostChoice
from wanoffload.pipelines.components import PARKED, STREAMED, Component, Treatment, role
from wanoffload.policy.choices import DIT


def share(
    name: str,
    components: Mapping[str, Component],
    wanted: Mapping[str, Treatment],
    host: HostChoice,
) -> HostChoice:
    """The choice for the component of this name, which is about to become what is wanted.

    Of a budget, its part by bytes of what other kinds of components leave. Without one, of what the
    host has now, its part of what is still to be read: then those that are read come last.
    """
    own = components[name]
    kinds = {
        n: found.kind
        for n, part in components.items()
        if (found := wanted.get(n, part.treatment)) is not None
    }
    if role(name) != DIT or kinds[name] != STREAMED:
        return host
    if host.budget is not None:
        room = host.budget - _waiting(components, kinds)
        sharing = [n for n in kinds if role(n) == DIT and kinds[n] == STREAMED]
    elif host.kind == AUTO and own.unread:
        room = host_memory.to_be_had()
        sharing = [n for n, part in components.items() if part.unread]
    else:
        return host
    total = sum(components[n].block_bytes for n in sharing)
    return replace(host, budget=max(0, room) * own.block_bytes // total)


def _waiting(components: Mapping[str, Component], kinds: Mapping[str, str]) -> int:
    """Bytes of what waits on the host, streamed DiTs left out."""
    return sum(
        components[name].nbytes
        for name, kind in kinds.items()
        if kind == PARKED or (kind == STREAMED and role(name) != DIT)
    )
