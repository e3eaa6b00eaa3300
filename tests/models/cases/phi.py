"""Phi 1 and 2, and Phi 3 and 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.cases.base import LLAMA, Case

_PHI: Mapping[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key not in ("rms_norm_eps", "head_dim")},
    "layer_norm_eps": 0.05,
}

_PHI3: Mapping[str, Any] = {**LLAMA, "hidden_size": 72, "pad_token_id": 0}

CASES: Mapping[str, Case] = {
    "phi": Case("phi", {**_PHI, "num_key_value_heads": 6, "partial_rotary_factor": 0.5}, gguf=True),
    "phi-head-norm": Case("phi", {**_PHI, "qk_layernorm": True}),
    "phi3": Case(
        "phi3",
        {**LLAMA, "hidden_size": 72, "sliding_window": 9, "partial_rotary_factor": 0.5, "pad_token_id": 0},
        gguf=True,
    ),
}
