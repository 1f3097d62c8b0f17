"""The folder of a durable job: the same program goes on, and everything that is wrong with it is named."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from sage import (
    CheckpointError,
    Durable,
    GraphError,
    LocalEnvironment,
    MapFunction,
    RemoteEnvironment,
    TransactionalSink,
    UnsupportedPlanError,
)
from sage._runtime.checkpoint_store import Checkpoint, CheckpointStore
from sage.connectors import JsonLinesFiles
from sage.testing import StepBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from sage import JobReport
    from sage._runtime.backend import Backend


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


def results(folder: Path) -> list[Any]:
    paths = sorted((folder / "out").glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text("utf-8").splitlines()]


def run(folder: Path, records: Any = (1, 2, 3), resume: Any = "auto", name: str = "in", **options: Any) -> JobReport:
    env = LocalEnvironment("job", durable=folder / "state", **options)
    env.from_batch(records, name=name).map(lambda record: record * 2).sink(JsonLinesFiles(folder / "out"), name="out")
    return env.submit(autostop=True, resume=resume).report


def test_a_number_that_comes_a_second_time_is_not_settled(tmp_path: Path) -> None:
    with closing(CheckpointStore(str(tmp_path))) as store:
        store.write(Checkpoint(1, {}, ()), 3)
        assert not store.is_settled(1)
        store.settle()
        assert store.is_settled(1)
        assert not store.is_settled(0)
        store.write(Checkpoint(1, {}, ()), 3)  # after a damaged one was left out
        assert not store.is_settled(1)
        store.settle()
        store.clear()
        assert not store.is_settled(1)


def test_a_list_has_nothing_left_and_a_longer_one_gives_the_new_records(
    tmp_path: Path, backend: Callable[[], Backend]
) -> None:
    assert run(tmp_path, backend=backend).notes == ()
    assert results(tmp_path) == [2, 4, 6]
    report = run(tmp_path, backend=backend)
    assert report.notes == (
        "resumed from checkpoint 1 (3 records done)",
        "nothing new: the sources have no further records",
    )
    assert "resumed from checkpoint 1 (3 records done)" in str(report)
    assert run(tmp_path, [1, 2, 3, 4], backend=backend).notes == ("resumed from checkpoint 2 (3 records done)",)
    assert sorted(results(tmp_path)) == [2, 4, 6, 8]


def test_a_generator_is_read_again_to_where_it_was(tmp_path: Path) -> None:
    def rows(count: int) -> Iterator[int]:
        yield from range(count)

    run(tmp_path, rows(3))
    run(tmp_path, rows(5))
    assert sorted(results(tmp_path)) == [0, 2, 4, 6, 8]
    with pytest.raises(Exception, match="it gave 2 records, and had given 5 before the restart"):
        run(tmp_path, rows(2))


def test_resume_says_how_it_begins(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='state" has no checkpoint to resume from'):
        run(tmp_path, resume="must")
    run(tmp_path)
    assert run(tmp_path, resume="must").notes[0].startswith("resumed from checkpoint 1")
    assert run(tmp_path, resume="never").notes == ()
    assert results(tmp_path) == [2, 4, 6, 2, 4, 6]
    with pytest.raises(GraphError, match="submit: resume is 'maybe'"):
        run(tmp_path, resume="maybe")
    env = LocalEnvironment("plain")
    env.from_batch([1]).sink(print)
    with pytest.raises(GraphError, match="environment \"plain\" is not durable, and resume is 'must'"):
        env.submit(resume="must")


def test_fresh_on_the_command_line_begins_anew(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from sage import LocalEnvironment\n"
        "env = LocalEnvironment('job', durable='state')\n"
        "env.from_batch([1, 2]).sink(lambda record: print('got', record))\n"
        "env.run()\n",
        encoding="utf-8",
    )
    outputs = []
    for options in ([], [], ["--fresh"]):
        command = [sys.executable, "-m", "sage", "run", *options, str(program)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stderr
        outputs.append((done.stdout.count("got"), "resumed from checkpoint 1 (2 records done)" in done.stderr))
    assert outputs == [(2, False), (0, True), (2, False)]


def test_a_changed_graph_lists_the_states_without_a_place(tmp_path: Path) -> None:
    run(tmp_path)
    env = LocalEnvironment("job", durable=tmp_path / "state")
    env.from_batch([1], name="input", parallelism=2).sink(JsonLinesFiles(tmp_path / "out"), name="out", parallelism=2)
    with pytest.raises(CheckpointError, match="the graph does not fit checkpoint 1") as caught:
        env.submit(autostop=True)
    assert '- source "in" is not there any more' in str(caught.value)
    assert '- "out" had parallelism 1 and has 2' in str(caught.value)
    assert "Operators are found by name" in notes(caught.value)
    assert "submit(drop_state=['in', 'out']) goes on without these states" in notes(caught.value)
    assert results(tmp_path) == [2, 4, 6]


def test_states_without_a_place_can_be_dropped(tmp_path: Path) -> None:
    run(tmp_path)

    def renamed(drop_state: Sequence[str] = ()) -> JobReport:
        env = LocalEnvironment("job", durable=tmp_path / "state")
        env.from_batch([5, 6], name="input").sink(JsonLinesFiles(tmp_path / "out"), name="out")
        return env.run(drop_state=drop_state)

    with pytest.raises(CheckpointError, match='- source "in" is not there any more'):
        renamed()
    assert renamed(["in"]).notes == ("resumed from checkpoint 1 (3 records done)", 'the state of "in" was dropped')
    assert sorted(results(tmp_path)) == [2, 4, 5, 6, 6]
    notes_again = renamed(["in"]).notes  # the same command again, as after a kill
    assert notes_again[1:] == ('"in" had no state to drop', "nothing new: the sources have no further records")
    assert sorted(results(tmp_path)) == [2, 4, 5, 6, 6]


def test_a_dropped_source_begins_anew(tmp_path: Path) -> None:
    run(tmp_path)
    env = LocalEnvironment("job", durable=tmp_path / "state")
    env.from_batch([1, 2, 3], name="in").map(lambda record: record * 2).sink(
        JsonLinesFiles(tmp_path / "out"), name="out"
    )
    env.submit(autostop=True, drop_state=["in"])
    assert results(tmp_path) == [2, 4, 6, 2, 4, 6]


def test_drop_state_is_checked_before_anything_starts(tmp_path: Path) -> None:
    env = LocalEnvironment("job", durable=tmp_path / "state")
    env.from_batch([1]).sink(print)
    with pytest.raises(GraphError, match="submit: drop_state is 'in'") as caught:
        env.submit(drop_state="in")
    assert notes(caught.value) == 'Give a list with names of operators: drop_state=["totals"].'
    plain = LocalEnvironment("plain")
    plain.from_batch([1]).sink(print)
    with pytest.raises(GraphError, match=r"environment \"plain\" is not durable, and drop_state is \['in'\]"):
        plain.submit(drop_state=["in"])
    assert not (tmp_path / "state").exists()


def test_a_graph_may_change_where_there_is_no_state(tmp_path: Path) -> None:
    run(tmp_path)
    env = LocalEnvironment("job", durable=tmp_path / "state")
    more = env.from_batch([7], name="more")
    env.from_batch([1, 2, 3, 4], name="in").filter(bool).union(more).sink(JsonLinesFiles(tmp_path / "out"), name="out")
    env.run()
    assert sorted(results(tmp_path)) == [2, 4, 4, 6, 7]


def damage(folder: Path, number: int) -> None:
    with closing(sqlite3.connect(folder / "state" / "checkpoints.sqlite")) as file, file:
        file.execute("UPDATE parts SET body = CAST(body || x'00' AS BLOB) WHERE number = ?", (number,))
    file.close()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    run(tmp_path)
    run(tmp_path, [1, 2, 3, 4])
    run(tmp_path, [1, 2, 3, 4, 5])
    assert sorted(results(tmp_path)) == [2, 4, 6, 8, 10]
    damage(tmp_path, 2)
    damage(tmp_path, 3)
    report = run(tmp_path, [1, 2, 3, 4, 5, 6])
    assert report.notes == (
        "checkpoint 3 is damaged and was left out",
        "checkpoint 2 is damaged and was left out",
        "resumed from checkpoint 1 (3 records done)",
    )
    assert sorted(results(tmp_path)) == [2, 4, 6, 8, 10, 12]  # the files of checkpoints 2 and 3 were taken back
    damage(tmp_path, 1)
    damage(tmp_path, 2)
    with pytest.raises(CheckpointError, match="are damaged: 2, 1") as caught:
        run(tmp_path)
    assert "--fresh" in notes(caught.value)


def test_a_file_that_is_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "checkpoints.sqlite").write_text("no database " * 100, encoding="utf-8")
    with pytest.raises(CheckpointError, match='state" cannot be opened: DatabaseError: file is not a database'):
        run(tmp_path)
    run(tmp_path.joinpath("other"))
    with closing(sqlite3.connect(tmp_path / "other" / "state" / "checkpoints.sqlite")) as file, file:
        file.execute("UPDATE about SET value = 99 WHERE name = 'version'")
    file.close()
    with pytest.raises(CheckpointError, match="have version 99; this SAGE reads 4") as caught:
        run(tmp_path.joinpath("other"), resume="never")
    assert notes(caught.value) == "Use the SAGE that wrote them, or delete the folder to begin anew."


def test_a_state_that_cannot_be_unpickled_names_its_operator(tmp_path: Path) -> None:
    from sage._runtime.checkpoints import Row

    store = CheckpointStore(str(tmp_path / "state"))
    store.write(Checkpoint(1, {"in": ("source", 1)}, (Row("in", 0, 3, b"cno_such_module\nThing\n."),)), 3)
    store.close()
    with pytest.raises(CheckpointError, match='state of operator "in" cannot be unpickled: ModuleNotFoundError'):
        run(tmp_path)


def test_the_folder_is_private_and_a_bad_one_is_refused_before_anything_starts(tmp_path: Path) -> None:
    run(tmp_path)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "state" / "checkpoints.sqlite").stat().st_mode) == 0o600
    open_to_all = tmp_path / "open"
    (open_to_all / "state").mkdir(parents=True)
    (open_to_all / "state").chmod(0o777)
    with pytest.raises(CheckpointError, match='state" can be written by other users') as caught:
        run(open_to_all)
    assert "chmod 700" in notes(caught.value)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "state").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match='state" cannot be used for checkpoints: NotADirectoryError'):
        run(occupied)
    assert results(occupied) == results(open_to_all) == []


def test_a_second_program_is_told_who_holds_the_folder(tmp_path: Path) -> None:

    first = CheckpointStore(str(tmp_path / "state"))
    with pytest.raises(CheckpointError, match=f"is in use by process {os.getpid()}"):
        run(tmp_path)
    first.close()
    run(tmp_path)


def test_a_program_that_was_taken_for_dead_cannot_write(tmp_path: Path) -> None:

    first = CheckpointStore(str(tmp_path / "state"))
    first._let_go()  # as on a file system that forgets locks
    second = CheckpointStore(str(tmp_path / "state"))
    second.write(Checkpoint(1, {}, ()), 3)
    with pytest.raises(CheckpointError, match="were taken over by another program"):
        first.write(Checkpoint(2, {}, ()), 3)
    second.close()
    first.close()


def test_a_checkpoint_that_cannot_be_written_fails_the_job(tmp_path: Path) -> None:
    env = LocalEnvironment("job", durable=tmp_path / "state")

    def spoil(record: int) -> int:
        with closing(sqlite3.connect(tmp_path / "state" / "checkpoints.sqlite")) as file, file:
            file.execute("DROP TABLE checkpoints")
        file.close()
        return record

    env.from_batch([1]).map(spoil).sink(JsonLinesFiles(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="cannot be written: OperationalError: no such table: checkpoints"):
        env.submit(autostop=True)
    assert results(tmp_path) == []


def test_a_failure_keeps_what_was_committed_before(tmp_path: Path) -> None:
    run(tmp_path, [1, 2])
    with pytest.raises(Exception, match="unsupported operand"):
        run(tmp_path, [1, 2, None])
    assert results(tmp_path) == [2, 4]
    run(tmp_path, [1, 2, 3])
    assert sorted(results(tmp_path)) == [2, 4, 6]


def test_only_as_many_checkpoints_are_kept(tmp_path: Path) -> None:
    seen: list[int] = []
    for count in range(1, 6):
        env = LocalEnvironment("job", durable=Durable(tmp_path, keep=2))
        env.from_batch(range(count), name="in").sink(seen.append)
        env.run()
    with closing(sqlite3.connect(tmp_path / "checkpoints.sqlite")) as file, file:
        assert file.execute("SELECT number FROM checkpoints").fetchall() == [(4,), (5,)]
        assert file.execute("SELECT DISTINCT number FROM parts").fetchall() == [(4,), (5,)]
    file.close()


class CommitsWhatIsWritten(TransactionalSink[int]):
    """Notes for each commit whether the checkpoint of the token was on the disk before."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "checkpoints.sqlite"
        self.commits: list[tuple[int, bool]] = []

    def write(self, batch: Sequence[int]) -> None:
        pass

    def prepare(self, number: int) -> int:
        return number

    def commit(self, token: int) -> None:
        with closing(sqlite3.connect(self.file)) as file, file:
            found = file.execute("SELECT 1 FROM checkpoints WHERE number = ?", (token,)).fetchall()
        file.close()
        self.commits.append((token, bool(found)))


