"""The fault matrix: what goes wrong where, and what has to follow by the rules of docs/lifecycle.md.

`ROWS` is the table, `expected` says what each row of it must give. Nothing here runs anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

STARTING = ("constructor", "setup", "start", "ready")
RUNNING = ("call", "health")
ENDING = ("close", "stop", "cleanup")
PLACES = (*STARTING, *RUNNING, *ENDING)
"""`close` is that of a function; the others are the hooks of a service, and a call of it."""

IN_PYTHON = ("raises", "hangs", "slow")
OF_PROCESSES = ("exits", "killed", "stopped")
LASTING = ("hangs", "stopped")
DEADLY = ("exits", "killed")

HOSTS = {"inline": IN_PYTHON, "process": (*IN_PYTHON, *OF_PROCESSES)}

WAYS = ("natural", "stop", "cancel", "failure")
ITSELF = "by itself"
"""The fault is what ends the job."""

OUTCOMES = {"natural": "completed", "stop": "stopped", "cancel": "cancelled", "failure": "failed"}

START_S = {"inline": 0.5, "process": 4.0}
DRAIN_S = 0.5
CLOSE_S = 0.5
STOP_S = 1.0
KILL_GRACE_S = 4.0
HEALTH_S = 1.0
CALL_S = 0.5


@dataclass(frozen=True)
class Row:
    """One case: a fault in a place of a service on a host, in a job that ends in a way."""

    host: str
    place: str
    fault: str
    way: str

    def __str__(self) -> str:
        return f"{self.host}-{self.place}-{self.fault}-{self.way.replace(' ', '_')}"


@dataclass(frozen=True)
class Expected:
    """What a row must give.

    Attributes:
        marks: what the service that is faulty, and the function, must have marked, in this order.
        state: in which the service ends.
        outcome: of the job.
        is_clean: whether the job is clean.
        errors: the types of the errors in the report, sorted.
        maybe: one more of them, if what runs at that moment is still heard of.
        bound_s: how long it may take from the fault to the end of the job, but for what the machine takes.
        late_marks: what a process that was stopped may still do between its SIGCONT and its end.
    """

    marks: tuple[str, ...]
    state: str
    outcome: str
    is_clean: bool = True
    errors: tuple[str, ...] = ()
    maybe: str = ""
    bound_s: float = 0.0
    late_marks: frozenset[str] = field(default_factory=frozenset)


def ways_of(place: str, fault: str) -> tuple[str, ...]:
    """Return the ways in which a job with this fault can end.

    Something else can only end it where the fault leaves it running. A task cannot fail before it is open, nor can
    sources end. A call that hangs holds a natural end up for ever, and so it has a time-out there.
    """
    if place in ENDING:
        return WAYS
    if fault == "slow":
        return ("natural", "stop", "cancel") if place in STARTING else WAYS
    if fault not in LASTING:
        return (ITSELF,)
    if place in STARTING:
        return (ITSELF, "stop", "cancel")
    return (ITSELF, "stop", "cancel", "failure") if place == "call" else (ITSELF, *WAYS)


ROWS = tuple(
    Row(host, place, fault, way)
    for host, faults in HOSTS.items()
    for place in PLACES
    # A function runs in the process of the job, whatever the host of the service is.
    for fault in (IN_PYTHON if place == "close" else faults)
    for way in ways_of(place, fault)
)


def expected(row: Row) -> Expected:
    """Return what must follow from a row."""
    if row.place in STARTING:
        found = _in_start(row)
    elif row.place == "call":
        found = _in_call(row)
    elif row.place == "health":
        found = _in_health(row)
    elif row.place == "close":
        found = _in_close(row)
    else:
        found = _in_stop(row)
    if row.way == "failure":
        found = replace(found, outcome="failed", errors=("FunctionError", *found.errors))
    return replace(found, errors=tuple(sorted(found.errors)), bound_s=bound_s(row))


def _ended(row: Row) -> str:
    return OUTCOMES.get(row.way, "failed")


def _late_end(row: Row) -> str:
    """A hook that is late costs the service its process, or a thread is left behind."""
    return "killed" if row.host == "process" else "abandoned"


def _in_start(row: Row) -> Expected:
    begun = tuple(f"faulty.{place}" for place in STARTING[: STARTING.index(row.place) + 1])
    # What was built is cleaned up; it is not stopped, since its start did not succeed.
    was_built = row.place != "constructor"
    unwound = (*begun, "faulty.cleanup") if was_built else begun
    match row.fault:
        case "raises":
            return Expected(unwound, "failed_start", "failed", errors=("ServiceStartError",))
        case "hangs":
            return Expected(unwound, _late_end(row), _ended(row), False, ("ServiceStartError",))
        case "stopped":
            late = frozenset({"faulty.cleanup"} if was_built else ())
            errors = ("ServiceStartError", "CleanupTimeoutError") if was_built else ("ServiceStartError",)
            return Expected(begun, "killed", _ended(row), False, errors, late_marks=late)
        case "slow":
            if row.way == "natural":
                return Expected(_marks(), "stopped", "completed")
            return Expected((*begun, "faulty.cleanup"), "stopped", _ended(row))
        case _:
            return Expected(begun, "lost", "failed", False, ("ServiceError",))


def _marks(running: str = "", closing: bool = False) -> tuple[str, ...]:
    """Return the marks of a service that is started, runs, and is stopped in order."""
    begun = (*(f"faulty.{place}" for place in STARTING), *((f"faulty.{running}",) if running else ()))
    return (*begun, *(("function.close",) if closing else ()), "faulty.stop", "faulty.cleanup")


def _stopped_process(row: Row, marks: tuple[str, ...], errors: tuple[str, ...]) -> Expected:
    """A process that was stopped runs none of its hooks: each is late, and it is killed."""
    left = ("faulty.stop", "faulty.cleanup")
    begun = tuple(mark for mark in marks if mark not in left or mark == f"faulty.{row.place}")
    if row.place == "cleanup":
        begun = marks
    tried = [mark for mark in left if mark not in begun]
    errors = (*errors, *["CleanupTimeoutError"] * len(tried))
    return Expected(begun, "killed", _ended(row), False, errors, late_marks=frozenset(tried))


def _in_call(row: Row) -> Expected:
    marks = _marks("call")
    match row.fault:
        case "raises":
            return Expected(marks, "stopped", "failed", errors=("FunctionError",))
        case "slow":
            return Expected(marks, "stopped", _ended(row))
        case "exits" | "killed":
            # The job learns of it by the death, and the task by its call, unless it was cancelled before.
            return Expected(marks[:-2], "lost", "failed", False, ("ServiceError",), "FunctionError")
    # Either the call is over for its caller after its time-out, or the task is given up; the service is stopped while
    # the call still runs.
    first = "FunctionError" if row.way == ITSELF else "CleanupTimeoutError"
    errors = (first, "CleanupTimeoutError")
    if row.fault == "stopped":
        return _stopped_process(row, marks, errors)
    return Expected(marks, "stopped", _ended(row), False, errors)


def _in_health(row: Row) -> Expected:
    marks = _marks("health")
    match row.fault:
        case "raises":
            return Expected(marks, "stopped", "failed", errors=("ServiceError",))
        case "slow":
            return Expected(marks, "stopped", _ended(row))
        case "exits" | "killed":
            return Expected(marks[:-2], "lost", "failed", False, ("ServiceError",))
    errors = ("ServiceError",) if row.way == ITSELF else ("CleanupTimeoutError",)
    if row.fault == "stopped":
        return _stopped_process(row, marks, errors)
    return Expected(marks, _late_end(row), _ended(row), False, errors)


def _in_close(row: Row) -> Expected:
    marks = _marks(closing=True)
    match row.fault:
        case "raises":
            return Expected(marks, "stopped", "failed", False, ("FunctionError",))
        case "hangs":
            return Expected(marks, "stopped", _ended(row), False, ("CleanupTimeoutError",))
    return Expected(marks, "stopped", _ended(row))


def _in_stop(row: Row) -> Expected:
    marks = _marks()
    match row.fault:
        case "raises":
            return Expected(marks, "cleanup_failed", _ended(row), False, ("CleanupError",))
        case "hangs":
            return Expected(marks, _late_end(row), _ended(row), False, ("CleanupTimeoutError",))
        case "stopped":
            return _stopped_process(row, marks, ("CleanupTimeoutError",))
        case "slow":
            return Expected(marks, "stopped", _ended(row))
    # No cleanup can run in a process that is gone.
    return Expected(marks if row.place == "cleanup" else marks[:-1], "lost", _ended(row), False, ("CleanupError",))


def bound_s(row: Row) -> float:
    """Return the sum of the bounds that the fault can use up."""
    if row.fault not in LASTING:
        return 0.0
    own_s = {"call": CALL_S + DRAIN_S * 2, "health": HEALTH_S, "close": CLOSE_S, "stop": STOP_S, "cleanup": STOP_S}
    used_s = own_s.get(row.place, START_S[row.host])
    if row.fault == "stopped":
        used_s += 2 * STOP_S
    return used_s + (KILL_GRACE_S if row.host == "process" else 0.0)
