"""Encoder: reads whole texts and pools the states of their tokens; nothing is drawn, nothing stays in a cache.

Owns the order in which texts are read, and scratch memory for their keys and values. Callers take turns, a text each; a
batch is as many whole texts as a step has tokens for. Must not know: tokenizers, what becomes of the pooled states,
the scheduler: whoever owns the engine runs a step of each in turn, so that answers go on beside long lists of texts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tramontane.engine.batch import BatchBuilder
from tramontane.engine.step import ScheduledSequence, Step
from tramontane.errors import OutOfMemory
from tramontane.kernels.workspace import Workspace
from tramontane.layers.kvcache import KVCache
from tramontane.loading.memory import block_bytes, shown
from tramontane.models.decoder import Decoder
from tramontane.models.heads import Floats, Pool
from tramontane.models.spec import cache_groups
from tramontane.platform import available_memory
from tramontane.records import dataclass
from tramontane.types import Pooling

if TYPE_CHECKING:
    from tramontane.models.fallback import FallbackModel


@dataclass(frozen=True)
class Text:
    """Tokens to be read together."""

    tokens: tuple[int, ...]
    types: tuple[int, ...] | None = None
    """Of each token, for models that tell a first text from a second; None: all are of the first."""
    skip: int = 0
    """So many of the first tokens are not pooled."""


class Task:
    """One caller's texts. `future` gets the pooled states float32 [modes * H] of each; cancelling it ends the work."""

    def __init__(self, texts: Sequence[Text], modes: Sequence[Pooling]) -> None:
        """`texts` of at least one token each."""
        self.future: Future[list[Floats]] = Future()
        self._modes = tuple(modes)
        self._unread = deque(enumerate(texts))
        self._vectors: dict[int, Floats] = {}
        self._count = len(texts)

    @property
    def head(self) -> Text | None:
        """The text to be read next; None where all are, or nobody waits for them any more."""
        return self._unread[0][1] if self._unread and not self.future.done() else None

    def take(self) -> _Reading:
        """Begin to read the next text."""
        index, text = self._unread.popleft()
        return _Reading(self, index, text, Pool(self._modes, len(text.tokens), text.skip))

    def finish(self, index: int, vector: Floats) -> None:
        """One text has been read."""
        self._vectors[index] = vector
        self.answer()

    def answer(self) -> None:
        """Hand over the states, once those of all texts are there, unless the caller has left."""
        if len(self._vectors) == self._count and self.future.set_running_or_notify_cancel():
            self.future.set_result([self._vectors[i] for i in range(self._count)])

    def fail(self, error: Exception) -> None:
        """Nothing more will come."""
        self._unread.clear()
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@dataclass
class _Reading:
    """A text on its way through the model."""

    task: Task
    index: int
    text: Text
    pool: Pool
    seen: int = 0
    """Tokens that have been read."""

    @property
    def left(self) -> int:
        return len(self.text.tokens) - self.seen


