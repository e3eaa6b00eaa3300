"""What is logged: a line for each request, and whatever else the server says, as JSON or for people.

Owns the request's id, its record and its line. Must not know: routes. What was asked is written only where the
settings say so.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import sys
import threading
import time
import uuid
from contextlib import suppress
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tramontane.server.metrics import Metrics
from tramontane.server.problems import problem_of
from tramontane.server.records import Record
from tramontane.server.settings import ServerSettings

log = logging.getLogger("tramontane.server")

_MOST_LINES = 10_000
"""That wait to be written; more are lost."""
_CLOSING_SECONDS = 2.0
_POLLED = ("/health", "/ready", "/metrics")
_SOUND_ID = re.compile(rb"[!-~]{1,128}")


class RequestLog:
    """ASGI middleware, the outermost: gives each request an id and a record, and logs how it ended.

    An id that the client sends as X-Request-Id is kept where it is plain ASCII; either is sent back.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(_given_id(scope) or f"req-{uuid.uuid4().hex}")
        scope.setdefault("state", {})["record"] = record
        id_header = (b"x-request-id", record.request_id.encode())

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), id_header]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as error:
            problem = problem_of(error)
            record.error = record.error or problem.message
            if not record.status:
                await problem.response()(scope, receive, sending)
        finally:
            self._metrics.ended(record, scope)
            level = logging.DEBUG if scope["path"].endswith(_POLLED) and record.status == 200 else logging.INFO
            if log.isEnabledFor(level):
                log.log(level, "request", extra={"request": _shown(record, scope)})


def _given_id(scope: Scope) -> str | None:
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    return given[0].decode() if given and _SOUND_ID.fullmatch(given[0]) else None


def _shown(record: Record, scope: Scope) -> dict[str, Any]:
    """The request's line; what it does not have is left out."""
    shown = {
        "id": record.request_id,
        "key": record.key_name,
        "method": scope["method"],
        "path": scope["path"],
        "client": (scope.get("client") or ("",))[0],
        "status": record.status,
        "seconds": round(time.perf_counter() - record.started, 4),
        "first_token_seconds": record.first_token and round(record.first_token - record.started, 4),
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "finish_reasons": record.finish_reasons,
        "error": record.error,
        "prompt": record.prompt,
        **record.labels,
    }
    return {name: value for name, value in shown.items() if value not in (None, "", [])}


class JsonLines(logging.Formatter):
    """A JSON object a line: time, level, logger, message, and a request's fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "request", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class PlainLines(logging.Formatter):
    """The same for people."""

    def format(self, record: logging.LogRecord) -> str:
        request: dict[str, Any] = getattr(record, "request", {})
        said = " ".join(f"{name}={value}" for name, value in request.items()) or record.getMessage()
        traced = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.levelname.lower()}: {said}"
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text) + traced


class Lines(logging.Handler):
    """Writes lines on a thread of its own: a disk that is full or a pipe that nobody reads costs lines, never time of
    the event loop."""

    def __init__(self, stream: TextIO | None) -> None:
        """`stream`: None is standard error, wherever it leads when a line is written: a bar that is shown there may
        have put itself in between."""
        super().__init__()
        self._stream = stream
        self._queue: queue.Queue[str | None] = queue.Queue(_MOST_LINES)
        self._thread = threading.Thread(target=self._write, name="tramontane-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._queue.put_nowait(self.format(record))
        except queue.Full:
            return

    def close(self) -> None:
        """Write out what is left, as far as that can be done soon."""
        with suppress(queue.Full):
            self._queue.put_nowait(None)
            self._thread.join(_CLOSING_SECONDS)
        super().close()

    def _write(self) -> None:
        while (line := self._queue.get()) is not None:
            stream = self._stream or sys.stderr
            with suppress(OSError, ValueError):  # ValueError: the stream is closed
                stream.write(f"{line}\n")
                stream.flush()


def start_logging(settings: ServerSettings) -> None:
    """Send our lines and uvicorn's where the settings say, instead of where they went. Raises OSError."""
    stream: TextIO | None = None
    if settings.log_file is not None:
        stream = settings.log_file.open("a", encoding="utf-8", errors="backslashreplace")
    handler = Lines(stream)
    handler.setFormatter(JsonLines() if settings.log_format == "json" else PlainLines())
    for name, level in (("tramontane", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level)
