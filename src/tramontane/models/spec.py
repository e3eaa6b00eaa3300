"""ModelSpec: a decoder as data. Families fill it in, the one decoder obeys it.

Owns the fields in which supported families differ, and the cache groups that follow from them.
Must not know: arrays, files, a family's name as a condition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class RopeScaling:
    """A published stretch of the rotary frequencies; fields as in Hugging Face's `rope_scaling`."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_context_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    """Whether YaRN's bounds between stretched and kept frequencies are rounded outward to whole dimensions."""


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions over the first `dim` elements of a head."""

    theta: float
    dim: int
    interleaved: bool = False
    """Pairs are (2i, 2i + 1), as GGUF stores llama's q and k, instead of (i, i + dim / 2)."""
    scaling: RopeScaling | None = None
    factors: tuple[float, ...] | None = None
    """Divisors of the dim / 2 inverse frequencies, where a checkpoint stores them as a tensor."""


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: pre-norm attention, pre-norm gated MLP."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope: RopeSpec
    activation: Activation = "silu"
    norm_eps: float = 1e-5
    window: int | None = None
    """Positions that a token sees, itself included; None: all."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False


@dataclass(frozen=True)
class ModelSpec:
    family: str
    """For people only: nothing below `families` asks for it."""
    hidden_size: int
    vocab_size: int
    context_length: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    tied_embeddings: bool = False


@dataclass(frozen=True)
class CacheGroup:
    """Layers whose keys and values live and die together: one block table a sequence and group."""

    window: int | None
    layers: tuple[int, ...]


def cache_groups(spec: ModelSpec) -> tuple[CacheGroup, ...]:
    """The cache groups of a model: layers of one window together, cut so that all groups have about equally many.

    A block of the pool holds one block of tokens for every layer of one group, so groups share a pool of equal-sized
    blocks; the size of a block follows from the largest group. Cutting at the size of the smallest kind keeps the
    waste to the last group of each kind.
    """
    kinds: dict[int | None, list[int]] = {}
    for index, layer in enumerate(spec.layers):
        kinds.setdefault(layer.window, []).append(index)
    size = min(len(layers) for layers in kinds.values())
    return tuple(
        CacheGroup(window, tuple(layers[at : at + size]))
        for window, layers in kinds.items()
        for at in range(0, len(layers), size)
    )
