"""transformers on torch, in bfloat16, which it makes of a GGUF file too. It has no batching of its own beyond rows of
equal length, which these are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from bench.tasks import Order, clock, ordered, serve


class _FirstToken(BaseStreamer):  # type: ignore[misc]
    """Takes the time at which the first token after the prompt comes."""

    def __init__(self) -> None:
        self.calls, self.at = 0, 0.0

    def put(self, value: Any) -> None:
        self.calls += 1
        if self.calls == 2:  # the prompt itself comes first
            self.at = clock()

    def end(self) -> None: ...


class Transformers:
    def __init__(self, order: Order) -> None:
        torch.set_num_threads(order.threads)
        path = Path(order.model)
        file = {"gguf_file": path.name} if path.is_file() else {}
        place = str(path.parent if file else path)
        self._model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16, **file).eval()

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def answer(self, prompts: list[list[int]], generate: int) -> tuple[float, float]:
        began, first = clock(), _FirstToken()
        ids = torch.tensor(prompts)
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=generate,
            min_new_tokens=generate,
            streamer=first if len(prompts) == 1 else None,
            pad_token_id=0,
        )
        return first.at - began, clock() - began


if __name__ == "__main__":
    order = ordered()
    serve(Transformers(order), order)
