"""A tiny random model of every AutoModelForCausalLM configuration that the installed transformers has.

Sizes shrink by what attributes are called; `OVERRIDES` has what a model type wants besides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from tests.models.harness import Rig
from tramontane.errors import TramontaneError
from tramontane.kernels import Ops
from tramontane.loading.build import load_model
from tramontane.models.decoder import Decoder

VOCAB = 97
LAYERS = 4
LENGTH = 40
TOLERANCE = 2e-4
"""Of logits up to 1; of larger ones that part of the largest."""
_LARGEST = 30_000_000


def _each(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


_SIZES: Mapping[str, Any] = {
    **_each("hidden_size d_model n_embd embedding_size dim_model emb_dim embedding_dim lru_width", 64),
    **_each("intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff dim_ff d_inner", 96),
    **_each("moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size", 32),
    **_each("ffn_hidden_size expert_ffn_hidden_size dense_intermediate_size intermediate_size_mlp", 48),
    **_each("shared_experts_intermediate_size moe_shared_expert_intermediate_size", 32),
    **_each("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers", LAYERS),
    **_each("num_decoder_layers num_encoder_layers num_blocks", LAYERS),
    **_each("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads", 4),
    **_each("num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads attention_heads", 4),
    **_each("num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups kv_n_heads", 2),
    **_each("head_dim v_head_dim kv_channels swa_head_dim global_head_dim attention_head_dim dim_head", 16),
    **_each("qk_nope_head_dim q_lora_rank kv_lora_rank o_lora_rank", 16),
    **_each("qk_rope_head_dim rotary_dim", 8),
    "qk_head_dim": 24,
    **_each("vocab_size vocab_size_per_layer_input decoder_vocab_size", VOCAB),
    **_each("max_position_embeddings n_positions n_ctx max_seq_len max_target_positions", 128),
    **_each("num_experts n_routed_experts num_local_experts moe_num_experts num_total_experts", 4),
    **_each("num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts", 2),
    **_each("n_group num_expert_group topk_group first_k_dense_replace num_kv_shared_layers", 1),
    **_each("sliding_window window_size sliding_window_size attention_window_size local_attention", 9),
    **_each("attention_chunk_size", 9),
    **_each("pad_token_id", 0),
    **_each("bos_token_id decoder_start_token_id", 1),
    **_each("eos_token_id num_codebooks type_vocab_size", 2),
    **_each("index_n_heads indexer_n_heads", 16),
    **_each("index_topk", 16),
    **_each("hidden_size_per_layer_input index_head_dim linear_key_head_dim linear_value_head_dim", 16),
    **_each("linear_num_key_heads linear_num_value_heads linear_num_heads", 2),
    **_each("encoder_hash_byte_group_vocab linear_head_dim mamba_d_state ssm_state_size state_size", 16),
    **_each("mamba_n_heads n_mamba_heads mamba_num_heads", 8),
    **_each("mamba_d_head mamba_head_dim mamba_headdim", 16),
    **_each("chunk_size mamba_chunk_size", 8),
}
_ALSO_WITHOUT_DEFAULT = ("head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok")
_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "attention_layers", "indexer_types")
"""Lists of which every kind shall be there."""

_MLA = {"head_dim": 8, "num_key_value_heads": 4, "v_head_dim": 16}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 2,
}
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_theta": 10000.0, "rope_type": "default"} for kind in ("full_attention", "sliding_attention")
        },
    },
    "dots1": {"n_shared_experts": 1},
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0},
    "falcon_h1": {"mamba_d_ssm": 128},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": _QWEN4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "zaya": {"num_experts_per_tok": 1},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 24},
    "dots3_note": {
        "text_config": {"per_layer_config": {}, "head_dim": 24},
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "gemma3n_text": {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0]},
    "gemma4": {"text_config": {"num_kv_shared_layers": 2}},
    "gemma4_text": {"num_kv_shared_layers": 2},
    "gemma4_unified": {"text_config": {"num_kv_shared_layers": 2}},
    "gemma4_unified_text": {"num_kv_shared_layers": 2},
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A tiny configuration of the type. Raises whatever its class raises where the rules do not make one."""
    from transformers import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[model_type], {**OVERRIDES.get(model_type, {}), **changes})


