"""The batch as layers see it: device arrays that say which token is whose and where its cache lies.

Owns the dataclasses only. Must not know: scheduling, requests, how the arrays were made.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tramontane.kernels import Array
from tramontane.records import dataclass

REPLAYED_ROWS = 128
"""Steps of up to so many rows may be recorded, and replayed with other values: what layers do with them depends on
nothing but `BatchContext.shape`. More compute for so long that calls do not count, and hardly one is shaped like
another."""


@dataclass(frozen=True)
class GroupContext:
    """One cache group's view of the batch."""

    slots: Array
    """int32 [T]: where each token's key and value go: block * block_size + offset."""
    block_tables: Array
    """int32 [S, B]: the blocks of each sequence, -1 where a window has freed them or past the end."""


@dataclass(frozen=True)
class BatchContext:
    """A ragged batch of T tokens of S sequences, flattened without padding, sequence after sequence."""

    num_tokens: int
    num_seqs: int
    tokens: Array
    """int32 [T]: token ids."""
    positions: Array
    """int32 [T]."""
    query_start: Array
    """int32 [S + 1]: where each sequence's rows start."""
    context_lens: Array
    """int32 [S]: tokens in the cache after this step."""
    groups: tuple[GroupContext, ...]
    """In the order of `models.spec.cache_groups`."""
    extents: Sequence[tuple[int, int]] = ()
    """Of each sequence, on the host: its tokens in the batch, and those in the cache after this step. Layers may take
    another way by it where there are more than REPLAYED_ROWS; empty: they do not."""
    states: Array | None = None
    """int32 [S]: the places of the sequences' states, in models that keep one."""
    rope_lengths: NDArray[np.int32] | None = None
    """int32 [T] on the host: the length of sequence that a token's rotation is stretched for, where that matters."""
    token_types: Array | None = None
    """int32 [T], for models that tell a first text from a second."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of its arrays."""
        return self.num_tokens, self.num_seqs, *(group.block_tables.shape[1] for group in self.groups)
