"""/tokenize and /detokenize, as vLLM has them: what is sent and what comes back."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from tramontane.server.schemas.base import Body, ModelName, Reply, Several, TokenId
from tramontane.server.schemas.chat import Turn


class TokenizeRequest(Body):
    """A prompt, or messages as the chat template writes them."""

    model: ModelName = None
    prompt: str | None = None
    messages: Annotated[Several[Turn], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    """Those that the model puts around a text: true for a prompt, false for messages, when left out."""
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class TokenizeReply(Reply):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Body):
    model: ModelName = None
    tokens: Several[TokenId]


class DetokenizeReply(Reply):
    prompt: str
