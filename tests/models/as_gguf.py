"""A transformers model as a GGUF file in llama.cpp's conventions, written with the gguf package.

The package's own table tells what tensors are called. `CONVENTIONS` tells, family by family, what llama.cpp's converter
does to them, and which keys it writes beside those that all families share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Tensors = dict[str, NDArray[Any]]
"""By their names in transformers."""


@dataclass(frozen=True)
class Convention:
    architecture: str = ""
    """What llama.cpp calls it; "": as transformers does."""
    tensors: Callable[[Tensors, Any], Tensors] = lambda tensors, config: tensors
    """(tensors, config) -> what is stored."""
    keys: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    """config -> metadata below the architecture."""


# ---- tensors ----------------------------------------------------------------------------------------------------


def interleave(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of each head so that the partners of a rotation, half a head apart, become neighbours."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _interleaved(tensors: Tensors, config: Any) -> Tensors:
    heads = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}
    return {
        name: next((interleave(values, count) for part, count in heads.items() if part in name), values)
        for name, values in tensors.items()
    }


def _shifted(tensors: Tensors, config: Any) -> Tensors:
    return {name: values + 1 if name.endswith("norm.weight") else values for name, values in tensors.items()}


def _transposed(tensors: Tensors, config: Any) -> Tensors:
    linears = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: np.ascontiguousarray(v.T) if name.endswith(linears) else v for name, v in tensors.items()}


def _stacked_qkv(tensors: Tensors, config: Any) -> Tensors:
    """Queries, keys and values one after the other, out of groups of heads."""
    groups = _kv_heads(config)
    head_dim = config.hidden_size // config.num_attention_heads

    def stacked(values: NDArray[Any]) -> NDArray[Any]:
        heads = values.reshape(groups, -1, head_dim, *values.shape[1:])
        parts = (heads[:, :-2], heads[:, -2], heads[:, -1])
        return np.concatenate([part.reshape(-1, *values.shape[1:]) for part in parts])

    return {name: stacked(values) if "query_key_value" in name else values for name, values in tensors.items()}


def _bloom(tensors: Tensors, config: Any) -> Tensors:
    return {name.removeprefix("transformer."): v for name, v in _stacked_qkv(tensors, config).items()}


def _stacked_norms(tensors: Tensors, config: Any) -> Tensors:
    """One tensor for the norms of all heads."""
    found: dict[str, list[NDArray[Any]]] = {}
    for name, values in tensors.items():
        one = f"{name.split('norms.')[0]}weight" if "norms." in name else name
        found.setdefault(one, []).append(values)
    return {name: np.stack(values) if len(values) > 1 else values[0] for name, values in found.items()}


def _experts(tensors: Tensors, config: Any) -> Tensors:
    """Gates and ups apart, and under the names that the converter joins single experts' under."""
    found: Tensors = {}
    for name, values in tensors.items():
        name = name.replace("block_sparse_moe.experts.", "mlp.experts.").replace(".router.weight", ".gate.weight")
        name = name.replace("block_sparse_moe.gate", "mlp.gate").replace("shared_mlp.", "mlp.shared_experts.")
        name = name.replace(".gate.moe_statics.", ".moe_statics.").replace("_correction_bias", "_correction.bias")
        if name.endswith((".gate_up_proj", ".input_linear.weight")):
            for part, half in zip(("gate", "up"), np.split(values, 2, axis=-2), strict=True):
                stem = name.removesuffix(".gate_up_proj").removesuffix(".input_linear.weight")
                found[f"{stem}.{part}_proj.weight"] = half
        else:
            name = f"{name}.weight" if name.endswith(".experts.down_proj") else name
            found[name.replace("output_linear", "down_proj")] = values.reshape(-1) if "_correction" in name else values
    return found


def _interleaved_experts(tensors: Tensors, config: Any) -> Tensors:
    return _experts(_interleaved(tensors, config), config)


