"""OLMo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.cases.base import LLAMA, Case

_OLMO: dict[str, Any] = {key: value for key, value in LLAMA.items() if key != "head_dim"}

_BARE = {key: value for key, value in _OLMO.items() if key != "rms_norm_eps"}

CASES: Mapping[str, Case] = {
    "olmo": Case("olmo", {**_BARE, "clip_qkv": 0.9}, gguf=True),
    "olmo2": Case("olmo2", {**_OLMO, "attention_bias": True}, gguf=True),
    "olmo3": Case(
        "olmo3",
        {
            **_OLMO,
            "sliding_window": 9,
            "num_hidden_layers": 4,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 500.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "olmoe-unclipped": Case("olmoe", {**_OLMO, "num_experts": 6, "num_experts_per_tok": 3}, gguf=True),
    "olmoe": Case("olmoe", {**_OLMO, "clip_qkv": 0.9, "num_experts": 6, "num_experts_per_tok": 3}),
}
