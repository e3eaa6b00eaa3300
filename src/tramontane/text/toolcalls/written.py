"""Calls written in syntaxes of their own: XML elements, Python calls, Gemma's braces.

Owns those syntaxes, and how their values become JSON. Must not know: templates, tokens. Sources: the templates that
Qwen3-Coder, GLM-4.5, FunctionGemma, Gemma 4 and LFM2 are published with, and Google's and Meta's pages on function
calling.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from tramontane.records import dataclass
from tramontane.text.toolcalls.jsons import NAME
from tramontane.text.toolcalls.output import Output
from tramontane.text.toolcalls.reader import Reader, Reading, Write
from tramontane.types import Tool


def dumps(value: Any) -> str:
    """JSON as arguments are given out."""
    return json.dumps(value, ensure_ascii=False)


class _Object:
    """The members of an object, written to the output as they come."""

    def __init__(self, write: Write) -> None:
        self._write, self._first = write, True

    def key(self, name: str) -> None:
        self._write(("{" if self._first else ", ") + dumps(name) + ": ")
        self._first = False

    def end(self) -> None:
        self._write("{}" if self._first else "}")


# ---- XML elements


@dataclass(frozen=True)
class Elements:
    """How a call is written with elements: what stands around the name, and around each key and value."""

    begins: tuple[str, ...]
    name: tuple[tuple[str, ...], tuple[str, ...]]
    """What stands before a name (one of these), and after it (one of these)."""
    key: tuple[str, str]
    value: tuple[str, tuple[str, ...]]
    """What stands before a value, and after it (one of these)."""
    ends: tuple[str, ...]


QWEN_CODER = Elements(
    begins=("<tool_call>", "<function="),
    name=(("<function=",), (">",)),
    key=("<parameter=", ">"),
    value=("\n", ("\n</parameter>", "</parameter>")),
    ends=("</function>", "</tool_call>"),
)
GLM = Elements(
    begins=("<tool_call>",),
    name=(("",), ("\n", "<arg_key>", "</tool_call>")),
    key=("<arg_key>", "</arg_key>"),
    value=("<arg_value>", ("</arg_value>",)),
    ends=("</tool_call>",),
)


def elements(reader: Reader, out: Output, syntax: Elements, tools: Sequence[Tool]) -> Reading[None]:
    """A call as an element with one for each argument, whose text is of the type that the tool's schema gives it."""
    schemas = {tool.name: tool.parameters or {} for tool in tools}
    while mark := (yield from reader.until(syntax.begins, out.text, keep=True)):
        if not (yield from _element(reader, out, syntax, mark, schemas)):
            reader.back()
            yield from reader.starts(mark)
            out.text(mark)


def _element(
    reader: Reader, out: Output, syntax: Elements, mark: str, schemas: Mapping[str, Mapping[str, Any]]
) -> Reading[bool]:
    before, after = syntax.name
    yield from reader.space()
    if mark not in before and before != ("",) and not (yield from reader.starts(*before)):
        return False
    written: list[str] = []
    end = yield from reader.until(after, written.append, take=False)
    name = "".join(written).strip()
    if not end or not NAME.fullmatch(name):
        return False
    if end == ">":
        yield from reader.starts(end)
    out.call(name)
    reader.forget()
    found = schemas.get(name, {}).get("properties")
    properties = found if isinstance(found, Mapping) else {}
    members = _Object(out.arguments)
    while True:
        yield from reader.space()
        if not (yield from reader.starts(syntax.key[0])):
            break
        key: list[str] = []
        yield from reader.until((syntax.key[1],), key.append)
        if syntax.value[0] != "\n":
            yield from reader.space()
        yield from reader.starts(syntax.value[0])
        members.key("".join(key).strip())
        yield from _typed(reader, out, syntax.value[1], properties.get("".join(key).strip()))
    members.end()
    while True:
        yield from reader.space()
        if not (yield from reader.starts(*syntax.ends)):
            break
    out.close()
    return True


def _typed(reader: Reader, out: Output, ends: Sequence[str], schema: Any) -> Reading[None]:
    """A value as JSON: a string as it comes, another once it is whole; what is no JSON is a string."""
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        out.arguments('"')
        yield from reader.until(ends, lambda text: out.arguments(dumps(text)[1:-1]))
        out.arguments('"')
        return
    written: list[str] = []
    yield from reader.until(ends, written.append)
    out.arguments(typed("".join(written)))


def typed(text: str) -> str:
    """JSON of a value written as JSON, or as Python writes True, False and None, or else as a string."""
    text = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text)
    try:
        return dumps(json.loads(text, parse_constant=_no_constant))
    except (ValueError, RecursionError):
        return dumps(text)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


# ---- Gemma's braces


@dataclass(frozen=True)
class Braces:
    """Gemma's marks: around a call, and the one that stands on both sides of a string."""

    begin: str
    end: str
    quote: str


FUNCTION_GEMMA = Braces("<start_function_call>", "<end_function_call>", "<escape>")
GEMMA_4 = Braces("<|tool_call>", "<tool_call|>", '<|"|>')


def braces(reader: Reader, out: Output, syntax: Braces) -> Reading[None]:
    """`call:name{key:value,...}` between marks."""
    values = _Values(reader, lambda write: _marked_string(reader, write, syntax.quote), bare_strings=True)
    while mark := (yield from reader.until((syntax.begin,), out.text, keep=True)):
        yield from reader.space()
        name: list[str] = []
        end = ""
        if (yield from reader.starts("call:")):
            end = yield from reader.until(("{", syntax.end), name.append, take=False)
        if end != "{" or not NAME.fullmatch("".join(name).strip()):
            reader.back()
            yield from reader.starts(mark)
            out.text(mark)
            continue
        out.call("".join(name).strip())
        reader.forget()
        if not (yield from values.copy(out.arguments)):
            yield from reader.until((syntax.end,), out.arguments, take=False)
        yield from reader.space()
        yield from reader.starts(syntax.end)
        out.close()


