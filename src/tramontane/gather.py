"""Gathering: the chunks of a backend's answers, as they come or grown into results.

Owns what a failed chunk raises, and the cancelling of what nobody waits for any more. Must not know: the shapes of
calls, how a backend answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from tramontane.backends.base import Backend
from tramontane.errors import RequestCancelled, TramontaneError
from tramontane.text.toolcalls.output import merged
from tramontane.types import Choice, Chunk, FinishReason, Request, Result, Score, ToolCall, ToolCallDelta, Usage

T = TypeVar("T")


class _Answer:
    """The chunks of one request, growing into its result."""

    def __init__(self, request: Request) -> None:
        self._name = request.id
        self._prompt_ids = request.prompt_ids or ()
        self._prompt_logprobs: Any = None
        self._chunks: dict[int, list[Chunk]] = {}

    def add(self, chunk: Chunk) -> None:
        _raise_failure(chunk)
        self._name = chunk.request_id
        self._prompt_ids = chunk.prompt_ids or self._prompt_ids
        self._prompt_logprobs = chunk.prompt_logprobs or self._prompt_logprobs
        self._chunks.setdefault(chunk.index, []).append(chunk)

    def result(self, cancelled: bool) -> Result:
        """The result; choices that have no end yet were `cancelled`, or the backend broke its word."""
        ends = [self._chunks[index][-1] for index in sorted(self._chunks)]
        if not cancelled and not (ends and all(end.finish_reason for end in ends)):
            raise TramontaneError("The backend ended an answer without saying why.", "Report this as a bug.")
        choices = tuple(self._choice(index) for index in sorted(self._chunks))
        usages = [end.usage for end in ends if end.usage is not None]
        usage = Usage(
            max((u.prompt_tokens for u in usages), default=len(self._prompt_ids)),
            sum(max(len(c.token_ids), _counted(end)) for c, end in zip(choices, ends, strict=True)),
            max((u.cached_tokens for u in usages), default=0),
        )
        return Result(self._name, choices, usage, self._prompt_ids, self._prompt_logprobs)

    def _choice(self, index: int) -> Choice:
        chunks = self._chunks[index]
        end = chunks[-1]
        reason: FinishReason = end.finish_reason or "cancelled"
        return Choice(
            index,
            "".join(chunk.text for chunk in chunks),
            tuple(i for chunk in chunks for i in chunk.token_ids),
            reason,
            end.stop_reason,
            tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
            "".join(chunk.reasoning for chunk in chunks),
            joined_calls(delta for chunk in chunks for delta in chunk.tool_calls),
            end.score,
        )


def _counted(end: Chunk) -> int:
    return end.usage.completion_tokens if end.usage is not None else 0


def joined_calls(deltas: Iterable[ToolCallDelta]) -> tuple[ToolCall, ...]:
    """The calls that pieces make up, in the order of their indices."""
    return tuple(ToolCall(delta.id or "", delta.name or "", delta.arguments) for delta in merged(deltas))


def _raise_failure(chunk: Chunk) -> None:
    if chunk.finish_reason == "error":
        raise chunk.error or TramontaneError(f"Request {chunk.request_id} failed without a reason.")


@asynccontextmanager
async def closing_after(chunks: AsyncIterator[T]) -> AsyncGenerator[AsyncIterator[T], None]:
    """Close an async iterator on the way out, where it can be closed: that is what cancels a request."""
    try:
        yield chunks
    finally:
        close = getattr(chunks, "aclose", None)
        if close is not None:
            await close()


async def chunks_of(backend: Backend, request: Request) -> AsyncGenerator[Chunk, None]:
    """The chunks of one answer; a failure midway raises its error."""
    async with closing_after(backend.generate(replace(request, streamed=True))) as chunks:
        async for chunk in chunks:
            _raise_failure(chunk)
            yield chunk


async def _answer_one(
    backend: Backend, request: Request, on_token: Callable[[Chunk], Awaitable[bool | None]] | None
) -> Result:
    request = replace(request, streamed=on_token is not None)
    answer = _Answer(request)
    async with closing_after(backend.generate(request)) as chunks:
        async for chunk in chunks:
            answer.add(chunk)
            if on_token is not None and await on_token(chunk) is False:
                return answer.result(cancelled=True)
    return answer.result(cancelled=False)


async def answer_all(
    backend: Backend, requests: Sequence[Request], on_token: Callable[[Chunk], Awaitable[bool | None]] | None
) -> list[Result]:
    """All requests at once. The first error is raised when the others are cancelled and gone."""
    tasks = [asyncio.ensure_future(_answer_one(backend, request, on_token)) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def scores(ids: Sequence[tuple[int, ...]], results: Sequence[Result]) -> list[Score]:
    """What requests that only score their prompts, `ids`, found."""
    return [_score(own, result) for own, result in zip(ids, results, strict=True)]


def _score(ids: tuple[int, ...], result: Result) -> Score:
    if result.finish_reason == "cancelled":
        raise RequestCancelled(result.request_id)
    entries = result.prompt_logprobs or (None,)
    if len(entries) != len(ids) or any(e is not None and e.token_id != i for e, i in zip(entries, ids, strict=True)):
        raise TramontaneError("The backend did not score the tokens that it was given.", "Report this as a bug.")
    return Score(ids, tuple(None if entry is None else entry.logprob for entry in entries))
