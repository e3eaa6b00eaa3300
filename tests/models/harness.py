"""A decoder driven by hand: sequences, block tables and batches without an engine.

`Rig` gives out shuffled, non-contiguous blocks of one pool to all cache groups, and takes back (and so overwrites) what
has left a window, as an engine does.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kernels.modules import MODULES, make
from tramontane.kernels.workspace import Workspace
from tramontane.layers.context import BatchContext, GroupContext
from tramontane.models.decoder import Decoder
from tramontane.models.spec import cache_groups

__all__ = ["KERNELS", "MAIN", "Rig", "make"]

KERNELS = [kind for kind in MODULES if "deterministic" not in str(kind.values[0])]
"""The kernel modules of this machine, for `pytest.mark.parametrize` and fixtures; `make` builds their ops."""
MAIN = KERNELS[1]
"""The compiled module in its best instruction set. The kernels' own tests hold the others to the same values."""


@dataclass
class Sequence_:
    """One sequence: its tokens in the cache, and a block table a cache group."""

    tables: list[list[int]]
    tokens: list[int] = field(default_factory=list)
    length: int = 0
    """What its positions are stretched for, where that is more than it has tokens."""
    state: int = -1


class Rig:
    """Runs steps of a decoder over a small paged cache."""

    def __init__(self, decoder: Decoder, *, block_size: int = 4, num_blocks: int = 160, dtype: str = "float32") -> None:
        self.decoder, self.ops, self.block_size = decoder, decoder.ops, block_size
        self.groups = cache_groups(decoder.spec)
        self.states = list(range(40)) if decoder.spec.states else []
        random.Random(4).shuffle(self.states)
        self.cache = decoder.new_cache(num_blocks, block_size, dtype, num_states=len(self.states))
        self.workspace = Workspace(self.ops, 256)
        self.free = list(range(num_blocks))
        random.Random(3).shuffle(self.free)

    def sequence(self) -> Sequence_:
        return Sequence_([[] for _ in self.groups], state=self._state())

    def _state(self) -> int:
        """A place for a state, which nobody gives back; -1 of a model without."""
        return self.states.pop() if self.cache.num_states else -1

    def fork(self, parent: Sequence_, blocks: int) -> Sequence_:
        """A sequence that starts with the parent's first full blocks, shared, and a copy of its state; the parent must
        be as long as that where the model has states."""
        tables = [table[:blocks] for table in parent.tables]
        state = self._state()
        self.cache.copy_states([(parent.state, state)])
        return Sequence_(tables, parent.tokens[: blocks * self.block_size], state=state)

    def step(self, *work: tuple[Sequence_, Sequence[int]]) -> list[NDArray[Any]]:
        """Feed each sequence its next tokens, all in one batch; logits [n, V] of all fed positions, a sequence each."""
        tokens: list[int] = []
        positions: list[int] = []
        lens, starts, lengths = [], [0], []
        slots: list[list[int]] = [[] for _ in self.groups]
        for sequence, fed in work:
            begin = len(sequence.tokens)
            sequence.tokens += fed
            tokens += fed
            positions += range(begin, len(sequence.tokens))
            lens.append(len(sequence.tokens))
            lengths += [max(sequence.length, len(sequence.tokens))] * len(fed)
            starts.append(len(tokens))
            for table, slots_of in zip(sequence.tables, slots, strict=True):
                while len(table) * self.block_size < len(sequence.tokens):
                    table.append(self.free.pop())
                slots_of += [
                    table[p // self.block_size] * self.block_size + p % self.block_size
                    for p in range(begin, len(sequence.tokens))
                ]
        groups = tuple(
            GroupContext(self._ints(group_slots), self._table([s.tables[group] for s, _ in work]))
            for group, group_slots in enumerate(slots)
        )
        batch = BatchContext(
            num_tokens=len(tokens),
            num_seqs=len(work),
            tokens=self._ints(tokens),
            positions=self._ints(positions),
            query_start=self._ints(starts),
            context_lens=self._ints(lens),
            extents=[(len(fed), end) for (_, fed), end in zip(work, lens, strict=True)],
            groups=groups,
            rope_lengths=np.array(lengths, np.int32),
            states=self._ints(sequence.state for sequence, _ in work),
        )
        hidden = self.decoder.forward(batch, self.cache, self.workspace)
        logits = self.decoder.logits(hidden, self._ints(range(len(tokens))), self.workspace)
        self.ops.synchronize()
        result = np.array(self.ops.to_host(logits))
        for sequence, _ in work:
            self._leave_windows(sequence)
        return [result[a:b] for a, b in pairwise(starts)]

    def run(self, tokens: Sequence[int], chunks: Iterable[int] = ()) -> NDArray[Any]:
        """Logits [len(tokens), V] of a new sequence, fed in chunks of these sizes and then the rest at once."""
        sequence, out, at = self.sequence(), [], 0
        sequence.length = len(tokens)
        for size in (*chunks, len(tokens)):
            if at < len(tokens):
                out += self.step((sequence, tokens[at : at + size]))
                at += size
        return np.concatenate(out)

    def _leave_windows(self, sequence: Sequence_) -> None:
        for group, table in zip(self.groups, sequence.tables, strict=True):
            unseen = len(sequence.tokens) - (group.window or len(sequence.tokens) + 1) + 1
            for index in range(max(unseen, 0) // self.block_size):
                if table[index] >= 0:
                    self.free.insert(0, table[index])
                    table[index] = -1

    def _ints(self, values: Iterable[int]) -> Any:
        return self.ops.from_host(np.array(list(values), np.int32))

    def _table(self, tables: Sequence[Sequence[int]]) -> Any:
        out = np.full((len(tables), max(map(len, tables))), -1, np.int32)
        for row, table in zip(out, tables, strict=True):
            row[: len(table)] = table
        return self.ops.from_host(out)
