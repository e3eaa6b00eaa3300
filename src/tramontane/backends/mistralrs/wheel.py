"""The wheel: importing it, calling it one caller at a time, and its failures and log lines as ours.

Owns all that must be known of how the wheel behaves as a library. Must not know: requests, models.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from tramontane.errors import (
    ContextLengthExceeded,
    EngineClosed,
    InvalidRequest,
    MissingExtra,
    OutOfMemory,
    TramontaneError,
    UnsupportedModel,
)

log = logging.getLogger("tramontane.mistralrs")

_TOO_LONG = re.compile(r"sequence length is greater than (\d+)")
_MEMORY = re.compile(r"out of memory|OUT_OF_MEMORY|cannot allocate|does not fit|insufficient memory", re.IGNORECASE)
_ENDED = re.compile(r"received none|channel closed|erroneously closed", re.IGNORECASE)
_BACKTRACE = re.compile(r"\n\s*(0: |Stack backtrace|stack backtrace)")
_REPORT = "Another backend may run it; the fault is mistral.rs's."


def load() -> Any:
    """The wheel's module. Raises MissingExtra without one."""
    quiet()
    try:
        return import_module("mistralrs")
    except ImportError as error:
        raise MissingExtra("mistralrs", "The backend 'mistralrs'") from error


def said(error: BaseException) -> str:
    """The wheel's own words, without the backtrace of Rust that follows them."""
    text = _BACKTRACE.split(str(error), maxsplit=1)[0].strip() or type(error).__name__
    return " ".join(text.split()).removesuffix(".")


def public(error: BaseException, doing: str, prompt_tokens: int = 0) -> TramontaneError:
    """The error of ours that says what the wheel's says; a Rust panic, which is no `Exception` in Python, too."""
    words = said(error)
    if isinstance(error, TramontaneError):
        return error
    if too_long := _TOO_LONG.search(words):
        return ContextLengthExceeded(prompt_tokens, int(too_long[1]))
    if "adapter" in words and ("not registered" in words or "no dynamic LoRA" in words):
        return InvalidRequest("adapter", words, "Load it first.")
    if "empty prompt" in words:
        return InvalidRequest("prompt", "the prompt has no tokens", "Give at least one.")
    if words.startswith("Invalid grammar"):
        return InvalidRequest("grammar", words.removeprefix("Invalid grammar").strip(" .") or "it is none")
    if isinstance(error, MemoryError) or _MEMORY.search(words):
        return OutOfMemory(words, "Use a smaller model, quantization=, or fewer sequences.")
    if _ENDED.search(words):  # which is all that it says of it
        words = "the thread of its engine ended, and wrote why to standard error; it starts another"
    kind = "panicked" if type(error).__name__ == "PanicException" or "thread of its engine" in words else "failed"
    return TramontaneError(f"{doing}: mistral.rs {kind}: {words}.", _REPORT)


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """What the wheel raises meanwhile, as ours: it may just be starting anew, after a panic."""
    try:
        yield
    except TramontaneError:
        raise
    except Exception as error:
        raise public(error, doing) from error


def load_error(error: BaseException, model: str) -> TramontaneError:
    """What loading ended with, as ours."""
    found = public(error, f"{model} was not loaded")
    if type(found) is TramontaneError:
        return UnsupportedModel(found.message, found.remedy)
    return found


class Runner:
    """The wheel's Runner, called by one thread at a time: while it is borrowed, it refuses a second caller."""

    def __init__(self, runner: Any) -> None:
        self._runner: Any = runner
        self._lock = threading.Lock()

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """What `Runner.NAME(...)` returns. Raises what it raises, and EngineClosed after `close`."""
        with self._lock:
            if self._runner is None:
                raise EngineClosed("The engine was closed.", "Load the model again.")
            return getattr(self._runner, name)(*args, **kwargs)

    def close(self) -> None:
        """Let the model go, once the call that is running has ended."""
        with self._lock:
            self._runner = None


# The wheel writes its log to the process's standard output, from Rust: "TIME LEVEL TARGET: TEXT" with colours.
_COLOURS = re.compile(rb"\x1b\[[0-9;]*m")
_LINE = re.compile(rb"\S+Z\s+(TRACE|DEBUG|INFO|WARN|ERROR)\s+(mistralrs\w*[\w:]*):\s(.*)", re.DOTALL)
_LEVELS = {b"TRACE": 5, b"DEBUG": 10, b"INFO": 20, b"WARN": 30, b"ERROR": 40}
_capturing = threading.Lock()


def quiet() -> None:
    """Tell the wheel, which decides when it is imported, to log no more than our logger takes; RUST_LOG overrides.

    What it says while it answers, its engine says: the same words reach us as errors, so only DEBUG lets them through.
    """
    level = log.getEffectiveLevel()
    name = next((name for name, value in _LEVELS.items() if value >= level), b"ERROR").decode().lower()
    os.environ.setdefault("RUST_LOG", name if level <= logging.DEBUG else f"{name},mistralrs_core::engine=off")


@contextlib.contextmanager
def captured() -> Iterator[None]:
    """Meanwhile what the wheel logs goes to `logging`; what else is printed goes where it would have.

    The wheel writes to the file descriptor itself, so this exchanges that, for the whole process.
    """
    with _capturing:
        kept = os.dup(1)
        reading, writing = os.pipe()
        reader = threading.Thread(target=_forward, args=(reading, kept), name="tramontane-mistralrs-log", daemon=True)
        reader.start()
        os.dup2(writing, 1)
        os.close(writing)
        try:
            yield
        finally:
            os.dup2(kept, 1)  # which closes the pipe's last end, so that the reader comes to its end
            reader.join(timeout=10)
            os.close(kept)


def _forward(reading: int, kept: int) -> None:
    with os.fdopen(reading, "rb", closefd=True) as lines:
        for line in lines:
            told = _LINE.match(_COLOURS.sub(b"", line))
            if told is None:
                os.write(kept, line)
            else:
                log.log(
                    _LEVELS[told[1]],
                    "%s: %s",
                    *(part.decode("utf-8", "replace").rstrip() for part in told.groups()[1:]),
                )
