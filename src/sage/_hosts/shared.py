"""Services that the environments of this process share: one instance, which the last of them cleans up."""

from __future__ import annotations

import os
import threading
from dataclasses import fields, replace
from typing import TYPE_CHECKING, ClassVar

from sage._hosts.gate import ConcurrentGate
from sage._hosts.gated import GatedHost
from sage._plan.logical import ServiceSpec
from sage._runtime.backend import HostFacts
from sage._runtime.lifecycle import EXIT_NET_S, KILL_EXIT_S
from sage._runtime.states import StopMode
from sage.errors import GraphError, ServiceUnavailableError, describe, hint
from sage.report import UNCLEAN_STATES, Cleanliness
from sage.service import ServiceHandle, ServiceOptions

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sage._hosts.gate import Gate
    from sage._runtime.backend import Host, HostSurroundings
    from sage._runtime.job import Job
    from sage._runtime.supervisor import Ended
    from sage.observability import Event, HookEvent
    from sage.service import ServiceContext

    MakeJob = Callable[[ServiceSpec], Job]

RETURN_S = 1.0
"""How much of the bound of a cleanup is kept for hearing of its end."""

KILL_WAIT_S = KILL_EXIT_S + EXIT_NET_S + 1.0
"""How long the end of a job waits for an instance that it had to give up."""

OF_EACH = ("replace", "required")
"""The options that each environment decides for itself."""


class SharedInstance:
    """An instance in a job of its own, and the hosts that use it.

    The job owns nothing but this service, starts and restarts it by its options, and runs until the last user leaves.

    Args:
        spec: the registration of the first user.
        make_job: makes a job of one service that runs until it is asked to end.
    """

    by_name: ClassVar[dict[str, SharedInstance]] = {}
    changed: ClassVar[threading.Condition] = threading.Condition()

    def __init__(self, spec: ServiceSpec, make_job: MakeJob) -> None:
        self.users: set[SharedHost] = set()
        self.is_ready = False
        self.is_ending = False
        self.is_over = False
        self.is_lost = False
        self._spec = spec
        # The hosts of the users bound the calls, as an environment does not end while a call of its own runs.
        own = replace(spec.options, shared=False, required=True, call_timeout_s=None)
        handle: ServiceHandle[object] = ServiceHandle(spec.name, spec.target)
        self._job = make_job(ServiceSpec(spec.name, spec.target, spec.args, spec.kwargs, own, handle))
        self._supervisor = self._job.dispatcher.supervisor
        self.host: Host = self._supervisor.hosts[spec.name]
        self._supervisor.listeners.append(self._note)
        self._job._when_sealed(self._sealed)

    @classmethod
    def check(cls, spec: ServiceSpec) -> None:
        """Refuse a service that differs from the running one of its name, or belongs to one environment.

        Raises:
            GraphError: they differ; the difference is named, without its value, which may be a secret.
        """
        if spec.requires:
            others = ", ".join(f'"{other}"' for other in spec.requires)
            error = GraphError(f'service "{spec.name}" is shared, and cannot depend on {others} of one environment')
            raise hint(
                error, "A shared service must not depend on one environment: build the other object in its constructor."
            )
        found = cls.by_name.get(spec.name)
        different = None if found is None or found.is_ending else _difference(spec, found._spec)
        if different is not None:
            error = GraphError(f'service "{spec.name}" is shared, and runs already with another {different}')
            raise hint(error, "Register it with the same settings in all environments, or under another name.")

    @classmethod
    def join(cls, user: SharedHost, make_job: MakeJob) -> None:
        """Let `user` use the instance of its service, which is made if necessary, and wait until it is ready.

        Raises:
            GraphError: it runs already, registered in another way.
            JobError: it did not start; whoever waits for the same start gets the same error.
            ServiceUnavailableError: `user` was given up meanwhile.
        """
        name = user.spec.name
        with cls.changed:
            # An ending instance may still hold resources that the next one needs, such as a port.
            cls.changed.wait_for(lambda: user.is_given_up or name not in cls.by_name or not cls.by_name[name].is_ending)
            if not user.is_given_up:
                cls.check(user.spec)
                found = cls.by_name.get(name)
                if found is None:
                    found = cls(user.spec, make_job)
                    found._job._begin()
                    cls.by_name[name] = found
                found.users.add(user)
                user.instance = found
                user.tie(found._job.id)
                cls.changed.wait_for(lambda: found.is_ready or found.is_over or user.is_given_up)
                if found.is_over and found._job._error is not None:
                    raise found._job._error
        if user.is_given_up:
            raise ServiceUnavailableError(f'the start of service "{name}" was given up', service=name)

    def leave(self, user: SharedHost) -> bool:
        """Let `user` go, and return whether it was the last one, which has to end the instance.

        Of one that has failed nobody leaves: all are told when its end is over.
        """
        with self.changed:
            if user not in self.users or self.is_ending:
                return False
            self.users.remove(user)
            user.is_released = bool(self.users)
            self.is_ending = not self.users
            return self.is_ending

    def end(self, way: StopMode, budget_s: float | None = None) -> None:
        """Ask for the end of the instance, within `budget_s` seconds; asked again, only a stronger way counts."""
        self._job._request(way, "no environment uses it any more", budget_s)

    def wait(self, timeout_s: float | None) -> None:
        """Wait until the instance has ended and nothing of its job runs."""
        self._supervisor.backend.wait(self._supervisor, timeout_s)

    def errors(self) -> tuple[Exception, ...]:
        """Return why an ended instance is not clean."""
        report = self._job._report
        return () if report is None or report.cleanliness is Cleanliness.CLEAN else report.errors

    def _note(self, event: Event | HookEvent) -> None:
        """Take in how far the job is; called by its supervisor."""
        if getattr(event, "subject", "") != "job":
            return
        with self.changed:
            state = getattr(event, "after", "")
            self.is_ready = self.is_ready or state == "running"
            self.is_ending = self.is_ending or state in ("failing", "cancelling", "stopping_services")
            self.changed.notify_all()

    def _sealed(self, ended: Ended) -> None:
        state = str(ended.state.services[self._spec.name].state)
        with self.changed:
            self.is_over = True
            self.is_lost = state == "lost"
            self.by_name.pop(self._spec.name, None)
            users, self.users = self.users, set()
            self.changed.notify_all()
        if self.is_ready:  # those that wait for its start find out by themselves
            text = "it ended" if self._job._error is None else describe(self._job._error)
            for user in users:
                user.fail(text, state not in UNCLEAN_STATES)


