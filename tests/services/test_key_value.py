"""Key-value stores: one suite on every implementation, with real files and a real server."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from services.kept import (
    PASSWORD,
    REDIS_SERVER,
    at_once,
    killed_after,
    left_clean,
    needs_redis,
    notes_of,
    redis_url,
    register_redis,
    wait_until,
)

from sage import LocalEnvironment, ServiceOptions
from sage.errors import JobError, ServiceError, ServiceTimeoutError, ServiceUnavailableError
from sage.services._shared.validation import TTL_MAX_S
from sage.services.stores.key_value import COUNTER_MAX, KeyValueStore, SqliteKeyValue
from sage.services.stores.redis import RedisKeyValue
from sage.testing import ManualClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

KINDS = ["sqlite", pytest.param("redis", marks=needs_redis)]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with redis_url("--requirepass", PASSWORD) as url:
        yield url


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], KeyValueStore]:
    """Return what makes stores that share their data."""
    if request.param == "sqlite":
        return lambda: SqliteKeyValue(tmp_path / "keys.db")
    url: str = request.getfixturevalue("server")
    prefix = f"{uuid.uuid4()}:*[?"  # with what patterns of the server give a meaning to
    return lambda: RedisKeyValue(url, password=PASSWORD, prefix=prefix)


@contextmanager
def opened(store: KeyValueStore) -> Iterator[KeyValueStore]:
    """Use a store without a job, and see that it leaves nothing."""
    with left_clean():
        store.setup()
        try:
            yield store
        finally:
            store.cleanup()


@pytest.fixture
def store(make: Callable[[], KeyValueStore]) -> Iterator[KeyValueStore]:
    with opened(make()) as open_store:
        yield open_store


class TestContract:
    VALUES: tuple[Any, ...] = (
        None,
        True,
        0,
        -1.5,
        2**70,
        "",
        "é\ud800\0",
        [],
        {},
        {"a": [1, {"b": None}]},
        "x" * 100_000,
    )

    @pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
    def test_what_was_put_is_got(self, store: KeyValueStore, value: Any) -> None:
        store.put("key", value)
        found = store.get("key", "default")
        assert found == value
        assert type(found) is type(value)

    @pytest.mark.parametrize("key", ["", " ", "a b", "é", "a\0b", "*", "\U0010ffff", "k" * 1000])
    def test_keys_are_any_strings(self, store: KeyValueStore, key: str) -> None:
        store.put(key, 1)
        assert store.keys() == [key]
        assert store.keys(key) == [key]
        assert store.get(key) == 1
        assert store.delete(key)
        assert store.keys() == []

    def test_a_key_that_is_not_there(self, store: KeyValueStore) -> None:
        assert store.get("a") is None
        assert store.get("a", 7) == 7
        assert not store.delete("a")
        assert store.get_many(["a"]) == {}
        assert store.get_many([]) == {}
        assert store.count() == 0

    def test_a_later_value_takes_the_place_of_an_earlier_one(self, store: KeyValueStore) -> None:
        store.put("a", 1)
        store.put("a", 2)
        assert store.get("a") == 2
        assert store.count() == 1
        assert store.delete("a")
        assert store.get("a") is None
        assert store.count() == 0

    def test_many_at_once(self, store: KeyValueStore) -> None:
        store.put_many({f"key-{number:04}": number for number in range(2_000)})
        store.put_many({})
        assert store.count() == 2_000
        assert store.get_many(["key-0001", "none", "key-1999"]) == {"key-0001": 1, "key-1999": 1999}

    def test_keys_by_their_beginning(self, store: KeyValueStore) -> None:
        names = ["b", "a", "ab", "a*", "a\ud7ff", "a\ue000", "a\U0010ffff", "a\U0010ffffb", "B", ""]
        store.put_many(dict.fromkeys(names, 0))
        for prefix in ["", "a", "ab", "a*", "a\ud7ff", "a\U0010ffff", "c", "*", "B"]:
            assert store.keys(prefix) == sorted(name for name in names if name.startswith(prefix))

    def test_a_time_to_live_ends(self, store: KeyValueStore) -> None:
        store.put("short", 1, ttl_s=0.05)
        store.put_many({"also": 1, "short too": 1}, ttl_s=0.05)
        store.put("long", 2, ttl_s=1000)
        store.put("longest", 2, ttl_s=TTL_MAX_S)
        wait_until(lambda: store.keys() == ["long", "longest"])
        assert store.get("short") is None
        assert not store.delete("short")
        assert store.get_many(["short", "long"]) == {"long": 2}
        assert store.count() == 2
        store.expire()
        assert store.expire() == 0
        assert store.get("long") == 2

    def test_a_later_put_ends_the_time_to_live(self, store: KeyValueStore) -> None:
        store.put("a", 1, ttl_s=0.2)
        store.put("a", 2)
        store.put("mark", 0, ttl_s=0.3)
        wait_until(lambda: store.get("mark") is None)
        assert store.get("a") == 2

    def test_counting(self, store: KeyValueStore) -> None:
        assert store.increment("n") == 1
        assert store.increment("n", 10) == 11
        assert store.increment("n", -12) == -1
        assert store.get("n") == -1
        store.put("n", COUNTER_MAX - 1)
        assert store.increment("n") == COUNTER_MAX
        with pytest.raises(OverflowError, match=r"increment\('n'\) by 1 does not fit into 64 bits"):
            store.increment("n")
        assert store.get("n") == COUNTER_MAX

    @pytest.mark.parametrize("value", ["5", 5.5, True, None, [5]])
    def test_what_cannot_be_counted(self, store: KeyValueStore, value: Any) -> None:
        store.put("n", value)
        with pytest.raises(TypeError, match=r"increment\('n'\): its value is '.*', which is not a whole number"):
            store.increment("n")
        assert store.get("n") == value

    @pytest.mark.parametrize("value", [2**70, -(2**70), COUNTER_MAX + 1])
    def test_what_is_too_large_to_be_counted(self, store: KeyValueStore, value: int) -> None:
        store.put("n", value)
        for by in (1, -1, -COUNTER_MAX):
            with pytest.raises(OverflowError, match=rf"increment\('n'\) by {by} does not fit into 64 bits"):
                store.increment("n", by)
        assert store.get("n") == value

    def test_counting_keeps_the_time_to_live(self, store: KeyValueStore) -> None:
        store.put("n", 1, ttl_s=0.3)
        store.increment("n")
        wait_until(lambda: store.get("n") is None)
        assert store.increment("n") == 1

    def test_parallel_callers(self, store: KeyValueStore) -> None:
        def work(number: int) -> None:
            for turn in range(25):
                store.increment("total")
                store.put(f"{number}-{turn}", turn)
                assert store.get(f"{number}-{turn}") == turn
                store.put_many({"x": number, "y": number})
                pair = store.get_many(["x", "y"])
                assert pair["x"] == pair["y"]

        at_once(16, work)
        assert store.get("total") == 16 * 25
        assert store.count() == 16 * 25 + 3

    def test_it_is_there_again_after_a_restart(self, make: Callable[[], KeyValueStore]) -> None:
        for round_ in range(3):
            with opened(make()) as store:
                assert store.increment("rounds") == round_ + 1

    def test_one_that_was_cleaned_up_can_be_set_up_again(self, store: KeyValueStore) -> None:
        store.put("a", 1)
        store.cleanup()
        store.cleanup()
        with pytest.raises(ServiceUnavailableError, match=r"is not (open|connected)") as caught:
            store.get("a")
        assert "setup()" in notes_of(caught.value)
        assert not store.health()
        store.setup()
        assert store.health()
        assert store.get("a") == 1

    def test_it_measures_and_describes_itself(self, store: KeyValueStore) -> None:
        store.put_many({"a": 1, "b": 2})
        store.put("a", 3)
        assert store.process("a") == 3
        with pytest.raises(TypeError):
            store.increment("a", "x")  # type: ignore[arg-type]
        measures = store.measures()
        assert {name: (found.calls, found.items, found.errors) for name, found in measures.items()} == {
            "put_many": (1, 2, 0),
            "put": (1, 1, 0),
            "get": (1, 1, 0),
            "increment": (1, 1, 1),
        }
        described = store.describe()
        assert described["service"] == type(store).__name__
        assert PASSWORD not in str(described)


def test_calls_that_are_refused_are_counted(store: KeyValueStore) -> None:
    wrong: Any = 5
    for call in (store.get, store.delete, store.keys):
        with pytest.raises(TypeError):
            call(wrong)
    with pytest.raises(TypeError):
        store.get_many([wrong])
    with pytest.raises(TypeError):
        store.put(wrong, 1)
    with pytest.raises(ValueError, match="ttl_s is -1"):
        store.put_many({"a": 1, "b": 2}, ttl_s=-1)
    measures = store.measures()
    assert {name: (found.calls, found.errors) for name, found in measures.items()} == dict.fromkeys(
        ["delete", "get", "get_many", "keys", "put", "put_many"], (1, 1)
    )
    assert measures["put_many"].items == 2


def circle() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def deep() -> list[Any]:
    found: list[Any] = []
    for _ in range(100_000):
        found = [found]
    return found


class TestBadInput:
    @pytest.mark.parametrize("key", [1, None, b"a", ("a",), ["a"]])
    def test_keys_that_are_no_strings(self, store: KeyValueStore, key: Any) -> None:
        calls: list[Callable[[], object]] = [
            lambda: store.get(key),
            lambda: store.put(key, 1),
            lambda: store.delete(key),
            lambda: store.increment(key),
            lambda: store.get_many([key]),
            lambda: store.put_many(Pairs(key)),
            lambda: store.keys(key),
        ]
        for call in calls:
            with pytest.raises(TypeError, match=r"the key .* is of type .*, not a string"):
                call()
        assert store.count() == 0

    def test_half_a_surrogate_pair(self, store: KeyValueStore) -> None:
        with pytest.raises(ValueError, match="cannot be written as UTF-8"):
            store.put("a\ud800", 1)

    def test_a_string_instead_of_a_list_of_keys(self, store: KeyValueStore) -> None:
        with pytest.raises(TypeError, match=r"get_many\('ab'\) takes a list of keys") as caught:
            store.get_many("ab")
        assert "get_many(['ab'])" in notes_of(caught.value)

    @pytest.mark.parametrize(
        "value",
        [{1}, b"a", object(), math.nan, math.inf, (1, 2), [(1, 2)], {1: 2}, {"a": {None: 1}}, 1j, circle(), deep()],
        ids=[
            "set",
            "bytes",
            "object",
            "nan",
            "inf",
            "tuple",
            "tuple inside",
            "int key",
            "None",
            "1j",
            "circle",
            "deep",
        ],
    )
    def test_values_that_are_no_json(self, store: KeyValueStore, value: Any) -> None:
        store.put("b", 0)
        with pytest.raises(TypeError, match=r"the value of 'b' is .*, which JSON cannot hold: ") as caught:
            store.put_many({"a": 1, "b": value})
        assert "dicts with strings as keys" in notes_of(caught.value)
        assert store.get_many(["a", "b"]) == {"b": 0}

    @pytest.mark.parametrize("ttl_s", [-1, 0, -0.5, math.nan, math.inf, TTL_MAX_S * 2])
    def test_times_to_live_that_cannot_be(self, store: KeyValueStore, ttl_s: float) -> None:
        with pytest.raises(ValueError, match=f"ttl_s is {ttl_s}, "):
            store.put("a", 1, ttl_s=ttl_s)
        with pytest.raises(ValueError, match=f"ttl_s is {ttl_s}, "):
            store.put_many({"a": 1}, ttl_s=ttl_s)
        assert store.count() == 0

    @pytest.mark.parametrize("ttl_s", [True, "5"])
    def test_times_to_live_that_are_no_numbers(self, store: KeyValueStore, ttl_s: Any) -> None:
        with pytest.raises(TypeError, match="not a number of seconds"):
            store.put("a", 1, ttl_s=ttl_s)

    @pytest.mark.parametrize("by", [1.0, "1", True, None])
    def test_increments_that_are_no_whole_numbers(self, store: KeyValueStore, by: Any) -> None:
        with pytest.raises(TypeError, match=r"increment\('n'\) by .*, which is not a whole number"):
            store.increment("n", by)

    def test_increments_that_are_too_large(self, store: KeyValueStore) -> None:
        with pytest.raises(OverflowError):
            store.increment("n", COUNTER_MAX + 1)


class Pairs(dict[str, int]):
    """A mapping with a key that no dict can have."""

    def __init__(self, key: Any) -> None:
        self.key = key

    def items(self) -> Any:
        return [("a", 1), (self.key, 1)]


@pytest.mark.parametrize("host", ["inline", "process"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_a_job(kind: str, host: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The same in a job, with parallel callers; nothing is left, and the next job finds what this one put."""
    url: str = request.getfixturevalue("server") if kind == "redis" else ""
    prefix = f"{uuid.uuid4()}:"
    for round_ in (1, 2):
        arrived: list[Any] = []
        with left_clean(), LocalEnvironment("keeping") as env:
            options = ServiceOptions(host=host, concurrency=4)
            if kind == "redis":
                keys: RedisKeyValue | SqliteKeyValue = env.register_service(
                    "keys", RedisKeyValue, url, password=PASSWORD, prefix=prefix, options=options
                )
            else:
                keys = env.register_service("keys", SqliteKeyValue, tmp_path / "keys.db", options=options)
            stream = env.from_batch([f"{number % 4}" for number in range(40)]).rebalance()
            stream.map(keys.increment, parallelism=4).sink(arrived.append)
            report = env.submit(autostop=True).wait()
        assert sorted(arrived) == sorted(10 * (round_ - 1) + count for count in range(1, 11) for _ in range(4))
        assert report.service("keys").errors == 0
        assert PASSWORD not in f"{report.to_dict()}"
    if kind == "sqlite":
        assert os.listdir(tmp_path) == ["keys.db"]


