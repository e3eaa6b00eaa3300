"""DeepSeek V2 and V3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.cases.base import LLAMA, Case, rope

_LATENT: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key not in ("head_dim", "num_key_value_heads")},
    "num_key_value_heads": 6,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.4,
}
_SMALL = {**_LATENT, "rms_norm_eps": 1e-6}  # as of the latent vectors: files have one
_WIDE = {
    **_SMALL,
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 16,
}
_YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.8, mscale_all_dim=0.5)
_EQUAL = rope("yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=0.7)

CASES: Mapping[str, Case] = {
    "deepseek-v2": Case("deepseek_v2", {**_LATENT, **_YARN, "topk_method": "greedy", "q_lora_rank": None}),
    "deepseek-v2-groups": Case(
        "deepseek_v2",
        {**_LATENT, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "attention_bias": True},
    ),
    "deepseek-v3": Case("deepseek_v3", {**_LATENT, **_YARN, "n_group": 4, "topk_group": 2}),
    "deepseek-v3-halves": Case(
        "deepseek_v3",
        {**_LATENT, "n_group": 2, "topk_group": 1, "rope_interleave": False, "norm_topk_prob": False},
    ),
    "deepseek-v2-small": Case(
        "deepseek_v2", {**_SMALL, **_EQUAL, "topk_method": "greedy", "q_lora_rank": None}, gguf=True
    ),
    "deepseek-v3-wide": Case("deepseek_v3", {**_WIDE, "n_group": 4, "topk_group": 2}, gguf=True),
}
