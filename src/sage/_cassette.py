"""Calls of services on a cassette: a file that they are written to, and that answers them in a later run.

VCR (https://github.com/vcr/vcr) does the same for HTTP requests.
"""

from __future__ import annotations

import difflib
import inspect
import os
import pickle
import sqlite3
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from time import perf_counter, time
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sage._logs import log_of
from sage._remote.errors import PackedError, pack, unpack
from sage.errors import GraphError, ReplayError, hint, short
from sage.serving import PipelineService

if TYPE_CHECKING:
    from sage._plan.logical import ServiceSpec
    from sage.failure import FailedRecord

log = log_of("sage.cassette")

ATTRIBUTE = "(attribute)"
"""Stands for the arguments where something is read that is not a method."""

ASKED_MAX = 20_000
"""How many characters of the arguments are kept, to be shown in errors; calls are found by the hash of all of them."""

NEAR_MAX, COMPARED_MAX = 50, 500
"""The error for a call that is missing compares so many others, of about its length, by so many characters."""

BUSY_S = 60.0
SECRET_NAMES = ("KEY", "TOKEN", "SECRET", "PASSWORD")
SECRET_LENGTH_MIN = 8
"""A variable of the environment whose name ends so, with a value as long as this, is a secret."""

TABLE = """CREATE TABLE IF NOT EXISTS calls(
    service TEXT, method TEXT, hash TEXT, number INTEGER, is_awaited INTEGER, asked TEXT, answer BLOB, duration_s REAL,
    ended_at REAL, PRIMARY KEY (service, method, hash, number)
) WITHOUT ROWID"""

FAILED_TABLE = "CREATE TABLE IF NOT EXISTS failed(number INTEGER PRIMARY KEY, job TEXT, record BLOB)"


class Cassette:
    """A file of calls: services write to it, or are answered from it.

    Args:
        path: the file.
        way: whether it is written or read.
        since: leave out the answers of equal calls that ended earlier, in seconds since the epoch, unless there are no
            later ones.

    Raises:
        GraphError: the file cannot be used.
    """

    def __init__(self, path: str, way: Literal["record", "replay"], since: float = 0.0) -> None:
        self.path = path
        self._way = way
        self._since = since
        # How often each call was replayed, over all jobs of an environment: a later one goes on where it was.
        self._numbers: Counter[tuple[str, str, str]] = Counter()
        try:
            if way == "record":
                Tape(path, "", may_write=True).close()
            Tape(path, "", may_write=False).close()  # whose columns are looked at
        except sqlite3.Error as error:
            missing = way == "replay" and not os.path.exists(path)
            text = f"cassette {path!r} cannot be used: {'it is missing' if missing else error}"
            raise hint(
                GraphError(text), "Give the path of a new file, or of one that env.record_calls made."
            ) from error

    def of(self, spec: ServiceSpec) -> ServiceSpec:
        """Return a service that records, or one that answers from the file in its place."""
        if spec.target is PipelineService:  # it runs in the job itself
            return spec
        if self._way == "record":
            return replace(spec, target=Recorded(spec.target, self.path, spec.name)) if spec.command is None else spec
        one = spec.options.of_one()
        options = replace(
            one, host=None, shared=False, restart="never", call_timeout_s=None, rate=None, idle_stop_s=None
        )
        args = (self.path, spec.name, self._numbers, spec.command is not None, self._since)
        return replace(spec, target=replayed, args=args, kwargs={}, options=options, command=None)

    def tape(self) -> Tape | None:
        """Return a tape for records that fail, which the caller closes, or None if nothing is recorded."""
        return Tape(self.path, "", may_write=True) if self._way == "record" else None


@cache
def of_program(path: str, way: Literal["record", "replay"]) -> Cassette:
    """Return the cassette that all environments of a program share."""
    return Cassette(path, way)


