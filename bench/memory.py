"""The memory that one load takes, paged and not, and how full the blocks are.

    python -m bench.memory MODEL [--threads 2] [--sequences 32] [--json FILE]

The load: sequences of 32 to 512 tokens of prompt and 64 of answer, all at once. Not paged, a cache must hold a whole
context of 2,048 tokens for each; paged, what they really need. A process's peak counts pages that were touched, its
cache what is set aside. Utilization: tokens over the room in allocated blocks; what is left is waste, all of it in
blocks that are not full yet, since any free block serves any sequence.
"""

from __future__ import annotations

import asyncio
import random
import statistics

from bench.loads import Report, answer_if_asked, apart, parser, prompts, watch, write
from tramontane import AsyncLLM

CONTEXT, BLOCK, ANSWER = 2048, 16, 64


def lengths(sequences: int) -> list[int]:
    return [random.Random(i).randint(32, 512) for i in range(sequences)]


def measurement(model: str, threads: int, sequences: int, paged: bool) -> Report:
    tokens = [length + ANSWER for length in lengths(sequences)]
    whole = CONTEXT // BLOCK
    blocks = max(whole, sum(-(-count // BLOCK) for count in tokens)) if paged else sequences * whole

    async def measured() -> Report:
        llm = AsyncLLM(
            model, threads=threads, context_length=CONTEXT, max_num_seqs=sequences, num_blocks=blocks,
            block_size=BLOCK, paged_attention=paged, prefix_caching=False,
        )  # fmt: skip
        given = [prompts(1, length, seed)[0] for seed, length in enumerate(lengths(sequences))]
        seen = await watch(llm, given, ANSWER, BLOCK)
        stats = llm.stats()
        await asyncio.to_thread(llm.close)
        full = statistics.mean(seen.filled) if seen.filled else 0.0
        return {
            **seen.told(), "utilization": round(full, 4), "cache_mb": round(stats.cache_bytes / 1e6, 1),
            "weights_mb": round(stats.weight_bytes / 1e6, 1),
        }  # fmt: skip

    return asyncio.run(measured())


def main() -> None:
    asking = parser(__doc__)
    asking.add_argument("--sequences", type=int, default=32)
    asked = asking.parse_args()
    rows = {}
    for name, paged in (("not paged", False), ("paged", True)):
        row = rows[name] = apart(
            "bench.memory", model=asked.model, threads=asked.threads, sequences=asked.sequences, paged=paged
        )
        print(
            f"{name:<10} peak {row['peak_mb']} MB, cache {row['cache_mb']} MB, utilization {row['utilization']:.1%}, "
            f"waste {1 - row['utilization']:.1%}, {row['failed']} failed"
        )
    for what in ("peak_mb", "cache_mb"):
        print(f"{what}: paged takes {1 - rows['paged'][what] / rows['not paged'][what]:.0%} less")
    write(asked.json, rows)


if __name__ == "__main__" and not answer_if_asked(measurement):
    main()
