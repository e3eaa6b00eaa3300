"""Attention alone over a paged cache: one row reads keys and values, many rows multiply.

    python -m bench.attention [--dtypes float16 int8 ...] [--contexts 512 2048 8192] [--rows 1 512] [--sizes 64 128]

Eight key-value heads, four query heads to each, blocks of 16 tokens in random order; caches are so many that they come
from memory. Measures processor time of one thread, the best of some rounds, and prints GB/s of cache read for one row,
and GFLOPS of what the last rows of a context see for many. The JSON comes last.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np

from tramontane.kernels.cpu import CpuOps
from tramontane.layers.kvcache import KVCache

HEADS, SHARED, BLOCK = 8, 4, 16
COLD = 192 << 20
"""Bytes of cache that are read before any is read again."""


def measure(ops: CpuOps, dtype: str, context: int, rows: int, size: int, rounds: int) -> dict[str, Any]:
    """Seconds of one call, and what it did in them."""
    rng = np.random.default_rng(7)
    blocks = context // BLOCK
    one = KVCache(ops, [0], [(HEADS, size, size)], num_blocks=blocks, block_size=BLOCK, dtype=dtype)
    copies = max(1, COLD // one.nbytes) if rows == 1 else 1
    cache = KVCache(ops, [0], [(HEADS, size, size)], num_blocks=copies * blocks, block_size=BLOCK, dtype=dtype)
    tables = rng.permutation(copies * blocks).astype(np.int32).reshape(copies, 1, blocks)
    tokens = rng.standard_normal((context, HEADS, size), np.float32)
    for table in tables:
        slots = (table[0][:, None] * BLOCK + np.arange(BLOCK, dtype=np.int32)).reshape(-1)
        ops.write_cache(*cache.layer(0), tokens, tokens, slots)
    q = rng.standard_normal((rows, HEADS * SHARED, size), np.float32)
    out, starts, lens = np.empty_like(q), np.array([0, rows], np.int32), np.array([context], np.int32)
    best = float("inf")
    for _ in range(rounds):
        start = time.thread_time()
        for table in tables:
            ops.attention(out, q, *cache.layer(0), table, starts, lens, size**-0.5)
        best = min(best, (time.thread_time() - start) / copies)
    seen = rows * (2 * context - rows + 1) // 2
    products = 4 * seen * HEADS * SHARED * size
    return {
        "dtype": dtype,
        "context": context,
        "rows": rows,
        "size": size,
        "seconds": best,
        "gb_s": one.nbytes / best / 1e9,
        "gflops": products / best / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "bfloat16"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 512])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--isa")
    args = parser.parse_args()
    ops = CpuOps(1, isa=args.isa)
    lines = []
    for size in args.sizes:
        for context in args.contexts:
            for rows in args.rows:
                for dtype in args.dtypes:
                    line = measure(ops, dtype, context, rows, size, args.rounds)
                    lines.append(line)
                    does = f"{line['gb_s']:9.1f} GB/s" if rows == 1 else f"{line['gflops']:9.1f} GFLOPS"
                    where = f"{dtype:10} {context:6} tokens {rows:4} rows of {size:4}"
                    print(f"{where}{line['seconds'] * 1e6:12.1f} us{does}", flush=True)
    print(json.dumps({"isa": ops.name, "results": lines}))


if __name__ == "__main__":
    main()
