"""Calls written as JSON objects with a name and arguments, alone or in a list, after some mark or none.

Owns the syntaxes of Hermes and Qwen, Llama 3, Mistral, Phi-4 and Granite, DeepSeek. Must not know: templates, tokens.
Sources: the templates that the models are published with, and their makers' pages on function calling.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Literal

from tramontane.text.toolcalls.output import Output
from tramontane.text.toolcalls.reader import Reader, Reading

NAME = re.compile(r"[^\s\"'<>\[\]{}()|,;:]{1,128}")
"""What can be the name of a function that a mark announces."""
_ARGUMENTS = ("arguments", "parameters")

Outcome = Literal["whole", "broken", "none"]
"""Of reading a call: it was announced and ended well; it was announced, and then its arguments are no JSON; it was none
at all, and nothing was put out."""


def call_object(reader: Reader, out: Output, known: Collection[str] | None = None) -> Reading[Outcome]:
    """Read `{"name": ..., "arguments": {...}}`; other keys are passed over. `known`: names to hold to, if any.

    Nothing is put out before the name and the beginning of the arguments are read, so that what turns out to be
    something else can be given back as text.
    """
    name, waiting, announced = "", "", False
    if not (yield from reader.starts("{")):
        return "none"
    while True:
        yield from reader.space()
        key: list[str] = []
        if not (yield from reader.json_string(key.append)):
            return "broken" if announced else "none"
        yield from reader.space()
        if not (yield from reader.starts(":")):
            return "broken" if announced else "none"
        yield from reader.space()
        field = json.loads("".join(key))
        if field in _ARGUMENTS and name and not announced and (yield from reader.peek()) == "{":
            reader.forget()
            out.call(name)
            announced = True
            if not (yield from reader.json_value(out.arguments)):
                return "broken"
        else:
            value: list[str] = []
            if not (yield from reader.json_value(value.append)):
                return "broken" if announced else "none"
            if field == "name" and not name:
                name = _name("".join(value), known)
                if not name:
                    return "none"
            elif field in _ARGUMENTS and not announced:
                waiting = _object("".join(value))
        yield from reader.space()
        if not (yield from reader.starts(",")):
            break
    if not (yield from reader.starts("}")):
        return "broken" if announced else "none"
    if not announced:
        if not name:
            return "none"
        out.call(name)
        out.arguments(waiting or "{}")
    return "whole"


def _name(value: str, known: Collection[str] | None) -> str:
    name = json.loads(value)
    if not isinstance(name, str) or not name.strip() or not name.isprintable():  # half a surrogate pair is not either
        return ""
    if known is not None and name not in known:
        return ""
    return name


def _object(value: str) -> str:
    """Arguments that came before the name, or as a string that holds JSON."""
    content = json.loads(value)
    if isinstance(content, str):
        try:
            return content if isinstance(json.loads(content), dict) else "{}"
        except (ValueError, RecursionError):
            return content
    return value if isinstance(content, dict) else "{}"


def arguments(reader: Reader, out: Output, ends: Sequence[str]) -> Reading[None]:
    """Copy the arguments of a call that was announced; what is no JSON is copied as it is, up to one of `ends`."""
    if not (yield from reader.json_value(out.arguments)):
        yield from reader.until(ends, out.arguments, take=False)


def marked(reader: Reader, out: Output, begins: Sequence[str], ends: Sequence[str]) -> Reading[None]:
    """An object or a list of objects after one of the marks `begins`, as Phi-4 and Granite write."""
    while mark := (yield from reader.until(begins, out.text, keep=True)):
        if not (yield from objects(reader, out, [*ends, *begins])):
            reader.back()
            yield from reader.starts(mark)
            out.text(mark)
            continue
        yield from reader.space()
        yield from reader.starts(*ends)


def hermes(reader: Reader, out: Output, loose: Collection[str]) -> Reading[None]:
    """An object between `<tool_call>` tags. Small models forget the tags, or write a fence instead: so an object that
    names one of the tools `loose` counts too where it begins the answer, or stands in a fence."""
    tag, fence = "<tool_call>", "```json"
    reader.save()
    yield from reader.space()
    if (yield from reader.peek()) != "{" or not (yield from objects(reader, out, (tag,), loose)):
        reader.back()
    while mark := (yield from reader.until((tag, fence), out.text, keep=True)):
        end = "</tool_call>" if mark == tag else "```"
        if not (yield from objects(reader, out, (end, tag), None if mark == tag else loose)):
            reader.back()
            yield from reader.starts(mark)
            out.text(mark)
            continue
        yield from reader.space()
        yield from reader.starts(end)


def objects(reader: Reader, out: Output, ends: Sequence[str], known: Collection[str] | None = None) -> Reading[bool]:
    """Read a call object or a list of such; False where the first is none."""
    yield from reader.space()
    listed = yield from reader.starts("[")
    made = False
    while True:
        yield from reader.space()
        outcome = yield from call_object(reader, out, known)
        if outcome == "none":
            if made:
                reader.back()
            return made
        made = True
        reader.save()  # what follows is text, if it is no call
        if outcome == "broken":
            yield from reader.until(ends, out.arguments, take=False)
        out.close()
        if not listed or outcome == "broken":
            return True
        yield from reader.space()
        if not (yield from reader.starts(",")):
            yield from reader.starts("]")
            return True


def llama(reader: Reader, out: Output, known: Collection[str]) -> Reading[None]:
    """Objects with `parameters`, which begin the answer or follow `<|python_tag|>`; several come after `;`."""
    tag = "<|python_tag|>"
    reader.save()
    mark = ""
    while True:
        yield from reader.space()
        mark = (yield from reader.starts(tag)) or mark
        yield from reader.space()
        outcome = yield from call_object(reader, out, None if mark else known)
        if outcome == "none":
            reader.back()
            mark = yield from reader.starts(tag)
            out.text(mark)
            mark = yield from reader.until((tag,), out.text, take=False)
            if not mark:
                return
            reader.save()
            continue
        if outcome == "broken":
            yield from reader.until((tag,), out.arguments, take=False)
        out.close()
        reader.save()
        yield from reader.space()
        if (yield from reader.starts(";", ",")):
            continue
        if not (yield from reader.peek()):
            return


def mistral(reader: Reader, out: Output) -> Reading[None]:
    """`[TOOL_CALLS]` and then a list of objects, or a name with `[ARGS]`, and `[CALL_ID]` before that or not."""
    begin = "[TOOL_CALLS]"
    while mark := (yield from reader.until((begin,), out.text, keep=True)):
        yield from reader.space()
        if (yield from reader.peek()) in ("[", "{"):
            good = yield from objects(reader, out, (begin,))
        else:
            good = yield from _mistral_named(reader, out, begin)
        if not good:
            reader.back()
            yield from reader.starts(mark)
            out.text(mark)


def _mistral_named(reader: Reader, out: Output, begin: str) -> Reading[bool]:
    name: list[str] = []
    id_: list[str] = []
    mark = yield from reader.until(("[ARGS]", "[CALL_ID]", "{", begin, "\n"), name.append, take=False)
    if mark == "[CALL_ID]":
        yield from reader.starts(mark)
        mark = yield from reader.until(("[ARGS]", "{", begin, "\n"), id_.append, take=False)
    if mark not in ("[ARGS]", "{") or not NAME.fullmatch("".join(name).strip()):
        return False
    yield from reader.starts("[ARGS]")
    yield from reader.space()
    out.call("".join(name).strip(), "".join(id_).strip() or None)
    reader.forget()
    yield from arguments(reader, out, (begin,))
    out.close()
    return True


def deepseek(reader: Reader, out: Output) -> Reading[None]:
    """A block of calls between marks: `function`, the name and fenced JSON (V3, R1), or name and JSON (V3.1)."""
    block, call, end = "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    while mark := (yield from reader.until((block, call), out.text, keep=True)):
        if mark == block:
            yield from reader.space()
            if not (yield from reader.starts(call)):
                reader.back()
                yield from reader.starts(mark)
                out.text(mark)
                continue
        if not (yield from _deepseek_call(reader, out, end)):
            reader.back()
            yield from reader.starts(mark)
            out.text(mark)
            continue
        reader.save()
        yield from reader.space()
        if not (yield from reader.starts("<｜tool▁calls▁end｜>")):
            reader.back()


def _deepseek_call(reader: Reader, out: Output, end: str) -> Reading[bool]:
    name: list[str] = []
    separator = yield from reader.until(("<｜tool▁sep｜>", end), name.append)
    yield from reader.space()
    if (yield from reader.peek()) != "{" and "".join(name).strip() == "function":
        name = []
        yield from reader.until(("\n", end), name.append, take=False)
        yield from reader.space()
        yield from reader.starts("```json", "```")
        yield from reader.space()
    if separator == end or not NAME.fullmatch("".join(name).strip()) or not (yield from reader.peek()):
        return False
    out.call("".join(name).strip())
    reader.forget()
    yield from arguments(reader, out, (end,))
    yield from reader.space()
    yield from reader.starts("```")
    yield from reader.space()
    yield from reader.starts(end)
    out.close()
    return True
