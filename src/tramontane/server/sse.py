"""Server-sent events: how a stream leaves.

Owns the framing, the end of a stream that fails, and watching for a client that leaves. Must not know: what is
streamed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tramontane.server.answers import cancelled, disconnected, timed_out
from tramontane.server.problems import problem_of
from tramontane.server.records import record_of
from tramontane.server.wire import encode

Event = Mapping[str, Any]
_DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(Response):
    """Events as they come, each a JSON object, and [DONE]. In the end, however it comes, their source is closed."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[Event, None],
        source: AsyncGenerator[Any, None],
        names: Mapping[str, str],
        seconds: float,
    ) -> None:
        """`source`: what the events are made of; a generator that never ran would not close it. `names`: see
        `problem_of`. `seconds`: how long the stream may take."""
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._events, self._source, self._names, self._seconds = events, source, names, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait((writing, leaving), timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
            record = record_of(scope)
            if not writing.done() and leaving.done():
                record.error = "the client left"
                return
            if not writing.done():
                writing.cancel()
            try:
                await writing
                last = _DONE
            except (Exception, asyncio.CancelledError) as error:
                late = isinstance(error, asyncio.CancelledError)
                problem = timed_out(self._seconds) if late else problem_of(error, self._names)
                record.error = problem.message
                last = _framed(problem.body()) + _DONE
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            await cancelled(writing, leaving)
            await self._events.aclose()
            await self._source.aclose()

    async def _write(self, send: Send) -> None:
        async for event in self._events:
            await send({"type": "http.response.body", "body": _framed(event), "more_body": True})


def _framed(event: Event) -> bytes:
    return b"data: " + encode(event) + b"\n\n"