def _cut_latent(tensors: Tensors, config: Any) -> Tensors:
    """What leads from latent vectors to keys, turned, and to values apart, a matrix a head."""
    found: Tensors = {}
    for name, values in _experts(tensors, config).items():
        if ".kv_b_proj." in name:
            heads = values.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
            keys, rest = np.split(heads, [config.qk_nope_head_dim], axis=1)
            found |= {name.replace("kv_b", "k_b"): keys.swapaxes(1, 2), name.replace("kv_b", "v_b"): rest}
        else:
            found[name] = values
    return found


def _gpt_oss(tensors: Tensors, config: Any) -> Tensors:
    """Experts' outputs first, and gates and ups, which take turns, apart."""
    found: Tensors = {}
    for name, values in tensors.items():
        name = name.replace(".sinks", ".sinks.weight").replace("_proj_bias", "_proj.bias")
        if ".experts." in name and not name.endswith(".bias"):
            name, values = f"{name}.weight", values.swapaxes(-1, -2)
        if ".gate_up_proj." in name:
            for index, part in enumerate(("gate", "up")):
                half = values[:, index::2]
                found[name.replace("gate_up_proj", f"{part}_proj")] = half
        else:
            found[name] = values
    return found


# ---- metadata ---------------------------------------------------------------------------------------------------


def _kv_heads(config: Any) -> int:
    if config.model_type == "falcon":
        return int(config.num_kv_heads) if config.new_decoder_architecture else 1
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _first(config: Any, *names: str, default: Any = None) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), default)


def _common(config: Any) -> Iterable[tuple[str, Any]]:
    yield "block_count", config.num_hidden_layers
    yield "context_length", _first(config, "max_position_embeddings", "n_positions", "max_seq_len", default=2048)
    yield "embedding_length", config.hidden_size
    inner = _first(config, "intermediate_size", "n_inner", "ffn_hidden_size", default=4 * config.hidden_size)
    yield "feed_forward_length", inner
    yield "attention.head_count", config.num_attention_heads
    yield "attention.head_count_kv", _kv_heads(config)
    if getattr(config, "head_dim", None):
        yield "attention.key_length", config.head_dim
        yield "attention.value_length", config.head_dim
    if hasattr(config, "rms_norm_eps"):
        yield "attention.layer_norm_rms_epsilon", config.rms_norm_eps
    else:
        names = ("layer_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon")
        yield "attention.layer_norm_epsilon", _first(config, *names, default=1e-5)
    yield "vocab_size", config.vocab_size


def _rope(config: Any) -> Iterable[tuple[str, Any]]:
    """llama.cpp keeps llama3's stretch and longrope's as tensors of divisors, the others as metadata."""
    stated = getattr(config, "rope_parameters", None)
    if not stated:
        return
    rope = stated.get("full_attention", stated)
    yield "rope.freq_base", rope["rope_theta"]
    if "sliding_attention" in stated:
        yield "rope.freq_base_swa", stated["sliding_attention"]["rope_theta"]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    yield "rope.dimension_count", int(head_dim * rope.get("partial_rotary_factor", 1.0))
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        yield "rope.scaling.type", kind
        yield "rope.scaling.factor", rope["factor"]
    if kind in ("yarn", "longrope"):
        yield "rope.scaling.original_context_length", rope["original_max_position_embeddings"]
    if kind == "longrope":
        factor = config.max_position_embeddings / rope["original_max_position_embeddings"]
        yield "rope.scaling.attn_factor", (1 + np.log(factor) / np.log(rope["original_max_position_embeddings"])) ** 0.5


def _divisors(model: Any) -> Iterable[tuple[str, NDArray[Any]]]:
    stated = getattr(model.config, "rope_parameters", None) or {}
    if stated.get("rope_type") == "llama3":
        dim = model.config.head_dim
        plain = stated["rope_theta"] ** (-np.arange(0, dim, 2, dtype=np.float32) / dim)
        yield "rope_freqs.weight", plain / model.model.rotary_emb.inv_freq.numpy()
    if stated.get("rope_type") == "longrope":
        for kind in ("long", "short"):
            yield f"rope_factors_{kind}.weight", np.array(stated[f"{kind}_factor"])