@dataclass(frozen=True, slots=True)
class Recorded:
    """What builds a service whose calls are recorded, wherever it stands; `Instance` knows it."""

    target: Callable[..., object]
    path: str
    service: str

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Build the service."""
        return self.target(*args, **kwargs)

    def tape(self) -> Tape:
        """Open the file for the calls of the service."""
        return Tape(self.path, self.service, may_write=True)


class Said(NamedTuple):
    """What came of a call."""

    form: Literal["value", "pieces", "error", "lost"]
    value: object = None
    pieces: tuple[object, ...] = ()


class Tape:
    """The calls of one service in a file."""

    def __init__(self, path: str, service: str, *, may_write: bool) -> None:
        self.service = service
        self._path = path
        self._attributes: set[str] = set()
        self._lock = threading.Lock()
        # Several processes may write into the file at the same time. A file that is only read may be on a disk that
        # cannot be written, so nothing is kept beside it.
        mode = "rwc" if may_write else "ro"
        address = f"{Path(path).absolute().as_uri()}?mode={mode}"
        self._file = sqlite3.connect(address, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            self._file.execute("PRAGMA synchronous = OFF")  # a killed process loses nothing by that
            for statement in (TABLE, FAILED_TABLE) if may_write else ("SELECT ended_at FROM calls LIMIT 1",):
                self._file.execute(statement)
        except BaseException:
            self._file.close()
            raise
        named = (value for name, value in os.environ.items() if name.upper().endswith(SECRET_NAMES))
        self._secrets = sorted({value for value in named if len(value) >= SECRET_LENGTH_MIN}, key=len, reverse=True)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def asked(self, args: tuple[object, ...], kwargs: dict[str, object]) -> str:
        """Return the arguments of a call as text that is the same for equal ones, without secrets."""
        text = f"({', '.join([*map(written, args), *(f'{name}={written(kwargs[name])}' for name in sorted(kwargs))])})"
        return self.hide(text)

    def hide(self, text: str) -> str:
        """Return a text without secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "*" * len(secret))
        return text

    def write(self, method: str, asked: str, said: Said, duration_s: float = 0.0, *, is_awaited: bool = False) -> None:
        """Add a call and its answer. What cannot be written is left out, as the answer is worth more than its copy."""
        answer = self._pickled(said, f"answer cannot be recorded service={self.service!r} method={method}")
        of_call = (self.service, method, _hash(asked))
        try:
            with self._lock:
                self._file.execute(
                    "INSERT INTO calls SELECT ?, ?, ?, COALESCE(MAX(number), 0) + 1, ?, ?, ?, ?, ? FROM calls"
                    " WHERE service = ? AND method = ? AND hash = ?",
                    (*of_call, is_awaited, asked[:ASKED_MAX], answer, duration_s, time(), *of_call),
                )
        except sqlite3.Error as error:
            log.error("call cannot be recorded service=%r method=%s file=%s error=%s", *of_call[:2], self._path, error)

    def keep(self, job: str, failed: FailedRecord) -> int | None:
        """Keep a record that failed in a job, and return its number, or None if the file cannot be written."""
        about = f"record cannot be kept operator={failed.operator!r}"
        record = self._pickled(Said("value", (failed.value, failed.keys, failed.port, failed.began_at)), about)
        try:
            with self._lock:
                return self._file.execute("INSERT INTO failed(job, record) VALUES(?, ?)", (job, record)).lastrowid
        except sqlite3.Error as error:
            log.error("%s file=%s error=%s", about, self._path, error)
            return None

    def kept(self, job: str, number: int) -> Said | None:
        """Return a record that failed in a job: its value, keys, port and `began_at`; None if it is not here."""
        try:
            rows = self._found("SELECT record FROM failed WHERE number = ? AND job = ?", (number, job))
        except sqlite3.Error:  # a cassette on which no job could have kept records
            return None
        return pickle.loads(rows[0][0]) if rows else None

    def _pickled(self, said: Said, about: str) -> bytes:
        """Return an answer or a record as bytes without secrets, or a description if it cannot be pickled."""
        try:
            pickled = pickle.dumps(said, pickle.HIGHEST_PROTOCOL)
        except Exception:  # a value of any kind, whose own code runs
            log.warning("%s value=%s", about, short(said))
            pickled = pickle.dumps(Said("lost", short(said.value)))
        for secret in self._secrets:  # as many bytes, so that the pickle stays one
            pickled = pickled.replace(secret.encode(), b"*" * len(secret.encode()))
        return pickled

    def on(self, method: str, attribute: object) -> object:
        """Return an attribute of the service: a method that records its calls, or a value, which is recorded now."""
        if callable(attribute):
            return recorded(self, method, attribute)
        if method not in self._attributes:
            self._attributes.add(method)
            self.write(method, ATTRIBUTE, Said("value", attribute))
        return attribute

    def read(self, method: str, asked: str, number: int = 1) -> Said | None:
        """Return the answer that the call got the `number`-th time, or None."""
        rows = self._found(
            "SELECT answer FROM calls WHERE service = ? AND method = ? AND hash = ? AND number = ?",
            (self.service, method, _hash(asked), number),
        )
        return pickle.loads(rows[0][0]) if rows else None

    def count_before(self, method: str, asked: str, since: float) -> int:
        """Return how many answers of a call ended before `since`, but leave at least one."""
        rows = self._found(
            "SELECT COUNT(*), COALESCE(SUM(ended_at < ?), 0) FROM calls WHERE service = ? AND method = ? AND hash = ?",
            (since, self.service, method, _hash(asked)),
        )
        count, before = map(int, rows[0])
        return min(before, max(count - 1, 0))

    def coroutines(self) -> list[str]:
        """Return the names of the methods that were awaited."""
        rows = self._found("SELECT DISTINCT method FROM calls WHERE service = ? AND is_awaited", (self.service,))
        return [name for (name,) in rows]

    def missing(self, method: str, asked: str, number: int) -> ReplayError:
        """Return the error for a call that was not recorded so often, with the most similar one."""
        called = f'{method}{_short(asked)} of service "{self.service}"'
        if number > 1:
            text = f"{called} is called {number} times, recorded were {number - 1}"
            return ReplayError(text, service=self.service)
        error = ReplayError(f"no call {called} is in {self._path!r}", service=self.service)
        near = self._found(
            "SELECT asked FROM calls WHERE service = ? AND method = ? ORDER BY ABS(LENGTH(asked) - ?) LIMIT ?",
            (self.service, method, len(asked), NEAR_MAX),
        )
        texts = {text[:COMPARED_MAX]: text for (text,) in near}
        for nearest in difflib.get_close_matches(asked[:COMPARED_MAX], texts, n=1, cutoff=0.0):
            hint(error, f"The nearest that is there: {_difference(asked, texts[nearest])}")
        if not texts:
            names = self._found("SELECT DISTINCT method FROM calls WHERE service = ?", (self.service,))
            known = ", ".join(sorted(name for (name,) in names))
            hint(error, f"Recorded are: {known or 'no calls of this service'}.")
        return error

    def _found(self, text: str, values: tuple[object, ...]) -> list[Any]:
        with self._lock:
            return self._file.execute(text, values).fetchall()


