"""Ours, as a user of the Python API meets it."""

from __future__ import annotations

from bench.tasks import Order, clock, ordered, serve
from tramontane import LLM


class Tramontane:
    def __init__(self, order: Order) -> None:
        self._llm = LLM(order.model, threads=order.threads, prefix_caching=False, context_length=order.context)

    def answer(self, prompts: list[list[int]], generate: int) -> tuple[float, float]:
        began, first = clock(), 0.0
        if len(prompts) > 1:
            self._llm.generate(prompts, temperature=0.0, max_tokens=generate, ignore_eos=True)
            return 0.0, clock() - began
        for chunk in self._llm.stream(prompts[0], temperature=0.0, max_tokens=generate, ignore_eos=True):
            if chunk.token_ids and not first:
                first = clock() - began
        return first, clock() - began


if __name__ == "__main__":
    order = ordered()
    serve(Tramontane(order), order)
