"""Attention over the paged cache on torch tensors, many sequences at a time or row by row.

Owns how rows and pages are gathered and scored. Must not know: weights, layers, models; the other ops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from tramontane.errors import MissingExtra
from tramontane.kernels.base import Array
from tramontane.kernels.cells import cells_of
from tramontane.kernels.torch_cells import pages_of, read_keys, read_values, rotate
from tramontane.records import dataclass

try:
    import torch
except ImportError as error:
    raise MissingExtra("torch", "Running on torch") from error

__all__ = ["GROUP", "Scoring", "Step", "attend", "attend_rows", "row_groups"]

GROUP = 64
"""Rows reduced together in deterministic mode. A reduction's order depends on its shape, so the shape is fixed."""


def row_groups(x: Array) -> Iterator[tuple[slice, Array]]:
    """The rows of x `GROUP` at a time, the last group filled up with zeros."""
    for start in range(0, len(x), GROUP):
        part = x[start : start + GROUP]
        if len(part) < GROUP:
            part = torch.cat((part, part.new_zeros(GROUP - len(part), *part.shape[1:])))
        yield slice(start, start + GROUP), part


@dataclass(frozen=True)
class Scoring:
    """What `Ops.attention` makes of products of queries and keys. Heads are [Hq]."""

    scale: float
    window: int
    causal: bool
    softcap: float
    sinks: Array | None
    slopes: Array | None

    def first(self, position: int) -> int:
        """The first key position that a query at `position` may see."""
        return max(0, position - self.window + 1) if self.window > 0 else 0

    def end(self, position: int, context: int) -> int:
        """Where the key positions end that a query at `position` may see."""
        if self.causal:
            return position + 1
        return min(context, position + self.window) if self.window > 0 else context

    def seen(self, positions: Array, keys: Array, lens: Array) -> Array:
        """Which of the `keys` in contexts of `lens` tokens each query position sees; shapes broadcast."""
        ahead = positions - keys
        seen = ahead >= 0 if self.causal else (keys < lens).expand_as(ahead)
        return seen & (ahead.abs() < self.window) if self.window > 0 else seen

    def __call__(self, products: Array, ahead: Array, seen: Array, heads: tuple[int, ...]) -> Array:
        """Scores of scaled products, -inf where unseen; `heads`: the shape in which heads lie over the products."""
        if self.softcap > 0:
            products = (products / self.softcap).tanh_() * self.softcap
        if self.slopes is not None:
            products = products - self.slopes.view(heads) * ahead
        return products.masked_fill(~seen, -math.inf)


@dataclass(frozen=True)
class Step:
    """The paged sequences of a call of `Ops.attention`; starts and contexts are on the host."""

    k_cache: Array
    v_cache: Array
    tables: Array
    starts: list[int]
    contexts: list[int]
    lens: Array
    latent: bool = False

    @property
    def block_size(self) -> int:
        return int(self.k_cache.shape[3])

    def read(self, blocks: Array, key_size: int, value_size: int) -> tuple[Array, Array]:
        """Keys float32 [..., Hkv, block_size, D] and values [..., Hkv, block_size, Dv] of blocks [...]."""
        keys, values = pages_of(self.k_cache, blocks), pages_of(self.v_cache, blocks)
        if not self.latent:
            return read_keys(keys, key_size), read_values(values, value_size)
        latents = read_keys(keys, value_size)
        latents = rotate(latents) if cells_of(self.k_cache).top else latents
        return torch.cat((latents, read_values(values, key_size - value_size)), dim=-1), latents


