"""What flows through a RAG pipeline: documents, the passages they are split into, and errors that name their place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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


@dataclass(frozen=True, slots=True)
class Document:
    """A text with a name.

    Attributes:
        id: names it among all documents of an index, the same on every run.
        text: the whole text; headings are those of Markdown.
        metadata: what is known of it: "file", "format", and "title", "page" or "line" where there is one.
    """

    id: str
    text: str
    metadata: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of a document that is found, shown and cited as one.

    Attributes:
        id: names it among all passages of an index, the same on every run while the document's headings stay.
        text: what stands in the document from `start` to `end`, unchanged.
        document: the id of the document.
        start: where it begins in the document's text, in characters.
        end: where it ends there, in characters.
        heading: the headings above it, the outermost first, joined by " > "; empty where there are none.
        metadata: that of the document.
    """

    id: str
    text: str
    document: str
    start: int = 0
    end: int = 0
    heading: str = ""
    metadata: Mapping[str, Value] = field(default_factory=dict)

    @property
    def searchable(self) -> str:
        """The text with its headings, as it is indexed: what a passage is about often stands only above it."""
        return f"{self.heading}\n{self.text}" if self.heading else self.text
