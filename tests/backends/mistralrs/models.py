"""Tiny random models for the wheel: llamas, an embedder, one that sees, LoRA and X-LoRA adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from tests.engine import checkpoints

Floats = NDArray[np.float32]


def llama(
    folder: Path, *, hidden: int, heads: int, kv_heads: int, layers: int, inner: int, context: int = 512, seed: int = 0
) -> Path:
    """A random model over bytes: `checkpoints`' tokenizer and template, with other weights."""
    checkpoints.write(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": checkpoints.VOCAB,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": checkpoints.BOS,
        "eos_token_id": checkpoints.EOS,
        "attention_bias": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)

    tensors = _layers("model.", rng, hidden, heads, kv_heads, layers, inner)
    tensors["lm_head.weight"] = _drawn(rng, checkpoints.VOCAB, hidden, scale=3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def embedder(folder: Path) -> Path:
    """A random Qwen3 in the layout of sentence-transformers: the last token's state, of length 1."""
    llama(folder, hidden=64, heads=4, kv_heads=2, layers=2, inner=96)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16,
               "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": None,
               "max_window_layers": 2}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tensors = _layers("", np.random.default_rng(3), 64, 4, 2, 2, 96)
    for i in range(2):
        tensors |= {f"layers.{i}.self_attn.{name}_norm.weight": np.ones(16, np.float32) for name in "qk"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    modules = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules.items())
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    pooling = {"word_embedding_dimension": 64, "include_prompt": True}
    pooling |= {f"pooling_mode_{mode}": mode == "lasttoken" for mode in modes}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def vision(folder: Path) -> Path:
    """A random Qwen2-VL, whose template marks images as the real one's does."""
    llama(folder, hidden=64, heads=4, kv_heads=2, layers=2, inner=96)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    marks = [f"<|{name}|>" for name in ("vision_start", "vision_end", "image_pad", "video_pad", "vision_pad")]
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer.save(str(folder / "tokenizer.json"))
    start, end, image, video, pad = map(tokenizer.token_to_id, marks)
    template = (
        "{% for m in messages %}<|start|>{{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}<|start|>assistant "
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    eyes = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 4, "num_heads": 4, "in_channels": 3,
            "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
            "hidden_act": "quickgelu"}  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl",
               "vocab_size": tokenizer.get_vocab_size(), "max_window_layers": 2, "sliding_window": None,
               "use_sliding_window": False, "vision_start_token_id": start, "vision_end_token_id": end,
               "vision_token_id": pad, "image_token_id": image, "video_token_id": video,
               "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "vision_config": eyes}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    pixels = {"min_pixels": 3136, "max_pixels": 200704, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
              "image_mean": [0.5] * 3, "image_std": [0.25] * 3,
              "image_processor_type": "Qwen2VLImageProcessor"}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    rng = np.random.default_rng(7)
    tensors = _layers("model.", rng, 64, 4, 2, 2, 96, tokenizer.get_vocab_size()) | _eyes(rng, 32, 64)
    tensors["lm_head.weight"] = _drawn(rng, tokenizer.get_vocab_size(), 64, scale=3)
    for i in range(2):
        widths = {"q": 64, "k": 32, "v": 32}
        tensors |= {f"model.layers.{i}.self_attn.{n}_proj.bias": np.zeros(w, np.float32) for n, w in widths.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _eyes(rng: np.random.Generator, width: int, out: int) -> dict[str, Floats]:
    """Qwen2-VL's encoder of images, two blocks deep."""
    four = 4 * width
    linear = {"merger.mlp.0": (four, four), "merger.mlp.2": (out, four)}
    norms = ["merger.ln_q"]
    for i in range(2):
        shapes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (four, width),
                  "mlp.fc2": (width, four)}  # fmt: skip
        linear |= {f"blocks.{i}.{name}": shape for name, shape in shapes.items()}
        norms += [f"blocks.{i}.norm1", f"blocks.{i}.norm2"]
    tensors = {f"visual.{name}.weight": _drawn(rng, *shape, scale=2) for name, shape in linear.items()}
    tensors |= {f"visual.{name}.bias": np.zeros(shape[0], np.float32) for name, shape in linear.items()}
    tensors |= {f"visual.{name}.weight": np.ones(width, np.float32) for name in norms}
    tensors |= {f"visual.{name}.bias": np.zeros(width, np.float32) for name in norms}
    return {**tensors, "visual.patch_embed.proj.weight": _drawn(rng, width, 3, 2, 14, 14)}


