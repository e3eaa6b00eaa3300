"""Throughput by the number of streams, a repeated prefix, and how steady streams are while long prompts arrive.

    python -m bench.throughput MODEL [--threads 2] [--streams 1 4 16 64] [--json FILE]

Prompts of 128 tokens, answers of 64. The prefix: a prompt of 2,000 tokens asked again with another end. Arrivals: four
streams run while prompts of 4,000 tokens keep coming, one behind the other; told is the time between the streams'
tokens, by the default and with `step_target`.
"""

from __future__ import annotations

import asyncio
import statistics
import time

from bench.loads import Report, answer_if_asked, apart, parser, prompts, watch, write
from tramontane import AsyncLLM

PROMPT, ANSWER, PREFIX, LONG = 128, 64, 2000, 4000


def measurement(kind: str, model: str, threads: int, streams: int = 4, step_target: float | None = None) -> Report:
    async def measured() -> Report:
        llm = AsyncLLM(model, threads=threads, context_length=4608, step_target=step_target)
        await watch(llm, prompts(1, 32, 7), 2)  # touches memory
        report = await {"streams": at_once, "prefix": prefix, "arrivals": arrivals}[kind](llm, streams)
        await asyncio.to_thread(llm.close)
        return report

    return asyncio.run(measured())


async def at_once(llm: AsyncLLM, streams: int) -> Report:
    seen = await watch(llm, prompts(streams, PROMPT), ANSWER)
    return {
        **seen.told(), "tokens_s": round(seen.tokens / seen.seconds, 1),
        "first_s": round(statistics.median(seen.first), 4), "between_s": round(statistics.median(seen.between), 5),
    }  # fmt: skip


async def prefix(llm: AsyncLLM, _: int) -> Report:
    """Seconds to the first token of a long prompt, and of one that begins like it."""
    long, ends = prompts(1, PREFIX)[0], prompts(2, 8, 3)
    first = [(await watch(llm, [long + end], 2)).first[0] for end in ends]
    return {"first_s": round(first[0], 4), "again_s": round(first[1], 4), "times": round(first[0] / first[1], 1)}


async def arrivals(llm: AsyncLLM, streams: int) -> Report:
    over = asyncio.Event()

    async def come() -> int:
        number = 0
        await asyncio.sleep(0.5)
        while not over.is_set():
            await watch(llm, prompts(1, LONG, 100 + number), 1)
            number += 1
        return number

    coming = asyncio.ensure_future(come())
    began = time.perf_counter()
    seen = await watch(llm, prompts(streams, PROMPT), 400)
    over.set()
    ordered = sorted(seen.between)
    report = {
        "median_s": round(statistics.median(ordered), 5), "p99_s": round(ordered[int(0.99 * len(ordered))], 5),
        "longest_s": round(ordered[-1], 4), "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    return {**report, "times": round(report["p99_s"] / report["median_s"], 2), "prompts": await coming}


def main() -> None:
    asking = parser(__doc__)
    asking.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64])
    asked = asking.parse_args()
    shared = {"model": asked.model, "threads": asked.threads}
    rows = {}
    for streams in asked.streams:
        row = rows[f"{streams} streams"] = apart("bench.throughput", kind="streams", streams=streams, **shared)
        speed = f"{row['tokens_s']} tokens/s, {row['first_s']} s to the first"
        print(f"{streams:>3} streams: {speed}, peak {row['peak_mb']} MB")
    row = rows["prefix"] = apart("bench.throughput", kind="prefix", **shared)
    print(f"a prefix of {PREFIX} tokens again: {row['first_s']} s, then {row['again_s']} s: {row['times']} times")
    for target in (None, 0.2):
        row = rows[f"arrivals {target}"] = apart("bench.throughput", kind="arrivals", step_target=target, **shared)
        print(
            f"while prompts of {LONG} arrive (step_target={target}): median {row['median_s']} s, 99th percentile "
            f"{row['p99_s']} s = {row['times']} medians, longest {row['longest_s']} s, {row['prompts']} prompts read"
        )
    write(asked.json, rows)


if __name__ == "__main__" and not answer_if_asked(measurement):
    main()
