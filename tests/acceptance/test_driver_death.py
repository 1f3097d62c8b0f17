"""The driver is killed: what its services leave behind is taken away, and a report says LOST."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sage import BaseService, Cleanliness, JobErrorGroup, JobReport, LocalEnvironment
from sage._guardian.lease import GuardianLease, runs_folder
from sage._processes import is_alive, process

SOURCES = Path(__file__).parents[2] / "src"
WAIT_S = 30.0

ACTIONS = """
    import pathlib

    def drop_table(marks, name):
        with open(marks, "a") as file:
            file.write(f"dropped {name}\\n")
"""

INLINE = """
    import os, sys, threading
    from multiprocessing import resource_tracker
    from multiprocessing.shared_memory import SharedMemory
    from sage import BaseService, LocalEnvironment

    folder = sys.argv[1]

    class Store(BaseService):
        def setup(self):
            self.ctx.own_path(f"/dev/shm/{self.segment}")
            self.memory = SharedMemory(self.segment, create=True, size=100)
            # The tracker of the standard library would unlink it too, where it outlives its parent.
            resource_tracker.unregister(self.memory._name, "shared_memory")
            self.ctx.own_path(f"{folder}/spill")
            os.makedirs(f"{folder}/spill/deep")
            self.ctx.on_lost("actions_of_test:drop_table", [f"{folder}/marks", self.name])

        def __init__(self, segment):
            self.segment = segment

        def cleanup(self):
            self.memory.unlink()

    env = LocalEnvironment("nightly")
    env.register_service("store", Store, sys.argv[2])
    env.from_batch([1]).sink(lambda _: (print("up", os.getpid(), flush=True), threading.Event().wait()))
    env.submit(autostop=True)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return what starts a program and waits for its first line, "up"."""
    (tmp_path / "temporary").mkdir()
    (tmp_path / "actions_of_test.py").write_text(textwrap.dedent(ACTIONS))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (SOURCES, tmp_path))),
        "TMPDIR": str(tmp_path / "temporary"),
        "SAGE_STATE_DIR": str(tmp_path / "state"),
    }
    programs: list[subprocess.Popen[str]] = []

    def started(text: str, *words: str) -> subprocess.Popen[str]:
        file = tmp_path / "program.py"
        file.write_text(textwrap.dedent(text))
        program = subprocess.Popen(
            [sys.executable, str(file), str(tmp_path), *words], env=environment, stdout=subprocess.PIPE, text=True
        )
        programs.append(program)
        assert program.stdout is not None
        assert program.stdout.readline().startswith("up")
        return program

    yield started
    for program in programs:
        program.kill()
        program.wait()
        assert program.stdout is not None
        program.stdout.close()


def wait_gone(folder: Path) -> None:
    """Wait until the guardian has removed the folder of the run, which is its last act."""
    (runs,) = (folder / "temporary").iterdir()
    due = time.monotonic() + WAIT_S
    while list(runs.iterdir()):
        assert time.monotonic() < due, "the guardian has not ended"
        time.sleep(0.01)


def wait_report(folder: Path) -> dict[str, Any]:
    """Wait for the guardian, and return the report that it wrote."""
    wait_gone(folder)
    (report,) = (folder / "state" / "reports").iterdir()
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def test_what_a_service_in_the_killed_driver_declared_is_taken_away(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    segment = f"sage_death_{os.getpid()}"
    program = start(INLINE, segment)
    assert Path(f"/dev/shm/{segment}").exists()
    assert (tmp_path / "spill" / "deep").exists()
    program.kill()
    program.wait()
    report = wait_report(tmp_path)
    assert (report["name"], report["state"], report["cleanliness"]) == ("nightly", "lost", "dirty")
    assert [(service["name"], service["state"]) for service in report["services"]] == [("store", "lost")]
    assert report["errors"] == []
    assert "not cleaned:\n" in str(JobReport.from_dict(report))
    assert not Path(f"/dev/shm/{segment}").exists()
    assert not (tmp_path / "spill").exists()
    assert (tmp_path / "marks").read_text() == "dropped store\n"


def test_the_report_is_the_last_line_of_the_report_file(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    text = INLINE.replace('LocalEnvironment("nightly")', 'LocalEnvironment("nightly", report_file=f"{folder}/report")')
    program = start(text, f"sage_death_{os.getpid()}")
    program.kill()
    program.wait()
    wait_gone(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "report").read_text().splitlines()]
    assert [line["type"] for line in lines][:2] == ["job", "event"]
    assert (lines[-1]["type"], lines[-1]["state"]) == ("report", "lost")
    assert len({line["job"] for line in lines}) == 1
    assert not (tmp_path / "state").exists()


class Spilling(BaseService):
    """Owns a folder and a segment, and may fail to clean them up."""

    def __init__(self, folder: Path, fails: bool) -> None:
        self.folder, self.fails = folder, fails

    def setup(self) -> None:
        self.ctx.own_path(self.folder)
        self.folder.mkdir()
        self.ctx.on_lost("no_such_module:function")

    def cleanup(self) -> None:
        if self.fails:
            raise OSError("disk full")
        self.folder.rmdir()


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_service_declared_is_gone_at_the_end_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    env = LocalEnvironment("demo")
    env.register_service("spill", Spilling, tmp_path / "spilled", fails)
    seen: list[object] = []
    env.from_batch([1]).sink(lambda _: seen.append((tmp_path / "spilled").exists()))
    job = env.submit()
    if fails:
        with pytest.raises(JobErrorGroup, match="disk full"):
            job.wait()
    else:
        assert job.wait().cleanliness is Cleanliness.CLEAN
    assert seen == [True]
    assert not (tmp_path / "spilled").exists()
    assert list(Path(runs_folder()).iterdir()) == []
    assert GuardianLease._current is None


def test_a_kept_service_stays_under_guard_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    env = LocalEnvironment("demo")
    env.register_service("spill", Spilling, tmp_path / "spilled", False)
    env.from_batch([1]).sink(lambda _: None)
    env.submit(autostop=True, keep_services=True)
    guard = GuardianLease._current
    assert guard is not None
    env.submit(autostop=True)
    assert GuardianLease._current is guard
    assert (tmp_path / "spilled").exists()
    env.close()
    assert GuardianLease._current is None
    assert not (tmp_path / "spilled").exists()


def test_a_job_without_claims_has_no_guardian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    env = LocalEnvironment("demo")
    env.from_batch([1]).sink(lambda _: None)
    env.submit(autostop=True)
    assert not Path(runs_folder()).exists()


CHAIN = """
    import os, signal, subprocess, sys, threading
    from sage import BaseService, LocalEnvironment, ServiceOptions

    folder = sys.argv[1]

    class Link(BaseService):
        def __init__(self, *others):
            pass

        def setup(self):
            self.ctx.own_path(f"{folder}/{self.name}.spill")
            open(f"{folder}/{self.name}.spill", "w").close()
            sleeper = [sys.executable, "-c", "import signal; signal.pause()"]
            children = [subprocess.Popen(sleeper), subprocess.Popen(sleeper, start_new_session=True)]
            ignoring = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
            children.append(subprocess.Popen([sys.executable, "-c", ignoring], stdout=subprocess.PIPE))
            children[-1].stdout.readline()
            os.kill(children[0].pid, signal.SIGSTOP)
            self.children = children
            self.mark("pids " + " ".join(str(child.pid) for child in (*children,)) + f" {os.getpid()}")

        def mark(self, text):
            with open(f"{folder}/marks", "a") as file:
                file.write(f"{self.name} {text}\\n")

        def stop(self):
            self.mark("stop")

        def cleanup(self):
            self.mark("cleanup")

        def process(self, record):
            return record

    env = LocalEnvironment("nightly")
    options = ServiceOptions(host="process")
    c = env.register_service("c", Link, options=options)
    b = env.register_service("b", Link, c, options=options)
    a = env.register_service("a", Link, b, options=options)
    env.from_batch([1]).map(a.process).sink(lambda _: (print("up", flush=True), threading.Event().wait()))
    env.submit(autostop=True)
