"""Phi-3.5-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.models.cases.base import LLAMA, Case, rope

_PHIMOE: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key != "head_dim"},
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "attention_bias": True,
    "lm_head_bias": True,
}
# The scale that follows from the lengths, as files of GGUF have it.
_SCALE = 1.2649110640673518
_LONGROPE = rope(
    "longrope",
    short_factor=[1.0, 1.2, 1.5, 1.9],
    long_factor=[1.0, 3.0, 5.0, 7.0],
    short_mscale=_SCALE,
    long_mscale=_SCALE,
    original_max_position_embeddings=32,
)


def _by_length(model: Any, ids: Any) -> Any:
    """With the divisors of the text's length, as the published code has it; transformers takes the short ones."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model.model.rotary_emb.rope_init_fn = lambda config: ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=ids.shape[1])
    return model(ids).logits


CASES: Mapping[str, Case] = {
    "phimoe": Case("phimoe", {**_PHIMOE, "router_jitter_noise": 0.2, "sliding_window": 40}),
    "phimoe-longrope": Case("phimoe", {**_PHIMOE, **_LONGROPE}, gguf=True, by_length=True, forward=_by_length),
}
