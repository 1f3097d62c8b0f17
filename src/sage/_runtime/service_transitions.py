"""What follows for one service: its start, its hooks, its restart, its end and its death."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sage._runtime.draft import Draft
from sage._runtime.lifecycle import (
    BEST_GUARD_S,
    DRAIN_NET_S,
    EXIT_NET_S,
    EXTENSION_MAX_S,
    HEALTH_LEAST_S,
    KILL_EXIT_S,
    PAUSES,
    READY_LEAST_S,
    READY_LEAST_SHARE,
    READY_PAUSE_S,
    START_HOOKS,
    STOP_STATES,
    CleanupDeferred,
    DependencySeen,
    Do,
    Exit,
    ExtendTimeout,
    HookEnded,
    ServiceDied,
    ServiceEvent,
    ServiceFailed,
    ServiceRecord,
    Trouble,
)
from sage._runtime.states import SERVICE_TERMINAL, JobState, ServiceState

S = ServiceState

WORSE = (S.STOPPED, S.CLEANUP_FAILED, S.FAILED, S.FAILED_START, S.KILLED, S.LOST, S.ABANDONED)
"""The ends of a service that was started; a later one takes the place of an earlier one."""


class ServiceDraft(Draft):
    """What follows for services, one by one; their order is a matter of the job."""

    __slots__ = ()

    # --- events ---

    def take_service(self, event: ServiceEvent) -> None:
        """Act on what happened to a service, unless it is over or happened to an earlier incarnation."""
        if isinstance(event, DependencySeen):
            # Two services may call each other; were each to wait for the other's end, none would come.
            if not self.needs(event.requires, event.service):
                self.changes["seen"] = self.get("seen") | {(event.service, event.requires)}
            return
        record = self.services[event.service]
        if record.incarnation != event.incarnation or record.state in SERVICE_TERMINAL | {S.BACKOFF}:
            return
        match event:
            case HookEnded():
                if record.hook == event.hook:
                    self.take_hook(event)
            case ServiceDied():
                if record.hook != "exit" and not record.has_died:
                    self.take_death(event)
            case ServiceFailed():
                self.take_failure(event)
            case CleanupDeferred():
                if not record.has_died:
                    self.change(event.service, hooks=record.hooks | {"cleanup"})
            case ExtendTimeout():
                self.extend(event.service, event.seconds)

    def take_hook(self, event: HookEnded) -> None:
        name = event.service
        record = self.change(name, hook=None, due=None)
        if record.state is S.STARTING:
            self.take_start_hook(event)
        elif event.hook == "health":
            if (event.error is not None or event.value is False) and not self.stopping:
                self.service_failed(name, Trouble.UNHEALTHY, "health", event.error)
            else:
                self.watch(name)
        elif event.hook == "exit":
            self.take_exit(event)
        else:
            if event.hook == "drain" and event.value is False:
                self.fail(Trouble.LATE_CALLS, name, "drain")
            elif event.error is not None:
                self.fail(Trouble.HOOK, name, event.hook, event.error)
                self.worsen(name, S.CLEANUP_FAILED)
            self.next_stop_hook(name, event.hook)

    def take_start_hook(self, event: HookEnded) -> None:
        name, record = event.service, self.services[event.service]
        if event.hook == "build" and event.error is None:
            record = self.change(name, hooks=record.hooks | event.value)
        if event.error is not None:
            self.start_failed(name, Trouble.START, event.hook, event.error)
        elif self.stopping:
            pass  # advance() tears it down in its turn
        elif event.hook == "ready" and not event.value:
            self.change(name, hook="ready-pause", due=self.next_try(name))
        else:
            self.next_start_hook(name, event.hook)

    def take_exit(self, event: HookEnded) -> None:
        name, record = event.service, self.services[event.service]
        if event.error is not None:
            # Whether the process is gone, nobody knows.
            self.fail(Trouble.HOOK, name, "exit", event.error)
            self.worsen(name, S.ABANDONED)
        elif isinstance(event.value, Exit) and (event.value.was_killed or event.value.left):
            if event.value.left or record.goal is not S.KILLED:  # or else the hook that was late is known already
                self.fail(Trouble.KILLED, name, "exit", text=", ".join(event.value.left))
            self.worsen(name, S.KILLED)
        self.end_service(name)

    def take_death(self, event: ServiceDied) -> None:
        """The process is gone: no hook can run, but "exit", which ends what it left behind."""
        name, record = event.service, self.services[event.service]
        if record.hook not in (None, *PAUSES):
            self.do(Do.LOSE_HOOK, name, hook=record.hook, incarnation=record.incarnation)
        self.change(name, hook=None, due=None, hooks=record.hooks & {"exit"}, has_died=True)
        self.worsen(name, S.LOST)
        job: JobState = self.get("job")
        needed = job is JobState.DRAINING and self.start.service_plans[name].options.required
        if record.state in STOP_STATES:
            self.fail(Trouble.LOST, name, text=event.text)
            self.next_stop_hook(name, "cleanup")
        elif self.stopping and not needed:
            self.fail(Trouble.LOST, name, text=event.text)
            self.do(Do.REFUSE_CALLS, name)
            if record.state is S.STARTING:
                self.next_stop_hook(name, "cleanup")
            else:
                self.move_service(name, S.DEGRADED)
        elif record.state is S.STARTING:
            self.start_failed(name, Trouble.DIED, text=event.text)
        else:
            self.service_failed(name, Trouble.DIED, text=event.text)

    def take_failure(self, event: ServiceFailed) -> None:
        """The service is of no use any more, but nothing of it is left either."""
        name, record = event.service, self.services[event.service]
        if record.state is S.STARTING:
            self.change(name, hook=None, due=None)
            self.start_failed(name, Trouble.FAILED, text=event.text)
        elif record.state is S.READY:
            self.service_failed(name, Trouble.FAILED, text=event.text)

    def extend(self, name: str, seconds: float) -> None:
        record = self.services[name]
        if record.due is None or record.hook in (None, "exit", *PAUSES) or self.get("hook_cap_s") is not None:
            return
        more_s = min(seconds, EXTENSION_MAX_S - record.extended_s)
        due = max(self.within_budget(name, record.due + more_s), record.due)
        more_s = due - record.due
        self.change(name, due=due, start_due=record.start_due + more_s, extended_s=record.extended_s + more_s)

    # --- changes ---

    def change(self, name: str, **changes: Any) -> ServiceRecord:
        record = self.services[name] = replace(self.services[name], **changes)
        return record

    def worsen(self, name: str, goal: ServiceState) -> None:
        """Let a service end in `goal`, unless its end is worse already."""
        if WORSE.index(goal) > WORSE.index(self.services[name].goal):
            self.change(name, goal=goal)

    def run_hook(self, name: str, hook: str, due: float) -> None:
        record = self.change(name, hook=hook, due=due, extended_s=0.0)
        self.do(Do.RUN_HOOK, name, hook=hook, incarnation=record.incarnation, due=due)

    # --- start and restart ---

    def start_service(self, name: str) -> None:
        plan, record = self.start.service_plans[name], self.services[name]
        self.move_service(
            name,
            S.STARTING,
            incarnation=record.incarnation + 1,
            start_due=self.now + plan.options.start_timeout_s,
            hooks=plan.own_hooks,
            hook=None,
            again=False,
            goal=S.STOPPED,
            has_died=False,
        )
        self.next_start_hook(name, "")

    def next_start_hook(self, name: str, last: str) -> None:
        record = self.services[name]
        later = START_HOOKS[START_HOOKS.index(last) + 1 :] if last else START_HOOKS
        hook = next((hook for hook in later if hook == "build" or hook in record.hooks), None)
        if hook is None:
            self.move_service(name, S.READY, hook=None, due=None)
            self.do(Do.ADMIT_CALLS, name)
            self.watch(name)
        else:
            self.run_hook(name, hook, record.start_due)

    def next_try(self, name: str) -> float:
        """Return when `ready` is asked again, or the end of the start where there is no time for that."""
        start_due = self.services[name].start_due
        share_s = self.start.service_plans[name].options.start_timeout_s * READY_LEAST_SHARE
        due = self.now + READY_PAUSE_S
        return due if due + min(READY_LEAST_S, share_s) <= start_due else max(start_due, self.now)

    def watch(self, name: str) -> None:
        """Plan the next call of `health`."""
        record = self.services[name]
        if record.state is S.READY and "health" in record.hooks and not self.stopping:
            interval_s = self.start.service_plans[name].options.health_interval_s
            self.change(name, hook="health-pause", due=self.now + interval_s)

    def may_restart(self, name: str) -> bool:
        options = self.start.service_plans[name].options
        in_limit = len(self.recent_restarts(name)) < options.restarts_max
        return options.restart != "never" and in_limit and not self.stopping

    def recent_restarts(self, name: str) -> tuple[float, ...]:
        since = self.now - self.start.service_plans[name].options.restart_window_s
        return tuple(at for at in self.services[name].restarts if at > since)

    def start_failed(
        self, name: str, trouble: Trouble, hook: str = "", error: BaseException | None = None, text: str = ""
    ) -> None:
        again = self.may_restart(name)
        required = self.start.service_plans[name].options.required
        self.fail(trouble, name, hook, error, counts=required and not again, text=text)
        self.change(name, again=again)
        if not again:
            self.worsen(name, S.FAILED_START)
        if required and not again:
            self.fail_job()
        # What was built gets its cleanup, and no stop, since it never ran.
        self.next_stop_hook(name, "stop")

    def service_failed(
        self, name: str, trouble: Trouble, hook: str = "", error: BaseException | None = None, text: str = ""
    ) -> None:
        """A service that was ready has failed: restart it, or do without, or fail the job."""
        again = self.may_restart(name)
        required = self.start.service_plans[name].options.required
        self.fail(trouble, name, hook, error, counts=required and not again, text=text)
        if required and not again:
            if trouble in (Trouble.DIED, Trouble.FAILED):
                self.do(Do.REFUSE_CALLS, name)
            self.move_service(name, S.DEGRADED)
            self.fail_job()
            return
        self.change(name, again=again)
        if not again:
            self.worsen(name, S.FAILED)
        self.do(Do.HOLD_CALLS if again else Do.REFUSE_CALLS, name)
        self.drain_service(name)

    # --- stop ---

    def stop_service(self, name: str) -> None:
        """Begin the end of a service that is ready, half started, or waits for a restart."""
        record = self.services[name]
        if record.state is S.REGISTERED:
            self.move_service(name, S.SKIPPED)
        elif record.state is S.BACKOFF:
            self.move_service(name, record.goal, hook=None, due=None)
        elif record.state is S.STARTING:
            if record.hook in (None, "ready-pause"):
                # Built, but not ready: whatever of it has begun gets its cleanup, and no stop.
                self.next_stop_hook(name, "stop")
        elif record.state is S.READY and self.idle(record) and self.may_stay(name):
            self.move_service(name, S.KEPT, hook=None, due=None)
        elif record.state in (S.READY, S.DEGRADED) and self.idle(record):
            self.do(Do.REFUSE_CALLS, name)
            self.drain_service(name)

    def may_stay(self, name: str) -> bool:
        """Return whether a service is to be kept, and nothing that it needs is about to end under it."""
        plan = self.start.service_plans[name]
        return plan.keep and all(
            record.state in SERVICE_TERMINAL or (record.state is S.READY and self.may_stay(other))
            for other, record in ((other, self.services[other]) for other in plan.requires)
        )

    @staticmethod
    def idle(record: ServiceRecord) -> bool:
        return record.hook in (None, "health-pause")

    def drain_service(self, name: str) -> None:
        self.move_service(name, S.DRAINING)
        if self.services[name].has_died:
            self.next_stop_hook(name, "cleanup")
            return
        self.run_bounded(name, "drain", self.start.service_plans[name].options.drain_timeout_s)

    def run_bounded(self, name: str, hook: str, timeout_s: float) -> None:
        """Run a hook that the host ends in time by itself; its own bound is only the net under that."""
        due = self.hook_due(name, hook, timeout_s)
        self.run_hook(name, hook, due)
        self.change(name, due=due + (EXIT_NET_S if hook == "exit" else DRAIN_NET_S))

    def next_stop_hook(self, name: str, last: str) -> None:
        record, options = self.services[name], self.start.service_plans[name].options
        if last == "drain" and "stop" in record.hooks:
            self.move_service(name, S.STOPPING)
            self.run_hook(name, "stop", self.hook_due(name, "stop", options.stop_timeout_s))
        elif last in ("drain", "stop") and "cleanup" in record.hooks:
            self.move_service(name, S.CLEANING)
            self.run_hook(name, "cleanup", self.hook_due(name, "cleanup", options.stop_timeout_s))
        elif "exit" in record.hooks:
            self.move_service(name, S.CLEANING)
            self.run_bounded(name, "exit", options.kill_grace_s)
        else:
            self.end_service(name)

    def end_service(self, name: str) -> None:
        record = self.services[name]
        if record.again and not self.stopping and record.goal is not S.ABANDONED:
            first, longest = self.start.service_plans[name].options.backoff_s
            recent = self.recent_restarts(name)
            pause_s = min(first * 2.0 ** min(len(recent), 64), longest)
            restarts = (*recent, self.now)
            self.move_service(name, S.BACKOFF, hook="backoff", due=self.now + pause_s, restarts=restarts)
            return
        self.move_service(name, record.goal, hook=None, due=None)
        self.do(Do.REFUSE_CALLS, name)
        if not self.stopping and self.start.service_plans[name].options.required:
            # It was to be restarted, and its end did not come out well enough for that.
            self.fail(Trouble.UNHEALTHY, name, "restart")
            self.fail_job()

    def hook_due(self, name: str, hook: str, timeout_s: float) -> float:
        """Return when a hook is late: its own bound, what is left of the budget, and something for those after it."""
        due = self.now + timeout_s
        if self.get("hook_cap_s") is not None:
            due = min(due, self.now + self.get("hook_cap_s"))
        return max(self.within_budget(name, due, hook), self.now)

    def within_budget(self, name: str, due: float, hook: str = "") -> float:
        """Return `due`, or earlier: each service that ends after this one, and its own exit, need some time as well."""
        deadline: float | None = self.get("deadline")
        if deadline is None:
            return due
        after = sum(
            1 for other, record in self.services.items() if other != name and record.state not in SERVICE_TERMINAL
        )
        if hook != "exit" and "exit" in self.services[name].hooks:
            after += 1
        left = max(deadline - self.now, 0.0)
        guard = min(BEST_GUARD_S, left / (after + 1))
        return min(due, deadline - after * guard)

    def kill_service(self, name: str) -> None:
        """Wait for nothing but the end of the process, where there is one."""
        record = self.services[name]
        if record.state in SERVICE_TERMINAL:
            return
        if record.state in (S.REGISTERED, S.BACKOFF):
            self.stop_service(name)
            return
        due = max(min(self.now + KILL_EXIT_S, self.get("deadline")), self.now)
        if record.hook == "exit":
            self.bring_forward(name, due)
            return
        has_exit = "exit" in record.hooks
        hook = "stop" if record.hook in (None, *PAUSES) else record.hook
        self.give_up(name, hook)
        self.do(Do.REFUSE_CALLS, name)
        self.do(Do.ABANDON_HOOK, name, hook=hook)
        if has_exit:
            self.move_service(name, S.CLEANING)
            self.run_hook(name, "exit", due)
            self.change(name, due=due + EXIT_NET_S)
        else:
            self.move_service(name, S.ABANDONED, hook=None, due=None)

    # --- time ---

    def expire_service(self, name: str, record: ServiceRecord) -> None:
        hook = record.hook
        self.change(name, hook=None, due=None)
        if hook == "backoff":
            if not self.stopping:
                self.start_service(name)
        elif hook == "health-pause":
            if not self.stopping:
                interval_s = self.start.service_plans[name].options.health_interval_s
                self.run_hook(name, "health", self.now + max(interval_s, HEALTH_LEAST_S))
        elif hook == "ready-pause":
            if self.stopping:
                pass  # advance() tears it down in its turn
            elif self.now >= record.start_due:
                self.start_failed(name, Trouble.NOT_READY, "ready")
            else:
                self.run_hook(name, "ready", record.start_due)
        elif hook is not None:
            self.late_hook(name, hook, record)

    def late_hook(self, name: str, hook: str, record: ServiceRecord) -> None:
        self.do(Do.ABANDON_HOOK, name, hook=hook)
        if record.state is S.STARTING:
            self.late_start(name, hook, record)
        elif hook == "health" and not self.stopping:
            self.service_failed(name, Trouble.LATE_HEALTH, hook)
            if not self.services[name].again:
                self.worsen(name, self.late_end(name, hook))
        elif hook == "health":
            self.give_up(name, hook)
        elif hook == "exit":
            self.fail(Trouble.LATE_HOOK, name, hook)
            self.worsen(name, S.ABANDONED)
            self.end_service(name)
        elif hook == "drain" and "drain" not in record.hooks:
            self.fail(Trouble.LATE_CALLS, name, hook)
            self.next_stop_hook(name, hook)
        else:
            self.give_up(name, hook)
            self.next_stop_hook(name, hook)

    def late_start(self, name: str, hook: str, record: ServiceRecord) -> None:
        required = self.start.service_plans[name].options.required
        # What hangs on a thread cannot be ended, so that a second instance would stand beside the first.
        again = "exit" in record.hooks and self.may_restart(name)
        self.fail(Trouble.NOT_READY, name, hook, counts=required and not again and not self.stopping)
        self.change(name, again=again)
        end = self.late_end(name, hook)
        if end is S.KILLED or not again:
            self.worsen(name, end)
        if required and not again:
            self.fail_job()
        self.next_stop_hook(name, "stop")

    def give_up(self, name: str, hook: str) -> None:
        """Note a hook that is late: its process is ended, or its thread left behind."""
        end = self.late_end(name, hook)
        self.fail(Trouble.LATE_HOOK, name, hook, text="its process was ended" if end is S.KILLED else "")
        self.worsen(name, end)

    def late_end(self, name: str, hook: str) -> ServiceState:
        """Return the end of a service whose hook is late: its process is ended, or its thread is left behind."""
        is_local = hook in self.start.service_plans[name].local_hooks
        return S.KILLED if "exit" in self.services[name].hooks and not is_local else S.ABANDONED
