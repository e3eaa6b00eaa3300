"""A server behind a real socket, on a thread of the test."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx

from tramontane.backends.base import Backend
from tramontane.server.serving import Server, make_server
from tramontane.server.settings import Limits, ServerSettings

HELLO = [{"role": "user", "content": "Hello"}]


class Live:
    """A running server, and a client of it."""

    def __init__(self, server: Server, thread: threading.Thread) -> None:
        self.server, self.thread = server, thread
        self.service = server.service
        self.url = server.url
        self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.client.post(path, **({"json": body} if body is not None else {}), **options)

    def chat(self, **body: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": HELLO, **body})

    def chat_with(self, headers: Mapping[str, str | bytes], **body: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": HELLO, **body}, headers=headers)

    @contextmanager
    def streaming(self, headers: Mapping[str, str] | None = None, **body: Any) -> Iterator[httpx.Response]:
        """A stream that has begun."""
        asked = {"messages": HELLO, "stream": True, **body}
        with self.client.stream("POST", "/v1/chat/completions", json=asked, headers=headers) as answer:
            assert answer.status_code == 200
            yield answer

    def raw(self, receive_buffer: int | None = None) -> socket.socket:
        """A connection without a client."""
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        connection.connect((host, int(port)))
        return connection

    def signal(self) -> None:
        """What SIGTERM does."""
        self.server.handle_exit(signal.SIGTERM, None)

    def complete(self, **body: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": "Hello", **body})


@contextmanager
def live(opener: Callable[[], Backend] | Backend, *, wait: bool = True, **settings: Any) -> Iterator[Live]:
    """Serve what `opener` opens. `settings`: of ServerSettings, and of Limits."""
    open_ = opener if callable(opener) else lambda: opener
    of_limits = {name: settings.pop(name) for name in [*settings] if name in Limits.__dataclass_fields__}
    chosen = {"names": ("mock",), "port": 0, "limits": Limits(**of_limits), **settings}
    server = make_server(ServerSettings(**chosen), open_, "test")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: bool(server.url))
    running = Live(server, thread)
    try:
        if wait:
            until(lambda: server.service.phase != "loading")
        yield running
    finally:
        running.client.close()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something that another thread does; the bound is only there to end a test that fails."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def events(text: str) -> list[str]:
    """The data of a stream's events."""
    assert text.endswith("\n\n")
    parts = text.removesuffix("\n\n").split("\n\n")
    assert all(part.startswith("data: ") for part in parts)
    return [part.removeprefix("data: ") for part in parts]
