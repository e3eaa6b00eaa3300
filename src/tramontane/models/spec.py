"""ModelSpec: a decoder as data. Families fill it in, the one decoder obeys it.

Owns the fields in which supported families differ, and the cache groups that follow from them.
Must not know: arrays, files, a family's name as a condition.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from tramontane.records import dataclass

Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu_squared", "swiglu_clamped"]
"""`swiglu_clamped` is gpt-oss's: min(g, limit) * sigmoid(1.702 * min(g, limit)) * (clamp(u, limit) + 1)."""


@dataclass(frozen=True)
class NormSpec:
    """A norm over the last axis."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-5
    weight: bool = True
    bias: bool = False


@dataclass(frozen=True)
class RopeScaling:
    """A published stretch of the rotary frequencies; fields as in Hugging Face's `rope_scaling`."""

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: float
    original_context_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """Scale of cos and sin; None: what the kind's paper says of the factor."""
    truncate: bool = True
    """Whether YaRN's bounds between stretched and kept frequencies are rounded outward to whole dimensions."""
    short_factors: tuple[float, ...] = ()
    """longrope: divisors of the inverse frequencies of sequences up to the original length."""
    long_factors: tuple[float, ...] = ()
    """longrope: those of longer sequences."""


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions over the first `dim` elements of a head (of latent attention: the last)."""

    theta: float
    dim: int
    interleaved: bool = False
    """Pairs are (2i, 2i + 1), as GGUF stores llama's q and k, instead of (i, i + dim / 2)."""
    scaling: RopeScaling | None = None
    factors: tuple[float, ...] | None = None
    """Divisors of the dim / 2 inverse frequencies, where a checkpoint stores them as a tensor."""


@dataclass(frozen=True)
class HeadNormSpec:
    """A norm of queries and keys before (or after) their rotation."""

    norm: NormSpec
    over: Literal["head", "heads", "all"] = "head"
    """One weight for every head, a weight a head, or one norm over all heads together."""
    after_rope: bool = False


