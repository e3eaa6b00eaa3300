"""MockBackend: a backend without a model, for tests and for building on Tramontane before a model is at hand.

Owns the script, its delays and its failures. Must not know: models, arrays, the engine.

A token is one character, its id the character's code point; U+0002 stands for the beginning of a text. The "model" is
certain of its script: sampling settings that only reshape probabilities (temperature, top_k, penalties, ...) are
honoured by changing nothing, as certainty has nothing to reshape; those that could overrule it are refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

from tramontane.backends.base import Capabilities, check_request
from tramontane.backends.declared import Declared, Opening
from tramontane.errors import ContextLengthExceeded, EngineClosed, InvalidRequest, RequestTimeout, TramontaneError
from tramontane.text.reasoning import KINDS, read_reasoning
from tramontane.text.stops import StopMatcher
from tramontane.text.toolcalls.formats import FORMATS
from tramontane.text.toolcalls.output import Output, Piece
from tramontane.text.toolcalls.parser import AnswerParser
from tramontane.text.toolcalls.reader import Reader, Reading
from tramontane.types import (
    SAMPLING_DEFAULTS,
    Chunk,
    Embedding,
    EmbedRequest,
    FinishReason,
    Message,
    Ranked,
    Request,
    RerankRequest,
    RerankResult,
    SamplingParams,
    Stats,
    TextPart,
    TokenLogprob,
    Usage,
)

BOS_ID = 2
PROMPT_LOGPROB = -1.0
"""The natural-log probability that the mock reports for every token of a prompt."""

_SAMPLING = frozenset(f.name for f in fields(SamplingParams)) - {
    *("logit_bias", "logits_processors", "grammar"),
    *("xtc_probability", "dry_multiplier", "bad_words", "allowed_token_ids", "best_of", "beam_width"),
}
_REQUEST = frozenset({"tools", "tool_choice", "priority", "tenant", "timeout", "cache_salt"})
"""Nobody waits for another, and there is no cache that could be shared."""
_THOUGHTS = KINDS["think"]
_CALLS = FORMATS["hermes"]

Script = str | Sequence[str] | Callable[[Request], str]


def hashed(text: str) -> tuple[float, ...]:
    """A text's vector where no other is scripted: 32 numbers from -1 to 1, equal for equal texts alone."""
    return tuple(byte / 127.5 - 1 for byte in hashlib.sha256(text.encode("utf-8", "replace")).digest())


def shared_words(query: str, document: str) -> float:
    """A document's score where no other is scripted: the part of the query's words that it has."""
    asked = set(query.lower().split())
    return len(asked & set(document.lower().split())) / len(asked) if asked else 0.0


