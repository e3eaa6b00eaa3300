"""Granite and its mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.cases.base import LLAMA, Case

_GRANITE: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key != "head_dim"},
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.6,
    "embedding_multiplier": 1.7,
    "logits_scaling": 2.5,
    "attention_bias": True,
}

_WIDE = {"hidden_size": 96, "intermediate_size": 64}

CASES: Mapping[str, Case] = {
    "granite": Case("granite", {**_GRANITE, "mlp_bias": True}, gguf=True),
    "granite-moe": Case("granitemoe", {**_GRANITE, "num_local_experts": 5, "num_experts_per_tok": 2}, gguf=True),
    "granite-moe-wide": Case(
        "granitemoeshared",
        {**_GRANITE, **_WIDE, "num_local_experts": 5, "num_experts_per_tok": 2, "shared_intermediate_size": 32},
        gguf=True,
    ),
    "granite-moe-shared": Case(
        "granitemoeshared",
        {**_GRANITE, "num_local_experts": 5, "num_experts_per_tok": 2, "shared_intermediate_size": 40},
        gguf=True,
    ),
}
