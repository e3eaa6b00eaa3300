"""/tokenize and /detokenize."""

from __future__ import annotations

import asyncio

from fastapi import Response

from tramontane.backends.base import Tokenizing
from tramontane.errors import UnsupportedModel
from tramontane.server.convert import NAMES, message
from tramontane.server.problems import Problem
from tramontane.server.routes.common import Call, TheCall, renaming, router
from tramontane.server.schemas.tokens import DetokenizeReply, DetokenizeRequest, TokenizeReply, TokenizeRequest
from tramontane.server.wire import JsonResponse

routes = router("tokens")


@routes.post("/tokenize", response_model=TokenizeReply)
async def tokenize(body: TokenizeRequest, call: TheCall) -> Response:
    """The tokens of a prompt, or of a conversation as the chat template writes it."""
    backend = _tokenizer(call, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise Problem(400, "Invalid prompt: give either a prompt or messages.", param="prompt", code="invalid_value")
    if body.prompt is not None and body.chat_template_kwargs:
        raise Problem(
            400, "Invalid chat_template_kwargs: a prompt uses no chat template.", param="chat_template_kwargs"
        )
    turns = [message(turn) for turn in body.messages or ()]
    call.note(None, lambda: body.model_dump(include={"messages", "prompt"}, exclude_none=True))

    def work() -> tuple[list[int], list[str] | None]:
        text, special = body.prompt, body.add_special_tokens
        if text is None:
            text, special = backend.render(turns, **(body.chat_template_kwargs or {})), bool(special)
        ids = backend.tokenize(text, add_special_tokens=special is not False)
        if not body.return_token_strs:
            return ids, None
        return ids, [backend.detokenize([id_], skip_special_tokens=False) for id_ in ids]

    with renaming(NAMES):
        ids, texts = await call.in_time(asyncio.to_thread(work))
    context = call.service.backend.capabilities().context_length
    return JsonResponse({"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": texts})


@routes.post("/detokenize", response_model=DetokenizeReply)
async def detokenize(body: DetokenizeRequest, call: TheCall) -> Response:
    """The text of tokens, special ones included."""
    backend = _tokenizer(call, body.model)
    with renaming({"ids": "tokens"}):
        text = await call.in_time(asyncio.to_thread(backend.detokenize, body.tokens, skip_special_tokens=False))
    return JsonResponse({"prompt": text})


def _tokenizer(call: Call, model: str | None) -> Tokenizing:
    backend = call.service.backend_for(model)
    if not isinstance(backend, Tokenizing):
        raise UnsupportedModel("This backend does not show its tokenizer.")
    return backend
