"""Dead letters in a file: one line of JSON each, appended with the checkpoints of a durable job."""

from __future__ import annotations

import fcntl
import json
import os
import time
import traceback
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sage._arguments import path_of
from sage.connectors.files import FileSink, Format, Lines, prepared_name
from sage.connectors.json_lines import as_json
from sage.connectors.places import URL
from sage.errors import ConnectorError, GraphError, describe, hint
from sage.failure import DeadLetter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence


@dataclass(frozen=True, slots=True)
class StoredLetter:
    """A dead letter as it stands in a file.

    Attributes:
        id: names it.
        values: its line: "id", "at", "job", "operator", "attempts", "error", "traceback", the "input" of the operator,
            the "key", if there is one, and the "record". A key or record that JSON does not have is "record_text", and
            pickled in base64 "record_pickled".
    """

    id: str
    values: dict[str, Any]


def read_letters(path: str) -> tuple[list[StoredLetter], int]:
    """Return the letters in a file, and how many lines of it could not be read.

    Raises:
        ConnectorError: the file cannot be read.
    """
    letters: list[StoredLetter] = []
    unread_count = 0
    try:
        with open(path, "rb") as file:
            for line in filter(None, map(bytes.strip, file)):
                letter = _letter(line)
                if letter is None:
                    unread_count += 1
                else:
                    letters.append(letter)
    except OSError as error:
        raise ConnectorError(f'file "{path}" cannot be read: {describe(error)}', fault="external") from error
    return letters, unread_count


def take_out(path: str, ids: frozenset[str]) -> None:
    """Take letters out of a file; lines that cannot be read stay. Jobs may append meanwhile.

    Raises:
        ConnectorError: the file cannot be written.
    """
    with _failing(path):
        _rewrite(os.path.realpath(path), lambda letter: letter.id not in ids)


class LetterFormat(Format[DeadLetter]):
    """Dead letters as they wait for a checkpoint, still without their id.

    Args:
        job: the name of the job.
    """

    suffix = ""

    def __init__(self, job: str) -> None:
        self._job = job

    def decode(self, lines: Lines, header: object) -> Iterator[DeadLetter]:  # noqa: ARG002
        """Yield nothing: errors cannot be made again from their texts."""
        return iter(())

    def encode(self, record: DeadLetter) -> bytes:
        """Return the line of a letter."""
        values = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "job": self._job,
            "operator": record.operator,
            "attempts": record.attempts,
            "error": describe(record.error),
            "traceback": "".join(traceback.format_exception(record.error)),
            "input": record.port,
            **(as_json("key", record.keys[0]) if record.keys else {}),
            **as_json("record", record.value),
        }
        return f"{json.dumps(values, ensure_ascii=False)}\n".encode(errors="replace")


class DeadLetterFile(FileSink[DeadLetter]):
    """Appends dead letters to a file, with the checkpoints of a durable job.

    Until then they are in a file beside it whose name begins with a dot. In a job that is not durable, `append` writes
    each letter immediately.

    Args:
        path: the file; made with its folder if it is not there.
        job: the name of the job.
    """

    def __init__(self, path: str | os.PathLike[str], job: str) -> None:
        given = path_of("dead_letters: store", path, 'Give the path of a file: store="failed.jsonl".')
        if URL.match(given):
            raise hint(GraphError(f'dead_letters: store is "{given}"'), "Letters are kept in a file of this machine.")
        self.path = os.path.realpath(given)
        if os.path.isdir(self.path):
            raise GraphError(f'dead_letters: store is the folder "{path}", and not a file')
        there = self.path
        while not os.path.lexists(there):
            there = os.path.dirname(there)
        if not os.access(there, os.W_OK) or (there != self.path and not os.path.isdir(there)):
            error = GraphError(f'dead_letters: store "{path}" cannot be written')
            raise hint(error, f'"{there}" must be a file or folder that this user may write.')
        self._letters = LetterFormat(job)
        super().__init__(os.path.dirname(self.path), self._letters)
        self._run = uuid.uuid4().hex[:12]
        self._count = 0
        self._may_be_there = False

    def append(self, letter: DeadLetter) -> None:
        """Append a letter immediately."""
        self._count += 1
        with _failing(self.path), _alone(self.path) as file:
            _add(file, [_with_id(f"{self._run}-{self._count}", self._letters.encode(letter))])

    def open(self, part: str, checkpoint: int) -> None:
        """Remove the letters of this part that belong to a later checkpoint."""
        super().open(part, checkpoint)
        self._may_be_there = True
        if os.path.exists(self.path):
            with _failing(self.path):
                _rewrite(self.path, lambda letter: self._checkpoint_of(letter) <= checkpoint)

    def _checkpoint_of(self, letter: StoredLetter) -> int:
        """Return the number of the checkpoint of a letter; 0 if it is of another part."""
        part, *numbers = letter.id.rsplit("-", 2)
        return int(numbers[0]) if part == self._part and len(numbers) == 2 and numbers[0].isdigit() else 0

    def begin(self) -> None:
        """Begin a transaction."""
        self._may_be_there = False

    def commit(self, token: Sequence[str]) -> None:
        """Append the letters to the file; those that a crash has left there are not appended again."""
        (name,) = token
        prepared = Path(os.path.dirname(self.path), prepared_name(name))
        if not prepared.exists():
            return
        with _failing(self.path):
            with _alone(self.path) as file:
                there: set[str] = set()
                if self._may_be_there:
                    _cut_torn_line(file)
                    file.seek(0)
                    there = {letter.id for letter in filter(None, map(_letter, file))}
                lines = enumerate(prepared.read_bytes().splitlines(keepends=True))
                named = ((f"{name}-{place}", line) for place, line in lines)
                _add(file, [_with_id(id_, line) for id_, line in named if id_ not in there])
                _sync(file)
            prepared.unlink()
            self._place.sync(token)


def _letter(line: bytes) -> StoredLetter | None:
    try:
        values = json.loads(line)
        return StoredLetter(values["id"], {"operator": values["operator"], **values})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _with_id(id_: str, line: bytes) -> bytes:
    return f'{{"id": {json.dumps(id_)}, '.encode() + line[1:]


@contextmanager
def _failing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        failed = ConnectorError(f'dead letters cannot be written to "{path}": {describe(error)}', fault="external")
        raise failed from error


@contextmanager
def _alone(path: str) -> Iterator[BinaryIO]:
    """Open a file to read and append, while nobody else writes it."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    while True:
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # and nobody has just put another there
                    yield file
                    return


def _add(file: BinaryIO, lines: Iterable[bytes]) -> None:
    text = b"".join(lines)
    end = file.seek(0, os.SEEK_END)
    if end:
        file.seek(end - 1)
        text = text if file.read(1) == b"\n" else b"\n" + text
    file.write(text)


def _cut_torn_line(file: BinaryIO) -> None:
    file.seek(0)
    text = file.read()
    end = text.rfind(b"\n") + 1
    if _letter(text[end:]) is None:
        file.truncate(end)


def _rewrite(path: str, stays: Callable[[StoredLetter], bool]) -> None:
    """Leave out the letters that do not stay."""
    with _alone(path) as file:
        file.seek(0)
        lines = file.readlines()
        left = [line for line in lines if (letter := _letter(line)) is None or stays(letter)]
        if len(left) == len(lines):
            return
        other = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.new")
        with open(other, "wb") as new:
            os.fchmod(new.fileno(), os.fstat(file.fileno()).st_mode & 0o777)
            new.writelines(left)
            _sync(new)
        os.replace(other, path)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
