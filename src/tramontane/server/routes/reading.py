"""/v1/embeddings and /v1/rerank.

Owns how vectors and scores look to a client. Must not know: how texts are read.
"""

from __future__ import annotations

import asyncio
import base64
import uuid
from array import array
from collections.abc import Sequence
from sys import byteorder
from typing import Any

from fastapi import Response

from tramontane.backends.base import Embedder, Reranker
from tramontane.errors import UnsupportedModel
from tramontane.server.problems import Problem
from tramontane.server.routes.common import Call, TheCall, renaming, router
from tramontane.server.schemas.reading import EmbeddingsReply, EmbeddingsRequest, RerankReply, RerankRequest
from tramontane.server.wire import JsonResponse, encode
from tramontane.types import Embedding, EmbedRequest
from tramontane.types import RerankRequest as Ranking

routes = router("reading")

_NAMES = {"inputs": "input", "prompt": "input"}


@routes.post("/v1/embeddings", response_model=EmbeddingsReply)
async def create_embeddings(body: EmbeddingsRequest, call: TheCall) -> Response:
    """Turn texts into vectors."""
    backend = call.service.backend_for(body.model)
    if not isinstance(backend, Embedder) or not backend.capabilities().embeds:
        raise UnsupportedModel("This model does not embed texts.", "Serve one that does.")
    inputs: Sequence[Any] = [body.input] if isinstance(body.input, str) else body.input
    if isinstance(inputs[0], int):
        inputs = [inputs]
    _check_count(call, "input", len(inputs))
    call.note(body, lambda: inputs)
    with renaming(_NAMES):
        request = EmbedRequest(
            tuple(given if isinstance(given, str) else tuple(given) for given in inputs),
            prompt_name=body.prompt_name,
            dimensions=body.dimensions,
            truncate=bool(body.truncate),
        )
        with call.service.admitted(call.record.key, 1):
            embeddings = await call.in_time(backend.embed(request))
    call.record.prompt_tokens = sum(one.usage.prompt_tokens for one in embeddings)
    # Thousands of numbers take a while to write.
    content = await asyncio.to_thread(_as_json, call.settings.names[0], embeddings, body.encoding_format == "base64")
    return Response(content, media_type="application/json")


@routes.post("/v1/rerank", response_model=RerankReply)
async def rerank(body: RerankRequest, call: TheCall) -> Response:
    """Order documents by how well each answers a query."""
    backend = call.service.backend_for(body.model)
    if not isinstance(backend, Reranker) or not backend.capabilities().reranks:
        raise UnsupportedModel("This model does not rank documents.", "Serve one that does.")
    _check_count(call, "documents", len(body.documents))
    texts = [given if isinstance(given, str) else given.text for given in body.documents]
    call.note(body, lambda: {"query": body.query, "documents": texts})
    request = Ranking(body.query, tuple(texts), top_n=body.top_n, truncate=bool(body.truncate))
    with call.service.admitted(call.record.key, 1):
        result = await call.in_time(backend.rerank(request))
    call.record.prompt_tokens = result.usage.prompt_tokens
    shown = [{"index": one.index, "relevance_score": one.score} for one in result.results]
    if body.return_documents is not False:
        shown = [{**one, "document": {"text": texts[int(one["index"])]}} for one in shown]
    tokens = {"prompt_tokens": result.usage.prompt_tokens, "total_tokens": result.usage.total_tokens}
    return JsonResponse(
        {"id": f"rerank-{uuid.uuid4().hex}", "model": call.settings.names[0], "usage": tokens, "results": shown}
    )


def _as_json(model: str, embeddings: Sequence[Embedding], as_base64: bool) -> bytes:
    tokens = sum(one.usage.prompt_tokens for one in embeddings)
    data = [
        {"object": "embedding", "index": index, "embedding": _packed(one) if as_base64 else one.vector}
        for index, one in enumerate(embeddings)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return encode({"object": "list", "data": data, "model": model, "usage": usage})


def _packed(embedding: Embedding) -> str:
    numbers = array("f", embedding.vector)
    if byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


def _check_count(call: Call, field: str, count: int) -> None:
    most = call.settings.limits.inputs
    if count > most:
        raise Problem(400, f"Invalid {field}: {count} are more than the {most} that are allowed.", param=field)
