"""Backend: three methods and some abilities. Anything that runs models for Tramontane looks like this.

Owns the protocols and what a backend says of itself. Must not know: any one backend.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tramontane.errors import InvalidRequest
from tramontane.records import dataclass
from tramontane.types import (
    SAMPLING_DEFAULTS,
    AllocationListener,
    Chunk,
    Embedding,
    EmbedRequest,
    Message,
    Request,
    RerankRequest,
    RerankResult,
    SamplingParams,
    Stats,
)


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do with its model, down to the field."""

    name: str
    model: str
    """The model's source, as it was named."""
    context_length: int
    sampling_fields: frozenset[str]
    """Names of the SamplingParams fields that it honours; it refuses the others by name."""
    chat: bool
    """Whether messages can be rendered (there is a chat template)."""
    defaults: SamplingParams = field(default_factory=SamplingParams)
    """What holds for fields that a request leaves open, as far as the constructor or the model says so."""
    generates: bool = True
    """Whether it answers requests for text; an encoder does not."""
    embeds: bool = False
    """Whether it turns texts into vectors."""
    reranks: bool = False
    """Whether it scores documents against a query."""
    request_fields: frozenset[str] = frozenset()
    """Names of the fields of `Request` that it honours, of those in `REQUEST_FIELDS`; it refuses the others by name."""


REQUEST_FIELDS = frozenset(
    {"tools", "tool_choice", "thinking", "reasoning_effort", "priority", "tenant", "timeout", "cache_salt", "adapter"}
)
"""The fields of a Request that not every backend can honour. `parallel_tool_calls` goes with `tools`."""
_OPEN = {field_.name: field_.default for field_ in fields(Request)}


def check_request(request: Request, capabilities: Capabilities) -> None:
    """Raises InvalidRequest for the first field that asks for something and that the backend does not honour."""
    asked = [
        name for name in sorted(REQUEST_FIELDS - capabilities.request_fields) if getattr(request, name) != _OPEN[name]
    ]
    for field_ in fields(SamplingParams):
        neutral = (None, getattr(SAMPLING_DEFAULTS, field_.name))
        if field_.name not in capabilities.sampling_fields and getattr(request.sampling, field_.name) not in neutral:
            asked.append(field_.name)
    for name in asked:
        raise InvalidRequest(
            name, f"the {capabilities.name} backend does not support it", f"Leave it out{_able(name)}."
        )


def _able(name: str) -> str:
    """The rest of the sentence: which backends honour that field."""
    from tramontane.backends.registry import those_that  # which is made of what is here

    able = those_that(lambda one: name in one.sampling_fields | one.request_fields)
    return f", or use a backend that does: {', '.join(able)}" if able else "; no backend does"


@runtime_checkable
class Backend(Protocol):
    """A loaded model that answers requests. Safe to call from any event loop of the process."""

    def generate(self, request: Request) -> AsyncIterator[Chunk]:
        """The chunks of all choices; each choice ends with one whose finish_reason is set. Closing the iterator early
        cancels the request. A refused request raises (InvalidRequest, ContextLengthExceeded, OutOfMemory, ...) from
        the first `__anext__`; a failure midway ends each open choice with finish_reason "error"."""
        ...

    def capabilities(self) -> Capabilities: ...

    def close(self) -> None:
        """Ends every open request as cancelled and frees the model. May be called twice.

        A backend does the same by itself when nobody refers to it any more, on whatever thread that is, and when the
        interpreter exits, within a bounded time.
        """
        ...


@runtime_checkable
class Tokenizing(Protocol):
    """A backend that shows its tokenizer and template."""

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def detokenize(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def render(self, messages: Sequence[Message], **template_kwargs: Any) -> str:
        """The prompt that a chat request with these messages becomes."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """A backend that turns texts into vectors, where its model can: `capabilities().embeds` says so."""

    async def embed(self, request: EmbedRequest) -> list[Embedding]:
        """A vector for each input, in order. Cancelling the task ends the work. Raises InvalidRequest,
        ContextLengthExceeded for a text too long that may not be cut, or UnsupportedModel."""
        ...


@runtime_checkable
class Reranker(Protocol):
    """A backend that scores documents against a query, where its model can: `capabilities().reranks` says so."""

    async def rerank(self, request: RerankRequest) -> RerankResult:
        """Raises as `Embedder.embed`."""
        ...


@runtime_checkable
class AdapterHost(Protocol):
    """A backend that loads LoRA adapters beside its model; a request names one by `Request.adapter`."""

    def load_adapter(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Load one from a folder in PEFT's layout. `replace` one of that name: requests that run keep the old one.
        Raises InvalidRequest or ModelNotFound."""
        ...

    def unload_adapter(self, name: str) -> None:
        """Forget one; requests that run keep it. Raises InvalidRequest."""
        ...

    def adapters(self) -> list[str]:
        """The names of those that are loaded."""
        ...


@runtime_checkable
class HasStats(Protocol):
    def stats(self) -> Stats: ...


@runtime_checkable
class Listening(Protocol):
    """A backend that tells of its cache: `listener.allocated(request_id, index, blocks)` and `.released(...)`."""

    def add_allocation_listener(self, listener: AllocationListener) -> None: ...
