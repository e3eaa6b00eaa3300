"""Just enough of HTTP to ask a server many things at once at little cost: a connection a request, streams as they come.

Must not know: what is asked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit


class Reply:
    """An answer whose head has come."""

    def __init__(self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader) -> None:
        self.status, self.headers = status, headers
        self._reader = reader

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises asyncio.IncompleteReadError where it breaks off."""
        if "chunked" in self.headers.get("transfer-encoding", ""):
            while size := int(await self._reader.readline() or b"", 16):
                piece = await self._reader.readexactly(size + 2)
                yield piece[:-2]
        elif "content-length" in self.headers:
            yield await self._reader.readexactly(int(self.headers["content-length"]))
        else:
            while piece := await self._reader.read(1 << 16):
                yield piece

    async def read(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    async def events(self) -> AsyncIterator[str]:
        """The data of a stream's events."""
        rest = b""
        async for piece in self.pieces():
            *whole, rest = (rest + piece).split(b"\n\n")
            for event in whole:
                if event.startswith(b"data:"):
                    yield event[5:].strip().decode()


@asynccontextmanager
async def ask(url: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> AsyncIterator[Reply]:
    """POST JSON, or GET where there is no `body`. The connection ends with the block, wherever the answer is: leaving
    it early is what a client does that goes away. Raises OSError, asyncio.IncompleteReadError."""
    to = urlsplit(url)
    reader, writer = await asyncio.open_connection(to.hostname, to.port, limit=1 << 22)
    try:
        data = b"" if body is None else json.dumps(body).encode()
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", f"Host: {to.netloc}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in head[1:] if line)
        yield Reply(int(head[0].split()[1]), {name.lower(): value.strip() for name, _, value in fields}, reader)
    finally:
        writer.transport.abort()


async def get_json(url: str, path: str) -> tuple[int, Any]:
    """Status and body. Raises OSError."""
    async with ask(url, path) as reply:
        text = await reply.read()
        return reply.status, json.loads(text) if "json" in reply.headers.get("content-type", "") else text.decode()
