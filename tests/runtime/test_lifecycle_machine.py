"""The rules of the lifecycle, checked after every step of random jobs: pure values, a clock of numbers, no thread.

Whatever happens in whatever order, the rules hold and the job ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sage._runtime.lifecycle import (
    DRAIN_NET_S,
    EXIT_NET_S,
    Action,
    ActionKind,
    Begin,
    CleanupDeferred,
    DependencySeen,
    Exit,
    ExtendTimeout,
    HookEnded,
    LifecycleEvent,
    Limits,
    RestRequested,
    ServiceDied,
    ServicePlan,
    State,
    StopRequested,
    TaskClosing,
    TaskEnded,
    TaskFailed,
    TaskOpened,
    TaskPlan,
    Tick,
    WakeRequested,
    begin,
)
from sage._runtime.states import (
    JOB_NEXT,
    SERVICE_NEXT,
    SERVICE_TERMINAL,
    TASK_NEXT,
    TASK_TERMINAL,
    JobState,
    ServiceState,
    StopMode,
    TaskState,
)
from sage._runtime.transitions import step
from sage.service import ServiceOptions

BEFORE_STOP = (JobState.NEW, JobState.STARTING, JobState.RUNNING)
CALLS_COME = (*BEFORE_STOP, JobState.DRAINING)
HOOKS = ("setup", "start", "ready", "health", "drain", "stop", "cleanup")
EXIT = frozenset({"exit"})
START_ACTIONS = ("build", "setup", "start", "ready", "health")
SLACK_S = 1e-6

hook_sets = st.frozensets(st.sampled_from(HOOKS)) | st.just(frozenset(HOOKS))
pauses = st.sampled_from([0.0, 0.0, 0.01, 0.05, 1.0, 5.0, 100.0])


EXITS = (Exit(0), Exit(-9, was_killed=True), Exit(0, left=("pid 7",)))


@dataclass
class Graph:
    """What a random job consists of, and the hooks that each of its services has."""

    services: tuple[ServicePlan, ...]
    tasks: tuple[TaskPlan, ...]
    hooks: dict[str, frozenset[str]] = field(default_factory=dict)


@st.composite
def options(draw: st.DrawFn) -> ServiceOptions:
    return ServiceOptions(
        start_timeout_s=draw(st.sampled_from([0.5, 60.0])),
        drain_timeout_s=draw(st.sampled_from([0.0, 5.0, 40.0])),
        stop_timeout_s=draw(st.sampled_from([0.0, 10.0, 100.0])),
        restart=draw(st.sampled_from(["never", "on_failure", "always"])),
        restarts_max=draw(st.integers(0, 3)),
        restart_window_s=draw(st.sampled_from([1.0, 60.0])),
        backoff_s=draw(st.sampled_from([(0.1, 10.0), (0.0, 0.0)])),
        required=draw(st.booleans()),
        health_interval_s=draw(st.sampled_from([0.5, 200.0])),
        kill_grace_s=draw(st.sampled_from([0.0, 5.0, 100.0])),
    )


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    names = [f"s{number}" for number in range(draw(st.integers(0, 4)))]
    # Dependencies follow an order of their own: a service may need one that was registered after it.
    order = draw(st.permutations(names))
    requires: dict[str, list[str]] = {
        name: draw(st.lists(st.sampled_from(order[:place]), unique=True, max_size=2)) if place else []
        for place, name in enumerate(order)
    }
    if draw(st.booleans()):
        requires = {name: [] for name in names}
    kept = _with_all_they_need(draw(st.frozensets(st.sampled_from(names))) if names else frozenset(), requires)
    adopted = _with_all_they_need(draw(st.frozensets(st.sampled_from(names))) if names else frozenset(), requires)
    if draw(st.booleans()):
        kept = adopted = frozenset()
    hooks = {name: draw(hook_sets) for name in names}
    services = tuple(
        ServicePlan(
            name,
            tuple(requires[name]),
            draw(options()),
            name in kept,
            hooks[name] if name in adopted else None,
            EXIT if draw(st.booleans()) else frozenset(),
        )
        for name in names
    )
    services = tuple(part for plan in services for part in draw(replicas(plan, hooks)))
    tasks: list[TaskPlan] = []
    for number in range(draw(st.integers(0, 4))):
        others = [task.name for task in tasks]
        downstream = draw(st.lists(st.sampled_from(others), unique=True, max_size=2)) if others else []
        tasks.append(TaskPlan(f"t{number}", tuple(downstream), draw(st.booleans()), draw(st.booleans())))
    return Graph(services, tuple(tasks), hooks)


@st.composite
def replicas(draw: st.DrawFn, plan: ServicePlan, hooks: dict[str, frozenset[str]]) -> tuple[ServicePlan, ...]:
    """Return the plan, or those of replicas and a front in its place."""
    count = draw(st.sampled_from([0, 0, 0, 1, 2, 3]))
    if not count or plan.keep or plan.adopted is not None:
        return (plan,)
    names = tuple(f"{plan.name}[{number}]" for number in range(count))
    hooks |= dict.fromkeys(names, hooks[plan.name])
    hooks[plan.name] = frozenset()
    own = replace(plan.options, required=False)
    several = replace(plan.options, replicas=count, replicas_min=draw(st.integers(1, count)), idempotent=True)
    front = ServicePlan(plan.name, names, several)
    spares = {names[-1]} if draw(st.booleans()) else set()
    own_plans = [replace(plan, name=name, options=own, front=plan.name, spare=name in spares) for name in names]
    return (*own_plans, front)


def _with_all_they_need(names: frozenset[str], requires: dict[str, list[str]]) -> frozenset[str]:
    found, todo = set(names), list(names)
    while todo:
        for other in requires[todo.pop()]:
            if other not in found:
                found.add(other)
                todo.append(other)
    return frozenset(found)


class LifecycleMachine(RuleBasedStateMachine):
    """Answers the actions of the lifecycle in every way that a job can, and checks what it then wants done.

    What the checks know they have from the actions alone, so that they hold for whoever carries the actions out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.seals = 0
        self.killed = False
        self.running: dict[str, tuple[str, int]] = {}
        self.abandoned: list[tuple[str, str, int]] = []
        self.built: set[tuple[str, int]] = set()
        self.begun: set[tuple[str, int]] = set()
        self.dead: set[tuple[str, int]] = set()
        self.owed: set[tuple[str, int]] = set()
        self.runs: dict[tuple[str, int, str], int] = {}
        self.task_phase: dict[str, str] = {}
        self.told: set[str] = set()

    @initialize(graph=graphs(), started=st.sampled_from([True, True, True, True, False]), until_asked=st.booleans())
    def prepare(self, graph: Graph, started: bool, until_asked: bool) -> None:
        self.graph = graph
        self.plans = {plan.name: plan for plan in graph.services}
        limits = Limits(stop_timeout_s=60.0, drain_timeout_s=30.0, close_timeout_s=10.0)
        self.state: State = begin(graph.services, graph.tasks, limits, until_asked=until_asked)
        self.noted: dict[str, str] = {"": self.state.job}
        for name, service in self.state.services.items():
            self.noted[name] = service.state
            if service.incarnation:
                self.built.add((name, service.incarnation))
                self.begun.add((name, service.incarnation))
        for name, task in self.state.tasks.items():
            self.noted[name] = task.state
            self.task_phase[name] = "created"
        if started:
            self.post(Begin())

    # --- one step, and what must hold of it ---

    def post(self, event: LifecycleEvent) -> None:
        before = self.state
        self.state, actions = step(before, event, self.now)
        for action in actions:
            self.check(action)
        self.check_states_are_noted()
        assert self.state.deadline <= before.deadline, "the deadline moved later"
        for name, service in before.services.items():
            if service.state in SERVICE_TERMINAL:
                assert self.state.services[name].state is service.state, "a terminal state was left"
        for name, task in before.tasks.items():
            if task.state in TASK_TERMINAL:
                assert self.state.tasks[name].state is task.state, "a terminal state was left"

    def check(self, action: Action) -> None:
        assert self.seals == 0, f"{action} after the seal"
        match action.do:
            case ActionKind.NOTE:
                self.check_note(action)
            case ActionKind.RUN_HOOK:
                self.check_hook(action)
            case ActionKind.ABANDON_HOOK | ActionKind.LOSE_HOOK:
                if action.do is ActionKind.LOSE_HOOK:
                    assert self.running[action.target][0] == action.hook
                if action.target in self.running:
                    hook, incarnation = self.running.pop(action.target)
                    self.abandoned.append((action.target, hook, incarnation))
            case ActionKind.HURRY_EXIT:
                assert self.running[action.target][0] == "exit"
                assert action.due is not None
                assert action.due >= self.now or action.due >= self.state.deadline
            case ActionKind.OPEN_TASK:
                self.check_open(action.target)
            case ActionKind.RUN_TASK:
                assert set(self.task_phase.values()) <= {"opened", "running"}
                assert self.noted[""] == JobState.RUNNING
                self.task_phase[action.target] = "running"
            case ActionKind.STOP_TASK | ActionKind.CANCEL_TASK:
                self.told.add(action.target)
            case ActionKind.ABANDON_TASK:
                self.task_phase[action.target] = "over"
            case ActionKind.ADMIT_CALLS:
                assert self.noted[action.target] == ServiceState.READY
                assert self.noted[""] in CALLS_COME, "calls are let in after the drain"
            case ActionKind.HOLD_CALLS:
                assert self.noted[""] in BEFORE_STOP, "calls are held for a restart that never comes"
            case ActionKind.SEAL:
                self.check_seal()

    def check_note(self, action: Action) -> None:
        assert self.noted[action.target] == action.before
        assert action.before != action.after
        match action.hook:
            case "job":
                assert JobState(action.after) in JOB_NEXT[JobState(action.before)]
            case "task":
                assert TaskState(action.after) in TASK_NEXT[TaskState(action.before)]
            case "service":
                assert ServiceState(action.after) in SERVICE_NEXT[ServiceState(action.before)]
        if action.after == ServiceState.STARTING and self.noted[""] not in BEFORE_STOP:
            assert action.before == ServiceState.RESTING, f"{action.target} is restarted after stopping began"
            assert not self.plans[action.target].front, f"{action.target} takes a place after stopping began"
        if action.after == JobState.STOPPING_SERVICES:
            assert all(self.noted[name] in TASK_TERMINAL for name in self.state.tasks), "a task outlives the services"
        self.noted[action.target] = action.after

    def check_hook(self, action: Action) -> None:
        name, hook = action.target, action.hook
        assert name not in self.running, f"{hook} of {name} begins while {self.running[name]} runs"
        assert action.due is not None, "a hook without a bound"
        before_stop = self.noted[""] in BEFORE_STOP
        if hook in START_ACTIONS:
            calls_come = self.noted[""] in CALLS_COME and hook != "health"
            assert before_stop or calls_come, f"{hook} of {name} begins after stopping began"
        key = (name, action.incarnation, hook)
        self.runs[key] = self.runs.get(key, 0) + 1
        if hook not in ("ready", "health"):
            assert self.runs[key] == 1, f"{hook} of incarnation {action.incarnation} of {name} runs twice"
        if hook == "stop":
            assert (name, action.incarnation, "drain") in self.runs
            assert (name, action.incarnation, "cleanup") not in self.runs
        if hook == "drain" and not before_stop:
            self.check_order(name)
        elif hook == "drain" and self.state.services[name].rests and not self.plans[name].front:
            self.check_dependents(name)
        one = (name, action.incarnation)
        assert (*one, "exit") not in self.runs or hook == "exit", f"{hook} of {name} after its exit"
        if hook == "build":
            self.begun.add(one)
        elif hook == "exit":
            assert self.plans[name].own_hooks == EXIT, f"{name} has no process to end"
            assert one in self.begun
        else:
            assert one not in self.dead, f"{hook} of {name} after its death"
            assert hook == "drain" or hook in self.graph.hooks[name] or (hook == "cleanup" and one in self.owed)
            assert one in self.built or (hook == "cleanup" and one in self.owed), f"{name} was never built"
        self.running[name] = (hook, action.incarnation)

    def check_order(self, name: str) -> None:
        assert self.noted[""] == JobState.STOPPING_SERVICES, f"{name} is stopped while tasks may call it"
        self.check_dependents(name)
        fronts = {plan.front for plan in self.plans.values()}
        if not self.state.seen and not any(plan.requires for plan in self.plans.values() if plan.name not in fronts):
            names = list(self.plans)
            for other in names[names.index(name) + 1 :]:
                if self.plans[name].front and self.plans[other].front == self.plans[name].front:
                    continue
                assert self.noted[other] in SERVICE_TERMINAL, f"{name} is stopped before {other}, registered later"

    def check_dependents(self, name: str) -> None:
        for other, plan in self.plans.items():
            if name in plan.requires or ((other, name) in self.state.seen and other != name):
                assert self.noted[other] in SERVICE_TERMINAL, f"{name} is stopped before {other}, which depends on it"

    def check_open(self, name: str) -> None:
        for other, plan in self.plans.items():
            done_without = self.noted[other] in SERVICE_TERMINAL and not plan.options.required
            assert self.noted[other] in (ServiceState.READY, ServiceState.RESTING) or done_without, (
                f"a task opens before {other} is ready"
            )
        plans = {plan.name: plan for plan in self.graph.tasks}
        assert all(self.task_phase[other] == "opened" for other in plans[name].downstream)
        self.task_phase[name] = "opening"

    def check_seal(self) -> None:
        self.seals += 1
        assert self.noted[""] == JobState.SEALED
        assert all(self.noted[name] in SERVICE_TERMINAL for name in self.state.services)
        assert all(self.noted[name] in TASK_TERMINAL for name in self.state.tasks)
        assert not self.running, "a hook runs on after the seal"
        for name, incarnation in self.begun:
            is_last = incarnation == self.state.services[name].incarnation
            kept = is_last and self.noted[name] == ServiceState.KEPT
            self.check_end(name, incarnation, kept, killed=self.killed and is_last)

    def check_end(self, name: str, incarnation: int, kept: bool, killed: bool) -> None:
        one = (name, incarnation)
        exits, cleanups = self.runs.get((*one, "exit"), 0), self.runs.get((*one, "cleanup"), 0)
        has_exit = self.plans[name].own_hooks == EXIT
        assert exits == (has_exit and not kept), f"incarnation {incarnation} of {name} has {exits} exits"
        has_cleanup = one in self.owed or (one in self.built and "cleanup" in self.graph.hooks[name])
        if kept or not has_cleanup:
            assert cleanups == 0
        elif not killed and one not in self.dead:
            assert cleanups == 1, f"incarnation {incarnation} of {name} has {cleanups} cleanups"
        if incarnation == self.state.services[name].incarnation:
            if one in self.dead:
                assert self.noted[name] in (ServiceState.LOST, ServiceState.ABANDONED, ServiceState.KILLED)
            if self.noted[name] == ServiceState.KILLED:
                assert has_exit

    def check_states_are_noted(self) -> None:
        assert self.state.job == self.noted[""]
        for name, service in self.state.services.items():
            assert service.state == self.noted[name]
        for name, task in self.state.tasks.items():
            assert task.state == self.noted[name]

    @invariant()
    def something_leads_on(self) -> None:
        """Nothing waits without a time at which it is over."""
        if self.state.job is JobState.SEALED:
            assert self.seals == 1
            return
        if self.state.job not in BEFORE_STOP:
            assert self.state.next_due is not None, "the stop hangs"
        if self.state.job is JobState.STARTING:
            opening = "opening" in self.task_phase.values()
            assert self.running or opening or self.state.next_due is not None, "the start hangs"

    @invariant()
    def nothing_waits_longer_than_the_budget(self) -> None:
        if self.state.deadline == math.inf or self.state.job is JobState.SEALED:
            return
        latest = max(self.state.deadline, self.now)
        for task in self.state.tasks.values():
            assert task.due is None or task.due <= latest
        for name, (hook, _) in self.running.items():
            due = self.state.services[name].due
            assert due is not None
            assert due <= latest + {"drain": DRAIN_NET_S, "exit": EXIT_NET_S}.get(hook, 0.0) + SLACK_S

    # --- what can happen ---

    def is_sealed(self) -> bool:
        return self.state.job is JobState.SEALED

    def is_open(self) -> bool:
        return self.state.job not in (JobState.NEW, JobState.SEALED)

    @rule(pause_s=pauses)
    def wait(self, pause_s: float) -> None:
        self.now += pause_s
        self.post(Tick())

    @precondition(lambda self: self.state.next_due is not None)
    @rule()
    def wait_for_what_is_due(self) -> None:
        assert self.state.next_due is not None
        self.now = max(self.now, self.state.next_due)
        self.post(Tick())

    @rule()
    def begin_again(self) -> None:
        if self.state.job is not JobState.NEW:
            self.post(Begin())

    @precondition(lambda self: self.running)
    @rule(data=st.data(), pause_s=pauses, good=st.sampled_from([True, True, True, False]))
    def answer_hook(self, data: st.DataObject, pause_s: float, good: bool) -> None:
        self.now += pause_s
        self.answer(data.draw(st.sampled_from(sorted(self.running))), good, data.draw(st.booleans()))

    @precondition(lambda self: self.is_open())
    @rule()
    def go_on(self) -> None:
        """Let everything that runs come out well."""
        for name in sorted(self.running):
            if name in self.running:
                self.answer(name, True, False)
        for name, phase in list(self.task_phase.items()):
            if phase == "opening" and self.task_phase[name] == "opening":
                self.task_phase[name] = "opened"
                self.post(TaskOpened(name))

    def answer(self, name: str, good: bool, raises: bool) -> None:
        hook, incarnation = self.running.pop(name)
        if not good and (raises or hook not in ("ready", "health", "drain")):
            self.post(HookEnded(name, incarnation, hook, error=RuntimeError(hook)))
            return
        if hook == "build":
            self.built.add((name, incarnation))
            self.post(HookEnded(name, incarnation, hook, self.graph.hooks[name] | self.plans[name].own_hooks))
        elif hook == "exit":
            self.post(HookEnded(name, incarnation, hook, EXITS[len(self.runs) % len(EXITS)]))
        else:
            self.post(HookEnded(name, incarnation, hook, good))

    @precondition(lambda self: self.abandoned)
    @rule(data=st.data(), raises=st.booleans())
    def answer_too_late(self, data: st.DataObject, raises: bool) -> None:
        name, hook, incarnation = data.draw(st.sampled_from(self.abandoned))
        before = self.state.services[name]
        value = self.graph.hooks[name] if hook == "build" else True
        self.abandoned.remove((name, hook, incarnation))
        self.post(HookEnded(name, incarnation, hook, value, RuntimeError("late") if raises else None))
        after = self.state.services[name]
        assert (after.incarnation, after.hooks) == (before.incarnation, before.hooks) or after.hook == "build"

    @precondition(lambda self: self.is_open() and self.plans)
    @rule(data=st.data(), wakes=st.booleans())
    def rest_or_wake(self, data: st.DataObject, wakes: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.plans)))
        incarnation = self.state.services[name].incarnation
        self.post(WakeRequested(name) if wakes else RestRequested(name, incarnation))

    @precondition(lambda self: self.is_open() and self.built)
    @rule(data=st.data())
    def see_dependency(self, data: st.DataObject) -> None:
        name, _ = data.draw(st.sampled_from(sorted(self.built)))
        self.post(DependencySeen(name, data.draw(st.sampled_from(sorted(self.plans)))))

    def alive(self) -> list[str]:
        """Return the services that have an instance, or are to have one, and a process that can end."""
        return sorted(
            name
            for name, incarnation in self.begun
            if incarnation == self.state.services[name].incarnation
            and (name, incarnation) not in self.dead
            and self.noted[name] not in SERVICE_TERMINAL | {ServiceState.BACKOFF, ServiceState.RESTING}
            and self.state.services[name].hook != "exit"
        )

    @rule(data=st.data(), weight=st.integers(0, 2))
    def die(self, data: st.DataObject, weight: int) -> None:
        """The process of a service ends by itself, whatever it is doing."""
        if self.is_sealed() or weight or not (alive := self.alive()):
            return
        name = data.draw(st.sampled_from(alive))
        incarnation = self.state.services[name].incarnation
        self.dead.add((name, incarnation))
        self.post(ServiceDied(name, incarnation, "exit code 1"))

    @precondition(lambda self: self.is_open() and self.begun)
    @rule(data=st.data())
    def die_too_late(self, data: st.DataObject) -> None:
        name, incarnation = data.draw(st.sampled_from(sorted(self.begun)))
        if name in self.alive() and self.state.services[name].incarnation == incarnation:
            return
        self.post(ServiceDied(name, incarnation, "long ago"))
        assert all(failure.text != "long ago" for failure in self.state.failures)

    @rule(data=st.data())
    def defer(self, data: st.DataObject) -> None:
        """A service asks for something to be done at its end."""
        names = [name for name in self.alive() if self.noted[name] != ServiceState.CLEANING]
        if self.is_sealed() or not names:
            return
        name = data.draw(st.sampled_from(names))
        self.owed.add((name, self.state.services[name].incarnation))
        self.post(CleanupDeferred(name, self.state.services[name].incarnation))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), seconds=st.sampled_from([0.0, 1.0, 30.0, 1000.0]))
    def extend(self, data: st.DataObject, seconds: float) -> None:
        name = data.draw(st.sampled_from(sorted(self.running)))
        before = self.state.services[name]
        self.post(ExtendTimeout(name, before.incarnation, seconds))
        after = self.state.services[name]
        if after.hook == before.hook and after.incarnation == before.incarnation and before.due and after.due:
            assert after.due >= before.due, "more time is less"
            assert after.extended_s <= 60.0

    @rule(
        way=st.sampled_from([StopMode.DRAIN, StopMode.DRAIN, StopMode.CANCEL, StopMode.CANCEL, StopMode.KILL]),
        budget_s=st.sampled_from([None, 0.0, 3.0, 25.0]),
        hook_cap_s=st.sampled_from([None, None, 5.0]),
        weight=st.integers(0, 3),
    )
    def request_stop(self, way: StopMode, budget_s: float | None, hook_cap_s: float | None, weight: int) -> None:
        if weight:  # a stop each few steps lets most jobs run for a while
            return
        self.killed = self.killed or (way is StopMode.KILL and self.state.job is not JobState.SEALED)
        self.post(StopRequested(way, budget_s, hook_cap_s))

    @rule(data=st.data(), deed=st.sampled_from(["open", "open", "close", "close", "end", "end", "fail"]))
    def let_a_task(self, data: st.DataObject, deed: str) -> None:
        phases = {
            "open": ("opening",),
            "close": ("opening", "running", "closing"),
            "end": ("closing",),
            "fail": ("opening", "running", "closing"),
        }[deed]
        names = [name for name, phase in self.task_phase.items() if phase in phases]
        if not names:
            return
        name = data.draw(st.sampled_from(names))
        phase = self.task_phase[name]
        if deed == "open":
            self.task_phase[name] = "opened"
            self.post(TaskOpened(name))
        elif deed == "fail":
            self.task_phase[name] = "closing"
            self.post(TaskFailed(name, RuntimeError(name), closing="sink" if phase == "closing" else ""))
        elif deed == "close" and (phase != "opening" or name in self.told):
            self.task_phase[name] = "closing"
            self.post(TaskClosing(name))
        elif deed == "end":
            self.task_phase[name] = "over"
            ends = [TaskState.DONE, TaskState.FAILED, TaskState.CANCELLED]
            self.post(TaskEnded(name, data.draw(st.sampled_from(ends))))

    def teardown(self) -> None:
        """Answer nothing any more: time alone brings the job to its end, within the budget."""
        if not hasattr(self, "state") or self.is_sealed():
            return
        self.post(StopRequested(StopMode.DRAIN))
        self.something_leads_on()
        for _ in range(200):
            if self.is_sealed():
                break
            assert self.state.next_due is not None, "the stop hangs"
            self.now = max(self.now, self.state.next_due)
            self.post(Tick())
            self.nothing_waits_longer_than_the_budget()
        assert self.is_sealed(), "the stop never ends"
        assert self.seals == 1


# Making a failing case smaller takes minutes, longer than a test may take; the case as it was found is readable.
LifecycleMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    report_multiple_bugs=False,
)
TestLifecycle = LifecycleMachine.TestCase
