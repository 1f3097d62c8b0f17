"""Many services and tasks in one job, and a job inside of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.recording_services import report_of

from sage import BaseService, FunctionError, LocalEnvironment, ProcessFunction, ServiceOptions
from sage.testing import assert_clean

SERVICES = 100
TASKS = 500


class Counted(BaseService):
    """Writes a line when it is cleaned up."""

    def __init__(self, marks: Path) -> None:
        self.marks = marks

    def process(self, record: Any) -> Any:
        return record

    def cleanup(self) -> None:
        with self.marks.open("a", encoding="utf-8") as file:
            file.write(f"{self.name}\n")


def test_a_hundred_services_and_five_hundred_tasks(tmp_path: Path) -> None:
    """Every service is cleaned up once, in levels, and no thread is left."""
    env = LocalEnvironment("many")
    marks = tmp_path / "marks"
    handles = [
        env.register_service(
            f"service {number}",
            Counted,
            marks,
            options=ServiceOptions(depends_on=[f"service {number - 10}"] if number >= 10 else []),
        )
        for number in range(SERVICES)
    ]
    arrived: list[int] = []
    stream = env.from_batch(range(TASKS)).rebalance()
    stream.map(handles[-1].process, parallelism=TASKS - 2).sink(arrived.append)
    with assert_clean(ignore=["temporary *", "shared memory *"]):
        env.submit(autostop=True)
    assert sorted(arrived) == list(range(TASKS))
    assert len(report_of(env).tasks) >= TASKS - 2
    ended = marks.read_text().splitlines()
    assert sorted(ended) == sorted(f"service {number}" for number in range(SERVICES))
    places = {name: place for place, name in enumerate(ended)}
    assert all(places[f"service {number}"] < places[f"service {number - 10}"] for number in range(10, SERVICES))


@pytest.mark.parametrize("host", ["inline", "process"])
def test_a_job_inside_of_a_task(host: str, tmp_path: Path) -> None:
    """It has a supervisor and services of its own, and is over before the record goes on."""
    options = ServiceOptions(host="process" if host == "process" else "inline")

    def nested(record: int) -> list[str]:
        env = LocalEnvironment(f"inner {record}")
        inner = env.register_service("inner", Counted, tmp_path / "marks", options=options)
        env.from_batch([record]).map(inner.process).sink(lambda _: None)
        env.submit(autostop=True)
        return (tmp_path / "marks").read_text().splitlines()

    env = LocalEnvironment("outer")
    env.register_service("outer", Counted, tmp_path / "marks", options=options)
    seen: list[list[str]] = []
    env.from_batch([1, 2]).map(nested).sink(seen.append)
    env.submit(autostop=True)
    assert seen == [["inner"], ["inner"] * 2]
    assert (tmp_path / "marks").read_text().splitlines() == ["inner", "inner", "outer"]


@pytest.mark.parametrize("host", ["inline", "process"])
def test_finish_raises(host: str, tmp_path: Path) -> None:
    """The function is closed all the same, and the service cleaned up."""
    closed: list[str] = []

    class Ending(ProcessFunction):
        def execute(self, data: int) -> None:
            self.collect(data)

        def finish(self) -> None:
            raise OSError("nothing more to say")

        def close(self) -> None:
            closed.append("closed")

    env = LocalEnvironment("ending")
    options = ServiceOptions(host="process" if host == "process" else "inline")
    env.register_service("counted", Counted, tmp_path / "marks", options=options)
    arrived: list[int] = []
    env.from_batch([1, 2]).process(Ending).sink(arrived.append)
    with pytest.raises(FunctionError, match="nothing more to say"):
        env.submit(autostop=True)
    assert (arrived, closed) == ([1, 2], ["closed"])
    assert (tmp_path / "marks").read_text() == "counted\n"
    assert report_of(env).state == "failed"