class SharedHost(GatedHost):
    """Stands for a shared instance in one job: its "build" joins the users of the instance, its "cleanup" leaves them.

    Calls are refused and waited for by each job apart. How many run at once is bounded by the host of the instance.
    """

    def __init__(
        self, spec: ServiceSpec, context: ServiceContext, surroundings: HostSurroundings, *, make_job: MakeJob
    ) -> None:
        SharedInstance.check(spec)
        super().__init__(spec, context, surroundings)
        self._bucket = None  # the host of the instance has one for all
        self.instance: SharedInstance | None = None
        self.is_given_up = False
        self.is_released = False
        self._make_job = make_job
        self._is_last = False
        self._failure: tuple[str, bool] | None = None

    @property
    def options(self) -> ServiceOptions:
        """The options of the service, with bounds that are a net under those of the instance's own job."""
        own = self.spec.options
        end_s = own.drain_timeout_s + 2 * own.stop_timeout_s + own.kill_grace_s + 2 * RETURN_S
        starts = 1 if own.restart == "never" else 1 + own.restarts_max
        start_s = starts * (own.start_timeout_s + own.backoff_s[1] + end_s)
        return replace(own, restart="never", start_timeout_s=start_s, stop_timeout_s=end_s)

    @property
    def hooks(self) -> frozenset[str]:
        """The one that lets the instance go."""
        return frozenset({"cleanup"})

    def adopt(self, context: ServiceContext, surroundings: HostSurroundings) -> None:
        """Let another job of the environment use the instance that is kept."""
        super().adopt(context, surroundings)
        if self._failure is not None:
            self.fail(*self._failure)

    def facts(self) -> HostFacts:
        facts = HostFacts(self.spec.options.host or "inline") if self.instance is None else self.instance.host.facts()
        return replace(facts, released=self.is_released)

    def abandon(self) -> str:
        """Give up on the instance; if nobody else uses it, its end is forced."""
        stack = super().abandon()
        self._give_up()
        return stack

    def close(self) -> None:
        """Free the thread, and release everything that a cleanup has not released."""
        self._give_up()
        if self._is_last and self.instance is not None:
            self.instance.wait(KILL_WAIT_S)
        super().close()

    def fail(self, text: str, is_clean: bool) -> None:
        """Tell the job that the instance has failed for good; called by the supervisor of the instance."""
        self._failure = text, is_clean
        if is_clean:
            self._around.on_failed(self._incarnation, f"for all who share it: {text}")
        else:
            self._around.on_died(self._incarnation, text)

    def tie(self, owner: str) -> None:
        """Have it written down which job runs the instance."""
        self._around.process_guard.shares(self.spec.name, owner)

    # --- the part of each host ---

    @property
    def _is_there(self) -> bool:
        return self.instance is not None and self.instance.is_ready

    def _attribute(self, name: str) -> object:
        assert self.instance is not None
        return self.instance.host.calls.method(name)

    def is_coroutine(self, name: str) -> bool:
        """Return whether `name` is a coroutine method of the instance."""
        instance = self.instance
        return super().is_coroutine(name) if instance is None else instance.host.calls.is_coroutine(name)

    def _coroutine_method(self, name: str) -> Callable[..., Awaitable[object]] | None:
        instance = self.instance
        if instance is None or not instance.host.calls.is_coroutine(name):
            return None

        # On the loop of this job, the host of the instance gives something to await.
        async def call(*args: object, **kwargs: object) -> object:
            assert self.instance is not None
            return await self.instance.host.calls.method(name)(*args, **kwargs)

        return call

    def _new_gate(self) -> Gate:
        return ConcurrentGate(None)

    def _build(self) -> frozenset[str]:
        SharedInstance.join(self, self._make_job)
        return self.hooks

    def _run_hook(self, hook: str, due: float | None) -> None:  # noqa: ARG002
        instance = self.instance
        if instance is None:
            return
        self._is_last = instance.leave(self)
        if self.is_released:
            return
        if self._is_last:
            left_s = self._left(due)
            instance.end(StopMode.DRAIN, max(left_s - RETURN_S, left_s / 2))
        instance.wait(None)
        errors = instance.errors() if self._is_last else ()
        if errors and instance.is_lost:
            self.fail(describe(errors[0]), is_clean=False)
            return
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise ExceptionGroup("its end was not clean", errors)

    def _clean_late(self) -> None:
        self._give_up()

    def _give_up(self) -> None:
        with SharedInstance.changed:
            self.is_given_up = True
            SharedInstance.changed.notify_all()
        instance = self.instance
        if instance is None:
            return
        self._is_last = instance.leave(self) or self._is_last
        if self._is_last:
            instance.end(StopMode.KILL)


def _difference(one: ServiceSpec, other: ServiceSpec) -> str | None:
    """Describe the difference between two services of the same name, or return None."""
    if one.target is not other.target and one.target != other.target:  # a bound method is made anew each time
        return "class or function"
    if one.command != other.command:
        return "command"
    if len(one.args) != len(other.args) or one.kwargs.keys() != other.kwargs.keys():
        return "number or names of arguments"
    for place, (first, second) in enumerate(zip(one.args, other.args, strict=True)):
        if not _are_equal(first, second):
            return f"argument {place}"
    for name, value in one.kwargs.items():
        if not _are_equal(value, other.kwargs[name]):
            return f'argument "{name}"'
    names = [field.name for field in fields(ServiceOptions) if field.name not in OF_EACH]
    return next(
        (f"option {name}" for name in names if getattr(one.options, name) != getattr(other.options, name)), None
    )


def _are_equal(one: object, other: object) -> bool:
    if one is other:
        return True
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:
        return False  # such as arrays, which compare element by element


def _after_fork_in_child() -> None:
    # The instances belong to the process that this one was forked from, and their locks may be held by its threads.
    SharedInstance.changed = threading.Condition()
    SharedInstance.by_name = {}


os.register_at_fork(after_in_child=_after_fork_in_child)
