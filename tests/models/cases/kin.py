"""Models that are a llama but for a thing or two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.cases.base import LLAMA, Case, rope

_PLAIN: dict[str, Any] = {key: value for key, value in LLAMA.items() if key != "head_dim"}
_ALPHA = rope("dynamic", factor=1.0, alpha=30.0)

CASES: Mapping[str, Case] = {
    "smollm3": Case(
        "smollm3",
        {
            **_PLAIN,
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 9,
            "attention_bias": True,
            "mlp_bias": True,
            "pad_token_id": None,
        },
    ),
    "exaone4": Case("exaone4", {**_PLAIN, "sliding_window": 9, "sliding_window_pattern": 2}),
    "exaone4-fours": Case("exaone4", {**_PLAIN, "sliding_window": 9, "num_hidden_layers": 5}, gguf=True),
    "smollm3-fours": Case("smollm3", {**_PLAIN, "num_hidden_layers": 5, "pad_token_id": None}, gguf=True),
    "exaone4-unused": Case("exaone4", {**_PLAIN, "sliding_window": 9, "layer_types": ["full_attention"] * 3}),
    "exaone4-whole": Case("exaone4", {**_PLAIN, "sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "ernie": Case("ernie4_5", {**LLAMA, "use_bias": True}, gguf=True),
    "ernie-moe": Case(
        "ernie4_5_moe",
        {
            **_PLAIN,
            "moe_num_experts": 6,
            "moe_k": 2,
            "moe_intermediate_size": 24,
            "moe_num_shared_experts": 2,
            "num_hidden_layers": 4,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
        },
        gguf=True,
    ),
    "hunyuan": Case("hunyuan_v1_dense", {**LLAMA, **_ALPHA, "attention_bias": True}, gguf=True),
    "seed-oss": Case("seed_oss", {**LLAMA, "attention_out_bias": True, "mlp_bias": True}, gguf=True),
    "helium": Case("helium", {**LLAMA, "head_dim": 8, "attention_bias": True}),
    "arcee": Case("arcee", {**LLAMA, "head_dim": 8, "attention_bias": True, "mlp_bias": True}, gguf=True),
}
