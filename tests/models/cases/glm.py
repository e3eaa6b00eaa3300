"""GLM-4, GLM-4.5 and dots.llm1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.cases.base import LLAMA, Case

_GLM: dict[str, Any] = {**LLAMA, "pad_token_id": None, "attention_bias": True}
_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.4,
}

CASES: Mapping[str, Case] = {
    "glm": Case("glm", _GLM, gguf=True),
    "glm4": Case("glm4", _GLM, gguf=True),
    "glm4-moe": Case("glm4_moe", {**_GLM, **_EXPERTS, "use_qk_norm": True}, gguf=True),
    "dots1": Case(
        "dots1",
        {**LLAMA, **_EXPERTS, "attention_bias": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "dots1-whole": Case("dots1", {**LLAMA, **_EXPERTS, "attention_bias": True}, gguf=True),
}
