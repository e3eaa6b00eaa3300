"""/v1/completions: what is sent and what comes back."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tramontane.server.schemas.base import Inputs, Int, Reply, Sampled, UsageReply, refused


class CompletionRequest(Sampled):
    prompt: Inputs
    """Each has n choices, those of the first prompt first."""
    echo: bool | None = None
    logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None
    suffix: refused("the text behind is not read", "") = None  # type: ignore[valid-type]


class CompletionLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    """null on the chunks of a stream but for the last."""
    stop_reason: str | int | None = None


class CompletionReply(Reply):
    """Of a stream, the data of one server-sent event; the last event's is [DONE]."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageReply | None = None
