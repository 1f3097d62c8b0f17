"""Reports as a person reads them: printed, saved, read back and drawn."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sage import (
    FunctionError,
    GraphError,
    JobError,
    JobErrorGroup,
    JobReport,
    LocalEnvironment,
    Outcome,
    ServiceOptions,
)
from sage._control import timeline
from sage._control.saved import read
from sage.observability import ReportFile
from sage.report import Cleanliness, HookReport, OperatorReport, ServiceReport


class Stubborn:
    """Hangs in `stop` until it is released, and fails in `cleanup`."""

    def __init__(self, released: threading.Event) -> None:
        self.released = released

    def stop(self) -> None:
        self.released.wait()

    def cleanup(self) -> None:
        raise OSError("disk full\x1b[2J")


def dirty_report(path: Path | None = None) -> JobReport:
    released = threading.Event()
    env = LocalEnvironment("dirty", report_file=path)
    env.register_service("<script>", Stubborn, released, options=ServiceOptions(stop_timeout_s=0.2))
    env.from_batch([1, 0]).map(lambda n: 1 // n, name="invert").sink(lambda n: None)
    try:
        with pytest.raises(JobErrorGroup):
            env.submit(autostop=True)
    finally:
        released.set()
    report = env.jobmanager.jobs[env.env_uuid].report
    assert isinstance(report, JobReport)
    return report


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_was_not_cleaned_says_why_and_where() -> None:
    text = str(dirty_report())
    title, _, rest = text.partition("\n")
    assert title.startswith('job "dirty": FAILED and DIRTY after ')
    unclean, errors = rest.split("not cleaned:\n")[1].split("\nerrors:\n")
    assert unclean.startswith('  service "<script>" (abandoned): stop did not end within ')
    assert r"; cleanup raised OSError: disk full\x1b[2J" in unclean
    assert "in stop" in unclean
    assert errors.splitlines()[0].startswith('  FunctionError: operator "invert" failed on record 0')
    assert "stands here" not in errors
    assert text.count("its thread stands here:") == 1


def test_each_record_of_a_job_is_accounted_for() -> None:
    env = LocalEnvironment("accounted")
    letters = env.dead_letters()
    letters.sink(lambda _: None)
    numbers = env.from_batch(range(10_000)).map(lambda n: 1 // (n % 10), parallelism=2, on_error=letters)
    odd = numbers.rebalance().filter(lambda n: n % 2, parallelism=2)
    both = odd.union(numbers.broadcast().map(lambda n: n, parallelism=3))
    both.keyby(lambda n: n).reduce(max, emit="last", parallelism=2).sink(lambda _: None)
    env.submit(autostop=True)
    report = env.jobmanager.jobs[env.env_uuid].report
    assert isinstance(report, JobReport)
    assert report.operator("dead letters").records_in == 1_000
    assert {operator.missing for operator in report.operators} == {0}
    assert report.is_accounted is True
    assert JobReport.from_dict(report.to_dict()).is_accounted is True


def test_records_that_were_in_flight_have_their_places() -> None:
    env = LocalEnvironment("cancelled")

    def cancel(number: int) -> int:
        if number == 5:
            env.jobmanager.jobs[env.env_uuid].cancel(wait=False)
        return number

    env.from_batch(range(10_000)).rebalance().map(cancel, name="cancel").rebalance().map(str, name="text").sink(len)
    with suppress(JobError):
        env.submit(autostop=True)
    report = env.jobmanager.jobs[env.env_uuid].report
    assert isinstance(report, JobReport)
    missing = report.operator("cancel").missing
    assert missing
    assert sum(operator.missing or 0 for operator in report.operators) == report.undelivered
    assert f"{report.undelivered:,} records were in flight and not delivered: {missing:,} before cancel" in str(report)
    assert report.is_accounted is True


class Echo:
    def process(self, record: object) -> object:
        return record


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("map", {}),
        ("filter", {}),
        ("flatmap", {}),
        ("map_async", {"concurrency": 3}),
        ("map_batches", {"max_records": 4}),
    ],
)
def test_records_whose_calls_were_held_back_are_accounted_for(method: str, options: dict[str, int]) -> None:
    env = LocalEnvironment("limited")
    echo = env.register_service("echo", Echo)
    env.limit(calls={"echo": 5})

    def ask(record: Any) -> Any:
        return echo.process(record)

    async def ask_soon(record: Any) -> Any:
        return echo.process(record)

    function = ask_soon if method == "map_async" else ask
    numbers = env.from_batch([[n] for n in range(1, 50)])
    getattr(numbers, method)(function, name="ask", **options).sink(lambda _: None)
    env.submit(autostop=True)
    report = env.jobmanager.jobs[env.env_uuid].report
    assert isinstance(report, JobReport)
    assert report.state == Outcome.STOPPED
    assert report.is_accounted is True, str(report)


def test_records_that_are_lost_are_told() -> None:
    sink = OperatorReport("sink", "sink", 1, 9, 0, 0, 0.0, missing=1)
    report = replace(dirty_report(), operators=(sink,), undelivered=0)
    assert report.is_accounted is False
    assert "records are not accounted for: 1 before sink; this is a bug of SAGE, please report it" in str(report)
    assert replace(report, operators=(replace(sink, missing=None),)).is_accounted is None


def test_a_saved_report_prints_the_same() -> None:
    report = dirty_report()
    saved = JobReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert str(saved) == str(report)
    assert saved.to_dict() == report.to_dict()


def test_fields_of_hosts_are_shown_where_they_are_set() -> None:
    hooks = (HookReport("build", 1, "ok", 0.1), HookReport("build", 2, "ok", 0.2))
    plain = ServiceReport("plain", "stopped", hooks[:1], 1, 0, 0)
    hosted = ServiceReport("hosted", "killed", hooks, 1, 0, 1, None, "process", 4711, -9, ("out of memory",))
    report = JobReport("1", "j", Outcome.LOST, Cleanliness.DIRTY, "its driver died", 1.0, 2.0, 1.0, (), (plain, hosted))
    text = str(JobReport.from_dict(report.to_dict()))
    assert text.startswith('job "j": LOST and DIRTY')
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "hosted killed 1 0 2 process pid 4711 exit -9 build 100.0 ms" in rows
    assert "#2 build 200.0 ms" in rows
    assert 'last output of service "hosted":\n    out of memory' in text
    assert 'service "hosted" (killed): not all of its hooks were run' in text
    assert "pid" not in str(JobReport("1", "j", Outcome.COMPLETED, Cleanliness.CLEAN, "", 1, 2, 1, (), (plain,)))


@pytest.mark.parametrize("wrong", [{}, {"state": "odd"}, {"operators": 3}, {"errors": [{}]}, {"duration_s": "long"}])
def test_what_is_no_report_is_refused(wrong: dict[str, object]) -> None:
    plain = JobReport("1", "j", Outcome.COMPLETED, Cleanliness.CLEAN, "", 1, 2, 1).to_dict()
    with pytest.raises(ValueError, match="not a report of a job"):
        JobReport.from_dict(plain | wrong if wrong else {})


def test_the_file_tells_events_hooks_and_the_report(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    report = dirty_report(path)
    lines = lines_of(path)
    assert lines[0]["type"] == "job"
    assert lines[-1]["type"] == "report"
    assert {line["job"] for line in lines} == {report.id}
    hooks = [(line["hook"], line["outcome"]) for line in lines if line["type"] == "hook"]
    assert hooks == [("build", "ok"), ("drain", "ok"), ("stop", "abandoned"), ("cleanup", "error")]
    after = [line["after"] for line in lines if line["type"] == "event" and line["subject"] == "job"]
    assert after == ["starting", "running", "failing", "stopping_services", "sealed"]
    assert str(read(path).jobs[0].report) == str(report)


def test_the_environment_of_the_process_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_REPORT_FILE", str(tmp_path / "jobs.jsonl"))
    report = dirty_report()
    assert [job.id for job in read(tmp_path / "jobs.jsonl").jobs] == [report.id]


def test_odd_notes_do_not_keep_a_job_from_its_report(tmp_path: Path) -> None:
    def fails(record: int) -> int:
        error = ValueError("no")
        error.__notes__ = 3  # type: ignore[assignment]
        raise error

    env = LocalEnvironment("odd", report_file=tmp_path / "jobs.jsonl")
    env.from_batch([1]).map(fails).sink(lambda n: None)
    with pytest.raises(FunctionError):
        env.submit(autostop=True)
    assert read(tmp_path / "jobs.jsonl").jobs[0].text().startswith('job "odd": FAILED and CLEAN')


@pytest.mark.parametrize("at", ["NaN", "1e400", '"soon"', "null", "[]", "1e300"])
def test_damaged_lines_are_counted(tmp_path: Path, at: str) -> None:
    path = tmp_path / "jobs.jsonl"
    dirty_report(path)
    with path.open("a", encoding="utf-8") as file:
        changed = '"subject": "a", "name": "b", "before": "", "after": ""'
        file.write(f'{{"type": "event", "job": "x", "at": {at}, {changed}}}')
    saved = read(path)
    assert (len(saved.jobs), saved.unread_count) == (1, 1)


def test_a_second_job_is_appended_behind_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    dirty_report(path)
    path.write_bytes(path.read_bytes()[:-20])
    dirty_report(path)
    saved = read(path)
    assert [job.has_ended for job in saved.jobs] == [False, True]
    assert saved.unread_count == 1


def test_kept_services_tell_of_their_end(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    with LocalEnvironment("keeps", report_file=path) as env:
        env.register_service("kept", dict)
        env.from_batch([1]).sink(lambda n: None)
        env.submit(autostop=True, keep_services=True)
    assert [job.events[-2].after for job in read(path).jobs] == ["kept", "stopped"]


def test_a_missing_folder_is_told_before_anything_starts(tmp_path: Path) -> None:
    env = LocalEnvironment("early", report_file=tmp_path / "none" / "jobs.jsonl")
    env.register_service("never", lambda: pytest.fail("it was built"))
    env.from_batch(iter([1])).sink(lambda n: None)
    for _ in range(2):
        with pytest.raises(GraphError, match=r'jobs.jsonl" cannot be written: No such file or directory'):
            env.submit(autostop=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_stops_no_job(capsys: pytest.CaptureFixture[str]) -> None:
    env = LocalEnvironment("full", report_file="/dev/full")
    env.from_batch([1]).sink(lambda n: None)
    try:
        job = env.submit(autostop=True)
    finally:
        ReportFile.problems.clear()
    assert job.report is not None
    assert (job.report.state, job.report.cleanliness) == (Outcome.COMPLETED, Cleanliness.CLEAN)
    assert capsys.readouterr().err == 'warning: report file "/dev/full" is not complete: No space left on device\n'


def test_a_file_that_was_cut_shows_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    dirty_report(path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]) + '{"type": "rep', encoding="utf-8")
    saved = read(path)
    [job] = saved.jobs
    assert saved.unread_count == 1
    assert job.text().startswith('job "dirty": the run DID NOT END')
    assert "abandoned  build" in job.text()
    assert "the run did not end" in timeline.svg((job,))


@pytest.mark.parametrize("count", [1, 100])
def test_the_timeline_has_a_row_for_each(tmp_path: Path, count: int) -> None:
    path = tmp_path / "jobs.jsonl"
    env = LocalEnvironment("rows", report_file=path, stop_timeout_s=600)
    for number in range(count):
        env.register_service(f"s{number}", dict)
    env.from_batch([1]).sink(lambda n: None)
    env.submit(autostop=True)
    saved = read(path)
    assert len(timeline.rows_of(saved.jobs[0])) == count + 2
    drawing = ElementTree.fromstring(timeline.svg(saved.jobs))
    texts = {element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")}
    assert {f"service s{number}" for number in range(count)} < texts


def test_the_page_escapes_what_it_shows(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    dirty_report(path)
    saved = read(path)
    text = timeline.page(saved)
    assert "<script" not in text
    assert "service &lt;script&gt;" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    ElementTree.fromstring(timeline.svg(saved.jobs))
    assert 'class="cross"' in text
