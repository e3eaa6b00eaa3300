"""Texts to vectors by the wheel's embedding models.

Owns what becomes of an EmbedRequest's fields. Must not know: the backend, its threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tramontane.backends.mistralrs.wheel import Runner, public
from tramontane.errors import ContextLengthExceeded, InvalidRequest
from tramontane.types import Embedding, EmbedRequest, Usage


def embed(
    module: Any,
    runner: Runner,
    request: EmbedRequest,
    tokenize: Callable[[str, bool], list[int]],
    context_length: int,
) -> list[Embedding]:
    """The wheel's vectors, which are of length 1. Blocks. Raises InvalidRequest, ContextLengthExceeded or what a
    failure of the wheel's becomes."""
    _refuse(request)
    inputs = [(request.prompt or "") + given if isinstance(given, str) else list(given) for given in request.inputs]
    if not inputs:
        return []
    ids = [tokenize(given, True) if isinstance(given, str) else given for given in inputs]
    counts = [len(one) for one in ids]
    if 0 in counts:
        raise InvalidRequest("texts", "a text has no tokens", "Give each at least one.")
    longest = max(counts)
    if context_length and longest > context_length and not request.truncate:
        raise ContextLengthExceeded(longest, context_length)
    vectors: list[Sequence[float]] = []
    try:
        for one in ids:  # one at a time: a call of its own for each lets other callers in between
            asked = module.EmbeddingRequest(input=[one[: context_length or None]])
            vectors += runner.call("send_embedding_request", asked)
    except Exception as error:
        raise public(error, "A text was not read", longest) from error
    return [
        Embedding(_cut(vector, request), Usage(min(count, context_length or count)), 0 < context_length < count)
        for vector, count in zip(vectors, counts, strict=True)
    ]


def _refuse(request: EmbedRequest) -> None:
    if request.pooling is not None:
        raise InvalidRequest(
            "pooling", "mistral.rs pools as the model says", "Leave it out, or use the native backend."
        )
    if request.prompt_name is not None:
        raise InvalidRequest("prompt_name", "mistral.rs does not read a model's prompts", "Give the prompt itself.")
    if request.normalize is False:
        raise InvalidRequest("normalize", "mistral.rs's vectors are of length 1", "Leave it out.")


def _cut(vector: Sequence[float], request: EmbedRequest) -> tuple[float, ...]:
    if request.dimensions is None:
        return tuple(vector)
    if request.dimensions > len(vector):
        raise InvalidRequest("dimensions", f"{request.dimensions} exceeds the {len(vector)} of the model's vectors")
    kept = vector[: request.dimensions]
    length = math.hypot(*kept) or 1.0
    return tuple(value / length for value in kept)
