"""From a Request to the wheel's: what each field becomes, and what is refused because the wheel has nothing like it.

Owns the mapping of fields. Must not know: threads, how answers come back.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tramontane.errors import ContextLengthExceeded, InvalidRequest
from tramontane.records import dataclass
from tramontane.text.template import ChatTemplate
from tramontane.text.tokenizer import Tokenizer
from tramontane.types import (
    SAMPLING_DEFAULTS,
    AudioPart,
    Grammar,
    ImagePart,
    Message,
    Request,
    SamplingParams,
    TextPart,
    Tool,
)

SAMPLING_FIELDS = frozenset(
    {
        *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("logit_bias", "n", "logprobs", "stop", "stop_token_ids", "include_stop", "max_tokens", "ignore_eos"),
        *("echo", "grammar", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_sequence_breakers"),
    }
)
NEED_TOKENIZER = frozenset({"logprobs", "logit_bias", "stop_token_ids"})
"""Fields about token ids, which the wheel's answers do not tell: our tokenizer finds them."""
REQUEST_TAKEN = frozenset({"tools", "tool_choice", "thinking", "reasoning_effort", "timeout", "adapter"})

RAW = "tramontane_raw"
"""The role of a first message which says that the last one holds a whole prompt, to be passed on as it is."""
_BELOW_ONE = 1 - 2**-24
"""The wheel takes a min_p of 1 for none."""
_EFFORTS = ("off", "none", "low", "medium", "high", "xhigh")


def wrapped(template: str | None) -> str:
    """The template that the wheel is given: the model's, behind one that passes whole prompts through. It stays
    readable in there, as the wheel tells by its words how a model reasons and calls tools."""
    otherwise = "{{ raise_exception('the model has no chat template') }}" if template is None else template
    return (
        "{% if messages[0]['role'] == '" + RAW + "' %}{% set content = (messages|last)['content'] %}"
        "{% if content is string %}{{ content }}{% else %}"
        "{% for part in content %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% endif %}{% else %}" + otherwise + "{% endif %}"
    )


@dataclass(frozen=True)
class Plan:
    """A request that the wheel can take."""

    id: str
    params: SamplingParams
    """Nothing in it is open."""
    arguments: Mapping[str, Any]
    """Of the wheel's ChatCompletionRequest, for one choice."""
    prompt_ids: tuple[int, ...] | None
    """None where the wheel alone knows how media become tokens."""
    echo: str
    stops: tuple[int, ...] = ()
    """The special tokens that the first of the wheel's stop strings stand for."""


