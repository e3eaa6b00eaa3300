"""StarCoder2, StableLM and Nemotron."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.cases.base import WIDE, Case

_BASE: Mapping[str, Any] = {key: value for key, value in WIDE.items() if key not in ("rms_norm_eps", "head_dim")}
_STARCODER2 = {**_BASE, "norm_epsilon": 0.05}
_STABLELM = {**_BASE, "layer_norm_eps": 0.05, "partial_rotary_factor": 0.5}
_NEMOTRON = {**_BASE, "norm_eps": 0.05}

CASES: Mapping[str, Case] = {
    "starcoder2": Case("starcoder2", _STARCODER2, gguf=True),
    "starcoder2-window": Case("starcoder2", {**_STARCODER2, "sliding_window": 9}),
    "starcoder2-plain": Case("starcoder2", {**_STARCODER2, "use_bias": False, "tie_word_embeddings": True}, gguf=True),
    "stablelm": Case("stablelm", {**_STABLELM, "use_qkv_bias": True}, gguf=True),
    "stablelm-parallel": Case(
        "stablelm", {**_STABLELM, "use_parallel_residual": True, "qk_layernorm": True}, gguf=True
    ),
    "nemotron": Case("nemotron", {**_NEMOTRON}, gguf=True),
    "nemotron-biases": Case(
        "nemotron", {**_NEMOTRON, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, gguf=True
    ),
}