class TestSqlite:
    def test_a_program_that_is_killed_loses_at_most_the_write_in_flight(self, tmp_path: Path) -> None:
        text = """
            import itertools
            from sage.services.stores.key_value import SqliteKeyValue
            store = SqliteKeyValue("keys.db")
            store.setup()
            for number in itertools.count(1):
                store.put_many({f"{number} first": number, f"{number} second": number})
                store.increment("total")
                print(number, flush=True)
        """
        said = killed_after(300, text, folder=tmp_path)
        with opened(SqliteKeyValue(tmp_path / "keys.db")) as store:
            total = store.get("total")
            assert len(said) <= total <= len(said) + 1
            assert store.count() - 1 in (2 * total, 2 * total + 2)
            store.put("more", 1)

    def test_time_passes_by_the_clock(self, tmp_path: Path) -> None:
        clock = ManualClock()
        with opened(SqliteKeyValue(tmp_path / "keys.db", clock=clock)) as store:
            store.put("a", 1, ttl_s=10)
            store.put("n", 1, ttl_s=10)
            clock.advance(9)
            store.increment("n")
            assert store.get_many(["a", "n"]) == {"a": 1, "n": 2}
            clock.advance(1)
            assert store.get_many(["a", "n"]) == {}
            assert store.expire() == 2
            assert store.expire() == 0

    def test_writes_remove_what_is_over(self, tmp_path: Path) -> None:
        clock = ManualClock()
        with opened(SqliteKeyValue(tmp_path / "keys.db", clock=clock)) as store:
            store.put_many({str(number): number for number in range(150)}, ttl_s=1)
            clock.advance(2)
            store.put("a", 1)
            store.put("a", 2)
            assert store.expire() == 0
            assert store.keys() == ["a"]


