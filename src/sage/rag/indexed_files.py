"""Which files are in an index, so that those that have not changed are not read again, and those that are gone go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sage.functions import ProcessFunction
from sage.services._shared.sqlite_file import FileService, SqliteFile, checked_path

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    from sage.rag.documents import Passage
    from sage.rag.keywords import KeywordIndex
    from sage.service import ServiceHandle
    from sage.services.vectors.contract import VectorStore

    Store = ServiceHandle[KeywordIndex] | KeywordIndex | ServiceHandle[VectorStore] | VectorStore

IN_MEMORY = "Leave it out, and every run reads every file."

VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS indexed_files (name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS indexed_state (key TEXT PRIMARY KEY, value TEXT NOT NULL)
"""
LOADERS_VERSION = "1"
"""Changes whenever the same file gives other passages."""

UNFINISHED = ""
"""Stands for the fingerprint of a file whose passages may be in the stores, all of them or some: it is read again, and
what is there of it goes when the file is gone."""

NAMES_MAX = 500
"""How many files one filter names at most."""


class IndexedFiles(FileService):
    """Remembers the files of an index by the fingerprint of their content.

    Give it to `Files`, which leaves out the files that have not changed, to `Index`, and to `Prune`, which removes the
    passages of files that are gone. A file counts as indexed once its job has ended by itself, if all of it could be
    read and stored. The run after one that was killed repeats the files that the killed one had to do.

    Where the stores hold another number of entries than after the last run, as when their files were removed, every
    file is read again. So give it the only places, and the only pipeline, that write to these stores.

    Args:
        path: an SQLite file; None forgets everything at the end.
        stores: the keyword index and the vector store that the passages are in.
        settings: everything else that the passages depend on, such as the size of passages and the model of the
            vectors; if it differs from the last run's, every file is read again.
    """

    def __init__(self, path: str | os.PathLike[str] | None, *stores: Store, settings: str = "") -> None:
        path = path if path is None else checked_path(path, IN_MEMORY)
        super().__init__(SqliteFile(path, "files", VERSION, SCHEMA, is_in_memory=path is None))
        self._stores = stores
        self._settings = f"{LOADERS_VERSION} {settings}"
        self._known: dict[str, str] = {}
        self._found: dict[str, str] = {}
        self._failed: set[str] = set()
        self._is_whole = False

    def setup(self) -> None:
        """Open the file and compare the stores with it.

        Raises:
            ServiceError: the file cannot be opened, or a store cannot answer.
        """
        self._begin()
        self._file.open()
        with self._file.reading() as connection:
            state = dict(connection.execute("SELECT key, value FROM indexed_state"))
            self._known = dict(connection.execute("SELECT name, fingerprint FROM indexed_files"))
        counts = self._counts()
        # After a run that was killed, the stores hold some more and some less.
        was_killed = state.get("is_done") == "no" and "0" not in counts
        expected = counts if was_killed else state.get("counts", "").split()
        if expected != counts or state.get("settings") != self._settings:
            self._known = dict.fromkeys(self._known, UNFINISHED)
        self._write({"is_done": "no", "settings": self._settings}, self._known.items())

    def describe(self) -> Mapping[str, object]:
        """Return the settings, and how many files are known."""
        return {**super().describe(), "files": sum(map(bool, self._known.values()))}

    def is_unchanged(self, name: str, fingerprint: str) -> bool:
        """Return whether a file is in the index with this content; if not, note that passages of it may follow."""
        self._found[name] = fingerprint
        if self._known.get(name) == fingerprint:
            return True
        self._write({}, [(name, UNFINISHED)])
        return False

    def found_all(self) -> None:
        """Take note that every file was found, so that those which were not are gone."""
        self._is_whole = True

    def failed(self, name: str) -> None:
        """Take note that something of a file could not be read or stored, so that the next run tries it again."""
        self._failed.add(name)

    def finish(self) -> int:
        """Remove the passages of files that changed or are gone, remember the others, and return how many are new.

        Call it when everything is stored.
        """
        gone = [name for name in self._known if name not in self._found] if self._is_whole else []
        changed = {name: found for name, found in self._found.items() if self._known.get(name) != found}
        stale = [*gone, *changed]
        for begin in range(0, len(stale), NAMES_MAX):
            names = stale[begin : begin + NAMES_MAX]
            current = [changed[name] for name in names if name in changed]
            where = {"sage:file": {"$in": names}, "sage:fingerprint": {"$nin": current}}
            for store in self._stores:
                store.delete(where=where)
        ended = {name: UNFINISHED if name in self._failed else found for name, found in changed.items()}
        state = {"is_done": "yes", "settings": self._settings, "counts": " ".join(self._counts())}
        self._write(state, ended.items(), gone)
        self._known = {name: found for name, found in {**self._known, **ended}.items() if name not in gone}
        self._begin()
        return sum(map(bool, ended.values()))

    def _begin(self) -> None:
        self._found, self._failed, self._is_whole = {}, set(), False

    def _counts(self) -> list[str]:
        return [str(store.count()) for store in self._stores]

    def _write(self, state: Mapping[str, str], files: Iterable[tuple[str, str]], forgotten: Sequence[str] = ()) -> None:
        with self._file.writing() as connection:
            connection.executemany("DELETE FROM indexed_files WHERE name = ?", [(name,) for name in forgotten])
            connection.executemany("INSERT OR REPLACE INTO indexed_files VALUES (?, ?)", list(files))
            connection.executemany("INSERT OR REPLACE INTO indexed_state VALUES (?, ?)", list(state.items()))


class Prune(ProcessFunction):
    """Hands passages on, and at the end removes from the index the passages of files that changed or are gone.

    It stands behind `Index`, in one task. If the job fails or is stopped, it removes nothing.

    Args:
        indexed: knows the files that are in the index.
    """

    def __init__(self, indexed: ServiceHandle[IndexedFiles] | IndexedFiles) -> None:
        self._indexed = indexed

    def execute(self, data: Passage) -> list[Passage]:
        """Return the passage."""
        return [data]

    def finish(self) -> list[Passage]:
        """Remove the passages, and remember the files."""
        self._indexed.finish()
        return []
