"""Programs behind `| head`: when nobody reads their output any more, they end as a tool does, quietly and cleaned."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

WAIT_S = 30.0
CUT_OFF = 141
SAGE = str(Path(sys.executable).with_name("sage"))

PROGRAM = """
    import asyncio, sys
    from sage import BaseService, LocalEnvironment, Retry, ServiceOptions

    class Store(BaseService):
        def process(self, record):
            return record

        def show(self, record):
            print(record)
            return record

        def cleanup(self):
            with open("marks", "a") as file:
                file.write("cleaned\\n")

    async def show(record):
        print(record)

    if __name__ == "__main__":
        env = LocalEnvironment("cut off")
        options = ServiceOptions(host="process" if "process" in sys.argv else "inline")
        store = env.register_service("store", Store, options=options)
        records = env.from_source(lambda: 1) if "endless" in sys.argv else env.from_batch(range(int(sys.argv[1])))
        records = records.map(store)
        match sys.argv[2]:
            case "print":
                records.sink(print)
            case "skip":
                records.sink(print, on_error="skip")
            case "retry":
                records.sink(print, on_error=Retry(attempts_max=50, backoff_s=(5.0, 5.0), then="skip"))
            case "parallel":
                records.rebalance().map(print, parallelism=3).sink(lambda _: None)
            case "async":
                records.map_async(show).sink(lambda _: None)
            case "in service":
                records.map(store.show).sink(lambda _: None)
            case "fails":
                records.map(lambda record: 1 // (record - 2)).sink(lambda _: None)
        env.submit(autostop=True)
"""


def cut_off(folder: Path, command: list[str], lines: int, *, unbuffered: bool = True) -> tuple[int, str, int]:
    """Run a program, read so many lines of its output, and return its exit code, its errors and its cleanups."""
    (folder / "program.py").write_text(textwrap.dedent(PROGRAM))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for _ in range(lines):
            assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()
        code = process.wait(WAIT_S)
    marks = folder / "marks"
    return code, errors, len(marks.read_text().split()) if marks.exists() else 0


PYTHON = [sys.executable, "program.py"]


@pytest.mark.parametrize("way", ["print", "skip", "retry", "parallel", "async", "in service"])
@pytest.mark.parametrize(
    ("count", "unbuffered"),
    [
        ("100000", True),
        *(pytest.param(*case, marks=pytest.mark.proof) for case in (("100000", False), ("endless", True))),
        ("endless", False),
    ],
)
def test_a_program_whose_output_is_cut_off_ends_quietly(tmp_path: Path, way: str, count: str, unbuffered: bool) -> None:
    command = [*PYTHON, "100000", way, *(["endless"] if count == "endless" else [])]
    assert cut_off(tmp_path, command, 1, unbuffered=unbuffered) == (CUT_OFF, "", 1)


def test_what_a_service_in_a_process_prints_counts_too(tmp_path: Path) -> None:
    assert cut_off(tmp_path, [*PYTHON, "100000", "in service", "process"], 1) == (CUT_OFF, "", 1)


@pytest.mark.parametrize("unbuffered", [True, False])
def test_text_that_waits_in_a_buffer_is_no_trouble_at_the_exit(tmp_path: Path, unbuffered: bool) -> None:
    assert cut_off(tmp_path, [*PYTHON, "3", "print"], 0, unbuffered=unbuffered) == (CUT_OFF, "", 1)


def test_another_failure_is_told_all_the_same(tmp_path: Path) -> None:
    code, errors, cleanups = cut_off(tmp_path, [*PYTHON, "5", "fails"], 0)
    assert (code, cleanups) == (1, 1)
    assert "ZeroDivisionError" in errors


def test_sage_run_ends_quietly(tmp_path: Path) -> None:
    command = [SAGE, "run", "program.py", "--", "100000", "print"]
    assert cut_off(tmp_path, command, 1) == (CUT_OFF, "", 1)


@pytest.mark.parametrize("command", [["explain", "program.py", "--", "5", "print"], ["run", "--help"], ["version"]])
def test_commands_of_sage_end_quietly(tmp_path: Path, command: list[str]) -> None:
    assert cut_off(tmp_path, [SAGE, *command], 0) == (CUT_OFF, "", 0)


def test_sage_run_with_progress_and_both_streams_cut_off(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    pipeline = f"({shlex.quote(str(SAGE))} run --progress program.py -- 100000 print; echo $? > code) 2>&1 | head -1"
    subprocess.run(["sh", "-c", pipeline], cwd=tmp_path, capture_output=True, timeout=WAIT_S, check=True)
    assert (tmp_path / "code").read_text() == f"{CUT_OFF}\n"
    assert (tmp_path / "marks").read_text() == "cleaned\n"
