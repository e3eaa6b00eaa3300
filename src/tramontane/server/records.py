"""Record: what is known of one HTTP request for logs, metrics and whoever handles it.

Owns the record and where it hangs. Must not know: what is done with it.
"""

from __future__ import annotations

import time
from dataclasses import field
from typing import TYPE_CHECKING, Any

from tramontane.records import dataclass

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from tramontane.server.keys import ApiKey


@dataclass
class Record:
    """Filled as the request goes its way. Times are of `time.perf_counter`."""

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    key: ApiKey | None = None
    status: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    first_token: float | None = None
    last_tokens: dict[tuple[str, int], float] = field(default_factory=dict)
    """Of each choice: when its last token came."""
    finish_reasons: list[str] = field(default_factory=list)
    labels: dict[str, Any] = field(default_factory=dict)
    """What a client says of its request for the log: user, metadata and such."""
    prompt: Any = None
    """What was asked, where it is to be logged."""
    error: str | None = None

    @property
    def key_name(self) -> str:
        return self.key.name if self.key is not None else ""


def record_of(scope: MutableMapping[str, Any]) -> Record:
    """The record of a request, by its ASGI scope."""
    record: Record = scope["state"]["record"]
    return record
