"""MistralRSBackend: mistral.rs, by its official wheel, as a backend.

Owns how a model becomes a running wheel and what it is asked. Must not know: how fields are mapped, how the wheel's
streams are read.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tramontane.backends.base import Capabilities, check_request
from tramontane.backends.language import template_of, tokenizer_of
from tramontane.backends.mailbox import Mailbox, coalesce
from tramontane.backends.mistralrs import embedding, wheel
from tramontane.backends.mistralrs.answer import Answer
from tramontane.backends.mistralrs.options import Settings, isq_name, log, settle
from tramontane.backends.mistralrs.requests import (
    NEED_TOKENIZER,
    REQUEST_TAKEN,
    SAMPLING_FIELDS,
    Plan,
    Planner,
    wrapped,
)
from tramontane.backends.mistralrs.source import Found, find, isq_for, runner_arguments
from tramontane.backends.mistralrs.stream import Stream, Streams
from tramontane.backends.prepare import generation_defaults
from tramontane.errors import (
    EngineClosed,
    InvalidRequest,
    ModelNotFound,
    RequestTimeout,
    TramontaneError,
    UnsupportedModel,
)
from tramontane.loading.checkpoint import open_checkpoint
from tramontane.loading.sources import ModelSource, resolve
from tramontane.records import dataclass
from tramontane.text.template import ChatTemplate
from tramontane.text.tokenizer import Tokenizer
from tramontane.types import Chunk, Embedding, EmbedRequest, Message, Request, SamplingParams, Usage

_EXIT_SECONDS = 10.0
"""How long an exiting interpreter waits for the wheel's next tokens."""


