"""/v1/completions.

Owns how chunks of an answer look to a client of completions, and OpenAI's lists of log probabilities. Must not know:
how they are made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any

from fastapi import Response

from tramontane.backends.base import Tokenizing
from tramontane.server.answers import Numbered, Tally
from tramontane.server.convert import completions
from tramontane.server.routes.chat import LOWEST
from tramontane.server.routes.common import Call, TheCall, event_stream, router, usage_of
from tramontane.server.schemas.completions import CompletionReply, CompletionRequest
from tramontane.server.sse import Event
from tramontane.types import Chunk, TokenLogprob

routes = router("completions")


@routes.post("/v1/completions", response_model=CompletionReply, responses=event_stream(CompletionReply.__name__))
async def create_completion(body: CompletionRequest, call: TheCall) -> Response:
    """Complete texts, or token ids."""
    call.service.check_name(body.model)
    asked = completions(body, call.asking())
    return await call.generate(body, asked, partial(_streamed, body, call), partial(_gathered, body, call))


async def _streamed(
    body: CompletionRequest, call: Call, chunks: AsyncGenerator[Numbered, None]
) -> AsyncGenerator[Event, None]:
    options, tally = body.stream_options, Tally()
    with_usage = bool(options and options.include_usage)
    continuous = bool(options and options.continuous_usage_stats)
    head = {"object": "text_completion", **call.header("cmpl")}
    logprobs = _Logprobs(body, call)
    async for number, chunk in chunks:
        tally.see(number, chunk)
        index = number * (body.n or 1) + chunk.index
        if not (chunk.text or chunk.logprobs or chunk.prompt_logprobs or chunk.finish_reason):
            continue
        choice = {
            "index": index,
            "text": chunk.text,
            "logprobs": logprobs.of(number, [chunk]),
            "finish_reason": chunk.finish_reason,
        }
        if chunk.finish_reason:
            choice["stop_reason"] = chunk.stop_reason
        event = {**head, "choices": [choice]}
        if with_usage or continuous:
            event["usage"] = usage_of(tally.usage) if continuous else None
        yield event
    if with_usage:
        yield {**head, "choices": [], "usage": usage_of(tally.usage)}


async def _gathered(body: CompletionRequest, call: Call, chunks: AsyncGenerator[Numbered, None]) -> Event:
    head, tally, logprobs = call.header("cmpl"), Tally(), _Logprobs(body, call)
    by_choice: dict[tuple[int, int], list[Chunk]] = defaultdict(list)
    async for number, chunk in chunks:
        tally.see(number, chunk)
        by_choice[number, chunk.index].append(chunk)
    return {
        "id": head["id"],
        "object": "text_completion",
        "created": head["created"],
        "model": head["model"],
        "choices": [
            {
                "index": number * (body.n or 1) + index,
                "text": "".join(chunk.text for chunk in own),
                "logprobs": logprobs.of(number, own),
                "finish_reason": own[-1].finish_reason,
                "stop_reason": own[-1].stop_reason,
            }
            for (number, index), own in sorted(by_choice.items())
        ],
        "usage": usage_of(tally.usage),
    }


class _Logprobs:
    """Log probabilities as parallel lists. Offsets count characters from where a choice's tokens begin."""

    def __init__(self, body: CompletionRequest, call: Call) -> None:
        self._alternatives = body.logprobs
        self._backend = call.service.idle_backend
        self._prompts: dict[int, list[tuple[TokenLogprob, bool]]] = {}
        """Of each prompt, its tokens, and whether they have a probability."""
        self._offsets: dict[tuple[int, int], int] = {}
        """Of each choice that has begun: where its next token's text begins."""

    def of(self, number: int, chunks: Sequence[Chunk]) -> dict[str, Any] | None:
        """Of the tokens in these chunks of a choice; at its beginning, of the prompt where it is echoed."""
        if self._alternatives is None:
            return None
        first, choice = chunks[0], (number, chunks[0].index)
        if first.prompt_logprobs is not None:
            self._prompts[number] = [
                (self._unscored(first, place), False) if one is None else (one, True)
                for place, one in enumerate(first.prompt_logprobs)
            ]
        tokens = [(one, True) for chunk in chunks for one in chunk.logprobs]
        if choice not in self._offsets:
            tokens = [*self._prompts.get(number, ()), *tokens]
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, scored in tokens:
            offset = self._offsets.get(choice, 0)
            lists["tokens"].append(token.text)
            lists["token_logprobs"].append(max(token.logprob, LOWEST) if scored else None)
            lists["top_logprobs"].append(self._top(token, self._alternatives) if scored else None)
            lists["text_offset"].append(offset)
            self._offsets[choice] = offset + len(token.text)
        return lists

    def _top(self, token: TokenLogprob, alternatives: int) -> dict[str, float] | None:
        """The chosen token and the likeliest; of tokens with equal texts, the likelier."""
        if not alternatives:
            return None
        top = {token.text: max(token.logprob, LOWEST)}
        for _, text, logprob in token.top[:alternatives]:
            top[text] = max(logprob, top.get(text, LOWEST))
        return top

    def _unscored(self, chunk: Chunk, place: int) -> TokenLogprob:
        """The prompt's first token, which nothing comes before: it has a text and no probability."""
        id_ = (chunk.prompt_ids or ())[place]
        text = ""
        if isinstance(self._backend, Tokenizing):
            text = self._backend.detokenize([id_], skip_special_tokens=False)
        return TokenLogprob(id_, text, 0.0, 1)
