"""mistral.rs by its wheel. It takes texts only: each word of these is a token of the models here."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mistralrs import ChatCompletionRequest, Runner, Which

from bench.tasks import Order, clock, ordered, serve

_WORDS = (
    " time",
    " year",
    " people",
    " way",
    " day",
    " man",
    " thing",
    " life",
    " world",
    " school",
    " state",
    " work",
)
_TEMPLATE = "{{ messages[0]['content'] }}"


class MistralRs:
    def __init__(self, order: Order) -> None:
        path = Path(order.model)
        with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template:
            template.write(_TEMPLATE)
            template.flush()
            which: Any = Which.GGUF(str(path.parent), path.name)
            self._runner = Runner(which=which, max_seqs=64, prefix_cache_n=0, jinja_explicit=template.name)

    def answer(self, prompts: list[list[int]], generate: int) -> tuple[float, float]:
        began, first = clock(), 0.0
        # All are sent before one is read: calls that wait for a whole answer do not run at once.
        for answer in [self._send(ids, generate) for ids in prompts]:
            tokens = 0
            for _ in answer:
                tokens += 1
                first = first or clock() - began
            if tokens < generate:
                raise RuntimeError(f"it ended after {tokens} of {generate} tokens")
        return first, clock() - began

    def _send(self, ids: list[int], generate: int) -> Iterator[Any]:
        text = "".join(_WORDS[i % len(_WORDS)] for i in ids)
        messages = [{"role": "user", "content": text}]
        request = ChatCompletionRequest(messages, "default", max_tokens=generate, temperature=0.0, stream=True)
        answer: Any = self._runner.send_chat_completion_request(request)
        return iter(answer)


if __name__ == "__main__":
    order = ordered()
    serve(MistralRs(order), order)
