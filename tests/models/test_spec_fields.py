"""Every field of the spec matters: change one, and logits move or construction refuses.

A field without a case here, or without a reason to have none, fails `test_every_field_has_a_case`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from tests.models.harness import Rig, make
from tests.models.tiny import TinyModels, tokens
from tramontane.errors import UnsupportedModel
from tramontane.loading.build import load_model
from tramontane.models.decoder import Decoder
from tramontane.models.families.base import change_attention
from tramontane.models.spec import (
    AttentionSpec,
    CacheGroup,
    ConvSpec,
    DeltaSpec,
    HeadNormSpec,
    LatentSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    MoESpec,
    NormSpec,
    RopeScaling,
    RopeSpec,
    RouterSpec,
    StateSpaceSpec,
    cache_groups,
)

OWNERS: tuple[type, ...] = (ModelSpec, NormSpec, LayerSpec, AttentionSpec, LatentSpec, HeadNormSpec, MLPSpec, MoESpec)
OWNERS += (RouterSpec, RopeSpec, RopeScaling, ConvSpec, StateSpaceSpec, DeltaSpec)
Change = Callable[[ModelSpec], ModelSpec]
LENGTH = 60

NOT_COMPUTED = {
    (ModelSpec, "family"): "for people only",
    (ModelSpec, "context_length"): "a limit that the engine keeps; no position depends on it",
}


def model(**values: Any) -> Change:
    return lambda spec: replace(spec, **values)


def layer(**values: Any) -> Change:
    """Changes the last layer alone: the least that must be seen."""
    return lambda spec: replace(spec, layers=(*spec.layers[:-1], replace(spec.layers[-1], **values)))


def attention(**values: Any) -> Change:
    return lambda spec: layer(attention=replace(spec.layers[-1].attention, **values))(spec)


def state(**values: Any) -> Change:
    def change(spec: ModelSpec) -> ModelSpec:
        current = spec.layers[-1].state
        assert current is not None
        return layer(state=replace(current, **values))(spec)

    return change


def mlp(**values: Any) -> Change:
    def change(spec: ModelSpec) -> ModelSpec:
        current = spec.layers[-1].mlp
        assert isinstance(current, MLPSpec)
        return layer(mlp=replace(current, **values))(spec)

    return change


def head_norm(**values: Any) -> Change:
    def change(spec: ModelSpec) -> ModelSpec:
        current = spec.layers[-1].attention.head_norm
        assert current is not None
        return attention(head_norm=replace(current, **values))(spec)

    return change


def norm(**values: Any) -> Change:
    """Of the last layer."""
    return lambda spec: layer(norm=replace(spec.layers[-1].norm, **values))(spec)


def rope(**values: Any) -> Change:
    def change(spec: ModelSpec) -> ModelSpec:
        current = spec.layers[-1].attention.rope
        assert current is not None
        return attention(rope=replace(current, **values))(spec)

    return change


def scaling(**values: Any) -> Change:
    def change(spec: ModelSpec) -> ModelSpec:
        current = spec.layers[-1].attention.rope
        assert current is not None
        assert current.scaling is not None
        return rope(scaling=replace(current.scaling, **values))(spec)

    return change


def moe(**values: Any) -> Change:
    def change(spec: ModelSpec) -> ModelSpec:
        current = spec.layers[-1].mlp
        assert isinstance(current, MoESpec)
        return layer(mlp=replace(current, **values))(spec)

    return change


def router(**values: Any) -> Change:
    def change(spec: ModelSpec) -> ModelSpec:
        current = spec.layers[-1].mlp
        assert isinstance(current, MoESpec)
        return moe(router=replace(current.router, **values))(spec)

    return change


def expert(**values: Any) -> Change:
    def change(spec: ModelSpec) -> ModelSpec:
        current = spec.layers[-1].mlp
        assert isinstance(current, MoESpec)
        return moe(expert=replace(current.expert, **values))(spec)

    return change


def latent(**values: Any) -> Change:
    def change(spec: ModelSpec) -> ModelSpec:
        current = spec.layers[-1].attention.latent
        assert current is not None
        return attention(latent=replace(current, **values))(spec)

    return change


FLIPS: dict[tuple[type, str], list[tuple[str, Change]]] = {
    (ModelSpec, "hidden_size"): [("llama", model(hidden_size=49))],
    (ModelSpec, "vocab_size"): [("llama", model(vocab_size=96))],
    (ModelSpec, "layers"): [("llama", lambda spec: replace(spec, layers=spec.layers[:-1]))],
    (ModelSpec, "norm"): [("llama", model(norm=NormSpec(eps=1e-5)))],
    (ModelSpec, "tied_embeddings"): [("llama", model(tied_embeddings=True)), ("qwen2", model(tied_embeddings=False))],
    (AttentionSpec, "num_heads"): [("llama", attention(num_heads=3))],
    (AttentionSpec, "num_kv_heads"): [("llama", attention(num_kv_heads=3))],
    # Equal products keep every shape, so that only the computation can tell.
    (AttentionSpec, "head_dim"): [
        ("llama", attention(head_dim=6)),
        ("llama", attention(head_dim=24, num_heads=3, num_kv_heads=1)),
    ],
    (MLPSpec, "intermediate_size"): [("llama", mlp(intermediate_size=81))],
    (AttentionSpec, "rope"): [("llama", attention(rope=RopeSpec(500.0, 12))), ("cohere2", attention(rope=None))],
    (MLPSpec, "activation"): [
        *(("llama", mlp(activation=a)) for a in ("gelu", "gelu_tanh", "relu")),
        *(("nemotron", mlp(activation=a)) for a in ("gelu_quick", "gelu_tanh", "relu")),
    ],
    (LayerSpec, "norm"): [("llama", layer(norm=NormSpec(eps=1e-5))), ("phi", norm(eps=1e-5))],
    (AttentionSpec, "window"): [
        ("llama", attention(window=40)),
        ("qwen2-windows", attention(window=10)),
        ("qwen2-windows", attention(window=None)),
    ],
    (AttentionSpec, "qkv_bias"): [("llama", attention(qkv_bias=True)), ("qwen2", attention(qkv_bias=False))],
    (AttentionSpec, "output_bias"): [
        ("llama", attention(output_bias=True)),
        ("llama-biases-tied", attention(output_bias=False)),
    ],
    (MLPSpec, "bias"): [("llama", mlp(bias=True)), ("llama-biases-tied", mlp(bias=False))],
    (RopeSpec, "theta"): [("llama", rope(theta=9000.0)), ("llama-yarn", rope(theta=600.0))],
    (RopeSpec, "dim"): [("llama", rope(dim=10)), ("llama-yarn", rope(dim=10)), ("llama-llama3", rope(dim=8))],
    (RopeSpec, "interleaved"): [("llama", rope(interleaved=True))],
    (RopeSpec, "scaling"): [("llama-yarn", rope(scaling=None)), ("llama", rope(scaling=RopeScaling("linear", 2.0)))],
    (RopeSpec, "factors"): [("llama", rope(factors=(1.0, 1.0, 1.0, 2.0, 3.0, 1.0)))],
    (RopeScaling, "kind"): [
        *(("llama-llama3", scaling(kind=kind)) for kind in ("linear", "yarn")),
        ("llama-dynamic", scaling(kind="linear")),
        ("phi3-longrope", scaling(kind="dynamic")),
    ],
    (RopeScaling, "factor"): [
        (base, scaling(factor=5.0))
        for base in ("llama-linear", "llama-llama3", "llama-yarn", "llama-dynamic", "phi3-longrope")
    ],
    (RopeScaling, "original_context_length"): [
        (base, scaling(original_context_length=90))
        for base in ("llama-llama3", "llama-yarn", "llama-dynamic", "phi3-longrope")
    ],
    (RopeScaling, "low_freq_factor"): [("llama-llama3", scaling(low_freq_factor=0.5))],
    (RopeScaling, "high_freq_factor"): [("llama-llama3", scaling(high_freq_factor=6.0))],
    (RopeScaling, "beta_fast"): [("qwen2-yarn", scaling(beta_fast=1.0))],
    (RopeScaling, "beta_slow"): [("qwen2-yarn", scaling(beta_slow=0.6))],
    (RopeScaling, "attention_factor"): [
        ("llama-yarn", scaling(attention_factor=1.2)),
        ("qwen2-yarn", scaling(attention_factor=None)),
    ],
    (RopeScaling, "truncate"): [("qwen2-yarn", scaling(truncate=True)), ("llama-yarn", scaling(truncate=False))],
}

FLIPS |= {
    (ModelSpec, "head"): [("llama", model(head=False))],
    (ModelSpec, "head_bias"): [("phi", model(head_bias=False)), ("llama", model(head_bias=True))],
    (ModelSpec, "embedding_size"): [("opt-post-norm", model(embedding_size=None)), ("opt", model(embedding_size=20))],
    (ModelSpec, "embedding_scale"): [("gemma", model(embedding_scale=1.0)), ("llama", model(embedding_scale=2.0))],
    (ModelSpec, "embedding_norm"): [("bloom", model(embedding_norm=None)), ("llama", model(embedding_norm=NormSpec()))],
    (ModelSpec, "positions"): [("gpt2", model(positions=0)), ("llama", model(positions=256))],
    (ModelSpec, "token_types"): [("llama", model(token_types=2))],
    (ModelSpec, "logit_scale"): [("cohere", model(logit_scale=1.0))],
    (ModelSpec, "logit_softcap"): [("gemma2", model(logit_softcap=0.0)), ("gemma2", model(logit_softcap=8.0))],
    (NormSpec, "kind"): [("cohere", norm(kind="rms")), ("llama", norm(kind="layer"))],
    (NormSpec, "eps"): [("llama", norm(eps=1e-5)), ("cohere", norm(eps=1e-5))],
    (NormSpec, "weight"): [("opt-plain", norm(weight=True)), ("cohere", norm(weight=False))],
    (NormSpec, "bias"): [("cohere", norm(bias=True)), ("phi", norm(bias=False))],
    (LayerSpec, "placement"): [
        *(("gemma2", layer(placement=place)) for place in ("pre", "post", "residual")),
        ("opt", layer(placement="residual")),
        ("opt-post-norm", layer(placement="pre")),
    ],
    (LayerSpec, "parallel"): [
        ("phi", layer(parallel=False)),
        ("gpt_neox", layer(parallel=False)),
        ("gpt_neox-steps", layer(parallel=True)),
    ],
    (LayerSpec, "shared_norm"): [("phi", layer(shared_norm=False)), ("gpt_neox", layer(shared_norm=True))],
    (LayerSpec, "residual_scale"): [("llama", layer(residual_scale=0.9)), ("phi", layer(residual_scale=0.9))],
    (LayerSpec, "attention_norm"): [("llama", layer(attention_norm=False))],
    (AttentionSpec, "causal"): [("llama", attention(causal=False)), ("qwen2-windows", attention(causal=False))],
    (AttentionSpec, "scale"): [("gemma2-scaled", attention(scale=None)), ("llama", attention(scale=0.2))],
    (AttentionSpec, "softcap"): [("gemma2", attention(softcap=0.0)), ("gemma2", attention(softcap=5.0))],
    (AttentionSpec, "slopes"): [("bloom", attention(slopes=None)), ("mpt", attention(slopes=(0.3,) * 6))],
    (AttentionSpec, "head_norm"): [
        ("phi-head-norm", attention(head_norm=None)),
        ("llama", attention(head_norm=HeadNormSpec(NormSpec()))),
    ],
    (AttentionSpec, "clip"): [("mpt-clipped", attention(clip=0.0)), ("mpt-clipped", attention(clip=0.7))],
    (HeadNormSpec, "norm"): [("phi-head-norm", head_norm(norm=NormSpec("layer", 1e-5, bias=True)))],
    (HeadNormSpec, "over"): [("cohere-head-norm", head_norm(over="all")), ("cohere-head-norm", head_norm(over="head"))],
    (MLPSpec, "gated"): [("llama", mlp(gated=False)), ("gpt2", mlp(gated=True))],
    (RopeScaling, "short_factors"): [("phi3-longrope", scaling(short_factors=(1.0, 1.0)))],
    (RopeScaling, "long_factors"): [("phi3-longrope", scaling(long_factors=(1.0, 3.0, 4.0, 5.0)))],
}

FLIPS |= {
    (LayerSpec, "attention"): [
        ("llama", lambda spec: layer(attention=replace(spec.layers[0].attention, scale=0.1))(spec))
    ],
    (LayerSpec, "mlp"): [("mixtral", layer(mlp=MLPSpec(80))), ("llama", layer(mlp=MoESpec(4, 2, MLPSpec(80))))],
    (AttentionSpec, "value_dim"): [
        ("deepseek-v3", attention(value_dim=None)),
        ("deepseek-v3", attention(value_dim=10)),
        ("llama", attention(value_dim=6)),
    ],
    (AttentionSpec, "sinks"): [("gpt-oss", attention(sinks=False)), ("llama", attention(sinks=True))],
    (AttentionSpec, "latent"): [("deepseek-v3", attention(latent=None)), ("llama", attention(latent=LatentSpec(8)))],
    (LatentSpec, "kv_rank"): [("deepseek-v3", latent(kv_rank=19))],
    (LatentSpec, "q_rank"): [("deepseek-v3", latent(q_rank=None)), ("deepseek-v2", latent(q_rank=28))],
    (LatentSpec, "norm"): [
        ("deepseek-v3", latent(norm=NormSpec(eps=0.5))),
        ("deepseek-v3", latent(norm=NormSpec("layer", 1e-6))),
    ],
    (HeadNormSpec, "after_rope"): [
        ("hunyuan", head_norm(after_rope=False)),
        ("qwen3", head_norm(after_rope=True)),
    ],
    (MLPSpec, "limit"): [("gpt-oss", expert(limit=0.7))],
    (MoESpec, "num_experts"): [("mixtral", moe(num_experts=4))],
    (MoESpec, "top_k"): [("mixtral", moe(top_k=3)), ("deepseek-v3", moe(top_k=2))],
    (MoESpec, "expert"): [
        ("mixtral", expert(activation="gelu")),
        ("mixtral", expert(intermediate_size=79)),
        ("mixtral", expert(gated=False)),
        ("mixtral", expert(bias=True)),
        ("gpt-oss", expert(bias=False)),
        ("gpt-oss", expert(activation="silu")),
    ],
    (MoESpec, "router"): [("mixtral", moe(router=RouterSpec("sigmoid")))],
    (MoESpec, "shared"): [("deepseek-v3", moe(shared=None)), ("mixtral", moe(shared=MLPSpec(80)))],
    (MoESpec, "shared_gate"): [("qwen2-moe", moe(shared_gate=False)), ("deepseek-v3", moe(shared_gate=True))],
    (RouterSpec, "score"): [
        ("mixtral", router(score="sigmoid")),
        ("deepseek-v3", router(score="softmax")),
        ("phimoe", router(score="softmax")),
        ("mixtral", router(score="sparsemixer")),
    ],
    (RouterSpec, "normalize"): [
        ("mixtral", router(normalize=False)),
        ("qwen2-moe", router(normalize=True)),
        ("phimoe", router(normalize=True)),
    ],
    (RouterSpec, "scale"): [("deepseek-v3", router(scale=1.0)), ("mixtral", router(scale=0.9))],
    (RouterSpec, "bias"): [("gpt-oss", router(bias=False)), ("mixtral", router(bias=True))],
    (RouterSpec, "correction"): [("deepseek-v3", router(correction=False)), ("mixtral", router(correction=True))],
    (RouterSpec, "groups"): [
        ("deepseek-v3", router(groups=2, top_groups=1)),
        ("deepseek-v2-groups", router(groups=8, top_groups=4)),
    ],
    (RouterSpec, "top_groups"): [
        ("deepseek-v3", router(top_groups=3)),
        ("deepseek-v2-groups", router(top_groups=3)),
    ],
    (RouterSpec, "group_score"): [
        ("deepseek-v3", router(group_score="max")),
        ("deepseek-v2-groups", router(group_score="top2")),
    ],
    (RouterSpec, "jitter"): [("phimoe", router(jitter=0.05))],
}

FLIPS |= {
    (LayerSpec, "state"): [("lfm2", layer(state=None)), ("llama", layer(attention=None, state=ConvSpec(48, 3)))],
    (AttentionSpec, "output_gate"): [
        ("qwen3-next", lambda spec: change_attention(spec, output_gate=False)),
        ("llama", attention(output_gate=True)),
    ],
    (ConvSpec, "channels"): [("lfm2", state(channels=47))],
    (ConvSpec, "kernel"): [("lfm2", state(kernel=4))],
    (ConvSpec, "bias"): [("lfm2", state(bias=True)), ("lfm2-biases", state(bias=False))],
    (StateSpaceSpec, "num_heads"): [("mamba2", state(num_heads=4, head_dim=24))],
    (StateSpaceSpec, "head_dim"): [("mamba2", state(head_dim=11))],
    # Equal products keep every shape.
    (StateSpaceSpec, "state_size"): [("mamba2", state(state_size=20, num_groups=1))],
    (StateSpaceSpec, "num_groups"): [("mamba2", state(state_size=5, num_groups=4))],
    (StateSpaceSpec, "kernel"): [("mamba2", state(kernel=3))],
    (StateSpaceSpec, "norm"): [("mamba2", state(norm=NormSpec(eps=1e-5)))],
    (StateSpaceSpec, "conv_bias"): [("mamba2", state(conv_bias=False)), ("mamba2-biases", state(conv_bias=True))],
    (StateSpaceSpec, "bias"): [("mamba2", state(bias=True)), ("mamba2-biases", state(bias=False))],
    (StateSpaceSpec, "step_limit"): [
        ("mamba2", state(step_limit=(0.3, 0.6))),
        ("mamba2-biases", state(step_limit=(0.0, 0.9))),
        ("mamba2-biases", state(step_limit=(0.2, 0.5))),
    ],
    (DeltaSpec, "num_heads"): [("qwen3-next", state(num_heads=12, value_dim=5))],
    (DeltaSpec, "num_key_heads"): [("qwen3-next", state(num_key_heads=1, key_dim=16))],
    (DeltaSpec, "key_dim"): [("qwen3-next", state(key_dim=7))],
    (DeltaSpec, "value_dim"): [("qwen3-next", state(value_dim=9))],
    (DeltaSpec, "kernel"): [("qwen3-next", state(kernel=3))],
    (DeltaSpec, "norm"): [("qwen3-next", state(norm=NormSpec(eps=1e-5)))],
}

CASES = [
    pytest.param(base, change, id=f"{owner.__name__}.{field}-{base}-{number}")
    for (owner, field), changes in FLIPS.items()
    for number, (base, change) in enumerate(changes)
]


def test_every_field_has_a_case() -> None:
    named = {(owner, field.name) for owner in OWNERS for field in fields(owner)}
    assert named == FLIPS.keys() | NOT_COMPUTED.keys()


@pytest.mark.parametrize(("base", "change"), CASES)
def test_a_changed_field_shows(base: str, change: Change, tiny_models: TinyModels) -> None:
    ids = tokens(LENGTH)
    loaded = load_model(tiny_models.get(base).path, make("reference"))
    changed = change(loaded.spec)
    assert changed != loaded.spec
    expected = Rig(loaded.decoder).run(ids)
    try:
        decoder = Decoder(changed, loaded.decoder.parameters, loaded.ops)
    except UnsupportedModel:
        return
    assert np.abs(Rig(decoder).run(ids) - expected).max() > 2e-3, "ten times what parity allows"


@pytest.mark.parametrize(("owner", "field"), NOT_COMPUTED)
def test_what_is_not_computed_does_not_show(owner: type, field: str, tiny_models: TinyModels) -> None:
    ids = tokens(20)
    loaded = load_model(tiny_models.get("llama").path, make("reference"))
    value = getattr(loaded.spec, field)
    changed = replace(loaded.spec, **{field: value * 2})
    decoder = Decoder(changed, loaded.decoder.parameters, loaded.ops)
    assert np.array_equal(Rig(decoder).run(ids), Rig(loaded.decoder).run(ids))


def test_cache_groups_cover_each_layer_once_in_groups_of_one_window() -> None:
    base = AttentionSpec(2, 1, 4, RopeSpec(1e4, 4))
    windows = [8, None, 8, 8, None, 16, 8]
    spec = ModelSpec("any", 8, 10, 32, tuple(LayerSpec(replace(base, window=w), MLPSpec(8)) for w in windows))
    groups = cache_groups(spec)
    assert sorted(index for group in groups for index in group.layers) == list(range(7))
    assert all({windows[index] for index in group.layers} == {group.window} for group in groups)
    assert max(len(group.layers) for group in groups) == 1  # the smallest kind, window 16, has one layer
    assert cache_groups(replace(spec, layers=spec.layers[:5])) == (
        CacheGroup(8, (0, 2)),
        CacheGroup(8, (3,)),
        CacheGroup(None, (1, 4)),
    )
