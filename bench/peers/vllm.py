"""vLLM for CPUs, in this process, without graphs. It streams only to its server: one token is asked for by itself."""

from __future__ import annotations

import os

from bench.tasks import Order, clock, ordered, serve


class Vllm:
    def __init__(self, order: Order) -> None:
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_KVCACHE_SPACE="1",
            VLLM_LOGGING_LEVEL="ERROR",
            HF_HUB_OFFLINE="1",
        )
        if order.threads < (os.cpu_count() or 1):
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{order.threads - 1}" if order.threads > 1 else "0"
        from vllm import LLM

        self._llm = LLM(
            order.model,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=order.context,
            disable_log_stats=True,
        )

    def answer(self, prompts: list[list[int]], generate: int) -> tuple[float, float]:
        first = self._ask(prompts, 1) if len(prompts) == 1 else 0.0
        return first, first if generate == 1 else self._ask(prompts, generate)

    def _ask(self, prompts: list[list[int]], generate: int) -> float:
        from vllm import SamplingParams

        began = clock()
        params = SamplingParams(temperature=0.0, max_tokens=generate, ignore_eos=True, detokenize=False)
        self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return clock() - began


if __name__ == "__main__":
    order = ordered()
    serve(Vllm(order), order)
