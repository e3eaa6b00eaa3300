"""What configs and GGUF metadata become, and how hostile ones are refused: by their key."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tramontane.errors import CorruptCheckpoint, TramontaneError, UnsupportedModel
from tramontane.models.families import FAMILIES, GGUFTensors, gguf_names, spec_from_gguf, spec_from_hf
from tramontane.models.spec import LayerSpec, MLPSpec, ModelSpec, MoESpec, NormSpec, RopeScaling

HF: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
QWEN2 = {**HF, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 3,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 100,
}


def windows_of(config: dict[str, Any]) -> list[int | None]:
    return [layer.attention.window for layer in spec_from_hf(config).layers]


def mlp_of(layer: LayerSpec) -> MLPSpec:
    assert isinstance(layer.mlp, MLPSpec)
    return layer.mlp


TENSORS = GGUFTensors({"token_embd.weight": (100, 64), "output.weight": (100, 64)})


def test_defaults_are_those_of_the_config_classes() -> None:
    """A key that is left out, read by us and by transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    optional = (
        "num_key_value_heads",
        "rms_norm_eps",
        "hidden_act",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
    )
    config = {key: value for key, value in HF.items() if key not in optional}
    theirs, ours = transformers.LlamaConfig(**config), spec_from_hf(config)
    layer = ours.layers[0]
    assert layer.attention.num_kv_heads == theirs.num_key_value_heads
    assert layer.attention.rope is not None
    assert layer.attention.head_dim == theirs.head_dim == layer.attention.rope.dim
    assert layer.norm.eps == theirs.rms_norm_eps
    assert isinstance(layer.mlp, MLPSpec)
    assert layer.mlp.activation == theirs.hidden_act
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert (layer.attention.qkv_bias, layer.attention.output_bias, layer.mlp.bias) == (theirs.attention_bias,) * 2 + (
        theirs.mlp_bias,
    )
    assert layer.attention.rope.theta == theirs.rope_parameters["rope_theta"]
    qwen2 = transformers.Qwen2Config(**{key: value for key, value in QWEN2.items() if key not in optional})
    assert spec_from_hf(QWEN2).layers[0].attention.window == qwen2.sliding_window
    assert (
        spec_from_hf({**QWEN2, "use_sliding_window": True, "num_hidden_layers": 30}).layers[29].attention.window == 4096
    )


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_scalings_read_the_same_in_both_spellings(kind: str) -> None:
    values = {"factor": 4.0, "original_max_position_embeddings": 128}
    if kind == "llama3":
        values |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = spec_from_hf({**HF, "rope_theta": 5e5, "rope_scaling": {"type": kind, **values}})
    new = spec_from_hf({**HF, "rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **values}})
    assert old == new
    assert old.layers[0].attention.rope.theta == 5e5
    scaling = old.layers[0].attention.rope.scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor, scaling.original_context_length) == (kind, 4.0, 128)


def test_the_original_length_defaults_to_the_limit_and_the_outer_key_decides() -> None:
    yarn = {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert _original(HF | yarn) == 512
    assert _original(HF | yarn | {"original_max_position_embeddings": 256}) == 256
    yarn["rope_scaling"]["original_max_position_embeddings"] = 64
    assert _original(HF | yarn) == 64


def _original(config: dict[str, Any]) -> int:
    scaling = spec_from_hf(config).layers[0].attention.rope.scaling
    assert scaling is not None
    return scaling.original_context_length


def test_yarn_stretches_a_limit_that_was_left_unstretched() -> None:
    assert spec_from_hf({**HF, "rope_scaling": {"type": "yarn", "factor": 4.0}}).context_length == 2048
    scaled = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert spec_from_hf({**HF, "rope_scaling": scaled}).context_length == 512


def test_windows_follow_max_window_layers_or_layer_types() -> None:
    config = {**QWEN2, "use_sliding_window": True, "sliding_window": 32}
    assert windows_of({**config, "max_window_layers": 2}) == [
        None,
        None,
        32,
    ]
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert windows_of({**config, "layer_types": kinds}) == [
        32,
        None,
        None,
    ]
    assert set(windows_of({**config, "use_sliding_window": False})) == {None}


def test_another_architecture_can_be_named() -> None:
    other = {**HF, "model_type": "polyglot", "architectures": ["PolyglotForCausalLM"]}
    with pytest.raises(UnsupportedModel, match=r"polyglot.*llama, .*qwen2"):
        spec_from_hf(other)
    assert spec_from_hf(other, "llama") == spec_from_hf(HF)
    with pytest.raises(UnsupportedModel, match=r"'gpt9'.*llama, .*qwen2"):
        spec_from_hf(HF, "gpt9")
    stored = {key.replace("llama.", "polyglot."): value for key, value in GGUF.items()}
    stored["general.architecture"] = "polyglot"
    assert spec_from_gguf(stored, TENSORS, "llama") == spec_from_gguf(GGUF, TENSORS)


UNSUPPORTED_HF = {
    "architectures": ["LlamaForTokenClassification"],
    "hidden_act": "mish",
    "sliding_window": 128,
    "layer_types": ["sliding_attention"] * 3,
    "is_causal": False,
    "rope_scaling": {"type": "proportional", "factor": 2.0},
    "rope_parameters": {"full_attention": {"rope_type": "default"}},
}
HYBRID = {**HF, "model_type": "granitemoehybrid", "architectures": ["GraniteMoeHybridForCausalLM"]}
UNSUPPORTED_QWEN2 = {"attention_bias": False, "mlp_bias": True, "use_mrope": True}


@pytest.mark.parametrize(
    ("config", "key"),
    [(HF | {k: v}, k) for k, v in UNSUPPORTED_HF.items()]
    + [(QWEN2 | {k: v}, k) for k, v in UNSUPPORTED_QWEN2.items()]
    + [(HYBRID | {"hidden_act": "gelu"}, "hidden_act")],
)
def test_what_is_not_honoured_is_refused_by_its_key(config: dict[str, Any], key: str) -> None:
    with pytest.raises(UnsupportedModel, match=key):
        spec_from_hf(config)


CORRUPT_HF: list[tuple[str, Any]] = [
    *(("hidden_size", value) for value in (None, "64", 64.0, 0, -1, True, 1 << 40, [64])),
    ("num_hidden_layers", 10**9),
    ("num_attention_heads", 0),
    ("num_attention_heads", 128),
    ("num_key_value_heads", 3),
    ("head_dim", 7),
    ("vocab_size", None),
    ("rms_norm_eps", 0.0),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", "1e-5"),
    ("max_position_embeddings", 1 << 40),
    ("tie_word_embeddings", "yes"),
    ("attention_bias", 1),
    ("rope_theta", -1.0),
    ("rope_theta", float("inf")),
    ("rope_theta", 1.0),
    ("rope_scaling", ["yarn"]),
    ("rope_scaling", {"type": "linear"}),
    ("rope_scaling", {"type": "linear", "factor": 0.0}),
    ("rope_scaling", {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}),
    ("rope_scaling", {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 0}),
]


@pytest.mark.parametrize(("key", "value"), CORRUPT_HF)
def test_impossible_values_are_corrupt(key: str, value: Any) -> None:
    with pytest.raises(CorruptCheckpoint):
        spec_from_hf({**HF, key: value})


CORRUPT_LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("lfm2", {"full_attn_idxs": 5}),
    ("lfm2", {"full_attn_idxs": ["1"]}),
    ("gpt_neo", {"num_layers": 4096, "num_heads": 8, "attention_types": [[["global"] * (1 << 20), 4096]]}),
    *(
        (family, {"sliding_window": None, "layer_types": ["full_attention", "sliding_attention", "full_attention"]})
        for family in ("qwen2", "ministral", "smollm3", "olmo3", "gpt_oss", "dots1")
    ),
]


@pytest.mark.parametrize(("family", "changes"), CORRUPT_LAYERS)
def test_layers_that_nothing_can_be_made_of_are_corrupt(family: str, changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"full_attn_idxs|attention_layers|layer_types"):
        spec_from_hf({**HF, "architectures": None, **changes}, family)


def test_keys_of_a_scaling_that_it_does_not_have_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="long_factor"):
        spec_from_hf({**HF, "rope_scaling": {"type": "linear", "factor": 2.0, "long_factor": [1.0]}})
    with pytest.raises(UnsupportedModel, match="mrope_section"):
        spec_from_hf({**HF, "rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}})


def test_gguf_features_are_read_off_tensors_and_keys() -> None:
    shapes = {
        **TENSORS.shapes,
        "blk.1.attn_q.bias": (64,),
        "blk.2.attn_output.bias": (64,),
        "blk.0.ffn_gate.bias": (128,),
    }
    shapes.pop("output.weight")
    spec = spec_from_gguf(GGUF, GGUFTensors(shapes, rope_factors=(1.0, 1.0, 2.0, 8.0)))
    assert spec.tied_embeddings
    assert [layer.attention.qkv_bias for layer in spec.layers] == [False, True, False]
    assert [layer.attention.output_bias for layer in spec.layers] == [False, False, True]
    assert [mlp_of(layer).bias for layer in spec.layers] == [True, False, False]
    rope = spec.layers[0].attention.rope
    assert (rope.interleaved, rope.factors, rope.theta, rope.dim) == (True, (1.0, 1.0, 2.0, 8.0), 10000.0, 8)
    qwen2 = {key.replace("llama", "qwen2"): value for key, value in GGUF.items()}
    qwen2["general.architecture"] = "qwen2"
    assert not spec_from_gguf(qwen2, TENSORS).layers[0].attention.rope.interleaved


def test_of_two_epsilons_a_bias_decides() -> None:
    """Files of Nemotron, a LayerNorm, and of EXAONE, an RMSNorm, state both."""
    both = {**GGUF, "llama.attention.layer_norm_epsilon": 1e-4}
    biased = GGUFTensors({**TENSORS.shapes, "output_norm.bias": (64,)})
    assert spec_from_gguf(both, biased).norm == NormSpec("layer", 1e-4, bias=True)
    assert spec_from_gguf(both, TENSORS).norm == NormSpec("rms", 1e-5)


def test_gguf_files_without_slopes_or_windows_have_none() -> None:
    def told(family: str, **keys: Any) -> ModelSpec:
        metadata = {key.replace("llama.", f"{family}."): value for key, value in GGUF.items()}
        extra = {f"{family}.attention.{key}": value for key, value in keys.items()}
        return spec_from_gguf({**metadata, "general.architecture": family, **extra}, TENSORS)

    assert told("mpt", max_alibi_bias=0.0).layers[0].attention.slopes is None
    assert told("mpt", max_alibi_bias=8.0).layers[0].attention.slopes is not None
    assert {layer.attention.window for layer in told("gemma3").layers} == {None}
    assert [layer.attention.window for layer in told("gemma2").layers] == [4096, None, 4096]


def test_gguf_keys_are_honoured() -> None:
    keys = {
        "rope.freq_base": 5e5,
        "rope.dimension_count": 4,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "feed_forward_length": [128, 64, 32],
        "attention.head_count_kv": [2, 4, 8],
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 2.0,
    }
    spec = spec_from_gguf(GGUF | {f"llama.{key}": value for key, value in keys.items()}, TENSORS)
    layer = spec.layers[2].attention
    assert layer.rope is not None
    assert (layer.rope.theta, layer.rope.dim, layer.head_dim) == (5e5, 4, 16)
    assert layer.rope.scaling == RopeScaling("linear", 2.0)
    assert [(mlp_of(layer).intermediate_size, layer.attention.num_kv_heads) for layer in spec.layers] == [
        (128, 2),
        (64, 4),
        (32, 8),
    ]


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("expert_count", 8, CorruptCheckpoint),
        ("attention.sliding_window", 128, UnsupportedModel),
        ("logit_scale", 2.0, UnsupportedModel),
        ("attention.causal", False, UnsupportedModel),
        ("attention.value_length", 16, UnsupportedModel),
        ("rope.scaling.type", "longrope", UnsupportedModel),
        ("rope.scaling.attn_factor", 1.5, UnsupportedModel),
        ("rope.scaling.yarn_log_multiplier", 0.1, UnsupportedModel),
        ("rope.dimension_count", 3, CorruptCheckpoint),
        ("rope.dimension_count", 16, CorruptCheckpoint),
        ("rope.freq_base", 0.0, CorruptCheckpoint),
        ("block_count", "3", CorruptCheckpoint),
        ("attention.head_count_kv", [2], CorruptCheckpoint),
        ("attention.head_count_kv", 3, CorruptCheckpoint),
        ("embedding_length", None, CorruptCheckpoint),
    ],
)
def test_gguf_is_refused_by_its_key(key: str, value: Any, error: type[TramontaneError]) -> None:
    with pytest.raises(error, match=rf"llama\.{key}"):
        spec_from_gguf({**GGUF, f"llama.{key}": value}, TENSORS)


