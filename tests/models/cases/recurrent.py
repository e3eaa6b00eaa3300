"""Models with states: LFM2, Mamba-2, Granite 4, Qwen3-Next, Qwen3.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.cases.base import LLAMA, VOCAB, Case

_LFM2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "norm_eps": 0.05,
    "layer_types": ["conv", "full_attention", "conv", "conv"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}

_GRANITE: dict[str, Any] = {
    **LLAMA,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.4,
    "shared_intermediate_size": 40,
    "mamba_n_heads": 8,
    "mamba_d_state": 10,
    "mamba_chunk_size": 16,
}

_QWEN: dict[str, Any] = {
    **LLAMA,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
}

CASES: Mapping[str, Case] = {
    "lfm2": Case("lfm2", {**_LFM2, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.3}),
    "lfm2-biases": Case(
        "lfm2",
        {
            **_LFM2,
            "conv_bias": True,
            "conv_L_cache": 4,
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": False,
        },
    ),
    "lfm2-moe": Case(
        "lfm2_moe",
        {
            **_LFM2,
            "moe_intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "num_dense_layers": 1,
            "routed_scaling_factor": 1.3,
        },
    ),
    "mamba2": Case(
        "mamba2",
        {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_heads": 8,
            "head_dim": 12,
            "state_size": 10,
            "n_groups": 2,
            "conv_kernel": 4,
            "layer_norm_epsilon": 0.05,
            "chunk_size": 16,
        },
    ),
    "mamba2-biases": Case(
        "mamba2",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 24,
            "expand": 3,
            "state_size": 16,
            "n_groups": 1,
            "conv_kernel": 3,
            "use_bias": True,
            "use_conv_bias": False,
            "layer_norm_epsilon": 0.05,
            "chunk_size": 8,
            "time_step_limit": [0.2, 0.9],
            "tie_word_embeddings": True,
        },
    ),
    "granite-hybrid": Case(
        "granitemoehybrid",
        {
            **_GRANITE,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "intermediate_size": 24,
            "mamba_n_groups": 2,
            "time_step_limit": [0.1, 0.8],
        },
    ),
    "granite-hybrid-dense": Case(
        "granitemoehybrid",
        {
            **_GRANITE,
            "num_local_experts": 0,
            "position_embedding_type": "rope",
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "mamba_expand": 1,
            "attention_bias": True,
        },
    ),
    "qwen3-next": Case(
        "qwen3_next",
        {
            **_QWEN,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 32,
            "mlp_only_layers": [1],
            "attention_bias": True,
        },
    ),
    "qwen3-5": Case("qwen3_5_text", _QWEN),
    "qwen3-5-moe": Case(
        "qwen3_5_moe_text",
        {
            **_QWEN,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 32,
        },
    ),
}
