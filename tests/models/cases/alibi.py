"""BLOOM, MPT and Falcon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.cases.base import VOCAB, Case, rope

_BLOOM: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "n_layer": 3,
    "n_head": 6,
    "layer_norm_epsilon": 0.05,
}
_MPT: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 96,
    "n_layers": 3,
    "n_heads": 6,
    "max_seq_len": 128,
    "layer_norm_epsilon": 0.05,
}
_FALCON: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "layer_norm_epsilon": 0.05,
    **rope("default"),
}


CASES: Mapping[str, Case] = {
    "bloom": Case("bloom", _BLOOM, gguf=True),
    "mpt": Case("mpt", _MPT, gguf=True),
    "mpt-clipped": Case("mpt", {**_MPT, "n_heads": 4, "attn_config": {"clip_qkv": 0.8, "softmax_scale": 0.4}}),
    "falcon": Case("falcon", {**_FALCON, "ffn_hidden_size": 160}, gguf=True),
    "falcon-groups": Case(
        "falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}, gguf=True
    ),
    "falcon-groups-one-norm": Case(
        "falcon",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        gguf=True,
    ),
    # Slopes of four heads are powers of two, which transformers' bfloat16 holds. Its eager attention adds them twice.
    "falcon-alibi": Case(
        "falcon",
        {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        attention="sdpa",
    ),
}
