"""From what clients send to what backends take, and the names by which clients know our fields.

Owns every renaming and the rules between fields. Must not know: backends, how answers are shown. What a backend cannot
honour, it refuses itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tramontane.records import dataclass
from tramontane.server.problems import Problem
from tramontane.server.records import Record
from tramontane.server.schemas.base import Sampled
from tramontane.server.schemas.chat import (
    AssistantTurn,
    ChatRequest,
    NamedChoice,
    SchemaFormat,
    TextContent,
    ToolGiven,
    Turn,
)
from tramontane.server.schemas.chat import ImageContent as Image
from tramontane.server.schemas.completions import CompletionRequest
from tramontane.server.settings import ServerSettings
from tramontane.types import (
    AudioPart,
    Grammar,
    ImagePart,
    Message,
    NamedTool,
    Part,
    Request,
    SamplingParams,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
)

COMPLETION_TOKENS = 16
"""Of a completion that does not say how long it may be, as OpenAI has it."""

# Fields that mean the same in a body and in SamplingParams.
_SAME = (
    "frequency_penalty", "presence_penalty", "n", "seed", "temperature", "top_p", "min_p",
    "repetition_penalty", "typical_p", "xtc_probability", "xtc_threshold", "dry_multiplier", "dry_base",
    "dry_allowed_length", "dry_range", "dry_sequence_breakers", "bad_words", "allowed_token_ids",
    "length_penalty", "early_stopping", "ignore_eos", "min_tokens", "stop_token_ids", "skip_special_tokens",
)  # fmt: skip

NAMES: Mapping[str, str] = {
    "ids": "prompt",
    "include_stop": "include_stop_str_in_output",
    "prompt_ids": "prompt",
    "prompt_logprobs": "logprobs",
    "template_kwargs": "chat_template_kwargs",
    "thinking": "reasoning_effort",
}
"""What clients call our fields, where they call them otherwise."""


@dataclass(frozen=True)
class Asked:
    """Requests for the backend, out of one body, and what the client calls the fields in them."""

    requests: Sequence[Request]
    names: Mapping[str, str]


@dataclass(frozen=True)
class Asking:
    """What a conversion needs besides the body."""

    record: Record
    settings: ServerSettings
    honoured: frozenset[str]
    """The fields of Request that the backend has: what the server adds by itself, it adds to those alone."""


def chat(body: ChatRequest, asking: Asking) -> Asked:
    """Raises Problem or InvalidRequest."""
    _check_stream(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise _invalid("top_logprobs", "it needs logprobs=true")
    longest = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise _invalid("max_tokens", "max_completion_tokens says otherwise. Give one of them")
    grammar, spelling = _grammar(body)
    sampling = _sampling(
        body,
        asking.settings,
        max_tokens=longest,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=grammar,
    )
    thinking = False if body.reasoning_effort == "none" else None
    request = Request(
        messages=tuple(message(turn) for turn in body.messages),
        sampling=sampling,
        template_kwargs=body.chat_template_kwargs or {},
        tools=tuple(_tool(given) for given in body.tools or ()),
        tool_choice=_tool_choice(body),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        thinking=thinking,
        reasoning_effort=None if thinking is False else body.reasoning_effort,
        **_whose(body, asking),
    )
    return Asked((request,), {**NAMES, "grammar": spelling})


def completions(body: CompletionRequest, asking: Asking) -> Asked:
    """A request for each prompt. Raises Problem or InvalidRequest."""
    _check_stream(body)
    grammar, spelling = _grammar(body)
    sampling = _sampling(
        body,
        asking.settings,
        max_tokens=COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        echo=body.echo,
        grammar=grammar,
    )
    whose = _whose(body, asking)
    prompts: Sequence[Any] = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if isinstance(prompts[0], int):
        prompts = [prompts]
    if len(prompts) > asking.settings.limits.inputs:
        raise _invalid(
            "prompt", f"{len(prompts)} prompts are more than the {asking.settings.limits.inputs} that are allowed"
        )
    requests = [
        Request(prompt=prompt, sampling=sampling, **whose)
        if isinstance(prompt, str)
        else Request(prompt_ids=tuple(prompt), sampling=sampling, **whose)
        for prompt in prompts
    ]
    return Asked(requests, {**NAMES, "grammar": spelling})


def _salt(given: str | None, asking: Asking) -> str:
    """What keeps one client's cached prefixes from another: nobody learns by timing what others have asked."""
    own = "" if asking.settings.share_prefixes else asking.record.key_name
    return json.dumps([own, given or ""]) if own or given else ""


