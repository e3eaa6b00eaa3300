"""`tramontane bench`: speed of a model here, as a user of the Python API meets it.

Owns the workloads, their timing and the report. Must not know: the engine.
"""

from __future__ import annotations

import json
import random
import statistics
import threading
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tramontane.cli.options import Device, Model, Settings, Threads, open_llm

if TYPE_CHECKING:
    from tramontane.llm import LLM

_WORDS = "time year people way day man thing woman life child world school state family student group country".split()


def bench(
    model: Model = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that measures prefill.")] = 512,
    generate: Annotated[int, typer.Option(min=2, help="Tokens that each sequence generates.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of the batch run.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are reported.")] = 3,
    device: Device = None,
    threads: Threads = None,
    option: Settings = None,
) -> None:
    """Measure prefill, decode, batch and time to first token. The last line is the report as JSON."""
    # A cached prefix would answer for the prefill: leave the cache out.
    with open_llm(model, device, threads, option, prefix_caching=False) as llm:
        report = measure(llm, prompt=prompt, generate=generate, batch=batch, rounds=rounds)
    for name, value in report.items():
        print(f"{name:<28}{value:>14.1f}" if isinstance(value, float) else f"{name:<28}{value!s:>14}")
    print(json.dumps(report))


def measure(llm: LLM, *, prompt: int = 512, generate: int = 64, batch: int = 16, rounds: int = 3) -> dict[str, Any]:
    """Medians over rounds: speeds in tokens a second, times in milliseconds, bandwidth in GB/s."""
    _timed(llm, _ids(llm, 32, 0), 4)  # the first request touches memory and builds the workspace
    rows: dict[str, list[float]] = {"prefill": [], "decode": [], "batch": [], "ttft": []}
    for turn in range(rounds):
        first, _ = _timed(llm, _ids(llm, prompt, turn), 1)
        rows["prefill"].append(prompt / first)
        first, rest = _timed(llm, _ids(llm, 128, turn), generate)
        rows["ttft"].append(first * 1000)
        rows["decode"].append((generate - 1) / rest)
        rows["batch"].append(_batch(llm, [_ids(llm, 32, 1000 * turn + i) for i in range(batch)], generate))
    stats = llm.stats()
    medians = {name: statistics.median(values) for name, values in rows.items()}
    bandwidth = memory_bandwidth()
    read = stats.weight_bytes * medians["decode"] / 1e9
    return {
        "model": llm.capabilities().model,
        "prompt_tokens": prompt,
        "generated_tokens": generate,
        "batch_sequences": batch,
        "rounds": rounds,
        "prefill_tokens_per_s": medians["prefill"],
        "decode_tokens_per_s": medians["decode"],
        "batch_tokens_per_s": medians["batch"],
        "ttft_128_ms": medians["ttft"],
        "weight_gb": stats.weight_bytes / 1e9,
        "memory_gb_per_s": bandwidth,
        "decode_gb_per_s": read,
        "decode_bandwidth_share": read / bandwidth,
    }


def memory_bandwidth(nbytes: int = 1 << 29, rounds: int = 3) -> float:
    """GB/s of reading memory with every core that this process may use, the best of some rounds."""
    import numpy as np

    from tramontane.platform import cpu_count

    workers = cpu_count()
    data = np.ones((workers, nbytes // workers // 4), np.float32)

    def read(i: int) -> None:
        np.dot(data[i], data[i])  # releases the interpreter lock and is bound by memory

    best = float("inf")
    for _ in range(rounds):
        running = [threading.Thread(target=read, args=(i,)) for i in range(workers)]
        began = time.perf_counter()
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        best = min(best, time.perf_counter() - began)
    return data.nbytes / best / 1e9


def _ids(llm: LLM, count: int, seed: int) -> list[int]:
    words = random.Random(seed).choices(_WORDS, k=count)
    return llm.tokenize(" ".join(words))[:count]


def _params(generate: int) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": generate, "ignore_eos": True}


def _timed(llm: LLM, ids: list[int], generate: int) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    began, first = time.perf_counter(), 0.0
    for chunk in llm.stream(ids, **_params(generate)):
        if not first and chunk.token_ids:
            first = time.perf_counter() - began
    return first, time.perf_counter() - began - first


def _batch(llm: LLM, prompts: list[list[int]], generate: int) -> float:
    """Generated tokens a second over all sequences, prefill included."""
    began = time.perf_counter()
    results = llm.generate(prompts, **_params(generate))
    return sum(len(r.token_ids) for r in results) / (time.perf_counter() - began)