@dataclass(frozen=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values out of one low-rank vector a token.

    Heads have `head_dim` elements, of which the last `rope.dim`, shared by all keys, are rotated.
    """

    kv_rank: int
    q_rank: int | None = None
    """None: queries are projected directly."""
    norm: NormSpec = NormSpec()


@dataclass(frozen=True)
class AttentionSpec:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec | None
    value_dim: int | None = None
    """None: head_dim."""
    window: int | None = None
    """Positions that a token sees, itself included; None: all."""
    causal: bool = True
    """False: a token sees its whole sequence (with a window: as many positions ahead as behind)."""
    scale: float | None = None
    """Of the scores; None: head_dim ** -0.5."""
    softcap: float = 0.0
    """Scores become cap * tanh(score / cap); 0: they do not."""
    sinks: bool = False
    """Each head has a learned score that takes part in the softmax and stands for nothing."""
    slopes: tuple[float, ...] | None = None
    """ALiBi: what a head's scores lose a position of distance."""
    head_norm: HeadNormSpec | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    clip: float = 0.0
    """Bound of queries, keys and values before their rotation; 0: none."""
    latent: LatentSpec | None = None
    output_gate: bool = False
    """What is attended is weighted with the sigmoid of a projection of the input (Qiu et al., 2025)."""

    @property
    def value_size(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def cached(self) -> tuple[int, int, int]:
        """What the cache keeps of a token: heads, elements of a key, elements of a value. Of latent attention, whose
        heads share it, the vector and the rotated elements of the keys."""
        if self.latent is not None:
            return 1, self.latent.kv_rank, self.rope.dim if self.rope is not None else 0
        return self.num_kv_heads, self.head_dim, self.value_size

    @property
    def makes_keys(self) -> bool:
        """Whether keys and values of heads may be made anew of latent vectors (`layers.latent`): where a stretch of the
        context can be attended to by itself, and they are smaller."""
        if self.latent is None or self.rope is None or self.window is not None or self.slopes is not None:
            return False
        return self.causal and max(self.head_dim - self.rope.dim, self.value_size) < self.latent.kv_rank


@dataclass(frozen=True)
class ConvSpec:
    """A short causal convolution between two gates (LFM2, 2025); its state is what it saw of the last tokens."""

    channels: int
    kernel: int
    """Tokens that a token sees, itself included."""
    bias: bool = False
    """Of the projections and of the convolution."""


@dataclass(frozen=True)
class StateSpaceSpec:
    """A selective state space with a scalar decay a head (Mamba-2; Dao and Gu, 2024)."""

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    """Heads of a group share what writes to the state and what reads it."""
    kernel: int
    norm: NormSpec
    """Of the gated output, over each of `num_groups` parts."""
    conv_bias: bool = True
    bias: bool = False
    """Of the projections."""
    step_limit: tuple[float, float] = (0.0, math.inf)
    """Bounds of a token's step of time."""

    @property
    def inner_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of the convolution: the heads' input, and what writes and reads the state."""
        return self.inner_size + 2 * self.num_groups * self.state_size


@dataclass(frozen=True)
class DeltaSpec:
    """Linear attention that corrects its memory, by the gated delta rule (Yang et al., 2024)."""

    num_heads: int
    """Of values; a multiple of num_key_heads."""
    num_key_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    norm: NormSpec
    """Of a head's output, before it is gated."""

    @property
    def inner_size(self) -> int:
        return self.num_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.num_key_heads * self.key_dim + self.inner_size


@dataclass(frozen=True)
class KeptSpec:
    """What layers keep that this build does not compute."""

    size: int
    """float32 numbers."""


StateSpec = ConvSpec | StateSpaceSpec | DeltaSpec | KeptSpec
"""A mixer whose memory of all tokens before has a fixed size."""


@dataclass(frozen=True)
class MLPSpec:
    intermediate_size: int
    activation: Activation = "silu"
    gated: bool = True
    """down(act(gate(x)) * up(x)); without: down(act(up(x)))."""
    bias: bool = False
    limit: float = 0.0
    """Of `swiglu_clamped`."""


@dataclass(frozen=True)
class RouterSpec:
    """How the experts of a token are chosen and weighted."""

    score: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    normalize: bool = True
    """Weights of the chosen experts add up to one (before `scale`)."""
    scale: float = 1.0
    bias: bool = False
    """Of the router's projection."""
    correction: bool = False
    """A learned number an expert is added to its score for the choice, not for the weight."""
    groups: int = 1
    """Experts are chosen out of the best `top_groups` of so many groups."""
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    """What a group is worth: its best score, or its best two together."""
    jitter: float = 0.01
    """sparsemixer: experts so much worse than the best (twice this, relatively) do not count."""


@dataclass(frozen=True)
class MoESpec:
    """A mixture of experts (Shazeer et al., 2017)."""

    num_experts: int
    top_k: int
    expert: MLPSpec
    router: RouterSpec = RouterSpec()
    shared: MLPSpec | None = None
    """An expert that every token goes to, with weight 1."""
    shared_gate: bool = False
    """The shared expert's output is weighted with a sigmoid of a projection of the input."""


@dataclass(frozen=True)
class LayerSpec:
    """One layer: attention, or a mixer with a state, then a feed-forward part, each a branch that is added to the
    residual stream. A layer may lack either."""

    attention: AttentionSpec | None
    mlp: MLPSpec | MoESpec | None
    norm: NormSpec = NormSpec()
    placement: Literal["pre", "post", "sandwich", "residual"] = "pre"
    """x + f(norm(x)); x + norm(f(x)); x + norm(f(norm(x))); norm(x + f(x))."""
    attention_norm: bool = True
    """False: with placement pre, attention reads the layer's input as it is."""
    parallel: bool = False
    """Both branches read the layer's input. With placement pre."""
    shared_norm: bool = False
    """Of a parallel layer: one norm for both branches."""
    residual_scale: float = 1.0
    """Of what a branch adds."""
    state: StateSpec | None = None
    """In the place of attention."""


@dataclass(frozen=True)
class ModelSpec:
    family: str
    """For people only: nothing below `families` asks for it."""
    hidden_size: int
    vocab_size: int
    context_length: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec | None = NormSpec()
    """After the last layer."""
    tied_embeddings: bool = False
    head: bool = True
    """False: hidden states are all that the model gives."""
    head_bias: bool = False
    embedding_size: int | None = None
    """Of the table of embeddings, where a projection leads from it to the hidden size and back to the head."""
    embedding_scale: float = 1.0
    embedding_norm: NormSpec | None = None
    positions: int = 0
    """Rows of a table of learned positions, which are added to the embeddings."""
    token_types: int = 0
    """Rows of a table of which the first is added to the embeddings, and others for second texts."""
    logit_scale: float = 1.0
    logit_softcap: float = 0.0

    @property
    def causal(self) -> bool:
        """Whether no token sees those after it: then a text can be computed in pieces."""
        return all(attention.causal for attention in self.attentions)

    @property
    def generates(self) -> bool:
        """Whether it can write; else all it does is to read."""
        return self.head and self.causal

    @property
    def attentions(self) -> list[AttentionSpec]:
        """Of the layers that have attention, in order."""
        return [layer.attention for layer in self.layers if layer.attention is not None]

    @property
    def states(self) -> list[StateSpec]:
        """Of the layers that have a state, in order."""
        return [layer.state for layer in self.layers if layer.state is not None]

    def summary(self) -> dict[str, Any]:
        """What people ask of an architecture, for JSON. `latent_size`: elements a token that latent attention keeps
        for all heads together, in place of keys and values."""
        attention = self.attentions
        ropes = [each.rope for each in attention if each.rope is not None]
        mixtures = [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoESpec)]
        parts = [layer.mlp.expert if isinstance(layer.mlp, MoESpec) else layer.mlp for layer in self.layers]
        mlps = [part for part in parts if part is not None]
        return {
            "name": self.family,
            "layers": len(self.layers),
            "hidden_size": self.hidden_size,
            "heads": sorted({each.num_heads for each in attention}),
            "kv_heads": sorted({each.num_kv_heads for each in attention if each.latent is None}),
            "latent_size": sorted({sum(each.cached[1:]) for each in attention if each.latent is not None}),
            "head_dim": sorted({each.head_dim for each in attention}),
            "intermediate_size": sorted({mlp.intermediate_size for mlp in mlps}),
            "activation": sorted({mlp.activation for mlp in mlps}),
            "experts": sorted({moe.num_experts for moe in mixtures}),
            "experts_per_token": sorted({moe.top_k for moe in mixtures}),
            "rope_theta": sorted({rope.theta for rope in ropes}),
            "rope_scaling": sorted({rope.scaling.kind if rope.scaling else "none" for rope in ropes}),
            "states": sorted({type(each).__name__.removesuffix("Spec") for each in self.states}),
            "windows": sorted({each.window for each in attention if each.window is not None}),
            "vocab_size": self.vocab_size,
            "context_length": self.context_length,
            "tied_embeddings": self.tied_embeddings,
            "head": self.head,
            "positions": self.positions,
        }


def length_dependent(spec: ModelSpec) -> RopeScaling | None:
    """The stretch of rotary positions that depends on the length of a sequence, where the model has one.

    Its layers share it: `models.parameters` refuses others.
    """
    ropes = [attention.rope for attention in spec.attentions]
    stretches = [rope.scaling for rope in ropes if rope is not None and rope.scaling is not None]
    return next((scaling for scaling in stretches if scaling.kind in ("dynamic", "longrope")), None)


@dataclass(frozen=True)
class CacheGroup:
    """Layers whose keys and values live and die together: one block table a sequence and group."""

    window: int | None
    layers: tuple[int, ...]


def cache_groups(spec: ModelSpec) -> tuple[CacheGroup, ...]:
    """The cache groups of a model: layers of one window together, cut so that all groups have about equally many.

    A block of the pool holds one block of tokens for every layer of one group, so groups share a pool of equal-sized
    blocks; the size of a block follows from the largest group. Cutting at the size of the smallest kind keeps the
    waste to the last group of each kind. A model without attention has no groups.
    """
    kinds: dict[int | None, list[int]] = {}
    for index, layer in enumerate(spec.layers):
        if layer.attention is not None:
            kinds.setdefault(layer.attention.window, []).append(index)
    size = min((len(layers) for layers in kinds.values()), default=0)
    return tuple(
        CacheGroup(window, tuple(layers[at : at + size]))
        for window, layers in kinds.items()
        for at in range(0, len(layers), size)
    )


def state_shapes(spec: StateSpec) -> tuple[tuple[int, int, int], ...]:
    """Shapes of what a layer keeps of a sequence, float32: the last inputs of its convolution [1, kernel - 1, channels]
    and, where it has one, its recurrent state [heads, rows, columns]."""
    if isinstance(spec, KeptSpec):
        return ((1, 1, spec.size),)
    window = (1, spec.kernel - 1, spec.channels)
    if isinstance(spec, StateSpaceSpec):
        return window, (spec.num_heads, spec.head_dim, spec.state_size)
    if isinstance(spec, DeltaSpec):
        return window, (spec.num_heads, spec.key_dim, spec.value_dim)
    return (window,)
