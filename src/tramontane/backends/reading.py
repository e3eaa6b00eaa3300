"""From texts to what the encoder reads, and from the states that it pools to vectors and scores.

Owns prompts, tokenizing to fit, and what is refused of a request. Must not know: the engine's thread, files.
"""

from __future__ import annotations

from collections.abc import Sequence

from tramontane.engine.encoder import Text
from tramontane.errors import ContextLengthExceeded, InvalidRequest, UnsupportedModel
from tramontane.loading.heads import EmbeddingSettings
from tramontane.models.heads import Floats, ScoringHead
from tramontane.models.spec import ModelSpec
from tramontane.records import dataclass
from tramontane.text.tokenizer import Fitted, Tokenizer
from tramontane.types import Embedding, EmbedRequest, Pooling, Ranked, RerankRequest, RerankResult, Usage

_SHORT = 1 << 20
"""Characters of a text that are always tokenized: normalizing may leave few of them."""


@dataclass(frozen=True)
class Read:
    """Texts for the encoder, how their states are to be pooled, and which of them were cut."""

    texts: list[Text]
    pooling: tuple[Pooling, ...]
    truncated: list[bool]

    @property
    def usage(self) -> Usage:
        return Usage(sum(len(text.tokens) for text in self.texts))


class TextReader:
    """Reads texts for one model. Immutable; safe from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        spec: ModelSpec,
        embedding: EmbeddingSettings,
        scoring: ScoringHead | None,
        context_length: int,
    ) -> None:
        self._tokenizer, self._spec = tokenizer, spec
        self._embedding, self._scoring = embedding, scoring
        self._longest = min(embedding.max_length or context_length, context_length)

    @property
    def reranks(self) -> bool:
        return self._scoring is not None and self._scoring.labels == 1

    def embeds(self, request: EmbedRequest) -> Read:
        """Raises InvalidRequest, or ContextLengthExceeded for what is too long and may not be cut."""
        head, settings = self._embedding.head, self._embedding
        pooling = head.pooling if request.pooling is None else (request.pooling,)
        if head.layers and len(pooling) != len(head.pooling):
            joined = " and ".join(head.pooling)
            raise InvalidRequest("pooling", f"the model's layers take {joined} joined, not {request.pooling!r} alone")
        width = head.width(self._spec.hidden_size, pooling)
        if request.dimensions is not None and request.dimensions > width:
            raise InvalidRequest("dimensions", f"{request.dimensions} exceeds the {width} of the model's vectors")
        prompt = self._prompt(request)
        texts = [self._cased(prompt + given) for given in request.inputs if isinstance(given, str)]
        fitted = iter(self._tokenizer.encode_within([self._tokenizable(text) for text in texts], self._longest))
        found = [next(fitted) if isinstance(given, str) else self._given(given) for given in request.inputs]
        skip = self._prompt_tokens(prompt) if prompt and not settings.include_prompt else 0
        return self._read(found, pooling, request.truncate, skip)

    def embeddings(self, request: EmbedRequest, read: Read, pooled: Sequence[Floats]) -> list[Embedding]:
        """What came of `embeds`."""
        head = self._embedding.head
        return [
            Embedding(
                tuple(head.vector(states, request.normalize, request.dimensions).tolist()),
                Usage(len(text.tokens)),
                truncated,
            )
            for states, text, truncated in zip(pooled, read.texts, read.truncated, strict=True)
        ]

    def ranks(self, request: RerankRequest) -> Read:
        """Raises as `embeds`, and UnsupportedModel for a model that does not score texts."""
        head = self._scorer()
        documents = [self._cased(document) for document in request.documents]
        pairs = self._tokenizer.encode_pairs(
            self._tokenizable(self._cased(request.query)), list(map(self._tokenizable, documents)), self._longest
        )
        return self._read(pairs, (head.pooling,), request.truncate, 0)

    def ranked(self, request: RerankRequest, read: Read, pooled: Sequence[Floats]) -> RerankResult:
        """What came of `ranks`."""
        head = self._scorer()
        results = [
            Ranked(index, head.score(states), truncated)
            for index, (states, truncated) in enumerate(zip(pooled, read.truncated, strict=True))
        ]
        results.sort(key=lambda one: -one.score)
        return RerankResult(tuple(results[: request.top_n]), read.usage)

    def _scorer(self) -> ScoringHead:
        if self._scoring is None:
            raise UnsupportedModel(
                f"This {self._spec.family} model does not score documents: it has no classification head.",
                "Load a cross-encoder, or compare the vectors of embed().",
            )
        if self._scoring.labels != 1:
            raise UnsupportedModel(
                f"This {self._spec.family} model tells {self._scoring.labels} classes apart; a reranker has one score.",
                "Load a cross-encoder with one label.",
            )
        return self._scoring

    def _prompt(self, request: EmbedRequest) -> str:
        prompts = self._embedding.prompts
        if request.prompt_name is None:
            return self._embedding.default_prompt if request.prompt is None else request.prompt
        if request.prompt_name not in prompts:
            known = f"It has {', '.join(prompts)}." if prompts else "It brings none: pass prompt= instead."
            raise InvalidRequest("prompt_name", f"the model has no prompt {request.prompt_name!r}", known)
        return prompts[request.prompt_name]

    def _prompt_tokens(self, prompt: str) -> int:
        """Of a text that begins with the prompt: tokens up to its own, as far as sentence-transformers counts."""
        whole = self._tokenizer.encode_within([self._cased(prompt)], self._longest)[0].ids
        return len(whole) - (whole[-1] in self._tokenizer.special_ids)

    def _cased(self, text: str) -> str:
        return text.lower() if self._embedding.lowercase else text

    def _tokenizable(self, text: str) -> str:
        """As much of a text as can become the longest sequence: tokenizing takes hundreds of bytes a token."""
        if len(text) <= _SHORT:
            return text
        return text[: max(_SHORT, self._longest * self._tokenizer.longest_token + 1)]

    def _given(self, ids: tuple[int, ...]) -> Fitted:
        kept = ids[: self._longest]
        return Fitted(kept, (0,) * len(kept), len(ids))

    def _read(self, found: Sequence[Fitted], pooling: tuple[Pooling, ...], truncate: bool, skip: int) -> Read:
        for fitted in found:
            if fitted.truncated and not truncate:
                raise ContextLengthExceeded(fitted.length, self._longest)
            if not fitted.ids:
                raise InvalidRequest("texts", "a text has no tokens", "Give each at least one.")
            wrong = next((id_ for id_ in fitted.ids if not 0 <= id_ < self._spec.vocab_size), None)
            if wrong is not None:
                problem = f"token id {wrong} is outside the model's vocabulary of {self._spec.vocab_size}"
                raise InvalidRequest("texts", problem)
        typed = self._spec.token_types > 1
        texts = [Text(one.ids, one.types if typed else None, skip) for one in found]
        return Read(texts, pooling, [one.truncated for one in found])
