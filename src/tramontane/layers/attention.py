"""Attention over the paged cache.

Owns the order project, normalise, rotate, store, attend, project. Must not know: blocks' bookkeeping, which model it
is part of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from tramontane.kernels import Array, Ops
from tramontane.kernels.cells import cells_of
from tramontane.kernels.workspace import Workspace
from tramontane.layers.context import BatchContext, GroupContext
from tramontane.layers.linear import Linear, Linears
from tramontane.layers.norm import Norm
from tramontane.layers.rope import Angles, Rotary
from tramontane.records import dataclass


@dataclass(frozen=True)
class HeadNorm:
    """Norms of queries and keys: `over` the elements of a head (with one weight or one a head) or of all heads."""

    q: Norm
    k: Norm
    over_all: bool = False
    after_rope: bool = False

    def __call__(self, ops: Ops, q: Array, k: Array, rows: int, head_dim: int) -> None:
        """In place; q, k float32 [T,H,D]."""
        for norm, x in ((self.q, q), (self.k, k)):
            heads = int(x.shape[1])
            flat = ops.view(x, (rows, heads * head_dim) if self.over_all else (rows * heads, head_dim))
            norm(flat, flat)


@dataclass(frozen=True)
class Scores:
    """What `Ops.attention` makes of queries and keys."""

    scale: float
    window: int = 0
    causal: bool = True
    softcap: float = 0.0
    sinks: Array | None = None
    slopes: Array | None = None


class Attention(ABC):
    """Attention of a batch's rows over all that their sequences have in the cache."""

    key_shift: Array | None = None
    """float32 [Hkv*D], added to keys before a cache quantizes them: what they have in common, below zero. As it moves
    all scores of a query alike, no weight feels it."""

    def __init__(
        self,
        ops: Ops,
        *,
        o: Linear,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        rotary: Rotary | None,
        scores: Scores,
        gate: Linear | None = None,
    ) -> None:
        """`gate`: of what the heads give, before `o`."""
        self.ops = ops
        self.o, self.gate = o, gate
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.value_dim = head_dim, value_dim
        self.rotary = rotary
        self.scores = scores

    def __call__(
        self,
        out: Array,
        x: Array,
        angles: Angles | None,
        batch: BatchContext,
        group: GroupContext,
        cache: tuple[Array, Array],
        workspace: Workspace,
    ) -> None:
        """out[T,H] from x[T,H]; the batch's keys and values are in `cache` afterwards. out may be x."""
        ops, rows = self.ops, batch.num_tokens
        q, k, v = self.project(x, angles, rows, workspace)
        if self.key_shift is not None and cells_of(cache[0]).top:
            ops.shift(ops.view(k, (rows, self.num_kv_heads * self.head_dim)), self.key_shift)
        ops.write_cache(*cache, k, v, group.slots)
        flat = self.attend(q, batch, group, cache, workspace)
        if self.gate is not None:
            gate = workspace.take("attention.gate", rows, self.num_heads * self.value_dim)
            self.gate(gate, x)
            ops.gated_activation(gate, gate, flat, "sigmoid")
            flat = gate
        self.o(out, flat)

    @abstractmethod
    def project(self, x: Array, angles: Angles | None, rows: int, workspace: Workspace) -> tuple[Array, Array, Array]:
        """Queries [T,Hq,D], and what of x [T,H] the cache keeps: keys [T,Hkv,D], rotated, and values [T,Hkv,Dv]."""

    def attend(
        self, q: Array, batch: BatchContext, group: GroupContext, cache: tuple[Array, Array], workspace: Workspace
    ) -> Array:
        """What `o` takes [T,Hq*Dv]: what queries [T,Hq,D] find in the cache."""
        scores, flat = self.scores, workspace.take("attention.out", batch.num_tokens, self.num_heads * self.value_dim)
        self.ops.attention(
            self.ops.view(flat, (batch.num_tokens, self.num_heads, self.value_dim)),
            *(q, *cache, group.block_tables, batch.query_start, batch.context_lens, scores.scale),
            *(scores.window, scores.causal, scores.softcap, scores.sinks, scores.slopes),
        )
        return flat


class PlainAttention(Attention):
    """Queries, keys and values each by a projection of their own, keys and values of fewer heads where grouped
    (Vaswani et al., 2017; Ainslie et al., 2023)."""

    def __init__(
        self,
        ops: Ops,
        *,
        q: Linear,
        k: Linear,
        v: Linear,
        o: Linear,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        rotary: Rotary | None,
        scores: Scores,
        head_norm: HeadNorm | None = None,
        clip: float = 0.0,
        gate: Linear | None = None,
        key_shift: Array | None = None,
    ) -> None:
        """`clip`: bound of queries, keys and values before their rotation; 0: none."""
        super().__init__(
            ops,
            o=o,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            rotary=rotary,
            scores=scores,
            gate=gate,
        )
        self.qkv = Linears(q, k, v)
        self.head_norm = head_norm
        self.clip = clip
        self.key_shift = key_shift

    def project(self, x: Array, angles: Angles | None, rows: int, workspace: Workspace) -> tuple[Array, Array, Array]:
        kv_heads = self.num_kv_heads
        sizes = (self.num_heads, self.head_dim), (kv_heads, self.head_dim), (kv_heads, self.value_dim)
        named = zip(("attention.q", "attention.k", "attention.v"), sizes, strict=True)
        flat = [workspace.take(name, rows, heads * width) for name, (heads, width) in named]
        self.qkv(flat, x)
        q, k, v = (self.ops.view(each, (rows, *size)) for each, size in zip(flat, sizes, strict=True))
        norm = self.head_norm
        if norm is not None and not norm.after_rope:
            norm(self.ops, q, k, rows, self.head_dim)
        if self.clip:
            for x in (q, k, v):
                self.ops.clip(self.ops.view(x, (rows, x.shape[1] * x.shape[2])), self.clip)
        if self.rotary is not None and angles is not None:
            self.rotary.rotate(q, angles)
            self.rotary.rotate(k, angles)
        if norm is not None and norm.after_rope:
            norm(self.ops, q, k, rows, self.head_dim)
        return q, k, v
