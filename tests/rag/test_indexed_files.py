"""Files that have not changed are not read again, and the passages of those that are gone go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rag.small_pdf import pdf_of
from services.kept import left_clean

from sage import FunctionError, LocalEnvironment
from sage.rag.documents import Document, Passage
from sage.rag.files import Files
from sage.rag.indexed_files import IndexedFiles, Prune
from sage.rag.keywords import KeywordIndex
from sage.rag.loaders import Load
from sage.rag.retrieval import Index
from sage.rag.splitters import SplitByStructure
from sage.services.models.embeddings import HashingEmbeddings
from sage.services.vectors.sqlite import SqliteStore


class Folder:
    """A folder of documents and its index."""

    def __init__(self, folder: Path) -> None:
        self.docs = folder / "docs"
        self.docs.mkdir()
        self.index = folder / "index"
        self.index.mkdir()

    def write(self, name: str, content: str | bytes) -> None:
        (self.docs / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    def run(self, settings: str = "", fail: str = "", path: Path | None = None) -> tuple[list[str], list[str]]:
        """Index the folder; return the names of the documents that were read, and the ids that are stored then."""
        read: list[str] = []

        def note(document: Document) -> Document:
            if document.id == fail:
                raise RuntimeError("fails")
            read.append(document.id)
            return document

        with left_clean():
            env = LocalEnvironment("index")
            keywords = env.register_service("keywords", KeywordIndex, self.index / "words.db")
            vectors = env.register_service("vectors", SqliteStore, self.index / "vectors.db")
            embeddings = env.register_service("embeddings", HashingEmbeddings)
            place = path or self.index / "files.db"
            indexed = env.register_service("indexed", IndexedFiles, place, keywords, vectors, settings=settings)
            failed = env.dead_letters()
            (
                env.from_batch(Files, self.docs, indexed=indexed)
                .flatmap(Load, on_error=failed)
                .map(note)
                .flatmap(SplitByStructure)
                .map_batches(
                    Index, keywords=keywords, vectors=vectors, embeddings=embeddings, indexed=indexed, max_records=4
                )
                .process(Prune, indexed)
                .sink(lambda _: None)
            )
            failed.sink(lambda letter: read.append(f"! {letter.error}"))
            try:
                env.submit(autostop=True)
            finally:
                stored = self.stored()
        return read, stored

    def stored(self) -> list[str]:
        words = KeywordIndex(self.index / "words.db")
        words.setup()
        ids = sorted(hit.id for hit in words.search("shop", 100))
        assert len(ids) == words.count()
        words.cleanup()
        vectors = SqliteStore(self.index / "vectors.db")
        vectors.setup()
        assert vectors.count() == len(ids)
        vectors.cleanup()
        return ids


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path)
    made.write("a.md", "# One\n\nThe shop.\n\n# Two\n\nThe shop too.")
    made.write("b.pdf", pdf_of("shop one", "shop two"))
    made.write("c.jsonl", '{"id": 1, "text": "shop c1"}\n{"id": 2, "text": "shop c2"}\n')
    return made


IDS = ["a.md#one", "a.md#two", "b.pdf#page=1", "b.pdf#page=2", "c.jsonl#1", "c.jsonl#2"]
DOCUMENTS = ["a.md", "b.pdf#page=1", "b.pdf#page=2", "c.jsonl#1", "c.jsonl#2"]


def test_only_what_changed_is_read_again(folder: Folder) -> None:
    assert folder.run() == (DOCUMENTS, IDS)
    assert folder.run() == ([], IDS)
    folder.write("b.pdf", pdf_of("shop one"))
    folder.write("c.jsonl", '{"id": 2, "text": "shop c2"}\n')
    folder.write("d.txt", "A new shop.")
    ids = ["a.md#one", "a.md#two", "b.pdf#page=1", "c.jsonl#2", "d.txt"]
    assert folder.run() == (["b.pdf#page=1", "c.jsonl#2", "d.txt"], ids)
    (folder.docs / "a.md").unlink()
    folder.write("d.txt", "")
    assert folder.run() == (["d.txt"], ["b.pdf#page=1", "c.jsonl#2"])
    assert folder.run() == ([], ["b.pdf#page=1", "c.jsonl#2"])


def test_other_settings_and_lost_stores_make_every_file_new(folder: Folder) -> None:
    assert folder.run("200") == (DOCUMENTS, IDS)
    assert folder.run("100") == (DOCUMENTS, IDS)
    assert folder.run("100") == ([], IDS)
    (folder.index / "words.db").unlink()
    assert folder.run("100") == (DOCUMENTS, IDS)
    (folder.index / "vectors.db").unlink()
    assert folder.run("100") == (DOCUMENTS, IDS)
    (folder.index / "files.db").unlink()
    assert folder.run("100") == (DOCUMENTS, IDS)
    assert folder.run("100") == ([], IDS)


def test_a_file_that_is_gone_goes_also_when_every_file_is_read_again(folder: Folder) -> None:
    folder.run("200")
    (folder.docs / "a.md").unlink()
    assert folder.run("100")[1] == IDS[2:]


@pytest.mark.parametrize("settings", ["", "other"])
def test_passages_of_a_run_that_never_ended_go_when_their_file_is_gone(tmp_path: Path, settings: str) -> None:
    words = KeywordIndex(tmp_path / "words.db")
    words.setup()
    killed = IndexedFiles(tmp_path / "files.db", words)
    killed.setup()
    assert not killed.is_unchanged("d.txt", "1")
    passage = Passage("d.txt", "The shop.", "d.txt", origin={"file": "d.txt", "fingerprint": "1"})
    Index(keywords=words).execute([passage])
    assert words.count() == 1
    killed.cleanup()
    following = IndexedFiles(tmp_path / "files.db", words, settings=settings)
    following.setup()
    following.found_all()
    assert following.finish() == 0
    assert words.count() == 0
    following.cleanup()
    words.cleanup()


def test_a_file_that_cannot_be_read_is_tried_and_named_each_time(folder: Folder) -> None:
    folder.run()
    folder.write("b.pdf", b"no pdf")
    folder.write("c.jsonl", '{"id": 1, "text": "shop c1"}\nno json\n')
    read, ids = folder.run()
    assert sorted(each.partition(":")[0] for each in read) == [
        '! file "b.pdf"',
        '! file "c.jsonl", line 2',
        "c.jsonl#1",
    ]
    assert ids == ["a.md#one", "a.md#two", "c.jsonl#1"]
    again, after = folder.run()
    assert (sorted(again), after) == (sorted(read), ids)
    folder.write("c.jsonl", '{"id": 1, "text": "shop c1"}\n')
    assert "c.jsonl#1" in folder.run()[0]
    assert len(folder.run()[0]) == 1


def test_a_run_that_failed_removes_nothing_and_is_made_good_for(folder: Folder) -> None:
    folder.run()
    (folder.docs / "a.md").unlink()
    folder.write("b.pdf", pdf_of("shop new"))
    folder.write("c.jsonl", '{"id": 3, "text": "shop c3"}\n')
    with pytest.raises(FunctionError, match="fails"):
        folder.run(fail="c.jsonl#3")
    assert {"a.md#one", "b.pdf#page=2", "c.jsonl#1"} <= set(folder.stored())
    # The content that was indexed before the failed run counts as new, as the failed run has begun to replace it.
    folder.write("b.pdf", pdf_of("shop one", "shop two"))
    read, ids = folder.run()
    assert read == ["b.pdf#page=1", "b.pdf#page=2", "c.jsonl#3"]
    assert ids == ["b.pdf#page=1", "b.pdf#page=2", "c.jsonl#3"]
    assert folder.run() == ([], ids)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_not_gone(folder: Folder) -> None:
    (folder.docs / "deep").mkdir()
    folder.write("deep/x.txt", "The shop.")
    _, ids = folder.run()
    (folder.docs / "deep").chmod(0)
    read, after = folder.run()
    (folder.docs / "deep").chmod(0o700)
    assert len(read) == 1
    assert after == ids
