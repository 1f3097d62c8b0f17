"""The fault matrix: what goes wrong where, and what has to follow by the rules of docs/lifecycle.md.

`ROWS` is the table, `expected` says what each row of it must give. Nothing here runs anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

STARTING = ("constructor", "setup", "start", "ready")
RUNNING = ("call", "health")
ENDING = ("close", "stop", "cleanup")
PLACES = (*STARTING, *RUNNING, *ENDING)
"""`close` is that of a function; the others are the hooks of a service, and a call of it."""

IN_PYTHON = ("raises", "hangs", "slow")
OF_PROCESSES = ("exits", "killed", "stopped")
LASTING = ("hangs", "stopped")
DEADLY = ("exits", "killed")

ALL = (*IN_PYTHON, *OF_PROCESSES)

HOSTS: dict[str, dict[str, tuple[str, ...]]] = {
    # A function runs in the process of the job, whatever the host of the service is.
    "inline": dict.fromkeys(PLACES, IN_PYTHON),
    "process": dict.fromkeys(PLACES, ALL) | {"close": IN_PYTHON},
    # A program that raises exits. Whoever asks whether it is ready or well is in the process of the job.
    "command": {
        "start": ("hangs", "slow", *OF_PROCESSES),
        "ready": ALL,
        "call": ("hangs", "slow", *OF_PROCESSES),
        "health": ALL,
        "close": IN_PYTHON,
        "stop": ("hangs", "slow", *OF_PROCESSES),
    },
}
"""The faults that each host can have, by their place."""

WAYS = ("natural", "stop", "cancel", "failure")
ITSELF = "by itself"
"""The fault is what ends the job."""

OUTCOMES = {"natural": "completed", "stop": "stopped", "cancel": "cancelled", "failure": "failed"}

START_S = {"inline": 0.5, "process": 4.0, "command": 2.0}
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
        or_errors: what they may be as well, where a task and the job each hear of the fault in their own way.
        bound_s: how long it may take from the fault to the end of the job, but for what the machine takes.
    """

    marks: tuple[str, ...]
    state: str
    outcome: str
    is_clean: bool = True
    errors: tuple[str, ...] = ()
    or_errors: tuple[tuple[str, ...], ...] = ()
    bound_s: float = 0.0


def ways_of(host: str, place: str, fault: str) -> tuple[str, ...]:
    """Return the ways in which a job with this fault can end.

    Something else can only end it where the fault leaves it running. A task cannot fail before it is open, nor can
    sources end. A call that hangs holds a natural end up for ever, and so it has a time-out there.
    """
    if place in ENDING:
        return WAYS
    if (host, place, fault) == ("command", "ready", "raises"):
        return ("natural",)  # as clients do while nobody answers yet; it is asked again
    if fault == "slow":
        return ("natural", "stop", "cancel") if place in STARTING else WAYS
    if fault not in LASTING:
        return (ITSELF,)
    if place in STARTING:
        return (ITSELF, "stop", "cancel")
    return (ITSELF, "stop", "cancel", "failure") if place == "call" else (ITSELF, *WAYS)


ROWS = tuple(
    Row(host, place, fault, way)
    for host, places in HOSTS.items()
    for place, faults in places.items()
    for fault in faults
    for way in ways_of(host, place, fault)
)


def expected(row: Row) -> Expected:
    """Return what must follow from a row."""
    if row.host == "command":
        found = _of_command(row)
    elif row.place in STARTING:
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
            errors = ("ServiceStartError", "CleanupTimeoutError") if was_built else ("ServiceStartError",)
            return Expected(begun, "killed", _ended(row), False, errors)
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
    """A process that was stopped runs none of its hooks, also when it is woken: each is late, and it is killed."""
    left = ("faulty.stop", "faulty.cleanup")
    begun = tuple(mark for mark in marks if mark not in left or mark == f"faulty.{row.place}")
    if row.place == "cleanup":
        begun = marks
    tried = [mark for mark in left if mark not in begun]
    errors = (*errors, *["CleanupTimeoutError"] * len(tried))
    return Expected(begun, "killed", _ended(row), False, errors)


def _in_call(row: Row) -> Expected:
    marks = _marks("call")
    match row.fault:
        case "raises":
            return Expected(marks, "stopped", "failed", errors=("FunctionError",))
        case "slow":
            return Expected(marks, "stopped", _ended(row))
        case "exits" | "killed":
            # The call is over because the process is, which the job knows already, so that nothing else failed.
            return Expected(marks[:-2], "lost", "failed", False, ("ServiceError",))
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


