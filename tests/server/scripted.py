"""A backend that answers with given chunks, takes every field, and remembers what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import fields, replace

from tramontane.backends.base import REQUEST_FIELDS, Capabilities
from tramontane.types import Chunk, Request, SamplingParams, ToolCallDelta, Usage


class Scripted:
    """`answer`: the chunks of each choice, or what makes them of a request. Usage and prompt are filled in."""

    def __init__(
        self, answer: Sequence[Chunk] | Callable[[Request], Sequence[Chunk]] = (), *, pause: float = 0.0
    ) -> None:
        self.answer, self.pause = answer, pause
        self.asked: list[Request] = []
        self.open = 0
        """Requests that are being answered."""

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        self.asked.append(request)
        chunks = self.answer(request) if callable(self.answer) else self.answer
        self.open += 1
        try:
            for place, chunk in enumerate(chunks):
                await asyncio.sleep(self.pause)
                if place == 0:
                    chunk = replace(chunk, prompt_ids=(1, 2, 3))
                if chunk.finish_reason:
                    count = sum(len(c.token_ids) for c in chunks if c.index == chunk.index)
                    chunk = replace(chunk, usage=Usage(3, count, 2))
                yield chunk
        finally:
            self.open -= 1

    def capabilities(self) -> Capabilities:
        honoured = frozenset(field.name for field in fields(SamplingParams))
        return Capabilities("scripted", "scripted", 100, honoured, chat=True, request_fields=REQUEST_FIELDS)

    def close(self) -> None:
        pass


def says(text: str, reason: str | None = "stop") -> list[Chunk]:
    """A chunk a character."""
    chunks = [Chunk("r", 0, char, (ord(char),)) for char in text]
    return [*chunks[:-1], replace(chunks[-1], finish_reason=reason)]  # type: ignore[arg-type]


THINKS_AND_CALLS = [
    Chunk("r", reasoning="I need ", token_ids=(1,)),
    Chunk("r", reasoning="the weather.", token_ids=(2,)),
    Chunk("r", tool_calls=(ToolCallDelta(0, "call-1", "weather"),), token_ids=(3,)),
    Chunk("r", tool_calls=(ToolCallDelta(0, arguments='{"city":'),), token_ids=(4,)),
    Chunk("r", tool_calls=(ToolCallDelta(0, arguments='"Nice"}'),), token_ids=(5,)),
    Chunk("r", tool_calls=(ToolCallDelta(1, "call-2", "time", "{}"),), token_ids=(6,)),
    Chunk("r", finish_reason="tool_calls"),
]
