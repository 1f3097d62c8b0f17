"""Builds the job of a scenario and runs it, one seeded step at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from simulation.scenario import RETRIES_MAX
from simulation.world import CLASSES, World, plain, service_class, source_values

from sage import JobError, LocalEnvironment, Retry, ServiceOptions
from sage._runtime.states import JobState, StopMode
from sage.errors import InternalError
from sage.testing import StepBackend

if TYPE_CHECKING:
    from simulation.scenario import Node, Request, Scenario

    from sage import DataStream, JobReport
    from sage._runtime.backend import SupervisedJob
    from sage._runtime.job import Job
    from sage.observability import Event

TURNS_MAX = 20_000
"""How many turns a job of this size may take; most take a few hundred."""


METHODS = {"generator": "flatmap", "collect": "flatmap", "last": "reduce", "again": "filter"}


class Schedule(StepBackend):
    """Asks for an end at the turns that the scenario names, and gives up on a job that does not end."""

    def __init__(self, seed: int, requests: tuple[Request, ...]) -> None:
        super().__init__(seed)
        self.job: Job
        self.turns = 0
        self.taken: list[StopMode] = []
        self._requests = [request for request in requests if not request.place]

    def turn(self, supervisor: SupervisedJob) -> None:
        """Do one thing."""
        self.turns += 1
        for request in self._requests:
            if request.at == self.turns:
                if supervisor.state.job in (JobState.STARTING, JobState.RUNNING) and not self.pending:
                    self.taken.append(StopMode[request.way])
                self.job._request(StopMode[request.way], f"asked for at turn {self.turns}")
        if self.turns > TURNS_MAX:
            raise InternalError(f"the job is {supervisor.state.job} after {self.turns} turns")
        super().turn(supervisor)


@dataclass(slots=True)
class Run:
    """What one job of a scenario gave.

    Attributes:
        report: the sealed report.
        error: what `wait` raised, or None.
        events: its changes of state.
        taken: ways to end that were asked for while nothing else was to be done before.
        turns: how many turns it took.
    """

    report: JobReport
    error: BaseException | None
    events: tuple[Event, ...]
    taken: list[StopMode] = field(default_factory=list)
    turns: int = 0


class Simulation:
    """One scenario: its world, and the jobs that were run in it."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.world = World(scenario)
        self.runs: list[Run] = []
        self.handles: dict[str, Any] = {}
        self._backend: Schedule
        self._streams: dict[str, DataStream] = {}
        self._letters: DataStream | None = None
        self.env = LocalEnvironment("job", drain_timeout_s=scenario.drain_timeout_s, backend=self._new_backend)

    def _new_backend(self) -> Schedule:
        number = len(self.runs)
        self._backend = Schedule(self.scenario.seed * 3 + number, self.scenario.requests if number == 0 else ())
        return self._backend

    def run(self) -> None:
        """Run the jobs, and close the environment."""
        self._register()
        self._build()
        for number in range(self.scenario.jobs):
            self.world.job_number = number
            job = self.env.submit(keep_services=self.scenario.keep)
            self.world.job = self._backend.job = job
            error: BaseException | None = None
            try:
                job.wait()
            except JobError as raised:
                error = raised
            assert job.report is not None
            self.runs.append(Run(job.report, error, job.events(), self._backend.taken, self._backend.turns))
        self.world.job = None
        self.world.job_number = self.scenario.jobs
        try:
            self.env.close()
        except JobError as raised:
            self.closing_error: BaseException | None = raised
        else:
            self.closing_error = None

    def _register(self) -> None:
        for service in self.scenario.services:
            by_handle = service.by_handle and all(name in self.handles for name in service.requires)
            handles = [self.handles[name] for name in service.requires] if by_handle else []
            options = ServiceOptions(
                depends_on=() if by_handle else service.requires,
                concurrency=service.concurrency,
                required=service.required,
                restart=service.restart,
                restarts_max=2,
                backoff_s=(0.001, 0.002),
                health_interval_s=0.004,
            )
            made = service_class(service.hooks)
            self.handles[service.name] = self.env.register_service(
                service.name, made, self.world, service, *handles, options=options
            )

    def _build(self) -> None:
        if any(node.kind == "letters" for node in self.scenario.nodes):
            self._streams["letters"] = self._letters = self.env.dead_letters("letters")
        for name in self.scenario.served:
            self.handles[name] = self.env.serve(name, partial(self._answers, name))
        for node in self.scenario.nodes:
            if node.kind == "future":
                self._streams[node.name] = self.env.from_future(node.name)
            elif node.kind != "letters" and node.name not in self._streams and not node.served:
                self._streams[node.name] = self._stream(node)
        for node in self.scenario.nodes:
            if node.kind == "future":
                self._streams[node.fed_by].fill_future(self._streams[node.name])

    def _answers(self, name: str, requests: DataStream) -> DataStream:
        """Build a served pipeline."""
        for node in self.scenario.nodes:
            if node.served == name and node.kind != "reply":
                self._streams[node.name] = requests = requests if node.kind == "requests" else self._stream(node)
        return requests

    def _keyed_together(self, node: Node) -> DataStream:
        """Give two streams their keys at once, as connected ones."""
        nodes = (node, self.scenario.node(node.pair))
        first, second = (self._streams[one.inputs[0]] for one in nodes)
        functions = [plain(self.world, one, self.handles) for one in nodes]
        connected = first.connect(second).keyby(*functions, parallelism=node.parallelism)
        for one, stream in zip(nodes, connected._streams, strict=True):
            self._streams[one.name] = stream.name(one.name)
        return self._streams[node.name]

    def _on_error(self, node: Node) -> Any:
        last = self._letters if "letters" in node.policy else node.policy.removeprefix("retry ")
        return Retry(RETRIES_MAX, (0.001, 0.002), last) if "retry" in node.policy else last

    def _stream(self, node: Node) -> DataStream:
        if node.kind == "source":
            return self._source(node)
        if node.pair:
            return self._keyed_together(node)
        inputs = [self._streams[name] for name in node.inputs]
        if node.kind == "union":
            return inputs[0].union(inputs[1]).name(node.name)
        if node.kind == "rebalance":
            return inputs[0].rebalance().name(node.name)
        if node.kind == "broadcast":
            return inputs[0].broadcast().name(node.name)
        given: tuple[Any, ...] = (
            (plain(self.world, node, self.handles),) if node.form == "plain" else (CLASSES[node.kind], self.world, node)
        )
        settings = {"parallelism": node.parallelism, "name": node.name, "on_error": self._on_error(node)}
        settings.update(node.settings)
        stream: Any = inputs[0]
        for other in inputs[1:]:
            stream = stream.connect(other)
        if node.kind in ("reduce", "last"):
            settings["emit"] = "each" if node.kind == "reduce" else "last"
        method = METHODS.get(node.kind, node.kind)
        made: DataStream = getattr(stream, method)(*given, **settings)
        return made

    def _source(self, node: Node) -> DataStream:
        match node.form:
            case "list":
                return self.env.from_batch(source_values(node), parallelism=node.parallelism, name=node.name)
            case "generator":
                return self.env.from_batch(plain(self.world, node, self.handles), name=node.name)
            case "batch":
                return self.env.from_batch(CLASSES["batch"], self.world, node, name=node.name)
        return self.env.from_source(CLASSES["stream"], self.world, node, name=node.name)
