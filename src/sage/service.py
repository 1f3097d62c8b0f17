"""Services: long-lived objects that the tasks of a job share by name."""

from __future__ import annotations

import json
import logging
import os
import threading
from operator import index
from typing import TYPE_CHECKING, Any, Generic, Protocol

from sage._current_job import here
from sage._forks import RefusedCalls, useless_after_fork
from sage._service_options import DEFAULT_OPTIONS as DEFAULT_OPTIONS
from sage._service_options import ServiceOptions as ServiceOptions
from sage._types import T_co
from sage.errors import ServiceUnavailableError, UnknownServiceError, UnsupportedPlanError, hint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sage._calls import CallFuture

DEFAULT_METHOD = "process"

ABSENT = object()
"""Stands for an argument that was not given."""

logging.getLogger("sage").addHandler(logging.NullHandler())


class ServiceCalls(Protocol):
    """The part of a service's host that a handle needs."""

    def method(self, name: str) -> Any:
        """Return the attribute `name` of the service, a method bound to the rules of the host.

        Raises:
            UnknownServiceError: the service has no such attribute; the known methods are listed.
        """

    def call(self, name: str, args: tuple[object, ...], kwargs: dict[str, object], timeout_s: float | None) -> object:
        """Call a method and return its answer, or raise its exception, or `ServiceTimeoutError`."""

    def call_async(
        self, name: str, args: tuple[object, ...], kwargs: dict[str, object], timeout_s: float | None
    ) -> CallFuture:
        """Start a call on the service's own threads; a coroutine of a job may await the future."""

    def is_coroutine(self, name: str) -> bool:
        """Return whether `name` is a coroutine method, whose calls in coroutines of a job have to be awaited."""


