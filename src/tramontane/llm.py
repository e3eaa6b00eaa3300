"""LLM and AsyncLLM: the facade that a Python user holds, over any backend.

Owns the shapes of calls. Must not know: the engine, models, arrays; how a backend answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from tramontane import bridge
from tramontane.backends.base import (
    AdapterHost,
    Backend,
    Capabilities,
    Embedder,
    HasStats,
    Listening,
    Reranker,
    Tokenizing,
)
from tramontane.backends.declared import Ability, Progress
from tramontane.backends.registry import open_backend, those_that
from tramontane.errors import UnsupportedModel
from tramontane.gather import answer_all, chunks_of, closing_after, scores
from tramontane.inputs import (
    SAMPLING_FIELDS,
    Conversation,
    Prompt,
    Sampling,
    any_request,
    chat_request,
    embed_request,
    merge_sampling,
    prompt_request,
    rerank_request,
    split_conversations,
    split_options,
    split_prompts,
    spread_sampling,
)
from tramontane.types import (
    AllocationListener,
    Chunk,
    Embedding,
    Pooling,
    Request,
    RerankResult,
    Result,
    SamplingParams,
    Score,
    Stats,
)

if TYPE_CHECKING:
    from tramontane.loading.sources import ModelSource

OnToken = Callable[[Chunk], "bool | None"]
T = TypeVar("T")
Self = TypeVar("Self", bound="_Facade")

# Nothing of the model-level defaults may lengthen, multiply or bend what is only there to score the prompt.
_SCORING = SamplingParams(
    temperature=0.0, prompt_logprobs=0, n=1, max_tokens=0, min_tokens=0, echo=False, logits_processors=()
)


class _Facade:
    """What LLM and AsyncLLM share: opening, closing, and all that returns at once."""

    def __init__(
        self,
        model: str | Path | ModelSource | None = None,
        *,
        backend: str | None = None,
        chat_template: str | Path | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        """Load a model.

        `model`: a path to a .gguf file or a folder, `org/name[@REVISION][:QUANTIZATION or /FILE.gguf]` of the hub, or
        `pypi:PACKAGE[==VERSION]/FILE`, with a backend's name in front if need be, or a `ModelSource`; None is the
        demo model.
        `backend`: the same name by itself; where neither is given, TRAMONTANE_BACKEND names one, or it is native.
        `chat_template`: a Jinja template, or a Path to one, instead of the model's. `progress(done, total, label)`
        hears of downloads, and of loading (`loading NAME`) that takes longer than a second. `options`: settings of the
        backend (of native, `EngineConfig.from_options`) and default sampling parameters (fields of `SamplingParams`).
        Raises InvalidRequest for an option that is neither, MissingExtra, and what loading raises.
        """
        sampling = {name: options.pop(name) for name in [*options] if name in SAMPLING_FIELDS}
        self._backend = open_backend(
            model,
            options,
            SamplingParams(**sampling),
            backend=backend,
            chat_template=chat_template,
            progress=progress,
        )

    @classmethod
    def from_backend(cls: type[Self], backend: Backend) -> Self:
        """A facade over a backend that is open already; `close()` closes it."""
        self = cls.__new__(cls)
        self._backend = backend
        return self

    @property
    def backend(self) -> Backend:
        """The backend that answers."""
        return self._backend

    def capabilities(self) -> Capabilities:
        """Context length, what it can do (generate, chat, embed, rerank), which sampling fields it honours."""
        return self._backend.capabilities()

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the model puts around one unless told otherwise."""
        return self._tokenizer().tokenize(text, add_special_tokens=add_special_tokens)

    def detokenize(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self._tokenizer().detokenize(ids, skip_special_tokens=skip_special_tokens)

    def stats(self) -> Stats:
        """Counters and memory of the engine at this moment."""
        if not isinstance(self._backend, HasStats):
            raise self._unable("stats", "count what it does")
        return self._backend.stats()

    def add_allocation_listener(self, listener: AllocationListener) -> None:
        """Let `listener` hear of each sequence's cache blocks. It runs on the engine's thread."""
        if not isinstance(self._backend, Listening):
            raise self._unable("listen", "tell of its cache")
        self._backend.add_allocation_listener(listener)

    def load_adapter(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Load a LoRA adapter from a folder in PEFT's layout, for requests with `adapter=name`; it blocks meanwhile.

        `replace` one of that name: requests that run keep the old one. Raises InvalidRequest or ModelNotFound, and
        UnsupportedModel where the backend takes no adapters.
        """
        self._adapter_host().load_adapter(name, path, replace=replace)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that run keep it. Raises as `load_adapter`."""
        self._adapter_host().unload_adapter(name)

    def adapters(self) -> list[str]:
        """The names of the loaded adapters. Raises UnsupportedModel."""
        return self._adapter_host().adapters()

    def close(self) -> None:
        """End what is open as cancelled, and free the model. May be called twice.

        A backend that nobody refers to any more closes by itself, as does one that is open when the program ends.
        """
        self._backend.close()

    def _tokenizer(self) -> Tokenizing:
        if not isinstance(self._backend, Tokenizing):
            raise self._unable("tokenize", "show its tokenizer")
        return self._backend

    def _embedder(self) -> Embedder:
        if not isinstance(self._backend, Embedder):
            raise self._unable("embed", "embed texts")
        return self._backend

    def _reranker(self) -> Reranker:
        if not isinstance(self._backend, Reranker):
            raise self._unable("rerank", "rank documents")
        return self._backend

    def _adapter_host(self) -> AdapterHost:
        if not isinstance(self._backend, AdapterHost):
            raise self._unable("adapt", "take adapters")
        return self._backend

    def _unable(self, ability: Ability, what: str) -> UnsupportedModel:
        able = those_that(lambda one: ability in one.abilities)
        return UnsupportedModel(
            f"The backend {self.capabilities().name!r} does not {what}.", f"Backends that do: {', '.join(able)}."
        )

    def _scored(self, texts: Prompt | Sequence[Prompt]) -> tuple[list[Request], list[tuple[int, ...]], bool]:
        """Requests that score texts, the token ids of each, and whether it was a single one."""
        prompts, single = split_prompts(texts)
        requests = [prompt_request(self.tokenize(p) if isinstance(p, str) else p, _SCORING) for p in prompts]
        return requests, [request.prompt_ids or () for request in requests], single


class AsyncLLM(_Facade):
    """A model to ask with `await` and `async for`, from any event loop; see `LLM` for the methods.

    Cancelling the waiting task cancels the request. Loading blocks: where a loop runs already, load with
    `await asyncio.to_thread(AsyncLLM, ...)`.
    """

    @overload
    async def generate(
        self,
        prompts: Prompt,
        sampling: Sampling | None = None,
        *,
        on_token: OnToken | None = None,
        **fields: Any,
    ) -> Result: ...
    @overload
    async def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        on_token: OnToken | None = None,
        **fields: Any,
    ) -> list[Result]: ...
    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        on_token: OnToken | None = None,
        **fields: Any,
    ) -> Result | list[Result]:
        """See `LLM.generate`. `on_token` is called on the event loop: return soon."""
        requests, single = _prompt_requests(prompts, sampling, fields)
        return _one_or_all(await answer_all(self._backend, requests, _awaitable(on_token)), single)

    @overload
    async def chat(
        self,
        messages: Conversation,
        sampling: Sampling | None = None,
        *,
        on_token: OnToken | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Result: ...
    @overload
    async def chat(
        self,
        messages: Sequence[Conversation],
        sampling: Sampling | None = None,
        *,
        on_token: OnToken | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> list[Result]: ...
    async def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling: Sampling | None = None,
        *,
        on_token: OnToken | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Result | list[Result]:
        """See `LLM.chat`."""
        requests, single = _chat_requests(messages, sampling, template_kwargs, fields)
        return _one_or_all(await answer_all(self._backend, requests, _awaitable(on_token)), single)

    def stream(
        self,
        prompt: Prompt | Conversation,
        sampling: SamplingParams | None = None,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """See `LLM.stream`. `aclose()`, or cancelling the task that iterates, cancels the request."""
        options, own = split_options(fields)
        return chunks_of(self._backend, any_request(prompt, merge_sampling(sampling, own), template_kwargs, options))

    @overload
    async def score(self, texts: Prompt) -> Score: ...  # type: ignore[overload-overlap]  # as in LLM
    @overload
    async def score(self, texts: Sequence[Prompt]) -> list[Score]: ...
    async def score(self, texts: Prompt | Sequence[Prompt]) -> Score | list[Score]:
        """See `LLM.score`."""
        requests, ids, single = self._scored(texts)
        return _one_or_all(scores(ids, await answer_all(self._backend, requests, None)), single)

    @overload
    async def embed(  # type: ignore[overload-overlap]  # as in LLM
        self,
        texts: Prompt,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        pooling: Pooling | None = None,
        truncate: bool = True,
    ) -> Embedding: ...
    @overload
    async def embed(
        self,
        texts: Sequence[Prompt],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        pooling: Pooling | None = None,
        truncate: bool = True,
    ) -> list[Embedding]: ...
    async def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        pooling: Pooling | None = None,
        truncate: bool = True,
    ) -> Embedding | list[Embedding]:
        """See `LLM.embed`."""
        request, single = embed_request(
            texts,
            prompt_name=prompt_name,
            prompt=prompt,
            normalize=normalize,
            dimensions=dimensions,
            pooling=pooling,
            truncate=truncate,
        )
        return _one_or_all(await self._embedder().embed(request), single)

    async def rerank(
        self, query: str, documents: Sequence[str], top_n: int | None = None, *, truncate: bool = True
    ) -> RerankResult:
        """See `LLM.rerank`."""
        request = rerank_request(query, documents, top_n=top_n, truncate=truncate)
        return await self._reranker().rerank(request)

    async def get_embeddings(self, text: str) -> list[float]:
        """The vector of one text, by the model's own settings: the numbers of `embed`."""
        return list((await self.embed(text)).vector)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)


class LLM(_Facade):
    """A model to ask from plain Python: scripts, notebooks, inside a running event loop, several threads at once."""

    @overload
    def generate(
        self,
        prompts: Prompt,
        sampling: Sampling | None = None,
        *,
        on_token: OnToken | None = None,
        **fields: Any,
    ) -> Result: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        on_token: OnToken | None = None,
        **fields: Any,
    ) -> list[Result]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        on_token: OnToken | None = None,
        **fields: Any,
    ) -> Result | list[Result]:
        """Complete a text or token ids; a list of them is answered in one batch, with the results in its order.

        `sampling` holds for all, or is a list with one each; `fields` are fields of `SamplingParams` that go before
        it, and `adapter`: the name of a loaded adapter to answer with. `on_token(chunk)` is called on this thread as
        chunks arrive; when it returns False, that chunk's request is cancelled and its result has what there was, with
        finish_reason "cancelled".

        The first request that is refused or fails raises its error here, after the rest of the list is cancelled.
        """
        requests, single = _prompt_requests(prompts, sampling, fields)
        return _one_or_all(self._answer(requests, on_token), single)

    @overload
    def chat(
        self,
        messages: Conversation,
        sampling: Sampling | None = None,
        *,
        on_token: OnToken | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Result: ...
    @overload
    def chat(
        self,
        messages: Sequence[Conversation],
        sampling: Sampling | None = None,
        *,
        on_token: OnToken | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> list[Result]: ...
    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling: Sampling | None = None,
        *,
        on_token: OnToken | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Result | list[Result]:
        """Answer a conversation: `Message`s, or dicts of role and content (a text, or a list of typed parts).

        `fields` may also be those of a chat request: `tools` (`Tool`s, dicts in OpenAI's shape, or functions, by their
        signatures and docstrings), `tool_choice`, `parallel_tool_calls`, `thinking`, `reasoning_effort`.
        A list of conversations is answered in one batch. `template_kwargs`: more variables for the chat template.
        For the rest see `generate`.
        """
        requests, single = _chat_requests(messages, sampling, template_kwargs, fields)
        return _one_or_all(self._answer(requests, on_token), single)

    def stream(
        self,
        prompt: Prompt | Conversation,
        sampling: SamplingParams | None = None,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Generator[Chunk, None, None]:
        """The answer to a single text, token ids or conversation, chunk by chunk; begun when first asked for one.

        Closing the iterator early cancels the request. A failure midway raises its error.
        """
        options, own = split_options(fields)
        request = any_request(prompt, merge_sampling(sampling, own), template_kwargs, options)

        async def pump(ask: Callable[[Chunk], Awaitable[None]]) -> None:
            async with closing_after(chunks_of(self._backend, request)) as chunks:
                async for chunk in chunks:
                    await ask(chunk)

        return bridge.converse(pump)

    @overload
    def score(self, texts: Prompt) -> Score: ...  # type: ignore[overload-overlap]  # a str is a sequence of str too
    @overload
    def score(self, texts: Sequence[Prompt]) -> list[Score]: ...
    def score(self, texts: Prompt | Sequence[Prompt]) -> Score | list[Score]:
        """The log probability of each token of a text (or of token ids) given those before it; the first has none.

        A text is tokenized as a prompt is: where the model puts a token in front of one, all of the text is scored.
        """
        requests, ids, single = self._scored(texts)
        return _one_or_all(scores(ids, self._answer(requests, None)), single)

    @overload
    def embed(  # type: ignore[overload-overlap]  # a str is a sequence of str too
        self,
        texts: Prompt,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        pooling: Pooling | None = None,
        truncate: bool = True,
    ) -> Embedding: ...
    @overload
    def embed(
        self,
        texts: Sequence[Prompt],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        pooling: Pooling | None = None,
        truncate: bool = True,
    ) -> list[Embedding]: ...
    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        pooling: Pooling | None = None,
        truncate: bool = True,
    ) -> Embedding | list[Embedding]:
        """The vector of a text or of token ids; of a list of them a list, in its order.

        `None` does as the model's own settings say. `prompt` goes in front of each text, `prompt_name` names one that
        the model brings; without either its default prompt, if it has one. `normalize`: to length 1. `dimensions`:
        keep so many leading elements (and normalize again what was). `pooling` replaces the model's. `truncate`: a text
        longer than the model takes is cut at its end, and `Embedding.truncated` says so; False refuses it.

        Any model embeds that hands out the states of its tokens, chat models too (their last token's, unless told
        otherwise). Raises UnsupportedModel where a model cannot, and says what it can do.
        """
        request, single = embed_request(
            texts,
            prompt_name=prompt_name,
            prompt=prompt,
            normalize=normalize,
            dimensions=dimensions,
            pooling=pooling,
            truncate=truncate,
        )
        return _one_or_all(bridge.run(self._embedder().embed(request)), single)

    def rerank(
        self, query: str, documents: Sequence[str], top_n: int | None = None, *, truncate: bool = True
    ) -> RerankResult:
        """The documents in order of how well each answers the query, best first; `top_n` keeps so many.

        For cross-encoders. `truncate`: a query and document longer together than the model takes are cut, the longer
        one first, and `Ranked.truncated` says so; False refuses them. Raises UnsupportedModel for other models.
        """
        request = rerank_request(query, documents, top_n=top_n, truncate=truncate)
        return bridge.run(self._reranker().rerank(request))

    def get_embeddings(self, text: str) -> list[float]:
        """The vector of one text, by the model's own settings: the numbers of `embed`."""
        return list(self.embed(text).vector)

    def _answer(self, requests: Sequence[Request], on_token: OnToken | None) -> list[Result]:
        if on_token is None:
            return bridge.run(answer_all(self._backend, requests, None))
        talk: Generator[Chunk, bool | None, list[Result]]
        talk = bridge.converse(lambda ask: answer_all(self._backend, requests, ask))
        reply: Any = None  # what starts a generator
        with closing(talk):
            while True:
                try:
                    chunk = talk.send(reply)
                except StopIteration as end:
                    return cast("list[Result]", end.value)
                reply = on_token(chunk)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_gguf_hf(repo: str, file: str, **options: Any) -> LLM:
    """A GGUF file of a repository on the hub: `LLM("repo/file")`, with LLM's options. `repo` may have an @revision."""
    return LLM(f"{repo}/{file}", **options)


def _prompt_requests(
    prompts: Prompt | Sequence[Prompt], sampling: Sampling | None, fields: Mapping[str, Any]
) -> tuple[list[Request], bool]:
    split, single = split_prompts(prompts)
    options, own = split_options(fields)
    params = spread_sampling(sampling, len(split), single, own)
    return [prompt_request(p, s, options) for p, s in zip(split, params, strict=True)], single


def _chat_requests(
    messages: Conversation | Sequence[Conversation],
    sampling: Sampling | None,
    template_kwargs: Mapping[str, Any] | None,
    fields: Mapping[str, Any],
) -> tuple[list[Request], bool]:
    split, single = split_conversations(messages)
    options, own = split_options(fields)
    params = spread_sampling(sampling, len(split), single, own)
    return [chat_request(c, s, template_kwargs, options) for c, s in zip(split, params, strict=True)], single


def _one_or_all(results: list[T], single: bool) -> T | list[T]:
    return results[0] if single else results


def _awaitable(on_token: OnToken | None) -> Callable[[Chunk], Coroutine[Any, Any, bool | None]] | None:
    if on_token is None:
        return None
    call = on_token

    async def ask(chunk: Chunk) -> bool | None:
        return call(chunk)

    return ask
