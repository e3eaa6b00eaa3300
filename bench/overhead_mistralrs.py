"""What the backend `mistralrs` adds to mistral.rs's wheel: the same requests through both, in turn, in one process.

    RAYON_NUM_THREADS=1 python bench/overhead_mistralrs.py MODEL.gguf [--pairs 12] [--tokens 48]

Both use one loaded model and ask for the same greedy answer. Of each pair the order alternates, and the figure is the
median of the ratios of a pair: a machine that is busy is so for both halves. Told are the seconds that pass and the
processor's, of all threads, which the work of others hardly moves. The wheel alone is called as its users
call it, a stream read to its end on the calling thread, once without and once with the log probabilities of tokens,
which the backend asks for to learn each token's exact bytes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistralrs

from tramontane import LLM
from tramontane.backends.mistralrs.backend import MistralRSBackend
from tramontane.backends.mistralrs.requests import RAW

PROMPT = "The history of the city begins with"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=48)
    asked = parser.parse_args()
    with LLM(str(asked.model), backend="mistralrs", prefix_caching=False) as llm:
        backend = llm.backend
        assert isinstance(backend, MistralRSBackend)
        runner = backend._streams.runner

        def ours() -> str:
            return llm.generate(PROMPT, temperature=0.0, max_tokens=asked.tokens, ignore_eos=True).text

        def wheel(**more: Any) -> Callable[[], str]:
            def call() -> str:
                request = mistralrs.ChatCompletionRequest(
                    messages=[{"role": RAW, "content": PROMPT}], model="default", stream=True, temperature=0.0,
                    max_tokens=asked.tokens, ignore_eos=True, **more,
                )  # fmt: skip
                told = runner.call("send_chat_completion_request", request)
                return "".join(chunk.choices[0].delta.content or "" for chunk in told)

            return call

        plain, scored = wheel(), wheel(logprobs=True, top_logprobs=1)
        assert ours().strip() == plain().strip() == scored().strip()
        for name, other in (("the wheel", plain), ("the wheel, with log probabilities", scored)):
            report(name, [pair(ours, other, swapped=bool(i % 2)) for i in range(asked.pairs)], asked.tokens)


Times = tuple[float, float]
"""Seconds that passed, seconds of the processor's."""


def pair(one: Callable[[], str], other: Callable[[], str], *, swapped: bool) -> tuple[Times, Times]:
    """What each takes, measured next to each other."""
    first, second = (other, one) if swapped else (one, other)
    times = [timed(first), timed(second)]
    return (times[1], times[0]) if swapped else (times[0], times[1])


def timed(call: Callable[[], str]) -> Times:
    start, busy = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - busy


def report(name: str, pairs: list[tuple[Times, Times]], tokens: int) -> None:
    print(f"against {name}, {len(pairs)} pairs:")
    for i, clock in enumerate(("time", "processor")):
        ratios = [100 * (ours[i] / wheel[i] - 1) for ours, wheel in pairs]
        ours, wheel = (
            statistics.median(times[i] for times in side) * 1000 / tokens for side in zip(*pairs, strict=True)
        )
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"  {clock}: {middle:+.1f} % (quartiles {low:+.1f} to {high:+.1f}), {ours:.2f} and {wheel:.2f} ms a token"
        )


if __name__ == "__main__":
    main()