class ServiceHandle(Generic[T_co]):
    """Stands for a service in user code: `handle.recall(q)` calls `recall` of the service of the running job.

    It can be captured by lambdas, given to functions and to other services as an argument, and passed on itself as a
    function: `stream.map(handle.recall)`. Its own attributes begin with an underscore, so that every public name is one
    of the service. Calling the handle itself calls `process`.

    A coroutine method is run to its end for whoever calls it, as any other method. In a coroutine on the event loop of
    a job, such as a function of `map_async`, the call is awaited instead: `await handle.generate(prompt)`. It waits for
    its place under the service's concurrency without keeping other coroutines from going on. A plain method blocks
    them all while it runs; `await self.call_service_async(...)` moves such a call to another thread.
    """

    def __init__(self, name: str, target: object) -> None:
        self._name = name
        self._target = target
        self._calls: ServiceCalls | None = None
        self._methods: dict[str | None, Callable[..., Any]] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self._calls is None:
            return ServiceMethod(self, name)
        method = self._calls.method(name)
        if callable(method):
            # Found by plain attribute access from now on: resolving by name each time would cost as much as the call.
            self.__dict__[name] = method
        return method

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Call the service's `process`."""
        return getattr(self, DEFAULT_METHOD)(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<ServiceHandle {self._name!r}>"

    def __copy__(self) -> ServiceHandle[T_co]:
        return self

    def __deepcopy__(self, memo: object) -> ServiceHandle[T_co]:
        return self

    def __reduce__(self) -> tuple[Callable[[str], ServiceHandle], tuple[str]]:
        # In another process it leads to the same service by another way.
        return handle_of, (self._name,)

    def _connect(self, calls: ServiceCalls | None) -> None:
        """Lead calls to a host, or to nowhere with None. The engine calls this, before and after a job."""
        self._calls = calls
        if calls is not None:
            useless_after_fork(self)
        for name in [name for name in self.__dict__ if not name.startswith("_")]:
            del self.__dict__[name]
        self._methods.clear()

    def _after_fork_in_child(self) -> None:
        if self._calls is not None:
            self._connect(RefusedCalls(self._name))

    def _method(self, name: str | None) -> Callable[..., Any]:
        """Return the method of this name, or `process` for None, and note it for further calls by name."""
        method: Callable[..., Any] = getattr(self, name or DEFAULT_METHOD)
        if self._calls is not None and callable(method):
            self._methods[name] = method
        return method

    def _require(self) -> ServiceCalls:
        if self._calls is None and self._target is None:
            text = f'the handle of service "{self._name}" was unpickled outside of a job that runs it'
            error = ServiceUnavailableError(text, service=self._name)
            raise hint(error, "Unpickle it in a function or a service of that job, from open() on.")
        if self._calls is None:
            error = ServiceUnavailableError(f'service "{self._name}" is not running', service=self._name)
            raise hint(error, "Services run from env.submit() until the job ends; keep_services=True keeps them.")
        return self._calls


def resolve_handles(handles: Mapping[str, ServiceHandle]) -> None:
    """Set the meaning of handles that are unpickled on this thread from now on."""
    here.handles = handles


def handle_of(name: str) -> ServiceHandle:
    """Return the object that a pickled handle becomes: the handle of the same name in the surrounding job.

    Outside a job, calls of the handle raise `ServiceUnavailableError`.
    """
    found = here.handles.get(name)
    if found is None and here.job is not None:
        found = here.job.handle_of(name)
    return found if isinstance(found, ServiceHandle) else ServiceHandle(name, None)


class ServiceMethod:
    """A method of a service, named before the service runs; calling it calls the service of the running job.

    It stands for other attributes too, such as the `url` of a command: used as text (`f"{db.url}/ping"`) or as a
    number, it has the value of the running service's attribute, and raises `ServiceUnavailableError` if the service is
    not running.
    """

    def __init__(self, handle: ServiceHandle, name: str) -> None:
        self.handle = handle
        self.__name__ = name

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Call the method on the running service."""
        return self.resolve()(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<ServiceMethod {self.__name__!r} of {self.handle._name!r}>"

    def __str__(self) -> str:
        is_method = callable(getattr(self.handle._target, self.__name__, None))
        return repr(self) if is_method else str(self.resolve())

    def __index__(self) -> int:
        return index(self.resolve())

    def __copy__(self) -> ServiceMethod:
        return self

    def __deepcopy__(self, memo: object) -> ServiceMethod:
        return self

    def __reduce__(self) -> tuple[type[ServiceMethod], tuple[ServiceHandle, str]]:
        return ServiceMethod, (self.handle, self.__name__)

    def resolve(self) -> Any:
        """Return the attribute of the running service.

        Raises:
            ServiceUnavailableError: the service is not running.
        """
        return self.handle._require().method(self.__name__)


class Supervision(Protocol):
    """The supervision of a job, as a service's context sees it; any thread may call it."""

    def deferred(self, service: str, incarnation: int) -> None:
        """Say that this incarnation has something to clean up from now on, whether its constructor succeeds or not."""

    def extend(self, service: str, incarnation: int, seconds: float) -> None:
        """Ask for more time for the hook that runs."""

    def used(self, service: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count the tokens of an answer, and return when they count."""

    def claim(self, service: str, entry: dict[str, object]) -> None:
        """Record a thing to reap if the service's process is lost, and return when the entry is safe on disk.

        An entry is one of `{"claim": "path", "path": str}`, `{"claim": "process", "pid": int}`,
        `{"claim": "call", "function": "module:function", "args": list}` and `{"claim": "release", "pid": int}`.

        Raises:
            UnsupportedPlanError: the job keeps no journal.
        """


class UserContext:
    """The surrounding job, as a function or a service sees it.

    Attributes:
        name: the name of the operator or of the service.
    """

    def __init__(
        self, name: str, services: Mapping[str, ServiceHandle], note: Callable[[str], None] | None = None
    ) -> None:
        self.name = name
        self._services = services
        self._note = note
        # The methods of each service that was asked for, which its handle finds, and forgets with the job.
        self._found: dict[str, dict[str | None, Callable[..., Any]]] = {}

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # whoever runs a copy of the function, here or elsewhere, gives it a context of its own

    def service(self, name: str) -> ServiceHandle:
        """Return the handle of the service `name`.

        Raises:
            UnknownServiceError: no such service is registered; the known ones are listed.
        """
        try:
            handle = self._services[name]
        except KeyError:
            raise unknown_service(f'"{self.name}"', name, self._services) from None
        if self._note is not None:
            self._note(name)
        self._found[name] = handle._methods
        return handle


class ServiceContext(UserContext):
    """The surrounding job, as a service sees it: it can also take over cleanups.

    Each incarnation has a context of its own. Any thread may use it.

    Attributes:
        name: the name of the service.
        incarnation: how many times the service was built in this job, this time included; 0 before the first.
    """

    def __init__(
        self,
        name: str,
        services: Mapping[str, ServiceHandle],
        note: Callable[[str], None] | None = None,
        supervision: Supervision | None = None,
        incarnation: int = 0,
    ) -> None:
        super().__init__(name, services, note)
        self.incarnation = incarnation
        self._supervision = supervision
        self._deferred: list[Callable[[], object]] = []
        self._lock = threading.Lock()

    def defer(self, callback: Callable[[], object]) -> None:
        """Have `callback` called at the end of the service's teardown, after `cleanup`, the last given first.

        It is called once, also if the constructor, `setup` or `start` raised after this, and on the thread of the
        hooks, within the bound of `cleanup`. An exception counts as an error of the cleanup; the other callbacks are
        still called.
        """
        with self._lock:
            self._deferred.append(callback)
            is_first = len(self._deferred) == 1
        if is_first and self._supervision is not None:
            self._supervision.deferred(self.name, self.incarnation)

    def extend_timeout(self, seconds: float) -> None:
        """Give the hook that runs more time, up to 60 s in all, and never beyond the budget of the job's stop.

        Raises:
            ValueError: `seconds` is negative.
        """
        if seconds < 0:
            raise ValueError(f"a time-out is extended by {seconds} s, a negative number of seconds")
        if self._supervision is not None:
            self._supervision.extend(self.name, self.incarnation, seconds)

    def used(self, *, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """Count tokens towards the limits of the job; a service that asks a model calls this with each answer."""
        if self._supervision is not None:
            self._supervision.used(self.name, prompt_tokens, completion_tokens)

    def own_path(self, path: str | os.PathLike[str]) -> None:
        """Declare a file or folder that is to be removed if the service is lost; call this before you make it."""
        self._claim(claim="path", path=os.path.abspath(os.fspath(path)))

    def own_process(self, pid: int) -> None:
        """Declare a process that is to be ended if the service is lost."""
        self._claim(claim="process", pid=pid)

    def on_lost(self, function: str, args: Sequence[object] = ()) -> None:
        """Declare a function to call, in a fresh process, at least once, if the service is lost.

        Args:
            function: "module:function".
            args: its arguments, of the kinds that JSON has.

        Raises:
            ValueError: `function` names no function, or `args` cannot be written as JSON.
        """
        module, colon, name = function.partition(":")
        if not (module and colon and name):
            raise ValueError(f'on_lost takes "module:function", not {function!r}')
        try:
            json.dumps(list(args))
        except TypeError as error:
            raise ValueError(f"on_lost({function!r}): the arguments cannot be written as JSON: {error}") from None
        self._claim(claim="call", function=function, args=list(args))

    def release_process(self, pid: int) -> None:
        """Let a child process live on after the service; it is listed, and not ended with it."""
        self._claim(claim="release", pid=pid)

    def fresh(self, incarnation: int) -> ServiceContext:
        """Return the context of another incarnation. Hosts call this before they build an instance."""
        return ServiceContext(self.name, self._services, self._note, self._supervision, incarnation)

    def follow(self, other: ServiceContext) -> None:
        """Ask the job of another context from now on; the instance that has this one was kept for that job."""
        self.incarnation = 1
        self._services, self._note = other._services, other._note
        self._supervision = other._supervision
        found, self._found = self._found, {}
        for name in sorted(found.keys() & self._services.keys()):
            self.service(name)  # the service that it calls has to outlive it in this job too

    @property
    def has_deferred(self) -> bool:
        """Whether callbacks wait to be called."""
        return bool(self._deferred)

    def run_deferred(self, settle: Callable[[object], object]) -> list[BaseException]:
        """Call the deferred callbacks, most recent first, and return their errors.

        Hosts call this at the end of "cleanup", also where the class has none or was not built; a second call finds
        nothing to do. `settle` waits for a coroutine.
        """
        errors: list[BaseException] = []
        while self._deferred:
            with self._lock:
                callback = self._deferred.pop()
            try:
                settle(callback())
            except BaseException as error:  # the host raises it when all were called
                errors.append(error)
        return errors

    def _claim(self, **entry: object) -> None:
        if self._supervision is None:
            raise no_journal(self.name, entry)
        self._supervision.claim(self.name, entry)


def no_journal(service: str, entry: dict[str, object]) -> UnsupportedPlanError:
    """Return the error for a claim in a job that keeps no journal."""
    error = UnsupportedPlanError(f'service "{service}" claims {entry}, but this job keeps no journal')
    return hint(error, "Jobs of a LocalEnvironment keep one.")


def unknown_service(user: str, name: str, known: Iterable[str]) -> UnknownServiceError:
    """Return the error for a use of a service that is not registered."""
    error = UnknownServiceError(f'{user} uses service "{name}", which is not registered')
    listed = ", ".join(f'"{other}"' for other in known) or "none"
    return hint(error, f'Call env.register_service("{name}", ...) before env.submit(). Registered: {listed}.')


class ServiceUser:
    """The part that functions and services have in common: a context, a logger and calls of services.

    A subclass whose `__init__` does not call `super().__init__()` works: the engine sets `ctx`.
    """

    ctx: Any = None

    if not TYPE_CHECKING:  # so that type checkers find arguments for a class without a constructor of its own

        def __init__(self, *args, **kwargs):
            """Take all that a subclass hands up, as programs of 2025 do by `super().__init__(config)`; keep nothing.

            Raises:
                TypeError: arguments for a class without a constructor of its own, on which they would have no effect.
            """
            following = super().__init__
            if getattr(following, "__objclass__", None) is not object:
                following(*args, **kwargs)  # The class derives from another one beside this, which is next in line.
            elif type(self).__init__ is ServiceUser.__init__ and (args or kwargs):
                raise TypeError(f"{type(self).__name__}() takes no arguments")

    @property
    def name(self) -> str:
        """The name of the operator or service, or of the class while no job runs it."""
        return self.ctx.name if self.ctx is not None else type(self).__name__

    @property
    def logger(self) -> logging.Logger:
        """A logger of the standard library, named after the operator or service."""
        return logging.getLogger(f"sage.user.{self.name}")

    def service(self, name: str) -> ServiceHandle:
        """Return the handle of the service `name`; its methods are the service's."""
        if self.ctx is None:
            error = ServiceUnavailableError(f'{type(self).__name__} asks for service "{name}" outside of a job')
            raise hint(error, "Services can be used from open() on, not in a function's constructor.")
        handle: ServiceHandle = self.ctx.service(name)
        return handle

    def call_service(
        self,
        name: str,
        first: object = ABSENT,
        /,
        *args: object,
        method: str | None = None,
        timeout: float | None = None,
        **kwargs: object,
    ) -> Any:
        """Call a service and return its answer.

        Args:
            name: the service's name.
            first: the method's first argument, apart from the others as this is called for each record.
            *args: the method's other arguments.
            method: the method's name; `process` by default.
            timeout: bound in seconds; the service's `call_timeout_s` by default.
            **kwargs: the method's keyword arguments.

        Raises:
            UnknownServiceError: the service or the method does not exist.
            ServiceTimeoutError: the answer did not arrive in time.
            ServiceUnavailableError: the service has stopped or failed.
            Exception: the method's own exception.
        """
        if timeout is not None:
            given = () if first is ABSENT else (first, *args)
            return self.service(name)._require().call(method or DEFAULT_METHOD, given, kwargs, timeout)
        try:
            call = self.ctx._found[name][method]
        except (AttributeError, KeyError):
            call = self.service(name)._method(method)
        if first is ABSENT:
            return call(**kwargs)
        return call(first, *args, **kwargs) if args or kwargs else call(first)

    def call_service_async(
        self, name: str, /, *args: object, method: str | None = None, timeout: float | None = None, **kwargs: object
    ) -> CallFuture:
        """Start a call of a service on the service's own threads and return a future of its answer.

        In a coroutine of a job, the future may be awaited.

        Args are those of `call_service`. With a `timeout`, the future fails with `ServiceTimeoutError` in time.
        """
        calls = self.service(name)._require()
        return calls.call_async(method or DEFAULT_METHOD, args, kwargs, timeout)


class BaseService(ServiceUser):
    """A long-lived object that the tasks of a job share by name. Any other class works too.

    The engine builds one instance for each job and calls the hooks in this order: `setup`, `start`, then any number of
    calls from tasks, then `stop`, then `cleanup`. All are optional. No task starts before every `start` has returned,
    and no `stop` begins while a call is running, unless that call outlasts the service's `drain_timeout_s`. `stop`
    follows only a successful start; `cleanup` runs exactly once for every instance that was built, also when `setup`,
    `start` or `stop` failed. `ready()` and `health()` return whether the service can be used; both are polled where
    they exist. A `drain` that takes no arguments is called when no further call comes, before `stop`, to end work that
    the service took in and still has in hand; a `drain` with arguments is a method like others. The hooks of one
    service run one after another on a thread of its own.

    The hooks defined here are empty and never run; they let yours call `super().cleanup()`. Any hook may
    be a coroutine function.

    Attributes:
        ctx: the service's context, set before the constructor runs.
    """

    ctx: ServiceContext

    def setup(self) -> object:
        """Prepare the service; called once after the constructor."""

    def start(self) -> object:
        """Begin to work; called once after `setup`, before the first call."""

    def stop(self) -> object:
        """End the work; called once after the last call."""

    def cleanup(self) -> object:
        """Release everything; called exactly once for each instance that was built."""
