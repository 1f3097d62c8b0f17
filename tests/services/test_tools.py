"""Functions become tools, and a model that asks for one gets its result or its error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from sage import GraphError
from sage.services.models.llm import Image, Message, ToolCall
from sage.services.models.tools import Tool, called, tool_of


def schema_of(hint: Any) -> Any:
    def tool(value: Any) -> None: ...

    tool.__annotations__["value"] = hint
    return Tool.of(tool).parameters["properties"]["value"]


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (str, {"type": "string"}),
        (int, {"type": "integer"}),
        (bool, {"type": "boolean"}),
        (Any, {}),
        (list, {"type": "array"}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (Sequence[str], {"type": "array", "items": {"type": "string"}}),
        (dict[str, int], {"type": "object"}),
        (Mapping[str, Any], {"type": "object"}),
        (Literal["a", "b"], {"enum": ["a", "b"]}),
        (int | None, {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
        (list[int | str], {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "string"}]}}),
    ],
)
def test_a_type_becomes_a_schema(hint: Any, schema: Any) -> None:
    assert schema_of(hint) == schema


def untyped(a) -> None:  # type: ignore[no-untyped-def]
    ...


def odd(a: Path) -> None: ...


def many(*a: int) -> None: ...


@pytest.mark.parametrize(
    ("tool", "text"),
    [
        (untyped, 'tool "untyped" has the parameter "a" without a type'),
        (odd, 'tool "odd", "a" has the type .*Path.*, which a model cannot give'),
        (many, r'tool "many" has the variadic positional parameter "a", and a model gives arguments by'),
        (lambda: None, "the tool .*lambda.* has no name"),
        (3, "a tool is 3"),
    ],
)
def test_a_function_that_cannot_be_a_tool_is_refused(tool: Any, text: str) -> None:
    with pytest.raises(GraphError, match=text):
        _ = tool_of(tool)


def divide(first: float, second: float = 2.0) -> Any:
    return {"quotient": first / second}


def say() -> str:
    return "a text"


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("divide", '{"first": 3}', '{"quotient": 1.5}'),
        ("say", "", "a text"),
        ("say", "{}", "a text"),
        ("divide", '{"first": 3, "second": 0}', "error: ZeroDivisionError: "),
        ("divide", "{}", "error: TypeError: divide() missing 1 required positional argument: 'first'"),
        ("divide", "{oops", "error: ValueError: the model called the tool \"divide\" with '{oops'"),
        ("divide", "[1]", "error: ValueError: the model called the tool \"divide\" with '[1]'"),
        ("multiply", "{}", "error: LookupError: tool \"multiply\" does not exist; the tools are ['divide', 'say']"),
    ],
)
def test_a_call_is_answered(name: str, arguments: str, result: str) -> None:
    tools: list[Callable[..., Any] | Mapping[str, Any]] = [divide, say, {"type": "function"}]
    turn = called(ToolCall("c1", name, arguments), tools)
    assert (turn.role, turn.tool_call_id) == ("tool", "c1")
    assert turn.text.startswith(result)


def test_an_image_is_sent_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.jpeg").write_bytes(b"abc")
    (tmp_path / "a.txt").write_bytes(b"abc")
    image = Image.read(str(tmp_path / "a.jpeg"))
    assert image.url == "data:image/jpeg;base64,YWJj"
    assert Message("user", ["one", image, {"type": "text", "text": "two"}]).text == "one\n\ntwo"
    with pytest.raises(ValueError, match="does not have the name of an image"):
        Image.read(tmp_path / "a.txt")