@needs_redis
class TestRedis:
    def test_it_sees_only_its_prefix(self, server: str) -> None:
        with (
            opened(RedisKeyValue(server, password=PASSWORD, prefix="one:")) as one,
            opened(RedisKeyValue(server, password=PASSWORD, prefix="two:")) as two,
        ):
            one.put("a", 1)
            assert two.get("a") is None
            assert two.keys() == []
            assert two.count() == 0
            two.put("b", 2)
            assert one.keys() == ["a"]

    @pytest.mark.parametrize("way", ["variables", "files", "argument and file", "url"])
    def test_settings_from_elsewhere(
        self, server: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "url").write_text(server + "\n")
        (tmp_path / "password").write_text(PASSWORD + "\n")
        if way == "variables":
            monkeypatch.setenv("REDIS_URL", server)
            monkeypatch.setenv("REDIS_PASSWORD", PASSWORD)
            store = RedisKeyValue()
        elif way == "files":
            monkeypatch.setenv("REDIS_URL_FILE", str(tmp_path / "url"))
            monkeypatch.setenv("REDIS_PASSWORD_FILE", str(tmp_path / "password"))
            store = RedisKeyValue()
        elif way == "url":
            store = RedisKeyValue(server.replace("//", "//:open%20sesame%3A%207%2F8%40%25@"))
        else:
            monkeypatch.setenv("REDIS_PASSWORD", "not this one")
            store = RedisKeyValue(server.replace("//", "//default:nor_this_one@"), password_file=tmp_path / "password")
        with opened(store):
            store.put("way", way)
            assert store.get("way") == way
            hidden = server.replace("//", "//***@") if way in ("url", "argument and file") else server
            assert store.describe()["url"] == hidden

    @pytest.mark.parametrize("in_url", [False, True])
    def test_a_wrong_password(self, server: str, in_url: bool) -> None:
        wrong = "wrongly_remembered"
        url = server.replace("//", f"//:{wrong}@") if in_url else server
        with left_clean(), LocalEnvironment("wrong") as env:
            keys = env.register_service("keys", RedisKeyValue, url, password=None if in_url else wrong)
            env.from_batch(["a"]).map(keys.get).print()
            with pytest.raises(JobError) as caught:
                env.submit(autostop=True)
        cause = caught.value.__cause__
        assert isinstance(cause, ServiceError)
        assert "refuses the password" in str(cause)
        assert server.removeprefix("redis://") in str(cause)
        assert "password_file" in notes_of(cause)
        assert wrong not in f"{cause!r} {caught.value!r} {notes_of(caught.value)} {env.explain()}"

    def test_no_password_where_one_is_wanted(self, server: str) -> None:
        with left_clean(), pytest.raises(ServiceError, match="refuses the password"):
            RedisKeyValue(server).setup()

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("redis://127.0.0.1:1/0", r'redis at "redis://127.0.0.1:1/0" cannot be reached'),
            ("unix:///nowhere/redis.sock", "cannot be reached"),
            ("http://127.0.0.1:1", r'redis cannot use the url "http://127.0.0.1:1"'),
            ("nonsense:hidden", "cannot use the url"),
            ("redis://:hidden@127.0.0.1:noport", "cannot use the url"),
            ("redis://:hidden@[", "cannot use the url"),
            ("redis://:hidden@127.0.0.1:1/first", r'127.0.0.1:1/first", whose database is not a number'),
        ],
    )
    def test_a_url_that_leads_nowhere(self, url: str, message: str) -> None:
        with left_clean(), pytest.raises(ServiceError, match=message) as caught:
            RedisKeyValue(url).setup()
        assert "hidden" not in str(caught.value)
        assert notes_of(caught.value)

    @pytest.mark.parametrize("timeout_s", [0, -1, math.nan, math.inf, "5", None, True])
    def test_bounds_that_are_none(self, timeout_s: Any) -> None:
        with pytest.raises(ValueError, match=r"timeout_s is .*, not a number of seconds above 0"):
            RedisKeyValue("redis://127.0.0.1:1", timeout_s=timeout_s)

    def test_no_url(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for variable in ("REDIS_URL", "REDIS_URL_FILE"):
            monkeypatch.delenv(variable, raising=False)
        with pytest.raises(ServiceError, match="redis has no url") as caught:
            RedisKeyValue().setup()
        assert "REDIS_URL_FILE" in notes_of(caught.value)

    def test_a_password_file_that_is_not_there(self, server: str, tmp_path: Path) -> None:
        with pytest.raises(ServiceError, match=r'file ".*nothing" cannot be read: No such file'):
            RedisKeyValue(server, password_file=tmp_path / "nothing").setup()
        (tmp_path / "binary").write_bytes(b"\xff\xfe")
        with pytest.raises(ServiceError, match="cannot be read: it is not text"):
            RedisKeyValue(server, password_file=tmp_path / "binary").setup()

    def test_a_server_of_the_same_job(self) -> None:
        """The server is started before the store, and ended after it; the url is taken of its handle."""
        arrived: list[int] = []
        with left_clean(), LocalEnvironment("both") as env:
            keys = env.register_service("keys", RedisKeyValue, register_redis(env).url)
            env.from_batch(["a", "b", "a"]).map(keys.increment).sink(arrived.append)
            env.submit(autostop=True)
        assert arrived == [1, 1, 2]

    def test_a_server_that_ends_meanwhile(self, tmp_path: Path) -> None:
        with left_clean(), pytest.raises(JobError, match='service "redis" ended by itself'), redis_url() as url:
            lose_the_server(url, tmp_path)

    def test_a_server_that_does_not_answer(self) -> None:
        with left_clean(), socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            with pytest.raises(ServiceTimeoutError, match=r"gave no answer within 0.2 s"):
                RedisKeyValue(f"redis://127.0.0.1:{port}", timeout_s=0.2).setup()

    def test_what_other_programs_put_there(self, server: str) -> None:
        with opened(RedisKeyValue(server, password=PASSWORD, prefix="others:")) as store:
            assert isinstance(store, RedisKeyValue)
            store._server.client.set("others:text", "{not json")
            store._server.client.rpush("others:list", "1")
            with pytest.raises(TypeError, match=r"its value is '\{not json', which is not a whole number"):
                store.increment("text")
            with pytest.raises(ServiceError, match=r"the value of 'text' is not JSON: '\{not json'"):
                store.get("text")
            with pytest.raises(ServiceError, match="refused: WRONGTYPE"):
                store.increment("list")
            assert store.delete("list")


def lose_the_server(url: str, folder: Path) -> None:
    store = RedisKeyValue(url, timeout_s=2)
    store.setup()
    port = url.rpartition(":")[2].partition("/")[0]
    store.put("a", 1)
    shutdown(int(port))
    for call in (lambda: store.get("a"), lambda: store.put("a", 1), lambda: store.increment("a")):
        with pytest.raises(ServiceUnavailableError, match=f"127.0.0.1:{port}.* cannot be reached"):
            call()
    assert not store.health()
    words = [str(REDIS_SERVER), "--port", port, "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd=folder) as again:
        wait_until(store.health)
        assert store.increment("a") == 1
        store.cleanup()
        again.terminate()


def shutdown(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(b"SHUTDOWN NOSAVE\r\n")
        assert connection.recv(100) == b""
