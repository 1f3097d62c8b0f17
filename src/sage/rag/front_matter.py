"""The block of YAML that Markdown files begin with: metadata, not text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sage._extras import load

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sage.rag.documents import Value

LETTERS_MAX = 64 * 1024
"""A block that is not closed by then is not front matter."""

END = re.compile(r"^(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.MULTILINE)
# A value with a colon in it needs quotes in YAML, but people write it without.
FIELD = re.compile(r"([A-Za-z_][\w.-]*)[ \t]*:(?:[ \t]+(\S.*)|[ \t]*)")
TAGS = "tag:yaml.org,2002:"


def parted(text: str) -> tuple[Mapping[str, Value], str]:
    """Return the fields of a text's front matter and the text after it; lists, mappings and null are left out."""
    if not text.startswith("---") or text[3:].partition("\n")[0].strip():
        return {}, text
    begin = text.find("\n") + 1
    end = END.search(text, begin, begin + LETTERS_MAX) if begin else None
    if end is None:
        return {}, text
    fields = _fields(text[begin : end.start()])
    return ({}, text) if fields is None else (fields, text[end.end() :])


def _fields(block: str) -> dict[str, Value] | None:
    """Return the fields of a block; None if it is not front matter, as a line of dashes may mean something else."""
    lines = [line for line in block.split("\n") if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        return None if block.strip() == "" and block.count("\n") > 1 else {}
    if not FIELD.match(lines[0]) and not lines[0].startswith(('"', "'")):
        return None
    yaml = load("yaml", "rag")
    try:
        loader = yaml.SafeLoader(block)
        try:
            node = loader.get_single_node()
            if not isinstance(node, yaml.MappingNode):
                return None
            # Values alone are made of their nodes: lists of lists by reference can grow without bound.
            found = {
                str(key.value): _scalar(loader, value)
                for key, value in node.value
                if isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode)
            }
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError):
        fields = [FIELD.fullmatch(line.rstrip()) for line in lines]
        return {each[1]: each[2].strip() for each in fields if each and each[2]} if all(fields) else None
    return {name: value for name, value in found.items() if value is not None}


def _scalar(loader: object, node: object) -> Value | None:
    """Return the value of a node; a date stays as it was written."""
    tag = str(node.tag).removeprefix(TAGS)  # type: ignore[attr-defined]
    if tag in ("int", "float", "bool"):
        value: Value = loader.construct_object(node)  # type: ignore[attr-defined]
        return value
    return None if tag == "null" else str(node.value)  # type: ignore[attr-defined]
