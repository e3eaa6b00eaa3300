"""Conversations as templates want them: calls and their results, reasoning, tools; or all of that told in plain text.

Owns the shapes of messages and tools that templates read, found out by trying, and the words that teach tools to a
model whose template shows none. Must not know: tokens, how answers are parsed. Source for the shapes: transformers'
documentation on tool use in chat templates.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from tramontane.errors import InvalidRequest, TemplateError
from tramontane.text.template import ChatTemplate
from tramontane.types import Message, TextPart, Tool

_PROBE = "tramontane-probe"
_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")


class Shapes:
    """How a template wants messages that are more than a role and a text. Safe from several threads."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    @cached_property
    def calls(self) -> tuple[bool, str | None] | None:
        """Whether arguments are a mapping (else JSON text), and the content beside calls; None: it shows no calls."""
        choices: list[tuple[bool, str | None]] = [(True, ""), (True, None), (False, ""), (False, None)]
        return next((choice for choice in choices if self._shows_call(*choice)), None)

    @cached_property
    def shows_system(self) -> bool:
        """Whether a system message stands in the prompt."""
        return _PROBE in self._tried([{"role": "system", "content": _PROBE}, _USER])

    @cached_property
    def knows_developers(self) -> bool:
        """Whether it knows the role that is the system's elsewhere."""
        return "developer" in self._template.text

    def _shows_call(self, mapping: bool, content: str | None) -> bool:
        arguments = {"key-of-probe": "value-of-probe"}
        function = {"name": _PROBE, "arguments": arguments if mapping else json.dumps(arguments)}
        call = {"id": "probe0000", "type": "function", "function": function}
        result = {"role": "tool", "content": "result-of-probe", "tool_call_id": "probe0000", "name": _PROBE}
        text = self._tried([_USER, {"role": "assistant", "content": content, "tool_calls": [call]}, result], [_TOOL])
        shown = all(part in text for part in (_PROBE, "key-of-probe", "value-of-probe", "result-of-probe"))
        return shown and str(arguments) not in text and '\\"key-of-probe' not in text and "None" not in text

    def _tried(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        try:
            return self._template.render(messages, tools=tools)
        except TemplateError:
            return ""


_USER = {"role": "user", "content": "x"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "x",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": []},
    },
}


def tool_mapping(tool: Tool) -> dict[str, Any]:
    """A tool as templates read it."""
    function = {"name": tool.name, "description": tool.description}
    parameters = tool.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": {**function, "parameters": dict(parameters)}}


def mappings(messages: Sequence[Message], shapes: Shapes, *, short_ids: bool = False) -> list[dict[str, Any]]:
    """Messages as the template reads them. `short_ids`: the template demands calls' ids of nine letters and digits.

    Raises InvalidRequest for what it cannot show.
    """
    called = {call.id: call.name for message in messages for call in message.tool_calls}
    found = []
    for message in messages:
        mapping = plain(message, shapes)
        if message.tool_calls:
            mapping |= _calls(message, shapes, short_ids)
        if message.role == "tool":
            name = message.name or called.get(message.tool_call_id or "")
            mapping |= {"name": name} if name else {}
            mapping |= {"tool_call_id": _id(message.tool_call_id, short_ids)} if message.tool_call_id else {}
        found.append(mapping)
    return found


def plain(message: Message, shapes: Shapes) -> dict[str, Any]:
    """A message without its calls: role, content, name and reasoning."""
    role = "system" if message.role == "developer" and not shapes.knows_developers else message.role
    mapping: dict[str, Any] = {"role": role, "content": _content(message)}
    if message.name:
        mapping["name"] = message.name
    if message.reasoning is not None:
        mapping["reasoning_content"] = message.reasoning
    return mapping


def _content(message: Message) -> str | list[dict[str, str]]:
    if isinstance(message.content, str):
        return message.content
    for part in message.content:
        if not isinstance(part, TextPart):
            kind = type(part).__name__.removesuffix("Part").lower()
            raise InvalidRequest("messages", f"this model does not take {kind} parts", "Send text only.")
    return [{"type": "text", "text": part.text} for part in message.content if isinstance(part, TextPart)]


def _calls(message: Message, shapes: Shapes, short_ids: bool) -> dict[str, Any]:
    if shapes.calls is None:
        raise InvalidRequest("messages", "this model's chat template cannot show calls of tools", "Leave them out.")
    mapping, empty = shapes.calls
    calls = [
        {
            "id": _id(call.id, short_ids),
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": arguments_of(call.arguments) if mapping else call.arguments,
            },
        }
        for call in message.tool_calls
    ]
    return {"tool_calls": calls, **({} if message.text else {"content": empty})}


