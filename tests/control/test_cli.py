"""The command `sage`, as it is installed."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from sage import LocalEnvironment
from sage._control import doctor
from sage._control.progress import Progress
from sage.testing import ManualClock

SAGE = Path(sys.executable).with_name("sage")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SAGE_")}

GOOD = """
    import sys
    from sage import LocalEnvironment
    from neighbour import double

    env = LocalEnvironment("good")
    env.from_batch([1, 2, 3], name="numbers").map(double).sink(print, name="show")
    env.submit(autostop="later" not in sys.argv)
    print("arguments", sys.argv[1:], __name__)
"""

BAD = """
    from sage import LocalEnvironment

    def parse(text):
        return int(text)

    env = LocalEnvironment("bad")
    env.from_batch(["1", "x"]).map(parse).sink(print)
    env.submit(autostop=True)
"""

SERVICE = """
    import itertools, signal, sys, threading, time
    from sage import LocalEnvironment

    DEFAULT = signal.getsignal(signal.SIGHUP)

    class Store:
        def keep(self, record):
            return record

        def close(self):
            print("store closed", flush=True)
            if "break" in sys.argv:
                raise OSError("disk full")

    def show(record):
        if record == 0:
            # The job's own handlers are there as soon as somebody waits for it; this one is set last.
            while "work" not in sys.argv and signal.getsignal(signal.SIGHUP) is DEFAULT:
                time.sleep(0.001)
            print("first record", flush=True)

    env = LocalEnvironment("service")
    store = env.register_service("store", Store)
    numbers = itertools.count()
    records = [0] if "short" in sys.argv else numbers
    env.from_batch(records).map(store.keep).sink(show)
    env.submit(autostop="wait" in sys.argv)
    if "work" in sys.argv:
        threading.Event().wait()
"""


def write(folder: Path, program: str, name: str = "program.py") -> str:
    (folder / name).write_text(textwrap.dedent(program), encoding="utf-8")
    return name


def sage(folder: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SAGE, *args],
        cwd=folder,
        env=ENVIRONMENT | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
    )


@pytest.fixture
def good(tmp_path: Path) -> str:
    write(tmp_path, "def double(number): return 2 * number", "neighbour.py")
    return write(tmp_path, GOOD)


EXPLAINED = "from sage import LocalEnvironment\nenv = LocalEnvironment('e')\nenv.from_batch([1]).print()\n"

LOGGING = """
import logging
from sage import LocalEnvironment, MapFunction

SETTING

class Tells(MapFunction):
    def execute(self, data):
        self.logger.info("mine INFO")
        self.logger.warning("mine WARNING")
        return data

