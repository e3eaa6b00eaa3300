"""Configurations as they are published, with keys of other times and without those that are at their defaults: we read
of them what we read of the file that transformers makes out of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models.test_families import JUNK
from tests.models.tiny import CASES
from tramontane.errors import CorruptCheckpoint, UnsupportedModel
from tramontane.models.families import spec_from_hf
from tramontane.models.spec import ModelSpec

_SIZES = {
    "vocab_size": 1000, "hidden_size": 4096, "n_embd": 4096, "d_model": 4096, "num_attention_heads": 32, "n_head": 32,
    "num_heads": 32, "n_heads": 32, "intermediate_size": 512, "ffn_dim": 512, "n_inner": 512,
    "num_key_value_heads": 8, "max_position_embeddings": 512, "n_positions": 512, "max_seq_len": 512,
}  # fmt: skip
_KEPT = {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "attention_types"}
BARE: Mapping[str, dict[str, Any]] = {
    case.model_type: {
        "model_type": case.model_type,
        **{key: _SIZES.get(key, value) for key, value in case.settings.items() if key in _SIZES or key in _KEPT},
    }
    for case in CASES.values()
    if not {"n_routed_experts", "state_size", "shared_intermediate_size"}
    & case.settings.keys()  # whose files state all they have
}
"""Sizes alone, of each type."""

_LONG, _SHORT = [4.0 + i / 8 for i in range(48)], [1.0 + i / 64 for i in range(48)]
PUBLISHED: Mapping[str, dict[str, Any]] = {
    "mistral-7b-v0.1": {
        "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
        "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "qwen1.5-moe-a2.7b": {
        "model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
        "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2", "attention_bias": False, "aux_loss_alpha": 0.001, "first_k_dense_replace": 1,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
        "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
        "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128,
        "vocab_size": 102400,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3", "attention_bias": False, "aux_loss_alpha": 0.001, "ep_size": 1,
        "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1,
        "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
        "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128,
        "vocab_size": 129280,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
        "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
        "vocab_size": 201088,
    },
    "granite-3.1-2b": {
        "model_type": "granite", "attention_bias": False, "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
        "logits_scaling": 8.0, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 5000000.0, "tie_word_embeddings": True, "vocab_size": 49155,
    },
    "glm-4-9b-0414": {
        "model_type": "glm4", "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 13696, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 2, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 151552,
    },
    "exaone-4-1.2b": {
        "model_type": "exaone4", "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 4096, "layer_types": ["full_attention"] * 30, "max_position_embeddings": 65536,
        "num_attention_heads": 32, "num_hidden_layers": 30, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "rope_theta": 1000000, "sliding_window": None, "sliding_window_pattern": None,
        "tie_word_embeddings": True, "vocab_size": 102400,
    },
    "hunyuan-0.5b": {
        "model_type": "hunyuan_v1_dense", "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 1024, "intermediate_size": 3584, "max_position_embeddings": 262144,
        "num_attention_heads": 8, "num_hidden_layers": 24, "num_key_value_heads": 4, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "type": "dynamic",
        },
        "rope_theta": 10000.0, "tie_word_embeddings": True, "use_cla": False, "use_qk_norm": True,
        "vocab_size": 120818,
    },
    "phi-2": {
        "model_type": "phi", "hidden_act": "gelu_new", "hidden_size": 2560, "intermediate_size": 10240,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "partial_rotary_factor": 0.4, "qk_layernorm": False, "rope_scaling": None,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 51200,
    },
    "phi-3-mini-128k": {
        "model_type": "phi3", "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": _LONG, "short_factor": _SHORT, "type": "longrope"}, "rope_theta": 10000.0,
        "sliding_window": 262144, "tie_word_embeddings": False, "vocab_size": 32064, "attention_bias": False,
    },
    "phi-4-mini": {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8, "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096, "tie_word_embeddings": True, "vocab_size": 200064,
        "rope_scaling": {"long_factor": _LONG, "short_factor": _SHORT, "type": "longrope"}, "sliding_window": 262144,
    },
    "gemma-2b": {
        "model_type": "gemma", "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048,
        "intermediate_size": 16384, "max_position_embeddings": 8192, "num_attention_heads": 8,
        "num_hidden_layers": 18, "num_key_value_heads": 1, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 10000.0, "vocab_size": 256000,
    },
    "gemma-2-27b": {
        "model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 128,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608,
        "intermediate_size": 36864, "max_position_embeddings": 8192, "num_attention_heads": 32,
        "num_hidden_layers": 46, "num_key_value_heads": 16, "query_pre_attn_scalar": 144, "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text", "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
    },
    "gemma-3-4b, its text": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "command-r": {
        "model_type": "cohere", "attention_bias": False, "hidden_act": "silu", "hidden_size": 8192,
        "intermediate_size": 22528, "layer_norm_eps": 1e-05, "logit_scale": 0.0625,
        "max_position_embeddings": 131072, "num_attention_heads": 64, "num_hidden_layers": 40,
        "num_key_value_heads": 64, "rope_theta": 8000000.0, "use_qk_norm": False, "vocab_size": 256000,
    },
    "command-r7b": {
        "model_type": "cohere2", "hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128,
        "layer_norm_eps": 1e-05, "logit_scale": 0.25, "max_position_embeddings": 8192, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rope_theta": 50000, "sliding_window": 4096,
        "sliding_window_pattern": 4, "vocab_size": 256000,
    },
    "starcoder2-3b": {
        "model_type": "starcoder2", "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072, "intermediate_size": 12288,
        "max_position_embeddings": 16384, "mlp_type": "default", "norm_epsilon": 1e-05, "norm_type": "layer_norm",
        "num_attention_heads": 24, "num_hidden_layers": 30, "num_key_value_heads": 2, "rope_theta": 999999.4420358813,
        "sliding_window": 4096, "use_bias": True, "vocab_size": 49152,
    },
    "stablelm-2-1.6b": {
        "model_type": "stablelm", "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 24,
        "num_key_value_heads": 32, "partial_rotary_factor": 0.25, "rope_theta": 10000, "tie_word_embeddings": False,
        "use_qkv_bias": True, "vocab_size": 100352,
    },
    "minitron-4b": {
        "model_type": "nemotron", "head_dim": 128, "hidden_act": "relu2", "hidden_size": 3072,
        "intermediate_size": 9216, "max_position_embeddings": 4096, "norm_eps": 1e-05, "num_attention_heads": 24,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "partial_rotary_factor": 0.5, "rope_theta": 10000,
        "vocab_size": 256000,
    },
    "falcon-7b": {
        "model_type": "falcon", "alibi": False, "bias": False, "hidden_size": 4544, "layer_norm_epsilon": 1e-05,
        "multi_query": True, "new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32,
        "parallel_attn": True, "vocab_size": 65024,
    },
    "falcon-40b": {
        "model_type": "falcon", "hidden_size": 8192, "new_decoder_architecture": True, "num_attention_heads": 128,
        "num_hidden_layers": 60, "num_kv_heads": 8, "parallel_attn": True, "vocab_size": 65024,
    },
    "falcon-rw-1b": {
        "model_type": "falcon", "alibi": True, "bias": True, "hidden_size": 2048, "multi_query": False,
        "num_attention_heads": 32, "num_hidden_layers": 24, "parallel_attn": False, "vocab_size": 50304,
    },
    "gpt2": {
        "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05, "n_ctx": 1024,
        "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257,
    },
    "santacoder": {
        "model_type": "gpt_bigcode", "activation_function": "gelu_pytorch_tanh", "multi_query": True, "n_embd": 2048,
        "n_head": 16, "n_inner": 8192, "n_layer": 24, "n_positions": 2048, "vocab_size": 49280,
    },
    "pythia-70m": {
        "model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 512, "intermediate_size": 2048,
        "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 8, "num_hidden_layers": 6,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "gpt-j-6b": {
        "model_type": "gptj", "activation_function": "gelu_new", "n_embd": 4096, "n_head": 16, "n_inner": None,
        "n_layer": 28, "n_positions": 2048, "rotary": True, "rotary_dim": 64, "tie_word_embeddings": False,
        "vocab_size": 50400,
    },
    "gpt-neo-125m": {
        "model_type": "gpt_neo", "activation_function": "gelu_new", "attention_types": [[["global", "local"], 6]],
        "hidden_size": 768, "intermediate_size": None, "max_position_embeddings": 2048, "num_heads": 12,
        "num_layers": 12, "vocab_size": 50257, "window_size": 256,
    },
    "opt-350m": {
        "model_type": "opt", "activation_function": "relu", "do_layer_norm_before": False, "ffn_dim": 4096,
        "hidden_size": 1024, "max_position_embeddings": 2048, "num_attention_heads": 16, "num_hidden_layers": 24,
        "vocab_size": 50272, "word_embed_proj_dim": 512, "prefix": "</s>",
    },
    "bloom-560m": {
        "model_type": "bloom", "apply_residual_connection_post_layernorm": False, "layer_norm_epsilon": 1e-05,
        "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16, "skip_bias_add": True, "vocab_size": 250880,
    },
    "mpt-7b": {
        "model_type": "mpt", "d_model": 4096, "emb_pdrop": 0, "expansion_ratio": 4, "learned_pos_emb": True,
        "max_seq_len": 2048, "n_heads": 32, "n_layers": 32, "no_bias": True, "norm_type": "low_precision_layernorm",
        "vocab_size": 50432, "logit_scale": None,
        "attn_config": {
            "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_type": "multihead_attention",
            "attn_uses_sequence_id": False, "clip_qkv": None, "prefix_lm": False, "qk_ln": False,
            "softmax_scale": None,
        },
    },
}  # fmt: skip


def rewritten(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of the file that transformers makes of it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return spec_from_hf(transformers.AutoConfig.for_model(**config).to_dict())


@pytest.mark.parametrize("kind", BARE)
def test_defaults_are_those_of_transformers(kind: str) -> None:
    assert spec_from_hf(BARE[kind]) == rewritten(BARE[kind])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read_as_transformers_reads_them(name: str) -> None:
    assert spec_from_hf(PUBLISHED[name]) == rewritten(PUBLISHED[name])


@given(st.data())
def test_published_files_with_junk_give_a_spec_or_our_error(data: st.DataObject) -> None:
    known = {**BARE, **PUBLISHED}
    config = known[data.draw(st.sampled_from(sorted(known)))]
    keys = st.sampled_from(sorted({*config, *_OTHER} - {"model_type"}))
    with suppress(CorruptCheckpoint, UnsupportedModel):
        spec_from_hf({**config, **data.draw(st.dictionaries(keys, JUNK, min_size=1, max_size=3))})


_OTHER = ("attention_layers", "attention_types", "attn_config", "layer_types", "num_key_value_heads", "rope_parameters")