def recorded(tape: Tape, method: str, function: Callable[..., object]) -> Callable[..., object]:
    """Return a method that writes what it was asked and what it answered."""
    if inspect.iscoroutinefunction(function):

        async def call_async(*args: object, **kwargs: object) -> object:
            asked, began_at = tape.asked(args, kwargs), perf_counter()
            try:
                result = await function(*args, **kwargs)
            except Exception as error:
                tape.write(method, asked, Said("error", pack(error)), perf_counter() - began_at, is_awaited=True)
                raise
            return _taken(tape, method, asked, result, began_at, is_awaited=True)

        return call_async

    def call(*args: object, **kwargs: object) -> object:
        asked, began_at = tape.asked(args, kwargs), perf_counter()
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            tape.write(method, asked, Said("error", pack(error)), perf_counter() - began_at)
            raise
        return _taken(tape, method, asked, result, began_at)

    return call


def _taken(tape: Tape, method: str, asked: str, result: object, began_at: float, *, is_awaited: bool = False) -> object:
    """Write a result; one that comes in pieces is written when the last has come, or its reader has left."""

    def write(said: Said) -> None:
        tape.write(method, asked, said, perf_counter() - began_at, is_awaited=is_awaited)

    if isinstance(result, Generator):
        return PiecesOnTape(result, write)
    if isinstance(result, AsyncGenerator):
        return AsyncPiecesOnTape(result, write)
    write(Said("value", result))
    return result


class _OnTape:
    """Pieces of a result that are written down as they pass."""

    def __init__(self, pieces: Any, write: Callable[[Said], None]) -> None:
        self._pieces = pieces
        self._write = write
        self._seen: list[object] = []
        self._is_written = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._pieces, name)

    def _saw(self, piece: object) -> object:
        self._seen.append(piece)
        return piece

    def _ended(self, error: BaseException) -> None:
        """Write what came, with the error that came instead of the rest, and the whole answer if there is one."""
        if not self._is_written:
            self._is_written = True
            over = isinstance(error, StopIteration | StopAsyncIteration | GeneratorExit)
            try:
                whole = getattr(self._pieces, "answer", None) if over else pack(error)
            except RuntimeError:  # it is not complete
                whole = None
            self._write(Said("pieces", whole, tuple(self._seen)))


class PiecesOnTape(_OnTape, Generator[object, object, object]):
    """Pieces that a thread reads."""

    def send(self, value: object, /) -> object:
        """Return the next piece."""
        try:
            return self._saw(self._pieces.send(value))
        except BaseException as error:  # the end is one too
            self._ended(error)
            raise

    def throw(self, *error: Any) -> object:
        """Raise an error where the pieces come from."""
        try:
            return self._pieces.throw(*error)
        except BaseException as came:  # the end is one too
            self._ended(came)
            raise


class AsyncPiecesOnTape(_OnTape, AsyncGenerator[object, object]):
    """Pieces that a coroutine reads."""

    async def asend(self, value: object, /) -> object:
        """Return the next piece."""
        try:
            return self._saw(await self._pieces.asend(value))
        except BaseException as error:  # the end is one too
            self._ended(error)
            raise

    async def athrow(self, *error: Any) -> object:
        """Raise an error where the pieces come from."""
        try:
            return await self._pieces.athrow(*error)
        except BaseException as came:  # the end is one too
            self._ended(came)
            raise