def _gemma_keys(config: Any) -> Mapping[str, Any]:
    keys = {
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }
    return {key: value for key, value in keys.items() if value is not None}


def _cohere_keys(config: Any) -> Mapping[str, Any]:
    window = {"attention.sliding_window": config.sliding_window} if config.model_type == "cohere2" else {}
    return {"logit_scale": config.logit_scale, "rope.scaling.type": "none", **window}


def _nemotron_keys(config: Any) -> Mapping[str, Any]:
    return {"rope.scaling.type": "none", "attention.layer_norm_rms_epsilon": config.norm_eps}


def _mpt_keys(config: Any) -> Mapping[str, Any]:
    clip = config.attn_config.clip_qkv
    return {"attention.max_alibi_bias": 8.0, **({"attention.clamp_kqv": clip} if clip is not None else {})}


def _parallel(config: Any) -> Mapping[str, Any]:
    return {"use_parallel_residual": config.use_parallel_residual}


def _window(config: Any) -> Mapping[str, Any]:
    return {"attention.sliding_window": config.sliding_window or 0}


def _expert_keys(config: Any) -> Mapping[str, Any]:
    keys = {
        "expert_count": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        "expert_used_count": ("num_experts_per_tok", "moe_k"),
        "expert_feed_forward_length": ("moe_intermediate_size",),
        "expert_shared_feed_forward_length": ("shared_expert_intermediate_size", "shared_intermediate_size"),
    }
    found = {key: _first(config, *names) for key, names in keys.items()}
    return {key: value for key, value in found.items() if value}


def _granite_keys(config: Any) -> Mapping[str, Any]:
    scales = {
        "attention.scale": config.attention_multiplier,
        "residual_scale": config.residual_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "logit_scale": config.logits_scaling,
    }
    return {**scales, **_expert_keys(config)}


def _grouped_keys(config: Any) -> Mapping[str, Any]:
    """Of the models that route as DeepSeek's do."""
    keys = {
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": config.routed_scaling_factor,
        "expert_weights_norm": config.norm_topk_prob,
        "expert_gating_func": 1 if config.model_type == "deepseek_v2" else 2,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
    }
    return {**{key: value for key, value in keys.items() if value is not None}, **_expert_keys(config)}


def _latent_keys(config: Any) -> Mapping[str, Any]:
    rope = config.rope_parameters
    keys = {
        "attention.key_length": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length": config.v_head_dim,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.q_lora_rank": config.q_lora_rank,
        "rope.dimension_count": config.qk_rope_head_dim,
        "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"] if "mscale_all_dim" in rope else None,
    }
    return {**{key: value for key, value in keys.items() if value is not None}, **_grouped_keys(config)}


def _cut_keys(config: Any) -> Mapping[str, Any]:
    keys = _latent_keys(config)
    return {
        **keys,
        "attention.head_count_kv": 1,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": keys["attention.key_length"],
        "attention.value_length_mla": keys["attention.value_length"],
    }


def _olmo_keys(config: Any) -> Mapping[str, Any]:
    return {"attention.clamp_kqv": config.clip_qkv} if config.clip_qkv else {}


def _alpha_keys(config: Any) -> Mapping[str, Any]:
    """Hunyuan's base, stretched."""
    rope, dim = config.rope_parameters, config.head_dim
    return {"rope.freq_base": rope["rope_theta"] * rope["alpha"] ** (dim / (dim - 2)), "rope.scaling.type": "none"}


