"""Phi-3.5-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.cases.base import LLAMA, Case

_PHIMOE: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key != "head_dim"},
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.2,
    "attention_bias": True,
    "lm_head_bias": True,
    "sliding_window": 40,
}

CASES: Mapping[str, Case] = {"phimoe": Case("phimoe", _PHIMOE)}
