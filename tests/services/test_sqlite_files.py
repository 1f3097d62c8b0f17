"""What can be wrong with a file, and with a disk, for every service that keeps its data in SQLite."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from services.kept import Words, at_once, killed_after, left_clean, notes_of, output_of, program

from sage import LocalEnvironment
from sage.errors import JobError, ServiceError
from sage.rag.keywords import KeywordIndex
from sage.services._shared.sqlite_file import OLD_MARK, SqliteFile
from sage.services.memory.memory import Memory
from sage.services.stores.graph import GraphStore
from sage.services.stores.key_value import SqliteKeyValue
from sage.services.vectors.sqlite import SqliteStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KINDS = ["key_value", "graph", "memory", "keywords"]

# How each is made, written to, and asked how much it has, also by programs of their own.
MADE = """
from sage.errors import ServiceError
from sage.rag.keywords import KeywordIndex
from sage.services.stores.graph import GraphStore
from sage.services.stores.key_value import SqliteKeyValue
from sage.services.memory.memory import Memory
from services.kept import Words

def made(kind, path):
    makers = {"key_value": SqliteKeyValue, "graph": GraphStore, "keywords": KeywordIndex}
    return Memory(path, Words()) if kind == "memory" else makers[kind](path)

def write(store, name):
    if isinstance(store, SqliteKeyValue):
        store.put(name, "x" * 500)
    elif isinstance(store, GraphStore):
        store.put_node(name, {"x": "x" * 500})
    elif isinstance(store, KeywordIndex):
        store.upsert([name], ["x" * 500])
    else:
        store.remember(name + " x" * 500)

def count(store):
    found = store.count()
    return found[0] if isinstance(found, tuple) else found
"""


def made(kind: str, path: Path) -> Any:
    makers: dict[str, Callable[[Path], Any]] = {
        "key_value": SqliteKeyValue,
        "graph": GraphStore,
        "memory": lambda place: Memory(place, Words()),
        "keywords": KeywordIndex,
        "vectors": SqliteStore,
    }
    return makers[kind](path)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def problem(kind: str, path: Path) -> ServiceError:
    """Return what setup raises, and see that it leaves nothing."""
    with left_clean(), pytest.raises(ServiceError) as caught:
        made(kind, path).setup()
    return caught.value


def test_a_file_that_is_no_database(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.db"
    path.write_text("A letter.\n" * 1000)
    error = problem(kind, path)
    assert f'file "{path}" is not an SQLite database' in str(error)
    assert "Name another file" in notes_of(error)
    assert path.read_text() == "A letter.\n" * 1000
    assert os.listdir(tmp_path) == ["file.db"]


def test_a_damaged_database(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.db"
    store = made(kind, path)
    store.setup()
    store.cleanup()
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + b"\xff" * (len(whole) - 100))
    assert "is damaged" in str(problem(kind, path))


MEMORY_HINTS = {"keywords": "Leave it out", "vectors": "NumpyStore", "graph": "TemporaryDirectory"}


@pytest.mark.parametrize("place", [":memory:", Path(":memory:"), b":memory:", "", None, 5])
@pytest.mark.parametrize("kind", [*KINDS, "vectors"])
def test_a_path_that_names_no_file(kind: str, place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if kind == "keywords" and place is None:
        return  # it keeps everything in memory then
    with pytest.raises(
        (TypeError, ValueError), match=r'path is (":memory:", which|"", which|None, not|5, not)'
    ) as caught:
        made(kind, place)
    if place and not isinstance(place, int):
        assert MEMORY_HINTS.get(kind, "TemporaryDirectory") in notes_of(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_path_may_be_of_bytes(kind: str, tmp_path: Path) -> None:
    with left_clean():
        store = made(kind, os.fsencode(tmp_path / "file.db"))  # type: ignore[arg-type]
        store.setup()
        assert f"{tmp_path}/file.db" in str(store.describe())
        assert os.path.exists(tmp_path / "file.db")
        store.cleanup()


def test_what_is_wrong_with_a_file_of_vectors(tmp_path: Path) -> None:
    """The same is told of it as of the other files."""
    (tmp_path / "junk").write_text("A letter.\n" * 1000)
    with closing(sqlite3.connect(tmp_path / "other")) as connection, connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    for name, text, note in [
        ("junk", "is not an SQLite database", "Name another file"),
        ("other", "is a database of another program", "Name another file"),
        (".", "cannot be opened", "folder must be there"),
        ("nowhere/file.db", "cannot be opened", "folder must be there"),
    ]:
        error = problem("vectors", tmp_path / name)
        assert f'file "{(tmp_path / name).absolute()}" {text}' in str(error)
        assert note in notes_of(error)
    assert sorted(os.listdir(tmp_path)) == ["junk", "other"]


def test_a_file_of_vectors_with_the_mark_of_older_ones(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "file.db")
    store.setup()
    store.add(["a"], [[1.0, 0.0]])
    store.cleanup()
    connection = sqlite3.connect(tmp_path / "file.db")
    connection.execute("DROP TABLE sage_kinds")
    connection.execute(f"PRAGMA application_id = {OLD_MARK}")
    connection.close()
    store.setup()
    assert store.ids() == ["a"]
    store.cleanup()


@pytest.mark.parametrize("place", ["nowhere/file.db", "."])
def test_a_place_where_no_file_can_be(kind: str, place: str, tmp_path: Path) -> None:
    error = problem(kind, tmp_path / place)
    assert "cannot be opened" in str(error)
    assert "folder must be there" in notes_of(error)


def test_a_newer_version(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.db"
    store = made(kind, path)
    store.setup()
    store.cleanup()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE sage_kinds SET version = 99")
    connection.close()
    error = problem(kind, path)
    assert f'holds version 99 of "{kind}", newer than 1' in str(error)
    assert "newer SAGE" in notes_of(error)


def test_in_a_job_the_error_is_that_of_submit(kind: str, tmp_path: Path) -> None:
    with left_clean(), LocalEnvironment("broken") as env:
        env.register_service("store", made, kind, tmp_path / "nowhere" / "file.db")
        env.from_batch([1]).print()
        with pytest.raises(JobError) as caught:
            env.submit(autostop=True)
    assert "cannot be opened" in str(caught.value.__cause__)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user can look into, and only its owner write to."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


WITHOUT_RIGHTS = (
    MADE
    + """
