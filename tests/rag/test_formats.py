"""The text of each format is that format's text, whatever programs wrote the file."""

from __future__ import annotations

import logging
import math
import time
import zipfile
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from rag.made_files import docx_of, encrypted_pdf, epub_of, one_of_each, pptx_of, xlsx_of
from rag.small_pdf import pdf_of

from sage import GraphError, LocalEnvironment
from sage.rag.documents import Document, DocumentError, Passage, Value
from sage.rag.files import FORMATS, Files
from sage.rag.keywords import KeywordIndex
from sage.rag.loaders import Load
from sage.rag.retrieval import Index, Retrieve, Retrieved
from sage.rag.splitters import SplitByStructure

EACH = one_of_each()
RUSSIAN = (
    "\u041c\u0430\u0433\u0430\u0437\u0438\u043d \u043e\u0442\u043a\u0440\u044b\u0432\u0430\u0435\u0442\u0441\u044f "
    "\u0432 \u0434\u0435\u0432\u044f\u0442\u044c."
)


def documents_of(folder: Path, name: str, content: bytes | str, **options: Any) -> list[Document]:
    """Write a file and return its documents."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(Load(**options).execute(path))


def passages_of(folder: Path, name: str, content: bytes | str) -> list[tuple[str, str]]:
    """Write a file and return the heading and the text of its passages."""
    found = [each for document in documents_of(folder, name, content) for each in SplitByStructure().execute(document)]
    return [(passage.heading, passage.text) for passage in found]


@pytest.mark.parametrize(
    ("name", "content", "passages"),
    [
        ("a.txt", "# rope costs five coins", [("", "# rope costs five coins")]),
        ("a.txt", "ls\n# list\n\n## end\n", [("", "ls\n# list\n\n## end")]),
        ("a.txt", "Title\n=====\n\n---\na: b", [("", "Title\n=====\n\n---\na: b")]),
        ("a.txt", "```\nnever closed\n\n# x", [("", "```\nnever closed\n\n# x")]),
        ("a.md", "# FAQ\n\n## Is it free? Yes, it is.", [("FAQ", "Is it free? Yes, it is.")]),
        ("a.md", "# One\n# Two\ntext\n# Three", [("", "One"), ("Two", "text"), ("", "Three")]),
        ("a.html", "<p># of seats: 40</p>", [("", "# of seats: 40")]),
        ("a.html", "<table><tr><th>#</th><th>n</th></tr></table>", [("", "# | n")]),
        ("a.html", "<p>---<p>a<br>===", [("", "---\n\na\n===")]),
        ("a.html", "<h1>FAQ</h1><h2>Is it free?</h2>", [("FAQ", "Is it free?")]),
        ("a.jsonl", '{"text": "# no heading\\r\\n\\r\\ntext"}', [("", "# no heading\n\ntext")]),
        ("a.csv", "item,# of seats\nhall,40\n", [("", "item: hall\n# of seats: 40")]),
        ("a.pdf", pdf_of("# no heading"), [("", "# no heading")]),
        (
            "a.docx",
            docx_of(("Normal", "# no heading"), ("Heading 1", "# Real")),
            [("", "# no heading"), ("", "# Real")],
        ),
        ("a.pptx", pptx_of(("", "# no heading")), [("", "# no heading")]),
        ("a.epub", epub_of("B", "<p># no heading</p>"), [("", "# no heading")]),
    ],
)
def test_only_headings_are_headings_and_one_alone_is_text(
    tmp_path: Path, name: str, content: bytes | str, passages: list[tuple[str, str]]
) -> None:
    assert passages_of(tmp_path, name, content) == passages


@pytest.mark.parametrize(
    ("name", "content", "passages"),
    [
        ("a.md", "# Foo\r\rText one.\r", [("Foo", "Text one.")]),
        ("a.md", "# Foo\r\n\r\nText one.\r\n", [("Foo", "Text one.")]),
        ("a.txt", "one\r\rtwo\r\n\r\nthree\n", [("", "one\n\ntwo\n\nthree")]),
        ("a.html", "<h2>Title<p>Para one.<p>Para two.", [("Title", "Para one.\n\nPara two.")]),
        ("a.html", "<head><title>T</title><p>Text", [("", "Text")]),
        ("a.html", "<nav>Home<h1>Real</h1>Text", [("", "Home"), ("Real", "Text")]),
        ("a.html", "<body><noscript>No<p>Text<object>More", [("", "No\n\nTextMore")]),
        ("a.html", "<p>Text<!-- <p>gone", [("", "Text")]),
        ("a.html", "<pre>a\r\nb\rc", [("", "```\na\nb\nc\n```")]),
        ("a.html", "x &amp y &#99999999999; &nope; <3", [("", "x & y \ufffd &nope; <3")]),
        ("a.jsonl", '{"text": "a"}\r{"text": "b"}\r', [("", "a"), ("", "b")]),
        ("a.csv", "name\rx\ry\r", [("", "name: x"), ("", "name: y")]),
    ],
)
def test_line_ends_and_tags_are_read_as_editors_and_browsers_do(
    tmp_path: Path, name: str, content: str, passages: list[tuple[str, str]]
) -> None:
    assert passages_of(tmp_path, name, content) == passages


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<pre>line one<br>line two</pre>", "```\nline one\nline two\n```"),
        ("<pre>```\nx\n```\n# no</pre><p>after", "````\n```\nx\n```\n# no\n````\n\nafter"),
        ("<table><tr><td><p>Price</p></td><td><div>2</div><div>3</div></td></tr></table>", "Price | 2 3"),
        ("<table><tr><td>a<td><table><tr><td>b<td>c</table></table>", "a |\n\nb | c"),
        ("<table><tr><td><h1>Page</h1><p>one<p>two</table>", "# Page\n\none\n\ntwo"),
        ("<ol start=3><li>a<li>b<ul><li>c</ul><li>d</ol>", "3. a\n4. b\n\n- c\n\n5. d"),
        ("<svg><text>x</text></svg><template><p>y</template><iframe>z</iframe>Text", "Text"),
    ],
)
def test_html_looks_as_in_a_browser(tmp_path: Path, page: str, text: str) -> None:
    assert [document.text for document in documents_of(tmp_path, "a.html", page)] == [text]


@pytest.mark.parametrize(
    ("text", "passages"),
    [
        ("```code``` begins\n\n# Head\n\ntext", [("", "```code``` begins"), ("Head", "text")]),
        ("```\nx\n    ```\n# in\n```\n# out\ny", [("", "```\nx\n    ```\n# in\n```"), ("out", "y")]),
        ("~~~ py\n# in\n```\n~~~~\n# out\ny", [("", "~~~ py\n# in\n```\n~~~~"), ("out", "y")]),
        (" ## Bar\nx", [("Bar", "x")]),
        ("    # code\n\n# Head #\nx", [("", "    # code"), ("Head", "x")]),
        ("Two\nlines\n===\nx\n\nOne\n-\ny", [("Two lines", "x"), ("Two lines > One", "y")]),
        ("# C#\nx\n\n# F# #\ny", [("C#", "x"), ("F#", "y")]),
        ("#hashtag\n\n####### seven", [("", "#hashtag\n\n####### seven")]),
        ("<!--\n# no\n\n# no\n-->\n# Yes\nx", [("", "<!--\n# no\n\n# no\n-->"), ("Yes", "x")]),
        (
            "- # in a list\n\n> # in a quotation\n\n# Head\nx",
            [("", "- # in a list\n\n> # in a quotation"), ("Head", "x")],
        ),
        ("Like this:\n```\n# in\n```\n- a\n\nMore", [("", "Like this:\n```\n# in\n```\n- a\n\nMore")]),
        ("[ref]: http://x.y\n\n# Head\nx", [("", "[ref]: http://x.y"), ("Head", "x")]),
        ("<div>\n# in\n</div>\n\n# Head\nx", [("", "<div>\n# in\n</div>"), ("Head", "x")]),
    ],
)
def test_markdown_is_read_by_the_rules_of_commonmark(
    tmp_path: Path, text: str, passages: list[tuple[str, str]]
) -> None:
    assert passages_of(tmp_path, "a.md", text) == passages


class TestFrontMatter:
    def test_it_is_metadata(self, tmp_path: Path) -> None:
        text = (
            "---\ntitle: Guide\nyear: 2024\ndone: yes\nwhen: 2024-05-01\ntags: [a]\nno:\n# draft\n---\n\n# Real\n\nBody"
        )
        (document,) = documents_of(tmp_path, "a.md", text)
        assert document.text == "\n# Real\n\nBody"
        assert document.metadata == {
            **{"title": "Guide", "year": 2024, "done": True, "when": "2024-05-01"},
            **{"file": "a.md", "format": "markdown"},
        }
        assert document.origin == {"file": "a.md", "format": "markdown", "title": "Real"}
        assert passages_of(tmp_path, "a.md", text) == [("Real", "Body")]

    @pytest.mark.parametrize(
        ("text", "left", "title"),
        [
            ("---\ntitle: One: two\n---\nBody", "Body", "One: two"),
            ("---\r\ntitle: x\r\n...\r\nBody", "Body", "x"),
            ("\ufeff---\ntitle: x\n---\nBody", "Body", "x"),
            ("---\n---\nBody", "Body", None),
            ("---\nJust text\n---\n\nmore", "---\nJust text\n---\n\nmore", None),
            ("---\ntitle: never closed\n\nBody", "---\ntitle: never closed\n\nBody", None),
            ("---\ntitle: [broken\n- x\n---\nBody", "---\ntitle: [broken\n- x\n---\nBody", None),
            ("----\ntitle: x\n----\nBody", "----\ntitle: x\n----\nBody", None),
        ],
    )
    def test_what_is_none_stays_text(self, tmp_path: Path, text: str, left: str, title: str | None) -> None:
        (document,) = documents_of(tmp_path, "a.md", text)
        assert (document.text, document.metadata.get("title")) == (left, title)

    def test_lists_of_lists_by_reference_do_not_grow(self, tmp_path: Path) -> None:
        levels = "".join(f"k{n}: &k{n} {{<<: [{', '.join([f'*k{n - 1}'] * 9)}]}}\n" for n in range(1, 30))
        (document,) = documents_of(tmp_path, "a.md", f"---\nk0: &k0 {{a: b}}\n{levels}title: x\n---\nBody")
        assert document.metadata["title"] == "x"


class TestFieldsOfTheUser:
    FIELDS: ClassVar[dict[str, Value]] = {
        **{"start": 7, "end": 9.5, "line": 3, "file": "mine", "format": "srt", "document": "d", "heading": "h"},
        **{"title": "t", "page": 2, "fingerprint": "f", "shadowed": "s", "encoding": "e"},
    }

    def test_they_are_kept_and_found(self, tmp_path: Path) -> None:
        import json

        (tmp_path / "docs").mkdir()
        (tmp_path / "docs" / "talk.jsonl").write_text(json.dumps({"text": "The shop opens.", **self.FIELDS}), "utf-8")
        for _ in range(2):
            found: list[Retrieved] = []
            for name, value in self.FIELDS.items():
                env = LocalEnvironment("ask")
                keywords = env.register_service("keywords", KeywordIndex, tmp_path / "words.db")
                passages = env.from_batch(Files, tmp_path / "docs").flatmap(Load).flatmap(SplitByStructure)
                passages.map_batches(Index, keywords=keywords).sink(lambda _: None)
                env.submit(autostop=True)
                env = LocalEnvironment("ask")
                keywords = env.register_service("keywords", KeywordIndex, tmp_path / "words.db")
                asked = env.from_batch(["When does the shop open?"])
                asked.map(Retrieve, 5, keywords=keywords, where={name: value}).sink(found.append)
                env.submit(autostop=True)
            for retrieved in found:
                (one,) = retrieved.found
                assert one.passage == Passage(
                    "talk.jsonl#line=1", "The shop opens.", "talk.jsonl#line=1", 0, 15, "", self.FIELDS
                )
                assert one.passage.origin == {"file": "talk.jsonl", "format": "jsonl", "line": 1}

    def test_ours_have_names_that_no_field_can_have(self, tmp_path: Path) -> None:
        with pytest.raises(DocumentError, match=r'file "a.jsonl", line 1: a field cannot have the name .sage:file.'):
            documents_of(tmp_path, "a.jsonl", '{"text": "x", "sage:file": "y"}')


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xef\xbb\xbf<meta charset=utf-8><p>caf\xc3\xa9", "caf\u00e9"),
        (b"\xef\xbb\xbf<meta charset=windows-1252><p>caf\xc3\xa9", "caf\u00e9"),
        (b"<meta charset=iso-8859-1><p>it\x92s", "it\u2019s"),
        (b"<meta charset=us-ascii><p>it\x92s", "it\u2019s"),
        (b"<meta charset=gb2312><p>" + "\u9555".encode("gbk"), "\u9555"),
        (b"<meta charset=shift_jis><p>" + "\u2460".encode("cp932"), "\u2460"),
        (b"<meta charset=x-sjis><p>" + "\u3042".encode("cp932"), "\u3042"),
        (b"<meta charset=euc-kr><p>" + "\ub620".encode("cp949"), "\ub620"),
        (b"<meta charset='utf-16'><p>ascii \xc3\xa9", "ascii \u00e9"),
        (b"<!-- <meta charset=koi8-r> --><meta charset=utf-8><p>\xc3\xa9", "\u00e9"),
        (b'<META HTTP-EQUIV="Content-Type" CONTENT="text/html; charset=KOI8-R"><p>\xd0', "\u043f"),
        (b"<meta charset=klingon><p>caf\xc3\xa9", "caf\u00e9"),
        (b"<meta charset=klingon><p>caf\xe9", "caf\u00e9"),
        ("<p>x \u00e9".encode("utf-16"), "x \u00e9"),
        (b'<?xml version="1.0" encoding="iso-8859-5"?><p>\xd0', "\u0430"),
        ("<p>\u041c\u0430\u0433\u0430\u0437\u0438\u043d \u043e\u0442\u043a\u0440\u044b\u0442".encode("cp1251"), None),
    ],
)
def test_html_is_decoded_as_browsers_do(tmp_path: Path, content: bytes, text: str | None) -> None:
    expected = (
        "\u041c\u0430\u0433\u0430\u0437\u0438\u043d \u043e\u0442\u043a\u0440\u044b\u0442" if text is None else text
    )
    assert [document.text for document in documents_of(tmp_path, "a.html", content)] == [expected]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.csv"])
@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Der B\u00e4r l\u00e4uft \u00fcber die Stra\u00dfe.", "cp1252"),
        (
            RUSSIAN,
            "koi8-r",
        ),
        ("\u5e97\u306f\u4e5d\u6642\u306b\u958b\u304d\u307e\u3059\u3002", "shift_jis"),
        ("\u5546\u5e97\u4e5d\u70b9\u5f00\u95e8\u3002", "gbk"),
        ("The shop, \u00fcber all.", "utf-16-le"),
        ("The shop, \u00fcber all.", "utf-16"),
        ("The shop, \u00fcber all.", "utf-8-sig"),
    ],
)
def test_the_encoding_of_text_is_found(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    (document,) = documents_of(tmp_path, name, text.encode(encoding))
    assert document.text == text.replace(", ", "\n") if name == "a.csv" and ", " in text else document.text == text


def test_json_lines_in_wide_characters_and_lines_of_spaces(tmp_path: Path) -> None:
    lines = '{"text": "a \u0a0a", "n": 1}\r\n  \t \n\n{"text": "b"}\n'
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "utf-8"):
        found = documents_of(tmp_path, "a.jsonl", lines.encode(encoding))
        assert [(document.text, document.metadata["line"]) for document in found] == [("a \u0a0a", 1), ("b", 4)]
    found = documents_of(tmp_path, "a.jsonl", '{"text": "caf\u00e9"}'.encode("latin-1"))
    assert [document.text for document in found] == ["caf\u00e9"]


class TestPdf:
    @pytest.mark.parametrize("algorithm", ["RC4-128", "AES-128", "AES-256"])
    def test_a_password_of_the_owner_is_not_needed(self, tmp_path: Path, algorithm: str) -> None:
        content = encrypted_pdf("The tape.", algorithm=algorithm)
        assert passages_of(tmp_path, "a.pdf", content) == [("", "The tape.")]
        with pytest.raises(DocumentError, match=r'file "a\.pdf": is encrypted'):
            documents_of(tmp_path, "a.pdf", encrypted_pdf("The tape.", algorithm=algorithm, user="secret"))

    def test_pages_without_text_are_counted_and_named(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        documents = documents_of(tmp_path, "a.pdf", pdf_of("one", "", "three", ""))
        assert [document.id for document in documents] == ["a.pdf#page=1", "a.pdf#page=3"]
        assert caplog.messages == ["pages have no text: file=a.pdf count=2 of=4: 2, 4"]

    def test_threads_share_the_library(self, tmp_path: Path) -> None:
        for number in range(12):
            (tmp_path / f"{number:02}.pdf").write_bytes(pdf_of(*[f"page {number} {page}" for page in range(20)]))
        texts: list[str] = []
        env = LocalEnvironment("load")
        env.from_batch(Files, tmp_path).flatmap(Load, parallelism=4).map(lambda each: each.text).sink(texts.append)
        env.submit(autostop=True)
        assert sorted(texts) == sorted(f"page {number} {page}" for number in range(12) for page in range(20))


class TestOffice:
    def test_a_word_document_has_its_headings_lists_tables_boxes_and_notes(self, tmp_path: Path) -> None:
        content = docx_of(
            *(("Title", "Guide"), ("Heading 1", "Hours"), ("Normal", "It opens at nine.")),
            *(("List Bullet", "one"), ("List Bullet", "two"), ("Heading 2", "Alone")),
            table=[["item", "price"], ["tape", "2"]],
        )
        assert passages_of(tmp_path, "a.docx", content) == [
            ("Guide > Hours", "It opens at nine.\n\n- one\n- two"),
            ("Guide > Hours > Alone", "item | price\ntape | 2"),
        ]

    def test_text_in_changes_controls_and_boxes_of_a_word_document(self, tmp_path: Path) -> None:
        names = (
            'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main" '
            'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'
        )
        body = (
            "<w:p><w:ins><w:r><w:t>added </w:t></w:r></w:ins><w:del><w:r><w:delText>gone</w:delText></w:r></w:del>"
            "<w:hyperlink><w:r><w:t>link</w:t><w:br/><w:t>next</w:t></w:r></w:hyperlink></w:p>"
            "<w:sdt><w:sdtContent><w:p><w:r><w:t>control</w:t></w:r></w:p></w:sdtContent></w:sdt>"
            "<w:p><w:r><mc:AlternateContent><mc:Choice><w:txbxContent><w:p><w:r><w:t>box</w:t></w:r></w:p>"
            "</w:txbxContent></mc:Choice><mc:Fallback><w:txbxContent><w:p><w:r><w:t>box</w:t></w:r></w:p>"
            "</w:txbxContent></mc:Fallback></mc:AlternateContent></w:r></w:p>"
        )
        target = BytesIO()
        with (
            zipfile.ZipFile(BytesIO(docx_of(("Normal", "x")))) as source,
            zipfile.ZipFile(target, "w") as changed,
        ):
            for entry in source.infolist():
                is_body = entry.filename == "word/document.xml"
                text = f"<w:document {names}><w:body>{body}</w:body></w:document>"
                changed.writestr(entry, text if is_body else source.read(entry))
        assert passages_of(tmp_path, "a.docx", target.getvalue()) == [("", "added link\nnext\n\ncontrol\n\nbox")]

    def test_each_slide_is_a_document(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        content = pptx_of(("Shop", "one\ntwo"), ("", ""), ("Last", ""), notes="Say it.")
        documents = documents_of(tmp_path, "a.pptx", content)
        assert [(document.id, document.text) for document in documents] == [
            ("a.pptx#slide=1", "# Shop\n\none\ntwo\n\nSay it."),
            ("a.pptx#slide=3", "# Last"),
        ]
        assert caplog.messages == ["slides have no text: file=a.pptx count=1 of=3: 2"]

    def test_each_row_of_a_sheet_is_a_document(self, tmp_path: Path) -> None:
        rows: list[list[Any]] = [
            ["item", "price", "when", "item"],
            [],
            ["tape", 2.0, date(2024, 1, 2), "red"],
            ["rope", 2.5, None, None],
        ]
        sheets: dict[str, list[list[Any]]] = {"Old #1": rows, "Empty": []}
        documents = documents_of(tmp_path, "a.xlsx", xlsx_of(**sheets))
        about: dict[str, Value] = {"file": "a.xlsx", "format": "xlsx", "sheet": "Old #1"}
        assert documents == [
            Document(
                "a.xlsx#sheet=Old %231/line=3",
                "item: tape\nprice: 2\nwhen: 2024-01-02\nitem (2): red",
                {"item": "tape", "price": 2, "when": "2024-01-02", "item (2)": "red", "line": 3, **about},
            ),
            Document(
                "a.xlsx#sheet=Old %231/line=4",
                "item: rope\nprice: 2.5",
                {"item": "rope", "price": 2.5, "line": 4, **about},
            ),
        ]

    def test_each_chapter_of_a_book_is_a_document(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        content = epub_of("The <i/>book".replace("<i/>", ""), "<h1>One</h1><p>a", "", "<title>Own</title><p>b")
        documents = documents_of(tmp_path, "a.epub", content)
        assert [(document.id, document.text, document.metadata["title"]) for document in documents] == [
            ("a.epub#chapter=1", "# One\n\na", "The book"),
            ("a.epub#chapter=3", "b", "Own"),
        ]
        assert caplog.messages == ["chapters have no text: file=a.epub count=1 of=3: 2"]

    def test_what_cannot_be_read(self, tmp_path: Path) -> None:
        protected = {"META-INF/encryption.xml": '<e xmlns="x"><CipherReference URI="OEBPS/text/c%201.xhtml"/></e>'}
        old = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1 and more"
        for name, content, problem in [
            ("a.epub", epub_of("B", "<p>x", more=protected), 'file "a.epub": is encrypted'),
            ("a.docx", old, 'file "a.docx": is encrypted, or has an older format'),
            ("a.pptx", b"PK\x03\x04", 'file "a.pptx": is no PPTX that can be read: '),
            ("a.xlsx", xlsx_of(One=[], Two=[]), 'file "a.xlsx": does not have text on any of its 2 sheets'),
            ("a.epub", docx_of(("Normal", "x")), 'file "a.epub": is no EPUB that can be read: '),
        ]:
            with pytest.raises(DocumentError) as caught:
                documents_of(tmp_path, name, content)
            assert str(caught.value).startswith(problem)
        bomb = epub_of("B", "<p>" + "x" * 2_000_000)
        assert len(bomb) > 2_000_000
        with pytest.raises(DocumentError, match=r"at most 1,000,000 are taken"):
            documents_of(tmp_path, "a.epub", bomb, file_bytes_max=1_000_000)

    def test_a_small_file_that_unpacks_to_a_large_one(self, tmp_path: Path) -> None:
        target = BytesIO()
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("word/document.xml", " " * 100_000_000)
        with pytest.raises(DocumentError, match=r"unpacks to 100,000,000 bytes, at most 67,108,864 are taken"):
            documents_of(tmp_path, "a.docx", target.getvalue())


class TestTables:
    def test_what_separates_the_values_is_found(self, tmp_path: Path) -> None:
        for name, sign in [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.csv", "|"), ("a.tsv", "\t")]:
            content = f'id{sign}name{sign}"a,b;c"\n1{sign}"x{sign}\ny"{sign}2\n\n{sign}z{sign}3{sign}more\n'
            documents = documents_of(tmp_path, name, content)
            assert [(document.id, document.text) for document in documents] == [
                (f"{name}#1", f"id: 1\nname: x{sign}\ny\na,b;c: 2"),
                (f"{name}#line=5", "name: z\na,b;c: 3\nmore"),
            ]
            assert documents[1].metadata == {"name": "z", "a,b;c": "3", "file": name, "format": "csv", "line": 5}

    def test_a_column_of_text_is_the_text(self, tmp_path: Path) -> None:
        (document,) = documents_of(tmp_path, "a.csv", "id,text,lang,$x,sage:y\n7,Hello.,en,1,2\n")
        about: dict[str, Value] = {"lang": "en", "file": "a.csv", "format": "csv", "line": 2}
        assert document == Document("a.csv#7", "Hello.", about)

    def test_a_table_of_one_line_is_kept(self, tmp_path: Path) -> None:
        assert passages_of(tmp_path, "a.csv", "\n\nname,price\n") == [("", "name\nprice")]


class TestNothingIsLeftOutWithoutAWord:
    def test_files_of_unknown_formats(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        for name in ("b.png", "a.DOC", "c.doc", "Makefile", "d.txt"):
            (tmp_path / name).write_text("x", "utf-8")
        found: list[str] = []
        env = LocalEnvironment("load")
        env.from_batch(Files, tmp_path).flatmap(Load).map(lambda document: document.id).sink(found.append)
        env.submit(autostop=True)
        assert found == ["d.txt"]
        text = (
            "files of unknown formats are left out: count=4 (.doc 2, (none) 1, .png 1): Makefile, a.DOC, b.png, c.doc"
        )
        assert [each for each in caplog.messages if "unknown" in each] == [text]
        refused: list[str] = []
        env = LocalEnvironment("load")
        failed = env.dead_letters()
        env.from_batch(Files, tmp_path, unknown="refuse").flatmap(Load, on_error=failed).sink(lambda _: None)
        failed.map(lambda letter: str(letter.error)).sink(refused.append)
        env.submit(autostop=True)
        assert refused == [
            'file "Makefile": files that end with "" are not known',
            'file "a.DOC": files that end with ".DOC" are not known',
            'file "b.png": files that end with ".png" are not known',
            'file "c.doc": files that end with ".doc" are not known',
        ]
        with pytest.raises(GraphError, match="unknown is 'drop'"):
            Files(tmp_path, unknown="drop")

    @pytest.mark.parametrize("name", ["a.txt", "a.md", "a.html", "a.csv", "a.jsonl"])
    @pytest.mark.parametrize("content", [b"", b" \n\r\n\t", b"\xef\xbb\xbf"])
    def test_files_without_text(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes
    ) -> None:
        assert not "".join(document.text for document in documents_of(tmp_path, name, content)).strip()
        assert len(caplog.messages) == 1
        assert caplog.messages[0].endswith(f"has no text: {name}")

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(some.data())
    def test_any_bytes_are_passages_an_error_that_names_the_file_or_a_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, data: some.DataObject
    ) -> None:
        """The bytes are those of a real file with a part replaced, doubled or cut, or none of a file at all."""
        suffix = data.draw(some.sampled_from(sorted(FORMATS)))
        real = EACH.get(suffix, EACH[".html"])
        begin = data.draw(some.integers(0, len(real)))
        end = data.draw(some.integers(begin, len(real)))
        put = data.draw(
            some.binary(max_size=20) | some.sampled_from([b"<h1>", b"\r", b"# ", b"---\n", real[begin:end] * 2])
        )
        content = data.draw(some.just(real[:begin] + put + real[end:]) | some.binary(max_size=50))
        caplog.clear()
        try:
            documents = documents_of(tmp_path, f"a{suffix}", content)
        except DocumentError as error:
            assert f'file "a{suffix}"' in str(error)  # noqa: PT017 - one of several right ends
            return
        passages = [passage for document in documents for passage in SplitByStructure().execute(document)]
        assert passages or caplog.messages
        texts = {document.id: document.text for document in documents}
        assert all(texts[each.document][each.start : each.end] == each.text for each in passages)
        if suffix in (".txt", ".md") and all(byte < 128 for byte in content):
            text = " ".join(content.decode().replace("\0", "\ufffd").split())
            assert all(" ".join(each.text.replace("\0", "\ufffd").split()) in text for each in passages)

    def test_every_real_file_says_what_it_says(self, tmp_path: Path) -> None:
        for suffix, content in EACH.items():
            assert "nine coins" in " ".join(text for _, text in passages_of(tmp_path, f"a{suffix}", content))


LONG = {
    ".md": [
        "# T" + " " * 9 + "end",
        "# a\n",
        "```\n",
        "> ",
        "- ",
        "1. x\n",
        "[",
        "|",
        "a\n=\n",
        "<!--",
        "---\na: b\n",
        "\r",
    ],
    ".txt": [".", '."', "a. ", "e.g. ", "i", " ", "\u0301", "a\u0301", "\u3002", "1. x\n", "\x0c", "\U0001f469\u200d"],
    ".html": [
        *(
            "<div>",
            "</div>",
            "<",
            "<!--",
            "<!",
            "</",
            "<a ",
            '<a b="',
            "&",
            "&#9",
            "<b>",
            "<p><b id=1>",
            "<table><tr><td>",
        ),
        *("<pre>", "<script>", "<![CDATA[", "<meta charset", "<li><ol>", "<h1>a", "&nbsp;", "\0"),
    ],
    ".csv": ['"', ",", 'a,"b\n', "a,b\n", "|"],
    ".jsonl": ["[", '{"a":', '"', "\r", "\\"],
}


@pytest.mark.parametrize(("suffix", "part"), [(suffix, part) for suffix, parts in LONG.items() for part in parts])
def test_time_grows_with_the_length_whatever_is_repeated(tmp_path: Path, suffix: str, part: str) -> None:
    def cpu_s(length: int) -> float:
        content = part * (length // len(part)) + " the end"
        started_at = time.thread_time()
        logging.disable()
        try:
            passages_of(tmp_path, f"a{suffix}", content)
        except DocumentError:
            pass
        finally:
            logging.disable(logging.NOTSET)
        return time.thread_time() - started_at

    short, long = cpu_s(10_000), cpu_s(160_000)
    if long > 0.5:
        # Sixteen times the length: linear is 16, quadratic 256.
        assert math.log(long / max(short, 0.002), 16) < 1.5, (short, long)


@pytest.mark.slow
def test_ten_megabytes_without_an_empty_line(tmp_path: Path) -> None:
    def cpu_s(lines: int) -> float:
        text = "The shop opens at nine, and the tape costs two coins. Ask us for more of them!\n" * lines
        started_at = time.thread_time()
        passages = passages_of(tmp_path, f"{lines}.txt", text)
        assert len(passages) > lines / 12
        return time.thread_time() - started_at

    # Ten times the length: linear is 10, quadratic 100.
    assert cpu_s(127_000) < 20 * cpu_s(12_700)
