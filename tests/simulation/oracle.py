"""What has to be true of every simulated job, found out from its scenario and from what its functions saw."""

from __future__ import annotations

from asyncio import CancelledError
from collections import Counter
from typing import TYPE_CHECKING, Any

from simulation.flow import Flow, all_of
from simulation.scenario import PASSING

from sage import ServiceUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from simulation.running import Run, Simulation
    from simulation.scenario import Service
    from simulation.world import Entry

STARTING = ("setup", "start", "ready")
ENDING = ("drain", "stop", "cleanup", "defer")
TASK_ENDS = {"done", "failed", "cancelled", "skipped"}
SERVICE_ENDS = {"stopped", "cleanup_failed", "failed_start", "failed", "skipped", "kept"}


def complaints(simulation: Simulation) -> list[str]:
    """Return everything that is wrong with the jobs of a simulation."""
    return list(Oracle(simulation).judge())


class Oracle:
    """Judges one simulation."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._scenario = simulation.scenario
        self._log = simulation.world.log
        self._services = {service.name: service for service in self._scenario.services}
        # With hardly any time for the tasks, they are left behind as they are by a kill.
        self._killed = self._scenario.drain_timeout_s < 1 or any(
            request.way == "KILL" for request in self._scenario.requests
        )
        self._instances: dict[str, dict[int, list[tuple[int, Entry]]]] = {name: {} for name in self._services}
        for at, entry in enumerate(self._log):
            if entry.name in self._services:
                self._instances[entry.name].setdefault(entry.instance, []).append((at, entry))

    def judge(self) -> Iterator[str]:
        for name, instances in self._instances.items():
            for life in instances.values():
                yield from self._life(self._services[name], [entry for _, entry in life])
        if not self._killed:
            yield from self._readiness()
            yield from self._dependencies()
        for number, run in enumerate(self._simulation.runs):
            entries = [entry for entry in self._log if entry.job == number]
            yield from self._functions(run, entries)
            yield from self._ends(run)
            if not self._killed:
                yield from self._flow(run, entries)
                yield from self._verdict(run, entries)
                yield from self._report(run, entries, is_first=number == 0)
        if not self._killed:
            yield from self._closing()

    # --- services ---

    def _life(self, service: Service, entries: list[Entry]) -> Iterator[str]:
        """Yield what is wrong with the order of the hooks of one instance."""
        who = f"{service.name} #{entries[0].instance}"
        hooks = [entry.hook for entry in entries]
        if hooks.pop(0) != "build":
            yield f"{who} began with {hooks}"
        for entry in entries:
            if entry.hook != "call" and (service.name, entry.instance) in entry.within:
                yield f"{who} had its {entry.hook} while a call ran"
        ending = [hook for hook in hooks if hook in ENDING]
        if hooks[len(hooks) - len(ending) :] != ending:
            yield f"{who} did something after its end had begun: {hooks}"
        if entries[0].error is not None:
            expected = [["defer"]]
        else:
            due = [hook for hook in ENDING if hook == "defer" or hook in service.hooks]
            unready = [hook for hook in due if hook not in ("drain", "stop")]
            expected = [due, unready]
        if self._killed:
            if any(count > 1 for count in Counter(ending).values()):
                yield f"{who} ended twice: {ending}"
        elif ending not in expected:
            yield f"{who} ended with {ending} instead of one of {expected}"
        begun = [hook for hook in hooks if hook in STARTING]
        polled = [hook for at, hook in enumerate(begun) if hook != "ready" or "ready" not in begun[:at]]
        failed = next((entry.hook for entry in entries if entry.hook in STARTING and entry.error is not None), None)
        wanted = [hook for hook in STARTING if hook in service.hooks]
        if polled != wanted[: len(polled)] or (failed is not None and begun[-1] != failed):
            yield f"{who} started with {begun} instead of {wanted}"
        if len(polled) < len(wanted) or failed is not None:
            too_early = [hook for hook in hooks if hook in ("call", "health", "stop", "drain")]
            if too_early:
                yield f"{who} had {too_early} although it never was ready"

    def _readiness(self) -> Iterator[str]:
        """Yield services of which not exactly the instances that were ready got their stop."""
        for name, service in self._services.items():
            ready = sum(
                event.name == name and event.after == "ready" for run in self._simulation.runs for event in run.events
            )
            for hook in ("drain", "stop"):
                stopped = sum(entry.name == name and entry.hook == hook for entry in self._log)
                if hook in service.hooks and stopped != ready:
                    yield f"{name} was ready {ready} times and had its {hook} {stopped} times"

    def _dependencies(self) -> Iterator[str]:
        """Yield services that started before what they need, or ended after it."""
        needs = {(service.name, other) for service in self._services.values() for other in service.requires}
        seen = [(*entry.within[-1], entry.name, entry.job) for entry in self._log if entry.within]
        pairs = needs | {(name, other) for name, _, other, _ in seen}
        for name, other in pairs:
            if name == other or not self._services[other].required:
                continue
            for number, mine in self._instances[name].items():
                ended_in = next((entry.job for _, entry in mine if entry.hook in ENDING), None)
                # What an instance called has to outlive it in each later job, and in one job that of all instances.
                has_called = any(
                    one[0] == name and one[2] == other and (one[1] == number or one[3] == ended_in) for one in seen
                )
                if (name, other) in needs or has_called:
                    yield from self._dependency(name, [at for at, _ in mine], other)
        if not pairs:
            yield from self._reverse_order()

    def _dependency(self, name: str, mine: list[int], other: str) -> Iterator[str]:
        """Yield what is wrong between one instance of a service and what it needs."""
        earlier = [entries for entries in self._instances[other].values() if entries[0][0] < min(mine)]
        if not earlier:
            if other in self._services[name].requires:
                yield f"{name} needs {other}, but was built before it"
            return
        theirs = earlier[-1]
        is_early = any(entry.hook in STARTING[:2] and at > min(mine) for at, entry in theirs)
        if is_early and other in self._services[name].requires:
            yield f"{name} needs {other}, but was built before {other} had started"
        if any(entry.hook in ENDING and at < max(mine) for at, entry in theirs):
            yield f"{name} needs {other}, which began to end before {name} had ended"

    def _reverse_order(self) -> Iterator[str]:
        """Yield services that did not end in the reverse order of registration."""
        spans: list[tuple[str, int, int]] = []
        for name, service in self._services.items():
            entries = self._instances[name].get(1, [])
            is_plain = len(self._instances[name]) == 1 and all(
                entry.error is None for _, entry in entries if entry.hook not in (*ENDING, "call")
            )
            ends = [at for at, entry in entries if entry.hook in ENDING]
            if is_plain and ends and all(hook in [entry.hook for _, entry in entries] for hook in service.hooks):
                spans.append((name, min(ends), max(ends)))
        for (name, _, last), (later, first, _) in zip(spans[1:], spans, strict=False):
            if last > first:
                yield f"{name} was registered after {later} and ended after it as well"

    # --- functions ---

    def _functions(self, run: Run, entries: list[Entry]) -> Iterator[str]:
        """Yield what is wrong with the order of the hooks of functions."""
        lives: dict[tuple[str, int], list[tuple[int, Entry]]] = {}
        for at, entry in enumerate(entries):
            if entry.instance and entry.name not in self._services:
                lives.setdefault((entry.name, entry.instance), []).append((at, entry))
        is_completed = str(run.report.state) == "completed"
        counts = Counter(name for name, _ in lives)
        for (name, number), life in lives.items():
            node = self._scenario.node(name)
            hooks = [entry.hook for _, entry in life]
            calls = [hook for hook in hooks if hook == "call"]
            has_finish = "finish" in hooks
            if life[0][1].error is not None:
                expected = ["build"]
            elif len(life) > 1 and life[1][1].error is not None:
                expected = ["build", "open", "close"]
            else:
                expected = ["build", "open", *calls, *(["finish"] if has_finish else []), "close"]
            if self._killed and "close" not in hooks:
                expected = [hook for hook in expected if hook != "close"][: len(hooks)]
            if hooks != expected:
                yield f"{name} #{number} had {hooks} instead of {expected}"
            if is_completed and node.kind == "process" and not has_finish:
                yield f"{name} #{number} had no finish, but its input ended by itself"
        yield from self._openings(entries, is_completed, counts)

    def _openings(self, entries: list[Entry], is_completed: bool, counts: Counter[str]) -> Iterator[str]:
        opened = [at for at, entry in enumerate(entries) if entry.hook == "open" and entry.name not in self._services]
        called = [at for at, entry in enumerate(entries) if entry.hook == "call" and entry.name not in self._services]
        if called and opened and max(opened) > min(called):
            yield "a record flowed before every function was open"
        places: dict[str, list[int]] = {}
        for at in opened:
            places.setdefault(entries[at].name, []).append(at)
        for node in self._scenario.nodes:
            if node.form == "class" and node.kind not in PASSING and (called or is_completed):
                wanted = node.parallelism if node.kind != "source" else counts[node.name]
                if counts[node.name] != wanted:
                    yield f"{node.name} was built {counts[node.name]} times for {wanted} tasks"
            for name in node.inputs:
                mine, theirs = places.get(node.name), places.get(name)
                if node.parallelism > 1 and node.parallelism == self._scenario.node(name).parallelism:
                    continue  # They may be one chain, of which each task opens its own.
                if mine and theirs and max(mine) > min(theirs):
                    yield f"{name} was opened before {node.name}, to which it sends"

    # --- the job ---

    def _ends(self, run: Run) -> Iterator[str]:
        """Yield tasks and services that have not ended, or not as the job did."""
        allowed = TASK_ENDS | ({"abandoned"} if self._killed else set())
        if str(run.report.state) == "completed":
            allowed = {"done"}
        for task in run.report.tasks:
            if task.state not in allowed:
                yield f"task {task.name} ended {task.state} in a job that ended {run.report.state}"
        for service in run.report.services:
            if service.state not in SERVICE_ENDS | ({"abandoned"} if self._killed else set()):
                yield f"{service.name} ended {service.state}"
            if service.state == "kept" and service.name not in self._scenario.keep:
                yield f"{service.name} was kept, although nobody wanted it"
        if run.events[-1].after != "sealed" or any(event.before == "sealed" for event in run.events):
            yield f"the last event is {run.events[-1]}"

    def _flow(self, run: Run, entries: list[Entry]) -> Iterator[str]:
        """Yield what is wrong with the way of the records."""
        flow = Flow(self._scenario, entries, run.report)
        state, undelivered = str(run.report.state), run.report.undelivered
        yield from flow.wrong_counts()
        yield from flow.strangers()
        yield from flow.disorder()
        missing = flow.missing()
        for name, count in missing.items():
            if count < 0:
                yield f"{name} took {-count} records more than it was sent"
        reported = {one.name: one.missing for one in run.report.operators if one.missing is not None}
        if reported and {name: count for name, count in reported.items() if name in missing} != missing:
            yield f"the report says that these are missing: {reported}, and not: {missing}"
        if run.report.is_accounted is False:
            yield f"the report does not account for its records: {run.report}"
        if sum(missing.values()) != undelivered:
            yield f"{undelivered} records are counted as undelivered, but these are missing: {missing}"
        # A loop is ended by dropping what comes back.
        inner = {name: count for name, count in missing.items() if self._scenario.node(name).kind != "future"}
        if flow.is_whole and any((missing if state == "completed" else inner).values()):
            yield f"records are undelivered in a job that is {state}: {missing}"
        yield from flow.wrong_answers()
        yield from self._coroutines(entries, flow)
        yield from self._scattered(entries)
        yield from self._batches(entries)
        if state == "completed":
            yield from flow.wrong_results()

    def _coroutines(self, entries: list[Entry], flow: Flow) -> Iterator[str]:
        """Yield coroutines that ran after the close of their function, too many at once, or too long or too short."""
        for node in self._scenario.nodes:
            if node.kind != "map_async":
                continue
            settings = dict(node.settings)
            timeout_s = settings.get("timeout_s")
            calls = [entry for entry in entries if entry.name == node.name and entry.hook == "call"]
            closed = {
                entry.instance: entry.at for entry in entries if entry.name == node.name and entry.hook == "close"
            }
            for entry in calls:
                if entry.ended_at is None or entry.ended_at > closed.get(entry.instance, len(self._log)):
                    yield f"{node.name} #{entry.instance} was closed while its coroutine for {entry.value} ran"
                beside = [
                    one
                    for one in calls
                    if one.instance == entry.instance and one.at < entry.at and (one.ended_at or 0) > entry.at
                ]
                if len(beside) >= settings["concurrency"]:
                    yield f"{node.name} #{entry.instance} had {len(beside) + 1} coroutines at once"
                if entry.error is None and timeout_s is not None and entry.pause_s > timeout_s:
                    yield f"{node.name} waited {entry.pause_s} s for {entry.value}"
                if isinstance(entry.error, CancelledError) and flow.is_whole and timeout_s is None:
                    yield f"{node.name} was cancelled at {entry.value} for no reason"

    def _batches(self, entries: list[Entry]) -> Iterator[str]:
        """Yield calls of functions of batches with nothing or too much."""
        sizes = {node.name: dict(node.settings).get("max_records", 0) for node in self._scenario.nodes}
        for entry in entries:
            size = sizes.get(entry.name, 0)
            if size and entry.hook == "call" and not 1 <= len(entry.value) <= size:
                yield f"{entry.name} was called with {len(entry.value)} records at once"

    def _scattered(self, entries: list[Entry]) -> Iterator[str]:
        """Yield keys that came to several tasks of a join."""
        tasks: dict[tuple[str, Any], int] = {}
        for entry in entries:
            node = self._scenario.node(entry.name) if self._scenario.has(entry.name) else None
            if node is None or node.kind != "join" or entry.hook != "call" or entry.error is not None:
                continue
            if tasks.setdefault((entry.name, entry.key), entry.instance) != entry.instance:
                yield f"{entry.name} had key {entry.key} in several tasks"

    def _verdict(self, run: Run, entries: list[Entry]) -> Iterator[str]:
        """Yield where the outcome is not what the failures and requests make it."""
        state = str(run.report.state)
        must, may = self._failures(run, entries)
        shown = [inner for error in run.report.errors for inner in all_of(error)]
        for error in must:
            if not any(error is one for one in shown):
                yield f"{error!r} is not among the errors of the report"
        if must and state != "failed":
            yield f"the job is {state} although {must} happened"
        if state == "failed" and not any(error is one for error in (*must, *may) for one in shown):
            yield f"the job failed for no reason: {run.report.errors}"
        if state not in ("failed", "completed") and not self._scenario.requests:
            yield f"the job is {state}, but nobody asked for its end"
        if run.taken and state == "completed":
            yield f"the job completed although it was asked to end by {run.taken}"
        ways = {request.way for request in self._scenario.requests}
        if (state == "stopped" and "DRAIN" not in ways) or (state == "cancelled" and "CANCEL" not in ways):
            yield f"the job is {state}, but its end was asked for by {ways}"
        unclean = [
            entry.error
            for entry in entries
            if entry.error is not None and (entry.hook == "close" or entry.hook in ENDING)
        ]
        if bool(unclean) != (str(run.report.cleanliness) == "dirty"):
            yield f"the job is {run.report.cleanliness}, and these failed at the end: {unclean}"
        for error in unclean:
            if not any(error is one for one in shown):
                yield f"{error!r} is not among the errors of the report"
        if (run.error is not None) != (state == "failed" or bool(unclean)):
            yield f"the job is {state} and {run.report.cleanliness}, but wait() raised {run.error!r}"

    def _failures(self, run: Run, entries: list[Entry]) -> tuple[list[BaseException], list[BaseException]]:
        """Return what must fail the job, and what may."""
        must: list[BaseException] = []
        may: list[BaseException] = []
        flow = Flow(self._scenario, entries, run.report)
        of_sources: list[BaseException] = []
        for name, fates in flow.fates.items():
            # Records that were read before a source raised go on first, and then it may be too late for the error. What
            # coroutines raise while a job is ended for another reason goes nowhere, and so do calls that were ended.
            node = self._scenario.node(name)
            if node.kind == "source":
                of_sources += fates.fatal
            elif flow.is_whole or node.kind != "map_async":
                must += [one for one in fates.fatal if flow.is_whole or not isinstance(one, ServiceUnavailableError)]
            may += fates.fatal
        for entry in entries:
            if entry.error is None:
                continue
            service = self._services.get(entry.name)
            if service is None:
                if entry.hook != "call":
                    must.append(entry.error)
            elif service.required and entry.hook in ("build", *STARTING):
                (must if service.restart == "never" else may).append(entry.error)
            elif service.required and entry.hook == "health":
                may.append(entry.error)
        if not must and may == of_sources and not self._scenario.requests:
            must = of_sources
        return must, may

    def _report(self, run: Run, entries: list[Entry], *, is_first: bool) -> Iterator[str]:
        """Yield where the report of a service says something else than the service saw."""
        for name in self._services:
            reported = run.report.service(name)
            mine = [entry for entry in entries if entry.name == name]
            for hook in ("build", "setup", "start", "stop"):
                seen = [entry.error is not None for entry in mine if entry.hook == hook]
                said = [one.outcome != "ok" for one in reported.hooks if one.hook == hook]
                if seen != said:
                    yield f"{name} saw its {hook} fail {seen}, but the report says {said}"
            calls = [entry.error is not None for entry in mine if entry.hook == "call"]
            if is_first and (reported.calls, reported.errors) != (len(calls), sum(calls)):
                yield f"{name} had {len(calls)} calls, {sum(calls)} failed; the report says {reported}"
        for name in self._scenario.served:
            reported = run.report.service(name)
            asked = [
                entry for entry in entries if entry.asked is not None and self._scenario.service_of(entry.name) == name
            ]
            failed = sum(entry.asking is not None for entry in asked)
            if str(run.report.state) == "completed" and (reported.calls, reported.errors) != (len(asked), failed):
                yield f"{name} was asked {len(asked)} times, {failed} failed; the report says {reported}"

    def _closing(self) -> Iterator[str]:
        """Yield what is wrong after the environment was closed."""
        last = [entry for entry in self._log if entry.job == self._scenario.jobs and entry.error is not None]
        failed = [entry.error for entry in last if entry.hook in ENDING]
        if bool(failed) != (self._simulation.closing_error is not None):
            yield f"close() raised {self._simulation.closing_error!r}, and these failed: {failed}"
        for name, handle in self._simulation.handles.items():
            try:
                handle.process("late")
            except ServiceUnavailableError:
                continue
            yield f"{name} answered a call after its end"
