"""The journal of a driver: everything it is about to make, in lines of JSON, so that a successor knows every name."""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec

from sage._descriptors import OpenFile
from sage._processes import Process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

JOURNAL = "journal.jsonl"
NEW = ".new"
"""The suffix of a journal that is about to replace another."""

READ_BYTES = 1 << 20

CLEAN_ENDS = frozenset({"stopped", "skipped"})
CLEANED_ENDS = CLEAN_ENDS | {"cleanup_failed", "failed_start", "failed", "abandoned"}
"""States after which the hooks for the end were called, successfully or not."""

ENDED = CLEANED_ENDS | {"killed", "lost"}

Entry = dict[str, Any]
"""One line of a journal: its kind as "entry", and the arguments of the method of `Run` that takes it."""

P = ParamSpec("P")


class Claim(NamedTuple):
    """A thing to see to if a service is lost: a path to remove, a process to end, or a function to call."""

    claim: str
    path: str = ""
    pid: int = 0
    started: int = 0
    function: str = ""
    args: Sequence[object] = ()


class Content:
    """A part of a journal's content, equal to one with the same attributes; importing `dataclasses` takes too long."""

    def __eq__(self, other: object) -> bool:
        """Return whether the other tells the same."""
        return type(other) is type(self) and vars(other) == vars(self)


class ServiceLine(Content):
    """One incarnation of a service, as far as the journal tells.

    Attributes:
        job: the id of its job.
        incarnation: which one, from 1.
        host: "inline", "process" or "command".
        requires: names of services that end after it.
        token: the token in the cookie of its processes, or None.
        process: its process, or None.
        stop_signal: the signal that asks a command to end, or None.
        state: the last state that was written, lower case; "new" before.
        claims: its declarations, in order.
        is_reaped: whether its claims were seen to already.
    """

    def __init__(self, job: str, name: str, incarnation: int, requires: tuple[str, ...] = ()) -> None:
        self.job = job
        self.name = name
        self.incarnation = incarnation
        self.host = "inline"
        self.requires = requires
        self.token: str | None = None
        self.process: Process | None = None
        self.stop_signal: int | None = None
        self.state = "new"
        self.claims: list[Claim] = []
        self.is_reaped = False

    @property
    def is_over(self) -> bool:
        """Whether it ended while the driver lived."""
        return self.state in ENDED

    def claims_due(self) -> list[Claim]:
        """Return the claims that nobody has seen to, the last declared first.

        After a cleanup that raised, only owned things are removed: the calls stand for cleanups that never ran.
        """
        if self.is_reaped or self.state in CLEAN_ENDS:
            return []
        kinds = {"path", "process"} if self.state in CLEANED_ENDS else {"path", "process", "call"}
        return [claim for claim in reversed(self.claims) if claim.claim in kinds]


