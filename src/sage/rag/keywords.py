"""A keyword index: passages are found by their words, ranked by BM25, in SQLite."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from sage.errors import hint, short
from sage.services._shared.sqlite_file import FileService, SqliteFile, checked_path
from sage.services._shared.validation import checked_count, is_number
from sage.services.models.embeddings import FREQUENT_WORDS, well_formed
from sage.services.vectors.contract import Hit
from sage.services.vectors.filters import ALWAYS, OneOf, condition_of, predicate
from sage.services.vectors.rows import check_document, checked_ids, checked_metadatas

if TYPE_CHECKING:
    import os
    import sqlite3
    from collections.abc import Callable, Collection, Mapping, Sequence

    from sage.services.vectors.filters import Condition, Metadata, Where

T = TypeVar("T")

HEADING_WEIGHT_MAX = 1_000_000
"""A heading counts for everything long before; with the largest numbers SQLite has no score any more."""

IN_MEMORY = "Leave it out, and everything is kept in memory."

QUERY_WORDS_MAX = 64
"""A longer question is cut: its first words name its subject, and each word costs a look-up."""

IDS_MAX = 500
"""How many ids one statement names; some builds of SQLite take no more than 999 parameters."""

DOCUMENT_FIELD = "sage:document"
DOCUMENT = f"json_extract(metadata, '$.\"{DOCUMENT_FIELD}\"')"

VERSION = 1
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS keyword_entries (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, document TEXT NOT NULL, metadata TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS keyword_passages ON keyword_entries ({DOCUMENT});
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


class KeywordIndex(FileService):
    """Finds texts by their words, the rarest words counting most: BM25 over the full-text tables of SQLite.

    English words are found in any of their forms, others as they are written; letters of languages without spaces count
    as words. Any number of threads may call it. Every search that begins after a write has returned sees its data, and
    with a path the data survives if the program is killed.

    Args:
        path: the file; it is made if it is not there, its folder is not. Without one, everything is in memory.
        heading_weight: how much more a word counts in the metadata "heading" than in the text, up to a million times.
        frequent_words: words of a query that are not looked up, unless it has no others.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        heading_weight: float = 2.0,
        frequent_words: Collection[str] = FREQUENT_WORDS,
    ) -> None:
        path = path if path is None else checked_path(path, IN_MEMORY)
        super().__init__(SqliteFile(path, "keywords", VERSION, SCHEMA, is_in_memory=path is None))
        if not is_number(heading_weight, 0, HEADING_WEIGHT_MAX):
            raise ValueError(
                f"heading_weight is {short(heading_weight)}, not a number from 0 to {HEADING_WEIGHT_MAX:,}"
            )
        self._heading_weight = heading_weight
        self._frequent_words = frozenset(_listed("frequent_words", frequent_words))

    def describe(self) -> Mapping[str, object]:
        """Return the settings."""
        return {**super().describe(), "heading_weight": self._heading_weight}

    def upsert(
        self, ids: Sequence[str], documents: Sequence[str], *, metadatas: Sequence[Metadata] | None = None
    ) -> None:
        """Store texts, in place of those that have the same ids; all of them, or none if one is wrong.

        Args:
            ids: not empty; of two that are the same, the later one counts.
            documents: as many texts.
            metadatas: as many mappings of names to numbers, texts, True or False; None for one without any.

        Raises:
            ValueError: the lengths differ, an id is empty, or metadata cannot be stored; the id is named.
            TypeError: something has a wrong type.
            ServiceError: the file cannot be written.
        """
        with self.measured("upsert") as call:
            rows = _rows(ids, documents, metadatas)
            call.items = len(rows)
            with self._file.writing() as connection:
                latest = list({row[0]: row for row in rows}.values())
                for number, _ in _candidates(connection, [row[0] for row in latest], ALWAYS):
                    self._remove(connection, number)
                (last,) = connection.execute("SELECT COALESCE(MAX(number), 0) FROM keyword_entries").fetchone()
                connection.executemany(
                    "INSERT INTO keyword_entries (number, id, document, metadata) VALUES (?, ?, ?, ?)",
                    [
                        (number, id_, document, json.dumps(metadata))
                        for number, (id_, document, metadata) in enumerate(latest, last + 1)
                    ],
                )
                connection.executemany(
                    "INSERT INTO keyword_words (rowid, heading, body) VALUES (?, ?, ?)",
                    [(number, *_indexed(*row[1:])) for number, row in enumerate(latest, last + 1)],
                )

    def delete(self, ids: Sequence[str] | None = None, *, where: Where | None = None) -> int:
        """Remove texts, those with the ids that the filter holds for, and return how many there were.

        Raises:
            ValueError: neither ids nor a filter are given, an id is empty, or the filter cannot be understood.
            TypeError: something has a wrong type.
            ServiceError: the file cannot be written.
        """
        with self.measured("delete") as call:
            if ids is None and where is None:
                error = ValueError("delete is given neither ids nor a filter")
                raise hint(error, "delete(where={}) removes all entries.")
            given = None if ids is None else checked_ids(_listed("ids", ids), may_repeat=True)
            call.items = 1 if given is None else len(given)
            condition = condition_of(where)
            holds = predicate(condition)
            with self._file.writing() as connection:
                rows = _candidates(connection, given, condition)
                found = [number for number, metadata in rows if holds(json.loads(metadata))]
                for number in found:
                    self._remove(connection, number)
                return len(found)

    def search(self, query: str, k: int = 10, *, where: Where | None = None) -> list[Hit]:
        """Return the texts that have words of `query`, the best first; their scores are comparable in one answer only.

        Args:
            query: a question or words; signs have no meaning.
            k: how many texts at most.
            where: a filter, see `sage.services.vectors.filters`.

        Raises:
            ValueError: the query is empty, `k` is not a whole number from 1 on, or the filter cannot be understood.
            TypeError: something else has a wrong type.
            ServiceError: the file cannot be read.
        """
        return self.search_batch([query], k, where=where)[0]

    def search_batch(self, queries: Sequence[str], k: int = 10, *, where: Where | None = None) -> list[list[Hit]]:
        """Return the results of `search` for each query.

        Raises:
            ValueError: a query is blank, `k` is not a whole number from 1 on, or the filter cannot be understood.
            TypeError: something else has a wrong type.
            ServiceError: the file cannot be read.
        """
        with self.measured("search") as call:
            given = _listed("queries", queries)
            call.items = len(given)
            k = checked_count("k", k)
            for query in given:
                if not isinstance(query, str):
                    raise TypeError(f"the query {short(query)} is of type {type(query).__name__}, not a string")
                if not query.strip():
                    raise ValueError(f"the query {short(query)} is empty")
            holds = predicate(condition_of(where))
            with self._file.reading() as connection:
                return [self._found(connection, query, k, holds) for query in given]

    def count(self) -> int:
        """Return how many texts there are."""
        with self._file.reading() as connection:
            return int(connection.execute("SELECT COUNT(*) FROM keyword_entries").fetchone()[0])

    def process(self, query: str) -> list[Hit]:
        """Search for one query."""
        return self.search(query)

    def _found(
        self, connection: sqlite3.Connection, query: str, k: int, holds: Callable[[Metadata], bool]
    ) -> list[Hit]:
        words = list(dict.fromkeys(WORD.findall(_spaced(query).lower())))
        wanted = [word for word in words if word not in self._frequent_words] or words
        if not wanted:
            return []
        # Quoted, so that no word is an operator; one with an underscore is a phrase of its parts.
        match = " OR ".join(f'"{word}"' for word in wanted[:QUERY_WORDS_MAX])
        hits: list[Hit] = []
        for id_, document, text, score in connection.execute(FIND, (self._heading_weight, match)):
            metadata = json.loads(text)
            if holds(metadata):
                hits.append(Hit(id_, score, document, metadata))
                if len(hits) == k:
                    break
        return hits

    def _remove(self, connection: sqlite3.Connection, number: int) -> None:
        query = "SELECT document, metadata FROM keyword_entries WHERE number = ?"
        document, metadata = connection.execute(query, (number,)).fetchone()
        # A table without content forgets words only if it is told which ones they were.
        connection.execute(
            "INSERT INTO keyword_words (keyword_words, rowid, heading, body) VALUES ('delete', ?, ?, ?)",
            (number, *_indexed(document, json.loads(metadata))),
        )
        connection.execute("DELETE FROM keyword_entries WHERE number = ?", (number,))