env = LocalEnvironment("tells")
env.from_batch([1]).map(Tells).sink(lambda x: None)
env.submit(autostop=True)
"""


class TestRun:
    def test_runs_the_file_as_python_would(self, tmp_path: Path, good: str) -> None:
        """The command line turns file logs on, and no record has a line in them."""
        ended = sage(tmp_path, "run", good, "--", "a", "--b")
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.splitlines() == ["2", "4", "6", "arguments ['a', '--b'] __main__"]
        assert 'job "good": COMPLETED and CLEAN' in ended.stderr
        assert re.search(r"double +1 +3 +3 +0 ", ended.stderr)
        (session,) = (tmp_path / ".sage" / "logs" / "jobmanager").glob("session_*")
        logs = {file.name: file.read_text(encoding="utf-8") for file in session.iterdir()}
        assert "Dispatcher.log" in logs
        assert all(len(text.splitlines()) < 30 for text in logs.values())

    @pytest.mark.parametrize(
        ("words", "args"),
        [
            (["--x"], ["--x"]),
            (["--x", "5", "-v", "--name=a", "plain"], ["--x", "5", "-v", "--name=a", "plain"]),
            (["--x", "--", "--progress", "--help"], ["--x", "--progress", "--help"]),
            (["--help"], ["--help"]),
            (["a", "-h", "--report", "b"], ["a", "-h", "--report", "b"]),
            (["--no-progress", "--x"], ["--x"]),
        ],
    )
    def test_the_program_gets_its_own_options(self, tmp_path: Path, words: list[str], args: list[str]) -> None:
        program = write(tmp_path, "import sys; print(sys.argv[1:])")
        ended = sage(tmp_path, "run", program, *words)
        assert (ended.returncode, ended.stdout) == (0, f"{args}\n"), ended.stderr
        ended = sage(tmp_path, "explain", write(tmp_path, f"{EXPLAINED}"), *words[:1])
        assert "unexpected" not in ended.stderr

    @pytest.mark.parametrize(
        ("setting", "shown"),
        [
            ("logging.basicConfig(level=logging.WARNING)", ["mine WARNING"]),
            ("logging.basicConfig()", ["mine WARNING"]),
            ("logging.getLogger().addHandler(logging.StreamHandler())", ["mine WARNING"]),
            ("logging.getLogger('sage').addHandler(logging.StreamHandler())", ["mine WARNING"]),
            ("logging.basicConfig(level=logging.INFO)", ["mine INFO", "mine WARNING"]),
            ("logging.basicConfig(); logging.getLogger('sage').setLevel('ERROR')", []),
            ("pass", []),
        ],
    )
    def test_the_logging_of_the_program_stays_as_it_is(self, tmp_path: Path, setting: str, shown: list[str]) -> None:
        """The files get what they always hold."""
        program = write(tmp_path, LOGGING.replace("SETTING", setting))
        ended = sage(tmp_path, "run", program)
        alone = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, timeout=50)
        assert ended.returncode == alone.returncode == 0, ended.stderr
        for text in (ended.stderr, alone.stderr):
            lines = [line for line in text.splitlines() if "mine" in line or "job " in line or " INFO" in line]
            mine = [line.rpartition("mine")[2].strip() for line in lines if "mine" in line]
            assert mine == [line.removeprefix("mine ") for line in shown]
        told = [line for line in alone.stderr.splitlines() if line.startswith(("INFO", "WARNING"))]
        also = [line for line in ended.stderr.splitlines() if line.startswith(("INFO", "WARNING"))]
        assert len(also) == len(told)
        (session,) = (tmp_path / ".sage" / "logs" / "jobmanager").glob("session_*")
        logs = "".join(file.read_text(encoding="utf-8") for file in session.iterdir())
        for name in ("manager", "dispatcher", "job"):
            assert f" INFO sage.{name} " in logs

    def test_waits_for_jobs_that_the_program_left_running(self, tmp_path: Path, good: str) -> None:
        ended = sage(tmp_path, "run", good, "--", "later")
        assert ended.returncode == 0, ended.stderr
        # The program prints at the same time, also within a line.
        assert sorted(filter(str.isdigit, ended.stdout)) == ["2", "4", "6"]
        assert 'job "good": COMPLETED and CLEAN' in ended.stderr
        assert "Warning" not in ended.stderr

    def test_a_failed_job_is_1_and_shows_the_users_traceback(self, tmp_path: Path) -> None:
        """The error names operator, record and original, and is found in Error.log."""
        ended = sage(tmp_path, "run", write(tmp_path, BAD), "--log-dir", "logs")
        assert ended.returncode == 1
        assert 'job "bad": FAILED and CLEAN' in ended.stderr
        assert "operator \"parse\" failed on record 'x': ValueError: invalid literal" in ended.stderr
        assert 'File "program.py", line 5, in parse\n    return int(text)' in ended.stderr
        assert 'File "program.py", line 9, in <module>' in ended.stderr
        assert "_operators" not in ended.stderr
        assert "runpy" not in ended.stderr
        (errors,) = (tmp_path / "logs" / "jobmanager").glob("session_*/Error.log")
        text = errors.read_text(encoding="utf-8")
        assert "in parse" in text
        assert "_operators" in text

    def test_notes_of_an_error_are_shown(self, tmp_path: Path) -> None:
        program = """
            from sage import LocalEnvironment
            env = LocalEnvironment("wrong")
            env.from_batch([1]).map(lambda x: x).keyby(lambda x: x, strategy="none")
        """
        ended = sage(tmp_path, "run", write(tmp_path, program))
        assert ended.returncode == 1
        assert "GraphError: keyby: strategy is 'none'\nIt is one of hash, broadcast, round_robin." in ended.stderr

    def test_completed_but_dirty_is_2(self, tmp_path: Path) -> None:
        """A cleanup that raises is in the report and in what is raised."""
        ended = sage(tmp_path, "run", write(tmp_path, SERVICE), "--", "short", "wait", "break")
        assert ended.returncode == 2, ended.stderr
        assert 'job "service": COMPLETED and DIRTY' in ended.stderr
        assert 'CleanupError: service "store" failed in cleanup: OSError: disk full' in ended.stderr

    def test_a_failure_that_the_program_caught_is_still_1(self, tmp_path: Path) -> None:
        lines = ("try:", "    env.submit(autostop=True)", "except Exception:", "    print('caught')")
        program = BAD.replace("env.submit(autostop=True)", "\n    ".join(lines))
        ended = sage(tmp_path, "run", write(tmp_path, program))
        assert ended.returncode == 1
        assert ended.stdout == "1\ncaught\n"
        assert "Traceback" not in ended.stderr

    @pytest.mark.parametrize(
        ("statement", "code", "text"),
        [("sys.exit(7)", 7, ""), ("sys.exit('no input')", 1, "no input"), ("raise OSError(5, 'x')", 1, "OSError")],
    )
    def test_the_program_decides_about_its_exit(self, tmp_path: Path, statement: str, code: int, text: str) -> None:
        ended = sage(tmp_path, "run", write(tmp_path, f"import sys\n{statement}"))
        assert ended.returncode == code
        assert text in ended.stderr

    @pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
    @pytest.mark.parametrize("how", ["wait", "leave", "work"])
    def test_a_signal_stops_and_cleans(self, tmp_path: Path, signum: int, code: int, how: str) -> None:
        """Sources stop, what is in flight drains, services are cleaned once, the exit code tells."""
        command = [str(SAGE), "run", write(tmp_path, SERVICE), "--", how]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "first record\n"
            process.send_signal(signum)
            output, errors = process.communicate(timeout=50)
        assert process.returncode == code, errors
        assert output == "store closed\n"
        assert 'job "service": STOPPED and CLEAN' in errors
        assert "Traceback" not in errors

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        ended = sage(tmp_path, "run", "nothing.py")
        assert ended.returncode == 2
        assert "'nothing.py' does not exist" in ended.stderr
        assert not list(tmp_path.iterdir())


class TestProgress:
    def test_a_terminal_shows_how_far_the_jobs_are(self, tmp_path: Path) -> None:
        program = """
            import time
            from sage import LocalEnvironment

            env = LocalEnvironment("slow")
            env.from_batch(range(20)).map(lambda x: time.sleep(0.05), name="work").sink(lambda x: None)
            env.submit(autostop=True)
            print("the result")
        """
        name = write(tmp_path, program)
        ours, theirs = pty.openpty()
        environment = ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "100"}
        with subprocess.Popen(
            [SAGE, "run", name], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=theirs
        ) as process:
            os.close(theirs)
            drawn = b""
            # Linux tells the end of a terminal by an error.
            try:
                while chunk := os.read(ours, 65536):
                    drawn += chunk
            except OSError:
                pass
            assert process.stdout is not None
            output = process.stdout.read()
        os.close(ours)
        text = drawn.decode()
        assert process.returncode == 0
        assert output == b"the result\n"
        assert re.search(r"slow\S* running +records +rate", text)
        assert re.search(r"work +\d+ +\d+/s", text)
        assert 'job "slow": COMPLETED and CLEAN' in text

    def test_the_table_counts_what_passed(self) -> None:
        reached, go_on = threading.Event(), threading.Event()

        def wait(record: int) -> int:
            reached.set()
            go_on.wait()
            return record

        env = LocalEnvironment("one")
        env.from_batch([1], name="[number]").rebalance().map(wait, parallelism=2).sink(print)
        job = env.submit()
        clock = ManualClock()
        progress = Progress(lambda: [job], clock)

        def drawn() -> str:
            output = io.StringIO()
            Console(file=output, width=120).print(progress.table())
            return output.getvalue()

        try:
            assert reached.wait(10)
            drawn()
            clock.advance(0.5)
            text = drawn()
        finally:
            go_on.set()
        job.wait()
        assert "one running" in text
        assert re.search(r"\[number\] +1 +\d+/s +0", text)
        assert re.search(r"wait +0 +0/s +0 +[█░]{8} +\d+%", text)
        assert "one" not in drawn()


class TestExplain:
    def test_shows_every_environment_and_runs_none(self, tmp_path: Path) -> None:
        program = """
            from sage import LocalEnvironment, RemoteEnvironment

            def job(name, environment):
                env = environment(name)
                env.register_service("store", lambda: print("a service was built"))
                env.from_batch([1]).map(lambda x: print("a record")).sink(print)
                job = env.submit(autostop=True)
                print(name, job.state, job.wait().operators[0].records_in)
                job.stop()
                env.close()

            job("first", LocalEnvironment)
            job("second", RemoteEnvironment)
            third = LocalEnvironment("third")
            third.from_batch([1]).print()
        """
        ended = sage(tmp_path, "explain", write(tmp_path, program))
        assert ended.returncode == 0, ended.stderr
        titles = [line for line in ended.stdout.splitlines() if line.startswith("physical plan")]
        assert titles == [f"physical plan of {name}" for name in ("first", "second", "third")]
        assert "chain 0: source -> map -> print" in ended.stdout
        assert ended.stderr == "first completed 0\nsecond completed 0\n"

    def test_draws_a_flowchart(self, tmp_path: Path, good: str) -> None:
        ended = sage(tmp_path, "explain", good, "--format", "mermaid")
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.startswith("flowchart LR\n")
        assert '["numbers"]' in ended.stdout

    def test_a_program_that_misses_its_results_is_no_failure(self, tmp_path: Path) -> None:
        program = """
            from sage import LocalEnvironment
            env, arrived = LocalEnvironment("results"), []
            env.from_batch([1]).sink(arrived.append)
            env.submit(autostop=True)
            print(arrived[0])
        """
        ended = sage(tmp_path, "explain", write(tmp_path, program))
        assert ended.returncode == 0
        assert ended.stdout.startswith("physical plan of results\n")
        assert ended.stderr == (
            "The program ended after its submit, which gave it no results: IndexError: list index out of range\n"
        )

    def test_the_plans_are_drawn(self, tmp_path: Path) -> None:
        """Each operator and service of every plan is in the drawing, whatever its name."""
        program = (
            "from sage import LocalEnvironment\n"
            "class Store:\n    def process(self, x): return x\n"
            "env = LocalEnvironment('first')\nstore = env.register_service('a <store>', Store)\n"
            "letters = env.dead_letters('lost')\n"
            "keyed = env.from_batch([1], name='numbers').map(store, name='ask').keyby(str, name='by & by')\n"
            "keyed.map(str, parallelism=3, on_error=letters, name='a name of more letters than fit').sink(print)\n"
            "letters.sink(print)\nenv.submit(autostop=True)\n"
            "other = LocalEnvironment('second')\nother.from_batch([1]).sink(print, name='show')\n"
        )
        ended = sage(tmp_path, "explain", "--svg", "plan.svg", write(tmp_path, program))
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
        drawing = ElementTree.parse(tmp_path / "plan.svg")
        texts = [element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")]
        assert {"first", "second", "numbers", "ask", "by & by", "a <store>", "lost", "show", "3 tasks", "hash"} <= {
            *texts
        }
        assert "dead letters" in texts
        titles = [element.text for element in drawing.iter("{http://www.w3.org/2000/svg}title")]
        assert "a name of more letters than fit" in titles
        calls = [path for path in drawing.iter("{http://www.w3.org/2000/svg}path") if path.get("class") == "call"]
        assert len(calls) == 1

    @pytest.mark.parametrize(
        ("program", "text"),
        [
            ("print('nothing')", "program.py submits no environment and has none on its top level"),
            ("import nonsense", "ModuleNotFoundError: No module named 'nonsense'"),
            (
                "from sage import LocalEnvironment\nenv = LocalEnvironment('e')\nenv.from_future('f').print()",
                "FutureError",
            ),
        ],
    )
    def test_a_wrong_program_is_1(self, tmp_path: Path, program: str, text: str) -> None:
        ended = sage(tmp_path, "explain", write(tmp_path, program))
        assert ended.returncode == 1
        assert text in ended.stderr
        assert ended.stdout == ""


class TestReport:
    def test_a_run_is_saved_printed_and_drawn(self, tmp_path: Path, good: str) -> None:
        (tmp_path / "out.jsonl").write_text("from an earlier run\n")
        ended = sage(tmp_path, "run", "--report", "out.jsonl", good)
        assert ended.returncode == 0, ended.stderr
        shown = sage(tmp_path, "report", "out.jsonl")
        assert (shown.returncode, shown.stderr) == (0, "")
        assert shown.stdout == ended.stderr
        drawn = sage(tmp_path, "report", "out.jsonl", "--html", "out.html", "--svg", "out.svg")
        assert (drawn.returncode, drawn.stdout) == (0, "")
        assert "COMPLETED and CLEAN" in (tmp_path / "out.html").read_text(encoding="utf-8")
        assert (tmp_path / "out.svg").read_text(encoding="utf-8").startswith("<svg ")

    def test_a_killed_run_leaves_what_had_happened(self, tmp_path: Path) -> None:
        command = [str(SAGE), "run", "--report", "out.jsonl", write(tmp_path, SERVICE), "--", "wait"]
        with subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "first record\n"
            process.kill()
        shown = sage(tmp_path, "report", "out.jsonl")
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.startswith('job "service": the run DID NOT END')
        assert re.search(r"store +ready +build ", shown.stdout)

    def test_a_missing_folder_is_told_before_the_program_runs(self, tmp_path: Path, good: str) -> None:
        ended = sage(tmp_path, "run", "--report", "none/out.jsonl", good)
        assert ended.returncode == 2
        assert "Invalid value for --report: none/out.jsonl cannot be written: No such file or dir" in ended.stderr
        assert ended.stdout == ""

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
    @pytest.mark.parametrize(("program", "code"), [(GOOD, 2), (BAD, 1)])
    def test_a_full_disk_is_2_if_nothing_is_worse(self, tmp_path: Path, good: str, program: str, code: int) -> None:
        ended = sage(tmp_path, "run", "--report", "/dev/full", write(tmp_path, program))
        assert ended.returncode == code
        assert 'warning: report file "/dev/full" is not complete: No space left on device' in ended.stderr

    def test_a_file_without_a_job_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("nothing\n[]\n")
        ended = sage(tmp_path, "report", "notes.txt")
        assert ended.returncode == 1
        assert ended.stderr == "Error: notes.txt does not contain a job\n"


class TestOthers:
    def test_version(self, tmp_path: Path) -> None:
        ended = sage(tmp_path, "version")
        assert ended.returncode == 0
        assert sage(tmp_path, "--version").stdout == ended.stdout
        as_module = subprocess.run(
            [sys.executable, "-m", "sage", "--version"], capture_output=True, text=True, check=True
        )
        assert as_module.stdout == ended.stdout
        assert re.fullmatch(r"sage-dataflow \d+\.\d+\.\d+\S*, Python 3\.\d+\.\d+\S*, \w+\n", ended.stdout)

    def test_doctor_finds_nothing_wrong(self, tmp_path: Path) -> None:
        ended = sage(tmp_path, "doctor")
        names = [line.split(":")[0].split("  ")[-1].strip() for line in ended.stdout.splitlines()]
        if "shared memory for Ray" in names:  # looked at only where Ray is installed
            names.remove("shared memory for Ray")
        assert names == [
            "Python",
            "import sage",
            "SQLite FTS5",
            "thread start",
            "log folder",
            "click",
            "rich",
            "Ray",
            "pipeline with a service",
        ]
        assert "pipeline with a service: completed and clean" in ended.stdout
        assert ended.returncode == 0, ended.stdout
        assert not list(tmp_path.iterdir())

    def test_a_slow_machine_is_not_wrong(self) -> None:
        check = doctor.thread_start(slow_from_s=0)
        assert check.is_good
        assert re.fullmatch(r"\d+ us, slow: every job takes long to begin", check.detail)
        assert re.fullmatch(r"\d+ us", doctor.thread_start(slow_from_s=60).detail)

    def test_doctor_exits_with_1(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        ended = sage(tmp_path, "doctor", SAGE_LOG_DIR="file/logs")
        assert ended.returncode == 1
        assert "WRONG  log folder: file/logs: Not a directory" in ended.stdout
