"""/v1/chat/completions.

Owns how chunks of an answer look to a client of chat. Must not know: how they are made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable
from functools import partial
from typing import Any

from fastapi import Response

from tramontane.server.answers import Numbered, Tally
from tramontane.server.convert import chat
from tramontane.server.routes.common import Call, TheCall, event_stream, router, usage_of
from tramontane.server.schemas.chat import ChatChunk, ChatReply, ChatRequest
from tramontane.server.sse import Event
from tramontane.types import Chunk, TokenLogprob

routes = router("chat")
LOWEST = -9999.0
"""Stands for a log probability of minus infinity, which JSON does not have; OpenAI's and vLLM's number."""


@routes.post("/v1/chat/completions", response_model=ChatReply, responses=event_stream(ChatChunk.__name__))
async def create_chat_completion(body: ChatRequest, call: TheCall) -> Response:
    """Answer a conversation."""
    call.service.check_name(body.model)
    asked = chat(body, call.asking())
    return await call.generate(body, asked, partial(_streamed, body, call), partial(_gathered, body, call))


async def _streamed(
    body: ChatRequest, call: Call, chunks: AsyncGenerator[Numbered, None]
) -> AsyncGenerator[Event, None]:
    """A chunk with the role for each choice, what it says piece by piece, its end; then usage, where asked for."""
    options, tally, begun = body.stream_options, Tally(), set()
    with_usage = bool(options and options.include_usage)
    continuous = bool(options and options.continuous_usage_stats)
    head = {"object": "chat.completion.chunk", **call.header("chatcmpl")}

    def event(choices: list[dict[str, Any]], usage: bool) -> Event:
        if not (with_usage or continuous):
            return {**head, "choices": choices}
        return {**head, "choices": choices, "usage": usage_of(tally.usage) if usage else None}

    async for number, chunk in chunks:
        tally.see(number, chunk)
        if chunk.index not in begun:
            begun.add(chunk.index)
            role = {"role": "assistant", "content": ""}
            yield event([_choice(chunk.index, role)], continuous)
        delta = _delta(chunk)
        if delta or chunk.logprobs or chunk.finish_reason:
            choice = _choice(chunk.index, delta, _logprobs(body, chunk.logprobs), chunk.finish_reason)
            if chunk.finish_reason:
                choice["stop_reason"] = chunk.stop_reason
            yield event([choice], continuous)
    if with_usage:
        yield event([], True)


def _choice(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _delta(chunk: Chunk) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if chunk.reasoning:
        delta["reasoning_content"] = chunk.reasoning
    if chunk.text:
        delta["content"] = chunk.text
    if chunk.tool_calls:
        delta["tool_calls"] = [
            {
                "index": piece.index,
                **({"id": piece.id, "type": "function"} if piece.id is not None else {}),
                "function": {**({"name": piece.name} if piece.name is not None else {}), "arguments": piece.arguments},
            }
            for piece in chunk.tool_calls
        ]
    return delta


async def _gathered(body: ChatRequest, call: Call, chunks: AsyncGenerator[Numbered, None]) -> Event:
    head, tally = call.header("chatcmpl"), Tally()
    by_choice: dict[int, list[Chunk]] = defaultdict(list)
    async for number, chunk in chunks:
        tally.see(number, chunk)
        by_choice[chunk.index].append(chunk)
    reply = {
        "id": head["id"],
        "object": "chat.completion",
        "created": head["created"],
        "model": head["model"],
        "choices": [_whole(body, index, by_choice[index]) for index in sorted(by_choice)],
        "usage": usage_of(tally.usage),
    }
    if body.service_tier is not None:
        reply["service_tier"] = "default"
    if body.metadata is not None:
        reply["metadata"] = body.metadata
    return reply


def _whole(body: ChatRequest, index: int, chunks: list[Chunk]) -> dict[str, Any]:
    text, reasoning = "".join(c.text for c in chunks), "".join(c.reasoning for c in chunks)
    calls = _calls(chunks)
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(body, [logprob for c in chunks for logprob in c.logprobs]),
        "finish_reason": chunks[-1].finish_reason,
        "stop_reason": chunks[-1].stop_reason,
    }


def _calls(chunks: Iterable[Chunk]) -> list[dict[str, Any]]:
    calls: dict[int, dict[str, Any]] = {}
    for piece in (piece for chunk in chunks for piece in chunk.tool_calls):
        call = calls.setdefault(piece.index, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call["id"] = piece.id or call["id"]
        call["function"]["name"] = piece.name or call["function"]["name"]
        call["function"]["arguments"] += piece.arguments
    return [calls[index] for index in sorted(calls)]


def _logprobs(body: ChatRequest, logprobs: Iterable[TokenLogprob]) -> dict[str, Any] | None:
    if not body.logprobs:
        return None
    return {"content": [_logprob(one, body.top_logprobs or 0) for one in logprobs], "refusal": None}


def _logprob(one: TokenLogprob, alternatives: int) -> dict[str, Any]:
    top = [_scored(text, logprob) for _, text, logprob in one.top[:alternatives]]
    return {**_scored(one.text, one.logprob), "top_logprobs": top}


def _scored(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": list(text.encode("utf-8", "surrogatepass"))}
