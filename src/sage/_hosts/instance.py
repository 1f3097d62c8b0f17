"""One instance of a service: how it is built, which hooks it has, and how its attributes are reached."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

from sage.errors import UnknownServiceError, hint
from sage.service import BaseService, ServiceUser

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from contextlib import AbstractContextManager

    from sage._cassette import Recorded, Tape
    from sage._runtime.coroutines import CoroutineLoop
    from sage.service import ServiceContext

HOOKS = ("setup", "start", "ready", "health", "stop", "cleanup")
STAND_INS = ("close", "shutdown")
"""Called instead of `cleanup` on a class without it; leaving a context comes last."""


class Instance:
    """The object of a user's class or callable, in the process in which it was built.

    Attributes:
        name: the service's name.
        loop: where its coroutines run; another job that takes a kept service over sets its own.
    """

    def __init__(self, name: str, loop: CoroutineLoop) -> None:
        self.name = name
        self.loop = loop
        self._target: object = None
        self._tape: Tape | None = None
        self._context: ServiceContext | None = None
        self._hooks: dict[str, Callable[[], object]] = {}

    @property
    def hooks(self) -> frozenset[str]:
        """The names of the hooks that it has; with something deferred, that is its cleanup."""
        has_deferred = self._context is not None and self._context.has_deferred
        return frozenset(self._hooks) | ({"cleanup"} if has_deferred or self._tape is not None else set())

    @property
    def kind(self) -> type:
        """Its class."""
        return type(self._target)

    def build(
        self,
        make: Callable[..., object],
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        context: ServiceContext,
    ) -> None:
        """Call the constructor, and look for hooks. If it raises, "cleanup" still calls the deferred callbacks."""
        self._context = context
        if (recorded := _recorded(make)) is not None:
            self._tape = recorded.tape()
            make = recorded.target
        if isinstance(make, type) and issubclass(make, ServiceUser):
            # The context is there before the constructor runs, whether or not that calls its base's.
            target: Any = make.__new__(make, *args, **kwargs)
            target.ctx = context
            target.__init__(*args, **kwargs)
        else:
            target = make(*args, **kwargs)
            if isinstance(target, ServiceUser):
                target.ctx = context
        self._target = target
        self._hooks = {hook: method for hook in HOOKS if (method := _hook(target, hook)) is not None}
        if isinstance(target, ServiceUser) and (drain := _drain_of(target)) is not None:
            self._hooks["drain"] = drain
        if "cleanup" not in self._hooks:
            stand_in = next((method for name in STAND_INS if (method := _hook(target, name)) is not None), None)
            if stand_in is not None:
                self._hooks["cleanup"] = stand_in
            elif _has(target, "__enter__") and _has(target, "__exit__"):
                self._enter_at_setup(target)

    def run_hook(self, hook: str) -> object:
        """Run a hook to its end, a coroutine too, and return its value."""
        if hook == "cleanup":
            self._clean()
            return None
        return self._settled(self._hooks[hook]())

    def attribute(self, name: str) -> object:
        """Return an attribute; a method is returned as a plain function, coroutine functions too.

        Only a caller on the loop has to await the result of a coroutine function.

        Raises:
            UnknownServiceError: the method does not exist; the others are listed.
        """
        try:
            attribute = self._read(name)
        except AttributeError:
            raise self._unknown(name) from None
        if not inspect.iscoroutinefunction(attribute):
            return attribute
        return lambda *args, **kwargs: self.loop.answer(attribute(*args, **kwargs))

    def coroutine_method(self, name: str) -> Callable[..., Coroutine[object, object, object]] | None:
        """Return a coroutine method as it is, or None if this is something else."""
        if not inspect.iscoroutinefunction(getattr(self._target, name, None)):
            return None
        method = self._read(name)
        return method if inspect.iscoroutinefunction(method) else None

    def _read(self, name: str) -> object:
        attribute = getattr(self._target, name)
        return attribute if self._tape is None else self._tape.on(name, attribute)

    @property
    def has_coroutines(self) -> bool:
        """Whether any of the methods that callers may use is a coroutine function."""
        names = (name for name in dir(self._target) if not name.startswith("_") and name not in HOOKS)
        found = (inspect.getattr_static(self._target, name, None) for name in names)
        return any(inspect.iscoroutinefunction(getattr(attribute, "__func__", attribute)) for attribute in found)

    def _clean(self) -> None:
        """Call the cleanup, at most once in all, and the deferred callbacks."""
        errors: list[BaseException] = []
        cleanup = self._hooks.pop("cleanup", None)
        try:
            if cleanup is not None:
                self._settled(cleanup())
        except BaseException as error:  # the deferred callbacks are still called
            errors.append(error)
        if self._context is not None:
            errors += self._context.run_deferred(self._settled)
        if self._tape is not None:
            self._tape.close()
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise BaseExceptionGroup(f'the cleanup of service "{self.name}" failed in {len(errors)} places', errors)

    def _settled(self, result: object) -> object:
        return self.loop.run(result) if inspect.iscoroutine(result) else result

    def _unknown(self, name: str) -> UnknownServiceError:
        known = [other for other in dir(self._target) if not other.startswith("_")]
        listed = ", ".join(other for other in known if callable(getattr(self._target, other, None)))
        error = UnknownServiceError(f'service "{self.name}" has no method "{name}"')
        return hint(error, f"{type(self._target).__name__} has: {listed or 'no methods'}.")

    def _enter_at_setup(self, manager: AbstractContextManager[object]) -> None:
        """Enter a context manager in `setup`, use its value, and leave it as the cleanup."""
        setup = self._hooks.get("setup")

        def enter() -> None:
            if setup is not None:
                setup()
            entered = manager.__enter__()
            self._hooks["cleanup"] = lambda: manager.__exit__(None, None, None)
            if entered is not None:
                self._target = entered

        self._hooks["setup"] = enter
        self._hooks["cleanup"] = lambda: None


def has_coroutine_hooks(target: object) -> bool:
    """Return whether a hook of a class, or the substitute for its cleanup, is a coroutine function."""
    if (recorded := _recorded(target)) is not None:
        target = recorded.target
    names = (*HOOKS, *STAND_INS) if isinstance(target, type) else ()
    return any(inspect.iscoroutinefunction(inspect.getattr_static(target, name, None)) for name in names)


def _recorded(make: object) -> Recorded | None:
    """Return what builds a recorded service, or None; the cassette is not loaded for jobs that record nothing."""
    if "sage._cassette" not in sys.modules:
        return None
    from sage._cassette import Recorded

    return make if isinstance(make, Recorded) else None


def _has(instance: object, name: str) -> bool:
    # A class that answers to every name, such as a remote proxy, has no hooks because of that.
    return inspect.getattr_static(instance, name, None) is not None


def _drain_of(service: ServiceUser) -> Callable[[], object] | None:
    """Return the `drain` of a service of ours, if it can be called without arguments.

    One that takes arguments, or that belongs to another class, is a method like others: the name is too common.
    """
    method: object = getattr(service, "drain", None) if _has(service, "drain") else None
    if not callable(method):
        return None
    try:
        inspect.signature(method).bind()
    except (TypeError, ValueError):
        return None
    return method


def _hook(instance: object, name: str) -> Callable[[], object] | None:
    if not _has(instance, name):
        return None
    method = getattr(instance, name)
    # `BaseService` defines empty hooks, so that a service may call `super()`; they need not run.
    if not callable(method) or getattr(method, "__func__", method) is getattr(BaseService, name, None):
        return None
    try:
        inspect.signature(method).bind()
    except TypeError:
        if isinstance(instance, ServiceUser):
            raise hint(
                TypeError(f"{type(instance).__name__}.{name} must take no arguments"),
                "Hooks are called without arguments.",
            ) from None
        return None  # A method of the class's own that only happens to have this name.
    except ValueError:
        pass  # Some methods written in C do not tell their signature.
    hook: Callable[[], object] = method
    return hook