def _of_command(row: Row) -> Expected:
    """A command has no cleanup, and what asks it hangs beside it; SIGTERM and SIGCONT end it unless it ignores them."""
    begun, place = ("faulty.start", "faulty.ready"), (f"faulty.{row.place}",)
    marks = tuple(dict.fromkeys((*begun, *place)))
    if row.place == "close":
        marks = (*begun, "function.close")
    if row.place in ("start", "ready"):
        return _in_start_of_command(row, marks[: marks.index(place[0]) + 1])
    if row.place == "close":
        return replace(_in_close(row), marks=(*marks, "faulty.stop"))
    if row.place == "stop":
        match row.fault:
            case "exits" | "killed":
                return Expected(marks, "cleanup_failed", _ended(row), False, ("CleanupError",))
            case "hangs" | "stopped":
                return Expected(marks, "killed", _ended(row), False, ("CleanupTimeoutError",))
        return Expected(marks, "stopped", _ended(row))
    stopped = (*marks, "faulty.stop")
    match row.fault:
        case "exits" | "killed":
            # The function has a connection of its own, and may hear of it before the job does, or afterwards.
            heard = (("CleanupError", "FunctionError"), ("FunctionError", "ServiceError"))
            return Expected(marks, "lost", "failed", False, ("ServiceError",), heard if row.place == "call" else ())
        case "hangs" | "stopped":
            if row.place == "call":
                if row.way == ITSELF:
                    return Expected(stopped, "stopped", "failed", errors=("FunctionError",))
                return Expected(stopped, "stopped", _ended(row), False, ("CleanupTimeoutError",))
            error = "ServiceError" if row.way == ITSELF else "CleanupTimeoutError"
            return Expected(stopped, "abandoned", _ended(row), False, (error,))
        case "raises":
            return Expected(stopped, "stopped", "failed", errors=("ServiceError",))
    return Expected(stopped, "stopped", _ended(row))


def _in_start_of_command(row: Row, begun: tuple[str, ...]) -> Expected:
    stopped = (*begun, "faulty.stop")
    match row.fault:
        case "exits" | "killed":
            return Expected(begun, "failed_start", "failed", errors=("ServiceStartError",))
        case "hangs" | "stopped" if row.place == "ready":
            return Expected(stopped, "abandoned", _ended(row), False, ("ServiceStartError",))
        case "hangs" | "stopped" if row.way == ITSELF:
            return Expected(stopped, "failed_start", "failed", errors=("ServiceStartError",))
    if row.way == "natural":
        return Expected(("faulty.start", "faulty.ready", "faulty.stop"), "stopped", "completed")
    return Expected(stopped, "stopped", _ended(row))


def bound_s(row: Row) -> float:
    """Return the sum of the bounds that the fault can use up."""
    if row.fault not in LASTING:
        return 0.0
    own_s = {"call": CALL_S + DRAIN_S * 2, "health": HEALTH_S, "close": CLOSE_S, "stop": STOP_S, "cleanup": STOP_S}
    used_s = own_s.get(row.place, START_S[row.host])
    if row.fault == "stopped" and row.host == "process":
        used_s += 2 * STOP_S
    return used_s + (KILL_GRACE_S if row.host == "process" else 0.0)


def table() -> str:
    """Return the matrix as a table for the docs; rows that differ only in the name of the end stand in one line."""
    lines: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for row in ROWS:
        must = expected(row)
        hooks = ", ".join(mark.removeprefix("faulty.") for mark in must.marks)
        hooks = hooks.replace(", ".join(STARTING) + ", ", "its start, ")
        if row.host == "command":
            hooks = hooks.replace("start, ready, ", "its start, ")
        caused = list(must.errors)
        if row.way == "failure":
            caused.remove("FunctionError")  # that of the task that failed beside
        errors = ", ".join(f"{caused.count(name)} `{name}`" for name in sorted(set(caused))) or "none"
        outcome = must.outcome if row.way == ITSELF or must.outcome != _ended(row) else "by the way"
        clean = "clean" if must.is_clean else "dirty"
        key = (row.place, row.fault, hooks, f"`{must.state}`", f"{outcome}, {clean}", errors)
        lines.setdefault(key, {}).setdefault(row.host, []).append(row.way)
    head = "| where | what | host | way | hooks of the service | it ends | job | errors |\n|" + "---|" * 8
    body = []
    for (place, fault, *rest), hosts in lines.items():
        ways = ", ".join(dict.fromkeys(way for found in hosts.values() for way in found))
        body.append("| " + " | ".join((place, fault, ", ".join(hosts), ways, *rest)) + " |")
    order = {f"| {place} |": number for number, place in enumerate(PLACES)}
    body.sort(key=lambda line: next(number for start, number in order.items() if line.startswith(start)))
    return "\n".join((head, *body)) + "\n"
