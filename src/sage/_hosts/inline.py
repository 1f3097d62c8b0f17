"""Services in this process: a call is a plain method call, a hook runs on the service's own thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sage._hosts.gate import SharedGate
from sage._hosts.gated import GatedHost
from sage._hosts.instance import Instance
from sage._logs import log_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._plan.logical import ServiceSpec
    from sage._runtime.backend import Backend
    from sage._runtime.coroutines import CoroutineLoop
    from sage.service import ServiceContext

log = log_of("sage.dispatcher")


class InlineHost(GatedHost):
    """Runs one service in this process."""

    def __init__(
        self,
        spec: ServiceSpec,
        context: ServiceContext,
        backend: Backend,
        loop: CoroutineLoop,
        on_died: Callable[[int, str], None],
    ) -> None:
        super().__init__(spec, context, backend, loop, on_died)
        self._instance: Instance | None = None
        # The one whose hooks run: its constructor may have raised after it had deferred something.
        self._latest = Instance(spec.name, loop)

    @property
    def hooks(self) -> frozenset[str]:
        """The names of the hooks that the instance has."""
        return self._latest.hooks

    def adopt(
        self, context: ServiceContext, backend: Backend, loop: CoroutineLoop, on_died: Callable[[int, str], None]
    ) -> None:
        """Let another job run the hooks of an instance that is kept."""
        super().adopt(context, backend, loop, on_died)
        self._latest.loop = loop

    @property
    def _is_there(self) -> bool:
        return self._instance is not None

    def _attribute(self, name: str) -> Any:
        assert self._instance is not None
        return self._instance.attribute(name)

    def _build(self) -> frozenset[str]:
        instance = self._latest = Instance(self.spec.name, self._loop)
        instance.build(self.spec.target, self.spec.args, self.spec.kwargs, self._context)
        self._instance = instance
        if instance.has_coroutines:
            # A lock of threads would block the loop.
            self._gate = SharedGate(self.spec.options.concurrency, lambda: self._loop.going_on())
        return instance.hooks

    def _coroutine_method(self, name: str) -> Callable[..., Any] | None:
        return None if self._instance is None else self._instance.coroutine_method(name)

    def _run_hook(self, hook: str, due: float | None) -> Any:  # noqa: ARG002
        return self._latest.run_hook(hook)

    def _clean_late(self) -> None:
        log.error("constructor returned after its bound, cleaning up service=%r", self.spec.name)
        if "cleanup" not in self.hooks:
            return
        try:
            self._run_hook("cleanup", None)
        except BaseException as error:  # the job may be over, so the log is the only place left for it
            log.error("cleanup failed service=%r", self.spec.name, exc_info=error)
