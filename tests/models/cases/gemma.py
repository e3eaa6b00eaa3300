"""Gemma's generations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.cases.base import WIDE, Case

_GEMMA: Mapping[str, Any] = {**WIDE, "tie_word_embeddings": True}
_GEMMA2: Mapping[str, Any] = {
    **_GEMMA,
    "num_hidden_layers": 4,
    "sliding_window": 9,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 4.0,
    "final_logit_softcapping": 9.0,
}
_GEMMA3: Mapping[str, Any] = {
    **_GEMMA,
    "num_hidden_layers": 7,
    "sliding_window": 9,
    "query_pre_attn_scalar": 16,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 60.0},
    },
}

CASES: Mapping[str, Case] = {
    "gemma": Case("gemma", _GEMMA, gguf=True),
    "gemma-biases": Case("gemma", {**_GEMMA, "attention_bias": True, "hidden_act": "relu"}),
    "gemma2": Case("gemma2", _GEMMA2, gguf=True),
    "gemma2-scaled": Case("gemma2", {**_GEMMA2, "query_pre_attn_scalar": 30, "attention_bias": True}),
    "gemma3": Case("gemma3_text", _GEMMA3, gguf=True),
    "gemma3-kinds": Case(
        "gemma3_text",
        {
            **_GEMMA3,
            "num_hidden_layers": 3,
            "layer_types": [f"{kind}_attention" for kind in ("full", "sliding", "full")],
            "query_pre_attn_scalar": 30,
            "final_logit_softcapping": 9.0,
            "attention_bias": True,
        },
    ),
}
