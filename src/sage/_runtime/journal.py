"""The journal of a driver: what it is about to make, in lines of JSON, so that whoever takes over knows every name."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sage._runtime.processes import Process

if TYPE_CHECKING:
    from collections.abc import Iterable

JOURNAL = "journal.jsonl"

CLEAN_ENDS = frozenset({"stopped", "skipped"})
CLEANED_ENDS = CLEAN_ENDS | {"cleanup_failed", "failed_start", "failed", "abandoned"}
"""States after which the hooks for the end were called, whatever came of them."""

ENDED = CLEANED_ENDS | {"killed", "lost"}

Entry = dict[str, Any]


@dataclass
class ServiceLine:
    """One incarnation of a service, as far as the journal tells.

    Attributes:
        job: the id of its job.
        name: its name.
        incarnation: which one, from 1.
        host: "inline", "process" or "command".
        requires: names of services that end after it.
        token: what its processes carry in their cookie, or None.
        process: its process, or None.
        stop_signal: what asks a command to end, or None.
        state: the last state that was written, lower case; "new" before.
        claims: what it declared, in order.
        is_reaped: whether its claims were seen to already.
    """

    job: str
    name: str
    incarnation: int
    host: str = "inline"
    requires: tuple[str, ...] = ()
    token: str | None = None
    process: Process | None = None
    stop_signal: int | None = None
    state: str = "new"
    claims: list[Entry] = field(default_factory=list)
    is_reaped: bool = False

    @property
    def is_over(self) -> bool:
        """Whether it ended while the driver lived."""
        return self.state in ENDED

    def claims_due(self) -> list[Entry]:
        """Return the claims that nobody has seen to, the last declared first.

        After a cleanup that raised, only what it owned is taken away: the calls stand for cleanups that never ran.
        """
        if self.is_reaped or self.state in CLEAN_ENDS:
            return []
        kinds = {"path", "process"} if self.state in CLEANED_ENDS else {"path", "process", "call"}
        return [claim for claim in reversed(self.claims) if claim["claim"] in kinds]


@dataclass
class JobLine:
    """One job: its id, its name, its report file or None, when it began (seconds since the epoch), its services."""

    id: str
    name: str
    report: str | None = None
    began_at: float = 0.0
    is_sealed: bool = False
    services: dict[tuple[str, int], ServiceLine] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is left; a sealed job may have left services that are kept."""
        return self.is_sealed and all(service.state != "kept" for service in self.services.values())

    def latest(self, name: str) -> ServiceLine:
        """Return the latest incarnation of a service; an inline one without claims was never written."""
        incarnation = max((number for other, number in self.services if other == name), default=1)
        return self.services.setdefault((name, incarnation), ServiceLine(self.id, name, incarnation))


@dataclass
class ClusterLine:
    """One Ray cluster of the driver's own.

    Attributes:
        token: what its processes carry in their cookie, but for those that overwrite their environment.
        jobs: the folder with a file for each job that ends itself there after its driver has died.
        leader: the process that began its session, or None if it may not have been started.
        is_over: whether it was ended while the driver lived.
    """

    token: str
    jobs: str
    leader: Process | None = None
    is_over: bool = False


@dataclass
class Run:
    """Everything that a journal tells.

    Attributes:
        cookie: what every process of the run carries.
        driver: the process that wrote it, or None if the first line is torn.
        python: the interpreter for reap actions.
        path: where that interpreter finds modules.
        folder: its working folder.
        reports: the folder of reports of jobs that name no file.
        jobs: the jobs by id, in order.
        seen: job, service and a service that this one was seen to ask for.
        owners: by job and service, the job that runs it for all who share it, and ends it after them.
        clusters: the Ray clusters by their token, in order.
        released: processes that were released by name and live on.
        unread_count: how many lines could not be read; one torn line, the last, is normal.
    """

    cookie: str = ""
    driver: Process | None = None
    python: str = ""
    path: tuple[str, ...] = ()
    folder: str = "/"
    reports: str = ""
    jobs: dict[str, JobLine] = field(default_factory=dict)
    seen: set[tuple[str, str, str]] = field(default_factory=set)
    owners: dict[tuple[str, str], str] = field(default_factory=dict)
    clusters: dict[str, ClusterLine] = field(default_factory=dict)
    released: list[Process] = field(default_factory=list)
    unread_count: int = 0

    def job(self, id_: str) -> JobLine:
        """Return a job, a nameless one if its line was lost."""
        return self.jobs.setdefault(id_, JobLine(id_, id_))


