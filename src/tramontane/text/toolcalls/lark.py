"""Grammars of calls: what a model must write to call one of some tools, in the syntax that it knows.

Owns llguidance's Lark dialect as far as calls need it. Must not know: how a grammar becomes masks, requests. Source:
llguidance's documentation of its syntax.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tramontane.errors import InvalidRequest
from tramontane.records import dataclass
from tramontane.types import Grammar, Tool

_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As models saw JSON: one space after commas and colons."""


@dataclass(frozen=True)
class Shape:
    """`begin`, the mark that announces calls, then `opening call (separator call)* closing`."""

    begin: str
    opening: str = ""
    separator: str = ""
    closing: str = ""


class Lark:
    """A grammar in the making. `special`: ids of the special tokens, by their text."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        self._rules: list[str] = []

    def rule(self, body: str, options: str = "") -> str:
        """Add a rule; returns its name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def text(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._rules])

    def is_token(self, text: str) -> bool:
        return text in self._special

    def words(self, text: str) -> str:
        """Exactly this text, with the special tokens in it as such."""
        parts: list[str] = []
        while text:
            found = [(place, -len(token), token) for token in self._special if (place := text.find(token)) >= 0]
            place, _, token = min(found, default=(len(text), 0, ""))
            if place:
                parts.append(_quoted(text[:place]))
            if token:
                parts.append(f"<[{self._special[token]}]>")
            text = text[place + len(token) :]
        return " ".join(parts)

    def until(self, mark: str) -> str:
        """Any text, and `mark` after it. No text has a special token in it."""
        if any(mark.startswith(token) for token in self._special):
            return f"/(?s:.*)/ {self.words(mark)}"
        return self.rule("/(?s:.*)/", f"[suffix={_quoted(mark)}]")

    def json(self, schema: Any, *, lenient: bool = False) -> str:
        """A value that the schema allows; `lenient` passes over keywords that grammars cannot express."""
        options = {**_SPACING, **({"lenient": True} if lenient else {})}
        if schema is True:
            schema = {}
        if isinstance(schema, Mapping):
            schema = {**schema, "x-guidance": options}
        return self.rule(f"%json {json.dumps(schema)}")

    def arguments(self, tool: Tool) -> str:
        """The arguments of a tool, as JSON."""
        return self.json(parameters(tool), lenient=not tool.strict)


def parameters(tool: Tool) -> Mapping[str, Any]:
    """The schema of a tool's arguments; they are always an object."""
    given = tool.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **given}


def properties(tool: Tool) -> list[tuple[str, Any, bool]]:
    """Name, schema and whether it must be given of each argument, for syntaxes that are no JSON."""
    schema = parameters(tool)
    listed = schema.get("required")
    required = listed if isinstance(listed, (list, tuple)) else ()
    found = schema.get("properties") or {}
    if not isinstance(found, Mapping) or "$ref" in json.dumps(found):
        raise InvalidRequest(
            "tools", f"the schema of {tool.name!r} cannot be enforced in this model's syntax: it has references",
            "Write the arguments' schemas out.",
        )  # fmt: skip
    return [(str(name), value, name in required) for name, value in found.items()]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


Call = Callable[[Lark, Tool], str]
_ANY = "/(?s:.*)/"
_EMPTY = '""'


def json_call(before: str, between: str, after: str) -> Call:
    """`before`, the name, `between`, arguments as JSON, `after`."""
    return lambda lark, tool: " ".join(
        filter(None, (lark.words(before + tool.name + between), lark.arguments(tool), lark.words(after)))
    )


def elements_call(name: str, before: str, after: str, end: str) -> Call:
    """An element for each argument, its text a string as it is, or else JSON."""

    def call(lark: Lark, tool: Tool) -> str:
        parts = [lark.words(name.replace("{name}", tool.name))]
        for key, schema, required in properties(tool):
            head = lark.words(before.replace("{key}", key))
            plain = isinstance(schema, Mapping) and schema.get("type") == "string" and not _constrained(schema)
            body = lark.until(after) if plain else f"{_leaf(lark, tool, schema)} {lark.words(after)}"
            parts.append(f"{head} {body}" if required else f"({head} {body})?")
        return " ".join([*parts, lark.words(end)])

    return call


def _leaf(lark: Lark, tool: Tool, schema: Any) -> str:
    """A value that is not any text: one of some strings without quotes, or JSON."""
    if isinstance(schema, Mapping) and schema.get("type") == "string" and isinstance(schema.get("enum"), list):
        return "(" + " | ".join(_quoted(str(value)) for value in schema["enum"]) + ")"
    return lark.json(schema, lenient=not tool.strict)


def _constrained(schema: Mapping[str, Any]) -> bool:
    return bool(set(schema) & {"enum", "const", "pattern", "format", "minLength", "maxLength"})


