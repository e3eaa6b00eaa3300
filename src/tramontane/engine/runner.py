"""Runner: computes a Step: copies, batch, forward, draws.

Owns the order of a step on one device and the memory that a step needs. Must not know: requests, queues, how steps
are scheduled, how weights are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Protocol, TypeVar

import numpy as np

from tramontane.engine.batch import BatchBuilder
from tramontane.engine.sampler import Sampler, token_info
from tramontane.engine.step import Row, SequenceResult, Step, StepResult, TokenInfo
from tramontane.kernels import Array, Ops
from tramontane.kernels.plans import Plans
from tramontane.kernels.workspace import Workspace
from tramontane.layers.context import REPLAYED_ROWS, BatchContext
from tramontane.layers.kvcache import KVCache
from tramontane.loading.memory import LOGITS_ROWS
from tramontane.text.grammar import Grammars

T = TypeVar("T")


class Model(Protocol):
    """What a runner runs: `models.decoder.Decoder`, or anything with its two calls."""

    replayable: bool
    """Whether ops are all that these calls compute with."""

    def forward(self, batch: BatchContext, cache: KVCache, workspace: Workspace) -> Array:
        """Hidden states [T,H] of the batch; its keys and values are in the cache afterwards."""
        ...

    def logits(self, hidden: Array, rows: Array, workspace: Workspace) -> Array:
        """float32 [R,V] for the rows (int32 [R]) of hidden; in the workspace, free to be overwritten."""
        ...


class Runner:
    """Runs steps one after the other on one device. Not thread-safe."""

    def __init__(
        self,
        model: Model,
        ops: Ops,
        cache: KVCache,
        *,
        block_size: int,
        num_groups: int,
        context_length: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        workspace: Workspace | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """`workspace`: of at least `max_num_batched_tokens` rows, shared with what runs in turn; None: its own.
        `grammars`: of the model's tokens; without them a draw with a grammar fails."""
        self._model, self._ops, self._cache = model, ops, cache
        self._batches = BatchBuilder(
            ops,
            block_size=block_size,
            num_groups=num_groups,
            max_tokens=max_num_batched_tokens,
            max_seqs=max_num_seqs,
            max_blocks=-(-context_length // block_size),
        )
        self._workspace = workspace or Workspace(ops, max_num_batched_tokens)
        self._row_space = Workspace(ops, LOGITS_ROWS)
        self._wanted = np.empty(LOGITS_ROWS, np.int32)
        self._plans = Plans(ops)
        self._sampler = Sampler(ops, self._row_space, max_histories=2 * max_num_seqs, grammars=grammars)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the buffers that steps have asked for so far."""
        return self._workspace.nbytes + self._row_space.nbytes

    def run(self, step: Step) -> StepResult:
        """Compute the step. Raises InvalidRequest where a custom logits processor breaks its contract."""
        if step.copies:
            self._cache.copy(step.copies)
        if step.state_copies:
            self._cache.copy_states(step.state_copies)
        if not step.sequences:
            return StepResult(step.id, ())
        rows = step.rows()
        self._sampler.begin([row.draw for row in rows], [row.key for row in rows])
        batch = self._batches.build(step)
        forward = partial(self._model.forward, batch, self._cache, self._workspace)
        hidden = self._replayed(batch.num_tokens, ("forward", *batch.shape), forward)
        ends = list(accumulate(len(s.tokens) for s in step.sequences))
        draws = self._draws(rows, hidden, ends)
        prompts = self._prompt_logprobs(step, hidden, ends)
        self._ops.synchronize()
        return StepResult(
            step.id,
            tuple(
                SequenceResult(s.sequence_id, tuple(draws[index]), tuple(prompts[index]))
                for index, s in enumerate(step.sequences)
            ),
        )

    def _replayed(self, rows: int, key: Hashable, compute: Callable[[], Array]) -> Array:
        """What `compute` gives, recorded under `key` where calling op after op would take a part of its time."""
        return self._plans.run(key, compute) if self._model.replayable and rows <= REPLAYED_ROWS else compute()

    def _logits(self, hidden: Array, rows: Sequence[int]) -> Array:
        wanted = self._wanted[: len(rows)]
        wanted[:] = rows
        logits = partial(self._model.logits, hidden, self._ops.from_host(wanted), self._row_space)
        step_rows = int(hidden.shape[0])
        return self._replayed(step_rows, ("logits", step_rows, len(rows)), logits)

    def _draws(self, rows: Sequence[Row], hidden: Array, ends: Sequence[int]) -> list[list[TokenInfo]]:
        """The tokens drawn, a list a sequence."""
        results: list[list[TokenInfo]] = [[] for _ in ends]
        for piece in _pieces([row for row in rows if not row.draw.candidates]):
            logits = self._logits(hidden, [ends[row.index] - 1 for row in piece])
            infos = self._sampler.sample(logits, [row.draw for row in piece], [row.key for row in piece])
            for row, info in zip(piece, infos, strict=True):
                results[row.index].append(info)
        for piece in _pieces([row for row in rows if row.draw.candidates]):
            logits = self._logits(hidden, [ends[row.index] - 1 for row in piece])
            found = self._sampler.expand(logits, [row.draw for row in piece], [row.key for row in piece])
            for row, candidates in zip(piece, found, strict=True):
                results[row.index] = candidates
        return results

    def _prompt_logprobs(self, step: Step, hidden: Array, ends: Sequence[int]) -> list[list[TokenInfo]]:
        """What is reported of the prompts' tokens, a list a sequence."""
        wanted = [
            (index, ends[index] - len(sequence.tokens) + at, target, sequence.prompt_logprobs)
            for index, sequence in enumerate(step.sequences)
            if sequence.prompt_logprobs is not None
            for at, target in enumerate(sequence.targets)
        ]
        results: list[list[TokenInfo]] = [[] for _ in step.sequences]
        for piece in _pieces(wanted):
            logits = self._logits(hidden, [row for _, row, _, _ in piece])
            self._ops.log_softmax(logits, logits)
            for (index, _, target, alternatives), logprobs in zip(piece, self._ops.to_host(logits), strict=True):
                results[index].append(token_info(target, logprobs, alternatives))
        return results


def _pieces(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """So that a large vocabulary takes the memory of so many rows, however many are wanted."""
    return (items[at : at + LOGITS_ROWS] for at in range(0, len(items), LOGITS_ROWS))
