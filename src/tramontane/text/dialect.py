"""Dialect: how one model is spoken to, and how what it says is understood.

Owns the choice of a format of calls and of reasoning by the model's template and special tokens; prompts, parsers and
grammars of chat requests. Must not know: the engine, how tokens are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from tramontane.errors import InvalidRequest
from tramontane.records import dataclass
from tramontane.text import reasoning as thoughts
from tramontane.text.conversation import (
    PLAIN,
    PROMPTED,
    Shapes,
    mappings,
    reasoning_variables,
    retold,
    taught,
    tool_mapping,
)
from tramontane.text.reasoning import Reasoning, is_open, is_over, read_reasoning, reasoning_of
from tramontane.text.template import ChatTemplate
from tramontane.text.tokenizer import Tokenizer
from tramontane.text.toolcalls import lark
from tramontane.text.toolcalls.formats import FORMATS, format_of
from tramontane.text.toolcalls.output import Output, short_id
from tramontane.text.toolcalls.parser import AnswerParser
from tramontane.text.toolcalls.reader import Reader, Reading
from tramontane.types import Grammar, Message, NamedTool, Request, Tool


@dataclass(frozen=True)
class Spoken:
    """A chat request as its model gets it."""

    prompt: str
    grammar: Grammar | None
    """What the answer must match, its reasoning and calls included."""
    parser: Callable[[], AnswerParser] | None
    """A parser for each choice; None where the text is the answer as it stands."""
    shown: frozenset[int]
    """Special tokens that the parser has to see."""


class Dialect:
    """One model's. Safe from several threads.

    `tool_format` and `reasoning_format` name rows of FORMATS and KINDS ("none" for no reasoning at all) instead of what
    the template shows. Raises InvalidRequest for names that are none.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        *,
        tool_format: str | None = None,
        reasoning_format: str | None = None,
    ) -> None:
        _check("tool_format", tool_format, FORMATS)
        _check("reasoning_format", reasoning_format, {**thoughts.KINDS, "none": None})
        self.template = template
        self._shapes = Shapes(template)
        self._special = {tokenizer.token_text(id_): id_ for id_ in tokenizer.special_ids}
        name = tool_format or format_of(template.text)
        self._shows_tools = name is not None and template.takes_tools
        if name is None or not (tool_format or self._shows_tools or FORMATS[name].channels or self._asks_for(name)):
            name = "pythonic" if "<start_of_turn>" in template.text else "hermes"
        self.format_name, self.format = name, FORMATS[name]
        self.reasoning: Reasoning | None = reasoning_of(template.text)
        if reasoning_format is not None:
            self.reasoning = thoughts.KINDS.get(reasoning_format)

    def speak(self, request: Request) -> Spoken:
        """The prompt of a request with messages, and how its answer is read. Raises InvalidRequest or TemplateError."""
        tools = () if request.tool_choice == "none" else request.tools
        prompt = self._prompt(request, tools)
        if isinstance(request.tool_choice, NamedTool):
            tools_to_call = [tool for tool in tools if tool.name == request.tool_choice.name]
        else:
            tools_to_call = list(tools)
        grammar = self._grammar(request, tools_to_call, prompt)
        if not tools and self.reasoning is None and not self.format.channels:
            return Spoken(prompt, grammar, None, frozenset())
        single = not request.parallel_tool_calls or isinstance(request.tool_choice, NamedTool)
        opened = self.reasoning is not None and is_open(self.reasoning, prompt)

        def parser() -> AnswerParser:
            return AnswerParser(
                lambda reader, out: self._read(reader, out, tools, opened), Output(self.format.ids, single)
            )

        return Spoken(prompt, grammar, parser, self._shown(tools))

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The prompt of messages alone."""
        return self._prompt(Request(messages=tuple(messages), template_kwargs=variables), ())

    def _prompt(self, request: Request, tools: Sequence[Tool]) -> str:
        messages = request.messages or ()
        variables = reasoning_variables(
            self.template.variables,
            request.thinking,
            request.reasoning_effort,
            always=lambda: self.format.channels or self._always_reasons,
        )
        clash = next((name for name in variables if name in request.template_kwargs), None)
        if clash is not None:
            raise InvalidRequest("template_kwargs", f"{clash!r} is given by the request's own fields", "Give it once.")
        variables |= request.template_kwargs
        if self._shows_tools or self._asks_for(self.format_name):
            turns = mappings(messages, self._shapes, short_ids=self.format.ids is short_id)
        else:
            turns = retold(messages, self.format_name, self._shapes)
        if tools and not self._shows_tools:
            if self.format_name not in PROMPTED:
                raise InvalidRequest(
                    "tools", f"the chat template shows none, and {self.format_name!r} cannot be asked for in words",
                    f"Load the model with tool_format= one of {', '.join(PLAIN)}.",
                )  # fmt: skip
            turns = taught(turns, tools, self.format_name, self._shapes)
        elif tools:
            if "tools" in variables:
                raise InvalidRequest("template_kwargs", "'tools' is given by the request's own field", "Give it once.")
            variables["tools"] = [tool_mapping(tool) for tool in tools]
        return self.template.render(turns, **variables)

    def _asks_for(self, name: str) -> bool:
        """Whether the template shows no tools and yet their calls, in this format, so that words can ask for it."""
        return name in PROMPTED and name not in PLAIN and self._shapes.calls is not None

    @cached_property
    def _always_reasons(self) -> bool:
        """Whether the template begins the reasoning itself, whatever it is told."""
        if self.reasoning is None:
            return False
        return is_open(self.reasoning, self.template.render([{"role": "user", "content": "x"}]))

    def _read(self, reader: Reader, out: Output, tools: Sequence[Tool], opened: bool) -> Reading[None]:
        if self.format.channels:
            yield from self.format.parse(reader, out, tools)
            return
        if self.reasoning is not None:
            yield from read_reasoning(reader, out, self.reasoning, opened)
        if tools:
            yield from self.format.parse(reader, out, tools)
        yield from reader.until((), out.text)

    def _shown(self, tools: Sequence[Tool]) -> frozenset[int]:
        marks = [*(self.reasoning.marks if self.reasoning else ())]
        if tools or self.format.channels:
            marks += self.format.marks
        return frozenset(id_ for text, id_ in self._special.items() if text and any(text in mark for mark in marks))

    # ---- grammars

    def _grammar(self, request: Request, tools: Sequence[Tool], prompt: str) -> Grammar | None:
        given = request.sampling.grammar
        forced = request.tool_choice == "required" or isinstance(request.tool_choice, NamedTool)
        held = forced or any(tool.strict for tool in tools)
        reasons = self.reasoning is not None and not is_over(self.reasoning, prompt)
        if not held and (given is None or not (tools or reasons or self.format.channels)):
            return given
        try:
            return self._written(request, tools, prompt, forced)
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, InvalidRequest):
                raise
            raise InvalidRequest("tools", f"a schema cannot be written down ({error})") from None

    def _written(self, request: Request, tools: Sequence[Tool], prompt: str, forced: bool) -> Grammar:
        given = request.sampling.grammar
        if forced and given is not None:
            raise InvalidRequest(
                "grammar", "a call is required, which the grammar says nothing of", "Give one of them."
            )
        grammar = lark.Lark(self._special)
        single = not request.parallel_tool_calls or isinstance(request.tool_choice, NamedTool)
        if self.format.channels:
            start = lark.channels(grammar, self.format.call, tools, forced=forced, given=given)
        else:
            start = lark.marked(
                grammar, self.format.shape, self.format.call, tools, single=single, forced=forced, given=given
            )
            start = f"{self._thought(grammar, prompt)} {start}".strip()
        return Grammar("lark", grammar.text(start))

    def _thought(self, grammar: lark.Lark, prompt: str) -> str:
        kind = self.reasoning
        if kind is None or is_over(kind, prompt):
            return ""
        body = f"{grammar.until(kind.close)} /[ \\n]{{0,4}}/"
        if is_open(kind, prompt):
            return body
        return f"({grammar.words(kind.open)} {body})?"


def _check(field: str, name: str | None, rows: Mapping[str, Any]) -> None:
    if name is not None and name not in rows:
        raise InvalidRequest(field, f"{name!r} is unknown", f"Use one of {', '.join(rows)}.")
