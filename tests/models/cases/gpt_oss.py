"""gpt-oss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.cases.base import LLAMA, Case, rope

_GPT_OSS: dict[str, Any] = {
    **LLAMA,
    "num_hidden_layers": 4,
    "sliding_window": 9,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "swiglu_limit": 0.8,
    **rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=0.5, truncate=False),
}

CASES: Mapping[str, Case] = {"gpt-oss": Case("gpt_oss", _GPT_OSS)}