CONVENTIONS: Mapping[str, Convention] = {
    "llama": Convention(tensors=_interleaved),
    "qwen2": Convention(),
    "phi": Convention("phi2"),
    "phi3": Convention(keys=_window),
    "gemma": Convention(tensors=_shifted),
    "gemma2": Convention(tensors=_shifted, keys=_gemma_keys),
    "gemma3_text": Convention("gemma3", _shifted, _gemma_keys),
    "starcoder2": Convention(),
    "stablelm": Convention(tensors=_stacked_norms, keys=_parallel),
    "nemotron": Convention(tensors=_shifted, keys=_nemotron_keys),
    "cohere": Convention("command-r", keys=_cohere_keys),
    "cohere2": Convention(keys=_cohere_keys),
    "gpt2": Convention(tensors=_transposed),
    "gpt_bigcode": Convention("starcoder"),
    "gpt_neox": Convention("gptneox", _stacked_qkv, _parallel),
    "bloom": Convention(tensors=_bloom),
    "mpt": Convention(keys=_mpt_keys),
    "mistral": Convention("llama", _interleaved),
    "mixtral": Convention("llama", _interleaved_experts, _expert_keys),
    "qwen3": Convention(),
    "qwen2_moe": Convention("qwen2moe", _experts, _expert_keys),
    "qwen3_moe": Convention("qwen3moe", _experts, _expert_keys),
    "smollm3": Convention(tensors=_interleaved),
    "granite": Convention(tensors=_interleaved, keys=_granite_keys),
    "granitemoe": Convention(tensors=_interleaved_experts, keys=_granite_keys),
    "granitemoeshared": Convention("granitemoe", _interleaved_experts, _granite_keys),
    "olmo": Convention(tensors=_interleaved, keys=_olmo_keys),
    "olmo2": Convention(),
    "olmoe": Convention(tensors=_experts, keys=_expert_keys),
    "deepseek_v2": Convention("deepseek2", _experts, _latent_keys),
    "deepseek_v3": Convention("deepseek2", _experts, _latent_keys),
    "deepseek_v3, cut": Convention("deepseek2", _cut_latent, _cut_keys),
    "gpt_oss": Convention("gpt-oss", _gpt_oss, lambda config: {**_expert_keys(config), **_window(config)}),
    "phimoe": Convention(tensors=_experts, keys=lambda config: {**_expert_keys(config), **_window(config)}),
    "internlm2": Convention(tensors=_interleaved),
    "baichuan": Convention(tensors=_interleaved),
    "exaone": Convention(),
    "exaone4": Convention(keys=_window),
    "ernie4_5": Convention(),
    "ernie4_5_moe": Convention("ernie4_5-moe", _experts, _expert_keys),
    "hunyuan_v1_dense": Convention("hunyuan-dense", keys=_alpha_keys),
    "seed_oss": Convention(),
    "arcee": Convention(tensors=_interleaved),
    "glm": Convention("chatglm"),
    "glm4": Convention(),
    "glm4_moe": Convention("glm4moe", _experts, _grouped_keys),
    "dots1": Convention(tensors=_experts, keys=_grouped_keys),
    "falcon": Convention(tensors=_stacked_qkv, keys=lambda config: {"tensor_data_layout": "jploski"}),
}


def write_gguf(model: Any, path: Path, kinds: Mapping[str, str] | None = None, told: str = "", **extra: Any) -> None:
    """`kinds`: ggml type by GGUF module (F32 otherwise); `told`: the family, where it is saved as another; `extra`:
    further metadata, `__` for dots, below the family."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    config = model.config
    family = told or config.model_type
    convention = CONVENTIONS[family]
    architecture = convention.architecture or family
    writer = gguf.GGUFWriter(path, architecture)
    given = {key.replace("__", "."): value for key, value in extra.items()}
    for key, value in {**dict(_common(config)), **dict(_rope(config)), **convention.keys(config), **given}.items():
        writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], config.num_hidden_layers)
    for name, values in _divisors(model):
        writer.add_tensor(name, values.astype(np.float32))
    tensors = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    for name, values in convention.tensors(tensors, config).items():
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert called is not None, name
        matrix = values.ndim > 1 and called.endswith(".weight")
        kind = (kinds or {}).get(called.split(".")[-2], "F32") if matrix else "F32"
        stored = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(called, gguf.quants.quantize(np.ascontiguousarray(values), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
