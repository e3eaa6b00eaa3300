"""Models that transformers computes under other names: InternLM2, Baichuan and EXAONE 3, each a llama rearranged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.models.cases.base import LLAMA, Case, rope

Tensors = dict[str, Any]


def _saved(
    rearrange: Callable[[Tensors, Any], Tensors], model_type: str, architecture: str, **changes: Any
) -> Callable[[Any, Path], None]:
    """Saves a llama with its tensors rearranged, and its configuration changed (None: without the key)."""

    def save(model: Any, folder: Path) -> None:
        tensors = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
        config = {**model.config.to_dict(), "model_type": model_type, "architectures": [architecture]}
        renamed = {key: config[old] for key, old in changes.items() if isinstance(old, str)}
        others = {key: value for key, value in changes.items() if not isinstance(value, str)}
        config = {key: value for key, value in {**config, **renamed, **others}.items() if value is not None}
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        stored = {name: np.ascontiguousarray(values) for name, values in rearrange(tensors, model.config).items()}
        save_file(stored, folder / "model.safetensors")

    return save


def _renamed(tensors: Tensors, names: Mapping[str, str]) -> Tensors:
    renamed = {}
    for name, values in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = values
    return renamed


def _fused(tensors: Tensors, fuse: Callable[..., Any], name: str) -> Tensors:
    """Queries, keys and values of each layer in one tensor."""
    found = dict(tensors)
    for key in tensors:
        if ".q_proj." in key:
            parts = [found.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            found[key.replace("q_proj", name)] = fuse(*parts)
    return found


def _internlm2(tensors: Tensors, config: Any) -> Tensors:
    groups, head_dim = config.num_key_value_heads, config.head_dim

    def grouped(*parts: Any) -> Any:
        each = [part.reshape(groups, -1, head_dim, *part.shape[1:]) for part in parts]
        return np.concatenate(each, axis=1).reshape(-1, *parts[0].shape[1:])

    names = {
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "self_attn.wqkv": "attention.wqkv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    return _renamed(_fused(tensors, grouped, "wqkv"), names)


def _baichuan(tensors: Tensors, config: Any) -> Tensors:
    return _fused(tensors, lambda *parts: np.concatenate(parts), "W_pack")


def _exaone(tensors: Tensors, config: Any) -> Tensors:
    names = {
        "model.": "transformer.",
        "embed_tokens": "wte",
        ".layers.": ".h.",
        "transformer.norm": "transformer.ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "self_attn.out_proj",
        "self_attn": "attn.attention",
        "gate_proj": "c_fc_0",
        "up_proj": "c_fc_1",
        "down_proj": "c_proj",
    }
    return _renamed(tensors, names)


def _unit_head(model: Any, ids: Any) -> Any:
    """Baichuan 2's head: rows of length one."""
    import torch

    return torch.nn.functional.linear(
        model.model(ids).last_hidden_state, torch.nn.functional.normalize(model.lm_head.weight)
    )


def _alibi(model: Any, ids: Any) -> Any:
    """Baichuan's larger model: a bias in place of rotations, as its paper has it (Press et al., 2022)."""
    import torch

    heads, length = model.config.num_attention_heads, ids.shape[1]
    whole = 2 ** (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    slopes += [2 ** (-4 * (i + 1) / whole) for i in range(0, 2 * (heads - whole), 2)]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    bias = -torch.tensor(slopes)[:, None, None] * distance
    model.model.rotary_emb.inv_freq.zero_()
    model.model.rotary_emb.original_inv_freq.zero_()
    return model(ids, attention_mask=bias.masked_fill(distance < 0, -torch.inf)[None]).logits


_MHA = {**LLAMA, "num_key_value_heads": 6, "head_dim": 8}

CASES: Mapping[str, Case] = {
    "internlm2": Case(
        "llama",
        {**LLAMA, "head_dim": 8},
        gguf=True,
        told="internlm2",
        save=_saved(_internlm2, "internlm2", "InternLM2ForCausalLM", bias=False, head_dim=None),
    ),
    "baichuan": Case(
        "llama",
        _MHA,
        gguf=True,
        told="baichuan",
        save=_saved(_baichuan, "baichuan", "BaichuanForCausalLM", head_dim=None),
    ),
    "baichuan2": Case(
        "llama",
        _MHA,
        save=_saved(_baichuan, "baichuan", "BaichuanForCausalLM", z_loss_weight=0, head_dim=None),
        forward=_unit_head,
    ),
    "baichuan-alibi": Case(
        "llama",
        _MHA,
        save=_saved(
            _baichuan,
            "baichuan",
            "BaichuanForCausalLM",
            model_max_length="max_position_embeddings",
            max_position_embeddings=None,
        ),
        forward=_alibi,
    ),
    "exaone": Case(
        "llama",
        {
            **LLAMA,
            **rope(
                "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
            ),
        },
        gguf=True,
        told="exaone",
        save=_saved(
            _exaone,
            "exaone",
            "ExaoneForCausalLM",
            num_layers="num_hidden_layers",
            layer_norm_epsilon="rms_norm_eps",
            activation_function="hidden_act",
            num_hidden_layers=None,
            rms_norm_eps=None,
            hidden_act=None,
        ),
    ),
}
