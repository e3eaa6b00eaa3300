"""Serving: the application behind a socket, until it is told to stop or its engine fails.

Owns signals, draining and exit codes. Must not know: endpoints, how the model is opened.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from tramontane.backends.base import Backend
from tramontane.server.app import create_app
from tramontane.server.connections import guarded_protocol
from tramontane.server.logs import start_logging
from tramontane.server.service import Service
from tramontane.server.settings import ServerSettings

_BACKLOG = 128
"""Connections that the system holds for us: so many may be accepted at once, before any is counted."""
log = logging.getLogger("tramontane.server")


def serve(settings: ServerSettings, opener: Callable[[], Backend], version: str) -> int:
    """Serve until told to stop (SIGTERM, SIGINT: running requests may end first; twice: at once), or until the engine
    fails. Returns the exit code: 0, or 1 after a failure."""
    start_logging(settings)
    server = make_server(settings, opener, version)
    try:
        server.run()
    except SystemExit as error:  # how uvicorn says that it could not begin
        return 1 if error.code else 0
    return 1 if server.service.phase == "failed" else 0


def make_server(settings: ServerSettings, opener: Callable[[], Backend], version: str) -> Server:
    """The server, to be run where logging is set up elsewhere."""
    app = create_app(settings, opener, version)
    return Server(_config(settings, app), app.state.service)


def _config(settings: ServerSettings, app: FastAPI) -> uvicorn.Config:
    limits = settings.limits
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        root_path=settings.root_path,
        http=guarded_protocol(limits),
        backlog=_BACKLOG,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
        timeout_keep_alive=max(1, round(limits.idle_seconds)),
        timeout_graceful_shutdown=5,
        ssl_certfile=str(settings.tls_certificate) if settings.tls_certificate else None,
        ssl_keyfile=str(settings.tls_key) if settings.tls_key else None,
    )


class Server(uvicorn.Server):
    """uvicorn's, which on a signal first lets the service drain, with its socket open so that it can say so."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.url = ""
        """Where it listens, once it has started."""
        self._stopping: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.ensure_future(self._stop_when_ended())
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            shown = f"[{host}]" if ":" in host else host
            self.url = f"{scheme}://{shown}:{port}"
            log.info("listening on %s", self.url)

    async def _stop_when_ended(self) -> None:
        service = self.service
        await service.stopping.wait()
        try:
            await asyncio.wait_for(service.ended.wait(), service.settings.limits.drain_seconds)
        except asyncio.TimeoutError:
            log.warning("%d requests did not end in time and are cut off", service.open_requests)
            await asyncio.to_thread(service.close)  # which ends them as cancelled
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self.service.phase in ("draining", "failed"):
            self.should_exit = self.force_exit = True
            return
        self._loop.call_soon_threadsafe(self.service.drain)
