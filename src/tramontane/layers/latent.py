"""Attention whose cache holds one low-rank vector a token, for all heads.

Owns the two ways to attend to it, and the choice between them. Must not know: blocks' bookkeeping, which model it is
part of.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np

from tramontane.kernels import Array, Ops
from tramontane.kernels.cells import CELLS, Cells, cells_of
from tramontane.kernels.workspace import Workspace
from tramontane.layers.attention import Attention, Scores
from tramontane.layers.context import REPLAYED_ROWS, BatchContext, GroupContext
from tramontane.layers.linear import Linear, Linears
from tramontane.layers.norm import Norm
from tramontane.layers.rope import Angles, Rotary
from tramontane.weights import Experts, Weight

STRETCH_BLOCK = 64
"""Tokens of a block of keys and values made anew: what the CPU's attention looks at together."""


class LatentAttention(Attention):
    """Keys and values out of one low-rank vector a token, which all heads share (DeepSeek-V2, 2024).

    The last elements of a query's head, and as many more of the vector, are rotated; these are in every head's key.
    What is cached is the vector, and these. Few rows attend to it as it is: the way from vectors to a head's keys is
    taken back by its query, and the one to its values by what it has attended. For many rows of a sequence it costs
    less to make keys and values of what the cache holds, a stretch of the context after the other.
    """

    def __init__(
        self,
        ops: Ops,
        *,
        q_down: Linear | None,
        q_norm: Norm | None,
        q_up: Linear,
        kv_down: Linear,
        kv_norm: Norm,
        k_up: Experts,
        v_up: Experts,
        k_made: Weight | None,
        o: Linear,
        num_heads: int,
        rotary: Rotary,
        scores: Scores,
    ) -> None:
        """`q_down` None: queries are `q_up` of the input. `k_up` [Hq,L,D] and `v_up` [Hq,Dv,L]: a matrix a head;
        `k_made` [Hq*D,L]: those of `k_up`, turned. Without it keys are never made: it wants scores that are causal and
        know no distances."""
        rank, rotated = k_up.shape[1], kv_down.weight.shape[0] - k_up.shape[1]
        super().__init__(
            ops,
            o=o,
            num_heads=num_heads,
            num_kv_heads=1,
            head_dim=rank + rotated,
            value_dim=v_up.shape[1],
            rotary=rotary,
            scores=scores,
        )
        self.q_down, self.q_norm, self.q_up = q_down, q_norm, q_up
        self.kv_down, self.kv_norm, self.k_up, self.v_up, self.k_made = kv_down, kv_norm, k_up, v_up, k_made
        self.head_values = Linears(*(Linear(weight) for weight in v_up.weights))
        self.rank, self.rotated, self.plain = rank, rotated, k_up.shape[2]
        self.key_dim = self.plain + rotated

    def project(self, x: Array, angles: Angles | None, rows: int, workspace: Workspace) -> tuple[Array, Array, Array]:
        ops, both = self.ops, self.rank + self.rotated
        q = ops.view(self._queries(x, rows, workspace), (rows, self.num_heads, self.plain + self.rotated))
        joint = workspace.take("attention.kv_down", rows, both)
        self.kv_down(joint, x)
        joint = ops.view(joint, (rows, 1, both))
        latent, shared = self._vectors(rows, workspace)
        ops.place(latent, joint, 0, 0, self.rank)
        ops.place(shared, joint, 0, self.rank, self.rotated)
        if self.rotary is not None and angles is not None:
            self.rotary.rotate(q, angles, self.plain)
            self.rotary.rotate(shared, angles)
        flat = ops.view(latent, (rows, self.rank))
        self.kv_norm(flat, flat)
        return q, latent, shared

    def attend(
        self, q: Array, batch: BatchContext, group: GroupContext, cache: tuple[Array, Array], workspace: Workspace
    ) -> Array:
        ops, total = self.ops, batch.num_tokens
        out = workspace.take("attention.values", total, self.num_heads, self.value_dim)
        anew = self._worth_making(batch)
        if not any(anew):
            lists = group.block_tables, batch.query_start, batch.context_lens
            self._absorbed(out, q, cache, lists, workspace)
            return ops.view(out, (total, self.num_heads * self.value_dim))
        starts = [0, *accumulate(rows for rows, _ in batch.extents)]
        cuts = [s for s in range(batch.num_seqs) if s == 0 or anew[s] or anew[s - 1]]
        for a, b in pairwise([*cuts, batch.num_seqs]):
            own, queries = (ops.part(x, starts[a], starts[b]) for x in (out, q))
            tables = ops.part(group.block_tables, a, b)
            if anew[a]:
                self._made(own, queries, cache, ops.view(tables, tables.shape[1:]), batch.extents[a][1], workspace)
                continue
            begins = self._ints(*(start - starts[a] for start in starts[a : b + 1]))
            self._absorbed(own, queries, cache, (tables, begins, ops.part(batch.context_lens, a, b)), workspace)
        return ops.view(out, (total, self.num_heads * self.value_dim))

    def _worth_making(self, batch: BatchContext) -> list[bool]:
        """Of each sequence, whether its rows attend to keys and values that are made anew: where that is fewer
        products. (Those of the rows themselves are as many as it takes to make vectors of queries, and back.)"""
        if self.k_made is None or batch.num_tokens <= REPLAYED_ROWS:
            return []
        made = self.rank * (self.plain + self.value_dim)
        saved = 2 * self.rank - self.plain - self.value_dim
        return [
            rows > REPLAYED_ROWS and (rows * context - rows * (rows - 1) // 2) * saved > (context - rows) * made
            for rows, context in batch.extents
        ]

    def _absorbed(
        self, out: Array, q: Array, cache: tuple[Array, Array], lists: tuple[Array, Array, Array], workspace: Workspace
    ) -> None:
        """out [T,Hq,Dv]: what queries [T,Hq,D] find among vectors. lists: tables, starts and lengths of contexts."""
        ops, rows, heads, scores = self.ops, int(q.shape[0]), self.num_heads, self.scores
        absorbed = workspace.take("attention.absorbed", rows, heads, self.head_dim)
        self._by_head(absorbed, q, self.k_up, ("attention.heads", "attention.latents"), workspace)
        ops.place(absorbed, q, self.rank, self.plain, self.rotated)
        attended = workspace.take("attention.out", rows, heads, self.rank)
        ops.attention(
            *(attended, absorbed, *cache, *lists, scores.scale),
            *(scores.window, scores.causal, scores.softcap, scores.sinks, scores.slopes, True),
        )
        self._by_head(out, attended, self.v_up, ("attention.latents", "attention.heads"), workspace)

    def _made(
        self, out: Array, q: Array, cache: tuple[Array, Array], table: Array, context: int, workspace: Workspace
    ) -> None:
        """The same of one sequence, over keys and values of its whole context, made a stretch at a time: first of the
        tokens that the rows may not see all of, as many as a step may have."""
        ops, rows, scores, most = self.ops, int(q.shape[0]), self.scores, workspace.max_rows
        totals, starts = workspace.take("attention.totals", rows, self.num_heads), self._ints(0, rows)
        for stop in range(context, 0, -most):
            last, start = stop == context, max(0, stop - most)
            made = self._stretch(cache, table, start, stop, workspace)
            blocks = ops.view(self._ints(*range(made[0].shape[0])), (1, made[0].shape[0]))
            ops.attention(
                *(out, q, *made, blocks, starts, self._ints(stop - start), scores.scale, 0, last, scores.softcap),
                *(scores.sinks if last else None, None, False, totals, not last),
            )

    def _stretch(
        self, cache: tuple[Array, Array], table: Array, start: int, stop: int, workspace: Workspace
    ) -> tuple[Array, Array]:
        """A cache of its own with the keys and values of tokens [start, stop), the first in the first place."""
        ops, count, heads = self.ops, stop - start, self.num_heads
        latent, shared = self._vectors(count, workspace)
        ops.read_cache(latent, shared, *cache, table, start)
        flat = ops.view(latent, (count, self.rank))
        assert self.k_made is not None
        # What is wider in the other way to attend has room for this.
        k = ops.view(workspace.take("attention.absorbed", count, heads, self.head_dim), (count, heads, self.key_dim))
        v = ops.view(workspace.take("attention.out", count, heads, self.rank), (count, heads, self.value_dim))
        plain = workspace.take("attention.heads", count, heads, self.plain)
        self.k_made.matmul(ops.view(plain, (count, heads * self.plain)), flat)
        ops.place(k, plain, 0, 0, self.plain)
        ops.place(k, shared, self.plain, 0, self.rotated)
        values = workspace.take("attention.heads", count, heads, self.value_dim)
        each = ops.view(values, (heads, count, self.value_dim))
        self.head_values([ops.view(ops.part(each, h, h + 1), v.shape[::2]) for h in range(heads)], flat)
        ops.swap(v, each, 0, 0, self.value_dim)
        cells = made_cells(cells_of(cache[0]))
        shapes = made_shapes(cells, workspace.max_rows, heads, self.key_dim, self.value_dim)
        named = zip(("attention.made_keys", "attention.made_values"), shapes, strict=True)
        keys, kept = (workspace.fixed(name, *shape, dtype=cells.dtype) for name, shape in named)
        ops.write_cache(keys, kept, k, v, self._ints(*range(count)))
        return keys, kept

    def _ints(self, *values: int) -> Array:
        return self.ops.from_host(np.array(values, np.int32))

    def _vectors(self, rows: int, workspace: Workspace) -> tuple[Array, Array]:
        """Room for what the cache keeps of tokens."""
        latent = workspace.take("attention.latent", rows, 1, self.rank)
        return latent, workspace.take("attention.rotated", rows, 1, self.rotated)

    def _by_head(self, out: Array, x: Array, matrices: Experts, buffers: tuple[str, str], workspace: Workspace) -> None:
        """out [T,Hq,N or more]: its beginnings from those of x [T,Hq,K or more], each head by its matrix."""
        ops, rows, heads = self.ops, int(x.shape[0]), self.num_heads
        given, made = (
            workspace.take(name, rows, heads, width) for name, width in zip(buffers, matrices.shape[:0:-1], strict=True)
        )
        given, made = (ops.view(each, (heads, rows, each.shape[2])) for each in (given, made))
        ops.swap(given, x, 0, 0, given.shape[2])
        flat, to = (ops.view(each, (heads * rows, each.shape[2])) for each in (given, made))
        matrices.matmul(to, flat, None)
        ops.swap(out, made, 0, 0, made.shape[2])

    def _queries(self, x: Array, rows: int, workspace: Workspace) -> Array:
        q = workspace.take("attention.q", rows, self.q_up.weight.shape[0])
        if self.q_down is not None and self.q_norm is not None:
            low = workspace.take("attention.q_down", rows, self.q_down.weight.shape[0])
            self.q_down(low, x)
            self.q_norm(low, low)
            x = low
        self.q_up(q, x)
        return q


def made_cells(kept: Cells) -> Cells:
    """How keys and values are kept that are made of what a cache has: so that they round less than it did."""
    return kept if kept.dtype == "float32" else CELLS["float16"]


def made_shapes(cells: Cells, rows: int, heads: int, key_size: int, value_size: int) -> tuple[tuple[int, ...], ...]:
    """Of the arrays of keys and values of a stretch of `rows` tokens."""
    return cells.shapes(-(-rows // STRETCH_BLOCK), heads, STRETCH_BLOCK, key_size, value_size)
