"""A backend as another package would bring it: it says what it is told."""

from __future__ import annotations

from collections.abc import AsyncIterator

from tramontane.backends.base import Capabilities, check_request
from tramontane.backends.declared import Declared, Opening
from tramontane.types import Chunk, Request, Usage


class ParrotBackend:
    def __init__(self, opening: Opening) -> None:
        self._name = str(opening.model)
        self._loudness = opening.options.get("loudness", 1)

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        check_request(request, self.capabilities())
        usage = Usage(1, self._loudness)
        yield Chunk("1", text=(request.prompt or "") * self._loudness, finish_reason="stop", usage=usage)

    def capabilities(self) -> Capabilities:
        return Capabilities("parrot", self._name, 100, DECLARED.sampling_fields, chat=True)

    def close(self) -> None:
        self._loudness = 0


DECLARED = Declared(
    name="parrot",
    summary="says what it is told",
    open=ParrotBackend,
    sampling_fields=frozenset({"max_tokens"}),
    request_fields=frozenset(),
    abilities=frozenset({"generate", "chat"}),
    options=frozenset({"loudness"}),
)
