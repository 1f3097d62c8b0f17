"""Files of every format become documents, and what cannot be read is an error that names its place."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
from rag.small_pdf import pdf_of
from services.kept import left_clean

from sage import DeadLetter, FunctionError, GraphError, JobError, LocalEnvironment
from sage.rag.documents import Document, DocumentError
from sage.rag.loaders import Files, Load
from sage.rag.splitters import SplitByStructure
from sage.testing import StepBackend

PAGE = """<!doctype html>
<html><head><meta charset="utf-8"><title> The  guide </title><style>p { color: red }</style></head>
<body><nav>Home | About</nav><script>alert("no")</script>
<h1>Guide</h1><p>First <b>bold</b> words
on two lines.</p><h2>Keys <i>and</i> tasks</h2><ul><li>one<li>two</ul>
<pre><code>if x:
    y()
</code></pre>
<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table><p>One<br>Two &amp; three</body></html>
"""

PAGE_TEXT = """\
# Guide

First bold words on two lines.

## Keys and tasks

- one
- two

```
if x:
    y()
```

a | b

1 | 2

One
Two & three"""


def loaded(*places: Path, text_field: str = "text") -> tuple[list[Document], list[str]]:
    """Load with dead letters and return the documents and the errors."""
    documents: list[Document] = []
    letters: list[DeadLetter] = []
    with left_clean():
        env = LocalEnvironment("load")
        failed = env.dead_letters()
        env.from_batch(Files, *places).flatmap(Load, on_error=failed, text_field=text_field).sink(documents.append)
        failed.sink(letters.append)
        env.submit(autostop=True)
    assert all(isinstance(letter.error, DocumentError) for letter in letters)
    return documents, [str(letter.error) for letter in letters]


def problem_of(path: Path, **settings: object) -> str:
    load = partial(Load, **settings)()  # type: ignore[arg-type]
    with pytest.raises(DocumentError) as caught:
        list(load.execute(path))
    assert caught.value.file == path.name
    return str(caught.value)


class TestFormats:
    def test_a_folder_is_read_in_the_order_of_its_names(self, tmp_path: Path) -> None:
        (tmp_path / "deep" / ".hidden").mkdir(parents=True)
        (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfplain\r\ntext\r\n")
        (tmp_path / "a.md").write_text("# The title #\n\nWords.\n", "utf-8")
        (tmp_path / "deep" / "c.markdown").write_text("no title", "utf-8")
        (tmp_path / "deep" / ".hidden" / "d.txt").write_text("hidden", "utf-8")
        (tmp_path / ".e.txt").write_text("hidden", "utf-8")
        (tmp_path / "picture.png").write_bytes(b"\x89PNG")
        documents, errors = loaded(tmp_path)
        assert errors == []
        assert documents == [
            Document("a.md", "# The title #\n\nWords.\n", {"file": "a.md", "format": "markdown", "title": "The title"}),
            Document("b.txt", "plain\ntext\n", {"file": "b.txt", "format": "text"}),
            Document("deep/c.markdown", "no title", {"file": "deep/c.markdown", "format": "markdown"}),
        ]

    def test_html_keeps_headings_lists_tables_and_code(self, tmp_path: Path) -> None:
        (tmp_path / "guide.HTML").write_text(PAGE, "utf-8")
        documents, errors = loaded(tmp_path)
        metadata = {"file": "guide.HTML", "format": "html", "title": "The guide"}
        assert (documents, errors) == ([Document("guide.HTML", PAGE_TEXT, metadata)], [])

    @pytest.mark.parametrize(
        ("page", "text"),
        [
            ("<table><tr><td>red<td>blue<tr><td>cat<td>dog</table>", "red | blue\n\ncat | dog"),
            ("<table><tr><th></th><th>b</th><tr><td>|<td></table>", "| b\n\n| |"),
            ("<p>| no cell |<p>next", "| no cell |\n\nnext"),
            ("<select><option>a<option>b</select>after", "a\nb\n\nafter"),
            ("<textarea>a</textarea>b", "a\n\nb"),
            ("<dl><dt>red<dd>a colour<dt>cat</dl>", "red\n\na colour\n\ncat"),
        ],
    )
    def test_html_keeps_words_apart_where_tags_are_not_closed(self, tmp_path: Path, page: str, text: str) -> None:
        (tmp_path / "a.html").write_text(page, "utf-8")
        assert [document.text for document in loaded(tmp_path)[0]] == [text]

    def test_html_is_decoded_as_it_declares(self, tmp_path: Path) -> None:
        page = '<meta charset="iso-8859-1"><p>Caf\u00e9'
        (tmp_path / "a.html").write_bytes(page.encode("latin-1"))
        assert [document.text for document in loaded(tmp_path)[0]] == ["Caf\u00e9"]

    def test_each_page_of_a_pdf_with_text_is_a_document(self, tmp_path: Path) -> None:
        (tmp_path / "report.pdf").write_bytes(pdf_of("First page", "", "Third page"))
        documents, errors = loaded(tmp_path)
        assert errors == []
        assert [(document.id, document.text) for document in documents] == [
            ("report.pdf#page=1", "First page"),
            ("report.pdf#page=3", "Third page"),
        ]
        assert documents[1].metadata == {"file": "report.pdf", "format": "pdf", "page": 3}

    def test_each_line_of_json_lines_is_a_document(self, tmp_path: Path) -> None:
        rows = [{"id": 7, "body": "one", "lang": "en", "tags": ["x"], "file": "mine"}, {"body": "two", "score": 0.5}]
        lines = "\n\n".join(json.dumps(row) for row in rows)
        (tmp_path / "faq.jsonl").write_text(lines, "utf-8")
        documents, errors = loaded(tmp_path, text_field="body")
        assert errors == []
        about = {"file": "faq.jsonl", "format": "jsonl"}
        assert documents == [
            Document("faq.jsonl#7", "one", {"lang": "en", "line": 1, **about, "file": "mine"}),
            Document("faq.jsonl#line=3", "two", {"score": 0.5, "line": 3, **about}),
        ]

    def test_no_two_passages_have_the_same_id_whatever_ids_their_lines_have(self, tmp_path: Path) -> None:
        ids = ["a", "a#b", "a~2", "a%23b", "a%b", "#", "%23"]
        text = "One. " * 300 + "\n\n# b\n\n" + "Two. " * 300
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": id_, "text": text}) for id_ in ids), "utf-8")
        documents, errors = loaded(tmp_path)
        assert errors == []
        assert [document.id.removeprefix("a.jsonl#") for document in documents] == [
            *("a", "a%23b", "a%7E2", "a%2523b", "a%b", "%23", "%2523")
        ]
        passages = [passage.id for document in documents for passage in SplitByStructure().execute(document)]
        assert len(passages) == len(set(passages)) > 3 * len(ids)

    def test_halves_of_characters_are_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"id": "1\\ud800", "text": "x \\udfff.", "k\\ud800": "v\\ud800"}', "utf-8")
        (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("coffee", "utf-8")
        documents, errors = loaded(tmp_path)
        assert errors == []
        assert documents == [
            Document("a.jsonl#1?", "x ?.", {"k?": "v?", "file": "a.jsonl", "format": "jsonl", "line": 1}),
            Document("caf\\udce9.txt", "coffee", {"file": "caf\\udce9.txt", "format": "text"}),
        ]

    def test_paths_are_records_too(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one", "utf-8")
        (tmp_path / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n', "utf-8")
        texts = [
            document.text
            for path in (str(tmp_path / "a.txt"), tmp_path / "b.jsonl")
            for document in Load().execute(path)
        ]
        assert texts == ["one", "two", "three"]

    def test_every_schedule_gives_the_same(self, tmp_path: Path) -> None:
        for number in range(20):
            (tmp_path / f"{number:02}.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n', "utf-8")
        expected = [f"{number:02}.jsonl#line={line}" for number in range(20) for line in (1, 2)]
        for seed in range(20):
            ids: list[str] = []
            env = LocalEnvironment("load", backend=partial(StepBackend, seed))
            env.from_batch(Files, tmp_path).flatmap(Load).map(lambda document: document.id).sink(ids.append)
            env.submit(autostop=True)
            assert ids == expected


def test_a_file_that_comes_again_may_have_moved_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    load = Load()
    for lines in ("one", "two one"):
        path.write_text("".join(f'{{"id": "{name}", "text": "{name}"}}\n' for name in lines.split()), "utf-8")
        assert " ".join(document.text for document in load.execute(path)) == lines


class TestPlaces:
    @staticmethod
    def made(folder: Path, *names: str) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name, "utf-8")

    @staticmethod
    def names(*places: Path | str) -> list[str]:
        documents, errors = loaded(*map(Path, places))
        assert errors == []
        assert len({document.id for document in documents}) == len(documents)
        assert [document.metadata["file"] for document in documents] == [document.id for document in documents]
        return [document.id for document in documents]

    def test_several_folders_stand_in_the_names(self, tmp_path: Path) -> None:
        self.made(tmp_path, "a/guide.md", "a/deep/more.md", "b/guide.md")
        assert self.names(tmp_path / "a", tmp_path / "b") == ["a/guide.md", "a/deep/more.md", "b/guide.md"]
        assert self.names(tmp_path / "a") == ["guide.md", "deep/more.md"]

    def test_folders_and_files_of_one_name_take_what_stands_before_it(self, tmp_path: Path) -> None:
        self.made(tmp_path, "one/docs/guide.md", "two/docs/guide.md", "guide.md", "one/guide.md")
        places = [tmp_path / "one/docs", tmp_path / "two/docs", tmp_path / "one/guide.md"]
        assert self.names(*places) == ["one/docs/guide.md", "two/docs/guide.md", "one/guide.md"]
        assert self.names(tmp_path / "guide.md", tmp_path / "one/guide.md") == [
            f"{tmp_path.name}/guide.md",
            "one/guide.md",
        ]

    def test_no_name_of_a_place_begins_with_that_of_another(self, tmp_path: Path) -> None:
        self.made(tmp_path, "x/a/b/guide.md", "y/a/b/guide.md", "z/b/guide.md")
        assert self.names(tmp_path / "x/a", tmp_path / "y/a/b", tmp_path / "z/b") == [
            "x/a/b/guide.md",
            "a/b/guide.md",
            "z/b/guide.md",
        ]

    def test_what_is_named_twice_is_read_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made(tmp_path, "a/deep/more.md", "a/guide.md")
        monkeypatch.chdir(tmp_path / "a")
        assert self.names(".", "../a", "deep", "guide.md") == ["a/guide.md", "a/deep/more.md"]


class TestWhatCannotBeRead:
    def test_the_rest_goes_on(self, tmp_path: Path) -> None:
        (tmp_path / "broken.pdf").write_bytes(pdf_of("text")[:120])
        (tmp_path / "half.txt").write_bytes("eins\nzwei f\u00fcr\n".encode("utf-16")[:-1])
        lines = ['{"text": "one"}', '{"text": ', '["two"]', '{"no": 1}', '{"text": "' + "x" * 10_000_000 + '"}']
        (tmp_path / "list.jsonl").write_text("\n".join([*lines, '{"text": "last"}']), "utf-8")
        (tmp_path / "long.txt").write_text("short\n" + "y" * 10_000_000, "utf-8")
        (tmp_path / "good.txt").write_text("good", "utf-8")
        documents, errors = loaded(tmp_path)
        assert [document.id for document in documents] == ["good.txt", "list.jsonl#line=1", "list.jsonl#line=6"]
        assert errors[0].startswith('file "broken.pdf": is no PDF that can be read: ')
        assert errors[1:] == [
            'file "half.txt", line 2: is not utf-16: byte 0x0a',
            'file "list.jsonl", line 2: is not JSON: Expecting value: line 1 column 10 (char 9)',
            'file "list.jsonl", line 3: is not a JSON object but a list',
            'file "list.jsonl", line 4: has no text in the field "text"',
            'file "list.jsonl", line 5: the line has 10,000,012 bytes, at most 1,048,576 are taken',
            'file "long.txt", line 2: the line has 10,000,000 bytes, at most 1,048,576 are taken',
        ]

    def test_what_no_index_can_keep(self, tmp_path: Path) -> None:
        bad = ['"score": NaN', '"score": -1e999', f'"count": {2**63}', '"": 1', '"$in": "x"']
        good = ['"score": 1e308', f'"count": {-(2**63)}', '"all": [NaN]', '"is": true', '"no": null']
        lines = [f'{{"text": "x", {field}}}\n' for field in [*bad, *good]]
        (tmp_path / "list.jsonl").write_text("".join(lines), "utf-8")
        documents, errors = loaded(tmp_path)
        assert [document.metadata["line"] for document in documents] == [6, 7, 8, 9, 10]
        assert errors == [
            "file \"list.jsonl\", line 1: the field 'score' is nan, which is not finite",
            "file \"list.jsonl\", line 2: the field 'score' is -inf, which is not finite",
            "file \"list.jsonl\", line 3: the field 'count' is 9223372036854775808, which does not fit into 64 bits",
            "file \"list.jsonl\", line 4: a field cannot have the name ''",
            "file \"list.jsonl\", line 5: a field cannot have the name '$in'",
        ]

    def test_two_lines_with_one_id(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(
            "".join(f'{{"text": "text {line}", "id": {line // 2}}}\n' for line in range(300)), "utf-8"
        )
        (tmp_path / "b.jsonl").write_text(
            '{"text": "one", "id": "line=2"}\n{"text": "two"}\n{"text": "three", "id": 7}\n{"text": "four", "id": "7"}',
            "utf-8",
        )
        (tmp_path / "c.jsonl").write_text('{"text": "", "score": NaN, "id": 1}\n{"text": "kept", "id": 1}', "utf-8")
        documents, errors = loaded(tmp_path)
        texts = [document.text for document in documents]
        assert texts == [*(f"text {line}" for line in range(0, 300, 2)), "one", "three", "kept"]
        assert errors[:2] == [
            "file \"a.jsonl\", line 2: has the id '0', as line 1 has",
            "file \"a.jsonl\", line 4: has the id '1', as line 3 has",
        ]
        assert errors[150:] == [
            "file \"b.jsonl\", line 2: has the id 'line=2', as line 1 has",
            "file \"b.jsonl\", line 4: has the id '7', as line 3 has",
            "file \"c.jsonl\", line 1: the field 'score' is nan, which is not finite",
        ]

    def test_without_a_policy_the_job_fails_and_names_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.pdf").write_bytes(b"hello")
        env = LocalEnvironment("load")
        env.from_batch(Files, tmp_path).flatmap(Load, name="load").sink(print)
        with pytest.raises(FunctionError, match=r'"load" failed .*file "a.pdf": is no PDF') as caught:
            env.submit(autostop=True)
        assert isinstance(caught.value.__cause__, DocumentError)

    def test_it_is_skipped(self, tmp_path: Path) -> None:
        (tmp_path / "a.pdf").write_bytes(b"hello")
        (tmp_path / "b.txt").write_text("hello", "utf-8")
        ids: list[str] = []
        env = LocalEnvironment("load")
        env.from_batch(Files, tmp_path).flatmap(Load, on_error="skip").map(lambda each: each.id).sink(ids.append)
        env.submit(autostop=True)
        assert ids == ["b.txt"]

    def test_another_encoding_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes("f\u00fcr".encode("latin-1"))
        with pytest.raises(DocumentError) as caught:
            list(Load(encoding="utf-8").execute(path))
        assert caught.value.__notes__ == ["Save it as UTF-8, or give its encoding: Load(encoding=...)."]
        assert [document.text for document in Load(encoding="latin-1").execute(path)] == ["f\u00fcr"]
        assert problem_of(path, encoding="klingon") == 'file "a.txt": the encoding "klingon" is not known'

    def test_a_page_that_declares_what_it_is_not(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = tmp_path / "a.html"
        path.write_bytes(b'<meta charset="utf-8">\n<p>caf\xe9')
        assert [document.text for document in Load().execute(path)] == ["caf\ufffd"]
        assert caplog.messages == ["bytes are not characters of utf-8: file=a.html count=1"]

    def test_tags_in_tags_without_end(self, tmp_path: Path) -> None:
        path = tmp_path / "a.html"
        path.write_text("<div>" * 20_000 + "deep", "utf-8")
        try:
            texts = [document.text for document in Load().execute(path)]
        except DocumentError as error:
            assert str(error) == 'file "a.html": its tags are nested too deeply'  # noqa: PT017 - both are right
        else:
            assert texts == ["deep"]

    def test_a_file_that_is_too_large(self, tmp_path: Path) -> None:
        path = tmp_path / "a.html"
        path.write_text("x" * 1001, "utf-8")
        assert problem_of(path, file_bytes_max=1000) == (
            'file "a.html": the file has 1,001 bytes, at most 1,000 are taken'
        )

    def test_a_pdf_without_text(self, tmp_path: Path) -> None:
        path = tmp_path / "scan.pdf"
        path.write_bytes(pdf_of("", ""))
        assert problem_of(path) == 'file "scan.pdf": does not have text on any of its 2 pages'

    def test_a_pdf_with_a_password(self, tmp_path: Path) -> None:
        import pypdf

        path = tmp_path / "secret.pdf"
        (tmp_path / "open.pdf").write_bytes(pdf_of("text"))
        writer = pypdf.PdfWriter(tmp_path / "open.pdf")
        writer.encrypt("password", algorithm="RC4-128")
        writer.write(path)
        assert problem_of(path) == 'file "secret.pdf": is encrypted'

    def test_a_format_that_is_not_known(self, tmp_path: Path) -> None:
        path = tmp_path / "a.doc"
        path.write_text("x", "utf-8")
        documents, errors = loaded(path)
        assert (documents, errors) == ([], ['file "a.doc": files that end with ".doc" are not known'])

    def test_json_without_a_bottom(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text("[" * 100_000, "utf-8")
        _, (error,) = loaded(tmp_path)
        assert error.startswith('file "a.jsonl", line 1: is not JSON: ')

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_what_may_not_be_read(self, tmp_path: Path) -> None:
        for name in ("a.jsonl", "b.txt"):
            (tmp_path / name).touch(mode=0o000)
        (tmp_path / "closed").mkdir(mode=0o000)
        documents, errors = loaded(tmp_path)
        (tmp_path / "closed").chmod(0o700)
        assert documents == []
        assert errors == [
            'file "a.jsonl": cannot be read: Permission denied',
            'file "b.txt": cannot be read: Permission denied',
            f'file "{tmp_path / "closed"}": cannot be read: Permission denied',
        ]

    def test_a_file_that_is_gone(self, tmp_path: Path) -> None:
        assert problem_of(tmp_path / "gone.txt") == 'file "gone.txt": cannot be read: No such file or directory'

    def test_a_place_that_is_not_there(self, tmp_path: Path) -> None:
        env = LocalEnvironment("load")
        env.from_batch(Files, tmp_path / "none").flatmap(Load).sink(print)
        with pytest.raises(JobError, match="the file or folder does not exist"):
            env.submit(autostop=True)
        with pytest.raises(GraphError, match="names no folder and no file"):
            Files()
