"""Settings of the server, checked once and then frozen.

Owns addresses, keys, limits and what is logged. Must not know: engines, how a setting is enforced.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Literal

from tramontane.errors import InvalidRequest
from tramontane.records import dataclass
from tramontane.server.keys import ApiKey, is_loopback

LogFormat = Literal["text", "json"]


@dataclass(frozen=True)
class Limits:
    """What one client, or all together, may ask for. Seconds, bytes and counts."""

    body_bytes: int = 4 << 20
    """Reading JSON holds up all others: some tenths of a second for so much of it at its worst, millions of numbers."""
    n: int = 16
    """Choices of one request."""
    open_requests: int = 512
    """Prompts that are being answered or wait, all clients together; more are refused with 429."""
    open_requests_per_key: int | None = None
    """The same for one key."""
    inputs: int = 2048
    """Texts to embed, documents to rank or prompts to complete in one request."""
    request_seconds: float = 600.0
    """From a request's arrival to its last byte; then it ends with an error."""
    idle_seconds: float = 20.0
    """How long a connection may take to send a request's head, or the next piece of a body, or to read what it is
    sent, before it is closed."""
    drain_seconds: float = 30.0
    """How long running requests may take to end when the server is told to stop."""
    connections: int | None = None
    """Open at once; None: as many as the process may have descriptors, less some for the rest."""

    def __post_init__(self) -> None:
        for name in ("body_bytes", "n", "open_requests", "inputs"):
            if getattr(self, name) < 1:
                raise InvalidRequest(name, f"{getattr(self, name)} is too low", "It must be at least 1.")
        for name in ("request_seconds", "idle_seconds"):
            if not getattr(self, name) > 0:
                raise InvalidRequest(name, f"{getattr(self, name)} is too low", "It must be above 0.")
        if not self.drain_seconds >= 0:
            raise InvalidRequest("drain_seconds", f"{self.drain_seconds} is too low", "It must be at least 0.")
        for name in ("open_requests_per_key", "connections"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InvalidRequest(name, f"{getattr(self, name)} is too low", "It must be at least 1.")


@dataclass(frozen=True)
class ServerSettings:
    """All that shapes a server, besides its model."""

    names: tuple[str, ...]
    """What clients may call the model; answers carry the first."""
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[ApiKey, ...] = ()
    """With none, whoever reaches the server may use it."""
    allow_anyone: bool = False
    """Listen beyond this machine without a key."""
    share_prefixes: bool = False
    """Whether requests of different keys share cached prefixes."""
    cors_origins: tuple[str, ...] = ()
    root_path: str = ""
    """Where a proxy mounts the server; the proxy cuts it off a request's path."""
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    limits: Limits = field(default_factory=Limits)
    log_format: LogFormat = "json"
    log_file: Path | None = None
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise InvalidRequest("names", "a model that is served needs a name")
        if not 0 <= self.port <= 65535:
            raise InvalidRequest(
                "port", f"{self.port} is out of range", "It must be between 0 (any free one) and 65535."
            )
        names, secrets = [key.name for key in self.keys], [key.secret for key in self.keys]
        for what, values in (("names", names), ("keys", secrets)):
            if len(set(values)) != len(values):
                raise InvalidRequest("keys", f"two API keys have equal {what}", "Give each its own.")
        if not self.keys and not self.allow_anyone and not is_loopback(self.host):
            raise InvalidRequest(
                "host",
                f"{self.host!r} can be reached from other machines, and there is no API key",
                "Give --api-keys FILE or TRAMONTANE_API_KEYS, or let anyone in with --allow-anyone.",
            )
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise InvalidRequest("tls", "a certificate and its key go together", "Give both or none.")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise InvalidRequest("root_path", f"{self.root_path!r} is no path", "Write it like /llm.")
