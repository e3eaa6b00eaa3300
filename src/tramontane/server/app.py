"""The application: all parts of the server, put together.

Owns the order of what a request passes. Must not know: endpoints' work, how it is run.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from tramontane.backends.base import Backend, HasStats
from tramontane.errors import TramontaneError
from tramontane.server.answers import cancelled
from tramontane.server.document import describe
from tramontane.server.keys import HostCheck, KeyCheck
from tramontane.server.limits import BodyLimit
from tramontane.server.logs import RequestLog
from tramontane.server.metrics import Metrics
from tramontane.server.problems import ClientGone, Problem, on_problem
from tramontane.server.routes import chat, completions, models, operations, reading, tokens
from tramontane.server.service import Service
from tramontane.server.settings import ServerSettings
from tramontane.types import Stats

_ROUTERS = tuple(part.routes for part in (chat, completions, reading, models, tokens, operations))

_NO_TELEMETRY: Any = dict.fromkeys(("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False)
"""What FastAPI would collect, and send where the environment says. Nothing is: what a client asks stays here. Versions
that have no such settings keep them without looking."""


def create_app(settings: ServerSettings, opener: Callable[[], Backend], version: str) -> FastAPI:
    """The server as an ASGI application. `opener` loads the model, on a thread, once the application has started;
    the application closes it. `app.state.service` is its `Service`."""
    service = Service(settings)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncGenerator[None, None]:
        loading = asyncio.ensure_future(service.load(opener))
        try:
            yield
        finally:
            await cancelled(loading)
            await asyncio.to_thread(service.close)

    app = FastAPI(
        title="Tramontane",
        version=version,
        description="Open language models, by the interface that OpenAI's clients speak.",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        telemetry=_NO_TELEMETRY,
    )
    app.state.service = service
    app.state.metrics = Metrics(settings.names[0], partial(_stats, service), lambda: service.open_requests)
    for router in _ROUTERS:
        app.include_router(router)
    for kind in (Problem, ClientGone, TramontaneError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, on_problem)
    app.openapi = partial(describe, app, settings, app.openapi)  # type: ignore[method-assign]
    # The last to be added is the first that a request passes.
    app.add_middleware(BodyLimit, limits=settings.limits)
    if settings.keys:
        app.add_middleware(KeyCheck, keys=settings.keys)
    elif not settings.allow_anyone:
        app.add_middleware(HostCheck)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(RequestLog, metrics=app.state.metrics)
    return app


def _stats(service: Service) -> Stats | None:
    backend = service.idle_backend
    return backend.stats() if isinstance(backend, HasStats) else None
