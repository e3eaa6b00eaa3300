"""Latent attention's two ways to attend, alone: to the vectors as they are cached, and to keys and values made anew.

    python -m bench.latent [--tokens 256 1024 4096] [--chunk 512] [--heads 16] [--dtypes float16] [--rows 1]

Heads as DeepSeek's: vectors of 512, 64 rotated elements, keys of 128 more, values of 128; bfloat16 weights. A prompt
of so many tokens is fed in chunks; with `--rows N` only the last N tokens are, behind those before them. One thread's
processor time, both ways in turn, the best of some rounds; beside them attention alone to a cache of all heads' keys
and values, which a model without latent vectors would keep. The JSON comes last.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from tramontane.kernels import Array
from tramontane.kernels.cells import numpy_dtype
from tramontane.kernels.cpu import CpuOps
from tramontane.kernels.workspace import Workspace
from tramontane.layers.attention import Scores
from tramontane.layers.context import BatchContext, GroupContext
from tramontane.layers.kvcache import KVCache
from tramontane.layers.latent import LatentAttention
from tramontane.layers.linear import Linear
from tramontane.weights import DenseWeight, Experts

RANK, ROTATED, PLAIN, VALUE, BLOCK = 512, 64, 128, 128, 16
SCALE = (PLAIN + ROTATED) ** -0.5


def layer(ops: CpuOps, heads: int, anew: bool) -> LatentAttention:
    """Only what attends: nothing is projected."""
    rng = np.random.default_rng(5)

    def matrix(rows: int, columns: int) -> DenseWeight:
        values = (rng.standard_normal((rows, columns), np.float32) / columns**0.5).astype(numpy_dtype("bfloat16"))
        return DenseWeight.from_tensors(ops, "BF16", (rows, columns), {"weight": values})

    k_up = Experts(ops, [matrix(RANK, PLAIN) for _ in range(heads)])
    v_up = Experts(ops, [matrix(VALUE, RANK) for _ in range(heads)])
    none = Linear(matrix(RANK + ROTATED, 32))
    parts: dict[str, Any] = dict.fromkeys(("q_down", "q_norm", "kv_norm", "rotary"))
    return LatentAttention(
        ops,
        **parts,
        q_up=none,
        kv_down=none,
        o=none,
        k_up=k_up,
        v_up=v_up,
        k_made=k_up.turned() if anew else None,
        num_heads=heads,
        scores=Scores(SCALE),
    )


def batch_of(start: int, stop: int, slots: Array, table: Array) -> tuple[BatchContext, GroupContext]:
    group = GroupContext(slots[start:stop], table)
    ints = np.arange(start, stop, dtype=np.int32)
    rows = stop - start
    starts, lens = np.array([0, rows], np.int32), np.array([stop], np.int32)
    return BatchContext(rows, 1, ints, ints, starts, lens, (group,), extents=[(rows, stop)]), group


def measure(ops: CpuOps, heads: int, tokens: int, chunk: int, rows: int, dtype: str, rounds: int) -> dict[str, Any]:
    """Seconds of each way."""
    rng = np.random.default_rng(7)
    blocks = -(-tokens // BLOCK)
    sizes = [(1, RANK, ROTATED), (heads, PLAIN + ROTATED, VALUE)]
    caches = [KVCache(ops, [0], [size], num_blocks=blocks, block_size=BLOCK, dtype=dtype).layer(0) for size in sizes]
    table = rng.permutation(blocks).astype(np.int32)[None]
    slots = (table[0][:, None] * BLOCK + np.arange(BLOCK, dtype=np.int32)).reshape(-1)[:tokens]
    for cache, (count, *widths) in zip(caches, sizes, strict=True):
        ops.write_cache(*cache, *(rng.standard_normal((tokens, count, width), np.float32) for width in widths), slots)
    q = rng.standard_normal((chunk, heads, PLAIN + ROTATED), np.float32)
    out = np.empty((chunk, heads, VALUE), np.float32)
    first = tokens - rows if rows else 0
    steps = [(start, min(start + chunk, tokens)) for start in range(first, tokens, chunk)]
    workspace = Workspace(ops, chunk)

    def full(start: int, stop: int) -> None:
        batch, _ = batch_of(start, stop, slots, table)
        n = stop - start
        ops.attention(out[:n], q[:n], *caches[1], table, batch.query_start, batch.context_lens, SCALE)

    def latent(attention: LatentAttention) -> Callable[[int, int], None]:
        def run(start: int, stop: int) -> None:
            attention.attend(q[: stop - start], *batch_of(start, stop, slots, table), caches[0], workspace)

        return run

    ways = {"vectors": latent(layer(ops, heads, False)), "anew": latent(layer(ops, heads, True)), "full": full}
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, run in ways.items():
            begun = time.thread_time()
            for start, stop in steps:
                run(start, stop)
            best[name] = min(best[name], time.thread_time() - begun)
    return {"tokens": tokens, "chunk": chunk, "rows": rows, "heads": heads, "dtype": dtype, **best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", default=["float16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--isa")
    parser.add_argument("--exact", action="store_true")
    args = parser.parse_args()
    ops = CpuOps(1, isa=args.isa, exact=args.exact)
    lines = []
    for dtype in args.dtypes:
        for tokens in args.tokens:
            line = measure(ops, args.heads, tokens, args.chunk, args.rows, dtype, args.rounds)
            lines.append(line)
            ways = [cast(float, line[name]) * 1e3 for name in ("vectors", "anew", "full")]
            shown = "{:9.1f} ms to vectors{:9.1f} ms made anew{:9.1f} ms to all keys".format(*ways)
            print(f"{dtype:10} {tokens:6} tokens{shown}{ways[0] / ways[1]:7.2f} x", flush=True)
    print(json.dumps({"isa": ops.name, "results": lines}))


if __name__ == "__main__":
    main()
