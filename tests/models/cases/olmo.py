"""OLMo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.cases.base import LLAMA, Case

_OLMO: dict[str, Any] = {key: value for key, value in LLAMA.items() if key != "head_dim"}

CASES: Mapping[str, Case] = {
    "olmo": Case("olmo", {**_OLMO, "clip_qkv": 0.9}),
    "olmo2": Case("olmo2", {**_OLMO, "attention_bias": True}),
    "olmoe": Case("olmoe", {**_OLMO, "clip_qkv": 0.9, "num_experts": 6, "num_experts_per_tok": 3}),
}
