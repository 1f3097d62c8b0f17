"""Passages are exact parts of their document, no longer than was asked for, and nothing is lost between them."""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as some

from sage import GraphError
from sage.rag.documents import Document, Passage
from sage.rag.splitters import SplitByStructure, SplitByTokens, sentences_of, token_spans
from sage.rag.structure import lines_of
from sage.testing import run

GUIDE = """\
Before any heading.

# Guide #

## Keys

The same key goes to the same task. It never moves.

```python
# no heading

Keys()
```

Underlined
----------

| a | b |
|---|---|
| 1 | 2 |

## Keys

Again.

### What's `deep`?

- one
- two
# Last
"""

TEXTS = some.text(alphabet=some.sampled_from("ab1 .!?\n#`-|=\u4f60\u3002\u00e9'"), max_size=300)


def split(text: str, splitter: SplitByStructure | SplitByTokens) -> list[Passage]:
    passages = run([Document("guide.md", text, {"file": "guide.md"})], lambda stream: stream.flatmap(splitter))
    assert all(text[passage.start : passage.end] == passage.text for passage in passages)
    return passages


class TestTokens:
    def test_words_signs_and_letters_of_languages_without_spaces(self) -> None:
        text = "It's 3.5\u20ac, \u4f60\u597dabc " + "x" * 45
        assert [text[start:end] for start, end in token_spans(text)] == [
            *("It", "'", "s", "3", ".", "5", "\u20ac", ",", "\u4f60", "\u597d", "abc"),
            *("x" * 20, "x" * 20, "x" * 5),
        ]

    def test_windows_overlap(self) -> None:
        passages = split("a b c d e f g", SplitByTokens(3, overlap=1))
        assert [(passage.id, passage.text) for passage in passages] == [
            ("guide.md", "a b c"),
            ("guide.md~2", "c d e"),
            ("guide.md~3", "e f g"),
        ]
        assert passages[1] == Passage("guide.md~2", "c d e", "guide.md", 4, 9, "", {"file": "guide.md"})
        assert [passage.text for passage in split("a b", SplitByTokens(3, overlap=2))] == ["a b"]
        assert split(" \n", SplitByTokens(3, overlap=1)) == []

    def test_another_count_of_tokens(self) -> None:
        def letters(text: str) -> list[tuple[int, int]]:
            return [(place, place + 1) for place in range(len(text))]

        assert [passage.text for passage in split("abcd", SplitByTokens(2, overlap=0, tokens=letters))] == ["ab", "cd"]

    def test_an_overlap_that_never_ends(self) -> None:
        with pytest.raises(GraphError, match="overlap is 5, not from 0 to below tokens_max=5"):
            SplitByTokens(5, overlap=5)

    @given(TEXTS, some.integers(1, 20), some.data())
    def test_every_token_is_in_a_window(self, text: str, size: int, data: some.DataObject) -> None:
        overlap = data.draw(some.integers(0, size - 1))
        document = Document("a", text)
        passages = list(SplitByTokens(size, overlap=overlap).execute(document))
        covered = {start for passage in passages for start in range(passage.start, passage.end)}
        assert {start for start, _ in token_spans(text)} <= covered
        assert all(len(token_spans(passage.text)) <= size for passage in passages)
        assert all(before.start < after.start and before.end < after.end for before, after in pairwise(passages))


