"""A keyword index: passages are found by their words, ranked by BM25, in SQLite."""

from __future__ import annotations

import json
import re
import sqlite3
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sage.errors import ServiceUnavailableError, hint, short
from sage.services.embeddings import FREQUENT_WORDS, well_formed
from sage.services.filters import OneOf, condition_of, predicate, problem_of
from sage.services.measures import MeasuredService
from sage.services.sqlite_file import SqliteFile
from sage.services.vector_store import Hit

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from sage.services.filters import Condition, Metadata, Where

QUERY_WORDS_MAX = 64
"""A longer question is cut: its first words say what it is about, and each word costs a look-up."""

DOCUMENT = "json_extract(metadata, '$.document')"

VERSION = 1
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS keyword_entries (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, document TEXT NOT NULL, metadata TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS keyword_documents ON keyword_entries ({DOCUMENT});
CREATE VIRTUAL TABLE IF NOT EXISTS keyword_words USING fts5(
    heading, body, content='', tokenize='porter unicode61 remove_diacritics 2'
)
"""
WORD = re.compile(r"\w+")
# The tokenizer of SQLite takes a run of letters of these languages for one word.
UNSPACED = re.compile("([\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
FIND = """
SELECT e.id, e.document, e.metadata, -bm25(keyword_words, ?, 1.0) AS score
FROM keyword_words JOIN keyword_entries e ON e.number = keyword_words.rowid
WHERE keyword_words MATCH ? ORDER BY score DESC, e.number
"""


class MemoryDatabase:
    """A database that is gone when it is closed; one call at a time uses it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Make the tables."""
        self._connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._connection.executescript(SCHEMA)

    def close(self) -> None:
        """Forget everything; a second call does nothing."""
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection.

        Raises:
            ServiceUnavailableError: the database is not open.
        """
        with self._lock:
            if self._connection is None:
                error = ServiceUnavailableError("the keyword index is not open")
                raise hint(error, "Outside of a job, call setup() before anything else, and nothing after cleanup().")
            yield self._connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection for statements that take effect together, or not at all.

        Raises:
            ServiceUnavailableError: the database is not open.
        """
        with self.reading() as connection:
            connection.execute("BEGIN")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def health(self) -> bool:
        """Return whether the database is open."""
        return self._connection is not None


class KeywordIndex(MeasuredService):
    """Finds texts by their words, the rarest words counting most: BM25 over the full-text tables of SQLite.

    English words are found in any of their forms, others as they are written; letters of languages without spaces
    count as words. Any number of threads may call it. What a write stored is seen by every search that begins after it
    has returned, and with a path it is there after the program was killed.

    Args:
        path: the file; it is made if it is not there, its folder is not. Without one, everything is in memory.
        heading_weight: how much more a word counts in the metadata "heading" than in the text.
        frequent_words: words of a query that are not looked up, unless it has no others.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        heading_weight: float = 2.0,
        frequent_words: Collection[str] = FREQUENT_WORDS,
    ) -> None:
        super().__init__()
        if heading_weight < 0:
            raise ValueError(f"heading_weight is {heading_weight}, a negative number")
        self._path = path
        self._heading_weight = heading_weight
        self._frequent_words = frozenset(frequent_words)
        self._database: SqliteFile | MemoryDatabase = (
            MemoryDatabase() if path is None else SqliteFile(path, "keywords", VERSION, SCHEMA)
        )

    def setup(self) -> None:
        """Open the file.

        Raises:
            ServiceError: it cannot be opened, or is no database.
        """
        self._database.open()

    def cleanup(self) -> None:
        """Close the file."""
        self._database.close()

    def health(self) -> bool:
        """Return whether the index can be read."""
        return self._database.health()

    def describe(self) -> Mapping[str, object]:
        """Return the settings."""
        where = "memory" if self._path is None else str(self._path)
        return {**super().describe(), "path": where, "heading_weight": self._heading_weight}

    def upsert(
        self, ids: Sequence[str], documents: Sequence[str], *, metadatas: Sequence[Metadata] | None = None
    ) -> None:
        """Store texts, in place of those that have the same ids; all of them, or none if one is wrong.

        Args:
            ids: not empty; of two that are the same, the later one counts.
            documents: as many texts.
            metadatas: as many mappings of names to numbers, texts, True or False.

        Raises:
            ValueError: the lengths differ, an id is empty, or metadata cannot be stored; the id is named.
            ServiceError: the file cannot be written.
        """
        each = [{}] * len(ids) if metadatas is None else list(metadatas)
        if not len(ids) == len(documents) == len(each):
            raise ValueError(f"{len(ids)} ids, {len(documents)} documents and {len(each)} metadatas are given")
        rows = [_checked(*row) for row in zip(ids, documents, each, strict=True)]
        with self.measured("upsert", len(rows)), self._database.writing() as connection:
            for id_, document, metadata in {row[0]: row for row in rows}.values():
                self._remove(connection, "id = ?", id_)
                number = connection.execute(
                    "INSERT INTO keyword_entries (id, document, metadata) VALUES (?, ?, ?)",
                    (id_, document, json.dumps(metadata)),
                ).lastrowid
                connection.execute(
                    "INSERT INTO keyword_words (rowid, heading, body) VALUES (?, ?, ?)",
                    (number, *_indexed(document, metadata)),
                )

    def delete(self, ids: Sequence[str] | None = None, *, where: Where | None = None) -> int:
        """Remove texts, those with the ids that the filter holds for, and return how many there were.

        Raises:
            ValueError: neither ids nor a filter are given, or the filter cannot be understood.
            ServiceError: the file cannot be written.
        """
        if ids is None and where is None:
            raise hint(ValueError("delete is given neither ids nor a filter"), "delete(where={}) removes all entries.")
        condition = condition_of(where)
        holds = predicate(condition)
        with self.measured("delete", 1 if ids is None else len(ids)), self._database.writing() as connection:
            rows = _candidates(connection, ids, condition)
            found = [number for number, metadata in rows if holds(json.loads(metadata))]
            for number in found:
                self._remove(connection, "number = ?", number)
            return len(found)

    def search(self, query: str, k: int = 10, *, where: Where | None = None) -> list[Hit]:
        """Return the texts that have words of `query`, the best first; their scores are comparable in one answer only.

        Args:
            query: a question or words; signs have no meaning.
            k: how many texts at most.
            where: a filter, see `sage.services.filters`.

        Raises:
            ValueError: the query is blank, `k` is below 1, or the filter cannot be understood.
            ServiceError: the file cannot be read.
        """
        return self.search_batch([query], k, where=where)[0]

    def search_batch(self, queries: Sequence[str], k: int = 10, *, where: Where | None = None) -> list[list[Hit]]:
        """Return for each query what `search` would.

        Raises:
            ValueError: a query is blank, `k` is below 1, or the filter cannot be understood.
            ServiceError: the file cannot be read.
        """
        if k < 1:
            raise ValueError(f"k is {k}, but a search returns at least 1 text")
        for query in queries:
            if not query.strip():
                raise ValueError(f"the query {short(query)} is blank")
        with self.measured("search", len(queries)), self._database.reading() as connection:
            return [self._found(connection, query, k, where) for query in queries]

    def count(self) -> int:
        """Return how many texts there are."""
        with self._database.reading() as connection:
            return int(connection.execute("SELECT COUNT(*) FROM keyword_entries").fetchone()[0])

    def process(self, query: str) -> list[Hit]:
        """Search for one query."""
        return self.search(query)

    def _found(self, connection: sqlite3.Connection, query: str, k: int, where: Where | None) -> list[Hit]:
        words = list(dict.fromkeys(WORD.findall(_spaced(query).lower())))
        wanted = [word for word in words if word not in self._frequent_words] or words
        if not wanted:
            return []
        # Quoted, so that no word is an operator; one with an underscore is a phrase of its parts.
        match = " OR ".join(f'"{word}"' for word in wanted[:QUERY_WORDS_MAX])
        holds = predicate(condition_of(where))
        hits: list[Hit] = []
        for id_, document, text, score in connection.execute(FIND, (self._heading_weight, match)):
            metadata = json.loads(text)
            if holds(metadata):
                hits.append(Hit(id_, score, document, metadata))
                if len(hits) == k:
                    break
        return hits

    def _remove(self, connection: sqlite3.Connection, condition: str, value: str | int) -> None:
        query = f"SELECT number, document, metadata FROM keyword_entries WHERE {condition}"
        row = connection.execute(query, (value,)).fetchone()
        if row is None:
            return
        number, document, metadata = row
        # A table without content forgets words only if it is told which ones they were.
        connection.execute(
            "INSERT INTO keyword_words (keyword_words, rowid, heading, body) VALUES ('delete', ?, ?, ?)",
            (number, *_indexed(document, json.loads(metadata))),
        )
        connection.execute("DELETE FROM keyword_entries WHERE number = ?", (number,))