@dataclass(frozen=True)
class _Words:
    """What our own readers make of the checkpoint's text side."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    sampling: SamplingParams


class MistralRSBackend:
    """A model loaded by mistral.rs.

    Implements `Backend`, `Embedder` and `Tokenizing`, and loads LoRA adapters; every method may be called from any
    thread. Texts are rendered by our own templates and read by the wheel's tokenizer.
    """

    def __init__(
        self,
        source: str | Path | ModelSource,
        options: Mapping[str, Any] | None = None,
        sampling: SamplingParams | None = None,
        *,
        chat_template: str | None = None,
        progress: Callable[[int, int | None, str], None] | None = None,
    ) -> None:
        """`options`: of `Options`. `sampling`: model-level defaults. `chat_template`: Jinja source that replaces the
        model's.

        Raises MissingExtra, InvalidRequest, DeviceNotAvailable, UnsupportedModel, OutOfMemory, TemplateError and what
        `resolve` raises.
        """
        module = wheel.load()
        settings = settle(options or {})
        self._source, self._settings = str(source), settings
        self._found = find(resolve(source, progress), settings.options)
        words = _words(self._found, settings, chat_template)
        runner = _runner(module, self._found, settings, words.template)
        self._module = module
        self._generates = self._found.kind != "embedding"
        self._context_length = runner.call("max_sequence_length") or 0
        self._streams = Streams(runner, module.ChatCompletionRequest, one_prompt_at_a_time=settings.device == "cpu")
        self._defaults = (sampling or SamplingParams()).over(words.sampling)

        def tokenize(text: str, special: bool) -> list[int]:
            with wheel.explained("The text was not tokenized"):
                return list(runner.call("tokenize_text", text, special, None))

        def detokenize(ids: Sequence[int], skip: bool) -> str:
            with wheel.explained("The tokens were not detokenized"):
                return str(runner.call("detokenize_text", list(ids), skip))

        self._planner = Planner(
            wheel=module,
            tokenize=tokenize,
            detokenize=detokenize,
            tokenizer=words.tokenizer,
            template=words.template,
            defaults=self._defaults,
            context_length=self._context_length,
            media=self._found.kind == "multimodal",
        )
        self._pid = os.getpid()
        self._finalizer = weakref.finalize(self, _stop, self._streams, self._pid)

    # Backend

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        """See `Backend.generate`. A model that only embeds raises UnsupportedModel."""
        self._require_open()
        if not self._generates:
            raise UnsupportedModel("This model reads texts and writes none.", "Use embed(), or another model.")
        check_request(request, self.capabilities())
        if request.adapter is not None:
            self._require_adapters()
        plan = await asyncio.to_thread(self._planner.plan, request)
        if plan.params.max_tokens == 0:
            for index in range(plan.params.n or 1):
                yield _nothing(plan, index)
            return
        mailbox = Mailbox()
        streams = [self._stream(plan, index, mailbox) for index in range(plan.params.n or 1)]
        try:
            async for chunk in self._chunks(request, mailbox, streams):
                yield chunk
        finally:
            for stream in streams:
                stream.cancelled.set()

    async def _chunks(self, request: Request, mailbox: Mailbox, streams: list[Stream]) -> AsyncIterator[Chunk]:
        """What the streams tell until all have ended, or the request's time is over."""
        until = None if request.timeout is None else time.monotonic() + request.timeout
        left, held = dict(enumerate(streams)), list[Chunk]()
        for stream in streams:
            self._streams.start(stream)
        while left:
            try:
                chunks = await asyncio.wait_for(mailbox.read(), None if until is None else until - time.monotonic())
            except asyncio.TimeoutError:
                late = RequestTimeout(streams[0].answer.id, request.timeout or 0.0)
                chunks = [stream.answer.end("error", late) for stream in left.values()]
            for chunk in chunks:
                if chunk.finish_reason is not None:
                    del left[chunk.index]
            if not self._settings.options.stream:
                held += chunks
                chunks = coalesce(held) if not left else []
            for chunk in chunks:
                yield chunk

    def capabilities(self) -> Capabilities:
        known = SAMPLING_FIELDS if self._planner.tokenizer is not None else SAMPLING_FIELDS - NEED_TOKENIZER
        return Capabilities(
            name="mistralrs",
            model=self._source,
            context_length=self._context_length,
            sampling_fields=known if self._generates else frozenset(),
            chat=self._generates and self._planner.template is not None,
            defaults=self._defaults,
            generates=self._generates,
            embeds=not self._generates,
            request_fields=REQUEST_TAKEN,
        )

    def close(self) -> None:
        """End every open request as cancelled and free the model."""
        if self._finalizer.detach() and os.getpid() == self._pid:
            self._streams.close()

    # Tokenizing

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self._require_open()
        return self._planner.tokenize(text, add_special_tokens)

    def detokenize(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self._require_open()
        try:
            return self._planner.detokenize(ids, skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise InvalidRequest("token_ids", f"token ids must be non-negative integers ({error})") from error

    def render(self, messages: Sequence[Message], **template_kwargs: Any) -> str:
        return self._planner.render(messages, **template_kwargs)

    # Embedder

    async def embed(self, request: EmbedRequest) -> list[Embedding]:
        """See `Embedder.embed`."""
        self._require_open()
        if self._generates:
            raise UnsupportedModel("mistral.rs embeds with embedding models alone.", "Use the native backend.")
        return await asyncio.to_thread(
            embedding.embed, self._module, self._streams.runner, request, self._planner.tokenize, self._context_length
        )

    # Adapters

    def load_adapter(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Load a LoRA adapter from a folder in PEFT's layout, to be asked for by `name`. `replace` one of that name;
        requests that run keep the old one. Raises InvalidRequest or ModelNotFound."""
        self._adapted("load_lora_adapter", name, str(_folder(path)), load_inplace=replace)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that run keep it. Raises InvalidRequest."""
        self._adapted("unload_lora_adapter", name)

    def adapters(self) -> list[str]:
        """The names of the loaded adapters."""
        if self._settings.options.adapters is None:
            return []
        return sorted(info.alias for info in self._adapted("list_lora_adapters"))

    def _adapted(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self._require_open()
        self._require_adapters()
        try:
            with wheel.captured():
                return self._streams.runner.call(method, *args, **kwargs)
        except self._module.LoraAdapterError as error:
            raise InvalidRequest("adapter", wheel.said(error)) from error

    def _require_adapters(self) -> None:
        if self._settings.options.adapters is None:
            raise InvalidRequest("adapter", "the model was loaded without room for any", "Open it with adapters={}.")

    # Quantization of a running model

    def requantize(self, quantization: str | int) -> None:
        """Quantize in place anew, from the weights as they were read. Requests that run see the new weights from their
        next token on. The wheel logs a failure and does not tell it."""
        self._quantized("send_re_isq", isq_name(quantization, self._settings.device))

    def begin_calibration(self) -> Any:
        """Collect statistics of the activations from the requests that follow; returns the wheel's status."""
        return self._quantized("begin_calibration")

    def calibration_status(self) -> Any:
        """The wheel's word on what it has collected: `collecting`, `layers`, `total_rows`, ..."""
        return self._quantized("calibration_status")

    def apply_calibration(self, save: str | Path | None = None) -> Any:
        """Quantize anew by what was collected, and keep that in a .cimatrix file if asked to."""
        return self._quantized("apply_calibration", None if save is None else str(save))

    def _quantized(self, method: str, *args: Any) -> Any:
        self._require_open()
        if isq_for(self._found, self._settings) is None:
            raise InvalidRequest("quantization", "the model was loaded without any in place", "Open it with one.")
        with wheel.explained("The model was not quantized anew"), wheel.captured():
            return self._streams.runner.call(method, *args)

    def _stream(self, plan: Plan, index: int, mailbox: Mailbox) -> Stream:
        tokenizer = self._planner.tokenizer
        identify = None if tokenizer is None else (lambda raw, other: tokenizer.ids_by_bytes.get(raw, other))
        return Stream(plan.arguments, Answer(plan, index, identify), mailbox)

    def _require_open(self) -> None:
        if os.getpid() != self._pid:
            raise EngineClosed("mistral.rs does not survive a fork.", "Load the model in the new process.")
        if not self._finalizer.alive:
            raise EngineClosed("The engine was closed.", "Load the model again.")


def _stop(streams: Streams, pid: int) -> None:
    if os.getpid() == pid:
        streams.close(_EXIT_SECONDS)


def _words(found: Found, settings: Settings, chat_template: str | None) -> _Words:
    """Raises what reading the checkpoint's headers raises. A tokenizer that we do not read leaves fields out that need
    it; the wheel has its own."""
    with open_checkpoint(found.path) as checkpoint:
        try:
            override = settings.options.tokenizer
            tokenizer = Tokenizer.from_file(override) if override is not None else tokenizer_of(checkpoint)
        except TramontaneError as error:
            log.warning("%s %s are not available.", error, ", ".join(sorted(NEED_TOKENIZER)))
            tokenizer = None
        sampling, _ = generation_defaults(checkpoint.generation_config, str(found.path))
        return _Words(tokenizer, template_of(checkpoint, tokenizer, chat_template), sampling)


def _runner(module: Any, found: Found, settings: Settings, template: ChatTemplate | None) -> wheel.Runner:
    """The wheel with the model in it. What it logs meanwhile goes to `logging`."""
    with tempfile.TemporaryDirectory(prefix="tramontane-") as folder:
        file = Path(folder) / "template.jinja"
        file.write_text(wrapped(None if template is None else template.source), encoding="utf-8")
        stage = Path(folder) / "stage"
        stage.mkdir()
        arguments = runner_arguments(module, found, settings, file, stage)
        try:
            with wheel.captured():
                return wheel.Runner(module.Runner(**arguments))
        except BaseException as error:  # a panic of Rust's is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise wheel.load_error(error, str(found.path)) from error


def _nothing(plan: Plan, index: int) -> Chunk:
    """The answer of no tokens, which the wheel refuses to give."""
    prompt = plan.prompt_ids or ()
    return Chunk(
        plan.id,
        index,
        plan.echo,
        prompt_ids=plan.prompt_ids if index == 0 else None,
        finish_reason="length",
        usage=Usage(len(prompt), 0),
    )


def _folder(path: str | Path) -> Path:
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        raise ModelNotFound(str(path), "there is no such folder", "Pass the adapter's folder.")
    return folder