class JobLine(Content):
    """One job: its id, its name, its report file or None, when it began (seconds since the epoch), its services.

    A block of `sage.supervised` is a job without services, with the token in the cookie of its processes.
    """

    def __init__(self, id_: str) -> None:
        self.id = self.name = id_
        self.report: str | None = None
        self.began_at = 0.0
        self.token: str | None = None
        self.is_sealed = False
        self.services: dict[tuple[str, int], ServiceLine] = {}

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is left; a sealed job may have left services that are kept."""
        return self.is_sealed and all(service.state != "kept" for service in self.services.values())

    def latest(self, name: str) -> ServiceLine:
        """Return the latest incarnation of a service; an inline one without claims was never written."""
        incarnation = 1
        while (name, incarnation + 1) in self.services:
            incarnation += 1
        if (name, incarnation) not in self.services:  # some lines were lost
            incarnation = max((number for other, number in self.services if other == name), default=1)
        return self.services.setdefault((name, incarnation), ServiceLine(self.id, name, incarnation))


class ClusterLine(Content):
    """One Ray cluster of the driver's own.

    Attributes:
        token: the token in the cookie of its processes, except those that overwrite their environment.
        jobs: the folder with a file for each job that ends itself there after its driver has died.
        leader: the process that began its session, or None if it may not have been started.
        is_over: whether it was ended while the driver lived.
    """

    def __init__(self, token: str, jobs: str) -> None:
        self.token = token
        self.jobs = jobs
        self.leader: Process | None = None
        self.is_over = False


class Run(Content):
    """Everything that a journal tells.

    Attributes:
        cookie: carried by every process of the run.
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

    def __init__(self) -> None:
        self.cookie = ""
        self.driver: Process | None = None
        self.python = ""
        self.path: tuple[str, ...] = ()
        self.folder = "/"
        self.reports = ""
        self.jobs: dict[str, JobLine] = {}
        self.seen: set[tuple[str, str, str]] = set()
        self.owners: dict[tuple[str, str], str] = {}
        self.clusters: dict[str, ClusterLine] = {}
        self.released: list[Process] = []
        self.unread_count = 0

    def job(self, id_: str) -> JobLine:
        """Return a job, a nameless one if its line was lost."""
        return self.jobs.setdefault(id_, JobLine(id_))

    # --- the schema: the kinds of entries, with their fields ---

    def take_run(
        self, cookie: str, pid: int, started: int, python: str, path: list[str], folder: str, reports: str
    ) -> None:
        self.cookie, self.driver, self.python = cookie, Process(pid, started), python
        self.path, self.folder, self.reports = tuple(path), folder, reports

    def take_job(self, job: str, name: str, report: str | None, began_at: float, token: str | None = None) -> None:
        line = self.job(job)
        line.name, line.report, line.began_at, line.token = name, report, began_at, token

    def take_sealed(self, job: str) -> None:
        self.job(job).is_sealed = True

    def take_released(self, pid: int, started: int) -> None:
        self.released.append(Process(pid, started))

    def take_seen(self, job: str, service: str, requires: str) -> None:
        self.seen.add((job, service, requires))

    def take_shared(self, job: str, service: str, owner: str) -> None:
        self.owners[job, service] = owner

    def take_cluster(self, token: str, jobs: str) -> None:
        self.clusters[token] = ClusterLine(token, jobs)

    def take_cluster_started(self, token: str, pid: int, started: int) -> None:
        self.clusters[token].leader = Process(pid, started)

    def take_cluster_ended(self, token: str) -> None:
        self.clusters[token].is_over = True

    def take_adopted(self, job: str, from_: str, service: str) -> None:
        """A kept service goes over to the job that uses it next, where its instance is the first."""
        after, before = self.job(job), self.job(from_)
        if not any(name == service for name, _ in before.services):
            return
        line = before.latest(service)
        del before.services[service, line.incarnation]
        line.job, line.incarnation = job, 1
        after.services[service, 1] = line
        self.seen |= {(job, service, other) for id_, one, other in self.seen if (id_, one) == (from_, service)}
        if (from_, service) in self.owners:
            self.owners[job, service] = self.owners.pop((from_, service))

    def take_service(
        self, job: str, service: str, incarnation: int, host: str, requires: list[str], token: str | None
    ) -> None:
        line = self._service(job, service, incarnation)
        line.host, line.requires, line.token = host, tuple(requires), token

    def take_process(
        self, job: str, service: str, incarnation: int, pid: int, started: int, stop_signal: int | None
    ) -> None:
        line = self._service(job, service, incarnation)
        line.process, line.stop_signal = Process(pid, started), stop_signal

    def take_state(self, job: str, service: str, state: str, incarnation: int | None = None) -> None:
        self._service(job, service, incarnation).state = state

    def take_reaped(self, job: str, service: str, incarnation: int) -> None:
        self._service(job, service, incarnation).is_reaped = True

    def take_claim(
        self,
        job: str,
        service: str,
        claim: str,
        path: str = "",
        pid: int = 0,
        started: int = 0,
        function: str = "",
        args: Sequence[object] = (),
        incarnation: int | None = None,
    ) -> None:
        if claim == "release":
            self.take_released(pid, started)
        else:
            made = Claim(claim, path, pid, started, function, tuple(args))
            self._service(job, service, incarnation).claims.append(made)

    def _service(self, job: str, service: str, incarnation: int | None) -> ServiceLine:
        """Return an incarnation of a service, or the latest one."""
        line = self.job(job)
        if incarnation is None:
            return line.latest(service)
        return line.services.setdefault((service, incarnation), ServiceLine(job, service, incarnation))


class Journal:
    """Writes the lines, each on the disk before `write` returns. Its caller sees to it that one thread at a time does.

    Args:
        folder: the run's folder.
        lines: the first lines; they take the place of a journal that is there already, all at once.

    Attributes:
        file: the open file; it can be read from as well, also after somebody has removed the file.
        lines_count: how many lines were written.

    Raises:
        OSError: the disk is full, or the folder does not exist.
    """

    def __init__(self, folder: str, lines: Iterable[bytes] = ()) -> None:
        self._path = os.path.join(folder, JOURNAL)
        lines = tuple(lines)
        path = self._path + NEW if lines else self._path
        if lines:
            with suppress(FileNotFoundError):
                os.unlink(path)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self.file = OpenFile(os.open(path, flags, 0o600))
        self.lines_count = 0
        self._bytes_count = 0
        self._is_torn = False
        if lines:
            try:
                self.write(b"\n".join(lines))
                self.lines_count = len(lines)
                os.replace(path, self._path)
            except OSError:
                self.close()
                raise

    def is_in_place(self) -> bool:
        """Return whether others still find the file in the run's folder, with all that was written."""
        try:
            found = os.lstat(self._path)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self.file.file and found.st_size >= self._bytes_count

    def keep_fresh(self) -> None:
        """Let the file look as if it had just been written, so that it is not removed because of its age."""
        os.utime(self._path, follow_symlinks=False)

    def write(self, line: bytes) -> None:
        """Write one line, which has no line break.

        Raises:
            OSError: it could not be written as a whole; the part that was is ended as a line of its own.
        """
        data = (b"\n" if self._is_torn else b"") + line + b"\n"
        self._is_torn = True
        written = self.file.write(data)
        self._bytes_count += written
        if written < len(data):
            raise OSError(f"{written} of {len(data)} bytes were written")
        self._is_torn = False
        self.lines_count += 1
        os.fsync(self.file.descriptor)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_lines(folder: str) -> list[bytes]:
    """Return the lines of the journal in a run's folder.

    Raises:
        OSError: it does not exist, or is a link or something else that is not a file.
    """
    # A named pipe in its place would be waited for.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(os.path.join(folder, JOURNAL), flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{JOURNAL} in {folder} is not a file")
        return lines_from(descriptor)
    finally:
        os.close(descriptor)


