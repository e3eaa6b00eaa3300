"""Tiny random checkpoints, made and computed by transformers, in which every feature moves the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

VOCAB = 97

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "rms_norm_eps": 0.05,
    "tie_word_embeddings": False,
}
_QWEN2 = {**_LLAMA, "num_key_value_heads": 3}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


# Lengths in the tests lie on both sides of the windows and of 32, the scalings' original length.
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "llama-biases-tied": (
        "llama",
        {**_LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-linear": ("llama", {**_LLAMA, **_rope("linear", factor=3.0)}),
    "llama-llama3": (
        "llama",
        {
            **_LLAMA,
            **_rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        },
    ),
    "llama-yarn": ("llama", {**_LLAMA, **_rope("yarn", factor=4.0, original_max_position_embeddings=32)}),
    # Rows of whole blocks of 32, so that they can be quantized.
    "llama-wide": ("llama", {**_LLAMA, "hidden_size": 96, "intermediate_size": 160, "head_dim": 16}),
    "qwen2": ("qwen2", {**_QWEN2, "tie_word_embeddings": True}),
    "qwen2-windows": (
        "qwen2",
        {
            **_QWEN2,
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
            "hidden_act": "relu",
        },
    ),
    "qwen2-layer-types": (
        "qwen2",
        {
            **_QWEN2,
            "num_hidden_layers": 5,
            "hidden_act": "gelu_pytorch_tanh",
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "full", "sliding")],
        },
    ),
    "qwen2-yarn": (
        "qwen2",
        {
            **_QWEN2,
            "hidden_act": "gelu",
            **_rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=32,
                beta_fast=2.0,
                beta_slow=0.3,
                mscale=1.5,
                mscale_all_dim=0.7,
                truncate=False,
            ),
        },
    ),
}


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB, count)]


class Tiny:
    """One of CASES: the transformers model, and the folder it is saved in."""

    def __init__(self, name: str, folder: Path) -> None:
        torch = pytest.importorskip("torch", reason="torch is not installed")
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        family, settings = CASES[name]
        kinds = {
            "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
            "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        }
        config, model = kinds[family]
        self.torch, self.path = torch, folder / name
        self.model = model(config(**settings, attn_implementation="eager")).eval()
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for key, value in self.model.named_parameters():
                noise = torch.randn(value.shape, generator=generator)
                if "norm" in key:
                    value.copy_(1 + 0.4 * noise)
                elif value.dim() == 1:
                    value.copy_(0.5 * noise)
                else:
                    value.copy_(noise * (1.6 / value.shape[1] ** 0.5))
        self.model.save_pretrained(self.path)

    def logits(self, ids: Sequence[int], model: Any = None) -> NDArray[Any]:
        """float32 [len(ids), V] of this model, or of a changed copy of it."""
        with self.torch.no_grad():
            logits = (model or self.model)(self.torch.tensor([list(ids)])).logits[0]
        values: NDArray[Any] = logits.float().numpy()
        return values

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The next `count` likeliest tokens, each computed from scratch."""
        out = list(ids)
        for _ in range(count):
            out.append(int(self.logits(out)[-1].argmax()))
        return out[len(ids) :]


class TinyModels:
    """CASES by name, each made once."""

    def __init__(self, folder: Path) -> None:
        self.get = cache(lambda name: Tiny(name, folder))