def _marked_string(reader: Reader, write: Write, quote: str) -> Reading[bool | None]:
    if not (yield from reader.starts(quote)):
        return (yield from reader.json_string(write)) if (yield from reader.peek()) == '"' else None
    write('"')
    end = yield from reader.until((quote,), lambda text: write(dumps(text)[1:-1]))
    write('"')
    return bool(end)


class _Values:
    """Copies values in some syntax as JSON.

    `string` copies a string, if one comes next: True if it was whole, None if there was none. `bare_strings`: whether
    a word that is no constant is a string.
    """

    _CLOSING: Mapping[str, str] = {"[": "]", "(": ")", "{": "}"}
    _MAX_DEPTH = 64

    def __init__(
        self, reader: Reader, string: Callable[[Write], Reading[bool | None]], *, bare_strings: bool = False
    ) -> None:
        self._reader, self._string, self._bare_strings = reader, string, bare_strings

    def copy(self, write: Write, depth: int = 0) -> Reading[bool]:
        """Copy one value; False where it breaks off or is none."""
        yield from self._reader.space()
        whole = yield from self._string(write)
        if whole is not None:
            return whole
        char = yield from self._reader.starts(*self._CLOSING)
        if char:
            return depth < self._MAX_DEPTH and (yield from self._members(write, char, depth + 1))
        bare: list[str] = []
        end = yield from self._reader.until((",", "}", "]", ")"), bare.append, take=False)
        word = "".join(bare).strip()
        value = typed(word)
        if not word or not end or (value.startswith('"') and not self._bare_strings):
            write(word)
            return False
        write(value)
        return True

    def _members(self, write: Write, opening: str, depth: int) -> Reading[bool]:
        reader, closing = self._reader, self._CLOSING[opening]
        write("{" if opening == "{" else "[")
        yield from reader.space()
        first = True
        while not (yield from reader.starts(closing)):
            if not first:
                if not (yield from reader.starts(",")):
                    return False
                yield from reader.space()
                if (yield from reader.starts(closing)):  # a comma may stand after the last
                    break
                write(", ")
            first = False
            if opening == "{" and not (yield from self._key(write)):
                return False
            if not (yield from self.copy(write, depth)):
                return False
            yield from reader.space()
        write("}" if opening == "{" else "]")
        return True

    def _key(self, write: Write) -> Reading[bool]:
        key: list[str] = []
        if (yield from self._string(key.append)) is None:
            bare: list[str] = []
            yield from self._reader.until((":", ",", "}"), bare.append, take=False)
            key = [dumps("".join(bare).strip())]
        write("".join(key))
        yield from self._reader.space()
        colon = yield from self._reader.starts(":")
        write(": " if colon else "")
        return bool(colon)


# ---- Python calls

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"', "\n": ""}


def python(
    reader: Reader, out: Output, begins: Sequence[str], ends: Sequence[str], known: Collection[str]
) -> Reading[None]:
    """A list of calls as Python writes them, `[f(a=1), g()]`: where the answer begins, or after a mark."""
    reader.save()
    while True:
        yield from reader.space()
        yield from reader.starts(*begins)
        if (yield from _python_list(reader, out, known)):
            yield from reader.space()
            yield from reader.starts(*ends)
        else:
            reader.back()
            out.text((yield from reader.starts(*begins)))
        if not (yield from reader.until(begins, out.text, take=False)):
            return
        reader.save()


def _python_list(reader: Reader, out: Output, known: Collection[str]) -> Reading[bool]:
    yield from reader.space()
    if not (yield from reader.starts("[")):
        return False
    made = False
    while True:
        yield from reader.space()
        if not (yield from _python_call(reader, out, known)):
            if made:
                reader.back()
            return made
        made = True
        reader.save()
        yield from reader.space()
        if (yield from reader.starts("]")):
            reader.forget()
            return True
        yield from reader.starts(",")


def _python_call(reader: Reader, out: Output, known: Collection[str]) -> Reading[bool]:
    name: list[str] = []
    yield from reader.until(("(", ",", "]", "\n", "[", '"', "'"), name.append, take=False)
    called = "".join(name).strip()
    if called not in known or not (yield from reader.starts("(")):
        return False
    out.call(called)
    reader.forget()
    values = _Values(reader, lambda write: _python_string(reader, write))
    members = _Object(out.arguments)
    yield from reader.space()
    while not (yield from reader.starts(")")):
        key: list[str] = []
        end = yield from reader.until(("=", ")", ","), key.append, take=False)
        if end != "=":
            yield from _python_broken(reader, out, "".join(key))
            break
        yield from reader.starts("=")
        members.key("".join(key).strip())
        if not (yield from values.copy(out.arguments)):
            yield from _python_broken(reader, out, "")
            break
        yield from reader.space()
        yield from reader.starts(",")
        yield from reader.space()
    else:
        members.end()
    out.close()
    return True


def _python_broken(reader: Reader, out: Output, begun: str) -> Reading[None]:
    """What a call's arguments go on with, when they are none."""
    out.arguments(begun)
    yield from reader.until((")",), out.arguments)


def _python_string(reader: Reader, write: Write) -> Reading[bool | None]:
    quote = yield from reader.starts("'", '"')
    if not quote:
        return None
    write('"')
    while (char := (yield from reader.take())) and char != quote:
        if char == "\\":
            escaped = yield from reader.take()
            char = _ESCAPES.get(escaped, char + escaped)
        write(dumps(char)[1:-1])
    write('"')
    return bool(char)
