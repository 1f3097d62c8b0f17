"""Services in this process: a call is a plain method call, a hook runs on the service's own thread."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from sage._hosts.gate import ConcurrentGate
from sage._hosts.gated import GatedHost
from sage._hosts.instance import Instance, has_coroutine_hooks
from sage._logs import log_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sage._plan.logical import ServiceSpec
    from sage._runtime.backend import HostSurroundings
    from sage.service import ServiceContext

log = log_of("sage.dispatcher")


class InlineHost(GatedHost):
    """Runs one service in this process."""

    def __init__(self, spec: ServiceSpec, context: ServiceContext, surroundings: HostSurroundings) -> None:
        super().__init__(spec, context, surroundings)
        self._instance: Instance | None = None
        # The one whose hooks run: its constructor may have raised after it had deferred something.
        self._latest = Instance(spec.name, surroundings.loop)
        self._kind: type = object  # of an instance that was forgotten

    @property
    def hooks(self) -> frozenset[str]:
        return self._latest.hooks

    def adopt(self, context: ServiceContext, surroundings: HostSurroundings) -> None:
        super().adopt(context, surroundings)
        self._latest.loop = surroundings.loop

    def forget_instance(self) -> None:
        """Let go of an instance that was cleaned up, on the thread of its hooks, so that its memory is free."""
        self._lane.run(self._forget)

    def _forget(self) -> None:
        self._instance, self._kind = None, self._latest.kind
        self._latest = Instance(self.spec.name, self._around.loop)

    def is_coroutine(self, name: str) -> bool:
        """Return whether `name` is a coroutine method, also of an instance that was forgotten."""
        return super().is_coroutine(name) or inspect.iscoroutinefunction(getattr(self._kind, name, None))

    @property
    def _is_there(self) -> bool:
        return self._instance is not None

    def _attribute(self, name: str) -> object:
        assert self._instance is not None
        return self._instance.attribute(name)

    def _build(self) -> frozenset[str]:
        instance = self._latest = Instance(self.spec.name, self._around.loop)
        if has_coroutine_hooks(self.spec.target):
            self._around.loop.begin()  # its cleanup could not run if the loop were not to be had later
        instance.build(self.spec.target, self.spec.args, self.spec.kwargs, self._context)
        self._instance = instance
        if instance.has_coroutines:
            # A lock of threads would block the loop.
            concurrency = self.spec.options.concurrency
            self._gate = ConcurrentGate(concurrency, lambda: self._around.loop.going_on(), self._waits)
        return instance.hooks

    def _coroutine_method(self, name: str) -> Callable[..., Awaitable[object]] | None:
        return None if self._instance is None else self._instance.coroutine_method(name)

    def _run_hook(self, hook: str, due: float | None) -> object:  # noqa: ARG002
        return self._latest.run_hook(hook)

    def _clean_late(self) -> None:
        log.error("constructor returned after its bound, cleaning up service=%r", self.spec.name)
        if "cleanup" not in self.hooks:
            return
        try:
            self._run_hook("cleanup", None)
        except BaseException as error:  # the job may be over, so the log is the only place left for it
            log.error("cleanup failed service=%r", self.spec.name, exc_info=error)