import os, sys
kind, path = sys.argv[1:]
store = made(kind, path)
import networkx, numpy  # while this user may still read them
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    store.setup()
except ServiceError as error:
    print(error)
    print(*error.__notes__)
"""
)


def test_a_folder_without_the_right_to_write(kind: str, open_folder: Path, tmp_path: Path) -> None:
    if os.getuid():
        open_folder.chmod(0o555)
    path = str(open_folder / "file.db")
    said, note = output_of(WITHOUT_RIGHTS, kind, path, folder=tmp_path)
    assert f'file "{path}" cannot be opened: ' in said
    assert "be allowed to write" in note


def test_a_file_without_the_right_to_write(kind: str, open_folder: Path, tmp_path: Path) -> None:
    path = open_folder / "file.db"
    store = made(kind, path)
    store.setup()
    store.cleanup()
    path.chmod(0o444)
    said, note = output_of(WITHOUT_RIGHTS, kind, str(path), folder=tmp_path)
    assert f'file "{path}" cannot be written: no permission' in said
    assert "be allowed to write it" in note


def test_a_full_disk(kind: str, tmp_path: Path) -> None:
    """What was written before stays readable, the write that failed is not there in part, and it goes on with room."""
    text = (
        MADE
        + """
import resource, sys
kind, path = sys.argv[1:]
store = made(kind, path)
store.setup()
write(store, "first")
no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, no_limit[1]))
done = 1
try:
    for done in range(1, 10_000):
        write(store, str(done))
except ServiceError as error:
    print(error)
    print(*error.__notes__)
print(count(store) - done)
try:
    write(store, "again")
except ServiceError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
write(store, "last")
print(count(store) - done)
store.cleanup()
store = made(kind, path)
store.setup()
print(count(store) - done)
store.cleanup()
"""
    )
    path = tmp_path / "file.db"
    said, note, before, again, after, reopened = output_of(text, kind, str(path), folder=tmp_path)
    assert f'file "{path}" cannot be read or written: disk I/O error' in said
    assert said == again
    assert "Is the disk full" in note
    assert (before, after, reopened) == ("0", "1", "1")
    assert os.listdir(tmp_path) == ["file.db"]


def test_what_a_killed_program_has_left_is_told_once(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = (
        MADE
        + """
import itertools, sys
kind, path = sys.argv[1:]
store = made(kind, path)
store.setup()
for number in itertools.count():
    write(store, str(number))
    print(number, flush=True)
