"""Llama and Qwen2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.cases.base import LLAMA, WIDE, Case, rope

_QWEN2: dict[str, Any] = {**LLAMA, "num_key_value_heads": 3}

CASES: Mapping[str, Case] = {
    "llama": Case("llama", LLAMA, gguf=True),
    "llama-biases-tied": Case(
        "llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, gguf=True
    ),
    "llama-linear": Case("llama", {**LLAMA, **rope("linear", factor=3.0)}, gguf=True),
    "llama-dynamic": Case(
        "llama", {**LLAMA, "max_position_embeddings": 32, **rope("dynamic", factor=3.0)}, by_length=True
    ),
    "llama-llama3": Case(
        "llama",
        {
            **LLAMA,
            **rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        },
        gguf=True,
    ),
    "llama-yarn": Case("llama", {**LLAMA, **rope("yarn", factor=4.0, original_max_position_embeddings=32)}, gguf=True),
    "llama-wide": Case("llama", WIDE),
    "qwen2": Case("qwen2", {**_QWEN2, "tie_word_embeddings": True}, gguf=True),
    "qwen2-windows": Case(
        "qwen2",
        {
            **_QWEN2,
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
            "hidden_act": "relu",
        },
    ),
    "qwen2-layer-types": Case(
        "qwen2",
        {
            **_QWEN2,
            "num_hidden_layers": 5,
            "hidden_act": "gelu_pytorch_tanh",
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "full", "sliding")],
        },
    ),
    "qwen2-yarn": Case(
        "qwen2",
        {
            **_QWEN2,
            "hidden_act": "gelu",
            **rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=32,
                beta_fast=2.0,
                beta_slow=0.3,
                mscale=1.5,
                mscale_all_dim=0.7,
                truncate=False,
            ),
        },
    ),
}