def lines_from(descriptor: int) -> list[bytes]:
    """Return the lines of a journal that is open, also if it was removed meanwhile.

    Raises:
        OSError: it cannot be read.
    """
    data = b""
    while part := os.pread(descriptor, READ_BYTES, len(data)):
        data += part
    return data.split(b"\n")


KINDS = {
    name.removeprefix("take_").replace("_", " "): (method, method.__code__.co_varnames[1 : method.__code__.co_argcount])
    for name, method in vars(Run).items()
    if name.startswith("take_")
}
"""The methods of `Run` that take an entry, and its fields, by its kind."""


def entry(take: Callable[Concatenate[Run, P], None], *args: P.args, **fields: P.kwargs) -> Entry:
    """Return the entry that a method of `Run` takes with these arguments."""
    kind = take.__name__.removeprefix("take_").replace("_", " ")
    given = dict(zip(KINDS[kind][1], args, strict=False)) | fields
    return {"entry": kind, **{field.rstrip("_"): value for field, value in given.items()}}


def encode(entry: Entry) -> bytes:
    """Return an entry as a line."""
    return json.dumps(entry, separators=(",", ":")).encode()


def replay(lines: Iterable[bytes]) -> Run:
    """Return the run that a journal describes. Lines that cannot be read are counted and left out."""
    run = Run()
    for line in lines:
        if not line.strip():
            continue
        try:
            take(run, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            run.unread_count += 1
    return run


def take(run: Run, entry: Entry) -> None:
    """Add the content of one entry; fields that its kind does not have are of a later version.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is not an entry of a journal.
    """
    method, fields = KINDS[entry["entry"]]
    method(run, **{field: entry[field.rstrip("_")] for field in fields if field.rstrip("_") in entry})


def forget_over(run: Run) -> None:
    """Let go of jobs and clusters that are over, and of which nothing else in the run speaks."""
    over = {job.id for job in run.jobs.values() if job.is_over}
    over -= {owner for (job, _), owner in run.owners.items() if job not in over}
    for id_ in over:
        del run.jobs[id_]
    if over:
        run.seen = {tie for tie in run.seen if tie[0] not in over}
        run.owners = {key: owner for key, owner in run.owners.items() if key[0] not in over}
    run.clusters = {token: cluster for token, cluster in run.clusters.items() if not cluster.is_over}


def entries_of(run: Run) -> Iterator[Entry]:
    """Yield entries that tell the same as the whole journal of a run did, whose first line was read."""
    assert run.driver is not None
    yield entry(Run.take_run, run.cookie, *run.driver, run.python, list(run.path), run.folder, run.reports)
    for process in run.released:
        yield entry(Run.take_released, *process)
    for job in run.jobs.values():
        yield entry(Run.take_job, job.id, job.name, job.report, job.began_at, job.token)
        for service in job.services.values():
            yield from _entries_of_service(service)
        if job.is_sealed:
            yield entry(Run.take_sealed, job.id)
    for tie in run.seen:
        yield entry(Run.take_seen, *tie)
    for (id_, name), owner in run.owners.items():
        yield entry(Run.take_shared, id_, name, owner)
    for cluster in run.clusters.values():
        yield entry(Run.take_cluster, cluster.token, cluster.jobs)
        if cluster.leader is not None:
            yield entry(Run.take_cluster_started, cluster.token, *cluster.leader)
        if cluster.is_over:
            yield entry(Run.take_cluster_ended, cluster.token)


def _entries_of_service(service: ServiceLine) -> Iterator[Entry]:
    key = (service.job, service.name, service.incarnation)
    yield entry(Run.take_service, *key, service.host, list(service.requires), service.token)
    if service.process is not None:
        yield entry(Run.take_process, *key, *service.process, service.stop_signal)
    for claim in service.claims:
        yield entry(Run.take_claim, service.job, service.name, *claim, service.incarnation)
    if service.state != "new":
        yield entry(Run.take_state, service.job, service.name, service.state, service.incarnation)
    if service.is_reaped:
        yield entry(Run.take_reaped, *key)


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
    """Raise PermissionError unless a folder is this user's own and nobody else can enter it."""
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
