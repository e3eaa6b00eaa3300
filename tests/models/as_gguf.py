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
        yield "attention.layer_norm_epsilon", _first(config, *names)
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


def _mpt_keys(config: Any) -> Mapping[str, Any]:
    clip = config.attn_config.clip_qkv
    return {"attention.max_alibi_bias": 8.0, **({"attention.clamp_kqv": clip} if clip is not None else {})}


def _parallel(config: Any) -> Mapping[str, Any]:
    return {"use_parallel_residual": config.use_parallel_residual}


def _window(config: Any) -> Mapping[str, Any]:
    return {"attention.sliding_window": config.sliding_window or 0}


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
    "nemotron": Convention(tensors=_shifted, keys=lambda config: {"rope.scaling.type": "none"}),
    "cohere": Convention("command-r", keys=_cohere_keys),
    "cohere2": Convention(keys=_cohere_keys),
    "gpt2": Convention(tensors=_transposed),
    "gpt_bigcode": Convention("starcoder"),
    "gpt_neox": Convention("gptneox", _stacked_qkv, _parallel),
    "bloom": Convention(tensors=_bloom),
    "mpt": Convention(keys=_mpt_keys),
    "falcon": Convention(tensors=_stacked_qkv, keys=lambda config: {"tensor_data_layout": "jploski"}),
}


def write_gguf(model: Any, path: Path, kinds: Mapping[str, str] | None = None, **extra: Any) -> None:
    """`kinds`: ggml type by GGUF module (F32 otherwise); `extra`: further metadata, `__` for dots, below the family."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    config = model.config
    convention = CONVENTIONS[config.model_type]
    architecture = convention.architecture or config.model_type
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
        told = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert told is not None, name
        kind = (kinds or {}).get(told.split(".")[-2], "F32") if values.ndim > 1 else "F32"
        stored = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(told, gguf.quants.quantize(np.ascontiguousarray(values), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
