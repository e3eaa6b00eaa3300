"""`tramontane bench`: speed of a model here, as a user of the Python API meets it.

Owns the workloads, their timing and the report. Must not know: the engine.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tramontane.cli.options import AsJson, Backend, Device, Model, Profile, Settings, Threads, open_llm

if TYPE_CHECKING:
    from tramontane.llm import LLM

_WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
_FIRST = 128
"""Tokens of the prompt before which the time to first token is taken."""


def bench(
    model: Model = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that measures prefill.")] = 512,
    generate: Annotated[int, typer.Option(min=2, help="Tokens that each sequence generates.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of the batch run.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are reported.")] = 3,
    as_json: AsJson = False,
    backend: Backend = None,
    device: Device = None,
    threads: Threads = None,
    option: Settings = None,
    profile: Profile = None,
) -> None:
    """Measure prefill, decode, batch and time to first token. The last line is the report as JSON."""
    from tramontane.cli.terminal import one_line, print_json

    # A cached prefix would answer for the prefill: leave the cache out.
    with open_llm(model, device, threads, option, backend=backend, profile=profile, prefix_caching=False) as llm:
        report = measure(llm, prompt=prompt, generate=generate, batch=batch, rounds=rounds)
    if not as_json:
        for name, value in report.items():
            shown = f"{value:.3f}" if isinstance(value, float) else one_line(str(value))
            print(f"{name:<28}{shown:>14}")
    print_json(report)


def measure(llm: LLM, *, prompt: int = 512, generate: int = 64, batch: int = 16, rounds: int = 3) -> dict[str, Any]:
    """Medians over rounds: speeds in tokens a second, times in milliseconds, bandwidth in GB/s.

    The share of bandwidth takes each decoded token to read every weight once. Batch counts the generated tokens of
    all sequences over the time of the whole call, their prefill of 32 tokens included. What needs the size of the
    weights is None for a backend that does not tell it.
    """
    import statistics

    from tramontane.backends.base import HasStats

    _timed(llm, _ids(llm, 32, "warm-up"), 4)  # the first request touches memory and builds the workspace
    rows: dict[str, list[float]] = {"prefill": [], "decode": [], "batch": [], "ttft": []}
    for turn in range(rounds):
        first, _ = _timed(llm, _ids(llm, prompt, f"prefill {turn}"), 2)
        rows["prefill"].append(prompt / first)
        first, rate = _timed(llm, _ids(llm, _FIRST, f"decode {turn}"), generate)
        rows["ttft"].append(first * 1000)
        rows["decode"].append(rate)
        rows["batch"].append(_batch(llm, [_ids(llm, 32, f"batch {turn} {i}") for i in range(batch)], generate))
    weights = llm.stats().weight_bytes if isinstance(llm.backend, HasStats) else None
    medians = {name: statistics.median(values) for name, values in rows.items()}
    bandwidth = memory_bandwidth()
    read = None if weights is None else weights * medians["decode"] / 1e9
    return {
        "model": llm.capabilities().model,
        "prompt_tokens": prompt,
        "generated_tokens": generate,
        "batch_sequences": batch,
        "rounds": rounds,
        "prefill_tokens_per_s": medians["prefill"],
        "decode_tokens_per_s": medians["decode"],
        "batch_tokens_per_s": medians["batch"],
        f"ttft_{_FIRST}_ms": medians["ttft"],
        "weight_gb": None if weights is None else weights / 1e9,
        "memory_gb_per_s": bandwidth,
        "decode_gb_per_s": read,
        "decode_bandwidth_share": None if read is None else read / bandwidth,
    }


def memory_bandwidth(nbytes: int = 1 << 29, rounds: int = 3) -> float:
    """GB/s of reading memory with every core that this process may use, the best of some rounds.

    Reads `nbytes`, or a quarter of the free memory where that is less.
    """
    import threading

    import numpy as np

    from tramontane.platform import available_memory, cpu_count

    workers = cpu_count()
    data = np.ones((workers, min(nbytes, available_memory() // 4) // workers // 4), np.float32)

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


def _ids(llm: LLM, count: int, seed: str) -> list[int]:
    """A prompt of `count` tokens, different for every seed."""
    import random

    return llm.tokenize(" ".join(random.Random(seed).choices(_WORDS, k=count)))[:count]


def _params(generate: int) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": generate, "ignore_eos": True}


def _timed(llm: LLM, ids: list[int], generate: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens a second from there to the last."""
    began, first, first_tokens, tokens = time.perf_counter(), 0.0, 0, 0
    for chunk in llm.stream(ids, **_params(generate)):
        tokens += len(chunk.token_ids)
        if tokens and not first_tokens:
            first, first_tokens = time.perf_counter() - began, tokens
    rest = time.perf_counter() - began - first
    return first, (tokens - first_tokens) / rest


def _batch(llm: LLM, prompts: list[list[int]], generate: int) -> float:
    """Generated tokens a second over all sequences, prefill included."""
    began = time.perf_counter()
    results = llm.generate(prompts, **_params(generate))
    return sum(len(r.token_ids) for r in results) / (time.perf_counter() - began)
