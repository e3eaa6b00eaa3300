"""EngineLoop: the one thread that owns an engine.

Owns the thread, the queue by which commands enter, and the open requests' answers and mailboxes. Must not know: models,
files, how prompts became tokens.

Whatever a step brings leaves through a mailbox a request, without waiting for its reader. With nothing to do the
thread sleeps on its queue. If the engine itself breaks, every open request ends with the error and the loop is dead.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from tramontane.backends.answer import Answer
from tramontane.backends.mailbox import Mailbox, Reader, wake
from tramontane.backends.prepare import Prepared
from tramontane.engine.edits import FloatArray
from tramontane.engine.encoder import Encoder, Task, Text
from tramontane.engine.engine import Engine
from tramontane.engine.executor import Executor
from tramontane.engine.sampler import apply_processor
from tramontane.engine.sequence import Event
from tramontane.errors import EngineClosed, OutOfMemory, TramontaneError
from tramontane.models.heads import Floats
from tramontane.platform import Pin
from tramontane.records import dataclass
from tramontane.text.tokenizer import Tokenizer
from tramontane.tracing import Trace
from tramontane.types import AllocationListener, Chunk, FinishReason, LogitsProcessor, Pooling, Stats

log = logging.getLogger("tramontane")

Command = Callable[[], None]


class _Guard:
    """A user's logits processor whose failure ends its own request and no other's."""

    def __init__(self, processor: LogitsProcessor, pin: Pin) -> None:
        self._processor, self._pin = processor, pin
        self.error: Exception | None = None

    def __call__(self, prompt_ids: Sequence[int], output_ids: Sequence[int], logits: FloatArray) -> FloatArray:
        if self.error is None:
            try:
                with self._pin.lifted():
                    return apply_processor(self._processor, prompt_ids, output_ids, logits)
            except Exception as error:
                self.error = error
        return logits


@dataclass
class _Open:
    """A request that has not ended."""

    mailbox: Mailbox
    answers: dict[int, Answer]
    guards: tuple[_Guard, ...]


class EngineLoop:
    """Runs an engine on a daemon thread from construction on. Every method may be called from any thread."""

    def __init__(
        self,
        engine: Engine,
        executor: Executor,
        encoder: Encoder | None,
        tokenizer: Tokenizer,
        name: str = "engine",
        trace: Trace | None = None,
        pin: Pin | None = None,
    ) -> None:
        """Takes over `engine`, `executor` and `encoder`: closes the latter two when it stops. `encoder`: None where
        `encode` is never called. `trace`: is told of steps, waiting and requests. `pin`: holds the
        thread, lifted for logits processors, whose own threads would inherit it."""
        self._engine, self._executor, self._encoder, self._tokenizer = engine, executor, encoder, tokenizer
        self._trace, self._pin = trace, pin or Pin(None)
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._open: dict[str, _Open] = {}
        self._waiting: list[tuple[str, Mailbox, Reader]] = []  # for what has been put since the last `_wake`
        self._lock = threading.RLock()  # the garbage collector may call `stop` wherever it runs
        self._closed: EngineClosed | None = None
        self._stats = engine.stats()
        self._thread = threading.Thread(target=self._run, name=f"tramontane-{name}", daemon=True)
        self._thread.start()

    # ---- for other threads

    def submit(self, prepared: Prepared) -> Mailbox:
        """Hand a request to the engine. Its mailbox gets the answer, or refuses with what the engine says of it.

        Raises EngineClosed.
        """
        mailbox = Mailbox()
        self.call(lambda: self._add(prepared, mailbox))
        return mailbox

    def encode(self, texts: Sequence[Text], modes: Sequence[Pooling]) -> Future[list[Floats]]:
        """Have texts read, a batch of them between any two steps, and their states pooled: see `Task`.

        Raises EngineClosed, which the future also has where the engine is closed meanwhile.
        """
        encoder = self._encoder
        if encoder is None:
            raise RuntimeError("this loop reads no texts")
        task = Task(texts, modes)
        self.call(lambda: encoder.add(task))
        return task.future

    def cancel(self, request_id: str, mailbox: Mailbox) -> None:
        """End the request whose mailbox this is; nothing happens where it has ended."""
        try:
            self.call(lambda: self._cancel(request_id, mailbox))
        except EngineClosed:
            return  # then it has ended

    def call(self, command: Command) -> None:
        """Run something on the engine's thread between two steps. Raises EngineClosed."""
        with self._lock:  # so that nothing is queued after the thread has looked for the last time
            if self._closed is not None:
                raise EngineClosed(*self._closed.args)
            self._commands.put(command)

    def add_listener(self, listener: AllocationListener) -> None:
        """Tell the listener of what is submitted from now on. Raises EngineClosed."""
        self.call(lambda: self._engine.scheduler.add_listener(listener))

    def stats(self) -> Stats:
        """As of the last step."""
        return self._stats

    def stop(self, timeout: float | None = None) -> None:
        """End every open request as cancelled, and the thread after its current step. May be called twice."""
        with self._lock:
            if self._closed is None:
                self._commands.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    # ---- on the engine's thread

    def _run(self) -> None:
        with self._pin:
            self._serve()

    def _serve(self) -> None:
        closed = EngineClosed("The engine was closed.", "Load the model again.")
        try:
            while self._take_commands():
                self._step()
                if self._encoder is not None:
                    self._encoder.step()
            for request_id, open_ in list(self._open.items()):
                self._cancel(request_id, open_.mailbox)
            self._report()
        except Exception as error:
            log.exception("the engine failed and is closed")
            closed = EngineClosed(f"The engine failed: {error!r}.", "Load the model again.")
            closed.__cause__ = error
        finally:
            self._shut(closed)

    def _take_commands(self) -> bool:
        """Run what is queued, waiting for it while there is nothing else to do; False when told to stop."""
        try:
            while True:
                command = self._next_command()
                if command is None:
                    return False
                command()
                del command  # it may be long until the next one
                self._report()
        except queue.Empty:
            return True

    def _next_command(self) -> Command | None:
        """Raises queue.Empty where there is none, and something else to do."""
        if self._has_work:
            return self._commands.get(block=False)
        with self._span("waiting"):
            return self._commands.get()

    def _span(self, name: str) -> AbstractContextManager[object]:
        return nullcontext() if self._trace is None else self._trace.span(name, "engine")

    def _mark(self, phase: str, request_id: str, choice: int, **told: object) -> None:
        if self._trace is not None:
            self._trace.mark(phase, "request", "request", f"{request_id}/{choice}", **told)

    @property
    def _has_work(self) -> bool:
        return bool(self._open) or (self._encoder is not None and self._encoder.has_work)

    def _shut(self, closed: EngineClosed) -> None:
        """Refuse all that comes; what is still open, the engine can no longer end."""
        with self._lock:
            self._closed = closed
        for open_ in self._open.values():
            self._end(open_, "error", closed)
        self._open.clear()
        if self._encoder is not None:
            self._encoder.close(closed)
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None:
                command()  # finds the loop closed
        self._wake()
        self._executor.close()
        if self._trace is not None:
            self._trace.flush()

    def _add(self, prepared: Prepared, mailbox: Mailbox) -> None:
        if self._closed is not None:
            self._refuse(mailbox, EngineClosed(*self._closed.args))
            return
        guards = tuple(_Guard(processor, self._pin) for processor in prepared.request.params.logits_processors or ())
        request = replace(prepared.request, params=replace(prepared.request.params, logits_processors=guards))
        held = replace(prepared, request=request)
        try:
            answers = {index: Answer(self._tokenizer, held, index=index) for index in range(request.num_choices)}
            self._engine.add(request)
        except Exception as error:
            self._refuse(mailbox, public(error, "The request was not accepted"))
            return
        self._open[request.id] = _Open(mailbox, answers, guards)
        for index in answers:
            self._mark("b", request.id, index, prompt_tokens=len(request.prompt_ids))

    def _cancel(self, request_id: str, mailbox: Mailbox) -> None:
        open_ = self._open.get(request_id)
        if open_ is not None and open_.mailbox is mailbox:  # the id may be another request's by now
            del self._open[request_id]
            self._engine.abort(request_id)
            self._end(open_, "cancelled")

    def _step(self) -> None:
        if not self._open:
            return
        with self._span("step"):
            events = self._engine.step()
        with self._span("text"):
            self._hand_out(events)
        self._report()

    def _hand_out(self, events: Sequence[Event]) -> None:
        for event in events:
            open_ = self._open.get(event.request_id)
            if open_ is None:  # its reader has gone, or its processor failed
                continue
            error = next((guard.error for guard in open_.guards if guard.error is not None), None)
            if error is None:
                self._deliver(event, open_)
            else:
                self._fail(event.request_id, open_, public(error, "A logits processor failed"))

    def _fail(self, request_id: str, open_: _Open, error: TramontaneError) -> None:
        del self._open[request_id]
        self._engine.abort(request_id, reason="error")
        self._end(open_, "error", error)

    def _deliver(self, event: Event, open_: _Open) -> None:
        answer = open_.answers.get(event.index)
        if answer is None:  # a stop string ended it in this very step
            return
        chunk = _chunk(answer, event)
        self._mark("n", event.request_id, event.index, tokens=len(event.tokens))
        if chunk.finish_reason is not None:
            del open_.answers[event.index]
            self._mark("e", event.request_id, event.index, reason=chunk.finish_reason)
            if event.finish_reason is None:
                self._engine.finish(event.request_id, event.index, chunk.stop_reason)
        if not open_.answers:
            del self._open[event.request_id]
        self._put(event.request_id, open_.mailbox, chunk)

    def _end(self, open_: _Open, reason: FinishReason, error: Exception | None = None) -> None:
        for answer in open_.answers.values():
            chunk = answer.end(reason, error)
            self._put(chunk.request_id, open_.mailbox, chunk)
            self._mark("e", chunk.request_id, chunk.index, reason=reason)
        open_.answers.clear()

    def _put(self, request_id: str, mailbox: Mailbox, chunk: Chunk) -> None:
        reader = mailbox.put(chunk)
        if reader is not None:
            self._waiting.append((request_id, mailbox, reader))

    def _refuse(self, mailbox: Mailbox, error: Exception) -> None:
        reader = mailbox.refuse(error)
        if reader is not None:
            wake([reader])

    def _report(self) -> None:
        """Let readers and statistics know what has happened; what nobody can read any more is cancelled."""
        self._stats = self._engine.stats()  # first: who has read an answer's end must find it counted
        gone = self._wake()
        for request_id, mailbox in gone:
            self._cancel(request_id, mailbox)
        if gone:
            self._stats = self._engine.stats()

    def _wake(self) -> list[tuple[str, Mailbox]]:
        """Wake the readers of all that has been put. Returns what nobody can read any more."""
        waiting, self._waiting = self._waiting, []
        closed = wake(reader for _, _, reader in waiting)
        return [(request_id, mailbox) for request_id, mailbox, reader in waiting if reader.loop in closed]


def _chunk(answer: Answer, event: Event) -> Chunk:
    if event.finish_reason in ("cancelled", "error"):
        error = None if event.error is None else public(event.error, "A step failed")
        return answer.end(event.finish_reason, error, event.cached_tokens)
    stop_token = event.stop_reason if isinstance(event.stop_reason, int) else None
    chunk = answer.push(event.tokens, event.finish_reason, stop_token, event.cached_tokens, event.prompt_logprobs)
    return chunk if event.score is None else replace(chunk, score=event.score)


def public(error: BaseException, what: str) -> TramontaneError:
    """The error as one of the family; `what` says what did not work."""
    if isinstance(error, TramontaneError):
        return error
    ours = OutOfMemory(f"{what}: {error}") if isinstance(error, MemoryError) else TramontaneError(f"{what}: {error!r}.")
    ours.__cause__ = error
    return ours
