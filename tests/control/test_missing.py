"""`sage report --missing` names the records that did not arrive, and says why."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from sage import Durable, FunctionError, JobReport, LocalEnvironment, MapFunction
from sage._control.cli import main
from sage._control.missing import missing_text
from sage.connectors import JsonLines, JsonLinesFiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sage._runtime.backend import Backend


def lines_of(report: JobReport) -> list[str]:
    """Return the words of each line, also after the report was saved."""
    text = missing_text(report)
    assert missing_text(JobReport.from_dict(json.loads(json.dumps(report.to_dict())))) == text
    return [" ".join(line.split()) for line in text.splitlines()]


def half(number: int) -> float:
    return 10 / (number % 5)


class Small(MapFunction[float, float]):
    def execute(self, data: float) -> float | None:
        return data if data < 9 else None


def test_every_reason_of_a_job_that_completed(backend: Callable[[], Backend]) -> None:
    env = LocalEnvironment("halves", backend=backend)
    letters = env.dead_letters("letters")
    letters.sink(lambda _: None, name="bad")
    halves = env.from_batch(range(10), name="numbers").map(half, name="half", on_error=letters)
    kept = halves.filter(lambda number: number != 5, name="not five").map(Small, name="small")
    kept.map(lambda number: 1 / (number != 2.5), name="skips", on_error="skip").sink(lambda _: None, name="sink")
    assert lines_of(env.run()) == [
        'job "halves": 8 records did not arrive',
        "operator reason records",
        "half dead letter 2",
        "not five dropped by its function 2",
        "small dropped by its function 2",
        "skips skipped after an error 2",
        "half: 0: ZeroDivisionError: division by zero",
        "half: 5: ZeroDivisionError: division by zero",
        "skips: 2.5: ZeroDivisionError: division by zero",
        "skips: 2.5: ZeroDivisionError: division by zero",
    ]


def test_of_many_only_the_first_are_named() -> None:
    env = LocalEnvironment("many")
    env.from_batch(range(100), name="numbers").map(lambda number: 1 / 0, name="fails", on_error="skip").sink(print)
    lines = lines_of(env.run())
    assert lines[2] == "fails skipped after an error 100"
    assert lines[3:] == [
        *(f"fails: {number}: ZeroDivisionError: division by zero" for number in range(20)),
        "fails: and 80 more that failed",
    ]


def test_a_record_that_fails_the_job_and_those_that_were_in_flight() -> None:
    env = LocalEnvironment("fails")
    source = env.from_batch(range(8), name="numbers")
    source.map(half, name="half").sink(lambda _: None, name="sink")
    job = env.submit()
    with pytest.raises(FunctionError):
        job.wait()
    lines = lines_of(job.report)
    assert "half failed the job 1" in lines
    assert sum(int(line.split()[-1]) for line in lines if "in flight" in line) == job.report.undelivered
    assert lines[-1] == "half: 0: ZeroDivisionError: division by zero"


def test_those_that_were_in_flight_are_counted_where_they_were_missing() -> None:
    env = LocalEnvironment("rests")
    env.from_batch([1], name="numbers").map(half, name="half").sink(lambda _: None, name="sink")
    whole = env.run()
    ask = replace(whole.operator("half"), missing=7)
    cut = replace(whole, undelivered=7, operators=(whole.operator("numbers"), ask))
    assert lines_of(cut)[2:] == ["half undelivered: in flight at the end 7"]
    both = replace(cut, undelivered=3, waiting=4)
    assert lines_of(both)[2:] == ["half undelivered: in flight at the end, or waits for the next run 7"]
    lost = replace(cut, undelivered=0)
    assert lines_of(lost)[2:] == [
        "half not accounted for 7",
        "records are not accounted for; this is a bug of SAGE, please report it",
    ]
    unknown = replace(cut, operators=tuple(replace(one, missing=None) for one in cut.operators))
    assert lines_of(unknown)[2:] == ["undelivered: in flight at the end 7"]
    later = replace(whole, operators=(replace(ask, missing=0, earlier_failed=2),))
    assert lines_of(later)[2:] == ["half failed in earlier runs 2"]
    assert lines_of(replace(later, restarts=1))[2:] == ["half failed in earlier runs or before a restart 2"]


def test_those_that_wait_for_the_next_run_of_a_durable_job(tmp_path: Path) -> None:
    async def ask(number: int) -> int:
        if number == 3:
            env.stop()
        return number

    env = LocalEnvironment("asks", durable=Durable(tmp_path / "state"))
    asked = env.from_batch(range(40), name="numbers").map_async(ask, concurrency=1, name="ask")
    asked.sink(JsonLinesFiles(tmp_path / "out"), name="out")
    job = env.submit()
    job.wait()
    assert job.report.waiting > 0
    assert f"ask waits for the next run {job.report.waiting}" in lines_of(job.report)


def test_lines_of_a_source_that_could_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("1\n{\n2\n", encoding="utf-8")
    env = LocalEnvironment("reads")
    env.from_source(JsonLines(tmp_path / "in.jsonl", bad_lines="skip"), name="lines").sink(lambda _: None, name="sink")
    assert lines_of(env.run())[2:] == ["lines could not be read 1"]


def test_the_command_prints_it_for_each_job(tmp_path: Path) -> None:
    file = tmp_path / "report.jsonl"
    for divisor in (1, 0):
        env = LocalEnvironment(f"job {divisor}")
        env.report_file = file
        halves = env.from_batch([divisor, 2], name="numbers").map(
            lambda number: 1 / number, name="half", on_error="skip"
        )
        halves.sink(lambda _: None, name="sink")
        env.run()
    file.write_text(file.read_text("utf-8") + json.dumps({"type": "job", "job": "3", "name": "killed", "at": 1}) + "\n")
    ended = CliRunner().invoke(main, ["report", "--missing", str(file)])
    assert ended.exit_code == 0
    first, second, *others = ended.output.splitlines()
    assert (first, second) == ('job "job 1": every record arrived', 'job "job 0": 1 record did not arrive')
    assert 'job "killed": the run DID NOT END; the file ends 0 us after its start' in others
    assert "did not arrive" not in CliRunner().invoke(main, ["report", str(file)]).output
