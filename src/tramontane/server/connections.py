"""Connections: how many may be open, and how long one may keep the server waiting.

Owns what happens below HTTP's requests: heads that do not come or do not end, readers that do not read, and the count.
Must not know: the application.

uvicorn itself waits for a head without end, and closes a connection whose reader has gone to sleep only once its buffer
is read, which is never.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tramontane import platform
from tramontane.server.settings import Limits

MAX_HEAD_BYTES = 64 << 10
_SPARE_FILES = 64
"""Descriptors that are left for files, threads and libraries."""


def guarded_protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with a guard that all connections of one server share."""
    guard = _Guard(limits)

    class Protocol(_Guarded):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(guard, *args, **options)

    return Protocol


class _Guard:
    """Knows all connections, and which of them are idle: between requests, or with one that has not come whole."""

    def __init__(self, limits: Limits) -> None:
        files = platform.max_open_files()
        self.most = limits.connections or max(files - max(_SPARE_FILES, files // 4), 1)
        self.seconds = limits.idle_seconds
        self.count = 0
        self._idle: dict[_Guarded, None] = {}  # in the order in which they became so

    def admit(self) -> bool:
        """Whether there is room for one more; the one that has been idle longest makes it."""
        if self.count < self.most:
            return True
        longest = next(iter(self._idle), None)
        if longest is None:
            return False
        del self._idle[longest]
        longest.transport.abort()
        return True

    def now_idle(self, connection: _Guarded) -> None:
        self._idle.pop(connection, None)
        self._idle[connection] = None

    def not_idle(self, connection: _Guarded) -> None:
        self._idle.pop(connection, None)


class _Guarded(HttpToolsProtocol):
    def __init__(self, guard: _Guard, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._guard = guard
        self._head_bytes = 0
        self._patience: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        admitted = self._guard.admit()
        super().connection_made(transport)
        self._guard.count += 1
        if admitted:
            self._wait_for_head()
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._guard.count -= 1
        self._guard.not_idle(self)
        for timer in (self._patience, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._patience is not None:  # this belongs to a head
            self._head_bytes += len(data)
        super().data_received(data)
        if self._patience is not None and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.cycle.response_complete:
            self._guard.not_idle(self)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self._wait_for_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self._guard.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def _wait_for_head(self) -> None:
        self._guard.now_idle(self)
        self._head_bytes = 0
        if self._patience is not None:
            self._patience.cancel()
        self._patience = self.loop.call_later(self._guard.seconds, self.transport.abort)