def test_a_sink_commits_after_the_checkpoint_is_on_the_disk(tmp_path: Path) -> None:
    sink = CommitsWhatIsWritten(tmp_path)
    durable = Durable(tmp_path, interval_s=0.01, keep=1000)
    env = LocalEnvironment("job", backend=lambda: StepBackend(7), durable=durable)
    env.from_batch(range(2000)).map(lambda record: record, parallelism=2).sink(sink)
    env.run()
    assert len(sink.commits) > 2
    assert sink.commits == [(number + 1, True) for number in range(len(sink.commits))]


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(TypeError, match="durable: folder is 7"):
        LocalEnvironment("job", durable=7)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="durable: interval_s is 0"):
        Durable("state", interval_s=0)
    with pytest.raises(GraphError, match="durable: keep is 0"):
        Durable("state", keep=0)


def test_a_cluster_is_refused_before_anything_starts() -> None:
    with pytest.raises(UnsupportedPlanError, match='environment "far" is durable, which jobs on a cluster cannot be'):
        RemoteEnvironment("far", durable="state")


class Overlapping(MapFunction[int, int]):
    async def execute(self, data: int) -> int:
        return data

    def snapshot(self) -> int:
        return 1

    def restore(self, state: int) -> None:
        pass


def test_operators_that_are_not_covered_are_all_named(tmp_path: Path) -> None:
    env = LocalEnvironment("job", durable=tmp_path / "state")
    env.serve("answers", lambda requests: requests.map(str))
    env.from_batch([1]).map_async(Overlapping, concurrency=2, name="asks").sink(print)
    with pytest.raises(GraphError, match="3 problems") as caught:
        env.submit()
    assert "is part of a served pipeline, which a durable job does not cover yet" in str(caught.value)
    assert 'operator "asks" is a map_async whose function has snapshot() and restore()' in str(caught.value)
    assert not (tmp_path / "state").exists()


def test_the_promise_of_each_sink_is_named(tmp_path: Path) -> None:
    env = LocalEnvironment("job", durable=tmp_path / "state")
    rows = env.from_batch([1], name="rows")
    rows.sink(JsonLinesFiles(tmp_path / "out"), name="files")
    seen: list[int] = []
    rows.sink(seen.append, name="memory")
    rows.sink(print, name="screen")
    env.from_source(lambda: None, name="bus").sink(print, name="live")
    text = env.explain()
    for line in (
        'over a restart, "files" gets each record exactly once',
        'over a restart, "memory" gets nothing of earlier runs: its records are in memory',
        'over a restart, "screen" gets each record at least once',
        'over a restart, "live" gets each record at least once; records of "bus" at most once, or again: a source '
        "without a position",
    ):
        assert f"  {line}\n" in f"{text}\n"
    assert "sources are read from their beginning" not in text
