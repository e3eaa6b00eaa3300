"""What the routes share: how a handler gets at the server's parts, documents its errors, and answers.

Must not know: any one endpoint.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from tramontane.errors import InvalidRequest
from tramontane.server.answers import Numbered, answer, first_of, while_connected
from tramontane.server.convert import Asked, Asking
from tramontane.server.metrics import Metrics
from tramontane.server.problems import problem_of
from tramontane.server.records import Record, record_of
from tramontane.server.schemas.base import ErrorReply, Sampled
from tramontane.server.service import Service
from tramontane.server.settings import ServerSettings
from tramontane.server.sse import Event, EventStream
from tramontane.server.wire import JsonResponse, StrictRoute
from tramontane.types import Usage

Streamed = Callable[[AsyncGenerator[Numbered, None]], AsyncGenerator[Event, None]]
Gathered = Callable[[AsyncGenerator[Numbered, None]], Coroutine[Any, Any, Mapping[str, Any]]]

_LABELS = ("user", "safety_identifier", "prompt_cache_key", "metadata")
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "The request cannot be honoured; the error says which field, and why."},
    "5XX": {"model": ErrorReply, "description": "The server cannot answer now, or failed."},
}


def router(tag: str) -> APIRouter:
    """A router whose endpoints read JSON strictly and document their errors."""
    return APIRouter(tags=[tag], route_class=StrictRoute, responses=_ERRORS)


class Call:
    """One call of an endpoint: the server's parts, and the request that is handled."""

    def __init__(self, http: Request) -> None:
        self.http = http
        self.service: Service = http.app.state.service
        self.metrics: Metrics = http.app.state.metrics
        self.settings: ServerSettings = self.service.settings
        self.record: Record = record_of(http.scope)

    def asking(self) -> Asking:
        """What converting a body needs. Raises Problem (503)."""
        return Asking(self.record, self.settings, self.service.backend.capabilities().request_fields)

    def note(self, body: Any, asked: Callable[[], Any]) -> None:
        """Remember for the log what a client says of its request, and what is `asked` where that may be written."""
        given = {name: getattr(body, name, None) for name in _LABELS}
        self.record.labels = {name: value for name, value in given.items() if value is not None}
        if self.settings.log_prompts:
            self.record.prompt = asked()

    async def in_time(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What `work` returns, while the client waits for it and there is time."""
        return await while_connected(self.http, work, self.settings.limits.request_seconds)

    def header(self, kind: str) -> dict[str, Any]:
        """What every answer begins with."""
        return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.settings.names[0]}

    async def generate(
        self,
        body: Sampled,
        asked: Asked,
        streamed: Streamed,
        gathered: Gathered,
    ) -> Response:
        """Answer `asked`, as a stream of events or at once, as the body says."""
        backend = self.service.backend
        self.note(body, lambda: body.model_dump(include={"messages", "prompt"}, exclude_none=True))
        chunks = answer(self.service, self.metrics, self.record, backend, asked.requests)
        with renaming(asked.names):
            if not body.stream:
                return JsonResponse(await self.in_time(_whole(chunks, gathered)))
            begun = await self.in_time(first_of(chunks))
        left = self.settings.limits.request_seconds - (time.perf_counter() - self.record.started)
        return EventStream(streamed(begun), chunks, asked.names, max(left, 0.0))


async def _the_call(http: Request) -> Call:
    return Call(http)  # not the class itself, which FastAPI would call on a thread


TheCall = Annotated[Call, Depends(_the_call)]


async def _whole(chunks: AsyncGenerator[Numbered, None], gathered: Gathered) -> Mapping[str, Any]:
    try:
        return await gathered(chunks)
    finally:
        await chunks.aclose()


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Let what is refused in here bear the names that the client uses; see `problem_of`."""
    try:
        yield
    except InvalidRequest as error:
        raise problem_of(error, names) from error


def usage_of(usage: Usage) -> dict[str, Any]:
    """Usage in OpenAI's shape."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def event_stream(schema: str) -> dict[int | str, dict[str, Any]]:
    """How a route documents that it may answer with a stream: events whose data is `schema`, as OpenAPI 3.2 has it."""
    piece = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {
            "anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in (schema, ErrorReply.__name__)]
        },
    }
    data = {"anyOf": [{"const": "[DONE]", "description": "The last."}, piece]}
    event = {"type": "object", "required": ["data"], "properties": {"data": data}}
    return {200: {"content": {"text/event-stream": {"schema": event}}}}