def test_gguf_tells_experts_by_their_tensors() -> None:
    """Those of all in one tensor, and Mixtral's first files, with a tensor each."""
    counts = {"llama.expert_count": 4, "llama.expert_used_count": 2}
    stacked = {f"blk.{i}.ffn_up_exps.weight": (4, 32, 64) for i in (1, 2)}
    single = {f"blk.{i}.ffn_up.{e}.weight": (32, 64) for i in (1, 2) for e in range(4)}
    specs = [spec_from_gguf({**GGUF, **counts}, GGUFTensors({**TENSORS.shapes, **each})) for each in (stacked, single)]
    assert specs[0] == specs[1]
    first, second, _ = specs[0].layers
    assert mlp_of(first).intermediate_size == 128
    assert isinstance(second.mlp, MoESpec)
    assert (second.mlp.num_experts, second.mlp.top_k, second.mlp.expert.intermediate_size) == (4, 2, 32)
    target = gguf_names(GGUF).target("blk.1.ffn_up.3.weight")
    assert target is not None
    assert (target.parts, target.number) == (("layers.1.moe.experts.up",), 3)
    with pytest.raises(CorruptCheckpoint, match="expert_count"):
        spec_from_gguf({**GGUF, **counts}, TENSORS)


def test_gguf_rope_factors_must_fit() -> None:
    for factors in ((1.0,), (1.0, 1.0, 1.0, 0.0), (1.0, 1.0, 1.0, float("nan"))):
        with pytest.raises(CorruptCheckpoint, match="rope_freqs"):
            spec_from_gguf(GGUF, GGUFTensors(TENSORS.shapes, factors))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def keys_read() -> set[str]:
    """Every key that some family asks a configuration for."""
    seen: set[str] = set()

    class Recorder(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            seen.add(key)
            return super().get(key, default)

    for family in FAMILIES:
        with suppress(CorruptCheckpoint, UnsupportedModel):
            spec_from_hf(Recorder({**HF, **HF_EXPERTS, "architectures": None}), family)
    return seen - {"architectures", "quantization_config"}


HF_EXPERTS = {"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2}
HF_KEYS = [*HF, "head_dim", "hidden_act", "rope_scaling", "rope_parameters", "rope_theta", "tie_word_embeddings"]
HF_KEYS += ["layer_types", "use_sliding_window", "sliding_window", "max_window_layers", "attention_bias"]
HF_KEYS += ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group", "mlp_only_layers"]
HF_KEYS += [
    "no_rope_layers",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_rope_head_dim",
    "attention_multiplier",
    "logits_scaling",
]
HF_KEYS += ["moe_layer_start_index", "moe_layer_interval", "sliding_window_pattern", "router_jitter_noise", "clip_qkv"]
ROPE_KEYS = ["type", "rope_type", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"]
ROPE_KEYS += [
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "rope_theta",
    "alpha",
    "short_mscale",
]
HF_KEYS = sorted({*HF_KEYS, *keys_read()})


@given(
    family=st.sampled_from(sorted(FAMILIES)),
    changes=st.dictionaries(st.sampled_from(HF_KEYS), JUNK, max_size=3),
    rope=st.dictionaries(st.sampled_from(ROPE_KEYS), JUNK | st.sampled_from(["yarn", "llama3", "linear", 2.0, 8])),
)
def test_any_config_gives_a_spec_or_our_error(family: str, changes: dict[str, Any], rope: dict[str, Any]) -> None:
    config = {**HF, "architectures": None, "rope_scaling": rope, **changes}
    with suppress(CorruptCheckpoint, UnsupportedModel):
        spec_from_hf(config, family)


GGUF_OTHER = ["attention.sliding_window", "attention.layer_norm_epsilon", "attention.max_alibi_bias", "logit_scale"]
GGUF_OTHER += ["attention.clamp_kqv", "final_logit_softcapping", "rope.freq_base_swa", "use_parallel_residual"]
GGUF_OTHER += ["attention.scale", "residual_scale", "embedding_scale", "attention.kv_lora_rank", "nextn_predict_layers"]
GGUF_OTHER += ["attention.key_length_mla", "rope.scaling.yarn_log_multiplier", "expert_count", "expert_used_count"]
GGUF_OTHER += ["expert_gating_func", "expert_weights_scale", "expert_group_count", "expert_group_used_count"]
WITH_EXPERTS = GGUFTensors(
    {**TENSORS.shapes, "blk.1.ffn_up_exps.weight": (8, 16, 64), "blk.1.ffn_up_shexp.weight": (4,)}
)


@given(
    family=st.sampled_from(sorted(name for name, family in FAMILIES.items() if family.from_gguf)),
    changes=st.dictionaries(st.sampled_from([*GGUF, *(f"llama.{key}" for key in GGUF_OTHER)]), JUNK, max_size=3),
)
def test_any_metadata_gives_a_spec_or_our_error(family: str, changes: dict[str, Any]) -> None:
    told = {key.replace("llama.", f"{family}."): value for key, value in {**GGUF, **changes}.items()}
    with suppress(CorruptCheckpoint, UnsupportedModel):
        spec_from_gguf({**told, "general.architecture": family}, TENSORS)
    with suppress(CorruptCheckpoint, UnsupportedModel):
        spec_from_gguf({**told, "general.architecture": family}, WITH_EXPERTS)
