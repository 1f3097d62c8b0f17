"""The tables of a memory, their queries, and the objects made from their rows."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sage._extras import load
from sage.services.memory.export import MemoryLine, TurnLine
from sage.services.memory.ranking import Candidate, Score

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Mapping

TurnRow = tuple[str, str, str, str, float]
Row = tuple[str, str, str, float, float, float, float | None, str, bytes]

COLUMNS = "id, session, text, importance, created_at, recalled_at, expires_at, metadata, vector"
PUT_TURN = "INSERT OR REPLACE INTO memory_turns (id, session, role, content, at) VALUES (?, ?, ?, ?, ?)"
LIVE = "(expires_at IS NULL OR expires_at > ?)"
PUT_MEMORY = f"INSERT OR REPLACE INTO memories ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"

SCHEMA = """
CREATE TABLE IF NOT EXISTS memory_settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS memory_turns (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, session TEXT NOT NULL, role TEXT NOT NULL,
    content TEXT NOT NULL, at REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS memory_turns_session ON memory_turns (session, number);
CREATE TABLE IF NOT EXISTS memories (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, session TEXT NOT NULL, text TEXT NOT NULL,
    importance REAL NOT NULL, created_at REAL NOT NULL, recalled_at REAL NOT NULL, expires_at REAL,
    metadata TEXT NOT NULL, is_indexed INTEGER NOT NULL DEFAULT 0, vector BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS memories_session ON memories (session);
CREATE INDEX IF NOT EXISTS memories_new ON memories (session) WHERE is_indexed = 0;
CREATE INDEX IF NOT EXISTS memories_expiry ON memories (expires_at) WHERE expires_at IS NOT NULL
"""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: who: "user", "assistant" or another.
        content: the text.
        at: when, in seconds since the epoch.
    """

    role: str
    content: str
    at: float


@dataclass(frozen=True, slots=True)
class Recollection:
    """A memory that came to mind.

    Attributes:
        id: the id that `forget` takes.
        text: the remembered text.
        session: whose it is.
        score: the sum of the three parts, relevance scaled, each weighed; it compares memories of one call only.
        relevance: the cosine of query and memory.
        recency: 1 for one that was just made or recalled, and half as much after each half-life.
        importance: as given by the caller.
        created_at: when it was remembered, in seconds since the epoch.
        metadata: the values kept with it.
    """

    id: str
    text: str
    session: str
    score: float
    relevance: float
    recency: float
    importance: float
    created_at: float
    metadata: Mapping[str, object] = field(default_factory=dict)


def settings(connection: sqlite3.Connection) -> dict[str, str]:
    """Return the file's settings for vectors: "model" and "dimension"."""
    return dict(connection.execute("SELECT name, value FROM memory_settings").fetchall())


def candidates(
    connection: sqlite3.Connection, now: float, session: str | None, ids: list[str] | None
) -> list[Candidate]:
    """Return the memories that may be recalled: all of them, or those of `ids` and those that no index has yet."""
    select = f"SELECT number, importance, recalled_at, vector FROM memories WHERE {LIVE}"
    bounds: list[object] = [now]
    if session is not None:
        select += " AND session = ?"
        bounds.append(session)
    if ids is None:
        return [Candidate(*row) for row in connection.execute(select, bounds).fetchall()]
    new = connection.execute(f"{select} AND is_indexed = 0", bounds).fetchall()
    named = f"{select} AND is_indexed = 1 AND id IN (SELECT value FROM json_each(?))"
    return [Candidate(*row) for row in new + connection.execute(named, [*bounds, json.dumps(ids)]).fetchall()]


def unknown(connection: sqlite3.Connection, ids: list[str]) -> list[str]:
    """Return those of the ids that no memory has."""
    select = "SELECT id FROM memories WHERE id IN (SELECT value FROM json_each(?))"
    known = {name for (name,) in connection.execute(select, (json.dumps(ids),)).fetchall()}
    return [name for name in ids if name not in known]


def put_turns(connection: sqlite3.Connection, turns: list[TurnRow], turns_max: int) -> None:
    """Add turns to their sessions, and remove those that are too many."""
    connection.executemany(PUT_TURN, turns)
    newest = "SELECT number FROM memory_turns WHERE session = ? ORDER BY number DESC LIMIT ?"
    for session in {turn[1] for turn in turns}:
        old = f"DELETE FROM memory_turns WHERE session = ? AND number NOT IN ({newest})"
        connection.execute(old, (session, session, turns_max))


def take_expired(connection: sqlite3.Connection, now: float, count_max: int = -1) -> list[str]:
    """Remove memories whose time to live is over, and return their ids."""
    rows = connection.execute("SELECT id FROM memories WHERE expires_at <= ? LIMIT ?", (now, count_max)).fetchall()
    connection.executemany("DELETE FROM memories WHERE id = ?", rows)
    return [name for (name,) in rows]


def recollection(connection: sqlite3.Connection, score: Score) -> Recollection:
    """Return a memory with its score."""
    select = "SELECT id, text, session, created_at, metadata FROM memories WHERE number = ?"
    name, text, session, created_at, metadata = connection.execute(select, (score.number,)).fetchone()
    return Recollection(name, text, session, *score[1:], created_at, json.loads(metadata))


def lines(connection: sqlite3.Connection, now: float, session: str | None) -> Iterator[MemoryLine | TurnLine]:
    """Yield memories and turns as they are exported."""
    numpy = load("numpy", "vector")
    select = f"SELECT {COLUMNS} FROM memories WHERE (? IS NULL OR session = ?) AND {LIVE} ORDER BY number"
    for row in connection.execute(select, (session, session, now)):
        vector = numpy.frombuffer(row[-1], numpy.float32).tolist()
        yield MemoryLine(*[*row[:-2], json.loads(row[-2]), vector])
    select = "SELECT id, session, role, content, at FROM memory_turns WHERE (? IS NULL OR session = ?) ORDER BY number"
    for row in connection.execute(select, (session, session)):
        yield TurnLine(*row)
