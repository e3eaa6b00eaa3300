"""How many sequences run at once in a cache of one size, paged and not; and 50 and 100 within a limit of memory.

    python -m bench.concurrency MODEL [--threads 2] [--cache-mb 64] [--json FILE]

Not paged (`paged_attention=False`), each sequence reserves a whole context of 2,048 tokens, contiguous: what engines
without paging do. Prompts have 128 tokens, answers 64. The seeds of this project ask for five times as many sequences.
"""

from __future__ import annotations

import asyncio

from bench.loads import Report, answer_if_asked, apart, parser, prompts, watch, write
from tramontane import AsyncLLM

CONTEXT, PROMPT, ANSWER = 2048, 128, 64


def measurement(model: str, threads: int, sequences: int, cache_mb: int, paged: bool) -> Report:
    async def measured() -> Report:
        llm = AsyncLLM(
            model, threads=threads, context_length=CONTEXT, max_num_seqs=256, memory_bytes=cache_mb << 20,
            paged_attention=paged, prefix_caching=False,
        )  # fmt: skip
        seen = await watch(llm, prompts(sequences, PROMPT), ANSWER)
        report = {**seen.told(), "cache_mb": round(llm.stats().cache_bytes / 1e6, 1), "sequences": sequences}
        await asyncio.to_thread(llm.close)
        return report

    return asyncio.run(measured())


def main() -> None:
    asking = parser(__doc__)
    asking.add_argument("--cache-mb", type=int, default=64)
    asked = asking.parse_args()
    rows = {}
    for name, sequences, paged in (("not paged", 64, False), ("paged", 64, True), ("50", 50, True), ("100", 100, True)):
        row = apart(
            "bench.concurrency", model=asked.model, threads=asked.threads, sequences=sequences,
            cache_mb=asked.cache_mb, paged=paged,
        )  # fmt: skip
        rows[name] = row
        print(
            f"{name:<10} {row['sequences']} asked, {row['most_running']} at once at most, {row['failed']} failed, "
            f"{row['tokens'] / row['seconds']:.1f} tokens/s, cache {row['cache_mb']} MB, peak {row['peak_mb']} MB"
        )
    ratio = rows["paged"]["most_running"] / rows["not paged"]["most_running"]
    print(f"paged runs {ratio:.1f} times as many sequences at once")
    write(asked.json, rows)


if __name__ == "__main__" and not answer_if_asked(measurement):
    main()