class MockBackend:
    """Answers from a script.

    `script`: the answer to everything; or several, taken in turn: choice i of the k-th request (of a request with a
    seed: the seed-th instead) answers with script[(k + i) % len(script)]; or a function of the request.
    `delay`: seconds before each token. `fail_after`: after so many tokens, a choice that has not ended fails.
    `sampling`: defaults for what a request leaves open.

    `vector`: what a text (its prompt in front) embeds as, before it is normalized; `relevance`: a document's score, of
    the query and the document.

    In answers to conversations, a script may think (`<think>...</think>` at its beginning) and call the tools of the
    request (`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`).

    An answer ends with its script (finish_reason "stop"), unless min_tokens or ignore_eos ask for more: then the
    script begins again.
    """

    def __init__(
        self,
        script: Script = "This is the mock backend speaking.",
        *,
        delay: float = 0.0,
        fail_after: int | None = None,
        context_length: int = 4096,
        sampling: SamplingParams | None = None,
        vector: Callable[[str], Sequence[float]] = hashed,
        relevance: Callable[[str, str], float] = shared_words,
    ) -> None:
        _check_script(script)
        _check_number("delay", delay, (int, float), 0)
        _check_number("context_length", context_length, int, 2)
        if fail_after is not None:
            _check_number("fail_after", fail_after, int, 0)
        self._script: Script = (script,) if isinstance(script, str) else script
        self._delay = delay
        self._fail_after = fail_after
        self._context_length = context_length
        self._defaults = (sampling or SamplingParams()).over(SAMPLING_DEFAULTS)
        self._vector, self._relevance = vector, relevance
        self._lock = threading.Lock()
        self._open: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Event]] = {}
        self._closed = False
        self._turn = 0
        self._stats = Stats()

    # Backend

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """See `Backend.generate`. Choices take turns, a token each."""
        params, prompt = self._admit(request)
        name, closing, turn = self._enter(request.id, len(prompt))
        first = turn if params.seed is None else params.seed
        deadline = math.inf if request.timeout is None else time.monotonic() + request.timeout
        ending = "requests_cancelled"  # also when the reader goes away, which ends this function at a yield
        produced = 0
        try:
            choices = [
                _Choice(name, i, self._answer(request, first + i), params, prompt, _parser(request))
                for i in range(params.n or 1)
            ]
            for choice in choices if params.max_tokens == 0 else ():
                yield choice.end("length")
            while running := [choice for choice in choices if not choice.done]:
                for choice in running:
                    cut = await self._wait(closing, deadline)
                    if cut is not None:
                        late = RequestTimeout(name, request.timeout or 0.0) if cut == "error" else None
                        ending = "requests_failed" if late else ending
                        for left in [c for c in choices if not c.done]:
                            yield left.end(cut, late)
                        return
                    if produced == self._fail_after:
                        failure = TramontaneError(f"The mock backend failed after {produced} tokens, as scripted.")
                        yield choice.end("error", failure)
                    else:
                        self._count(generated_tokens=1)
                        yield choice.step(self._context_length)
                produced += 1
            ending = "requests_failed" if any(choice.failed for choice in choices) else "requests_finished"
        finally:
            with self._lock:
                del self._open[name]
            self._count(running=-1, **{ending: 1})

    def capabilities(self) -> Capabilities:
        return Capabilities(
            "mock",
            "mock",
            self._context_length,
            _SAMPLING,
            chat=True,
            embeds=True,
            reranks=True,
            request_fields=_REQUEST,
        )

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for loop, closing in self._open.values():
                if not loop.is_closed():
                    loop.call_soon_threadsafe(closing.set)

    # Tokenizing

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [BOS_ID] * add_special_tokens + [ord(char) for char in text]

    def detokenize(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        try:
            return "".join(chr(i) for i in ids if i != BOS_ID or not skip_special_tokens)
        except (ValueError, OverflowError):
            raise InvalidRequest("ids", "they hold what is not a token", "Ids are code points.") from None

    def render(self, messages: Sequence[Message], **template_kwargs: Any) -> str:
        if template_kwargs:
            raise InvalidRequest("template_kwargs", f"the mock's template has no {next(iter(template_kwargs))!r}")
        for message in messages:
            if not isinstance(message.content, str):
                for part in message.content:
                    if not isinstance(part, TextPart):
                        raise InvalidRequest("messages", f"the mock backend takes no {type(part).__name__}")
        return "".join(f"{message.role}: {message.text}\n" for message in messages) + "assistant: "

    # Embedder

    async def embed(self, request: EmbedRequest) -> list[Embedding]:
        """See `Embedder.embed`. There are no states to pool, and no prompts with names; vectors are normalized unless
        the request says otherwise."""
        self._require_open()
        if request.pooling is not None:
            raise InvalidRequest("pooling", "the mock backend has nothing to pool", "Leave it out.")
        if request.prompt_name is not None:
            raise InvalidRequest("prompt_name", "the mock backend brings no prompts", "Leave it out, or give a prompt.")
        return [self._embedding(given, request) for given in request.inputs]

    def _embedding(self, given: str | tuple[int, ...], request: EmbedRequest) -> Embedding:
        text = (request.prompt or "") + given if isinstance(given, str) else self.detokenize(given)
        text, truncated = self._fitting(text, request.truncate)
        vector = [float(value) for value in self._vector(text)]
        if request.dimensions is not None and request.dimensions > len(vector):
            raise InvalidRequest("dimensions", f"{request.dimensions} exceeds the vector's {len(vector)}")
        vector = vector[: request.dimensions]
        if request.normalize is not False:
            length = math.hypot(*vector) or 1.0
            vector = [value / length for value in vector]
        return Embedding(tuple(vector), Usage(1 + len(text)), truncated)

    # Reranker

    async def rerank(self, request: RerankRequest) -> RerankResult:
        """See `Reranker.rerank`."""
        self._require_open()
        ranked, tokens = [], 0
        for index, document in enumerate(request.documents):
            shown, truncated = self._fitting(document, request.truncate, 1 + len(request.query))
            tokens += 1 + len(request.query) + len(shown)
            ranked.append(Ranked(index, float(self._relevance(request.query, shown)), truncated))
        ranked.sort(key=lambda one: -one.score)
        return RerankResult(tuple(ranked[: request.top_n]), Usage(tokens))

    def _fitting(self, text: str, truncate: bool, taken: int = 1) -> tuple[str, bool]:
        """As much of a text as the context holds beside `taken` tokens, and whether that is less than all."""
        room = max(self._context_length - taken, 0)
        if len(text) > room and not truncate:
            raise ContextLengthExceeded(taken + len(text), self._context_length)
        return text[:room], len(text) > room

    # HasStats

    def stats(self) -> Stats:
        with self._lock:
            return self._stats

    def _admit(self, request: Request) -> tuple[SamplingParams, tuple[int, ...]]:
        params = request.sampling.over(self._defaults)
        check_request(replace(request, sampling=params), self.capabilities())
        strict = any(tool.strict for tool in request.tools)
        if strict or request.tool_choice not in ("auto", "none"):
            field = "tools" if strict else "tool_choice"
            raise InvalidRequest(
                field, "the mock backend calls what its script says", "Use auto or none, nothing strict."
            )
        if request.prompt_ids is not None:
            self.detokenize(request.prompt_ids)  # checks them
            ids = list(request.prompt_ids)
        else:
            ids = self.tokenize(self.render(request.messages, **request.template_kwargs)
                                if request.messages is not None else request.prompt or "")  # fmt: skip
        if not ids:
            raise InvalidRequest("prompt", "it holds no token")
        if len(ids) + (params.max_tokens != 0) > self._context_length:
            raise ContextLengthExceeded(len(ids), self._context_length)
        return params, tuple(ids)

    def _answer(self, request: Request, turn: int) -> str:
        if not callable(self._script):
            return self._script[turn % len(self._script)]
        answer = self._script(request)
        if not answer:
            raise InvalidRequest("script", "an answer must not be empty")
        return answer

    def _require_open(self) -> None:
        if self._closed:
            raise EngineClosed("The mock backend is closed.", "Open another.")

    def _enter(self, name: str, prompt_tokens: int) -> tuple[str, asyncio.Event, int]:
        closing = asyncio.Event()
        with self._lock:
            self._require_open()
            name = name or f"mock-{uuid.uuid4().hex[:12]}"
            if name in self._open:
                raise InvalidRequest("id", f"a request {name!r} is running already")
            self._open[name] = (asyncio.get_running_loop(), closing)
            turn = self._turn
            self._turn += 1
        self._count(running=1, prompt_tokens=prompt_tokens)
        return name, closing, turn

    async def _wait(self, closing: asyncio.Event, deadline: float) -> FinishReason | None:
        """Let the delay pass; what cuts the answer off: that the backend is closed, or that time is up."""
        if not self._delay:
            await asyncio.sleep(0)
        else:
            left = max(0.0, deadline - time.monotonic())
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(closing.wait(), min(self._delay, left))
        if closing.is_set():
            return "cancelled"
        return "error" if time.monotonic() >= deadline else None

    def _count(self, **changes: int) -> None:
        with self._lock:
            self._stats = replace(
                self._stats, **{name: getattr(self._stats, name) + change for name, change in changes.items()}
            )


def _check_script(script: object) -> None:
    if callable(script):
        return
    answers = (script,) if isinstance(script, str) else script
    if not isinstance(answers, Sequence) or not all(isinstance(answer, str) for answer in answers):
        raise InvalidRequest("script", f"{script!r:.80} is no text, no list of texts and no function")
    if not answers or not all(answers):
        raise InvalidRequest("script", "an answer must not be empty")


def _check_number(name: str, value: object, kind: type | tuple[type, ...], low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not value >= low:  # type: ignore[operator]
        raise InvalidRequest(name, f"{value!r} is not a number of at least {low}")


def _parser(request: Request) -> AnswerParser | None:
    """Of the script that answers a conversation: reasoning and calls are written in it as Qwen's models do."""
    if request.messages is None:
        return None
    tools = () if request.tool_choice == "none" else request.tools

    def read(reader: Reader, out: Output) -> Reading[None]:
        yield from read_reasoning(reader, out, _THOUGHTS, opened=False)
        if tools:
            yield from _CALLS.parse(reader, out, tools)
        yield from reader.until((), out.text)

    return AnswerParser(read, Output(_CALLS.ids, not request.parallel_tool_calls))


class _Choice:
    """One answer on its way: where in its text it stands, and how it ends."""

    def __init__(
        self,
        name: str,
        index: int,
        answer: str,
        params: SamplingParams,
        prompt: tuple[int, ...],
        parser: AnswerParser | None,
    ) -> None:
        self.done = False
        self._parser = parser
        self.failed = False
        self._name = name
        self._index = index
        self._answer = answer
        self._params = params
        self._prompt = prompt
        self._count = 0
        self._stops = StopMatcher(params.stop or (), include=bool(params.include_stop))

    def step(self, context_length: int) -> Chunk:
        """The next token; with the end, where it is the last."""
        params = self._params
        char = self._answer[self._count % len(self._answer)]
        self._count += 1
        shown = char
        stop: str | int | None = None
        reason: FinishReason | None = None
        if self._count >= (params.min_tokens or 0):
            shown, stop = self._stops.push(char)
            if ord(char) in (params.stop_token_ids or ()):
                shown, stop = char if params.include_stop else "", ord(char)
        if stop is not None:
            reason = "stop"
        elif self._count == params.max_tokens or len(self._prompt) + self._count == context_length:
            reason = "length"
        elif self._count >= max(len(self._answer), params.min_tokens or 0) and not params.ignore_eos:
            reason = "stop"
        said = self._said(shown, ended=reason is not None)
        if self._parser is not None and (
            self._parser.done or (self._parser.made_calls and reason == "stop" and stop is None)
        ):
            reason = "tool_calls"
        chunk = self._chunk(said, (ord(char),))
        return chunk if reason is None else self._final(chunk, reason, stop)

    def end(self, reason: FinishReason, error: Exception | None = None) -> Chunk:
        """The final chunk of an answer that is cut off before its next token."""
        self.failed = error is not None
        return replace(self._final(self._chunk(self._said("", ended=True), ()), reason), error=error)

    def _said(self, text: str, ended: bool) -> Piece:
        if ended:
            text += self._stops.flush()
        return Piece(text) if self._parser is None else self._parser.push(text, ended)

    def _chunk(self, said: Piece, ids: tuple[int, ...]) -> Chunk:
        opening = self._count == len(ids)  # nothing was produced before
        text = said.text
        if opening and self._params.echo:
            text = "".join(chr(i) for i in self._prompt if i != BOS_ID) + text
        return Chunk(
            self._name,
            self._index,
            text,
            ids,
            self._certain(ids) if self._params.logprobs is not None else (),
            prompt_ids=self._prompt if opening and self._index == 0 else None,
            prompt_logprobs=self._of_prompt() if opening and self._index == 0 else None,
            reasoning=said.reasoning,
            tool_calls=said.calls,
        )

    def _final(self, chunk: Chunk, reason: FinishReason, stop: str | int | None = None) -> Chunk:
        self.done = True
        usage = Usage(len(self._prompt), self._count)
        return replace(chunk, finish_reason=reason, stop_reason=stop, usage=usage)

    def _certain(self, ids: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
        top = bool(self._params.logprobs)
        return tuple(TokenLogprob(i, chr(i), 0.0, 1, ((i, chr(i), 0.0),) * top) for i in ids)

    def _of_prompt(self) -> tuple[TokenLogprob | None, ...] | None:
        if self._params.prompt_logprobs is None:
            return None
        top = bool(self._params.prompt_logprobs)
        scored = (
            TokenLogprob(i, chr(i), PROMPT_LOGPROB, 1, ((i, chr(i), PROMPT_LOGPROB),) * top) for i in self._prompt[1:]
        )
        return (None, *scored)


def _open(opening: Opening) -> MockBackend:
    if opening.model:
        raise InvalidRequest("model", f"the mock backend loads none, not {opening.model!r}", "Pass 'mock' alone.")
    if opening.chat_template is not None:
        raise InvalidRequest("chat_template", "the mock backend has its own", "Leave it out.")
    return MockBackend(sampling=opening.sampling, **opening.options)


DECLARED = Declared(
    name="mock",
    summary="a script instead of a model, for tests of what is built on Tramontane",
    open=_open,
    sampling_fields=_SAMPLING,
    request_fields=_REQUEST,
    abilities=frozenset({"generate", "chat", "tokenize", "embed", "rerank", "stats"}),
    options=frozenset({"script", "delay", "fail_after", "context_length", "vector", "relevance"}),
    takes_model=False,
)
