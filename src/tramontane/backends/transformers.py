"""TransformersBackend: any causal language model that transformers loads, run by transformers itself.

Owns how its settings become an engine: scheduling, drawing, text and stops are those of the native backend, what lies
between tokens and logits is transformers'. The plain choice, and the one to compare others with: sequences that run
share passes where the model allows it, and nothing else.

Must not know: torch; `transformers_model` does, and is imported when a model is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tramontane import platform
from tramontane.backends.base import Capabilities
from tramontane.backends.declared import Declared, Opening
from tramontane.backends.language import template_of, tokenizer_of
from tramontane.backends.loop import EngineLoop
from tramontane.backends.prepare import Preparer, generation_defaults
from tramontane.backends.served import BEAMS, REQUEST, SAMPLING, EngineBackend
from tramontane.config import EngineConfig, SchedulerConfig
from tramontane.engine.blocks import ContiguousPool
from tramontane.engine.engine import Engine
from tramontane.engine.scheduler import Scheduler
from tramontane.errors import InvalidRequest
from tramontane.kernels import for_device
from tramontane.kernels.device import resolve_device
from tramontane.loading.checkpoint import open_checkpoint
from tramontane.loading.sources import ModelSource, resolve
from tramontane.text.grammar import Grammars
from tramontane.types import SamplingParams, Stats

_MAX_NUM_SEQS = 16
"""What is kept of all that run is as long as that of the longest."""
_OPTIONS = frozenset(
    {"context_length", "device", "device_fallback", "dtype", "max_num_batched_tokens", "max_num_seqs", "threads"}
    | {"tool_format", "reasoning_format"}
)


class TransformersBackend(EngineBackend):
    """A model of transformers' own, with an engine thread of ours. Implements `Backend`, `Tokenizing` and `HasStats`.

    torch's number of threads, which is the process's, becomes that of the configuration.
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
        """Of `config`, what `DECLARED.options` names. `sampling`: model-level defaults; `chat_template`: Jinja source
        that replaces the model's.

        Raises MissingExtra, ModelNotFound, UnsupportedModel, CorruptCheckpoint, OutOfMemory, DeviceNotAvailable,
        DownloadFailed, TemplateError or InvalidRequest.
        """
        DECLARED.require()
        config = config or EngineConfig(scheduler=SchedulerConfig(max_num_seqs=_MAX_NUM_SEQS))
        self._source = str(source)
        device = resolve_device(config.device, fallback=config.device_fallback)
        from tramontane.backends.transformers_model import TransformersExecutor, load, use_threads

        ops = for_device("cpu", threads=config.threads or platform.cpu_count())
        use_threads(ops.threads)
        with open_checkpoint(resolve(source, progress)) as checkpoint:
            model = load(checkpoint, device, config.dtype)
            self._context_length = _context_length(config.context_length, model.context_length)
            own, ends = generation_defaults(checkpoint.generation_config, str(checkpoint.path))
            self._defaults = (sampling or SamplingParams()).over(own)
            tokenizer = tokenizer_of(checkpoint)
            grammars = Grammars(tokenizer, model.vocab_size)
            preparer = Preparer(
                tokenizer,
                template_of(checkpoint, tokenizer, chat_template),
                vocab_size=model.vocab_size,
                context_length=self._context_length,
                eos_ids=tokenizer.eos_ids | ends,
                defaults=self._defaults,
                tool_format=config.tool_format,
                reasoning_format=config.reasoning_format,
                grammars=grammars,
            )
        seats = config.scheduler.max_num_seqs
        self._executor = TransformersExecutor(model, ops, seats, grammars)
        # One block a sequence: it stands for all that transformers keeps of it.
        pool = ContiguousPool(seats, self._context_length, 1, self._context_length)
        engine = Engine(Scheduler(config.scheduler, pool, self._context_length), self._executor)
        super().__init__(preparer, EngineLoop(engine, self._executor, None, tokenizer, name=Path(self._source).name))

    def capabilities(self) -> Capabilities:
        return Capabilities(
            name="transformers",
            model=self._source,
            context_length=self._context_length,
            sampling_fields=SAMPLING - BEAMS,
            chat=self._preparer.template is not None,
            defaults=self._defaults,
            request_fields=REQUEST,
        )

    def stats(self) -> Stats:
        """As of the engine's last step; a block stands for a whole sequence."""
        return replace(super().stats(), weight_bytes=self._executor.weight_bytes)


def _context_length(asked: int | None, longest: int) -> int:
    if asked is not None and asked > longest:
        raise InvalidRequest("context_length", f"{asked} exceeds the model's {longest}", f"Use at most {longest}.")
    return asked or longest


def _open(opening: Opening) -> TransformersBackend:
    config = EngineConfig.from_options({"max_num_seqs": _MAX_NUM_SEQS, **opening.options})
    return TransformersBackend(
        opening.model, config, opening.sampling, progress=opening.progress, chat_template=opening.chat_template
    )


DECLARED = Declared(
    name="transformers",
    summary="transformers itself: whatever it loads, plainly",
    open=_open,
    sampling_fields=SAMPLING - BEAMS,
    request_fields=REQUEST,
    abilities=frozenset({"generate", "chat", "tokenize", "stats"}),
    options=_OPTIONS,
    modules=("torch", "transformers"),
    extra="transformers",
)
