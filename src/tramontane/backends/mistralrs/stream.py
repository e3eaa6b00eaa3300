"""One choice's way through the wheel: a thread that reads the wheel's stream into a mailbox.

Owns these threads, their cancelling, and that prompts are read one at a time. Must not know: how requests are mapped.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tramontane.backends.mailbox import Mailbox, wake
from tramontane.backends.mistralrs.answer import Answer
from tramontane.backends.mistralrs.wheel import Runner, public
from tramontane.errors import InvalidRequest, OutOfMemory, TramontaneError


class Streams:
    """The open streams of one model. Holds no reference to the backend, so that an unused one can go."""

    def __init__(self, runner: Runner, request: Callable[..., Any], *, one_prompt_at_a_time: bool) -> None:
        """`request`: the wheel's ChatCompletionRequest. `one_prompt_at_a_time`: on the CPU the wheel fails where it
        computes the first tokens of several quantized prompts together."""
        self.runner = runner
        self._request = request
        self._turn: contextlib.AbstractContextManager[Any] = (
            threading.Lock() if one_prompt_at_a_time else contextlib.nullcontext()
        )
        self._lock = threading.Lock()
        self._open: set[Stream] = set()
        self._closed = False

    def start(self, stream: Stream) -> None:
        """Let it run on a thread of its own, which waits for the wheel without the interpreter's lock."""
        with self._lock:
            if self._closed:
                stream.cancelled.set()
            self._open.add(stream)
        threading.Thread(target=self._run, args=(stream,), name="tramontane-mistralrs", daemon=True).start()

    def close(self, patience: float | None = None) -> None:
        """Cancel what is open, wait at most `patience` seconds for the wheel's next tokens, and free the model."""
        with self._lock:
            self._closed = True
            streams = list(self._open)
        for stream in streams:
            stream.cancelled.set()
        until = None if patience is None else time.monotonic() + patience
        for stream in streams:
            stream.ended.wait(None if until is None else max(until - time.monotonic(), 0))
        self.runner.close()

    def _run(self, stream: Stream) -> None:
        try:
            stream.run(self._told(stream))
        finally:
            with self._lock:
                self._open.discard(stream)
            stream.ended.set()

    def _told(self, stream: Stream) -> Iterator[Any]:
        """The wheel's chunks. It gives up a request when nobody holds its stream any more."""
        with self._turn:
            if stream.cancelled.is_set():
                return
            told = self.runner.call("send_chat_completion_request", self._request(**stream.arguments))
            first = next(told, None)
        if first is not None:
            yield first
            yield from told


class Stream:
    """One choice on its way."""

    def __init__(self, arguments: Any, answer: Answer, mailbox: Mailbox) -> None:
        self.arguments, self.answer, self._mailbox = arguments, answer, mailbox
        self.cancelled = threading.Event()
        self.ended = threading.Event()

    def run(self, told: Iterator[Any]) -> None:
        """Read to the end, whatever that is: each choice ends in one final chunk, or the request is refused."""
        answer, begun = self.answer, False
        try:
            for chunk in told:
                begun = True
                if self.cancelled.is_set():
                    break
                ours = answer.push(chunk)
                if ours is not None:
                    wake([reader] if (reader := self._mailbox.put(ours)) else [])
                if answer.done:
                    return
        except BaseException as error:  # a panic of Rust's is no Exception
            ours_ = public(error, "The request was not answered", answer.prompt_tokens)
            if not begun and isinstance(ours_, (InvalidRequest, OutOfMemory)):
                wake([reader] if (reader := self._mailbox.refuse(ours_)) else [])
            else:
                self._end("error", ours_)
        else:
            self._end(*_unfinished(self.cancelled.is_set()))
        finally:
            told.close()  # type: ignore[attr-defined]  # a generator: closing it gives the wheel's stream up

    def _end(self, reason: Any, error: TramontaneError | None) -> None:
        reader = self._mailbox.put(self.answer.end(reason, error))
        wake([reader] if reader else [])


def _unfinished(cancelled: bool) -> tuple[str, TramontaneError | None]:
    if cancelled:
        return "cancelled", None
    return "error", TramontaneError("mistral.rs ended an answer without a reason.", "Try again.")