def _sampling(body: Sampled, settings: ServerSettings, **more: Any) -> SamplingParams:
    for name in ("n", "best_of", "beam_width"):
        if (getattr(body, name) or 1) > settings.limits.n:
            raise _invalid(name, f"{getattr(body, name)} are more than the {settings.limits.n} that are allowed")
    beams = body.beam_width
    if body.use_beam_search and beams is None:
        if (body.n or 1) == 1:
            raise _invalid("use_beam_search", "one beam is no search. Give beam_width, or an n above 1")
        beams = body.n
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    return SamplingParams(
        **{name: getattr(body, name) for name in _SAME},
        logit_bias={int(id_): value for id_, value in (body.logit_bias or {}).items()} or None,
        top_k=None if body.top_k is None else max(body.top_k, 0),  # -1 is off too
        best_of=None if body.best_of == (body.n or 1) else body.best_of,  # then all are answered with
        beam_width=beams,
        stop=None if stop is None else tuple(stop),
        include_stop=body.include_stop_str_in_output,
        **more,
    )


def _whose(body: Sampled, asking: Asking) -> dict[str, Any]:
    key, honoured = asking.record.key, asking.honoured
    own = key.priority if key is not None and "priority" in honoured else 0
    salted = "cache_salt" in honoured or body.cache_salt
    return {
        "priority": own + (body.priority or 0),
        "tenant": key.name if key is not None and "tenant" in honoured else "",
        "cache_salt": _salt(body.cache_salt, asking) if salted else "",
        "adapter": body.adapter,
        "streamed": bool(body.stream),
    }


def _check_stream(body: Sampled) -> None:
    if body.stream_options is not None and not body.stream:
        raise _invalid("stream_options", "it needs stream=true")


def _invalid(field: str, detail: str) -> Problem:
    return Problem(400, f"Invalid {field}: {detail}.", param=field, code="invalid_value")


# ---- what an answer must match


def _grammar(body: Sampled) -> tuple[Grammar | None, str]:
    """The grammar, and the field that asks for it. Raises Problem where two do."""
    given = {
        "guided_json": body.guided_json, "guided_regex": body.guided_regex,
        "guided_choice": body.guided_choice, "guided_grammar": body.guided_grammar,
    }  # fmt: skip
    made: list[tuple[Any, Any, str]] = [
        (_KINDS[name.removeprefix("guided_")], value, name) for name, value in given.items() if value is not None
    ]
    outputs = body.structured_outputs
    if outputs is not None:
        inner = {"json": outputs.json_, **{name: getattr(outputs, name) for name in ("regex", "choice", "grammar")}}
        made += [(_KINDS[n], value, f"structured_outputs.{n}") for n, value in inner.items() if value is not None]
        if outputs.json_object:
            made.append(("json_object", None, "structured_outputs.json_object"))
    format_ = getattr(body, "response_format", None)
    if isinstance(format_, SchemaFormat) and format_.json_schema.schema_ is not None:
        made.append(("json_schema", format_.json_schema.schema_, "response_format"))
    elif format_ is not None and format_.type != "text":
        made.append(("json_object", None, "response_format"))
    if len(made) > 1:
        raise _invalid(made[1][2], f"{made[0][2]} says already what the answer must match. Give one of them")
    if not made:
        return None, "grammar"
    kind, value, spelling = made[0]
    if kind == "json_schema" and isinstance(value, str):
        value = _schema(value, spelling)
    return Grammar(kind, tuple(value) if kind == "choice" else value), spelling


_KINDS: Mapping[str, Any] = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "lark"}


def _schema(text: str, field: str) -> Any:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise _invalid(field, "the text is not JSON") from None
    if not isinstance(schema, (dict, bool)):
        raise _invalid(field, "the text is no JSON Schema")
    return schema


# ---- conversations


def message(turn: Turn) -> Message:
    """A client's message as ours."""
    content: str | tuple[Part, ...]
    if turn.content is None or isinstance(turn.content, str):
        content = turn.content or ""
    else:
        content = tuple(_part(part) for part in turn.content)
    if isinstance(turn, AssistantTurn):
        calls = tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in turn.tool_calls or ())
        thought = turn.reasoning_content if turn.reasoning_content is not None else turn.reasoning
        return Message(turn.role, content, calls, name=turn.name, reasoning=thought)
    return Message(turn.role, content, tool_call_id=turn.tool_call_id, name=turn.name)


def _part(part: Any) -> Part:
    if isinstance(part, TextContent):
        return TextPart(part.text)
    if isinstance(part, Image):
        return ImagePart(part.image_url.url)
    return AudioPart(f"data:audio/{part.input_audio.format};base64,{part.input_audio.data}")


def _tool(given: ToolGiven) -> Tool:
    function = given.function
    return Tool(function.name, function.description or "", function.parameters, bool(function.strict))


def _tool_choice(body: ChatRequest) -> ToolChoice:
    if isinstance(body.tool_choice, NamedChoice):
        return NamedTool(body.tool_choice.function.name)
    # Without tools, there is nothing to choose.
    return (
        body.tool_choice if body.tool_choice is not None and (body.tools or body.tool_choice == "required") else "auto"
    )
