"""GPT-2 and what grew out of it, and OPT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.cases.base import VOCAB, Case

_GPT2: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 96,
    "n_inner": 160,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 128,
    "layer_norm_epsilon": 0.05,
}
_NEOX: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "layer_norm_eps": 0.05,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
}
_OPT: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "ffn_dim": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}

CASES: Mapping[str, Case] = {
    "gpt2": Case("gpt2", _GPT2, gguf=True),
    "gpt2-scaled": Case(
        "gpt2", {**_GPT2, "n_inner": None, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}
    ),
    "gpt_bigcode": Case("gpt_bigcode", _GPT2, gguf=True),
    "gpt_bigcode-heads": Case("gpt_bigcode", {**_GPT2, "multi_query": False}),
    "gpt_neo": Case(
        "gpt_neo",
        {
            "vocab_size": VOCAB,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_layers": 3,
            "num_heads": 6,
            "attention_types": [[["global", "local", "local"], 1]],
            "window_size": 9,
            "max_position_embeddings": 128,
            "layer_norm_epsilon": 0.05,
        },
    ),
    "gptj": Case("gptj", {**_GPT2, "rotary_dim": 4}),
    "codegen": Case("codegen", {**_GPT2, "n_head": 8, "rotary_dim": 8}),
    "gpt_neox": Case("gpt_neox", _NEOX, gguf=True),
    "gpt_neox-steps": Case("gpt_neox", {**_NEOX, "use_parallel_residual": False}, gguf=True),
    "gpt_neox-plain": Case(
        "gpt_neox", {**_NEOX, "attention_bias": False, "hidden_act": "gelu_new", "tie_word_embeddings": True}
    ),
    "opt": Case("opt", _OPT),
    "opt-post-norm": Case("opt", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt-plain": Case("opt", {**_OPT, "enable_bias": False, "layer_norm_elementwise_affine": False}),
}
