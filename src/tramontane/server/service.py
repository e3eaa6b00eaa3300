"""Service: whether there is a model, whether it takes requests, and who may have how much of it.

Owns the phases of a server's life, the count of open requests and the names of the model. Must not know: HTTP, how a
backend is opened, what is asked of it.

A second model would be a second entry of what `backend_for` looks up.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from tramontane.backends.base import Backend
from tramontane.errors import EngineClosed
from tramontane.server.keys import ApiKey
from tramontane.server.problems import Problem
from tramontane.server.settings import ServerSettings

log = logging.getLogger("tramontane.server")

Phase = Literal["loading", "ready", "draining", "failed"]
RETRY_SECONDS = 2
"""What a client that is refused for now is told to wait: about as long as an answer."""


class Service:
    """The model behind a server. Used on the event loop alone; loading happens on a thread of its own."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.created = int(time.time())
        self.phase: Phase = "loading"
        self.error: BaseException | None = None
        """Why the phase is "failed"."""
        self.stopping = asyncio.Event()
        """Set when no more requests are taken, ever."""
        self.ended = asyncio.Event()
        """Set when, besides, none is open."""
        self._backend: Backend | None = None
        self._closed = False
        self._open: Counter[str] = Counter()

    # ---- its life

    async def load(self, opener: Callable[[], Backend]) -> None:
        """Open the backend without holding up the event loop."""
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[Backend] = loop.create_future()

        def deliver(backend: Backend | None, error: Exception | None) -> None:
            if opened.done() and backend is not None:
                backend.close()  # nobody waits for it any more
            elif error is not None and not opened.done():
                opened.set_exception(error)
            elif backend is not None:
                opened.set_result(backend)

        def work() -> None:
            backend, failure = None, None
            try:
                backend = opener()
            except Exception as error:
                failure = error
            try:
                loop.call_soon_threadsafe(deliver, backend, failure)
            except RuntimeError:  # how asyncio says that the loop is closed
                if backend is not None:
                    backend.close()

        # A daemon: a server that is told to stop while it loads does not wait for that.
        threading.Thread(target=work, name="tramontane-load", daemon=True).start()
        try:
            backend = await opened
        except Exception as error:
            self.fail(error)
            return
        self._backend = backend
        if self.phase == "loading":
            self.phase = "ready"
            log.info("ready: %s", ", ".join(self.settings.names))

    def fail(self, error: BaseException) -> None:
        """The model cannot be used any more, or never could: answer 503 from now on, and stop."""
        if self.phase != "failed" and not self._closed:
            self.phase, self.error = "failed", error
            log.critical("the server stops: %s", error)
            self._end_when_idle()

    def drain(self) -> None:
        """Refuse what comes, and stop when what is open has ended."""
        if self.phase in ("loading", "ready"):
            log.info("draining: %d requests are open", self.open_requests)
            self.phase = "draining"
            self._end_when_idle()

    def close(self) -> None:
        """End what is open as cancelled, and free the model."""
        self._closed = True
        if self._backend is not None:
            self._backend.close()

    # ---- for requests

    @property
    def open_requests(self) -> int:
        return sum(self._open.values())

    @property
    def backend(self) -> Backend:
        """The model, if it takes requests. Raises Problem (503)."""
        if self.phase == "ready" and self._backend is not None:
            return self._backend
        why = {
            "loading": "The model is still loading.",
            "draining": "The server is about to stop.",
            "failed": "The engine has failed, and the server stops.",
        }.get(self.phase, "There is no model.")
        raise Problem(
            503, f"{why} Try again later.", "service_unavailable", code=self.phase,
            headers={"Retry-After": str(RETRY_SECONDS)},
        )  # fmt: skip

    @property
    def idle_backend(self) -> Backend | None:
        """The model for whoever only looks at it, whatever the phase."""
        return self._backend

    def backend_for(self, name: str | None) -> Backend:
        """The model that a request names; of a request that names none, the one there is. Raises Problem (404, 503)."""
        self.check_name(name)
        return self.backend

    def check_name(self, name: str | None) -> None:
        if name is not None and name not in self.settings.names:
            served = ", ".join(self.settings.names)
            message = f"The model {name!r} is not here. There is {served}."
            raise Problem(404, message, "invalid_request_error", "model", "model_not_found")

    @contextmanager
    def admitted(self, key: ApiKey | None, prompts: int) -> Iterator[None]:
        """Room for `prompts` requests of a key while they are open. Raises Problem (429, 503)."""
        self.backend  # noqa: B018  # raises where there is none
        limits, name = self.settings.limits, key.name if key is not None else ""
        for allowed, present, whose in (
            (limits.open_requests, self.open_requests, "the server has"),
            (limits.open_requests_per_key, self._open[name], "this key has"),
        ):
            if allowed is not None and prompts > allowed:
                raise Problem(400, f"{prompts} prompts in one request are more than the {allowed} that are allowed.")
            if allowed is not None and present + prompts > allowed:
                raise Problem(
                    429, f"Too many requests: {whose} {present} of {allowed} open.", "rate_limit_exceeded",
                    code="too_many_requests", headers={"Retry-After": str(RETRY_SECONDS)},
                )  # fmt: skip
        self._open[name] += prompts
        try:
            yield
        except EngineClosed as error:
            self.fail(error)
            raise
        finally:
            self._open[name] -= prompts
            self._end_when_idle()

    def _end_when_idle(self) -> None:
        if self.phase in ("draining", "failed"):
            self.stopping.set()
            if not self.open_requests:
                self.ended.set()
