"""The memory of a conversation: the last turns of each session, and its long-term memories."""

from __future__ import annotations

import math
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Protocol

from sage._extras import load
from sage.errors import GraphError, ServiceError, hint, short
from sage.services._shared.sqlite_file import FileService, SqliteFile
from sage.services._shared.validation import checked_text, checked_ttl, checked_whole, is_number, json_text
from sage.services.memory import export, tables
from sage.services.memory.export import MemoryLine, TurnLine
from sage.services.memory.ranking import HALF_LIFE_S, Weights, best
from sage.services.memory.tables import Recollection, Row, Turn
from sage.services.stores.key_value import EXPIRED_AT_ONCE_MAX
from sage.services.vectors.filters import INTEGER_MAX

if TYPE_CHECKING:
    import os
    import sqlite3
    from collections.abc import Callable, Sequence

    from sage.service import ServiceHandle
    from sage.services.memory.ranking import Floats

__all__ = ["Embeddings", "Memory", "Recollection", "Turn", "VectorIndex", "Weights", "estimated_tokens"]

SESSION = "default"

CANDIDATES_MIN = 100
"""How many memories a vector store is asked for at least, so that recency and importance have something to choose."""

BATCH_ROWS = 500
"""How many memories an index is given at once."""

WORD = re.compile(r"\w+|[^\w\s]")

A_MOMENT = "It is in seconds since the epoch, such as moment.timestamp() of a datetime, or time.time() - 3600."
A_HALF_LIFE = "It is in seconds; a day has 86,400."


class Embeddings(Protocol):
    """Turns texts into vectors, as `EmbeddingService` does."""

    def embed(self, texts: Sequence[str], /) -> object:
        """Return a float32 array of shape (len(texts), dim)."""


class Found(Protocol):
    """A vector that an index finds."""

    @property
    def id(self) -> str:
        """Its id."""


class VectorIndex(Protocol):
    """Finds vectors, as `VectorStore` does."""

    def upsert(self, ids: Sequence[str], vectors: Floats, *, metadatas: Sequence[Mapping[str, str]]) -> object:
        """Keep vectors."""

    def search(self, vector: Floats, k: int, *, where: Mapping[str, str] | None) -> Sequence[Found]:
        """Return hits with an `id`, the nearest first."""

    def count(self) -> int:
        """Return how many vectors it holds."""

    def delete(self, ids: Sequence[str]) -> object:
        """Forget vectors; ids that do not exist are ignored."""


def estimated_tokens(text: str) -> int:
    """Return about how many tokens a text has: its words and marks, or a quarter of its bytes if that is more."""
    return max(len(WORD.findall(text)), math.ceil(len(text.encode(errors="replace")) / 4))


