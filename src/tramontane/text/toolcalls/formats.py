"""FORMATS: how families of models write calls of tools, one row a format.

Owns what tells a format by a model's template, which function reads it, and how a grammar writes it. Must not know:
tokens' ids, requests. A new format is a row here, with a reading function where no other fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tramontane.records import dataclass
from tramontane.text.toolcalls import jsons, written
from tramontane.text.toolcalls.harmony import CHANNEL, CONSTRAIN, ENDS, MESSAGE, START, harmony
from tramontane.text.toolcalls.lark import (
    Lark,
    Shape,
    braces_call,
    elements_call,
    harmony_call,
    json_call,
    python_call,
)
from tramontane.text.toolcalls.output import Output, call_id, short_id
from tramontane.text.toolcalls.reader import Reader, Reading
from tramontane.types import Tool

Parse = Callable[[Reader, Output, Sequence[Tool]], Reading[None]]
Call = Callable[[Lark, Tool], str]


@dataclass(frozen=True)
class Format:
    """How calls are written."""

    parse: Parse
    """Reads an answer, the reasoning before it apart. Calls of strict tools are read only where grammars hold them."""
    shape: Shape
    """What stands around calls, for grammars."""
    call: Call
    """The grammar of one call."""
    markers: tuple[str, ...] = ()
    """Texts that all stand in the templates of models that write so; none: only by name."""
    marks: tuple[str, ...] = ()
    """Marks in an answer that may be special tokens, which a reader of the text does not see."""
    ids: Callable[[], str] = call_id
    channels: bool = False
    """Whether every answer is in this form, calls or not, its reasoning included."""


def _marked(*begins: str, ends: tuple[str, ...]) -> Parse:
    return lambda reader, out, tools: jsons.marked(reader, out, begins, ends)


def _elements(syntax: written.Elements) -> Parse:
    return lambda reader, out, tools: written.elements(reader, out, syntax, tools)


def _braces(syntax: written.Braces) -> Parse:
    return lambda reader, out, tools: written.braces(reader, out, syntax)


def _python(begins: tuple[str, ...] = (), ends: tuple[str, ...] = ()) -> Parse:
    return lambda reader, out, tools: written.python(reader, out, begins, ends, names(tools))


def _llama(reader: Reader, out: Output, tools: Sequence[Tool]) -> Reading[None]:
    return jsons.llama(reader, out, names(tools))


def _hermes(reader: Reader, out: Output, tools: Sequence[Tool]) -> Reading[None]:
    return jsons.hermes(reader, out, names([tool for tool in tools if not tool.strict]))


def _phi(reader: Reader, out: Output, tools: Sequence[Tool]) -> Reading[None]:
    begins = ("<|tool_call|>",) if any(tool.strict for tool in tools) else ("<|tool_call|>", "functools")
    return jsons.marked(reader, out, begins, ("<|/tool_call|>",))


def _mistral(reader: Reader, out: Output, tools: Sequence[Tool]) -> Reading[None]:
    return jsons.mistral(reader, out)


def _deepseek(reader: Reader, out: Output, tools: Sequence[Tool]) -> Reading[None]:
    return jsons.deepseek(reader, out)


def _harmony(reader: Reader, out: Output, tools: Sequence[Tool]) -> Reading[None]:
    return harmony(reader, out, names(tools) if tools else None)


def names(tools: Sequence[Tool]) -> frozenset[str]:
    return frozenset(tool.name for tool in tools)


_MISTRAL_MARKS = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
_DEEPSEEK_MARKS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)

FORMATS: dict[str, Format] = {
    "harmony": Format(
        _harmony,
        Shape("", separator=START + "assistant"),
        harmony_call,
        markers=(CHANNEL, MESSAGE),
        marks=(START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS),
        channels=True,
    ),
    "deepseek": Format(
        _deepseek,
        Shape("<｜tool▁calls▁begin｜>", separator="\n", closing="<｜tool▁calls▁end｜>"),
        json_call("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "\n```<｜tool▁call▁end｜>"),
        markers=("<｜tool▁calls▁begin｜>", "```json"),
        marks=_DEEPSEEK_MARKS,
    ),
    "deepseek_v31": Format(
        _deepseek,
        Shape("<｜tool▁calls▁begin｜>", closing="<｜tool▁calls▁end｜>"),
        json_call("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        markers=("<｜tool▁calls▁begin｜>",),
        marks=_DEEPSEEK_MARKS,
    ),
    "mistral_ids": Format(
        _mistral,
        Shape("[TOOL_CALLS]", separator="[TOOL_CALLS]"),
        lambda lark, tool: " ".join(
            (lark.words(f"{tool.name}[CALL_ID]"), "/[a-zA-Z0-9]{9}/", lark.words("[ARGS]"), lark.arguments(tool))
        ),
        markers=("[TOOL_CALLS]", "[CALL_ID]"),
        marks=_MISTRAL_MARKS,
        ids=short_id,
    ),
    "mistral_args": Format(
        _mistral,
        Shape("[TOOL_CALLS]", separator="[TOOL_CALLS]"),
        json_call("", "[ARGS]", ""),
        markers=("[TOOL_CALLS]", "[ARGS]"),
        marks=_MISTRAL_MARKS,
        ids=short_id,
    ),
    "mistral": Format(
        _mistral,
        Shape("[TOOL_CALLS]", opening="[", separator=", ", closing="]"),
        json_call('{"name": "', '", "arguments": ', "}"),
        markers=("[TOOL_CALLS]",),
        marks=_MISTRAL_MARKS,
        ids=short_id,
    ),
    "gemma4": Format(
        _braces(written.GEMMA_4),
        Shape("<|tool_call>", separator="<|tool_call>"),
        braces_call(written.GEMMA_4.quote, written.GEMMA_4.end),
        markers=("<|tool_call>",),
        marks=("<|tool_call>", "<tool_call|>", written.GEMMA_4.quote),
    ),
    "functiongemma": Format(
        _braces(written.FUNCTION_GEMMA),
        Shape("<start_function_call>", separator="<start_function_call>"),
        braces_call(written.FUNCTION_GEMMA.quote, written.FUNCTION_GEMMA.end),
        markers=("<start_function_call>",),
        marks=("<start_function_call>", "<end_function_call>", "<escape>"),
    ),
    "lfm2": Format(
        _python(("<|tool_call_start|>",), ("<|tool_call_end|>",)),
        Shape("<|tool_call_start|>", opening="[", separator=", ", closing="]<|tool_call_end|>"),
        python_call,
        markers=("<|tool_call_start|>",),
        marks=("<|tool_call_start|>", "<|tool_call_end|>"),
    ),
    "phi4": Format(
        _phi,
        Shape("<|tool_call|>", opening="[", separator=", ", closing="]<|/tool_call|>"),
        json_call('{"name": "', '", "arguments": ', "}"),
        markers=("<|tool_call|>", "<|/tool_call|>"),
        marks=("<|tool_call|>", "<|/tool_call|>"),
    ),
    "granite": Format(
        _marked("<|tool_call|>", ends=()),
        Shape("<|tool_call|>", opening="[", separator=", ", closing="]"),
        json_call('{"name": "', '", "arguments": ', "}"),
        markers=("<|tool_call|>",),
        marks=("<|tool_call|>",),
    ),
    "qwen3_coder": Format(
        _elements(written.QWEN_CODER),
        Shape("<tool_call>", opening="\n", separator="\n<tool_call>\n"),
        elements_call("<function={name}>\n", "<parameter={key}>\n", "\n</parameter>\n", "</function>\n</tool_call>"),
        markers=("<tool_call>", "<function="),
        marks=("<tool_call>", "</tool_call>"),
    ),
    "glm": Format(
        _elements(written.GLM),
        Shape("<tool_call>", separator="\n<tool_call>"),
        elements_call("{name}\n", "<arg_key>{key}</arg_key>\n<arg_value>", "</arg_value>\n", "</tool_call>"),
        markers=("<tool_call>", "<arg_key>"),
        marks=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "hermes": Format(
        _hermes,
        Shape("<tool_call>", opening="\n", separator="\n<tool_call>\n"),
        json_call('{"name": "', '", "arguments": ', "}\n</tool_call>"),
        markers=("<tool_call>",),
        marks=("<tool_call>", "</tool_call>"),
    ),
    "llama4": Format(
        _python(("<|python_start|>",), ("<|python_end|>",)),
        Shape("", opening="[", separator=", ", closing="]"),
        python_call,
        markers=("<|python_start|>",),
        marks=("<|python_start|>", "<|python_end|>"),
    ),
    "llama3": Format(
        _llama,
        Shape("", separator="; "),
        json_call('{"name": "', '", "parameters": ', "}"),
        markers=("<|start_header_id|>", '"parameters": '),
        marks=("<|python_tag|>",),
    ),
    "pythonic": Format(
        _python(("```tool_code\n", "```python\n"), ("```",)),
        Shape("", opening="[", separator=", ", closing="]"),
        python_call,
    ),
}
"""By name. The first whose markers all stand in a model's template is the model's."""


def format_of(template: str) -> str | None:
    """The name of the format that a template's text shows."""
    return next(
        (name for name, row in FORMATS.items() if row.markers and all(marker in template for marker in row.markers)),
        None,
    )
