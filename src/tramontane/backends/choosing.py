"""best_of: many choices drawn, the likeliest of them told.

Owns what is asked of a backend for that, and which choices win. Must not know: any one backend.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from tramontane.backends.mailbox import coalesce
from tramontane.types import Chunk, Request, SamplingParams


async def best_of(
    generate: Callable[[Request], AsyncGenerator[Chunk, None]],
    request: Request,
    resolved: Callable[[SamplingParams], SamplingParams],
) -> AsyncGenerator[Chunk, None]:
    """The `n` of `best_of` choices with the highest mean log probability a token, best first, as OpenAI's completions
    define it; a chunk each, once all have ended. What failed or was cancelled comes last. The last chunk's usage counts
    the choices that are not told, too: they were asked for."""
    sampling = resolved(request.sampling)
    count = sampling.best_of or 1
    wide = replace(sampling, n=count, best_of=count, logprobs=sampling.logprobs or 0)
    found: list[Chunk] = []
    async with aclosing(generate(replace(request, sampling=wide))) as chunks:
        async for chunk in chunks:
            found.append(chunk)
    choices = sorted(coalesce(found), key=lambda one: one.index)
    first = choices[0]
    ranked = sorted(choices, key=lambda one: (one.finish_reason in ("error", "cancelled"), -_mean(one)))
    told = ranked[: sampling.n]
    untold = sum(one.usage.completion_tokens for one in ranked[len(told) :] if one.usage is not None)
    for index, chunk in enumerate(told):
        usage = chunk.usage
        if usage is not None and index == len(told) - 1:
            usage = replace(usage, completion_tokens=usage.completion_tokens + untold)
        yield replace(
            chunk,
            index=index,
            usage=usage,
            logprobs=chunk.logprobs if sampling.logprobs is not None else (),
            prompt_ids=first.prompt_ids if index == 0 else None,
            prompt_logprobs=first.prompt_logprobs if index == 0 else None,
            score=_mean(chunk),
        )


def _mean(chunk: Chunk) -> float:
    return sum(info.logprob for info in chunk.logprobs) / max(1, len(chunk.logprobs))