class Memory(FileService):
    """Remembers any number of conversations, in one SQLite file.

    Short-term memory is the last turns of a session, within a budget of tokens. Long-term memory is any number of texts
    with vectors, which `recall` finds by similarity, recency and importance (`ranking.py` has the formula and its
    source). Recalling a memory makes it recent again.

    Once a method has returned, its data survives a restart and SIGKILL; a write in flight is lost as a whole. All
    methods may be called from any number of threads, and several programs may use one file. Texts are embedded by the
    service that is given, outside of any lock; a file holds the vectors of one model.

    With an index, the file still holds every vector and is authoritative. If the index raises, memories can still be
    recalled; `setup` adds the vectors that the index lacks after that or a crash. A text whose vector is zeros is not
    put there; recency and importance bring it to mind.

    Args:
        path: the file; it is made if it is not there.
        embeddings: the embeddings: a handle of a service, or an object with `embed(texts)`.
        index: a `VectorStore` or a handle of one, with a collection for this memory alone;
            without one every vector of the session is compared, 10,000 of 384 numbers in about 0.1 s.
        turns_max: how many turns of a session are kept.
        tokens_max: how many tokens the turns that `turns` returns may have together.
        count_tokens: tells how many tokens a text has; an estimate by default.
        half_life_s: after so many seconds recency is halved.
        weights: how much similarity, recency and importance count.
        ttl_s: the time to live of memories that are given none, in seconds; for ever by default.
        clock: tells the time, in seconds since the epoch.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        embeddings: Embeddings | ServiceHandle[object],
        *,
        index: VectorIndex | ServiceHandle[object] | None = None,
        turns_max: int = 20,
        tokens_max: int = 2_000,
        count_tokens: Callable[[str], int] = estimated_tokens,
        half_life_s: float = HALF_LIFE_S,
        weights: Weights | None = None,
        ttl_s: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(SqliteFile(path, "memory", 1, tables.SCHEMA))
        if _whole("turns_max", turns_max) < 1 or _whole("tokens_max", tokens_max) < 1:
            raise ValueError(f"a memory keeps at least 1 turn and 1 token, not {turns_max} and {tokens_max}")
        if half_life_s != math.inf and _number("half_life_s", half_life_s, A_HALF_LIFE) <= 0:
            raise ValueError(f"half_life_s is {half_life_s}, and a half-life is above 0 seconds")
        self._embeddings = embeddings
        self._index = index
        self._turns_max = _whole("turns_max", turns_max)
        self._tokens_max = _whole("tokens_max", tokens_max)
        self._count_tokens = count_tokens
        self._half_life_s = float(half_life_s)
        self._weights = Weights() if weights is None else _weights(weights)
        self._ttl_s = checked_ttl(ttl_s)
        self._clock = clock
        self._model: str | None = None

    # --- hooks ---

    def setup(self) -> None:
        """Open the file, and add missing vectors to the index.

        Raises:
            MissingExtraError: the package numpy is not installed.
            ServiceError: the file cannot be opened or is not a database, or holds vectors of another model.
        """
        load("numpy", "vector")
        self._file.open()
        try:
            self._model = model_of(self._embeddings)
            with self._file.reading() as connection:
                known = tables.settings(connection).get("model", self._model)
                if self._model is not None and known != self._model:
                    raise self._other_model(f"model {known!r}", f"{self._model!r}")
            if self._index is not None:
                self._complete_index(self._index)
        except BaseException:
            self._file.close()
            raise

    def describe(self) -> Mapping[str, object]:
        """Return the settings that a person may see."""
        settings = {
            "model": self._model,
            "turns_max": self._turns_max,
            "tokens_max": self._tokens_max,
            "half_life_s": self._half_life_s,
            "ttl_s": self._ttl_s,
        }
        return {**super().describe(), **settings}

    def process(self, query: str) -> list[Recollection]:
        """Return the result of `recall`."""
        return self.recall(query)

    # --- short-term memory ---

    def add_turn(
        self, role: str, content: str, *, session: str = SESSION, importance: float | None = None
    ) -> str | None:
        """Add a turn to a session; one with an importance is remembered for long too, and its id returned.

        Raises:
            TypeError: an argument is not a string.
            ValueError: the importance is not from 0 to 1.
        """
        with self.measured("add_turn"):
            for name, text in (("role", role), ("content", content), ("session", session)):
                checked_text(name, text)
            rows = []
            if importance is not None:
                rows = self._rows([content], session, importance, {"role": role}, self._ttl_s)
            self._store(rows, [(uuid.uuid4().hex, session, role, content, self._clock())])
        return rows[0][0] if rows else None

    def turns(
        self, session: str = SESSION, *, turns_max: int | None = None, tokens_max: int | None = None
    ) -> list[Turn]:
        """Return the last turns of a session, the oldest first, no more than fit into the budget of tokens.

        The first turn from the end that does not fit ends it, so that the turns are without gaps; the list is empty if
        not even the last one fits.

        Args:
            session: which.
            turns_max: at most so many; as many as are kept by default.
            tokens_max: at most so many tokens in all; by default the memory's own setting.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: one of the bounds is negative.
        """
        select = "SELECT role, content, at FROM memory_turns WHERE session = ? ORDER BY number DESC LIMIT ?"
        with self.measured("turns"), self._file.reading() as connection:
            checked_text("session", session)
            count_max = self._turns_max if turns_max is None else _whole("turns_max", turns_max)
            budget = self._tokens_max if tokens_max is None else _whole("tokens_max", tokens_max)
            if count_max < 0 or budget < 0:
                raise ValueError(f"turns_max is {count_max} and tokens_max {budget}; neither can be negative")
            rows = connection.execute(select, (session, count_max)).fetchall()
        found: list[Turn] = []
        for role, content, at in rows:
            budget -= self._count_tokens(content)
            if budget < 0:
                break
            found.append(Turn(role, content, at))
        return found[::-1]

    # --- long-term memory ---

    def remember(
        self,
        text: str,
        *,
        session: str = SESSION,
        importance: float = 0.5,
        metadata: Mapping[str, object] | None = None,
        ttl_s: float | None = None,
    ) -> str:
        """Remember a text for long, and return its id.

        Args:
            text: the text to remember.
            session: whose it is.
            importance: from 0 to 1.
            metadata: values of JSON to keep with it.
            ttl_s: after so many seconds it is forgotten; by default the memory's own setting.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: the text is blank, the importance is not from 0 to 1, or the time to live not above 0.
            ServiceError: the file cannot be written, or the vectors are not valid.
        """
        return self.remember_many([text], session=session, importance=importance, metadata=metadata, ttl_s=ttl_s)[0]

    def remember_many(
        self,
        texts: Sequence[str],
        *,
        session: str = SESSION,
        importance: float = 0.5,
        metadata: Mapping[str, object] | None = None,
        ttl_s: float | None = None,
    ) -> list[str]:
        """Remember several texts in one step, all or none of them, and return their ids; arguments as in `remember`."""
        with self.measured("remember") as call:
            checked_text("session", session)
            lives_s = self._ttl_s if ttl_s is None else checked_ttl(ttl_s)
            rows = self._rows(texts, session, importance, {} if metadata is None else metadata, lives_s)
            call.items = len(rows)
            self._store(rows, [])
        return [row[0] for row in rows]

    def recall(
        self, query: str, k: int = 5, *, session: str | None = SESSION, weights: Weights | None = None
    ) -> list[Recollection]:
        """Return the memories that fit best, the best first.

        Args:
            query: the text to search for.
            k: how many, at most.
            session: whose memories; None for those of all sessions.
            weights: how much each part counts; by default the memory's own setting.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: the query is empty, or `k` is below 1.
            ServiceError: the file cannot be used, or the vector is not valid.
        """
        with self.measured("recall"):
            if not checked_text("query", query).strip():
                raise ValueError("the query is empty")
            if type(k) is not int or k < 1:
                raise ValueError(f"k is {short(k)}, not a whole number of at least 1")
            if session is not None:
                checked_text("session", session)
            chosen = self._weights if weights is None else _weights(weights)
            vector = self._embed([query])[0]
            now = self._clock()
            ids = self._found(vector, k, session)
            with self._file.reading() as connection:
                self._check_dimension(connection, len(vector))
                candidates = tables.candidates(connection, now, session, ids)
                scores = best(vector, candidates, k, now=now, half_life_s=self._half_life_s, weights=chosen)
                found = [tables.recollection(connection, score) for score in scores]
                gone = tables.unknown(connection, ids or [])
            self._unindex(gone)
            if found:
                with self._file.writing() as connection:
                    recalled = [(now, score.number) for score in scores]
                    connection.executemany("UPDATE memories SET recalled_at = ? WHERE number = ?", recalled)
        return found

    def forget(
        self, ids: Iterable[str] | None = None, *, session: str | None = None, before: float | None = None
    ) -> int:
        """Forget the memories that match all arguments, and return their number.

        Without ids, turns are forgotten too.

        Args:
            ids: these memories.
            session: of this session.
            before: made before this moment, in seconds since the epoch.

        Raises:
            TypeError: an argument is of the wrong type; nothing is forgotten.
            ValueError: the moment is not finite, or nothing is given; forgetting everything is removing the file.
        """
        where = "(? IS NULL OR session = ?) AND (? IS NULL OR {moment} < ?)"
        with self.measured("forget"):
            if ids is None and session is None and before is None:
                raise hint(ValueError("forget() needs ids, a session or a time"), "Give ids, session or before.")
            if ids is not None and (isinstance(ids, str) or not isinstance(ids, Iterable)):
                raise hint(TypeError(f"forget({short(ids)}) takes a list of ids"), f"Write forget([{short(ids)}]).")
            wanted = None if ids is None else [checked_text("id", name) for name in ids]
            if session is not None:
                checked_text("session", session)
            # SQLite takes any text for later than all numbers, and NaN for nothing given.
            moment = None if before is None else _number("before", before, A_MOMENT)
            bounds = (session, session, moment, moment)
            with self._file.writing() as connection:
                select = f"SELECT id FROM memories WHERE {where.format(moment='created_at')}"
                if wanted is None:
                    rows = connection.execute(select, bounds).fetchall()
                    connection.execute(f"DELETE FROM memory_turns WHERE {where.format(moment='at')}", bounds)
                else:
                    rows = [
                        row
                        for name in dict.fromkeys(wanted)
                        for row in connection.execute(f"{select} AND id = ?", (*bounds, name))
                    ]
                connection.executemany("DELETE FROM memories WHERE id = ?", rows)
            self._unindex([name for (name,) in rows])
        return len(rows)

    def expire(self) -> int:
        """Forget all memories whose time to live is over, and return how many there were.

        Nothing recalls them anyway.
        """
        with self.measured("expire"):
            with self._file.writing() as connection:
                ids = tables.take_expired(connection, self._clock())
            self._unindex(ids)
        return len(ids)

    def count(self, session: str | None = None) -> int:
        """Return how many memories a session has, or all sessions together."""
        select = f"SELECT count(*) FROM memories WHERE (? IS NULL OR session = ?) AND {tables.LIVE}"
        with self.measured("count"), self._file.reading() as connection:
            if session is not None:
                checked_text("session", session)
            return int(connection.execute(select, (session, session, self._clock())).fetchone()[0])

    def sessions(self) -> list[str]:
        """Return the names of the sessions, in order."""
        live = f"SELECT session FROM memories WHERE {tables.LIVE}"
        select = f"{live} UNION SELECT session FROM memory_turns ORDER BY session"
        with self.measured("sessions"), self._file.reading() as connection:
            return [name for (name,) in connection.execute(select, (self._clock(),)).fetchall()]

    # --- export and import ---

    def export(self, path: str | os.PathLike[str], *, session: str | None = None) -> int:
        """Write memories and turns to a file of JSON Lines, and return how many.

        The file is there when it is complete, and not before; `import_` reads it. The first line names the model.

        Raises:
            ServiceError: the file cannot be written.
        """
        with self.measured("export"), self._file.reading() as connection:
            if session is not None:
                checked_text("session", session)
            model = tables.settings(connection).get("model")
            return export.write(path, model, tables.lines(connection, self._clock(), session))

    def import_(self, path: str | os.PathLike[str]) -> int:
        """Read a file written by `export`, as a whole or not at all, and return the number of memories and turns.

        An existing id is replaced. Vectors of another model are computed again.

        Raises:
            ServiceError: the file cannot be read, or a line is not valid; it is named.
        """
        with self.measured("import_") as call:
            model, lines = export.read(path)
            call.items = len(lines)
            memories = [line for line in lines if isinstance(line, MemoryLine)]
            numpy = load("numpy", "vector")
            if model is not None and model == self._model:
                blobs = [numpy.asarray(line.vector, numpy.float32).tobytes() for line in memories]
            else:
                blobs = [row.tobytes() for row in self._embed([line.text for line in memories])] if memories else []
            rows: list[Row] = [
                (
                    *(line.id, line.session, line.text, line.importance, line.created_at, line.recalled_at),
                    *(line.expires_at, json_text("metadata", line.metadata), blob),
                )
                for line, blob in zip(memories, blobs, strict=True)
            ]
            turns = [
                (line.id, line.session, line.role, line.content, line.at)
                for line in lines
                if isinstance(line, TurnLine)
            ]
            self._store(rows, turns)
        return len(lines)

    # --- the parts of it ---

    def _rows(
        self, given: Iterable[str], session: str, importance: float, metadata: Mapping[str, object], ttl_s: float | None
    ) -> list[Row]:
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise hint(TypeError(f"remember_many({short(given)}) takes a list of texts"), "Call remember for one.")
        texts = list(given)
        for text in texts:
            if not checked_text("text", text).strip():
                raise ValueError("the text is empty, so it cannot be remembered")
        if not is_number(importance, 0, 1):
            raise ValueError(f"the importance is {short(importance)}, not a number from 0 to 1")
        if not isinstance(metadata, Mapping):
            error = TypeError(f"the metadata is {short(metadata)}, not a mapping")
            raise hint(error, 'It is one of names to values of JSON, such as {"page": 3}.')
        kept = json_text("metadata", dict(metadata))
        vectors: Iterable[Floats] = self._embed(texts) if texts else ()
        now = self._clock()
        expires_at = None if ttl_s is None else now + ttl_s
        return [
            (uuid.uuid4().hex, session, text, float(importance), now, now, expires_at, kept, vector.tobytes())
            for text, vector in zip(texts, vectors, strict=True)
        ]

    def _store(self, rows: list[Row], turns: list[tables.TurnRow]) -> None:
        """Write memories and turns in one step, then tell the index."""
        with self._file.writing() as connection:
            for size in dict.fromkeys(len(row[-1]) // 4 for row in rows):
                self._check_dimension(connection, size)
                settings = {"dimension": str(size), **({"model": self._model} if self._model is not None else {})}
                connection.executemany("INSERT OR IGNORE INTO memory_settings VALUES (?, ?)", settings.items())
            connection.executemany(tables.PUT_MEMORY, rows)
            tables.put_turns(connection, turns, self._turns_max)
            expired = tables.take_expired(connection, self._clock(), EXPIRED_AT_ONCE_MAX)
        self._unindex(expired)
        if self._index is not None and rows:
            self._add_to_index(self._index, rows)

    def _embed(self, texts: Sequence[str]) -> Floats:
        numpy = load("numpy", "vector")
        made = self._embeddings.embed(list(texts))
        try:
            vectors: Floats = numpy.ascontiguousarray(made, numpy.float32)
        except (TypeError, ValueError) as error:
            raise ServiceError(f"embed returned {short(made)}, which is not an array of numbers: {error}") from error
        if vectors.ndim != 2 or len(vectors) != len(texts) or not vectors.shape[1]:
            raise ServiceError(f"embed returned an array of shape {vectors.shape} for {len(texts)} texts, not (n, dim)")
        wrong = numpy.flatnonzero(~numpy.isfinite(vectors).all(axis=1))
        if len(wrong):
            raise ServiceError(f"embed returned a vector with NaN or infinity for {short(texts[int(wrong[0])])}")
        return vectors

    def _check_dimension(self, connection: sqlite3.Connection, size: int) -> None:
        known = tables.settings(connection).get("dimension", str(size))
        if known != str(size):
            raise self._other_model(f"{known} numbers each", f"{size}")

    def _other_model(self, known: str, now: str) -> ServiceError:
        error = ServiceError(f'file "{self._file.path}" holds vectors of {known}, not {now}')
        return hint(error, "Export with the embeddings it was made with, and import into a new file.")

    # --- the index ---

    def _found(self, vector: Floats, k: int, session: str | None) -> list[str] | None:
        """Return the ids that the index finds; None where it cannot choose and all memories are compared."""
        if self._index is None or not vector.any():
            return None
        where = None if session is None else {"session": session}
        return [hit.id for hit in self._index.search(vector, max(CANDIDATES_MIN, 10 * k), where=where)]

    def _add_to_index(self, index: VectorIndex | ServiceHandle[object], rows: Sequence[Row]) -> int:
        """Give the index memories, and return how many it took."""
        numpy = load("numpy", "vector")
        vectors = numpy.stack([numpy.frombuffer(row[-1], numpy.float32) for row in rows])
        # Zeros have no cosine, and an index may refuse them; they stay among the memories that it does not have.
        places = numpy.flatnonzero(vectors.any(axis=1)).tolist()
        if not places:
            return 0
        ids = [rows[place][0] for place in places]
        index.upsert(ids, vectors[places], metadatas=[{"session": rows[place][1]} for place in places])
        with self._file.writing() as connection:
            connection.executemany("UPDATE memories SET is_indexed = 1 WHERE id = ?", [(name,) for name in ids])
        return len(ids)

    def _complete_index(self, index: VectorIndex | ServiceHandle[object]) -> None:
        """Add missing vectors to the index: those in flight at a crash, or all of them if it is new."""
        with self._file.writing() as connection:
            (indexed,) = connection.execute("SELECT count(*) FROM memories WHERE is_indexed = 1").fetchone()
            if index.count() < indexed:
                connection.execute("UPDATE memories SET is_indexed = 0")
            rows = connection.execute(f"SELECT {tables.COLUMNS} FROM memories WHERE is_indexed = 0").fetchall()
        added = sum(
            self._add_to_index(index, rows[start : start + BATCH_ROWS]) for start in range(0, len(rows), BATCH_ROWS)
        )
        if added:
            self.logger.info("index completed memories=%d", added)

    def _unindex(self, ids: list[str]) -> None:
        if self._index is not None and ids:
            self._index.delete(ids)


def model_of(embeddings: object) -> str | None:
    """Return the name of the model behind embeddings, or None if they do not tell.

    Any service has a name; only together with a dimension is it one of a model.
    """
    try:
        dimension, name = (getattr(embeddings, attribute, None) for attribute in ("dimension", "name"))
    except GraphError:
        return None
    return f"{name}" if isinstance(dimension, int) and name is not None else None


def _number(name: str, value: object, note: str) -> float:
    """Return a number of seconds, which may be one of numpy's."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise hint(TypeError(f"{name} is {short(value)}, not a number of seconds"), note)
    try:
        number = float(value)
    except OverflowError:  # a whole number above all that a float holds
        number = math.inf
    if not math.isfinite(number):
        raise hint(ValueError(f"{name} is {short(value)}, not a finite number of seconds"), note)
    return number


def _whole(name: str, value: object) -> int:
    """Return a whole number, not above SQLite's limit: no file holds as many rows."""
    return min(checked_whole(name, value), INTEGER_MAX)


def _weights(weights: object) -> Weights:
    if not isinstance(weights, Weights):
        raise hint(TypeError(f"weights is {short(weights)}, not Weights"), "Write Weights(recency=0), for example.")
    return weights
