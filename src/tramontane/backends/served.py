"""EngineBackend: what backends have in common that run an engine of ours on a thread, whatever computes its steps.

Owns a request's way to the engine's thread and back, and the end of that thread. Must not know: models, files, how a
step is computed.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from dataclasses import fields, replace
from typing import Any

from tramontane.backends.base import REQUEST_FIELDS, Capabilities, check_request
from tramontane.backends.choosing import best_of
from tramontane.backends.loop import EngineLoop
from tramontane.backends.prepare import Prepared, Preparer
from tramontane.errors import EngineClosed
from tramontane.types import Chunk, Message, Request, SamplingParams, Stats

SAMPLING = frozenset(field.name for field in fields(SamplingParams))
REQUEST = REQUEST_FIELDS - {"adapter"}
"""What an engine of ours honours, and so each backend over one."""
BEAMS = frozenset({"beam_width", "length_penalty", "early_stopping"})
"""Of that, what needs an executor that remembers sequences which run and are not in every step."""
_EXIT_SECONDS = 10.0
"""How long an exiting interpreter waits for the step that is running."""


class EngineBackend(ABC):
    """Implements `Backend`, `Tokenizing` and `HasStats`; every method may be called from any thread. It does not
    survive a fork: load models after forking, or start processes with "spawn"."""

    def __init__(self, preparer: Preparer, loop: EngineLoop) -> None:
        """Takes over the loop: it stops with the backend."""
        self._preparer, self._loop = preparer, loop
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, _stop, loop, self._pid)

    @abstractmethod
    def capabilities(self) -> Capabilities: ...

    def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """See `Backend.generate`. A model that only reads raises UnsupportedModel."""
        if request.sampling.best_of is None and self._preparer.defaults.best_of is None:
            return self._generate(request)
        return best_of(self._generate, request, self._preparer.resolved)

    async def _generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        prepared = await self._prepare(request)
        mailbox = self._loop.submit(prepared)
        open_choices = prepared.request.num_choices
        untold = True
        try:
            while open_choices:
                for chunk in await mailbox.read():
                    open_choices -= chunk.finish_reason is not None
                    if untold and chunk.index == 0:
                        untold = False
                        chunk = replace(chunk, prompt_ids=tuple(prepared.request.prompt_ids))
                    yield chunk
        finally:
            if open_choices:
                self._loop.cancel(prepared.request.id, mailbox)

    def _admit(self, request: Request) -> None:
        """Raises InvalidRequest for what the backend does not honour."""
        check_request(request, self.capabilities())

    async def _prepare(self, request: Request) -> Prepared:
        self._require_open()
        self._admit(request)
        if self._preparer.takes_long(request):
            return await asyncio.to_thread(self._preparer.prepare, request)
        return self._preparer.prepare(request)

    def _require_open(self) -> None:
        if os.getpid() != self._pid:
            raise EngineClosed("The engine's thread does not survive a fork.", "Load the model in the new process.")
        if not self._finalizer.alive:
            raise EngineClosed("The engine was closed.", "Load the model again.")

    def close(self) -> None:
        """End every open request as cancelled, and stop the thread."""
        if self._finalizer.detach() and os.getpid() == self._pid:
            self._loop.stop()

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._preparer.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def detokenize(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._preparer.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def render(self, messages: Sequence[Message], **template_kwargs: Any) -> str:
        return self._preparer.render(messages, **template_kwargs)

    def stats(self) -> Stats:
        """As of the engine's last step; the counters stay readable after `close`."""
        return self._loop.stats()


def _stop(loop: EngineLoop, pid: int) -> None:
    if os.getpid() == pid:
        loop.stop(_EXIT_SECONDS)
