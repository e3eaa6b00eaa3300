"""Qwen3, and the mixtures of experts of Qwen2 and Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.cases.base import LLAMA, WIDE, Case

_EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}

_WIDE: dict[str, Any] = {**WIDE, **_EXPERTS, "moe_intermediate_size": 32}

CASES: Mapping[str, Case] = {
    "qwen3": Case("qwen3", {**LLAMA, "attention_bias": True}, gguf=True),
    "qwen3-moe-all": Case("qwen3_moe", {**LLAMA, **_EXPERTS, "norm_topk_prob": True}, gguf=True),
    "qwen2-moe-wide": Case("qwen2_moe", {**_WIDE, "shared_expert_intermediate_size": 32}, gguf=True),
    "qwen3-moe": Case(
        "qwen3_moe", {**LLAMA, **_EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [1], "num_hidden_layers": 4}
    ),
    "qwen2-moe": Case(
        "qwen2_moe",
        {
            **LLAMA,
            **_EXPERTS,
            "norm_topk_prob": False,
            "shared_expert_intermediate_size": 32,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
        },
    ),
}