def arguments_of(text: str) -> dict[str, Any]:
    """A call's arguments as an object. Raises InvalidRequest for what is none."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidRequest("messages.tool_calls", f"{text!r:.80} is not the JSON text of an object")
    return found


def _id(given: str | None, short: bool) -> str:
    if not short or _SHORT_ID.fullmatch(given or ""):
        return given or ""
    return hashlib.sha256((given or "").encode("utf-8", "replace")).hexdigest()[:9]


# ---- without a template's help

_INSTRUCTIONS = {
    "hermes": (
        "You can call functions. These are their signatures, one JSON object a line:\n<tools>\n{tools}\n</tools>\n"
        "To call one, answer with a JSON object of its name and arguments between these tags, and nothing else:\n"
        '<tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>\n'
        "Call several by writing several such blocks. The results come between <tool_response> tags. "
        "When no function is needed, answer in plain words."
    ),
    "pythonic": (
        "You have access to these functions:\n{tools}\n"
        "To call functions, answer with a list of calls as Python writes them, and nothing else:\n"
        "[name(parameter=value, ...), ...]\n"
        "The results come between <tool_response> tags. When no function is needed, answer in plain words."
    ),
    "deepseek": (
        "You can call functions. These are their signatures, one JSON object a line:\n{tools}\n"
        "To call functions, write nothing but:\n"
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n{...}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>\n"
        "with a part from call to call for each. When no function is needed, answer in plain words."
    ),
}
PROMPTED = tuple(_INSTRUCTIONS)
"""Formats that can be asked for in words."""
PLAIN = ("hermes", "pythonic")
"""Those of them that need no special tokens, so that any model can write them."""


def retold(messages: Sequence[Message], format_: str, shapes: Shapes) -> list[dict[str, Any]]:
    """The conversation for a template that shows no calls: calls as the text that makes them, and results as what the
    user says."""
    found: list[dict[str, Any]] = []
    answered = False  # the turn before was a result: templates want roles that alternate
    for message in messages:
        if message.role == "tool":
            turn = {"role": "user", "content": f"<tool_response>\n{message.text}\n</tool_response>"}
        else:
            turn = plain(replace(message, content=_with_calls(message, format_)), shapes)
        if answered and turn["role"] == "user":
            found[-1] = {**found[-1], "content": f"{_joined(found[-1])}\n{_joined(turn)}"}
        else:
            found.append(turn)
        answered = message.role == "tool"
    return found


def taught(turns: list[dict[str, Any]], tools: Sequence[Tool], format_: str, shapes: Shapes) -> list[dict[str, Any]]:
    """The conversation with tools in the system message, or before the first question, where there can be none."""
    try:
        lines = "\n".join(json.dumps(tool_mapping(tool), ensure_ascii=False) for tool in tools)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest("tools", f"a schema is not plain data ({error})") from None
    words = _INSTRUCTIONS[format_].replace("{tools}", lines)
    if turns and turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{_joined(turns[0])}\n\n{words}"}, *turns[1:]]
    if shapes.shows_system:
        return [{"role": "system", "content": words}, *turns]
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
    if first is None:
        raise InvalidRequest("tools", "this model's chat template shows none, and there is no question to put them to")
    question = {**turns[first], "content": f"{words}\n\n{_joined(turns[first])}"}
    return [*turns[:first], question, *turns[first + 1 :]]


def _joined(turn: Mapping[str, Any]) -> str:
    content = turn["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _with_calls(message: Message, format_: str) -> Any:
    if not message.tool_calls:
        return message.content
    if format_ == "pythonic":
        calls = (
            f"{call.name}({', '.join(f'{key}={value!r}' for key, value in arguments_of(call.arguments).items())})"
            for call in message.tool_calls
        )
        written = f"[{', '.join(calls)}]"
    else:
        objects = ({"name": call.name, "arguments": arguments_of(call.arguments)} for call in message.tool_calls)
        blocks = (f"<tool_call>\n{json.dumps(one, ensure_ascii=False)}\n</tool_call>" for one in objects)
        written = "\n".join(blocks)
    return f"{message.text}\n{written}" if message.text else written


# ---- switches of reasoning

_SWITCHES = ("enable_thinking", "thinking", "think", "enable_reasoning", "reasoning")
"""Names by which templates read whether to reason, as true or false."""
_EFFORTS = ("reasoning_effort", "thinking_effort")


def reasoning_variables(
    variables: frozenset[str], thinking: bool | None, effort: str | None, *, always: Callable[[], bool]
) -> dict[str, Any]:
    """The template's variables for what a request says of reasoning. `always`: the model reasons whatever it is told.

    Raises InvalidRequest for what the template cannot honour.
    """
    found: dict[str, Any] = {}
    switches = [name for name in _SWITCHES if name in variables]
    if effort is not None:
        names = [name for name in _EFFORTS if name in variables]
        if not names and effort == "none" and switches and thinking is None:
            thinking = False
        elif not names:
            raise InvalidRequest(
                "reasoning_effort", "this model's chat template knows no effort of reasoning", "Leave it out."
            )
        found |= dict.fromkeys(names, effort)
    if thinking is not None and not switches and not (thinking and always()):
        what = "turn reasoning off" if not thinking and always() else "switch reasoning"
        raise InvalidRequest("thinking", f"this model's chat template cannot {what}", "Leave it out.")
    if thinking is not None:
        found |= dict.fromkeys(switches, thinking)
    return found
