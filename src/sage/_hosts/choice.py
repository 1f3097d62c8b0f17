"""Which host runs a service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sage._hosts.inline import InlineHost

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._hosts.gated import GatedHost
    from sage._plan.logical import ServiceSpec
    from sage._runtime.backend import Backend
    from sage._runtime.coroutines import CoroutineLoop
    from sage.service import ServiceContext


def make_host(
    spec: ServiceSpec,
    context: ServiceContext,
    backend: Backend,
    loop: CoroutineLoop,
    on_died: Callable[[int, str], None],
) -> GatedHost:
    """Return the host of a service."""
    if spec.command is not None:
        # What starts processes is imported only where there is one to start.
        from sage._hosts.command import CommandHost

        return CommandHost(spec, context, backend, loop, on_died)
    return InlineHost(spec, context, backend, loop, on_died)
