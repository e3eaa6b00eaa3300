"""NativeBackend: Tramontane's own engine as a backend.

Owns how a model becomes a running engine: source, device, weights, cache, scheduler, thread. Must not know: how steps
are scheduled or computed, how text is assembled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tramontane import platform
from tramontane.backends.base import Capabilities
from tramontane.backends.declared import Declared, Opening
from tramontane.backends.language import template_of
from tramontane.backends.loop import EngineLoop, public
from tramontane.backends.prepare import Preparer, generation_defaults
from tramontane.backends.reading import Read, TextReader
from tramontane.backends.served import REQUEST, SAMPLING, EngineBackend
from tramontane.backends.shared import SharedModel, shared_model
from tramontane.config import EngineConfig, SchedulerConfig, option_names
from tramontane.engine.blocks import make_pool
from tramontane.engine.encoder import Encoder
from tramontane.engine.engine import Engine
from tramontane.engine.executor import LocalExecutor
from tramontane.engine.runner import Runner
from tramontane.engine.scheduler import Scheduler
from tramontane.engine.sequence import Stretch
from tramontane.errors import InvalidRequest, OutOfMemory, TramontaneError, UnsupportedModel
from tramontane.kernels.device import resolve_device
from tramontane.kernels.workspace import Workspace
from tramontane.loading.build import LoadedModel
from tramontane.loading.heads import embedding_settings, scoring_head
from tramontane.loading.memory import (
    fitting_context,
    resolve_num_blocks,
    resolve_num_states,
    shown,
    step_rows,
    workspace_bytes,
)
from tramontane.loading.sources import ModelSource, resolve
from tramontane.models.heads import Floats
from tramontane.models.spec import cache_groups, length_dependent
from tramontane.types import (
    AllocationListener,
    Embedding,
    EmbedRequest,
    Request,
    RerankRequest,
    RerankResult,
    SamplingParams,
    Stats,
)

log = logging.getLogger("tramontane")


class NativeBackend(EngineBackend):
    """A model loaded here, with a KV cache and an engine thread of its own; weights are shared between backends of one
    process that load the same source with the same settings.

    Implements `Backend`, `Embedder`, `Reranker`, `Tokenizing`, `HasStats` and `Listening`; every method may be called
    from any thread. It does not survive a fork: load models after forking, or start processes with "spawn".
    """

    def __init__(
        self,
        source: str | Path | ModelSource,
        config: EngineConfig | None = None,
        sampling: SamplingParams | None = None,
        *,
        progress: Callable[[int, int | None, str], None] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """`sampling`: model-level defaults; `chat_template`: Jinja source that replaces the model's.

        Raises ModelNotFound, UnsupportedModel, CorruptCheckpoint, OutOfMemory, DeviceNotAvailable, MissingExtra,
        DownloadFailed, TemplateError or InvalidRequest.
        """
        config = config or EngineConfig()
        self._source = str(source)
        device = resolve_device(config.device, fallback=config.device_fallback, kernels=config.kernels)
        shared = shared_model(resolve(source, progress), config, device, progress)
        free = _free_for_cache(shared.loaded, config)
        self._context_length = _context_length(config, shared.loaded, free)
        self._defaults, ends = _defaults(shared, sampling or SamplingParams())
        preparer = _preparer(shared, config, self._defaults, ends, chat_template, self._context_length)
        self._family, self._generates = shared.loaded.spec.family, shared.loaded.spec.generates
        self._reader = _reader(shared, self._context_length)
        engine, self._executor, encoder, self._cache_bytes = _engine(shared, config, self._context_length, free)
        self._shared: SharedModel | None = shared
        name = Path(self._source).name
        pin = platform.Pin(next(iter(shared.loaded.ops.processors), None))
        loop = EngineLoop(engine, self._executor, encoder, shared.tokenizer, name=name, trace=shared.trace, pin=pin)
        super().__init__(preparer, loop)

    async def embed(self, request: EmbedRequest) -> list[Embedding]:
        """See `Embedder.embed`. What takes long runs on threads of its own, not on the event loop."""
        reader = self._require_reader()
        read = await asyncio.to_thread(reader.embeds, request)
        return await asyncio.to_thread(reader.embeddings, request, read, await self._pooled(read))

    async def rerank(self, request: RerankRequest) -> RerankResult:
        """See `Reranker.rerank`."""
        reader = self._require_reader()
        read = await asyncio.to_thread(reader.ranks, request)
        return await asyncio.to_thread(reader.ranked, request, read, await self._pooled(read))

    async def _pooled(self, read: Read) -> list[Floats]:
        self._require_open()
        try:
            return await asyncio.wrap_future(self._loop.encode(read.texts, read.pooling))
        except TramontaneError:
            raise
        except Exception as error:
            raise public(error, "A text was not read") from error

    def _require_reader(self) -> TextReader:
        self._require_open()
        if isinstance(self._reader, TramontaneError):
            raise self._reader
        return self._reader

    def _admit(self, request: Request) -> None:
        """Refuses texts to be written of a model that only reads."""
        if not self._generates:
            can = "embed() and rerank()" if self.capabilities().reranks else "embed()"
            raise UnsupportedModel(
                f"This {self._family} model reads texts and writes none.",
                f"Use {can}, or load a model that generates.",
            )
        super()._admit(request)

    def capabilities(self) -> Capabilities:
        return Capabilities(
            name="native",
            model=self._source,
            context_length=self._context_length,
            sampling_fields=SAMPLING if self._generates else frozenset(),
            chat=self._generates and self._preparer.template is not None,
            defaults=self._defaults,
            generates=self._generates,
            embeds=isinstance(self._reader, TextReader),
            reranks=isinstance(self._reader, TextReader) and self._reader.reranks,
            request_fields=REQUEST,
        )

    def close(self) -> None:
        """End every open request as cancelled, stop the thread, free the cache and (with its last user) the model."""
        super().close()
        self._shared = None

    def stats(self) -> Stats:
        """As of the engine's last step; the counters stay readable after `close`."""
        shared = self._shared
        return replace(
            super().stats(),
            weight_bytes=shared.loaded.weight_bytes if shared else 0,
            cache_bytes=self._cache_bytes if shared else 0,
            workspace_bytes=self._executor.workspace_bytes,
        )

    def add_allocation_listener(self, listener: AllocationListener) -> None:
        """`listener` hears of every request that is submitted after this call."""
        self._require_open()
        self._loop.add_listener(listener)


