"""Command-R and its second generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.cases.base import WIDE, Case, rope

_COHERE: Mapping[str, Any] = {
    **{key: value for key, value in WIDE.items() if key not in ("rms_norm_eps", "head_dim")},
    "layer_norm_eps": 0.05,
    "logit_scale": 0.5,
    "tie_word_embeddings": True,
    **rope("default"),
}

CASES: Mapping[str, Case] = {
    "cohere": Case("cohere", _COHERE, gguf=True),
    "cohere-head-norm": Case("cohere", {**_COHERE, "use_qk_norm": True, "attention_bias": True}, gguf=True),
    "cohere2": Case("cohere2", {**_COHERE, "num_hidden_layers": 5, "sliding_window": 9}, gguf=True),
}