def _shrunk(kind: Any, overrides: Mapping[str, Any]) -> Any:
    try:
        default = kind()
    except ValueError:  # some defaults break their own rules
        return kind(**overrides)
    known = vars(default)
    layers = next((value for name, value in known.items() if name in ("num_hidden_layers", "num_layers")), None)
    values: dict[str, Any] = {}
    subs = getattr(kind, "sub_configs", {})
    for name, value in known.items():
        if name in subs and value is not None:
            values[name] = (
                overrides[name]
                if isinstance(overrides.get(name), dict) and name == "attn_config"
                else _shrunk(type(value), overrides.get(name, {}))
            )
        elif isinstance(value, list) and len(value) == layers and layers:
            kinds = list(dict.fromkeys(value)) if name in _KINDS else value
            values[name] = (kinds * LAYERS)[:LAYERS]
            if name in _SIZES:
                values[name] = [_SIZES[name]] * LAYERS
        elif name in _SIZES and (value is not None or name in _ALSO_WITHOUT_DEFAULT):
            values[name] = _SIZES[name]
    if "qk_rope_head_dim" in known:
        values |= {name: value for name, value in _MLA.items() if name in known}
    if "is_decoder" in known:
        values["is_decoder"] = True
    return kind(**{**values, **{name: value for name, value in overrides.items() if name not in subs}})


def randomize(model: Any, seed: int = 0) -> None:
    """Values with which every parameter moves the logits."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.dim() == 1:
                value.copy_((1 + 0.3 * noise) if "norm" in key or "ln_" in key.lower() else 0.3 * noise)
            else:
                value.copy_(noise / value.shape[-1] ** 0.5)


@dataclass(frozen=True)
class Trial:
    """How a model type fared."""

    model_type: str
    how: str
    """The way it runs; empty where it does not."""
    difference: float = 0.0
    """The largest between our logits and transformers' own."""
    largest: float = 0.0
    """Of the logits."""
    reason: str = ""

    @property
    def right(self) -> bool:
        """Whether the difference is one of rounding in float32."""
        return bool(self.how) and self.difference <= TOLERANCE * max(1.0, self.largest)


def model_types() -> list[str]:
    """Those that transformers has a causal language model for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def save_tiny(model_type: str, folder: Path, **changes: Any) -> Any:
    """Make a model of the type, with `changes` of its configuration, save it, and return it.

    Raises what transformers raises where it makes none, or ValueError where that is not small.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type, **changes)
    with torch.device("meta"):
        size = sum(value.numel() for value in AutoModelForCausalLM.from_config(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters are not tiny")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomize(model, seed=crc32(model_type.encode()))
    model.save_pretrained(folder)
    if type(model.config) is not type(config):  # a part's was written, by whose name transformers would not find it
        config.save_pretrained(folder)
    return model


def attempt(model_type: str, folder: Path, ops: Ops) -> Trial:
    """Save a tiny model, load it as any other, and hold our logits to transformers' own."""
    import torch

    try:
        model = save_tiny(model_type, folder)
        ids = tokens_of(model_type)
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([ids])).logits[0].float().numpy()
    except Exception as error:
        return Trial(model_type, "", reason=f"transformers makes no tiny model: {_first_line(error)}")
    try:
        decoder = load_model(folder, ops).decoder
    except TramontaneError as error:
        told = re.search(r"either \((.*)\)\.$", error.message)
        return Trial(model_type, "", reason=told[1] if told else error.message.replace(str(folder), "it"))
    how = "own decoder" if isinstance(decoder, Decoder) else decoder.way.name
    difference = max(float(np.abs(ours - theirs).max()) for ours, theirs in compared(decoder, ids, wanted))
    return Trial(model_type, how, difference, float(np.abs(wanted).max()))


def tokens_of(model_type: str) -> list[int]:
    """Beyond the windows; none has a meaning of its own."""
    generator = np.random.default_rng(crc32(model_type.encode()))
    return [int(id_) for id_ in generator.integers(3, VOCAB - 7, LENGTH)]


def compared(decoder: Any, ids: list[int], wanted: NDArray[Any]) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Pairs of our logits and `wanted`: whole, in chunks, decoding, behind a shared prefix, and in a mixed batch."""
    rig = Rig(decoder)
    yield rig.run(ids), wanted
    yield rig.run(ids, [7, 1, 9]), wanted
    first, second = rig.sequence(), rig.sequence()
    yield rig.step((first, ids[:30]))[0], wanted[:30]
    yield rig.step((second, ids[:12]))[0], wanted[:12]
    shared = rig.fork(second, 3)  # with a window its first blocks are gone by the time that more is computed
    mixed = rig.step((second, ids[12:20]), (first, ids[30:31]))
    yield mixed[0], wanted[12:20]
    yield mixed[1], wanted[30:31]
    for at in range(31, 36):
        mixed = rig.step((first, ids[at : at + 1]), (second, ids[at - 11 : at - 10]))
        yield np.concatenate(mixed), wanted[[at, at - 11]]
    if all(group.window is None for group in rig.groups):
        yield rig.step((shared, ids[12:]))[0], wanted[12:]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
