"""From a Step to the arrays that layers see: fixed host buffers, filled anew each step.

Owns the buffers and the arithmetic of positions and slots. Must not know: sampling, requests, blocks' bookkeeping.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np
from numpy.typing import NDArray

from tramontane.engine.step import Step
from tramontane.kernels import Ops
from tramontane.layers.context import BatchContext, GroupContext

IntArray = NDArray[np.int32]


class BatchBuilder:
    """Builds a `BatchContext` a step. The arrays of one step are overwritten by the next; on the CPU those of steps of
    one shape lie in the same places. Not thread-safe."""

    def __init__(
        self, ops: Ops, *, block_size: int, num_groups: int, max_tokens: int, max_seqs: int, max_blocks: int
    ) -> None:
        """`max_blocks`: blocks that one sequence may span. Buffers count as memory once a step touches them."""
        self._ops = ops
        self._block_size = block_size
        self._max_tokens, self._max_seqs = max_tokens, max_seqs
        self._tokens = np.empty(max_tokens, np.int32)
        self._positions = np.empty(max_tokens, np.int32)
        self._query_start = np.zeros(max_seqs + 1, np.int32)
        self._context_lens = np.empty(max_seqs, np.int32)
        self._states = np.empty(max_seqs, np.int32)
        self._slots = [np.empty(max_tokens, np.int32) for _ in range(num_groups)]
        self._tables = [_Tables(max_seqs, max_blocks) for _ in range(num_groups)]

    def build(self, step: Step) -> BatchContext:
        """The step's batch. Raises ValueError for a step beyond the buffers or a token without a block."""
        sequences = step.sequences
        count, total = len(sequences), step.num_tokens
        if total > self._max_tokens or count > self._max_seqs:
            raise ValueError(
                f"a step of {total} tokens in {count} sequences exceeds {self._max_tokens} tokens in {self._max_seqs}"
            )
        # Plain lists: most steps have a token a sequence, for which a call of numpy takes longer than all of them.
        ends = [s.start + len(s.tokens) for s in sequences]
        positions = list(chain.from_iterable(range(s.start, end) for s, end in zip(sequences, ends, strict=True)))
        starts = list(accumulate((len(s.tokens) for s in sequences), initial=0))
        device = self._ops.from_host
        return BatchContext(
            num_tokens=total,
            num_seqs=count,
            tokens=device(_filled(self._tokens, list(chain.from_iterable(s.tokens for s in sequences)))),
            positions=device(_filled(self._positions, positions)),
            query_start=device(_filled(self._query_start, starts)),
            context_lens=device(_filled(self._context_lens, ends)),
            extents=[(len(s.tokens), end) for s, end in zip(sequences, ends, strict=True)],
            states=device(_filled(self._states, [s.state for s in sequences])),
            groups=tuple(self._group(group, step) for group in range(len(self._tables))),
            rope_lengths=_rope_lengths(step),
        )

    def _group(self, group: int, step: Step) -> GroupContext:
        size, slots = self._block_size, []
        for sequence in step.sequences:
            table, end = sequence.block_tables[group], sequence.start + len(sequence.tokens)
            if len(table) * size < end:
                raise ValueError(f"step {step.id}: a block table is shorter than its sequence")
            for position in range(sequence.start, end):
                if table[position // size] < 0:
                    raise ValueError(f"step {step.id}: a token has no block to be written to")
                slots.append(table[position // size] * size + position % size)
        tables = self._tables[group].fill([s.block_tables[group] for s in step.sequences])
        filled = _filled(self._slots[group], slots)
        return GroupContext(slots=self._ops.from_host(filled), block_tables=self._ops.from_host(tables))


def _filled(buffer: IntArray, values: list[int]) -> IntArray:
    """The values, at the start of the buffer."""
    part = buffer[: len(values)]
    part[:] = values
    return part


def _rope_lengths(step: Step) -> IntArray | None:
    """int32 [T]; None where the length of sequences has no part in their positions."""
    if not any(s.rope_length for s in step.sequences):
        return None
    lengths = (max(s.rope_length, s.start + i + 1) for s in step.sequences for i in range(len(s.tokens)))
    return np.fromiter(lengths, np.int32, step.num_tokens)


class _Tables:
    """One group's block tables. A row is written only when its table differs from the one it holds."""

    def __init__(self, max_seqs: int, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._flat = np.empty(max_seqs * max_blocks, np.int32)
        self._held: list[Sequence[int] | None] = [None] * max_seqs
        self._width = 0

    def fill(self, tables: Sequence[tuple[int, ...]]) -> IntArray:
        """int32 [len(tables), B], -1 past the end of a table; B leaves room so that it seldom changes."""
        longest = max(map(len, tables), default=1)
        if longest > self._max_blocks:
            raise ValueError(f"a table of {longest} blocks exceeds {self._max_blocks}")
        width = min(1 << (longest - 1).bit_length(), self._max_blocks)
        if width != self._width:
            self._width = width
            self._held = [None] * len(self._held)
        rows = self._flat[: len(tables) * width].reshape(len(tables), width)
        for index, table in enumerate(tables):
            if table != self._held[index]:
                rows[index, : len(table)] = table
                rows[index, len(table) :] = -1
                self._held[index] = table
        return rows