class Replayed:
    """Answers in the place of a service, from a file."""

    def __init__(self, tape: Tape, numbers: Counter[tuple[str, str, str]], *, is_command: bool, since: float) -> None:
        self._tape = tape
        self._numbers = numbers
        self._since = since
        self._lock = threading.Lock()
        self._is_command = is_command

    def cleanup(self) -> None:
        """Close the file."""
        self._tape.close()

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(name)
        if self._is_command:
            text = f'service "{self._tape.service}" is a command, which is not started in a replay'
            error = ReplayError(text, service=self._tape.service)
            raise hint(error, f"Its {name} leads nowhere. What talks to it should be a method of a service.")
        value = self._tape.read(name, ATTRIBUTE)
        return partial(self._answer, name) if value is None else value.value

    def _answer(self, method: str, *args: object, **kwargs: object) -> object:
        asked = self._tape.asked(args, kwargs)
        with self._lock:
            key = (self._tape.service, method, asked)
            if self._since and key not in self._numbers:
                self._numbers[key] = self._tape.count_before(method, asked, self._since)
            self._numbers[key] += 1
            number = self._numbers[key]
        said = self._tape.read(method, asked, number)
        if said is None:
            raise self._tape.missing(method, asked, number)
        if said.form == "lost":
            called = f'service "{self._tape.service}" to {method}{_short(asked)}'
            error = ReplayError(f"the answer of {called} was not recorded: {said.value}", service=self._tape.service)
            raise hint(error, "It cannot be pickled. Let the method return data.")
        if said.form == "error":
            assert isinstance(said.value, PackedError)
            raise unpack(said.value)
        return PiecesAgain(said) if said.form == "pieces" else said.value


def replayed(
    path: str, service: str, numbers: Counter[tuple[str, str, str]], is_command: bool, since: float
) -> Replayed:
    """Return what answers in the place of a service; methods that were awaited are coroutine methods again."""

    def later(name: str) -> Callable[..., object]:
        async def answer(self: Replayed, *args: object, **kwargs: object) -> object:
            return self._answer(name, *args, **kwargs)

        return answer

    tape = Tape(path, service, may_write=False)
    kind = type("Replayed", (Replayed,), {name: later(name) for name in tape.coroutines()})
    made: Replayed = kind(tape, numbers, is_command=is_command, since=since)
    return made


class PiecesAgain:
    """A recorded result that came in pieces, for threads and for coroutines.

    Attributes:
        answer: the whole of it, if the service gave that besides.
    """

    def __init__(self, said: Said) -> None:
        self._error = unpack(said.value) if isinstance(said.value, PackedError) else None
        self.answer = said.value if self._error is None else None
        self._rest = iter(said.pieces)

    def __iter__(self) -> PiecesAgain:
        return self

    def __next__(self) -> object:
        for piece in self._rest:
            return piece
        raise StopIteration if self._error is None else self._error

    def close(self) -> None:
        """End it."""
        self._rest = iter(())

    def __aiter__(self) -> PiecesAgain:
        return self

    async def __anext__(self) -> object:
        for piece in self._rest:
            return piece
        raise StopAsyncIteration if self._error is None else self._error

    async def aclose(self) -> None:
        """End it."""
        self.close()


def written(value: object) -> str:
    """Return a value as text that is the same for equal values in every process, as far as its type allows that."""
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, dict):
        return "{" + ", ".join(sorted(f"{written(key)}: {written(each)}" for key, each in value.items())) + "}"
    if isinstance(value, list | tuple):
        inner = ", ".join(map(written, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(written, value))) + "}"
    if is_dataclass(value) and not isinstance(value, type):
        inner = ", ".join(f"{field.name}={written(getattr(value, field.name))}" for field in fields(value))
        return f"{type(value).__qualname__}({inner})"
    if hasattr(value, "dtype") and hasattr(value, "tobytes"):
        return f"array({value.dtype}, {getattr(value, 'shape', None)}, {sha256(value.tobytes()).hexdigest()[:16]})"
    text = repr(value)
    if " at 0x" in text:  # it names a place in memory
        try:
            return f"{type(value).__qualname__}({sha256(pickle.dumps(value)).hexdigest()[:16]})"
        except Exception:  # an argument of any kind, whose own code runs
            return type(value).__qualname__
    return text


def _hash(asked: str) -> str:
    return sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()


def _short(asked: str) -> str:
    return asked if len(asked) <= 80 else f"{asked[:77]}..."


def _difference(asked: str, near: str) -> str:
    """Return how a call differs from the one that was recorded, with a little around it."""
    start = next((place for place, (one, other) in enumerate(zip(asked, near, strict=False)) if one != other), None)
    start = min(len(asked), len(near)) if start is None else start  # one is the begin of the other
    begin = max(0, start - 20)
    return f"it has {near[begin : start + 40]!r} where this one has {asked[begin : start + 40]!r}"
