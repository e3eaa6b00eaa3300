"""What a tiny checkpoint is made of, and the settings that most share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCAB = 97
LLAMA: Mapping[str, Any] = {
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

WIDE: Mapping[str, Any] = {**LLAMA, "hidden_size": 96, "intermediate_size": 160, "head_dim": 16}
"""With rows of whole blocks of 32, so that they can be quantized."""


@dataclass(frozen=True)
class Case:
    """A tiny model of transformers. Every feature that the settings name should move the logits: lengths in the tests
    lie on both sides of windows of 9, and of 32, the original length of rope scalings."""

    model_type: str
    """Of transformers' configuration."""
    settings: Mapping[str, Any]
    gguf: bool = False
    """Whether GGUF files can tell all of it, and `tests.models.as_gguf` writes it."""
    by_length: bool = False
    """Whether a token's rotation depends on how long its sequence is, so that what was computed before it was as long
    is not what transformers makes of all of it at once."""
    attention: str = "eager"
    """Which of transformers' implementations is the reference."""
    told: str = ""
    """The family that it is saved as, where that is not `model_type`."""
    save: Callable[[Any, Path], None] | None = None
    """Writes the checkpoint, where it is to be in another layout than `save_pretrained`'s."""
    forward: Callable[[Any, Any], Any] | None = None
    """(model, ids [1, T]) -> logits [1, T, V], where the model's own call is not the reference."""


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}
