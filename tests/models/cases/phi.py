"""Phi 1 and 2, and Phi 3 and 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.cases.base import WIDE, Case, rope

_PHI: Mapping[str, Any] = {
    **{key: value for key, value in WIDE.items() if key not in ("rms_norm_eps", "head_dim")},
    "layer_norm_eps": 0.05,
}

_PHI3: Mapping[str, Any] = {**WIDE, "pad_token_id": 0}

_LONGROPE: Mapping[str, Any] = {
    "original_max_position_embeddings": 32,
    **rope(
        "longrope",
        partial_rotary_factor=0.5,
        short_factor=[1.0, 1.2, 1.5, 1.9],
        long_factor=[1.0, 3.0, 5.0, 7.0],
        original_max_position_embeddings=32,
    ),
}

CASES: Mapping[str, Case] = {
    "phi": Case("phi", {**_PHI, "num_key_value_heads": 6, "partial_rotary_factor": 0.5}, gguf=True),
    "phi-head-norm": Case("phi", {**_PHI, "qk_layernorm": True}),
    "phi3": Case("phi3", {**_PHI3, "sliding_window": 9, "partial_rotary_factor": 0.5}, gguf=True),
    "phi3-longrope": Case("phi3", {**_PHI3, **_LONGROPE}, gguf=True, by_length=True),
}
