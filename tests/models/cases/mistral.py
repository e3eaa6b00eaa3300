"""Mistral's models."""

from __future__ import annotations

from collections.abc import Mapping

from tests.models.cases.base import LLAMA, Case

CASES: Mapping[str, Case] = {
    "mistral-whole": Case("mistral", {**LLAMA, "sliding_window": None}, gguf=True),
    "mistral": Case("mistral", {**LLAMA, "sliding_window": 9}),
    "ministral": Case(
        "ministral",
        {
            **LLAMA,
            "sliding_window": 9,
            "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding")],
        },
    ),
    "mixtral": Case(
        "mixtral", {**LLAMA, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}, gguf=True
    ),
}
