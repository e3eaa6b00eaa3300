"""What callers naturally write, turned into requests: texts, token ids, messages as dicts, sampling as keywords.

Owns the shapes of input that the facade takes. Must not know: backends, how a request is answered.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral
from typing import Any, get_args

from tramontane.errors import InvalidRequest
from tramontane.functions import choice_of, tools_of
from tramontane.types import (
    AudioPart,
    EmbedRequest,
    Grammar,
    GrammarKind,
    ImagePart,
    Message,
    Part,
    Request,
    RerankRequest,
    SamplingParams,
    TextPart,
    ToolCall,
)

Prompt = str | Sequence[int]
Conversation = Sequence[Message | Mapping[str, Any]]
Sampling = SamplingParams | Sequence[SamplingParams]

SAMPLING_FIELDS = frozenset(f.name for f in fields(SamplingParams))
GRAMMAR_KINDS = frozenset(get_args(GrammarKind))
"""Keywords that stand for a grammar of that kind."""
_CHAT_FIELDS = frozenset({"tools", "tool_choice", "parallel_tool_calls", "thinking", "reasoning_effort"})
_REQUEST_FIELDS = _CHAT_FIELDS | {"adapter"}
"""Of `Request`, by keyword of a call; those of chat only with messages."""
_MESSAGE_KEYS = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", "reasoning", "reasoning_content"})


def split_prompts(given: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts in `given`, and whether it was a single one: a text, or a sequence of token ids."""
    if isinstance(given, str):
        return [given], True
    items = _items(given, "prompt", "a text, token ids, or a list of those")
    if items and all(_is_id(item) for item in items):
        return [items], True
    return items, False


def split_conversations(given: Conversation | Sequence[Conversation]) -> tuple[list[Conversation], bool]:
    """The conversations in `given`, and whether it was a single one: a sequence of messages."""
    items = _items(given, "messages", "a list of messages, or a list of such lists")
    if items and all(isinstance(item, (Message, Mapping)) for item in items):
        return [items], True
    return items, False


def prompt_request(prompt: Prompt, sampling: SamplingParams, options: Mapping[str, Any] | None = None) -> Request:
    """A request to complete a text or token ids; `options`: its other fields, as `split_options` gives them."""
    options = options or {}
    for name in options:
        if name in _CHAT_FIELDS:
            raise InvalidRequest(name, "only a request with messages uses a chat template", "Use chat().")
    if isinstance(prompt, str):
        return Request(prompt=prompt, sampling=sampling, **options)
    return Request(prompt_ids=_ids(prompt), sampling=sampling, **options)


def embed_request(texts: Prompt | Sequence[Prompt], **options: Any) -> tuple[EmbedRequest, bool]:
    """A request for the vectors of texts or token ids, and whether it was a single one; `options`: its fields."""
    prompts, single = split_prompts(texts)
    inputs = tuple(given if isinstance(given, str) else _ids(given) for given in prompts)
    return EmbedRequest(inputs, **options), single


def rerank_request(query: str, documents: Sequence[str], **options: Any) -> RerankRequest:
    """A request to order documents; `options`: its other fields."""
    return RerankRequest(query, tuple(_items(documents, "documents", "a list of texts")), **options)