def _checked(id_: str, document: str, metadata: Metadata) -> tuple[str, str, dict[str, object]]:
    if not id_:
        raise ValueError("an id is empty")
    for name, value in metadata.items():
        problem = problem_of(value)
        if problem is not None:
            raise ValueError(f"metadata {short(name)} of id {short(id_)} {problem}")
    # Half of a surrogate pair, as some PDF files have it, cannot be written.
    return id_, well_formed(document), dict(metadata)


def _candidates(
    connection: sqlite3.Connection, ids: Sequence[str] | None, condition: Condition
) -> list[tuple[int, str]]:
    """Return number and metadata of the entries that may be meant, by an index where there is one."""
    query = "SELECT number, metadata FROM keyword_entries"
    if ids is not None:
        return connection.execute(
            f"{query} WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(list(ids)),)
        ).fetchall()
    # All passages of some documents are what is removed when these are indexed again.
    if isinstance(condition, OneOf) and condition.field == "document" and not condition.is_negated:
        names = json.dumps(condition.values)
        return connection.execute(f"{query} WHERE {DOCUMENT} IN (SELECT value FROM json_each(?))", (names,)).fetchall()
    return connection.execute(query).fetchall()


def _indexed(document: str, metadata: Mapping[str, object]) -> tuple[str, str]:
    heading = metadata.get("heading")
    return _spaced(heading if isinstance(heading, str) else ""), _spaced(document)


def _spaced(text: str) -> str:
    return UNSPACED.sub(r" \1 ", text)
