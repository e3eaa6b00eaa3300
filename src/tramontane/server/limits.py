"""Limits on what arrives: how large a body may be, and how long its pieces may take.

Owns the middleware that counts. Must not know: what a body says.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tramontane.server.problems import ClientGone, Problem
from tramontane.server.settings import Limits


class BodyLimit:
    """ASGI middleware: 413 for a body that is too large, whether it says so or only turns out to be, and 408 for one
    that does not come."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = [value for name, value in scope["headers"] if name == b"content-length"]
        if said and said[0].isdigit() and int(said[0][:20]) > self._limits.body_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        came, whole = 0, False

        async def counting() -> Message:
            nonlocal came, whole
            if whole:  # what may still come is the client's leaving, for which there is all the time
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._limits.idle_seconds)
            except asyncio.TimeoutError:
                raise Problem(408, "The body did not come.", code="request_timeout") from None
            if message["type"] == "http.disconnect":
                raise ClientGone
            came += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if came > self._limits.body_bytes:
                raise self._too_large()
            return message

        await self._app(scope, counting, send)

    def _too_large(self) -> Problem:
        return Problem(
            413,
            f"The body is larger than the {self._limits.body_bytes} bytes that are allowed.",
            code="request_too_large",
            headers={"Connection": "close"},
        )
