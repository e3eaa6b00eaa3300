"""KVCache: the arrays that hold keys and values, cut into blocks of tokens.

Owns the memory only. One pool of equal-sized blocks serves every cache group: the i-th layer of each group keeps its
keys and values in the i-th pair of arrays (its slot), under its own group's block ids.
Must not know: which block belongs to whom (the engine's bookkeeping), models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tramontane.kernels import Array, Ops

_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


class KVCache:
    """Keys and values of `num_blocks` blocks of `block_size` tokens; zero pages until a block is written."""

    def __init__(
        self,
        ops: Ops,
        slots: Sequence[int],
        shapes: Sequence[tuple[int, int, int]],
        *,
        num_blocks: int,
        block_size: int,
        dtype: str,
    ) -> None:
        """`slots`: for each layer the pair of arrays it uses; `shapes`: (key-value heads, key size, value size) of each
        pair; `dtype`: float32, float16 or bfloat16."""
        self.ops = ops
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        self._slots = tuple(slots)
        full = [[(num_blocks, heads, block_size, size) for size in sizes] for heads, *sizes in shapes]
        self._pairs = tuple((ops.zeros(keys, dtype), ops.zeros(values, dtype)) for keys, values in full)
        self.nbytes = _ITEMSIZE[dtype] * sum(math.prod(shape) for pair in full for shape in pair)

    def layer(self, index: int) -> tuple[Array, Array]:
        """Keys and values of a layer, each [num_blocks, H, block_size, D]; D may differ."""
        return self._pairs[self._slots[index]]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, each (source, target), in every layer. No target is also a source."""
        if not pairs:
            return
        source, target = (self.ops.from_host(np.array(ids, np.int32)) for ids in zip(*pairs, strict=True))
        for cache in (array for pair in self._pairs for array in pair):
            self.ops.copy_blocks(cache, source, target)