"""
    )
    path = tmp_path / "file.db"
    said = killed_after(20, text, kind, str(path), folder=tmp_path)
    for _ in range(2):
        store = made(kind, path)
        with left_clean():
            store.setup()
            found = store.count()
            assert (found[0] if kind == "graph" else found) in (len(said), len(said) + 1)
            store.cleanup()
    assert [record.getMessage() for record in caplog.records if record.name.startswith("sage")] == [
        f"file was not closed: what was being written then may be missing path={path}"
    ]


def test_what_other_services_and_programs_have_open_was_not_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = (
        MADE
        + """
import sys
store = made("memory", sys.argv[1])
store.setup()
write(store, "first")
print("ready", flush=True)
sys.stdin.readline()
store.cleanup()
"""
    )
    path = tmp_path / "file.db"
    read, end = os.pipe()
    with program(text, str(path), folder=tmp_path, stdin=read) as child:
        os.close(read)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        stores = [made(kind, path) for kind in ("key_value", "keywords", "memory")]
        for store in stores:
            store.setup()
        os.write(end, b"\n")
        os.close(end)
        child.communicate(timeout=30)
        # The program has closed the file, and these still have it open.
        another = made("key_value", path)
        another.setup()
        for store in [*stores, another]:
            store.cleanup()
    assert caplog.messages == []
    assert os.listdir(tmp_path) == ["file.db"]


def test_several_services_on_one_file(tmp_path: Path) -> None:
    path = tmp_path / "file.db"
    with left_clean(), LocalEnvironment("together") as env:
        memory = env.register_service("memory", Memory, path, Words())
        keys = env.register_service("keys", SqliteKeyValue, path)
        counts: list[Any] = []
        env.from_batch(["a", "b"]).map(memory.remember).map(keys.increment).map(
            lambda _: (memory.count(), keys.count())
        ).sink(counts.append)
        env.submit(autostop=True)
    assert counts == [(1, 1), (2, 2)]
    assert os.listdir(tmp_path) == ["file.db"]


@pytest.mark.parametrize("kind", ["key_value", "memory"])
def test_programs_that_open_a_new_file_at_the_same_time(kind: str, tmp_path: Path) -> None:
    text = (
        MADE
        + """
import sys
kind, path, number = sys.argv[1:]
store = made(kind, path)
print("ready", flush=True)
sys.stdin.readline()
store.setup()
for turn in range(10):
    write(store, f"{number} {turn}")
store.cleanup()
"""
    )
    path = tmp_path / "file.db"
    read, start = os.pipe()
    children = [program(text, kind, str(path), str(number), folder=tmp_path, stdin=read) for number in range(3)]
    os.close(read)
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    os.write(start, b"\n" * len(children))
    os.close(start)
    for child in children:
        with child:
            _, errors = child.communicate(timeout=30)
        assert child.returncode == 0, errors
    store = made(kind, path)
    store.setup()
    assert store.count() == 30
    store.cleanup()


def test_connections_are_not_kept_for_threads_that_ended(tmp_path: Path) -> None:
    file = SqliteFile(tmp_path / "file.db", "test", 1, "CREATE TABLE IF NOT EXISTS t (x)")
    with left_clean():
        file.open()
        before = len(os.listdir("/proc/self/fd"))

        def hold(_: int) -> None:
            with file.reading() as connection:
                connection.execute("SELECT * FROM t").fetchall()

        for _ in range(5):
            at_once(20, hold)
        # SQLite closes a file late while another connection has a lock on it, but it opens no second one instead.
        assert len(os.listdir("/proc/self/fd")) <= before + 3 * 20
        file.close()


def test_a_call_that_runs_when_the_file_is_closed_ends_by_itself(tmp_path: Path) -> None:
    file = SqliteFile(tmp_path / "file.db", "test", 1, "CREATE TABLE IF NOT EXISTS t (x)")
    with left_clean():
        file.open()
        with file.writing() as connection:
            file.close()
            connection.execute("INSERT INTO t VALUES (1)")
        assert os.listdir(tmp_path) == ["file.db"]
        file.open()
        with file.reading() as connection:
            assert connection.execute("SELECT count(*) FROM t").fetchone() == (1,)
        with pytest.raises(KeyError), file.writing() as connection:  # noqa: PT012
            connection.execute("INSERT INTO t VALUES (2)")
            raise KeyError
        with file.reading() as connection:
            assert connection.execute("SELECT count(*) FROM t").fetchone() == (1,)
        file.close()
