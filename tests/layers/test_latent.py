"""Which of latent attention's two ways a sequence's rows take, against counted products; that both give the same:
tests/models/test_latent.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.kernels.modules import ints
from tramontane.kernels.reference import ReferenceOps
from tramontane.kernels.workspace import Workspace
from tramontane.layers.attention import Scores
from tramontane.layers.context import REPLAYED_ROWS, BatchContext, GroupContext
from tramontane.layers.kvcache import KVCache
from tramontane.layers.latent import LatentAttention
from tramontane.layers.linear import Linear
from tramontane.weights import DenseWeight, Experts

RANK, ROTATED, PLAIN, VALUE = 512, 64, 128, 128
"""DeepSeek's."""


class Counting(ReferenceOps):
    """Attends to nothing, but notes how many rows would and in which way."""

    def __init__(self) -> None:
        super().__init__()
        self.ways: list[tuple[str, int]] = []

    def attention(self, out: Any, *arguments: Any) -> None:
        latent, *joined = arguments[12:]
        if not any(joined[1:]):
            self.ways.append(("vectors" if latent else "anew", len(out)))


def layer(ops: ReferenceOps) -> LatentAttention:
    def matrix(rows: int, columns: int) -> DenseWeight:
        return DenseWeight(ops, "F32", (rows, columns), np.zeros((rows, columns), np.float32))

    k_up, parts = Experts(ops, [matrix(RANK, PLAIN)]), dict.fromkeys(("q_down", "q_norm", "kv_norm", "rotary"))
    linears: Any = {name: Linear(matrix(RANK + ROTATED, 1)) for name in ("q_up", "kv_down", "o")} | parts
    v_up = Experts(ops, [matrix(VALUE, RANK)])
    return LatentAttention(ops, **linears, k_up=k_up, v_up=v_up, k_made=k_up.turned(), num_heads=1, scores=Scores(0.1))


def ways(extents: Sequence[tuple[int, int]]) -> list[tuple[str, int]]:
    """Of sequences with so many rows, and so many tokens in the cache: how many rows attend how, in each call."""
    ops, rows = Counting(), sum(rows for rows, _ in extents)
    longest = max(tokens for _, tokens in extents)
    cache = KVCache(ops, [0], [(1, RANK, ROTATED)], num_blocks=1, block_size=longest, dtype="float32")
    for array in cache.layer(0):
        array[...] = 0
    group = GroupContext(ints(), np.zeros((len(extents), 1), np.int32))
    starts, lens = ints(0, *np.cumsum([n for n, _ in extents])), ints(*(tokens for _, tokens in extents))
    batch = BatchContext(rows, len(extents), ints(), ints(), starts, lens, (group,), extents=extents)
    q = np.zeros((rows, 1, PLAIN + ROTATED), np.float32)
    layer(ops).attend(q, batch, group, cache.layer(0), Workspace(ops, 1024))
    return ops.ways


def cheaper(rows: int, tokens: int) -> str:
    """By counted products of a head."""
    pairs = sum(tokens - rows + i + 1 for i in range(rows))
    absorbed = pairs * (RANK + ROTATED + RANK) + rows * RANK * (PLAIN + VALUE)
    made = pairs * (PLAIN + ROTATED + VALUE) + tokens * RANK * (PLAIN + VALUE)
    return "anew" if made < absorbed else "vectors"


@pytest.mark.parametrize("tokens", [200, 900, 3000])
@pytest.mark.parametrize("rows", [129, 160, 170, 172, 200])
def test_many_rows_take_the_way_of_fewer_products(rows: int, tokens: int) -> None:
    assert ways([(rows, tokens)]) == [(cheaper(rows, tokens), rows)]


def test_steps_that_may_be_replayed_depend_on_no_values() -> None:
    assert ways([(REPLAYED_ROWS, REPLAYED_ROWS)]) == [("vectors", REPLAYED_ROWS)]
    assert ways([(100, 100), (28, 28)]) == [("vectors", 128)]


def test_neighbours_that_go_the_same_way_go_together() -> None:
    extents = [(1, 9), (5, 7), (200, 200), (300, 900), (1, 500), (129, 3000)]
    assert ways(extents) == [("vectors", 6), ("anew", 200), ("anew", 300), ("vectors", 130)]
    assert ways([(300, 300), (1, 5)]) == [("anew", 300), ("vectors", 1)]
