"""API keys: who may use the server, and on whose behalf a request runs.

Owns the reading of keys and the checks that every request passes. Must not know: routes, what callers ask for.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import field

from starlette.types import ASGIApp, Receive, Scope, Send

from tramontane.errors import InvalidRequest
from tramontane.records import dataclass
from tramontane.server.problems import Problem
from tramontane.server.records import record_of

_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
OPEN_PATHS = frozenset({"/health", "/ready", "/docs", "/openapi.json"})
"""Answered without a key: they tell nothing of anyone's requests."""


@dataclass(frozen=True)
class ApiKey:
    """A key, whose it is, and what is added to the priority of requests that come with it (lower goes first)."""

    name: str
    secret: str = field(repr=False)
    priority: int = 0


def read_keys(text: str, source: str) -> tuple[ApiKey, ...]:
    """Keys out of lines of NAME KEY [PRIORITY]; a `;` ends a line too, a `#` begins a comment.

    Raises InvalidRequest, naming the line and never its key.
    """
    keys = []
    for number, line in enumerate(re.split(r"[\n;]", text), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            name, secret, priority = (*words, "0") if len(words) == 2 else words
            keys.append(ApiKey(name, secret, int(priority)))
        except ValueError:
            raise InvalidRequest("keys", f"line {number} of {source} is not NAME KEY [PRIORITY]") from None
        if not _NAME.fullmatch(name):
            raise InvalidRequest("keys", f"the name in line {number} of {source} has odd characters")
        if len(secret) < 8 or not secret.isascii():
            raise InvalidRequest("keys", f"the key in line {number} of {source} is not 8 ASCII characters or more")
    if not keys:
        raise InvalidRequest("keys", f"{source} holds none", "Write lines of NAME KEY [PRIORITY].")
    return tuple(keys)


class KeyCheck:
    """ASGI middleware that refuses with 401 whoever brings no known key, before anything of the request is read."""

    def __init__(self, app: ASGIApp, keys: Iterable[ApiKey]) -> None:
        self._app = app
        self._known = [(_digest(key.secret.encode()), key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _path(scope) in OPEN_PATHS or scope["method"] == "OPTIONS":
            await self._app(scope, receive, send)
            return
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        key = self._find(headers[0]) if len(headers) == 1 else None
        if key is None:
            message = "That API key is unknown." if headers else "There is no API key."
            problem = Problem(
                401,
                f"{message} Send one as 'Authorization: Bearer KEY'.",
                type="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await problem.response()(scope, receive, send)
            return
        record_of(scope).key = key
        await self._app(scope, receive, send)

    def _find(self, header: bytes) -> ApiKey | None:
        """The key in a header. Every known key is compared, and none takes longer for being nearly right."""
        scheme, _, secret = header.partition(b" ")
        given, found = _digest(secret.strip()), None
        for digest, key in self._known:
            if hmac.compare_digest(digest, given):
                found = key
        return found if scheme.lower() == b"bearer" else None


class HostCheck:
    """ASGI middleware for a server that is for this machine alone: refuses with 403 what calls it by another name.

    A page that makes its own name point here would otherwise count as of one origin with the server, and a browser
    would let it read the answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            if len(hosts) != 1 or not is_loopback(_PORT.sub("", hosts[0])):
                message = "The server is for this machine alone: call it 127.0.0.1 or localhost, or start it with keys."
                await Problem(403, message, code="unknown_host").response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


_PORT = re.compile(r":[0-9]*$")


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
