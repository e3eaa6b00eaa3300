"""Mailbox: how the chunks of one request leave the engine's thread for whoever reads them, on any event loop.

Owns waking the reader and coalescing what it has not read yet. Must not know: engines, text, how chunks are made.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Sequence
from itertools import chain

from tramontane.records import dataclass
from tramontane.text.toolcalls.output import merged
from tramontane.types import Chunk


@dataclass(frozen=True)
class Reader:
    """Who waits for a mailbox to fill."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]


def wake(readers: Iterable[Reader]) -> set[asyncio.AbstractEventLoop]:
    """Let readers go on, with one call a loop: each call writes to a socket. Returns the loops found closed, whose
    readers will never read again."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for reader in readers:
        by_loop.setdefault(reader.loop, []).append(reader.future)
    closed = set()
    for loop, futures in by_loop.items():
        try:
            loop.call_soon_threadsafe(_set, futures)
        except RuntimeError:  # how asyncio says that the loop is closed
            closed.add(loop)
    return closed


def _set(futures: Iterable[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():  # the reader may have been cancelled meanwhile
            future.set_result(None)


class Mailbox:
    """One writer on any thread, one reader on one event loop at a time. Writing never waits for the reader; what
    `put` and `refuse` return is to be given to `wake`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunks: list[Chunk] = []
        self._refusal: Exception | None = None
        self._reader: Reader | None = None

    def put(self, chunk: Chunk) -> Reader | None:
        """Leave a chunk; returns the reader, if it waits."""
        with self._lock:
            self._chunks.append(chunk)
            reader, self._reader = self._reader, None
            return reader

    def refuse(self, error: Exception) -> Reader | None:
        """Instead of any chunk: the error that the reader meets. Returns the reader, if it waits."""
        with self._lock:
            self._refusal = error
            reader, self._reader = self._reader, None
            return reader

    async def read(self) -> list[Chunk]:
        """What has come since the last call, at least one chunk, at most one a choice: a late reader gets more text
        at once. Raises the refusal."""
        while True:
            with self._lock:
                if self._refusal is not None:
                    raise self._refusal
                if self._chunks:
                    chunks, self._chunks = self._chunks, []
                    return coalesce(chunks)
                loop = asyncio.get_running_loop()
                future: asyncio.Future[None] = loop.create_future()
                self._reader = Reader(loop, future)
            await future


def coalesce(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The same answers in at most one chunk a choice, in the order of their first chunks."""
    by_choice: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        by_choice.setdefault(chunk.index, []).append(chunk)
    return [parts[0] if len(parts) == 1 else _joined(parts) for parts in by_choice.values()]


def _joined(parts: Sequence[Chunk]) -> Chunk:
    last = parts[-1]
    return Chunk(
        request_id=last.request_id,
        index=last.index,
        text="".join(part.text for part in parts),
        reasoning="".join(part.reasoning for part in parts),
        tool_calls=merged(chain.from_iterable(part.tool_calls for part in parts)),
        token_ids=tuple(chain.from_iterable(part.token_ids for part in parts)),
        logprobs=tuple(chain.from_iterable(part.logprobs for part in parts)),
        prompt_ids=next((part.prompt_ids for part in parts if part.prompt_ids is not None), None),
        prompt_logprobs=next((part.prompt_logprobs for part in parts if part.prompt_logprobs is not None), None),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        usage=last.usage,
        error=last.error,
        score=last.score,
    )
