"""Takes over for a dead driver: ends its services in order, cleans up, and writes a report that says LOST."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from sage._guardian.claims import owned_processes, reap
from sage._guardian.stop_order import STOP_TIMEOUT_S, End, StopOrder, key_of
from sage._processes import described, end_all, in_session, is_alive, pause, with_cookie, with_descendants
from sage.errors import CleanupError
from sage.report import Cleanliness, HookReport, JobReport, Outcome, ServiceReport

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

    from sage._guardian.journal import ClusterLine, JobLine, Run, ServiceLine
    from sage._guardian.stop_order import Key
    from sage._processes import Process

REPORTS_MAX = 100

START_BOUND_S = 1.0
START_PAUSE_S = 0.02

CLUSTER_STOP_MAX_S = 120.0
"""How long jobs on a cluster may take to end themselves, even if they have asked for more."""

CLUSTER_PAUSE_S = 0.02


def take_over(
    run: Run,
    lines: Mapping[Key, socket.socket],
    log: Callable[[str], None],
    timeout_s: float = STOP_TIMEOUT_S,
) -> list[dict[str, object]]:
    """End everything that is left of a run, then write the reports of its jobs and return them.

    Nothing is written before: a disk that is full must not keep anything alive.

    Args:
        run: the run as its journal describes it.
        lines: the sockets to its process-hosted services.
        log: takes a line of text.
        timeout_s: bound of the graceful stop of all services together, in seconds.
    """
    jobs = [job for job in run.jobs.values() if not job.is_over]
    services = [service for job in jobs for service in job.services.values()]
    clusters = [cluster for cluster in run.clusters.values() if not cluster.is_over]
    _wait_announced(services, clusters)
    for cluster in clusters:
        _wait_for_jobs(cluster, log)
    order = StopOrder(services, lines, timeout_s, run.seen, run.owners)
    try:
        ends = order.run()
    except Exception as error:  # even if asking fails, the killing comes after it
        log(f"the services could not be asked to stop: {type(error).__name__}: {error}")
        ends = {}
    errors = _end_the_rest(run, services, ends, order.descendants)
    _tell_who_shares(run, services, ends)
    for service in reversed(services):
        end = ends.get(key_of(service))
        service.state = end.state if end is not None else service.state
        errors[service.job] += reap(run, service.name, service.claims_due())
    # Reap actions may have started processes.
    errors["" if not jobs else jobs[0].id] += _left(end_all(lambda: _of_run(run)).left)
    for cluster in clusters:  # its folder may be outside of that of the run
        shutil.rmtree(os.path.dirname(cluster.jobs), ignore_errors=True)
    for problem in (problem for problems in errors.values() for problem in problems):
        log(problem)
    reports = []
    for job in jobs:
        if _has_report(job):  # its driver died between the end of the job and telling its guardian of it
            continue
        report = lost_report(run, job, ends, errors[job.id])
        _write_report(run, job, report, log)
        reports.append(report)
    return reports


def _wait_announced(services: list[ServiceLine], clusters: list[ClusterLine]) -> None:
    """Wait for processes that the driver announced and may have been starting when it died.

    Between fork and exec such a process shows the environment of the driver, so that nobody can find it.
    """
    due = time.monotonic() + START_BOUND_S
    tokens = [one.token for one in services if not one.is_over and one.process is None and one.token is not None]
    tokens += [one.token for one in clusters if one.leader is None]
    for token in tokens:
        while not with_cookie(token) and time.monotonic() < due:
            pause(START_PAUSE_S)


def _tell_who_shares(run: Run, services: list[ServiceLine], ends: dict[Key, End]) -> None:
    """Let a service that another job runs end in each job that shares it as it ended there."""
    for service in services:
        owner = run.owners.get((service.job, service.name))
        if owner is not None and not service.is_over:
            owned = run.job(owner).latest(service.name)
            ends[key_of(service)] = End(ends.get(key_of(owned), End(owned.state)).state)


def _wait_for_jobs(cluster: ClusterLine, log: Callable[[str], None]) -> None:
    """Wait until the jobs on a cluster, which notice the driver's death themselves, have ended their processes.

    Each has a file with its bound in seconds, which it removes in the end.
    """
    began_at = time.monotonic()
    while jobs := _jobs_of(cluster):
        waited_s = time.monotonic() - began_at
        late = [job for job, bound_s in jobs.items() if waited_s >= min(bound_s, CLUSTER_STOP_MAX_S)]
        if len(late) == len(jobs):
            log(f"jobs on the cluster have not ended themselves: {', '.join(late)}")
            return
        if not _of_cluster(cluster):
            log(f"the cluster ended before its jobs: {', '.join(jobs)}")
            return
        pause(CLUSTER_PAUSE_S)


def _jobs_of(cluster: ClusterLine) -> dict[str, float]:
    """Return the bounds of the jobs that have not ended; a file that is not written yet or cannot be read counts 0."""
    jobs: dict[str, float] = {}
    with suppress(OSError):
        for entry in os.scandir(cluster.jobs):
            jobs[entry.name] = 0.0
            with suppress(OSError, ValueError), open(entry.path, encoding="ascii") as file:
                jobs[entry.name] = float(file.read())
    return jobs


def _of_cluster(cluster: ClusterLine) -> set[Process]:
    """Return the processes of a cluster: Ray's agents overwrite their environment, but stay in its session."""
    return with_cookie(cluster.token) | (in_session(cluster.leader) if cluster.leader is not None else set())