def _free_for_cache(loaded: LoadedModel, config: EngineConfig) -> int:
    """Free bytes of the device, less what a step needs."""
    free = loaded.ops.free_memory()
    if free is None:
        free = platform.available_memory()
    longest = config.context_length or loaded.spec.context_length
    step = step_rows(loaded.spec, config.scheduler.max_num_batched_tokens, longest)
    needed = workspace_bytes(loaded.spec, step, cache_dtype=loaded.cache_dtype(config.cache.dtype))
    if needed >= free:
        raise OutOfMemory(
            f"a step of {step} tokens needs {shown(needed)} of the {shown(free)} that are free",
            "Use a smaller max_num_batched_tokens or context_length.",
        )
    return free - needed


def _context_length(config: EngineConfig, loaded: LoadedModel, free: int) -> int:
    """As configured, else the model's, or as much of it as the cache can hold (and that is logged)."""
    longest = loaded.spec.context_length
    if config.context_length is None and not loaded.spec.causal:  # read whole, without a cache
        return longest
    if config.context_length is None:
        fits = fitting_context(
            loaded.spec, config.cache, config.scheduler, free, loaded.cache_dtype(config.cache.dtype)
        )
        if fits < longest:
            log.warning(
                "the cache holds %d tokens of the model's context of %d: sequences end there. Give the cache more room "
                "(num_blocks, memory_bytes, memory_fraction), or set context_length.", fits, longest,
            )  # fmt: skip
        return fits
    if config.context_length > longest:
        raise InvalidRequest(
            "context_length", f"{config.context_length} exceeds the model's {longest}", f"Use at most {longest}."
        )
    return config.context_length


def _defaults(shared: SharedModel, sampling: SamplingParams) -> tuple[SamplingParams, frozenset[int]]:
    """The constructor's sampling over the model's own, and the tokens that the model says end a text."""
    checkpoint = shared.loaded.checkpoint
    own, ends = generation_defaults(checkpoint.generation_config, str(checkpoint.path))
    return sampling.over(own), ends


