"""Answers: the chunks of one HTTP request's prompts, as they come or gathered.

Owns admission around generating, what is recorded of it, and giving up when the client has left. Must not know:
schemas, how chunks are shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from tramontane.backends.base import Backend
from tramontane.errors import RequestCancelled, TramontaneError
from tramontane.server.metrics import Metrics
from tramontane.server.problems import ClientGone, Problem
from tramontane.server.records import Record
from tramontane.server.service import Service
from tramontane.types import Chunk, Request, Usage

T = TypeVar("T")

Numbered = tuple[int, Chunk]
"""Which prompt a chunk belongs to, and the chunk."""


class Tally:
    """Usage while an answer grows: prompts are counted once, all their choices' tokens are added. Of a choice that has
    ended, what its backend says counts."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        self._completions: dict[tuple[int, int], int] = {}

    def see(self, number: int, chunk: Chunk) -> None:
        if chunk.prompt_ids is not None and number not in self._prompts:
            self._prompts[number] = (len(chunk.prompt_ids), 0)
        if chunk.usage is not None:
            known = self._prompts.get(number, (0, 0))
            self._prompts[number] = (chunk.usage.prompt_tokens, max(known[1], chunk.usage.cached_tokens))
        choice = (number, chunk.index)
        count = self._completions.get(choice, 0) + len(chunk.token_ids)
        self._completions[choice] = max(count, chunk.usage.completion_tokens if chunk.usage is not None else 0)

    @property
    def usage(self) -> Usage:
        prompts = self._prompts.values()
        completions = sum(self._completions.values())
        return Usage(sum(p for p, _ in prompts), completions, sum(c for _, c in prompts))


async def answer(
    service: Service, metrics: Metrics, record: Record, backend: Backend, requests: Sequence[Request]
) -> AsyncGenerator[Numbered, None]:
    """The chunks of all requests as they come. A choice that fails or is cancelled raises, and ends the others.

    Closing the generator cancels what is open. Raises what `Backend.generate` does, and Problem (429, 503, 504).
    """
    tally = Tally()
    with service.admitted(record.key, len(requests)):
        try:
            async with _closing(_merged(backend, requests)) as chunks:
                async for number, chunk in chunks:
                    _raise_failure(chunk)
                    tally.see(number, chunk)
                    metrics.saw(record, chunk)
                    yield number, chunk
        finally:
            usage = tally.usage
            record.prompt_tokens += usage.prompt_tokens
            record.completion_tokens += usage.completion_tokens
            record.cached_tokens += usage.cached_tokens


def _raise_failure(chunk: Chunk) -> None:
    if chunk.finish_reason == "error":
        raise chunk.error or TramontaneError(f"Request {chunk.request_id} failed without a reason.")
    if chunk.finish_reason == "cancelled":
        raise RequestCancelled(chunk.request_id)


async def _merged(backend: Backend, requests: Sequence[Request]) -> AsyncGenerator[Numbered, None]:
    """One chunk ahead of each request is kept, no more: the rest waits where it is made, and is joined there."""
    if len(requests) == 1:
        async with _closing(backend.generate(requests[0])) as chunks:
            async for chunk in chunks:
                yield 0, chunk
        return
    streams = [backend.generate(request) for request in requests]
    nexts = {asyncio.ensure_future(_next(stream)): number for number, stream in enumerate(streams)}
    try:
        while nexts:
            done, _ = await asyncio.wait(nexts, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = nexts.pop(task)
                ahead = task.result()
                if ahead is not None:
                    nexts[asyncio.ensure_future(_next(streams[number]))] = number
                    yield number, ahead
    finally:
        for task in nexts:
            task.cancel()
        await asyncio.gather(*nexts, return_exceptions=True)
        for stream in streams:
            await _close(stream)


async def _next(stream: AsyncIterator[Chunk]) -> Chunk | None:
    return await anext(stream, None)


async def _close(stream: AsyncIterator[Any]) -> None:
    close = getattr(stream, "aclose", None)
    if close is not None:
        await close()


@asynccontextmanager
async def _closing(stream: AsyncIterator[T]) -> AsyncGenerator[AsyncIterator[T], None]:
    try:
        yield stream
    finally:
        await _close(stream)


async def first_of(stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """A stream that has begun: what it raises before its first piece is raised here, while a status can still be
    sent. Closing what is returned does not close `stream`."""
    first = await anext(stream)

    async def again() -> AsyncGenerator[T, None]:
        yield first
        async for piece in stream:
            yield piece

    return again()


async def while_connected(http: HttpRequest, work: Coroutine[Any, Any, T], seconds: float) -> T:
    """What `work` returns, unless the client leaves first (ClientGone) or `seconds` pass (Problem 504): then the work
    is cancelled. The body must have been read."""
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(disconnected(http.receive))
    try:
        await asyncio.wait((doing, leaving), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        if leaving.done():
            raise ClientGone
        raise timed_out(seconds)
    finally:
        await cancelled(doing, leaving)


async def disconnected(receive: Any) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancelled(*tasks: Awaitable[Any]) -> None:
    """Cancel tasks, and wait until they are gone."""
    futures = [asyncio.ensure_future(task) for task in tasks]
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)


def timed_out(seconds: float) -> Problem:
    return Problem(504, f"The answer took longer than {seconds:g} seconds.", "timeout", code="request_timeout")