def split_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords of a call: the fields of a request among them, and the rest, of sampling."""
    options = {name: value for name, value in given.items() if name in _REQUEST_FIELDS and value is not None}
    if "tools" in options:
        options["tools"] = tools_of(options["tools"])
    if "tool_choice" in options:
        options["tool_choice"] = choice_of(options["tool_choice"])
    for name, kind in _KINDS.items():
        if name in options and not isinstance(options[name], kind):
            raise InvalidRequest(name, f"{options[name]!r} is not a {kind.__name__}")
    return options, {name: value for name, value in given.items() if name not in _REQUEST_FIELDS}


_KINDS: Mapping[str, type] = {"parallel_tool_calls": bool, "thinking": bool, "reasoning_effort": str, "adapter": str}


def chat_request(
    messages: Conversation,
    sampling: SamplingParams,
    template_kwargs: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Request:
    """A request to continue a conversation; `options`: its other fields, as `split_options` gives them."""
    items = _items(messages, "messages", "a list of messages")
    if not items:
        raise InvalidRequest("messages", "a conversation needs at least one message")
    turns = tuple(to_message(item) for item in items)
    return Request(messages=turns, sampling=sampling, template_kwargs=dict(template_kwargs or {}), **(options or {}))


def any_request(
    given: Prompt | Conversation,
    sampling: SamplingParams,
    template_kwargs: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Request:
    """A request out of a single text, token ids or messages."""
    if not isinstance(given, str):
        items = _items(given, "prompt", "a text, token ids or messages")
        if items and isinstance(items[0], (Message, Mapping)):
            return chat_request(items, sampling, template_kwargs, options)
    if template_kwargs:
        raise InvalidRequest("template_kwargs", "only a request with messages uses a chat template")
    return prompt_request(given, sampling, options)  # type: ignore[arg-type]  # messages are gone above


def to_message(given: Message | Mapping[str, Any]) -> Message:
    """A message from {"role": ..., "content": text or list of parts}; of an assistant with `tool_calls` and `reasoning`
    (or `reasoning_content`), of a tool with `tool_call_id`. Other keys are refused by name."""
    if isinstance(given, Message):
        return given
    if not isinstance(given, Mapping):
        raise InvalidRequest("messages", f"{given!r} is not a message", 'Write {"role": "user", "content": "..."}.')
    for key in given:
        if key not in _MESSAGE_KEYS:
            raise InvalidRequest(f"messages.{key}", "this build does not take it", "Leave it out.")
    content = given.get("content")
    calls = tuple(
        _call(call) for call in _items(given.get("tool_calls") or (), "messages.tool_calls", "a list of calls")
    )
    if calls and given.get("role") != "assistant":
        raise InvalidRequest("messages.tool_calls", "only an assistant calls tools", "Leave it out.")
    if content is None and calls:
        content = ""
    if content is None:
        raise InvalidRequest("messages.content", "it is missing", "Give a text or a list of parts.")
    if not isinstance(content, str):
        content = tuple(_part(part) for part in _items(content, "messages.content", "a text or a list of parts"))
    texts = {name: given.get(name) for name in ("tool_call_id", "name", "reasoning", "reasoning_content")}
    for name, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise InvalidRequest(f"messages.{name}", f"{value!r:.80} is not a text")
    thought = texts.pop("reasoning_content")
    if texts["reasoning"] is None:
        texts["reasoning"] = thought
    return Message(given.get("role"), content, calls, **texts)  # type: ignore[arg-type]  # Message checks the role


def _call(given: object) -> ToolCall:
    """A call as OpenAI writes it; arguments may be a mapping too."""
    if isinstance(given, ToolCall):
        return given
    function = given.get("function", given) if isinstance(given, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(function, Mapping) or not isinstance(name, str):
        raise InvalidRequest("messages.tool_calls", f"{given!r:.80} is no call")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        try:
            arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            raise InvalidRequest("messages.tool_calls", f"{arguments!r:.80} is not plain data") from None
    return ToolCall(str(given.get("id") or ""), name, arguments)


def _text_of(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _url_of(value: object) -> str | None:
    return _text_of(value.get("url") if isinstance(value, Mapping) else value)


def _audio_of(value: object) -> str | None:
    if not isinstance(value, Mapping):
        return _text_of(value)
    data, kind = _text_of(value.get("data")), _text_of(value.get("format"))
    return f"data:audio/{kind};base64,{data}" if data and kind else None


# type of a part -> how its value, which lies under the same key, reads, and what it becomes
_PARTS: Mapping[str, tuple[Any, Any]] = {
    "text": (_text_of, TextPart),
    "image": (_url_of, ImagePart),
    "image_url": (_url_of, ImagePart),
    "audio": (_url_of, AudioPart),
    "audio_url": (_url_of, AudioPart),
    "input_audio": (_audio_of, AudioPart),
}


def _part(given: object) -> Part:
    if isinstance(given, (TextPart, ImagePart, AudioPart)):
        return given
    if isinstance(given, str):
        return TextPart(given)
    kind = given.get("type") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(kind, str) or kind not in _PARTS:
        raise InvalidRequest("messages.content", f"{given!r} is not a part", f"Types are: {', '.join(_PARTS)}.")
    read, make = _PARTS[kind]
    value = read(given.get(kind))
    if value is None:
        raise InvalidRequest("messages.content", f"a part of type {kind!r} lacks its {kind!r}")
    part: Part = make(value)
    return part


def merge_sampling(sampling: SamplingParams | None, given: Mapping[str, Any]) -> SamplingParams:
    """`given` (fields by keyword, or a grammar by its kind) over `sampling`. An unknown name is an error that names
    it."""
    given = _with_grammar(given)
    for name in given:
        if name not in SAMPLING_FIELDS:
            known = ", ".join(sorted(SAMPLING_FIELDS | GRAMMAR_KINDS))
            raise InvalidRequest(name, "no such sampling field", f"Fields are: {known}.")
    if sampling is not None and not isinstance(sampling, SamplingParams):
        raise InvalidRequest("sampling", f"{sampling!r} is not a SamplingParams", "Or give its fields as keywords.")
    own = SamplingParams(**given)
    return own if sampling is None else own.over(sampling)


def _with_grammar(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """A keyword named like a kind of grammar becomes the field `grammar`; a pydantic class stands for its schema."""
    asked = [name for name in given if name in GRAMMAR_KINDS]
    fields = {name: value for name, value in given.items() if name not in GRAMMAR_KINDS}
    asked = [name for name in asked if given[name] is not None and not (name == "json_object" and given[name] is False)]
    if not asked:
        return fields
    if len(asked) > 1 or fields.get("grammar") is not None:
        raise InvalidRequest(asked[-1], "an answer matches one grammar", "Give one of them.")
    (kind,) = asked
    value = given[kind]
    if kind == "json_object":
        value = None if value is True else value
    elif kind == "json_schema" and callable(getattr(value, "model_json_schema", None)):
        value = value.model_json_schema()
    elif kind == "choice" and not isinstance(value, str) and isinstance(value, Iterable):
        value = tuple(value)
    return {**fields, "grammar": Grammar(kind, value)}  # type: ignore[arg-type]  # one of the kinds


def spread_sampling(
    sampling: Sampling | None, count: int, single: bool, given: Mapping[str, Any]
) -> list[SamplingParams]:
    """The parameters of each of `count` requests: the same for all, or one each."""
    if sampling is None or isinstance(sampling, SamplingParams):
        return [merge_sampling(sampling, given)] * count
    each = _items(sampling, "sampling", "a SamplingParams or a list of them")
    if single or len(each) != count:
        raise InvalidRequest("sampling", f"{len(each)} given for {'a single prompt' if single else f'{count} prompts'}")
    return [merge_sampling(one, given) for one in each]


def _ids(given: Sequence[int]) -> tuple[int, ...]:
    items = _items(given, "prompt", "a text or token ids")
    if any(isinstance(item, (Message, Mapping)) for item in items):
        raise InvalidRequest("prompt", "it holds messages", "Pass messages to chat() or stream().")
    if not items or not all(_is_id(item) and item >= 0 for item in items):
        raise InvalidRequest("prompt", "token ids must be integers of at least 0, and at least one")
    return tuple(int(item) for item in items)


def _is_id(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _items(value: object, field: str, expected: str) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise InvalidRequest(field, f"{value!r} is not {expected}")
    return list(value)