class TestStructure:
    def test_headings_cut(self) -> None:
        passages = split(GUIDE, SplitByStructure())
        assert [(passage.id, passage.heading, passage.text) for passage in passages] == [
            ("guide.md", "", "Before any heading."),
            (
                "guide.md#keys",
                "Guide > Keys",
                "The same key goes to the same task. It never moves.\n\n```python\n# no heading\n\nKeys()\n```",
            ),
            ("guide.md#underlined", "Guide > Underlined", "| a | b |\n|---|---|\n| 1 | 2 |"),
            ("guide.md#keys-1", "Guide > Keys", "Again."),
            ("guide.md#whats-deep", "Guide > Keys > What's `deep`?", "- one\n- two"),
            ("guide.md#last", "", "Last"),
        ]
        assert passages[3].searchable == "Guide > Keys\nAgain."
        assert passages[0].searchable == "Before any heading."

    def test_headings_of_one_name_have_anchors_that_differ(self) -> None:
        text = "# Keys\n\none\n\n# Keys\n\ntwo\n\n# Keys-1\n\nthree\n\n# Keys\n\nfour\n\n# Keys-1\n\nfive"
        assert [passage.id.partition("#")[2] for passage in split(text, SplitByStructure())] == [
            *("keys", "keys-1", "keys-1-1", "keys-2", "keys-1-2"),
        ]

    def test_paragraphs_are_packed_and_sentences_are_kept(self) -> None:
        text = "# Top\n\nOne two.\n\nThree four.\n\nFive, e.g. six. Seven eight nine. Ten!\n\nLast."
        passages = split(text, SplitByStructure(6))
        assert [(passage.id, passage.text) for passage in passages] == [
            ("guide.md#top", "One two.\n\nThree four."),
            ("guide.md#top~2", "Five, e.g."),
            ("guide.md#top~3", "six. Seven eight nine."),
            ("guide.md#top~4", "Ten!\n\nLast."),
        ]
        assert [passage.text for passage in split(text, SplitByStructure(9))] == [
            "One two.\n\nThree four.",
            "Five, e.g. six.",
            "Seven eight nine. Ten!\n\nLast.",
        ]

    def test_a_long_table_is_cut_between_rows_and_a_long_sentence_between_tokens(self) -> None:
        assert [passage.text for passage in split("| a | b |\n| 1 | 2 |\n| 3 | 4 |", SplitByStructure(10))] == [
            "| a | b |\n| 1 | 2 |",
            "| 3 | 4 |",
        ]
        assert [passage.text for passage in split("a b c d e", SplitByStructure(2))] == ["a b", "c d", "e"]

    def test_a_passage_needs_a_token(self) -> None:
        with pytest.raises(GraphError, match="tokens_max is 0"):
            SplitByStructure(0)

    @given(TEXTS, some.integers(1, 20))
    def test_nothing_is_lost_and_nothing_is_too_long(self, text: str, size: int) -> None:
        passages = list(SplitByStructure(size).execute(Document("a", text)))
        assert all(text[passage.start : passage.end] == passage.text for passage in passages)
        assert all(0 < len(token_spans(passage.text)) <= size for passage in passages)
        assert all(before.end <= after.start for before, after in pairwise(passages))
        assert len({passage.id for passage in passages}) == len(passages)

    @given(some.text(alphabet=some.sampled_from("ab1 .!?\n`|\u4f60\u3002\u00e9'"), max_size=300), some.integers(1, 20))
    def test_nothing_is_lost_where_there_are_no_headings(self, text: str, size: int) -> None:
        passages = list(SplitByStructure(size).execute(Document("a", text)))
        covered = {start for passage in passages for start in range(passage.start, passage.end)}
        assert {start for start, _ in token_spans(text)} <= covered


def test_sentences_end_where_they_end() -> None:
    text = 'Mr. Fox ran, e.g. fast. "Why?" he asked. See No. 5! \u4f60\u597d\u3002\u518d\u89c1 end'
    assert [text[start:end] for start, end in sentences_of(text, 0, len(text))] == [
        "Mr. Fox ran, e.g. fast.",
        '"Why?"',
        "he asked.",
        "See No. 5!",
        "\u4f60\u597d\u3002",
        "\u518d\u89c1 end",
    ]


def test_lines_are_found_with_and_without_blank_ones() -> None:
    text = "a\n\nb"
    assert [text[start:end] for start, end in lines_of(text, 0, 4)] == ["a", "b"]
    assert [text[start:end] for start, end in lines_of(text, 0, 4, blank=True)] == ["a", "", "b"]


@pytest.mark.parametrize(
    "word",
    [
        "\u0928\u092e\u0938\u094d\u0924\u0947",
        "\u0e01\u0e33\u0e19\u0e49\u0e33",
        "e\u0301a\u0308",
        "\U0001f469\u200d\U0001f680",
    ],
)
@pytest.mark.parametrize("splitter", [SplitByTokens(3, overlap=1), SplitByStructure(3)])
def test_no_passage_begins_with_the_mark_of_a_letter(word: str, splitter: SplitByTokens | SplitByStructure) -> None:
    passages = split(word * 60, splitter)
    assert len(passages) > 1 or "\u200d" in word
    assert not [each for each in passages if unicodedata.category(each.text[0])[0] == "M" or each.text[0] == "\u0e33"]


def test_the_number_of_an_item_stays_with_it() -> None:
    text = "Steps:\n" + "\n".join(f"{number}. Do the step number {number}. Then rest." for number in range(9, 14))
    for size in (8, 12, 20):
        passages = split(text, SplitByStructure(size))
        assert not [each.text for each in passages if re.search(r"(?:^|\n)\d+\.$", each.text)]
