"""Inverse frequencies beside those that transformers computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tramontane.models.decoder import frequencies
from tramontane.models.families import spec_from_hf

BASE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 10,
    "max_position_embeddings": 131072,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama-3.1": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "qwen2.5-yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-untruncated": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.2,
        "mscale_all_dim": 0.707,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 0.8,
    },
}


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str, theta: float) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {**SCALINGS[name], "rope_theta": theta}
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**BASE, rope_parameters=dict(parameters)))
    spec = spec_from_hf({**BASE, "rope_parameters": parameters}, "llama")
    inv_freq, scale = frequencies(spec.layers[0].attention.rope)
    assert inv_freq.dtype == np.float32
    # Powers and logarithms of numpy and torch may differ in their last bit.
    np.testing.assert_allclose(inv_freq, theirs.inv_freq.numpy(), rtol=5e-7)
    assert scale == pytest.approx(theirs.attention_scaling, rel=1e-12)
