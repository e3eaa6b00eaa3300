"""Tools as Python users have them: `Tool`s, dicts in OpenAI's shape, plain functions.

Owns how a function's signature and docstring become a schema, and the spellings of a choice of tools. Must not know:
requests, backends, templates.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from tramontane.errors import InvalidRequest
from tramontane.types import NamedTool, Tool, ToolChoice

ToolLike = Tool | Mapping[str, Any] | Callable[..., Any]

_SIMPLE: Mapping[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_LISTS: tuple[Any, ...] = (list, tuple, set, frozenset, Sequence, Iterable)
_ARGUMENT = re.compile(r"(\w+)\s*(?:\([^)]*\))?:\s*(.*)")


def tools_of(given: Iterable[ToolLike] | None) -> tuple[Tool, ...]:
    """The tools in a list. Raises InvalidRequest("tools") for what is none."""
    if given is None:
        return ()
    if isinstance(given, (Tool, Mapping, str)) or not isinstance(given, Iterable):
        raise InvalidRequest("tools", f"{given!r:.80} is not a list of tools")
    return tuple(_tool(one) for one in given)


def choice_of(given: object) -> ToolChoice:
    """A choice of tools: auto, none, required, a NamedTool, or OpenAI's dict that names one."""
    if isinstance(given, NamedTool):
        return given
    if given in ("auto", "none", "required"):
        return given
    function = given.get("function", given) if isinstance(given, Mapping) else None
    if isinstance(function, Mapping) and isinstance(function.get("name"), str):
        return NamedTool(function["name"])
    raise InvalidRequest("tool_choice", f"{given!r:.80} is unknown", "Use auto, none, required or NamedTool(name).")


def _tool(given: ToolLike) -> Tool:
    if isinstance(given, Tool):
        return given
    if isinstance(given, Mapping):
        return _from_mapping(given)
    if callable(given):
        return tool_of(given)
    raise InvalidRequest("tools", f"{given!r:.80} is no tool", "Give a Tool, a dict or a function.")


def _from_mapping(given: Mapping[str, Any]) -> Tool:
    """OpenAI's `{"type": "function", "function": {...}}`, or the inner part alone."""
    if given.get("type", "function") != "function":
        raise InvalidRequest("tools", f"a tool of type {given['type']!r} is unknown", "Use function.")
    function = given.get("function", {key: value for key, value in given.items() if key != "type"})
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InvalidRequest("tools", f"{given!r:.80} has no name")
    for key in function:
        if key not in ("name", "description", "parameters", "strict"):
            raise InvalidRequest("tools", f"{key!r} is not a part of a tool", "Leave it out.")
    parameters, strict = function.get("parameters"), function.get("strict") or False
    if not isinstance(parameters, (Mapping, type(None))) or not isinstance(strict, bool):
        raise InvalidRequest(
            "tools", f"the parameters of {function['name']!r} are no JSON Schema, or strict no boolean"
        )
    return Tool(function["name"], str(function.get("description") or ""), parameters, strict)


def tool_of(function: Callable[..., Any]) -> Tool:
    """A tool by a function's name, signature and docstring, whose `Args:` (Google's style) describe the parameters.

    Raises InvalidRequest("tools") for a parameter whose type no JSON Schema says, or that has none.
    """
    name = getattr(function, "__name__", type(function).__name__)
    try:
        hints = typing.get_type_hints(function, include_extras=True)
        signature = inspect.signature(function)
    except (NameError, TypeError, ValueError) as error:
        raise InvalidRequest("tools", f"the signature of {name!r} cannot be read ({error})") from None
    description, of_arguments = _documented(inspect.getdoc(function) or "")
    properties: dict[str, Any] = {}
    required: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise InvalidRequest("tools", f"{name!r} takes {parameter}, which cannot be given by name")
        hint = hints.get(parameter.name, parameter.empty)
        if parameter.default is None:  # to be left out, rather than null
            hint = _without_none(hint)
        schema = _schema(hint, f"{name}({parameter.name})")
        if parameter.name in of_arguments:
            schema = {**schema, "description": of_arguments[parameter.name]}
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    return Tool(name, description, {"type": "object", "properties": properties, "required": required})


def _documented(text: str) -> tuple[str, dict[str, str]]:
    """What a docstring says of the function, and of each argument."""
    head, found, rest = text.partition("\nArgs:\n")
    arguments: dict[str, str] = {}
    name = ""
    for line in rest.splitlines() if found else ():
        if line and not line.startswith(" "):  # the next section
            break
        match = _ARGUMENT.fullmatch(line.strip())
        if match and len(line) - len(line.lstrip()) <= 4:
            name = match[1]
            arguments[name] = match[2]
        elif name and line.strip():
            arguments[name] += f" {line.strip()}"
    head = re.split(r"\n(?:Returns|Raises|Yields|Examples?):\n", head)[0]
    return " ".join(head.split()), arguments


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    return Union[tuple(one for one in get_args(hint) if one is not type(None))]  # noqa: UP007 - made at run time


def _one_of(values: Sequence[Any]) -> dict[str, Any]:
    kinds = {_SIMPLE.get(type(value)) for value in values}
    kind = kinds.pop() if len(kinds) == 1 else None
    return {**({"type": kind} if kind else {}), "enum": list(values)}


def _schema(hint: Any, where: str) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if hint in _SIMPLE:
        return {"type": _SIMPLE[hint]}
    if origin is typing.Annotated:
        said = next((word for word in arguments[1:] if isinstance(word, str)), None)
        return {**_schema(arguments[0], where), **({"description": said} if said else {})}
    if origin is Literal:
        return _one_of(arguments)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _one_of([member.value for member in hint])
    if origin in (Union, types.UnionType):
        choices = [_schema(one, where) for one in arguments]
        plain = all(list(choice) == ["type"] and isinstance(choice["type"], str) for choice in choices)
        return {"type": [choice["type"] for choice in choices]} if plain else {"anyOf": choices}
    if hint in _LISTS or origin in _LISTS:
        inner = next((one for one in arguments if one is not Ellipsis), None)
        return {"type": "array", **({"items": _schema(inner, where)} if inner is not None else {})}
    if hint in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        inner = arguments[1] if len(arguments) == 2 and arguments[1] is not Any else None
        return {"type": "object", **({"additionalProperties": _schema(inner, where)} if inner is not None else {})}
    what = "no type" if hint is inspect.Parameter.empty else f"the type {hint!r:.60}, which has no JSON Schema here"
    raise InvalidRequest("tools", f"{where} has {what}", "Annotate it, or give a Tool with a schema.")
