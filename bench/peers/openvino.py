"""OpenVINO GenAI, reading the GGUF itself, with continuous batching."""

from __future__ import annotations

import numpy as np
import openvino
import openvino_genai

from bench.tasks import Order, clock, ordered, serve


class OpenVino:
    def __init__(self, order: Order) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 1  # GB
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 512
        scheduler.max_num_seqs = 64
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            order.model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": order.threads}
        )

    def answer(self, prompts: list[list[int]], generate: int) -> tuple[float, float]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = generate
        config.ignore_eos = True
        began, first = clock(), 0.0
        handles = [
            self._pipeline.add_request(i, openvino.Tensor(np.array([ids], np.int64)), config)
            for i, ids in enumerate(prompts)
        ]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            if not first and handles[0].can_read():
                first = clock() - began
        return first, clock() - began


if __name__ == "__main__":
    order = ordered()
    serve(OpenVino(order), order)
