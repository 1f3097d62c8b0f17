"""Kept services: ready for the next job of their environment, forever or for a time."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from sage._logs import log_of
from sage.errors import GraphError, JobError, hint, short

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sage._plan.logical import ServiceSpec
    from sage._runtime.backend import Host
    from sage._runtime.job import Job

log = log_of("sage.dispatcher")


class KeptServices:
    """The services that are kept, and the end of them.

    Args:
        name: the environment's name.
        begin_to_close: begins a job without tasks that ends the hosts that it is given, by name.
        is_in_use: whether a job uses the kept services.

    Attributes:
        hosts: the hosts of the services, by name.
        keep_s: how long they are left without a job, in seconds, or None for ever.
    """

    def __init__(
        self, name: str, begin_to_close: Callable[[dict[str, Host]], Job], is_in_use: Callable[[], bool]
    ) -> None:
        self.hosts: dict[str, Host] = {}
        self.keep_s: float | None = None
        self._name = name
        self._begin_to_close = begin_to_close
        self._is_in_use = is_in_use
        self._is_taken = False
        self._closing: Job | None = None
        self._expiry: threading.Timer | None = None
        self._lock = threading.Lock()  # held while it is decided who has them

    def names(self, keep: bool | Iterable[str], services: Mapping[str, ServiceSpec]) -> frozenset[str]:
        """Return the services for the next job to keep: the requested ones, their dependencies, and those kept already.

        Raises:
            GraphError: a name is not registered.
            TypeError: `keep` is neither True, False nor names.
        """
        if isinstance(keep, bool):
            return frozenset(services) if keep else frozenset(self.hosts)
        if not isinstance(keep, Iterable):
            raise hint(TypeError(f"keep_services is {short(keep)}"), "Give True, False or names of services.")
        names = {keep} if isinstance(keep, str) else set(keep)
        unknown = names - set(services)
        if unknown:
            error = GraphError(f"keep_services names {', '.join(sorted(unknown))}, which is not registered")
            raise hint(error, f"Registered: {', '.join(services) or 'none'}.")
        todo = list(names)
        while todo:
            for other in services[todo.pop()].requires:
                if other not in names:
                    names.add(other)
                    todo.append(other)
        return frozenset(names | set(self.hosts))

    def expire_later(self) -> None:
        """End the kept services if they were without a job for too long."""
        if self.hosts and self.keep_s is not None:
            wait_s = min(self.keep_s, threading.TIMEOUT_MAX)
            self._expiry = timer = threading.Timer(wait_s, lambda: self._expire(timer))
            timer.name, timer.daemon = f"sage-keep {self._name}", True
            try:
                timer.start()
            except RuntimeError as error:  # the job that ends must not fail for it
                self._expiry = None
                log.warning("no thread can end what environment=%r keeps, close() will: %s", self._name, error)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Leave the kept services to the job that is being built."""
        with self._lock:
            self._is_taken = True
        try:
            yield
        finally:
            self._is_taken = False

    def hold(self) -> None:
        """Make sure the kept services stay, or have ended: a later job may need their files and ports."""
        with self._lock:
            self._forget_expiry()
        if self._closing is not None:
            with suppress(JobError):  # which is in the log; a submit of something else need not fail for it
                self._closing._finish_up()

    def close(self) -> None:
        """End the kept services, and raise a failure that was not raised yet; a job keeps those it uses."""
        with self._lock:
            closing = self._close()
        if closing is not None:
            closing._finish_up()

    def close_at_exit(self) -> None:
        """End the kept services when the interpreter exits, and warn that the program did not."""
        if self.hosts:
            names = ", ".join(self.hosts)
            text = f'environment "{self._name}" still keeps {names} at exit; call env.close() or use `with env:`'
            try:
                warnings.warn(text, RuntimeWarning, stacklevel=1)
            finally:  # a program may have made warnings errors
                self.close()

    def _close(self) -> Job | None:
        """Return the job that ends them, or the latest one that did."""
        if self.hosts and not self._is_taken and not self._is_in_use():
            self._forget_expiry()
            hosts, self.hosts = self.hosts, {}
            try:
                self._closing = self._begin_to_close(hosts)
            except BaseException:
                self.hosts = hosts
                raise
        return self._closing

    def _expire(self, timer: threading.Timer) -> None:
        with self._lock:
            if self._expiry is not timer:
                return  # a job has taken over the kept services
            if self._is_taken or self._is_in_use():
                self.expire_later()  # the job has named the services that it keeps, and is about to end
                return
            closing = self._close()
        if closing is not None:
            with suppress(JobError):  # which is in the log
                closing._finish_up()

    def _forget_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
