"""Services in this process: a call is a plain method call, a hook runs on the service's own thread."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

from sage._hosts.gated import GatedHost
from sage.errors import UnknownServiceError, hint
from sage.service import ServiceUser

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._plan.logical import ServiceSpec
    from sage._runtime.backend import Backend
    from sage._runtime.coroutines import CoroutineLoop
    from sage.service import ServiceContext

log = logging.getLogger("sage.dispatcher")

HOOKS = ("setup", "start", "ready", "health", "stop", "cleanup")
STAND_INS = ("close", "shutdown")
"""What is called instead of `cleanup` on a class that has none; leaving a context comes last."""


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
        self._instance: Any = None
        self._hooks: dict[str, Callable[[], Any]] = {}

    @property
    def hooks(self) -> frozenset[str]:
        """The names of the hooks that the instance has."""
        return frozenset(self._hooks)

    @property
    def _is_there(self) -> bool:
        return self._instance is not None

    def _attribute(self, name: str) -> Any:
        try:
            attribute = getattr(self._instance, name)
        except AttributeError:
            raise self._unknown(name) from None
        if not inspect.iscoroutinefunction(attribute):
            return attribute
        run = self._loop
        return lambda *args, **kwargs: run.run(attribute(*args, **kwargs))

    def _run_hook(self, hook: str, due: float | None) -> Any:  # noqa: ARG002
        return self._settled(self._hooks[hook]())

    def _unknown(self, name: str) -> UnknownServiceError:
        known = [other for other in dir(self._instance) if not other.startswith("_")]
        listed = ", ".join(other for other in known if callable(getattr(self._instance, other, None)))
        error = UnknownServiceError(f'service "{self.spec.name}" has no method "{name}"')
        return hint(error, f"{type(self._instance).__name__} has: {listed or 'no methods'}.")

    def _settled(self, result: Any) -> Any:
        return self._loop.run(result) if inspect.iscoroutine(result) else result

    def _build(self) -> frozenset[str]:
        target, args, kwargs = self.spec.target, self.spec.args, self.spec.kwargs
        if isinstance(target, type) and issubclass(target, ServiceUser):
            # The context is there before the constructor runs, whether or not that calls its base's.
            instance: Any = target.__new__(target, *args, **kwargs)
            instance.ctx = self._context
            instance.__init__(*args, **kwargs)
        else:
            instance = target(*args, **kwargs)
            if isinstance(instance, ServiceUser):
                instance.ctx = self._context
        self._instance = instance
        self._hooks = {hook: method for hook in HOOKS if (method := _hook(instance, hook)) is not None}
        if "cleanup" not in self._hooks:
            stand_in = next((method for name in STAND_INS if (method := _hook(instance, name)) is not None), None)
            if stand_in is not None:
                self._hooks["cleanup"] = stand_in
            elif _has(instance, "__enter__") and _has(instance, "__exit__"):
                self._enter_at_setup(instance)
        return self.hooks

    def _clean_late(self) -> None:
        log.error("constructor returned after its bound, cleaning up service=%r", self.spec.name)
        try:
            if "cleanup" in self._hooks:
                self._settled(self._hooks["cleanup"]())
        except BaseException as error:  # the job may be over, so the log is the only place left for it
            log.error("cleanup failed service=%r", self.spec.name, exc_info=error)

    def _enter_at_setup(self, manager: Any) -> None:
        """Use what a context manager gives, from `setup` on, and leave it as the cleanup."""
        setup = self._hooks.get("setup")

        def enter() -> None:
            if setup is not None:
                setup()
            entered = manager.__enter__()
            self._hooks["cleanup"] = lambda: manager.__exit__(None, None, None)
            if entered is not None:
                self._instance = entered

        self._hooks["setup"] = enter
        self._hooks["cleanup"] = lambda: None


def _has(instance: Any, name: str) -> bool:
    # A class that answers to every name, such as a remote proxy, has no hooks because of that.
    return inspect.getattr_static(instance, name, None) is not None


def _hook(instance: Any, name: str) -> Callable[[], Any] | None:
    if not _has(instance, name):
        return None
    method = getattr(instance, name)
    if not callable(method):
        return None
    try:
        inspect.signature(method).bind()
    except TypeError:
        if isinstance(instance, ServiceUser):
            raise hint(
                TypeError(f"{type(instance).__name__}.{name} must take no arguments"), "The engine calls hooks without."
            ) from None
        return None  # A method of the class's own that only happens to have this name.
    except ValueError:
        pass  # Some methods written in C do not tell their signature.
    hook: Callable[[], Any] = method
    return hook