"""


@pytest.mark.slow
def test_services_in_processes_stop_in_reverse_and_nothing_is_left(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """SIGKILL of the driver, with children in their own sessions, stopped, and stubborn."""
    program = start(CHAIN)
    words = [line.split() for line in (tmp_path / "marks").read_text().splitlines()]
    assert [name for name, *_ in words] == ["c", "b", "a"]
    left = {one for _, _, *pids in words for pid in pids if (one := process(int(pid))) is not None}
    assert len(left) == 12
    program.kill()
    program.wait()
    report = wait_report(tmp_path)
    marks = (tmp_path / "marks").read_text().splitlines()[3:]
    assert marks == ["a stop", "a cleanup", "b stop", "b cleanup", "c stop", "c cleanup"]
    assert {one for one in left if is_alive(one)} == set()
    assert (report["state"], report["cleanliness"]) == ("lost", "clean")
    assert {service["name"]: service["state"] for service in report["services"]} == dict.fromkeys("abc", "stopped")


DIES_AT_THE_END = """
    import os, shutil, signal, subprocess, sys
    from sage import LocalEnvironment, ServiceOptions

    class Service:
        pass

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def arm(_):
        if sys.argv[2] == "folder":
            shutil.rmtree = die
        else:
            subprocess.Popen.kill = die

    if __name__ == "__main__":
        env = LocalEnvironment("nightly", report_file=sys.argv[1] + "/report")
        env.register_service("service", Service, options=ServiceOptions(host="process"))
        env.from_batch([1]).sink(arm)
        print("up", flush=True)
        env.submit(autostop=True)