@dataclass(frozen=True)
class Planner:
    """Makes plans for one model. Immutable; safe from several threads."""

    wheel: Any
    tokenize: Callable[[str, bool], list[int]]
    """The wheel's own."""
    detokenize: Callable[[Sequence[int], bool], str]
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    defaults: SamplingParams
    context_length: int
    media: bool
    """Whether the model takes images and audio."""

    def plan(self, request: Request) -> Plan:
        """Raises InvalidRequest, ContextLengthExceeded or TemplateError."""
        params = request.sampling.over(self.defaults).over(SAMPLING_DEFAULTS)
        self._check_ids(params)
        messages, text = self._messages(request)
        prompt_ids = None if text is None else self.prompt_ids(text)
        if prompt_ids is not None:
            if not prompt_ids:
                raise InvalidRequest("prompt", "the prompt has no tokens", "Give at least one.")
            if len(prompt_ids) + (params.max_tokens != 0) > self.context_length:
                raise ContextLengthExceeded(len(prompt_ids), self.context_length)
        arguments = {
            "messages": messages,
            "model": "default",
            "stream": True,
            "logprobs": True,  # they alone tell a token's exact bytes
            "top_logprobs": max(params.logprobs or 0, 1),
            **self._sampling(params),
            **self._grammar(params.grammar),
            **self._tools(request),
            **self._reasoning(request),
            "adapter": request.adapter,
        }
        stops = self._special_stops(params)
        if texts := [*(self.detokenize([id_], False) for id_ in stops), *self._grammar_ends(params.grammar)]:
            arguments["stop_seqs"] = texts
        echo = (text or "") if params.echo else ""
        return Plan(request.id or f"request-{uuid.uuid4().hex}", params, arguments, prompt_ids, echo, stops)

    def render(self, messages: Sequence[Message], **template_kwargs: Any) -> str:
        """The text that a conversation becomes. Raises InvalidRequest("messages") without a chat template."""
        if self.template is None:
            raise InvalidRequest(
                "messages", "the model has no chat template", "Pass chat_template= to the constructor, or a prompt."
            )
        return self.template.render([_as_mapping(message) for message in messages], **template_kwargs)

    def prompt_ids(self, text: str) -> tuple[int, ...]:
        """A prompt's tokens: the wheel puts the beginning of a text before it unless the text has it."""
        whole, plain = self.tokenize(text, True), self.tokenize(text, False)
        doubled = len(whole) > len(plain) > 0 and whole[0] == whole[1] == plain[0]
        return tuple(plain if doubled else whole)

    def _messages(self, request: Request) -> tuple[list[dict[str, Any]], str | None]:
        """What the wheel is sent, and the prompt's text where that is known here."""
        if request.prompt is not None:
            text = request.prompt
        elif request.prompt_ids is not None:
            text = self._text_of(request.prompt_ids)
        elif any(_media(message) for message in request.messages or ()):
            return self._with_media(request), None
        else:
            text = self.render(request.messages or (), **_variables(request))
        return [{"role": RAW, "content": text}], text

    def _with_media(self, request: Request) -> list[dict[str, Any]]:
        """The conversation rendered here, behind its media, where the template has marks for them: the wheel looks for
        these in the text. Where it has none the wheel puts its own, and renders."""
        if not self.media:
            raise InvalidRequest("messages", "this model takes neither images nor audio", "Send text only.")
        messages = request.messages or ()
        media = [_for_wheel(part) for message in messages for part in _media(message)]
        if self.template is not None:
            turns, variables = [_with_marks(message) for message in messages], _variables(request)
            text = self._marked(turns, variables)
            if text is not None:
                whole = {"role": "user", "content": [*media, {"type": "text", "text": text}]}  # it wants this role
                return [{"role": RAW, "content": ""}, whole]
        if request.template_kwargs:
            raise InvalidRequest(
                "template_kwargs", "the template has no marks for media, so mistral.rs renders", "Leave them out."
            )
        return [_turn_for_wheel(message) for message in messages]

    def _marked(self, turns: list[dict[str, Any]], variables: dict[str, Any]) -> str | None:
        """The conversation's text, or None where its media leave no mark in it."""
        assert self.template is not None
        try:
            text = self.template.render(turns, **variables)
        except InvalidRequest:  # the template takes texts alone
            return None
        bare = [{**turn, "content": [part for part in turn["content"] if part["type"] == "text"]} for turn in turns]
        return None if text == self.template.render(bare, **variables) else text

    def _text_of(self, ids: Sequence[int]) -> str:
        """The text that the wheel will read as these tokens: it takes no ids."""
        for kept in (ids, ids[1:]):
            text = self.detokenize(kept, False)
            if text and self.prompt_ids(text) == tuple(ids):
                return text
        raise InvalidRequest(
            "prompt_ids", "mistral.rs reads texts, and the text of these tokens is read as others",
            "Send the text, or use the native backend.",
        )  # fmt: skip

    def _check_ids(self, params: SamplingParams) -> None:
        given = [("stop_token_ids", id_) for id_ in params.stop_token_ids or ()]
        for name, id_ in given + [("logit_bias", id_) for id_ in params.logit_bias or ()]:
            if self.tokenizer is not None and not self.tokenizer.knows(id_):
                raise InvalidRequest(name, f"token id {id_} is outside the model's vocabulary")

    def _sampling(self, params: SamplingParams) -> dict[str, Any]:
        """Every field is sent, so that the wheel takes none from a configuration that we have read already."""
        return {
            "temperature": float(params.temperature or 0.0),
            "top_k": params.top_k,
            "top_p": float(params.top_p or 1.0),
            "min_p": min(float(params.min_p or 0.0), _BELOW_ONE),
            "repetition_penalty": float(params.repetition_penalty or 1.0),
            "presence_penalty": float(params.presence_penalty or 0.0),
            "frequency_penalty": float(params.frequency_penalty or 0.0),
            "logit_bias": dict(params.logit_bias) if params.logit_bias else None,
            **self._dry(params),
            "max_tokens": params.max_tokens,
            "ignore_eos": bool(params.ignore_eos),
        }

    def _dry(self, params: SamplingParams) -> dict[str, Any]:
        if not params.dry_multiplier:
            return {}
        breakers = params.dry_sequence_breakers or ()
        if any(not isinstance(breaker, str) for breaker in breakers):
            raise InvalidRequest("dry_sequence_breakers", "mistral.rs takes texts, not token ids", "Give texts.")
        return {
            "dry_multiplier": float(params.dry_multiplier),
            "dry_base": float(params.dry_base or 1.75),
            "dry_allowed_length": params.dry_allowed_length,
            "dry_sequence_breakers": list(breakers),
        }

    def _special_stops(self, params: SamplingParams) -> tuple[int, ...]:
        """Special tokens, which the wheel itself must stop at, as it shows none; `Answer` stops at others."""
        special = self.tokenizer.special_ids if self.tokenizer is not None else frozenset()
        return tuple(id_ for id_ in params.stop_token_ids or () if id_ in special)

    def _grammar_ends(self, grammar: Grammar | None) -> list[str]:
        """What ends a text that has matched its grammar: some special token of the wheel's choice, at which it does
        not stop by itself unless it is also the model's."""
        if grammar is None or self.tokenizer is None:
            return []
        return [self.tokenizer.token_text(id_) for id_ in sorted(self.tokenizer.special_ids)]

    def _grammar(self, grammar: Grammar | None) -> dict[str, Any]:
        if grammar is None:
            return {}
        if grammar.kind == "json_object":
            return {"grammar_type": "json_schema", "grammar": '{"type": "object"}'}
        if grammar.kind == "json_schema":
            value = dict(grammar.value) if isinstance(grammar.value, Mapping) else grammar.value
            return {"grammar_type": "json_schema", "grammar": json.dumps(value)}
        if grammar.kind == "choice":
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in grammar.value)
            return {"grammar_type": "lark", "grammar": f"start: {texts}"}
        return {"grammar_type": grammar.kind, "grammar": grammar.value}

    def _tools(self, request: Request) -> dict[str, Any]:
        if not request.tools or request.tool_choice == "none":
            return {}
        if request.tool_choice != "auto":
            raise InvalidRequest("tool_choice", "mistral.rs knows 'auto' and 'none' alone", "Use one of them.")
        if not request.parallel_tool_calls:
            raise InvalidRequest("parallel_tool_calls", "mistral.rs cannot be held to one call", "Leave it out.")
        if strict := [tool.name for tool in request.tools if tool.strict]:
            raise InvalidRequest("tools.strict", f"mistral.rs does not hold {strict[0]!r} to its schema", "Unset it.")
        schemas = [json.dumps(_tool(tool)) for tool in request.tools]
        return {"tool_schemas": schemas, "tool_choice": self.wheel.ToolChoice.Auto}

    def _reasoning(self, request: Request) -> dict[str, Any]:
        told: dict[str, Any] = {}
        if request.thinking is not None:
            told["enable_thinking"] = request.thinking
        effort = request.reasoning_effort
        if effort is not None:
            if effort.strip().lower() not in _EFFORTS:
                raise InvalidRequest("reasoning_effort", f"{effort!r} is unknown", f"Use one of {', '.join(_EFFORTS)}.")
            if request.thinking is not None and request.thinking == (effort.strip().lower() in ("off", "none")):
                raise InvalidRequest("reasoning_effort", f"{effort!r} contradicts thinking={request.thinking}")
            told["reasoning_effort"] = effort
        return told


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description}
    function["parameters"] = dict(tool.parameters or {"type": "object", "properties": {}})
    return {"type": "function", "function": function}


