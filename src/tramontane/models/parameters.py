"""A decoder's parameters: their canonical names and shapes, as they follow from its spec.

Owns these names. Must not know: what checkpoints call them, how they are stored or used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from tramontane.errors import UnsupportedModel
from tramontane.models.spec import (
    AttentionSpec,
    ConvSpec,
    KeptSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    MoESpec,
    NormSpec,
    StateSpaceSpec,
    StateSpec,
)
from tramontane.records import dataclass

Parameter = Any
"""A Weight (matrix), Experts (one matrix an expert or a head), or a float32 array (vector)."""


@dataclass(frozen=True)
class Wanted:
    """A parameter that a spec asks for."""

    shape: tuple[int, ...]
    kind: Literal["matrix", "experts", "heads", "vector"]
    """[N,K] as a Weight; [E,N,K] as Experts; the same a head, which files hold one above the other; a float32 array of
    any shape."""


Named = Iterator[tuple[str, Wanted]]


def wanted_parameters(spec: ModelSpec) -> dict[str, Wanted]:
    """Every parameter of the model by its canonical name."""
    return dict(_model(spec))


def check_parameters(spec: ModelSpec, found: Mapping[str, tuple[int, ...]]) -> None:
    """Hold the parameters that there are against those the spec wants. Raises UnsupportedModel naming the first few
    that are missing, not wanted, or of another shape."""
    _check_stretches(spec)
    wanted = wanted_parameters(spec)
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not part of the model" for name in found if name not in wanted]
    problems += [
        f"{name} has shape {list(found[name])} instead of {list(parameter.shape)}"
        for name, parameter in wanted.items()
        if name in found and tuple(found[name]) != parameter.shape
    ]
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UnsupportedModel(
            f"The parameters are not those of the {spec.family} model that the checkpoint describes: "
            f"{', '.join(problems[:4])}{more}.",
            "Check that the configuration belongs to these weights; architecture= names another family.",
        )


def _check_stretches(spec: ModelSpec) -> None:
    """Numbers of a configuration that stand beside parameters and must fit them."""
    ropes = {attention.rope for attention in spec.attentions if attention.rope is not None}
    lengths = set()
    for rope in ropes:
        scaling = rope.scaling
        if scaling is None or scaling.kind not in ("dynamic", "longrope"):
            continue
        lengths.add((scaling.kind, scaling.original_context_length))
        counts = {len(factors) for factors in (scaling.short_factors, scaling.long_factors)}
        if scaling.kind == "longrope" and counts != {rope.dim // 2}:
            raise UnsupportedModel(
                f"longrope has {' and '.join(map(str, sorted(counts)))} factors for {rope.dim // 2} frequencies.",
                "Check the model's configuration.",
            )
    if len(lengths) > 1:
        raise UnsupportedModel(
            "Layers differ in how their positions are stretched with the length of a sequence.",
            "Check the model's configuration.",
        )


def _model(spec: ModelSpec) -> Named:
    hidden, width = spec.hidden_size, spec.embedding_size or spec.hidden_size
    yield "embedding", Wanted((spec.vocab_size, width), "matrix")
    if spec.embedding_size is not None:
        yield from _linear("project_in", hidden, width, False)
        if spec.head:
            yield from _linear("project_out", width, hidden, False)
    if spec.positions:
        yield "positions", Wanted((spec.positions, hidden), "matrix")
    if spec.token_types:
        yield "token_types", Wanted((spec.token_types, hidden), "matrix")
    if spec.embedding_norm is not None:
        yield from _norm("embedding_norm", spec.embedding_norm, hidden)
    for index, layer in enumerate(spec.layers):
        yield from ((f"layers.{index}.{name}", wanted) for name, wanted in _layer(layer, hidden))
    if spec.norm is not None:
        yield from _norm("norm", spec.norm, hidden)
    if spec.head and not spec.tied_embeddings:
        yield "head", Wanted((spec.vocab_size, width), "matrix")
    if spec.head and spec.head_bias:
        yield "head.bias", Wanted((spec.vocab_size,), "vector")


def _layer(layer: LayerSpec, hidden: int) -> Named:
    branches = {"attention": layer.attention or layer.state, "mlp": layer.mlp}
    for branch in (name for name, part in branches.items() if part is not None):
        own = not (layer.parallel and layer.shared_norm) if branch == "mlp" else layer.attention_norm
        if layer.placement != "post" and own:
            yield from _norm(f"{branch}_norm", layer.norm, hidden)
        if layer.placement in ("post", "sandwich"):
            yield from _norm(f"{branch}_post_norm", layer.norm, hidden)
    if layer.attention is not None:
        yield from ((f"attention.{name}", wanted) for name, wanted in _attention(layer.attention, hidden))
    if layer.state is not None:
        yield from ((f"state.{name}", wanted) for name, wanted in _state(layer.state, hidden))
    if isinstance(layer.mlp, MoESpec):
        yield from ((f"moe.{name}", wanted) for name, wanted in _moe(layer.mlp, hidden))
    elif layer.mlp is not None:
        yield from ((f"mlp.{name}", wanted) for name, wanted in _mlp(layer.mlp, hidden))


def _attention(spec: AttentionSpec, hidden: int) -> Named:
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    values = spec.num_heads * spec.value_size
    if spec.latent is not None:
        yield from _latent(spec, hidden)
    else:
        yield from _linear("q", q, hidden, spec.qkv_bias)
        yield from _linear("k", kv, hidden, spec.qkv_bias)
        yield from _linear("v", spec.num_kv_heads * spec.value_size, hidden, spec.qkv_bias)
        if spec.output_gate:
            yield from _linear("gate", values, hidden, spec.qkv_bias)
    yield from _linear("o", hidden, values, spec.output_bias)
    if spec.sinks:
        yield "sinks", Wanted((spec.num_heads,), "vector")
    if spec.head_norm is not None:
        one = spec.head_norm.over == "head"
        yield from _norm("q_norm", spec.head_norm.norm, spec.head_dim if one else q)
        yield from _norm("k_norm", spec.head_norm.norm, spec.head_dim if one else kv)


def _latent(spec: AttentionSpec, hidden: int) -> Named:
    latent, rope = spec.latent, spec.rope
    if latent is None or rope is None or spec.num_heads != spec.num_kv_heads or spec.head_norm is not None:
        raise UnsupportedModel(
            "Latent attention without rotary positions, with grouped keys or with norms of heads is not defined.",
            "Check the model's configuration.",
        )
    plain = spec.head_dim - rope.dim
    if latent.q_rank is not None:
        yield from _linear("q_down", latent.q_rank, hidden, spec.qkv_bias)
        yield from _norm("q_down_norm", latent.norm, latent.q_rank)
    yield from _linear("q", spec.num_heads * spec.head_dim, latent.q_rank or hidden, False)
    yield from _linear("kv_down", latent.kv_rank + rope.dim, hidden, spec.qkv_bias)
    yield from _norm("kv_norm", latent.norm, latent.kv_rank)
    yield "k_up", Wanted((spec.num_heads, latent.kv_rank, plain), "heads")  # of queries, to meet vectors
    yield "v_up", Wanted((spec.num_heads, spec.value_size, latent.kv_rank), "heads")


def _state(spec: StateSpec, hidden: int) -> Named:
    if isinstance(spec, KeptSpec):
        return
    heads, biased = 0, False
    if isinstance(spec, ConvSpec):
        inner, biased, conv_bias = spec.channels, spec.bias, spec.bias
        projected = {"input_gate": inner, "output_gate": inner, "value": inner}
    elif isinstance(spec, StateSpaceSpec):
        inner, heads, biased, conv_bias = spec.inner_size, spec.num_heads, spec.bias, spec.conv_bias
        projected = {"gate": inner, "mixed": spec.channels, "step": heads}
        yield "skip", Wanted((heads,), "vector")
        yield from _norm("norm", spec.norm, inner)
    else:
        inner, heads, conv_bias = spec.inner_size, spec.num_heads, False
        keys = spec.num_key_heads * spec.key_dim
        projected = {"q": keys, "k": keys, "v": inner, "gate": inner, "rate": heads, "step": heads}
        yield from _norm("norm", spec.norm, spec.value_dim)
    for name, outputs in projected.items():
        yield from _linear(name, outputs, hidden, biased)
    yield "conv", Wanted((spec.channels, spec.kernel), "vector")
    if conv_bias:
        yield "conv.bias", Wanted((spec.channels,), "vector")
    if heads:
        yield "log_decay", Wanted((heads,), "vector")
        yield "step_bias", Wanted((heads,), "vector")
    yield from _linear("out", hidden, inner, biased)


def _mlp(spec: MLPSpec, hidden: int) -> Named:
    inner = spec.intermediate_size
    if spec.gated:
        yield from _linear("gate", inner, hidden, spec.bias)
    yield from _linear("up", inner, hidden, spec.bias)
    yield from _linear("down", hidden, inner, spec.bias)


def _moe(spec: MoESpec, hidden: int) -> Named:
    count, inner, expert = spec.num_experts, spec.expert.intermediate_size, spec.expert
    yield from _linear("router", count, hidden, spec.router.bias)
    if spec.router.correction:
        yield "router.correction", Wanted((count,), "vector")
    names = ("gate", "up", "down") if expert.gated else ("up", "down")
    for name in names:
        outputs, inputs = (hidden, inner) if name == "down" else (inner, hidden)
        yield f"experts.{name}", Wanted((count, outputs, inputs), "experts")
        if expert.bias:
            yield f"experts.{name}.bias", Wanted((count, outputs), "vector")
    if spec.shared is not None:
        yield from ((f"shared.{name}", wanted) for name, wanted in _mlp(spec.shared, hidden))
    if spec.shared_gate:
        yield from _linear("shared_gate", 1, hidden, False)


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> Named:
    yield name, Wanted((outputs, inputs), "matrix")
    if bias:
        yield f"{name}.bias", Wanted((outputs,), "vector")


def _norm(name: str, spec: NormSpec, width: int) -> Named:
    if spec.weight:
        yield name, Wanted((width,), "vector")
    if spec.bias:
        yield f"{name}.bias", Wanted((width,), "vector")