"""


@pytest.mark.parametrize("moment", ["folder", "guardian"])
def test_a_driver_that_is_killed_in_its_last_act_leaves_no_folder(
    moment: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """When it would remove the folder of the run, and when it would end the guardian."""
    program = start(DIES_AT_THE_END, moment)
    assert program.wait(WAIT_S) == -signal.SIGKILL
    wait_gone(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "report").read_text().splitlines()]
    assert [line["state"] for line in lines if line["type"] == "report"] == ["completed"]
    assert not (tmp_path / "state").exists()


CALLING = """
    import sys, threading
    from sage import BaseService, LocalEnvironment, ServiceOptions

    folder, shared = sys.argv[1], sys.argv[2] == "shared"

    class Ending(BaseService):
        def cleanup(self):
            # Whoever ends too early comes first, as the other one takes its time.
            threading.Event().wait(0.3 if self.name == "agent" else 0)
            with open(f"{folder}/marks", "a") as file:
                file.write(f"{self.name} cleaned\\n")

        def process(self, record):
            return self.call_service("store", record) if self.name == "agent" else record

    if __name__ == "__main__":
        env = LocalEnvironment("nightly")
        agent = env.register_service("agent", Ending, options=ServiceOptions(host="process"))
        env.register_service("store", Ending, options=ServiceOptions(host="process", shared=shared))
        env.from_batch([1]).map(agent.process).sink(lambda _: (print("up", flush=True), threading.Event().wait()))
        env.submit(autostop=True)
"""


@pytest.mark.parametrize("kind", ["shared", "own"])
def test_whoever_was_seen_to_call_a_service_ends_before_it(
    kind: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """Nothing was declared, and a service that environments share has a job of its own."""
    program = start(CALLING, kind)
    program.kill()
    program.wait()
    wait_gone(tmp_path)
    assert (tmp_path / "marks").read_text().splitlines() == ["agent cleaned", "store cleaned"]
    reports = [json.loads(path.read_text()) for path in (tmp_path / "state" / "reports").iterdir()]
    assert {report["state"] for report in reports} == {"lost"}
    (nightly,) = [report for report in reports if report["name"] == "nightly"]
    assert {service["name"]: service["state"] for service in nightly["services"]} == dict.fromkeys(
        ("agent", "store"), "stopped"
    )
    assert {report["cleanliness"] for report in reports} == {"clean"}