class Journal:
    """Writes the lines, each on the disk before `write` returns. Its caller sees to it that one thread at a time does.

    Raises:
        OSError: there is no room, or the folder is not there.
    """

    def __init__(self, folder: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(os.path.join(folder, JOURNAL), flags, 0o600)
        self._is_torn = False

    def write(self, line: bytes) -> None:
        """Write one line, which has no line break.

        Raises:
            OSError: it could not be written as a whole; what was is ended as a line of its own.
        """
        data = (b"\n" if self._is_torn else b"") + line + b"\n"
        self._is_torn = True
        written = os.write(self._descriptor, data)
        if written < len(data):
            raise OSError(f"{written} of {len(data)} bytes were written")
        self._is_torn = False
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def read_lines(folder: str) -> list[bytes]:
    """Return the lines of the journal in a run's folder.

    Raises:
        OSError: there is none, or it is a link.
    """
    descriptor = os.open(os.path.join(folder, JOURNAL), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        return file.read().split(b"\n")


def encode(entry: Entry) -> bytes:
    """Return an entry as a line."""
    return json.dumps(entry, separators=(",", ":")).encode()


def replay(lines: Iterable[bytes]) -> Run:
    """Return what the lines of a journal tell. Lines that cannot be read are counted and left out."""
    run = Run()
    for line in lines:
        if not line.strip():
            continue
        try:
            _take(run, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            run.unread_count += 1
    return run


def _take(run: Run, entry: Entry) -> None:
    match entry["entry"]:
        case "run":
            run.cookie, run.driver = entry["cookie"], Process(entry["pid"], entry["started"])
            run.python, run.path, run.folder = entry["python"], tuple(entry["path"]), entry["folder"]
            run.reports = entry["reports"]
        case "job":
            job = run.job(entry["job"])
            job.name, job.report, job.began_at = entry["name"], entry["report"], entry["began_at"]
        case "sealed":
            run.job(entry["job"]).is_sealed = True
        case "seen":
            run.seen.add((entry["job"], entry["service"], entry["requires"]))
        case "shared":
            run.owners[entry["job"], entry["service"]] = entry["owner"]
        case "cluster":
            run.clusters[entry["token"]] = ClusterLine(entry["token"], entry["jobs"])
        case "cluster started":
            run.clusters[entry["token"]].leader = Process(entry["pid"], entry["started"])
        case "cluster ended":
            run.clusters[entry["token"]].is_over = True
        case _:
            _take_service(run, entry)


def _take_service(run: Run, entry: Entry) -> None:
    job, name = run.job(entry["job"]), entry["service"]
    if entry["entry"] == "adopted":
        # A kept service goes over to the job that uses it next, where its instance is the first.
        if not any(other == name for other, _ in run.job(entry["from"]).services):
            return
        service = run.job(entry["from"]).latest(name)
        del run.job(entry["from"]).services[name, service.incarnation]
        service.job, service.incarnation = job.id, 1
        job.services[name, 1] = service
        run.seen |= {(job.id, name, other) for id_, one, other in run.seen if (id_, one) == (entry["from"], name)}
        if (entry["from"], name) in run.owners:
            run.owners[job.id, name] = run.owners.pop((entry["from"], name))
        return
    if "incarnation" in entry:
        key = (name, entry["incarnation"])
        service = job.services.setdefault(key, ServiceLine(job.id, *key))
    else:
        service = job.latest(name)
    match entry["entry"]:
        case "service":
            service.host, service.requires, service.token = entry["host"], tuple(entry["requires"]), entry["token"]
        case "process":
            service.process = Process(entry["pid"], entry["started"])
            service.stop_signal = entry["stop_signal"]
        case "state":
            service.state = entry["state"]
        case "reaped":
            service.is_reaped = True
        case "claim":
            if entry["claim"] == "release":
                run.released.append(Process(entry["pid"], entry["started"]))
            service.claims.append(entry)
        case other:
            raise ValueError(other)


def make_private(folder: str) -> None:
    """Make a folder that only this user can enter, or see that it is one.

    Raises:
        PermissionError: it was made before by somebody else, it is a link, or others may enter it.
    """
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        pass
    else:
        os.chmod(folder, 0o700)  # a strange umask may have taken rights of the owner away
    check_private(folder)


def check_private(folder: str) -> None:
    """See that a folder is this user's own and that nobody else can enter it.

    Raises:
        PermissionError: it is not.
        FileNotFoundError: it is not there.
    """
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode):
        problem = "is a link" if stat.S_ISLNK(found.st_mode) else "is not a folder"
    elif found.st_uid != os.geteuid():
        problem = f"belongs to user {found.st_uid}"
    elif found.st_mode & 0o077:
        problem = f"can be entered by others (mode {stat.S_IMODE(found.st_mode):o})"
    else:
        return
    error = PermissionError(f"folder {folder!r} {problem}, so the journal of a run cannot be kept there")
    error.add_note("Remove it, or let TMPDIR name another folder for temporary files.")
    raise error
