"""/v1/chat/completions: what is sent and what comes back.

Owns every field of OpenAI's published schema, honoured or refused by name, and the extensions. Must not know: how.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from tramontane.server.schemas.base import (
    Body,
    Count,
    Int,
    Labels,
    Reply,
    Sampled,
    Several,
    UsageReply,
    refused,
    refused_unless_empty,
)


class TextContent(Body):
    type: Literal["text"]
    text: str


class ImageUrl(Body):
    url: str
    detail: str | None = None


class ImageContent(Body):
    """Refused by every model of this build, by name."""

    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(Body):
    data: str
    format: str


class AudioContent(Body):
    """Refused by every model of this build, by name."""

    type: Literal["input_audio"]
    input_audio: InputAudio


Content = Annotated[TextContent | ImageContent | AudioContent, Field(discriminator="type")]


class CalledFunction(Body):
    name: str
    arguments: str
    parsed_arguments: Any = None
    """What OpenAI's client read out of the arguments, and sends back with them."""


class Call(Body):
    """A call that the assistant made."""

    id: str
    type: Literal["function"] | None = None
    function: CalledFunction
    index: Int | None = None
    """Sent back by clients that keep a stream's calls as they came."""


Said = str | Several[Content]


class _Turn(Body):
    """A message. What belongs to one role alone may be there in others, as null."""

    content: Said
    name: str | None = None
    refusal: refused("an answer that was refused has no text to go on from") = None  # type: ignore[valid-type]
    audio: refused("this server does not speak") = None  # type: ignore[valid-type]
    function_call: refused("it is deprecated: use tool_calls") = None  # type: ignore[valid-type]
    annotations: refused_unless_empty("there is no web search") = None  # type: ignore[valid-type]


_OTHERS_CALLS = refused_unless_empty("only an assistant calls tools")
_OTHERS_THOUGHTS = refused("only an assistant thinks")
_OTHERS_ANSWERS = refused("only a tool's message answers a call")


class GivenTurn(_Turn):
    role: Literal["system", "developer", "user"]
    tool_calls: _OTHERS_CALLS = None  # type: ignore[valid-type]
    tool_call_id: _OTHERS_ANSWERS = None  # type: ignore[valid-type]
    reasoning_content: _OTHERS_THOUGHTS = None  # type: ignore[valid-type]
    reasoning: _OTHERS_THOUGHTS = None  # type: ignore[valid-type]


class ToolTurn(_Turn):
    role: Literal["tool"]
    tool_call_id: str | None = None
    tool_calls: _OTHERS_CALLS = None  # type: ignore[valid-type]
    reasoning_content: _OTHERS_THOUGHTS = None  # type: ignore[valid-type]
    reasoning: _OTHERS_THOUGHTS = None  # type: ignore[valid-type]


class AssistantTurn(_Turn):
    role: Literal["assistant"]
    content: Said | None = None  # type: ignore[assignment]
    tool_calls: Several[Call] | None = None
    tool_call_id: _OTHERS_ANSWERS = None  # type: ignore[valid-type]
    reasoning_content: str | None = None
    """What it thought before it answered; whether the template shows it is the template's."""
    reasoning: str | None = None
    """The same, as vLLM has it."""
    parsed: Any = None
    """What OpenAI's client read out of the content, and sends back with it."""


Turn = Annotated[GivenTurn | ToolTurn | AssistantTurn, Field(discriminator="role")]


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolGiven(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedChoice(Body):
    type: Literal["function"]
    function: FunctionName


class TextFormat(Body):
    type: Literal["text"]


class ObjectFormat(Body):
    type: Literal["json_object"]


class NamedSchema(Body):
    model_config = ConfigDict(protected_namespaces=())

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    """The schema is kept to in either case."""


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class CacheOptions(Body):
    mode: refused("prefixes are always cached, as 'implicit' says", "implicit") = None  # type: ignore[valid-type]
    ttl: refused("what is cached stays until the room is needed") = None  # type: ignore[valid-type]


class ChatRequest(Sampled):
    messages: Annotated[Several[Turn], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None
    max_completion_tokens: Count | None = None
    """The same as max_tokens, by its newer name."""
    metadata: Labels | None = None
    """Given back with the answer, and written to the log."""
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    """There is one engine with one cache, which finds equal prefixes by itself: nothing is left to route."""
    prompt_cache_options: CacheOptions | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None
    """"none" turns reasoning off; others are the template's to know."""
    response_format: ResponseFormat | None = None
    safety_identifier: str | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    tools: Several[ToolGiven] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """More variables for the chat template."""

    audio: refused("this server does not speak") = None  # type: ignore[valid-type]
    function_call: refused("it is deprecated: use tool_choice", "none", "auto") = None  # type: ignore[valid-type]
    functions: refused_unless_empty("they are deprecated: use tools") = None  # type: ignore[valid-type]
    modalities: Annotated[Several[Literal["text"]], Field(max_length=1)] | None = None
    moderation: refused("there is no moderation model") = None  # type: ignore[valid-type]
    prediction: refused("there are no predicted outputs") = None  # type: ignore[valid-type]
    prompt_cache_retention: refused("the cache is in memory", "in_memory") = None  # type: ignore[valid-type]
    service_tier: refused("there is one tier: use priority", "auto", "default") = None  # type: ignore[valid-type]
    store: refused("nothing is stored", False) = None  # type: ignore[valid-type]
    verbosity: refused("models do not know it", "medium") = None  # type: ignore[valid-type]
    web_search_options: refused("there is no web search") = None  # type: ignore[valid-type]


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    content: list[ChatLogprob] | None
    refusal: None = None


class ReplyFunction(Reply):
    name: str
    arguments: str


class ReplyCall(Reply):
    id: str
    type: Literal["function"]
    function: ReplyFunction


class ReplyMessage(Reply):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    tool_calls: list[ReplyCall] = Field(default_factory=list)


class ChatChoice(Reply):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None


class ChatReply(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageReply
    service_tier: Literal["default"] = "default"
    metadata: dict[str, str] = Field(default_factory=dict)


class DeltaFunction(Reply):
    name: str = ""
    arguments: str = ""


class DeltaCall(Reply):
    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: DeltaFunction


class Delta(Reply):
    role: Literal["assistant"] = "assistant"
    content: str | None = None
    reasoning_content: str = ""
    tool_calls: list[DeltaCall] = Field(default_factory=list)


class ChunkChoice(Reply):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: str | int | None = None


class ChatChunk(Reply):
    """The data of one server-sent event; the last event's is [DONE]."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageReply | None = None
