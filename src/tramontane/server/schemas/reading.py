"""/v1/embeddings and /v1/rerank: what is sent and what comes back."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tramontane.server.schemas.base import Body, Count, Inputs, ModelName, Reply, Several, refused


class EmbeddingsRequest(Body):
    model: ModelName = None
    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    """base64 is of little-endian float32."""
    dimensions: Count | None = None
    user: str | None = None
    # Beyond OpenAI's.
    truncate: bool | None = None
    """Cut a text at the longest that the model takes; otherwise it is refused."""
    prompt_name: str | None = None
    """One of the prompts that the model brings, put in front of every text."""


class EmbeddingUsage(Reply):
    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(Reply):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsReply(Reply):
    object: Literal["list"]
    data: list[EmbeddingReply]
    model: str
    usage: EmbeddingUsage


class DocumentGiven(Body):
    text: str


class RerankRequest(Body):
    model: ModelName = None
    query: str
    documents: Annotated[Several[str | DocumentGiven], Field(min_length=1)]
    top_n: Count | None = None
    """Only so many of the best."""
    return_documents: bool | None = None
    """Give the texts back; true when left out."""
    truncate: bool | None = None
    """Cut a query and document at what the model takes together; otherwise they are refused."""
    max_chunks_per_doc: refused("documents are scored whole", 1) = None  # type: ignore[valid-type]
    user: str | None = None


class DocumentReply(Reply):
    text: str


class RankedReply(Reply):
    index: int
    document: DocumentReply = Field(default_factory=lambda: DocumentReply(text=""))
    relevance_score: float


class RerankUsage(Reply):
    prompt_tokens: int
    total_tokens: int


class RerankReply(Reply):
    id: str
    model: str
    usage: RerankUsage
    results: list[RankedReply]
