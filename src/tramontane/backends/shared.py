"""Loaded models that several backends of one process use together.

Owns the registry: equal source and settings, one copy of the weights. Must not know: engines, requests.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from weakref import WeakValueDictionary

from tramontane import platform
from tramontane.backends.declared import Progress
from tramontane.backends.language import tokenizer_of
from tramontane.config import EngineConfig
from tramontane.errors import InvalidRequest
from tramontane.kernels import for_device
from tramontane.kernels.traced import traced
from tramontane.loading.build import load_model
from tramontane.loading.checkpoint import Checkpoint, open_checkpoint
from tramontane.loading.packed import stamps
from tramontane.text.grammar import Grammars
from tramontane.text.tokenizer import Tokenizer
from tramontane.tracing import Trace


class SharedModel:
    """A loaded model and its tokenizer. Its memory goes when nobody holds it any more."""

    def __init__(
        self, path: Path, config: EngineConfig, device: str, threads: int, progress: Progress | None = None
    ) -> None:
        ops = for_device(
            device,
            kernels=config.kernels,
            threads=threads,
            deterministic=config.deterministic,
            exact=config.arithmetic == "exact",
            processors=_processors(threads) if config.pin_threads else (),
        )
        self.trace = Trace(config.profile) if config.profile else None
        if self.trace is not None:
            ops = traced(ops, self.trace)
        checkpoint = open_checkpoint(path)
        with ThreadPoolExecutor(1) as aside:  # packing weights leaves Python to others
            tokenizer = aside.submit(_tokenizer, checkpoint)
            self.loaded = load_model(
                checkpoint,
                ops,
                dtype=config.dtype,
                architecture=config.architecture,
                keep_packed=config.keep_packed,
                progress=progress,
            )
        checkpoint.release_all()
        self.tokenizer = tokenizer.result()
        self.grammars = Grammars(self.tokenizer, self.loaded.spec.vocab_size)
        self.turn = threading.Lock()
        """Held while a step runs: the ops' threads and scratch memory serve one caller at a time."""


_models: WeakValueDictionary[tuple[object, ...], SharedModel] = WeakValueDictionary()
_loading = threading.Lock()


def shared_model(path: Path, config: EngineConfig, device: str, progress: Progress | None = None) -> SharedModel:
    """The model at `path`, loaded unless a backend of this process holds it with the same settings and it has not
    changed on disk. Raises what `load_model` and `Tokenizer` raise."""
    threads = config.threads or platform.cpu_count()
    path = Path(os.path.abspath(path))  # links stay: the hub's cache gives files their names by them
    how = (config.kernels, threads, config.pin_threads, config.deterministic, config.arithmetic, config.profile)
    key = (path, tuple(stamps(path)), device, *how, config.dtype, config.architecture, config.keep_packed)
    with _loading:  # two at once would load it twice
        model = _models.get(key)
        if model is None:
            model = _models[key] = SharedModel(path, config, device, threads, progress)
        return model


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's, of which nothing else stays in memory: what it is made from takes as much again, and what its
    making leaves behind."""
    made = tokenizer_of(checkpoint)
    checkpoint.forget_tokens()
    platform.trim_heap()
    return made


def _processors(threads: int) -> list[int]:
    """One of this process's for each thread. Raises InvalidRequest."""
    usable = platform.processors()
    if not usable:
        raise InvalidRequest("pin_threads", "this system binds no threads to processors", "Leave it out.")
    if threads > len(usable):
        raise InvalidRequest(
            "pin_threads",
            f"{threads} threads do not have a processor each: this process may use {len(usable)}",
            f"Use threads={len(usable)}, or leave pin_threads out.",
        )
    return usable[:threads]
