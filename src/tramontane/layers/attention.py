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
from tramontane.weights import Experts


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

    latent: bool = False
    """Whether values lie in the keys: see `Ops.attention`."""
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
        ops, rows, scores = self.ops, batch.num_tokens, self.scores
        q, k, v = self.project(x, angles, rows, workspace)
        if self.key_shift is not None and cells_of(cache[0]).top:
            ops.shift(ops.view(k, (rows, self.num_kv_heads * self.head_dim)), self.key_shift)
        ops.write_cache(*cache, k, v, group.slots)
        attended = workspace.take("attention.out", rows, self.num_heads * self.value_dim)
        attended = ops.view(attended, (rows, self.num_heads, self.value_dim))
        tables, starts, lens = group.block_tables, batch.query_start, batch.context_lens
        ops.attention(
            *(attended, q, *cache, tables, starts, lens, scores.scale),
            *(scores.window, scores.causal, scores.softcap, scores.sinks, scores.slopes, self.latent),
        )
        flat = self.values(attended, rows, workspace)
        if self.gate is not None:
            gate = workspace.take("attention.gate", rows, self.num_heads * self.value_dim)
            self.gate(gate, x)
            ops.gated_activation(gate, gate, flat, "sigmoid")
            flat = gate
        self.o(out, flat)

    @abstractmethod
    def project(self, x: Array, angles: Angles | None, rows: int, workspace: Workspace) -> tuple[Array, Array, Array]:
        """Queries [T,Hq,D], and what of x [T,H] the cache keeps: keys [T,Hkv,D], rotated, and values [T,Hkv,Dv]."""

    def values(self, attended: Array, rows: int, workspace: Workspace) -> Array:
        """What `o` takes [T,Hq*Dv] of what was attended [T,Hq,Dv]."""
        return self.ops.view(attended, (rows, self.num_heads * self.value_dim))


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


class LatentAttention(Attention):
    """Keys and values out of one low-rank vector a token, which all heads share (DeepSeek-V2, 2024).

    The last elements of a query's head, and as many more of the vector, are rotated; these are in every head's key.
    What is cached is the vector, and these. Keys and values are never made: the way from vectors to a head's keys is
    taken back by its query, and the one to its values by what it has attended.
    """

    latent = True

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
        o: Linear,
        num_heads: int,
        rotary: Rotary,
        scores: Scores,
    ) -> None:
        """`q_down` None: queries are `q_up` of the input. `k_up` [Hq,L,D] and `v_up` [Hq,Dv,L]: a matrix a head."""
        rank, rotated = k_up.shape[1], kv_down.weight.shape[0] - k_up.shape[1]
        super().__init__(
            ops,
            o=o,
            num_heads=num_heads,
            num_kv_heads=1,
            head_dim=rank + rotated,
            value_dim=rank,
            rotary=rotary,
            scores=scores,
        )
        self.q_down, self.q_norm, self.q_up = q_down, q_norm, q_up
        self.kv_down, self.kv_norm, self.k_up, self.v_up = kv_down, kv_norm, k_up, v_up
        self.rank, self.rotated = rank, rotated

    def project(self, x: Array, angles: Angles | None, rows: int, workspace: Workspace) -> tuple[Array, Array, Array]:
        ops, plain, both = self.ops, self.k_up.shape[2], self.rank + self.rotated
        q = ops.view(self._queries(x, rows, workspace), (rows, self.num_heads, plain + self.rotated))
        joint = workspace.take("attention.kv_down", rows, both)
        self.kv_down(joint, x)
        joint = ops.view(joint, (rows, 1, both))
        latent = workspace.take("attention.latent", rows, 1, self.rank)
        shared = workspace.take("attention.rotated", rows, 1, self.rotated)
        ops.place(latent, joint, 0, 0, self.rank)
        ops.place(shared, joint, 0, self.rank, self.rotated)
        if self.rotary is not None and angles is not None:
            self.rotary.rotate(q, angles, plain)
            self.rotary.rotate(shared, angles)
        flat = ops.view(latent, (rows, self.rank))
        self.kv_norm(flat, flat)
        absorbed = workspace.take("attention.absorbed", rows, self.num_heads, both)
        self._by_head(absorbed, q, self.k_up, ("attention.heads", "attention.latents"), workspace)
        ops.place(absorbed, q, self.rank, plain, self.rotated)
        return absorbed, latent, shared

    def values(self, attended: Array, rows: int, workspace: Workspace) -> Array:
        size = self.v_up.shape[1]
        out = workspace.take("attention.values", rows, self.num_heads, size)
        self._by_head(out, attended, self.v_up, ("attention.latents", "attention.heads"), workspace)
        return self.ops.view(out, (rows, self.num_heads * size))

    def _by_head(self, out: Array, x: Array, matrices: Experts, buffers: tuple[str, str], workspace: Workspace) -> None:
        """The beginnings of out [T,Hq,N or more] from those of x [T,Hq,K or more], each head by its matrix."""
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