def braces_call(quote: str, end: str) -> Call:
    """`call:name{key:value,...}`, strings between quotes of their own."""

    def value(lark: Lark, tool: Tool, schema: Any) -> str:
        if not isinstance(schema, Mapping) or schema.get("type") != "string":
            return lark.json(schema, lenient=not tool.strict)
        if isinstance(schema.get("enum"), list):
            return f"{lark.words(quote)} {_leaf(lark, tool, schema)} {lark.words(quote)}"
        return f"{lark.words(quote)} {lark.until(quote)}"

    def call(lark: Lark, tool: Tool) -> str:
        return (
            f"{lark.words('call:' + tool.name + '{')} {_members(lark, tool, ':', ',', value)} {lark.words('}' + end)}"
        )

    return call


def python_call(lark: Lark, tool: Tool) -> str:
    """`name(key=value, ...)`, values as JSON."""

    def value(lark: Lark, tool: Tool, schema: Any) -> str:
        return lark.json(schema, lenient=not tool.strict)

    return f"{lark.words(tool.name + '(')} {_members(lark, tool, '=', ', ', value)} {lark.words(')')}"


def _members(lark: Lark, tool: Tool, equals: str, comma: str, value: Callable[[Lark, Tool, Any], str]) -> str:
    """The arguments in the order of the schema, those that may be left out included, with commas between them."""
    members = [
        (f"{lark.words(key + equals)} {value(lark, tool, schema)}", required)
        for key, schema, required in properties(tool)
    ]
    follows = ""  # what may come once there is an argument
    alone = ""  # what may come while there is none
    for member, required in reversed(members):
        joined = f"{lark.words(comma)} {member} {follows}"
        first = f"{member} {follows}"
        follows, alone = (
            lark.rule(joined if required else f"{joined} | {follows or _EMPTY}"),
            lark.rule(first if required else f"{first} | {alone or _EMPTY}"),
        )
    return alone or _EMPTY


def harmony_call(lark: Lark, tool: Tool) -> str:
    """A message to a function on the commentary channel."""
    head = lark.words(f"<|channel|>commentary to=functions.{tool.name} <|constrain|>json<|message|>")
    return f"{head} {lark.arguments(tool)} {lark.words('<|call|>')}"


def answer(lark: Lark, grammar: Grammar | None) -> str:
    """What an answer without calls may be: any text, or what the request's own grammar says."""
    if grammar is None:
        return _ANY
    if grammar.kind == "json_object":
        return lark.json({"type": "object"})
    if grammar.kind == "json_schema":
        return lark.rule(f"%json {json.dumps(grammar.value)}")
    if grammar.kind == "choice":
        return "(" + " | ".join(_quoted(text) for text in grammar.value) + ")"
    if grammar.kind == "regex":
        return lark.rule("/" + str(grammar.value).replace("/", "\\/") + "/")
    return lark.rule(f"%lark {{\n{grammar.value}\n}}")


def marked(
    lark: Lark,
    shape: Shape,
    call: Call,
    tools: Sequence[Tool],
    *,
    single: bool,
    forced: bool,
    given: Grammar | None,
) -> str:
    """An answer in which calls follow a mark: calls alone (`forced`), or any text with calls at its end if at all;
    `given` says what that text must be."""
    if not tools:
        return answer(lark, given)
    body = _calls(lark, shape, call, tools, single)
    whole = f"{lark.words(shape.begin)} {body}".strip()
    if forced:
        return whole
    if given is not None:
        return f"({whole} | {answer(lark, given)})"
    if not shape.begin:
        first = shape.opening[:1] or "{"
        return f"({whole} | /(?s:[^{re.escape(first)}].*)?/)"
    if lark.is_token(shape.begin):
        return f"{_ANY} ({whole})?"
    return f"({lark.until(shape.begin)} {body} | {_ANY})"


def _calls(lark: Lark, shape: Shape, call: Call, tools: Sequence[Tool], single: bool) -> str:
    """One call or more, from what follows the shape's `begin`."""
    one = lark.rule(" | ".join(call(lark, tool) for tool in tools))
    more = "" if single else f"({lark.words(shape.separator)} {one})*"
    return lark.rule(" ".join(filter(None, (lark.words(shape.opening), one, more, lark.words(shape.closing)))))


def channels(lark: Lark, call: Call, tools: Sequence[Tool], *, forced: bool, given: Grammar | None) -> str:
    """An answer in harmony's channels: reasoning and remarks, then a call or the final text."""
    said = f"{lark.until('<|end|>')} {lark.words('<|start|>assistant')}"
    analysis = lark.rule(f"{lark.words('<|channel|>analysis<|message|>')} {said}")
    remark = lark.rule(f"{lark.words('<|channel|>commentary<|message|>')} {said}")
    final = f"{lark.words('<|channel|>final<|message|>')} {answer(lark, given)}"
    called = " | ".join(call(lark, tool) for tool in tools)
    if forced:
        return f"{analysis}? ({called})"
    return f"({analysis} | {remark})* ({' | '.join(filter(None, (called, final)))})"
