"""The records of a RAG pipeline: documents, the passages they are split into, and errors that name their place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from sage.errors import SageError

if TYPE_CHECKING:
    from collections.abc import Mapping

Value = str | int | float | bool


class DocumentError(SageError):
    """A document could not be read; the message names the file, and the line where there is one.

    Attributes:
        file: the file, as it was named or found.
        line: the line, counted from 1, or None where the whole file is meant.
    """

    def __init__(self, file: str, problem: str, line: int | None = None) -> None:
        place = f'file "{file}"' if line is None else f'file "{file}", line {line}'
        super().__init__(f"{place}: {problem}")
        self.file = file
        self.line = line
        self._problem = problem

    def __reduce__(self) -> tuple[type[DocumentError], tuple[str, str, int | None]]:
        return DocumentError, (self.file, self._problem, self.line)


class Block(NamedTuple):
    """A part of a text that belongs together: a heading, a paragraph, a list, a table or a piece of code."""

    start: int
    end: int
    level: int = 0
    is_prose: bool = True


class Outline(NamedTuple):
    """The blocks of a text, as the loader of its format found them; they hold for that text only."""

    text: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A text with a name.

    Attributes:
        id: names it among all documents of an index, the same on every run.
        text: the whole text; without an outline, headings are those of Markdown.
        metadata: its own fields, and those of `origin` whose names are free.
        origin: where it comes from: "file", "format", and "title", "encoding", "page", "slide", "sheet", "chapter" or
            "line" where there is one. An index has them under names that begin with "sage:".
        outline: where its headings and paragraphs are.
    """

    id: str
    text: str
    metadata: Mapping[str, Value] = field(default_factory=dict)
    origin: Mapping[str, Value] = field(default_factory=dict, compare=False)
    outline: Outline | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of a document that is found, shown and cited as one.

    Attributes:
        id: names it among all passages of an index, the same on every run while the document's headings stay.
        text: the document's text from `start` to `end`, unchanged.
        document: the id of the document.
        start: where it begins in the document's text, in characters.
        end: where it ends there, in characters.
        heading: the headings above it, the outermost first, joined by " > "; empty without headings.
        metadata: that of the document.
        origin: that of the document.
    """

    id: str
    text: str
    document: str
    start: int = 0
    end: int = 0
    heading: str = ""
    metadata: Mapping[str, Value] = field(default_factory=dict)
    origin: Mapping[str, Value] = field(default_factory=dict, compare=False)

    @property
    def searchable(self) -> str:
        """The text with its headings, as it is indexed: the subject of a passage is often named only above it."""
        return f"{self.heading}\n{self.text}" if self.heading else self.text
