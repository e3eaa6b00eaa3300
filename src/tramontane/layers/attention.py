"""Attention over the paged cache.

Owns the order project, rotate, store, attend, project. Must not know: blocks' bookkeeping, norms, which model it is
part of.
"""

from __future__ import annotations

from tramontane.kernels import Array, Ops
from tramontane.kernels.workspace import Workspace
from tramontane.layers.context import BatchContext, GroupContext
from tramontane.layers.linear import Linear
from tramontane.layers.rope import Angles, Rotary


class Attention:
    """Causal grouped-query attention with rotary positions and, optionally, a window."""

    def __init__(
        self,
        ops: Ops,
        *,
        q: Linear,
        k: Linear,
        v: Linear,
        o: Linear,
        rotary: Rotary,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None = None,
    ) -> None:
        """`window`: positions that a token sees, itself included; None: all."""
        self.ops = ops
        self.q, self.k, self.v, self.o = q, k, v, o
        self.rotary = rotary
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.window = window or 0
        self.scale = head_dim**-0.5

    def __call__(
        self,
        out: Array,
        x: Array,
        angles: Angles,
        batch: BatchContext,
        group: GroupContext,
        cache: tuple[Array, Array],
        workspace: Workspace,
    ) -> None:
        """out[T,H] from x[T,H]; the batch's keys and values are in `cache` afterwards. out may be x."""
        ops, rows = self.ops, batch.num_tokens
        q = self._project(self.q, "attention.q", x, rows, self.num_heads, workspace)
        k = self._project(self.k, "attention.k", x, rows, self.num_kv_heads, workspace)
        v = self._project(self.v, "attention.v", x, rows, self.num_kv_heads, workspace)
        self.rotary.rotate(q, angles)
        self.rotary.rotate(k, angles)
        ops.write_cache(*cache, k, v, group.slots)
        flat = workspace.take("attention.out", rows, self.num_heads * self.head_dim)
        attended = ops.view(flat, (rows, self.num_heads, self.head_dim))
        tables, starts, lens = group.block_tables, batch.query_start, batch.context_lens
        ops.attention(attended, q, *cache, tables, starts, lens, self.scale, self.window)
        self.o(out, flat)

    def _project(self, linear: Linear, name: str, x: Array, rows: int, heads: int, workspace: Workspace) -> Array:
        """The projection as float32 [T, heads, D]."""
        flat = workspace.take(name, rows, heads * self.head_dim)
        linear(flat, x)
        return self.ops.view(flat, (rows, heads, self.head_dim))