def _end_the_rest(
    run: Run, services: list[ServiceLine], ends: dict[Key, End], started: set[Process]
) -> dict[str, list[str]]:
    """End the remaining processes, including those that services had `started`, and return failures by job."""
    recorded = {service.process: service for service in services if service.process is not None}
    owned = owned_processes(service for service in services if not service.is_over)
    tokens = {job.token: job.id for job in run.jobs.values() if job.token is not None and not job.is_over}
    in_blocks: dict[Process, tuple[str, str]] = {}

    def find() -> set[Process]:
        for token, job in tokens.items():
            in_blocks.update({one: (job, described(one)) for one in with_cookie(token) - in_blocks.keys()})
        others = {*recorded, *owned, *started} - with_descendants(run.released, started) - {*run.released}
        return _of_run(run) | {one for one in others if is_alive(one)}

    ended = end_all(find)
    errors: dict[str, list[str]] = {service.job: [] for service in services}
    errors |= {job: [] for job in run.jobs} | {"": []}
    for process in ended.killed & recorded.keys():
        ends[key_of(recorded[process])] = End("killed")
    for process in sorted(ended.killed & in_blocks.keys()):
        job, text = in_blocks[process]
        errors[job].append(f"{text} had to be killed")
    errors[services[0].job if services else ""] += _left(ended.left)
    return errors


def _of_run(run: Run) -> set[Process]:
    """Return the processes of the run, without those that were released and their descendants."""
    found = with_cookie(run.cookie) if run.cookie else set()
    for cluster in run.clusters.values():
        if not cluster.is_over and cluster.leader is not None:
            found |= in_session(cluster.leader)
    return found - with_descendants(run.released, found)


def _left(processes: set[Process]) -> list[str]:
    return [f"process {process.pid} cannot be ended" for process in sorted(processes)]


def lost_report(run: Run, job: JobLine, ends: Mapping[Key, End], errors: list[str]) -> dict[str, object]:
    """Return `JobReport.to_dict()` with the known facts about a job whose driver died."""
    now = time.time()
    services = []
    for name in dict.fromkeys(name for name, _ in job.services):
        service = job.latest(name)
        end = ends.get(key_of(service), End(service.state))
        services.append(_service(service, end))
        errors = [*errors, *(f'service "{name}": {error}' for error in end.errors)]
    is_clean = not errors and all(service.state in ("stopped", "skipped", "kept") for service in services)
    report = JobReport(
        job.id,
        job.name,
        Outcome.LOST,
        Cleanliness.CLEAN if is_clean else Cleanliness.DIRTY,
        f"its driver, process {run.driver.pid if run.driver is not None else 'unknown'}, died",
        job.began_at,
        now,
        max(now - job.began_at, 0.0),
        services=tuple(services),
        errors=tuple(map(CleanupError, errors)),
    )
    released = [process.pid for process in run.released if is_alive(process)]
    return {"type": "report", "job": job.id, **report.to_dict(), "released": released}


def _service(service: ServiceLine, end: End) -> ServiceReport:
    outcome = "abandoned" if end.state == "killed" else "error" if end.errors else "ok"
    hook = HookReport("exit", service.incarnation, outcome, end.duration_s, "; ".join(end.errors) or None)
    hooks, restarts = (hook,) if end.duration_s else (), service.incarnation - 1
    pid = service.process.pid if service.process is not None else None
    return ServiceReport(service.name, end.state, hooks, 0, 0, restarts, host=service.host, pid=pid)


def _has_report(job: JobLine) -> bool:
    """Return whether the report file tells already how the job ended."""
    if job.report is None or not os.path.isfile(job.report):  # reading a named pipe would block
        return False
    try:
        with open(job.report, encoding="utf-8", errors="replace") as file:
            return any(_is_report(line, job.id) for line in file if job.id in line)
    except OSError:
        return False


def _is_report(line: str, job: str) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:  # a line that was torn
        return False
    return isinstance(entry, dict) and (entry.get("type"), entry.get("job")) == ("report", job)


def _write_report(run: Run, job: JobLine, report: dict[str, object], log: Callable[[str], None]) -> None:
    text = json.dumps(report)
    try:
        if job.report is not None:
            _append(job.report, text)
        elif run.reports:
            os.makedirs(run.reports, mode=0o700, exist_ok=True)
            _prune(run.reports)
            with open(os.path.join(run.reports, f"{job.id}.json"), "w", encoding="utf-8") as file:
                file.write(text + "\n")
    except OSError as error:
        log(f"job {job.id}: its report cannot be written: {error}\n{text}")


def _append(path: str, text: str) -> None:
    """Add a line to a file whose last line may be torn: its writer was killed."""
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode() + b"\n")


def _prune(folder: str) -> None:
    reports = [entry for entry in os.scandir(folder) if entry.name.endswith(".json")]
    reports.sort(key=lambda entry: entry.stat().st_mtime)
    for entry in reports[: max(0, len(reports) - REPORTS_MAX + 1)]:
        with suppress(OSError):
            os.unlink(entry.path)