def attend(out: Array, q: Array, step: Step, scoring: Scoring, held: int, totals: Array | None) -> None:
    """Sequences of equally many rows together; about `held` elements of keys or scores at a time. totals [T,Hq]: as of
    `Ops.attention`."""
    page = max(1, *(math.prod(cache.shape[1:]) for cache in (step.k_cache, step.v_cache)))
    for a, b in _runs(step, held // page):
        rows = slice(step.starts[a], step.starts[b])
        shape = (b - a, (step.starts[b] - step.starts[a]) // (b - a))
        here, queries, sums = (None if x is None else x[rows].unflatten(0, shape) for x in (out, q, totals))
        _attend_run(here, queries, sums, step, slice(a, b), scoring, held)


def _runs(step: Step, pages: int) -> Iterator[tuple[int, int]]:
    """Runs [a, b) of neighbouring sequences with equally many query rows and `pages` padded cache pages at most."""
    starts, contexts, size = step.starts, step.contexts, step.block_size
    a, end = 0, len(contexts)
    while a < end:
        n, longest, b = starts[a + 1] - starts[a], contexts[a], a + 1
        while b < end and starts[b + 1] - starts[b] == n:
            longest = max(longest, contexts[b])
            if (b + 1 - a) * -(-longest // size) > pages:
                break
            b += 1
        if n:
            yield a, b
        a = b


def _attend_run(
    out: Array, q: Array, totals: Array | None, step: Step, run: slice, scoring: Scoring, held: int
) -> None:
    """Sequences `run` of n query rows each: out [G, n, Hq, Dv], q [G, n, Hq, D], totals [G, n, Hq]."""
    count, n, query_heads, _ = q.shape
    heads, size, contexts = step.k_cache.shape[1], step.block_size, step.contexts[run]
    first, last = scoring.first(min(contexts) - n) // size, -(-max(contexts) // size)
    pages = step.tables[run, first:last].clamp(min=0).long()
    k, v = (x.transpose(1, 2).flatten(2, 3) for x in step.read(pages, q.shape[3], out.shape[3]))
    keys = torch.arange(first * size, last * size, device=q.device)
    lens = step.lens[run, None, None]
    by_head = (heads, 1, query_heads // heads, 1)
    positions = lens - n + torch.arange(n, device=q.device)[:, None]
    # What no row sees may be anything, NaN included.
    v = v.masked_fill(~scoring.seen(positions, keys, lens).any(dim=1)[:, None, :, None], 0)
    rows = max(1, held // (count * query_heads * len(keys)))
    for a in range(0, n, rows):
        part = (q[:, a : a + rows] * scoring.scale).unflatten(2, (heads, -1)).transpose(1, 2)
        products = (part.flatten(2, 3) @ k.transpose(2, 3)).view(*part.shape[:4], -1)
        seen = scoring.seen(positions[:, a : a + rows], keys, lens)[:, None, :, None]
        ahead = (positions[:, a : a + rows] - keys)[:, None, :, None]
        scores = _with_sinks(scoring(products, ahead, seen, by_head), scoring.sinks, by_head)
        if totals is not None:
            totals[:, a : a + rows] = scores.logsumexp(dim=-1).transpose(1, 2).flatten(2, 3)
        weights = scores.softmax(dim=-1)[..., : len(keys)]
        mixed = (weights.flatten(2, 3) @ v).view(*part.shape[:4], -1)
        out[:, a : a + rows] = mixed.transpose(1, 2).flatten(2, 3)


def _with_sinks(scores: Array, sinks: Array | None, heads: tuple[int, ...]) -> Array:
    if sinks is None:
        return scores
    return torch.cat((scores, sinks.view(heads).expand(*scores.shape[:-1], 1)), dim=-1)


def attend_rows(out: Array, q: Array, step: Step, scoring: Scoring, totals: Array | None) -> None:
    """Each row by itself, `GROUP` at a time, with an online softmax over its cache blocks in absolute order."""
    contexts, starts, device = step.contexts, step.starts, q.device
    owners = [s for s in range(len(contexts)) for _ in range(starts[s], starts[s + 1])]
    places = [contexts[s] - starts[s + 1] + row for row, s in enumerate(owners)]
    for rows, part in row_groups(q):
        here = list(zip(owners[rows], places[rows], strict=True))
        fill = [0] * (GROUP - len(here))
        owner = torch.tensor(owners[rows] + fill, device=device)
        place = torch.tensor(places[rows] + fill, device=device)
        first = min(scoring.first(place) for _, place in here) // step.block_size
        end = max(scoring.end(place, contexts[s]) for s, place in here)
        pages = range(first, -(-end // step.block_size))
        mixed, total = _attend_group(part, step, scoring, owner, place, pages, out.shape[2])
        out[rows] = mixed[: len(here)]
        if totals is not None:
            totals[rows] = total[: len(here)]


def _attend_group(
    q: Array, step: Step, scoring: Scoring, owner: Array, place: Array, pages: range, width: int
) -> tuple[Array, Array]:
    """float32 [GROUP, Hq, Dv] for q [GROUP, Hq, D] at positions `place` of the sequences `owner`, and [GROUP, Hq], the
    logarithms of sums."""
    heads, size = step.k_cache.shape[1], step.block_size
    queries = (q * scoring.scale).unflatten(1, (heads, -1))[:, :, :, None]
    by_head: Any = queries.shape[1:3]
    best = queries.new_full(queries.shape[:3], -math.inf)
    total = torch.zeros_like(best)
    if scoring.sinks is not None:
        best, total = best.copy_(scoring.sinks.view(by_head)), total + 1
    mixed = queries.new_zeros(*queries.shape[:3], width)
    place, lens = place[:, None], step.lens[owner][:, None]
    for page in pages:
        keys = torch.arange(page * size, (page + 1) * size, device=q.device)
        seen = scoring.seen(place, keys, lens)[:, None, :]
        block = step.tables[owner, page].clamp(min=0).long()
        k, v = step.read(block, q.shape[2], width)
        v = v.masked_fill(~seen[..., None], 0)
        products = (queries * k[:, :, None]).sum(dim=-1)
        scores = scoring(products, (place - keys)[:, None, None], seen[:, :, None], (*by_head, 1))
        new = torch.maximum(best, scores.amax(dim=-1))
        finite = new.masked_fill(new == -math.inf, 0)
        keep = (best - finite).exp()
        weights = (scores - finite[..., None]).exp()
        total = total * keep + weights.sum(dim=-1)
        mixed = mixed * keep[..., None] + (weights[..., None] * v[:, :, None]).sum(dim=-2)
        best = new
    return (mixed / total[..., None]).flatten(1, 2), (best + total.log()).flatten(1, 2)
