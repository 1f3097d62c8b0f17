"""Tools: functions that a language model may ask for, with the schema that tells it how."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, Union, get_args, get_origin, get_type_hints

from sage.errors import GraphError, describe, hint, short
from sage.services.models.llm import Message

if TYPE_CHECKING:
    from sage.services.models.llm import ToolCall

AnyTool: TypeAlias = "Tool | Callable[..., object] | Mapping[str, object]"
"""A tool, a function that becomes one by `Tool.of`, or a schema as the protocol of model servers has it."""

SCHEMAS: dict[object, dict[str, object]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    dict: {"type": "object"},
    list: {"type": "array"},
    type(None): {"type": "null"},
    Any: {},
}
"""The JSON Schema of each plain type."""

MODES = ("auto", "none", "required")


class Description(TypedDict):
    """A function as a model is told of it."""

    name: str
    description: str
    parameters: dict[str, Any]


class Schema(TypedDict):
    """A tool as the protocol of model servers has it."""

    type: Literal["function"]
    function: Description


@dataclass(frozen=True)
class Tool:
    """A function that a model may ask for.

    Attributes:
        name: the name by which the model asks for it.
        description: its purpose, for the model to read.
        parameters: the JSON Schema of its arguments.
        function: gets the arguments by their names; its result is shown to the model.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., object]

    @classmethod
    def of(cls, function: Callable[..., object]) -> Tool:
        """Return a function as a tool: its name, its docstring and its type hints tell the model how to use it.

        Raises:
            GraphError: a parameter has no type hint, or one that JSON has no type for.
        """
        name = getattr(function, "__name__", "")
        if not name.isidentifier():
            raise hint(GraphError(f"the tool {short(function)} has no name"), "Write Tool(name, ...) for a lambda.")
        try:
            hints = get_type_hints(function)
        except NameError as unknown:
            raise GraphError(f'tool "{name}" has a type hint that cannot be read: {unknown}') from unknown
        properties = {}
        required = []
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                kind = f'has the {parameter.kind.description} parameter "{parameter.name}"'
                raise GraphError(f'tool "{name}" {kind}, and a model gives arguments by name')
            if parameter.name not in hints:
                error = GraphError(f'tool "{name}" has the parameter "{parameter.name}" without a type')
                raise hint(error, f"Write {parameter.name}: str, for example; the model has to know.")
            properties[parameter.name] = schema_of(hints[parameter.name], f'tool "{name}", "{parameter.name}"')
            if parameter.default is parameter.empty:
                required.append(parameter.name)
        parameters = {"type": "object", "properties": properties, "required": required}
        return cls(name, inspect.getdoc(function) or "", parameters, function)

    @property
    def schema(self) -> Schema:
        """The tool as the protocol of model servers has it."""
        described = Description(name=self.name, description=self.description, parameters=dict(self.parameters))
        return {"type": "function", "function": described}


@dataclass(frozen=True)
class SchemaTool:
    """A tool of which only the schema is known: the program calls it by itself."""

    schema: Mapping[str, Any]


def tool_of(tool: AnyTool) -> Tool | SchemaTool:
    """Return a tool, which may be a mere function or a schema.

    Raises:
        GraphError: it cannot be one.
    """
    if isinstance(tool, Tool):
        return tool
    if isinstance(tool, Mapping):
        return SchemaTool(tool)
    if callable(tool):
        return Tool.of(tool)
    raise hint(GraphError(f"a tool is {short(tool)}"), "It is a function, a Tool, or a schema as a mapping.")


def choice_of(choice: str | Mapping[str, object] | None, offered: Sequence[Mapping[str, object]]) -> object:
    """Return the choice of a tool as the protocol has it."""
    if choice is None or isinstance(choice, Mapping) or choice in MODES:
        return choice
    described = [tool.get("function", tool) for tool in offered]
    names = [each.get("name") for each in described if isinstance(each, Mapping)]
    if choice not in names:
        raise ValueError(f"tool_choice is {short(choice)}, which is not one of {list(MODES)} or of the tools {names}")
    return {"type": "function", "function": {"name": choice}}


def schema_of(hint_: object, place: str) -> dict[str, object]:
    """Return the JSON Schema of a type hint."""
    origin, args = get_origin(hint_), get_args(hint_)
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [schema_of(each, place) for each in args]}
    if origin in (list, Sequence) and args:
        return {"type": "array", "items": schema_of(args[0], place)}
    if (origin or hint_) in (dict, Mapping):
        return {"type": "object"}
    found = SCHEMAS.get(hint_)
    if found is None:
        error = GraphError(f"{place} has the type {hint_!r}, which a model cannot give")
        raise hint(error, "Types are str, int, float, bool, list, dict, Literal, and unions of them.")
    return dict(found)


def called(call: ToolCall, tools: Sequence[AnyTool]) -> Message:
    """Call the tool that a model asks for, and return the message that tells the model the result.

    An error of the tool, or of the model's in asking for it, is told to the model, which may try something else.

    Args:
        call: the call that the model asks for.
        tools: the available tools.
    """
    known = {tool.name: tool for tool in map(tool_of, tools) if isinstance(tool, Tool)}
    try:
        if call.name not in known:
            raise LookupError(f'tool "{call.name}" does not exist; the tools are {sorted(known)}')
        result = known[call.name].function(**call.values())
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    except Exception as error:  # the model hears of it, in the place of a result
        text = f"error: {describe(error)}"
    return Message("tool", text, tool_call_id=call.id)
