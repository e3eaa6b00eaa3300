"""KVCache: the arrays that hold keys and values, cut into blocks of tokens, and states, one a sequence.

Owns the memory only. One pool of equal-sized blocks serves every cache group: the i-th layer of each group keeps its
keys and values in the i-th pair of arrays (its slot), under its own group's block ids. A state has arrays of its own in
each layer that keeps one, float32, as it is read and written over and over.
Must not know: which block belongs to whom (the engine's bookkeeping), models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tramontane.kernels import Array, Ops
from tramontane.kernels.cells import CELLS


class KVCache:
    """Keys and values of `num_blocks` blocks of `block_size` tokens; zero pages until a block is written."""

    def __init__(
        self,
        ops: Ops,
        slots: Sequence[int | None],
        shapes: Sequence[tuple[int, int, int]],
        *,
        num_blocks: int,
        block_size: int,
        dtype: str,
        states: Mapping[int, Sequence[tuple[int, int, int]]] | None = None,
        num_states: int = 0,
    ) -> None:
        """`slots`: for each layer the pair of arrays it uses, None for one without attention; `shapes`: (key-value
        heads, key size, value size) of each pair; `dtype`: of `kernels.cells.CELLS`. `states`: the shapes of the
        state of each layer that has one, by the layer's index; `num_states`: places for them."""
        self.ops = ops
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        self._slots = tuple(slots)
        cells = CELLS[dtype]
        full = [cells.shapes(num_blocks, heads, block_size, *sizes) for heads, *sizes in shapes]
        self._pairs = tuple((ops.zeros(keys, cells.dtype), ops.zeros(values, cells.dtype)) for keys, values in full)
        self.nbytes = cells.itemsize * sum(math.prod(shape) for pair in full for shape in pair)
        self.num_states = num_states
        self._states = {
            index: tuple(ops.zeros((num_states, *shape), "float32") for shape in of_layer)
            for index, of_layer in (states or {}).items()
        }
        self.nbytes += 4 * num_states * sum(math.prod(shape) for each in (states or {}).values() for shape in each)

    def layer(self, index: int) -> tuple[Array, Array]:
        """Keys and values of a layer with attention, as `Ops.write_cache` fills them."""
        slot = self._slots[index]
        if slot is None:
            raise KeyError(f"layer {index} has no keys")
        return self._pairs[slot]

    def state(self, index: int) -> tuple[Array, ...]:
        """What a layer with a state keeps, each array [num_states, H, rows, columns]."""
        return self._states[index]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, each (source, target), in every layer. No target is also a source."""
        self._copy(pairs, self._pairs)

    def copy_states(self, pairs: Sequence[tuple[int, int]]) -> None:
        """The same of states."""
        self._copy(pairs, self._states.values())

    def _copy(self, pairs: Sequence[tuple[int, int]], arrays: Iterable[tuple[Array, ...]]) -> None:
        if not pairs:
            return
        source, target = (self.ops.from_host(np.array(ids, np.int32)) for ids in zip(*pairs, strict=True))
        for each in arrays:
            for cache in each:
                self.ops.copy_blocks(cache, source, target)