class Encoder:
    """Reads texts with one model on one device. Not thread-safe."""

    def __init__(
        self,
        decoder: Decoder | FallbackModel,
        workspace: Workspace,
        *,
        block_size: int,
        context_length: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        cache_dtype: str,
        turn: AbstractContextManager[object] | None = None,
    ) -> None:
        """`workspace`: a longer text than it has rows is read in pieces of `max_num_batched_tokens`, as only a causal
        model can; `cache_dtype`: of the keys and values between such pieces. `turn`: held while a step runs."""
        self._decoder: Decoder | FallbackModel | None = decoder
        self._workspace: Workspace | None = workspace
        self._longest_whole = workspace.max_rows
        self._block_size, self._context_length = block_size, context_length
        self._max_tokens, self._max_seqs = max_num_batched_tokens, max_num_seqs
        self._groups = len(cache_groups(decoder.spec))
        self._cache_dtype = cache_dtype
        self._turn = turn or nullcontext()
        self._tasks: deque[Task] = deque()
        self._builder: BatchBuilder | None = None
        self._scratch: KVCache | None = None
        self._long: tuple[_Reading, KVCache] | None = None
        self._others = False
        self._closed: Exception | None = None

    @property
    def has_work(self) -> bool:
        return bool(self._tasks) or self._long is not None

    def add(self, task: Task) -> None:
        """Queue a task."""
        if self._closed is not None:
            task.fail(self._closed)
        elif task.head is None:
            task.answer()
        else:
            self._tasks.append(task)

    def close(self, error: Exception) -> None:
        """Fail what is queued, and all that comes, with `error`; let go of weights and memory."""
        self._closed = error
        tasks = [*self._tasks, *([self._long[0].task] if self._long else [])]
        self._tasks.clear()
        self._long = self._scratch = self._builder = self._decoder = self._workspace = None
        for task in tasks:
            task.fail(error)

    def step(self) -> None:
        """Read one batch. What fails in it fails the tasks that have texts there."""
        readings = self._take()
        try:
            if readings and self._decoder is not None and self._workspace is not None:
                with self._turn:
                    self._read(readings, self._decoder, self._workspace)
        except Exception as error:
            for reading in readings:
                self._forget(reading)
                reading.task.fail(error)

    def _take(self) -> list[_Reading]:
        """The texts of the next batch: a piece of a long one by itself, and whole ones in every second step."""
        if self._long is not None and self._long[0].task.future.done():
            self._long = None
        if self._long is None:
            return self._batch()
        self._others = not self._others
        return (self._batch() if self._others else []) or [self._long[0]]

    def _batch(self) -> list[_Reading]:
        """As many texts as a step has room for; where one is being read in pieces, others like it wait."""
        readings: list[_Reading] = []
        waiting: list[Task] = []
        room = self._max_tokens
        while self._tasks and len(readings) < self._max_seqs:
            task = self._tasks[0]
            text = task.head
            if text is not None and readings and len(text.tokens) > room:
                break
            self._tasks.popleft()
            if text is None:
                continue
            if self._long is not None and len(text.tokens) > self._longest_whole:
                waiting.append(task)
                continue
            room -= len(text.tokens)
            readings.append(task.take())
            if task.head is not None:
                self._tasks.append(task)
        self._tasks.extendleft(reversed(waiting))
        return readings

    def _forget(self, reading: _Reading) -> None:
        """It is not read any more: give back what is its alone."""
        if self._long is not None and self._long[0] is reading:
            self._long = None

    def _read(self, readings: list[_Reading], decoder: Decoder | FallbackModel, workspace: Workspace) -> None:
        ops = decoder.ops
        if self._builder is None:
            self._builder = BatchBuilder(
                ops,
                block_size=self._block_size,
                num_groups=self._groups,
                max_tokens=self._longest_whole,
                max_seqs=self._max_seqs,
                max_blocks=-(-self._context_length // self._block_size),
            )
        cache, sequences = self._placed(readings, decoder)
        batch = self._builder.build(Step(0, tuple(sequences)))
        if decoder.spec.token_types:
            types = [kind for one in readings for kind in one.text.types or (0,) * len(one.text.tokens)]
            batch = replace(batch, token_types=ops.from_host(np.array(types, np.int32)))
        states = ops.to_host(decoder.forward(batch, cache, workspace))
        at = 0
        for reading, sequence in zip(readings, sequences, strict=True):
            count = len(sequence.tokens)
            reading.pool.add(states[at : at + count])
            reading.seen += count
            at += count
            if not reading.left:
                self._forget(reading)
                reading.task.finish(reading.index, reading.pool.vector())

    def _placed(
        self, readings: list[_Reading], decoder: Decoder | FallbackModel
    ) -> tuple[KVCache, list[ScheduledSequence]]:
        """Where the texts' keys and values go: whole texts one behind the other into memory that all layers share; a
        piece of a long one behind the pieces before it, in a cache of its own."""
        first = readings[0]
        if len(first.text.tokens) > self._longest_whole:
            blocks = self._blocks(first.text)
            if self._long is None:
                self._check_room(first.text, blocks, decoder)
                cache = decoder.new_cache(blocks * self._groups, self._block_size, self._cache_dtype, num_states=1)
                self._long = first, cache
            tables = tuple(tuple(range(group * blocks, (group + 1) * blocks)) for group in range(self._groups))
            piece = first.text.tokens[first.seen : first.seen + self._max_tokens]
            whole = len(first.text.tokens)
            return self._long[1], [ScheduledSequence(0, first.seen, piece, tables, state=0, rope_length=whole)]
        if self._scratch is None:
            blocks = -(-self._longest_whole // self._block_size) + self._max_seqs
            self._scratch = decoder.new_scratch(blocks, self._block_size)
        sequences, at = [], 0
        for number, reading in enumerate(readings):
            end = at + self._blocks(reading.text)
            tables = (tuple(range(at, end)),) * self._groups
            tokens = reading.text.tokens
            sequences.append(ScheduledSequence(number, 0, tokens, tables, rope_length=len(tokens)))
            at = end
        return self._scratch, sequences

    def _check_room(self, text: Text, blocks: int, decoder: Decoder | FallbackModel) -> None:
        """The cache of a text in pieces comes on top of what was configured."""
        needed = blocks * self._groups * block_bytes(decoder.spec, self._block_size, self._cache_dtype)
        free = decoder.ops.free_memory()
        free = available_memory() if free is None else free
        if needed > free:
            raise OutOfMemory(
                f"a text of {len(text.tokens)} tokens is read in pieces and needs a cache of {shown(needed)}; "
                f"{shown(free)} are free",
                "Pass shorter texts, or raise max_num_batched_tokens so that it is read whole.",
            )

    def _blocks(self, text: Text) -> int:
        return -(-len(text.tokens) // self._block_size)
