"""How speed and memory bear long contexts: decoding behind more and more tokens, and what reading them takes.

    python -m bench.context MODEL [--threads 2] [--tokens 128 8000 32000] [--json FILE]

One sequence at a time, 32 tokens decoded behind each prompt; the median of the times between them counts. What a step
reads explains how much longer it takes: all weights once, and the cache's bytes of the context. `grown` is how much
resident memory grew while a prompt was read (600 tokens were before), `cache` how many bytes of the cache it fills:
what grows besides is what chunks of a long prompt hold, and should not follow its length.
"""

from __future__ import annotations

import asyncio
import statistics

from bench.loads import Report, answer_if_asked, apart, parser, prompts, watch, write
from tramontane import AsyncLLM
from tramontane.platform import current_rss

ANSWER, BLOCK = 32, 16


def measurement(model: str, threads: int, tokens: int) -> Report:
    async def measured() -> Report:
        blocks = -(-(tokens + ANSWER) // BLOCK) + 8
        llm = AsyncLLM(model, threads=threads, context_length=tokens + 2 * ANSWER, num_blocks=blocks, block_size=BLOCK)
        await watch(llm, prompts(1, min(tokens, 600), 7), 2)  # touches what a chunk needs
        before = current_rss()
        seen = await watch(llm, prompts(1, tokens), ANSWER)
        grown = current_rss() - before
        stats = llm.stats()
        await asyncio.to_thread(llm.close)
        filled = stats.cache_bytes * tokens / (blocks * BLOCK)
        return {
            "between_s": round(statistics.median(seen.between), 5), "first_s": round(seen.first[0], 2),
            "grown_mb": round(grown / 1e6, 1), "cache_mb": round(filled / 1e6, 1),
            "read_mb": round((stats.weight_bytes + filled) / 1e6, 1),
        }  # fmt: skip

    return asyncio.run(measured())


def main() -> None:
    asking = parser(__doc__)
    asking.add_argument("--tokens", type=int, nargs="+", default=[128, 8000, 32000])
    asked = asking.parse_args()
    rows: dict[int, Report] = {}
    for tokens in asked.tokens:
        row = rows[tokens] = apart("bench.context", model=asked.model, threads=asked.threads, tokens=tokens)
        first = rows[asked.tokens[0]]
        kept, explained = first["between_s"] / row["between_s"], first["read_mb"] / row["read_mb"]
        speed = f"{row['between_s']} s a token, {kept:.2f} of the first speed, of which bytes explain {explained:.2f}"
        memory = f"memory grew by {row['grown_mb']} MB, {row['cache_mb']} of it cache; peak {row['peak_mb']} MB"
        print(f"behind {tokens} tokens: {speed}; read in {row['first_s']} s, {memory}")
    write(asked.json, rows)


if __name__ == "__main__" and not answer_if_asked(measurement):
    main()