def _drawn(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Floats:
    return (scale * rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def _layers(
    prefix: str,
    rng: np.random.Generator,
    hidden: int,
    heads: int,
    kv_heads: int,
    layers: int,
    inner: int,
    vocab: int = checkpoints.VOCAB,
) -> dict[str, Floats]:
    """All but the head."""
    kv = kv_heads * hidden // heads
    one = np.ones(hidden, np.float32)
    tensors = {
        f"{prefix}embed_tokens.weight": _drawn(rng, vocab, hidden, scale=4),
        f"{prefix}norm.weight": one,
    }
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
              "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
              "mlp.down_proj": (hidden, inner)}  # fmt: skip
    for i in range(layers):
        tensors |= {f"{prefix}layers.{i}.{name}.weight": _drawn(rng, *shape) for name, shape in shapes.items()}
        tensors |= {f"{prefix}layers.{i}.{n}_layernorm.weight": one for n in ("input", "post_attention")}
    return tensors


def merged(model: Path, adapter: Path, folder: Path) -> Path:
    """The model with a LoRA adapter added to its weights: W + alpha / r * B A."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    weights, lora = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, a in lora.items():
        if ".lora_A." in name:
            target = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            weights[target] = weights[target] + scale * (lora[name.replace("lora_A", "lora_B")] @ a)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def xlora(folder: Path, model: Path, *, rank: int = 4) -> Path:
    """An X-LoRA checkpoint in mistral.rs's layout: two random adapters on q and v, one linear classifier."""
    config = json.loads((model / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    modules = [f"model.layers.{i}.self_attn.{name}" for i in range(layers) for name in ("q_proj", "v_proj")]
    rng = np.random.default_rng(5)
    names = ("physics", "biology")
    for name in names:
        (folder / name).mkdir(parents=True)
        _adapter(folder / name, {module: hidden if "q_proj" in module else kv for module in modules}, hidden, rank, rng)
    outputs = len(names) * len(modules)
    classifier = {
        "last.weight": rng.standard_normal((outputs, hidden)).astype(np.float32),
        "last.bias": np.zeros(outputs, np.float32),
    }
    save_file(classifier, folder / "xlora_classifier.safetensors")
    settings = {"hidden_size": hidden, "base_model_id": str(model), "adapters": {name: name for name in names},
                "layerwise_scalings": True, "xlora_depth": 1, "xlora_size": 8, "xlora_dropout_p": 0.0,
                "enable_relu_and_dropout": False, "enable_softmax": True, "softmax_temperature": 1.0,
                "scaling_pass_value": 0.0, "use_bias": True, "global_scaling_weight": 1.0, "top_k_lora": None,
                "enable_softmax_topk": False}  # fmt: skip
    (folder / "xlora_config.json").write_text(json.dumps(settings))
    order: dict[str, Any] = {"base_model_id": str(model), "order": list(names)}
    order["layers"] = {module: i for i, module in enumerate(modules)}
    (folder / "order.json").write_text(json.dumps(order))
    return folder


def _adapter(folder: Path, outputs: Mapping[str, int], hidden: int, rank: int, rng: np.random.Generator) -> None:
    tensors = {}
    for module, width in outputs.items():
        a = (rng.standard_normal((rank, hidden)) / np.sqrt(hidden)).astype(np.float32)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = rng.standard_normal((width, rank)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "v_proj"],
              "bias": "none", "fan_in_fan_out": False, "task_type": "CAUSAL_LM", "lora_dropout": 0.0}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