def _listed(what: str, values: Iterable[T]) -> list[T]:
    """Return the arguments as a list, even if they come one by one; a string is not split into letters."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise hint(TypeError(f"{what} is {short(values)}, not a list"), "Put a single one into brackets: [...].")
    return list(values)


def _rows(
    ids: Iterable[str], documents: Iterable[object], metadatas: Iterable[Metadata | None] | None
) -> list[tuple[str, str, Metadata]]:
    """Return the entries to store; the checks are those of vector stores."""
    given, texts = _listed("ids", ids), _listed("documents", documents)
    each: list[Metadata | None] = [None] * len(given) if metadatas is None else _listed("metadatas", metadatas)
    if not len(given) == len(texts) == len(each):
        raise ValueError(f"{len(given)} ids, {len(texts)} documents and {len(each)} metadatas are given")
    names = checked_ids(given, may_repeat=True)
    # Half of a surrogate pair, as some PDF files have it, cannot be written.
    written: list[str] = []
    for name, text in zip(names, texts, strict=True):
        if isinstance(text, str):
            written.append(well_formed(text))
        else:
            check_document(name, text)
    return list(zip(names, written, checked_metadatas(names, each), strict=True))


def _candidates(
    connection: sqlite3.Connection, ids: Sequence[str] | None, condition: Condition
) -> list[tuple[int, str]]:
    """Return number and metadata of the entries that may be meant, by an index where there is one."""
    query = "SELECT number, metadata FROM keyword_entries"
    if ids is not None:
        found: list[tuple[int, str]] = []
        distinct = list(dict.fromkeys(ids))
        for begin in range(0, len(distinct), IDS_MAX):
            some = distinct[begin : begin + IDS_MAX]
            found += connection.execute(f"{query} WHERE id IN ({','.join('?' * len(some))})", some).fetchall()
        return found
    # When documents are indexed again, all of their passages are removed.
    if isinstance(condition, OneOf) and condition.field == DOCUMENT_FIELD and not condition.is_negated:
        names = json.dumps(condition.values)
        return connection.execute(f"{query} WHERE {DOCUMENT} IN (SELECT value FROM json_each(?))", (names,)).fetchall()
    return connection.execute(query).fetchall()


def _indexed(document: str, metadata: Mapping[str, object]) -> tuple[str, str]:
    heading = metadata.get("sage:heading", metadata.get("heading"))
    return _spaced(heading if isinstance(heading, str) else ""), _spaced(document)


def _spaced(text: str) -> str:
    return text if text.isascii() else UNSPACED.sub(r" \1 ", text)