def _preparer(
    shared: SharedModel,
    config: EngineConfig,
    defaults: SamplingParams,
    ends: frozenset[int],
    chat_template: str | None,
    context_length: int,
) -> Preparer:
    checkpoint, tokenizer = shared.loaded.checkpoint, shared.tokenizer
    return Preparer(
        tokenizer,
        template_of(checkpoint, tokenizer, chat_template),
        vocab_size=shared.loaded.spec.vocab_size,
        context_length=context_length,
        eos_ids=tokenizer.eos_ids | ends,
        defaults=defaults,
        tool_format=config.tool_format,
        reasoning_format=config.reasoning_format,
        grammars=shared.grammars,
    )


def _reader(shared: SharedModel, context_length: int) -> TextReader | TramontaneError:
    """What reads texts; or, of a model that does other things besides, why it cannot."""
    checkpoint, spec = shared.loaded.checkpoint, shared.loaded.spec
    try:
        embedding = embedding_settings(checkpoint, spec)
        scoring = scoring_head(checkpoint, spec)
    except TramontaneError as error:
        if not spec.generates:
            raise
        return error
    return TextReader(shared.tokenizer, spec, embedding, scoring, context_length)


def _engine(
    shared: SharedModel, config: EngineConfig, context_length: int, free: int
) -> tuple[Engine, LocalExecutor, Encoder, int]:
    """The engine, its executor, what reads texts in turn with it, and the bytes of the cache."""
    loaded = shared.loaded
    spec, ops = loaded.spec, loaded.ops
    cache_dtype = loaded.cache_dtype(config.cache.dtype)
    blocks, states = len(cache_groups(spec)), 0  # what only reads keeps nothing
    if spec.generates:
        blocks = resolve_num_blocks(spec, config.cache, config.scheduler, context_length, free, cache_dtype)
        states = resolve_num_states(spec, config.cache, config.scheduler, free)
    seats = _seats(config.scheduler, states) if states else config.scheduler
    cache = loaded.decoder.new_cache(blocks, config.cache.block_size, cache_dtype, states)
    groups = cache_groups(spec)
    sizes = {
        "block_size": config.cache.block_size,
        "context_length": context_length,
        "max_num_batched_tokens": config.scheduler.max_num_batched_tokens,
        "max_num_seqs": config.scheduler.max_num_seqs,
    }
    workspace = Workspace(ops, step_rows(spec, config.scheduler.max_num_batched_tokens, context_length))
    runner = Runner(
        loaded.decoder,
        ops,
        cache,
        num_groups=len(groups),
        workspace=workspace,
        grammars=shared.grammars,
        **sizes,
    )
    encoder = Encoder(loaded.decoder, workspace, cache_dtype=cache_dtype, turn=shared.turn, **sizes)
    pool = make_pool(config.cache, blocks, [group.window for group in groups], context_length, states)
    executor = LocalExecutor(runner, shared.turn)
    scaling = length_dependent(spec)
    stretch = None
    if scaling is not None:
        stretch = Stretch(scaling.original_context_length, whole=scaling.kind == "longrope")
    scheduler = Scheduler(seats, pool, context_length, stretch)
    return Engine(scheduler, executor), executor, encoder, cache.nbytes


def _seats(scheduler: SchedulerConfig, states: int) -> SchedulerConfig:
    """As configured, or so many sequences at once as there are states for them (and that is logged)."""
    if states < scheduler.max_num_seqs:
        log.warning(
            "the cache has room for the states of %d sequences: no more run at once. Give it more "
            "(memory_bytes, memory_fraction), or set max_num_seqs.", states,
        )  # fmt: skip
    return replace(scheduler, max_num_seqs=min(states, scheduler.max_num_seqs))


def _open(opening: Opening) -> NativeBackend:
    return NativeBackend(
        opening.model,
        opening.config(),
        opening.sampling,
        progress=opening.progress,
        chat_template=opening.chat_template,
    )


DECLARED = Declared(
    name="native",
    summary="our own engine: paged memory, many users at once, quantized files as they are",
    open=_open,
    sampling_fields=SAMPLING,
    request_fields=REQUEST,
    abilities=frozenset({"generate", "chat", "tokenize", "embed", "rerank", "stats", "listen"}),
    options=frozenset(option_names()),
)
