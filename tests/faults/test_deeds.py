"""What the code of a user may do to its process: each deed, on each host, in jobs that end in each way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from faults.deed_program import RECORDS
from faults.deeds import ALL, COMMAND, COMMANDS, DEEDS, DONE, LIKE, LIKE_OTHERS, RECYCLED, REPLICAS, WAYS, Cell
from faults.drivers import SOURCES, TOKEN, left_of
from support.fair_clock import FairClock

PROGRAM_S = 50.0
END_S = 4.0
"""How long the end of a job may take: the bounds of a process that has to be killed among them."""

LEFT_S = 10.0
"""How long a guardian may take to stop the services of a program that is gone."""

CODES = {"SIGINT": -signal.SIGINT, "SIGTERM": 128 + signal.SIGTERM}


def run(deed: str, host: str, ways: tuple[str, ...], clock: FairClock) -> list[str]:
    """Run a program with a job for each way, and return in words where it is not as it must be."""
    with tempfile.TemporaryDirectory(prefix="deed-") as name:
        folder = Path(name)
        for part in ("home", "temporary"):
            (folder / part).mkdir()
        # What stays for the next program is there already: the folder of runs, and that of the state.
        (folder / "temporary" / f"sage-{os.geteuid()}").mkdir(mode=0o700)
        token = f"{folder.name}-{deed}-{host}"
        environment = {
            **os.environ,
            "PYTHONPATH": f"{SOURCES}:{Path(__file__).parents[1]}",
            "TMPDIR": str(folder / "temporary"),
            "SAGE_STATE_DIR": str(folder / "state"),
            TOKEN: token,
        }
        command = [sys.executable, "-m", "faults.deed_program", str(folder / "results"), deed, host, *ways]
        with (folder / "errors").open("wb") as errors:
            program = subprocess.Popen(
                command,
                cwd=folder / "home",
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )
            clock.watch(program.pid)
            try:
                code = program.wait(PROGRAM_S)
            except subprocess.TimeoutExpired:
                program.send_signal(signal.SIGABRT)
                program.wait()
                code = "hangs"  # type: ignore[assignment]
        lines = (folder / "results").read_text().splitlines() if (folder / "results").exists() else []
        results = {result["way"]: result for result in map(json.loads, lines)}
        found = [text for way in ways for text in wrong(Cell(DEEDS[deed], host, way), results.get(way), clock)]
        must = DEEDS[deed].on(host, DEEDS[deed].ends) or CODES.get(ways[-1], 0)
        if DEEDS[deed].on(host, DEEDS[deed].fails):
            must = 0  # the job was over before the signal could come
        if code != must:
            found.append(f"{deed}, {host}: exit code {code} instead of {must}")
        found += [f"{deed}, {host}: left {process}" for process in left_after(token)]
        return found + ([(folder / "errors").read_text(errors="replace")[-3000:]] if found else [])


def left_after(token: str) -> list[str]:
    """Return what is left some time after the end of a program."""
    due = time.monotonic() + LEFT_S
    while (left := left_of(token)) and time.monotonic() < due:
        time.sleep(0.05)
    return left


def marks_of(cell: Cell, seen: list[str]) -> list[str]:
    """Return the marks that hooks must leave, sorted if there are several instances of the service."""
    if cell.host in (COMMAND, COMMANDS):
        return ["close"]
    if cell.host == REPLICAS:
        return sorted([*["build", "setup", "stop", "cleanup"] * 2, "close"])
    if cell.host == RECYCLED:
        count = max(seen.count("build"), 1 if cell.outcome == "failed" else 2)
        # The last successor may be on its start when the job ends; it is cleaned up then, and not stopped.
        setups, stops = (count - 1 if seen.count(hook) < count else count for hook in ("setup", "stop"))
        return sorted([*["build", "cleanup"] * count, *["setup"] * setups, *["stop"] * stops, "close"])
    return ["build", "setup", "close", "stop", "cleanup"]


def wrong(cell: Cell, seen: dict[str, Any] | None, clock: FairClock) -> list[str]:
    """Return in words where a job was not as its cell says."""
    what = f"{cell.deed.name}, {cell.host}, {cell.way}"
    if cell.deed.on(cell.host, cell.deed.ends):
        return [] if seen is None else [f"{what}: went on"]
    if seen is None:
        return [f"{what}: the program ended before"]
    deed, host = cell.deed, cell.host
    dirty, fails = deed.on(host, deed.dirty), deed.on(host, deed.fails)
    if host in (REPLICAS, RECYCLED):
        seen["marks"].sort()  # each process has an order of its own
    must = {
        "state": cell.outcome,
        "cleanliness": "dirty" if dirty else "clean",
        "results": [] if fails else [DONE] * RECORDS,
        "marks": marks_of(cell, seen["marks"]),
        "left": "",
        "is_reported": True,
    }
    unchecked = deed.on(host, deed.unchecked) or ()
    found = [
        f"{what}: {key}: {seen[key]} instead of {value}"
        for key, value in must.items()
        if seen[key] != value and key not in unchecked
    ]
    found += [
        f'{what}: no error says "{text}"'
        for text in (dirty, fails)
        if text and not any(text in e for e in seen["errors"])
    ]
    took_s = clock.elapsed_s(*seen["took_s"])
    if took_s > END_S and "took" not in unchecked:
        found.append(f"{what}: its end took {took_s:.2f} s, at most {END_S:g}")
    return found + (seen["errors"] if found else [])


def passes(cell: Cell, clock: FairClock) -> None:
    found = run(cell.deed.name, cell.host, (cell.way,), clock)
    assert not found, "\n".join(found)


QUICK = [deed for deed in DEEDS.values() if deed.is_quick]


def few() -> Iterator[Cell]:
    """Yield a cell for each quick deed, on the host that has had the fewest, with the ends in turn."""
    counts: Counter[str] = Counter()
    for deed, way in zip(QUICK, cycle(WAYS), strict=False):
        host = min(deed.hosts, key=counts.__getitem__)
        counts[host] += 1
        yield Cell(deed, host, way)


FEW = list(few())


@pytest.mark.parametrize("cell", FEW, ids=lambda cell: f"{cell.deed.name}, {cell.host}, {cell.way}")
def test_what_a_process_may_do(cell: Cell, clock: FairClock) -> None:
    """Each kind of deed once, with the hosts and the ends in turn; the proof has all of them."""
    passes(cell, clock)


LIKE_SHARE = 3
"""Of the hosts that are like others, one cell in so many is run."""


def every() -> Iterator[tuple[str, str]]:
    """Yield all deeds with their hosts, and of hosts that are like others, each with another part of the deeds."""
    for place, deed in enumerate(DEEDS.values()):
        for turn, host in enumerate(ALL):
            if host in deed.hosts and (host not in LIKE or (place + turn) % LIKE_SHARE == 0):
                yield deed.name, host


@pytest.mark.proof
@pytest.mark.parametrize(("deed", "host"), list(every()))
def test_what_a_process_may_do_on_every_host_and_with_every_end(deed: str, host: str, clock: FairClock) -> None:
    """The jobs of a program follow one another, so that none of them may be the worse for the one before."""
    found = [text for ways in (WAYS[:-1], WAYS[-1:]) for text in run(deed, host, ways, clock)]
    assert not found, "\n".join(found)


def test_every_deed_has_its_place() -> None:
    assert DEEDS.keys() >= LIKE_OTHERS
    for deed in DEEDS.values():
        assert deed.hosts
        assert {host for host, _ in (*deed.dirty, *deed.fails, *deed.ends)} <= set(deed.single), deed.name
    assert {cell.way for cell in FEW} == set(WAYS)
    assert {cell.host for cell in FEW} == set(ALL)