def _variables(request: Request) -> dict[str, Any]:
    """What the template is told besides the turns."""
    variables = dict(request.template_kwargs)
    if request.tools and request.tool_choice != "none":
        variables["tools"] = [_tool(tool) for tool in request.tools]
    if request.thinking is not None:
        variables["enable_thinking"] = request.thinking
    if request.reasoning_effort is not None:
        variables["reasoning_effort"] = request.reasoning_effort
    return variables


def _media(message: Message) -> list[ImagePart | AudioPart]:
    parts = () if isinstance(message.content, str) else message.content
    return [part for part in parts if not isinstance(part, TextPart)]


def _with_marks(message: Message) -> dict[str, Any]:
    """A turn as templates read it, whose media are told by their kind alone."""
    parts = (TextPart(message.content),) if isinstance(message.content, str) else message.content
    content = [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": _KINDS[type(part)]}
        for part in parts
    ]
    return {**_as_mapping(message), "content": content}


def _as_mapping(message: Message) -> dict[str, Any]:
    """A turn of text as templates read it."""
    turn: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.tool_calls:
        turn["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _parsed(call.arguments)}}
            for call in message.tool_calls
        ]
    named = {"tool_call_id": message.tool_call_id, "name": message.name, "reasoning_content": message.reasoning}
    return turn | {name: value for name, value in named.items() if value is not None}


def _parsed(arguments: str) -> Any:
    """Templates of this kind write a call's arguments themselves; what is no JSON stays a text."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _turn_for_wheel(message: Message) -> dict[str, Any]:
    if isinstance(message.content, str):
        return {"role": message.role, "content": message.content}
    content = [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else _for_wheel(part)
        for part in message.content
    ]
    return {"role": message.role, "content": content}


def _for_wheel(part: ImagePart | AudioPart) -> dict[str, Any]:
    """As the wheel takes it, which fetches addresses and reads paths."""
    name = f"{_KINDS[type(part)]}_url"
    return {"type": name, name: {"url": _address(part.source)}}


_KINDS: Mapping[type, str] = {ImagePart: "image", AudioPart: "audio"}


def _address(source: str) -> str:
    if source.startswith(("http://", "https://", "data:", "file:")):
        return source
    path = Path(source).expanduser()
    if not path.is_file():
        raise InvalidRequest("messages", f"there is no file {source!r}", "Give a path, an address or a data URL.")
    return str(path.resolve())
