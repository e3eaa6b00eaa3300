"""The small sound models that are damaged: each loads, answers a chat and says one more token.

One layer of llama, 64 wide, over a vocabulary of bytes; written by `containers` and by the loading tests' writer of
ggjt, so that none of it needs a package. `test_hostile` has the reference packages read them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.hostile.containers import Entries, Tensor, entry, gguf_file, safetensors_file
from tests.loading.checkpoints import hf_tensors
from tests.loading.old_ggml import llama_tensors, plain, vocabulary, write
from tests.text.hostile import sentencepiece_model, tekken_file

HIDDEN, HEADS, KV_HEADS, CONTEXT = 64, 4, 2, 64
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "h", "i", "▁h", "▁hi"]
KINDS = [2, 3, 3, *[6] * 256, *[1] * 5]

Files = dict[str, bytes]


# ---- GGUF -------------------------------------------------------------------------------------------------------


@cache
def byte_letters() -> tuple[str, ...]:
    """GPT-2's letters for the 256 bytes."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return tuple(chr(b) if b in shown else chr(0x100 + others.index(b)) for b in range(256))


def gguf_metadata(model: str = "llama") -> dict[str, Any]:
    bpe = [*byte_letters(), "<|im_start|>", "<|im_end|>", "Ġh", "Ġhi"]
    vocabularies: dict[str, dict[str, Any]] = {
        "llama": {
            "tokens": PIECES,
            "scores": [-float(i) for i in range(len(PIECES))],
            "token_type": KINDS,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "gpt2": {
            "pre": "qwen2",
            "tokens": bpe,
            "token_type": [*[1] * 256, 3, 3, 1, 1],
            "merges": ["Ġ h", "Ġh i"],
            "eos_token_id": 257,
        },
    }
    arch = "llama" if model == "llama" else "qwen2"
    settings: dict[str, Any] = {
        "block_count": 1,
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "feed_forward_length": 64,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    return {
        "general.architecture": arch,
        "general.name": "sound",
        **{f"{arch}.{key}": value for key, value in settings.items()},
        "tokenizer.ggml.model": model,
        **{f"tokenizer.ggml.{key}": value for key, value in vocabularies[model].items()},
        "tokenizer.chat_template": TEMPLATE,
        "general.sampling.temp": 0.7,
    }


def gguf_tensors(vocab: int, *, mixed: bool) -> dict[str, Tensor]:
    """Random parameters; `mixed`: the layer's matrices in F16, Q8_0 and Q4_0."""
    rng = np.random.default_rng(0)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (vocab, HIDDEN),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (kv, HIDDEN),
        "blk.0.attn_v": (kv, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (64, HIDDEN),
        "blk.0.ffn_up": (64, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, 64),
        "output_norm": (HIDDEN,),
    }
    kinds = {"blk.0.attn_q": 1, "blk.0.attn_k": 8, "blk.0.attn_v": 8, "blk.0.ffn_gate": 2, "blk.0.ffn_up": 8}
    return {
        f"{name}.weight": _gguf_tensor(rng.standard_normal(shape), kinds.get(name, 0) if mixed else 0)
        for name, shape in shapes.items()
    }


def _gguf_tensor(values: NDArray[Any], kind: int) -> Tensor:
    """F32 (0), F16 (1), or blocks of 32 codes behind a scale of 1/64: Q4_0 (2), Q8_0 (8)."""
    dims = values.shape[::-1]
    if kind < 2:
        return Tensor(dims, kind, values.astype(np.float16 if kind else np.float32).tobytes())
    blocks = values.reshape(-1, 32)
    scale = np.full((len(blocks), 1), 1 / 64, np.float16).view(np.uint8).reshape(-1, 2)
    codes = np.clip(np.round(blocks * (64 if kind == 8 else 4)), -8 if kind == 2 else -127, 7 if kind == 2 else 127)
    data: NDArray[Any] = codes.astype(np.int8).view(np.uint8)
    if kind == 2:
        nibbles = (codes + 8).astype(np.uint8)
        data = nibbles[:, :16] | nibbles[:, 16:] << 4
    return Tensor(dims, kind, np.hstack([scale, data]).tobytes())


def gguf(model: str) -> Files:
    metadata = gguf_metadata(model)
    vocab = len(metadata["tokenizer.ggml.tokens"])
    return {"model.gguf": gguf_file(metadata, gguf_tensors(vocab, mixed=model == "llama"))}


def ggjt() -> Files:
    words = vocabulary()
    tensors = plain(llama_tensors(len(words), hidden=HIDDEN, inner=64, heads=HEADS, kv_heads=KV_HEADS, layers=1))
    return {"model.bin": write(tensors, words, hidden=HIDDEN, heads=HEADS, layers=1)}


# ---- safetensors ------------------------------------------------------------------------------------------------


def config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": 272,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        **changes,
    }


def tokenizer_json() -> bytes:
    """Llama 2's kind: marks for spaces, byte fallback."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    content = {
        "version": "1.0",
        "added_tokens": [{"id": id_, "content": PIECES[id_], **flags} for id_ in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: id_ for id_, piece in enumerate(PIECES)},
            "merges": ["▁ h", "▁h i"],
        },
    }
    return json.dumps(content).encode()


def sidecars() -> Files:
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True, "chat_template": TEMPLATE}
    generation = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2], "do_sample": True}
    return {
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "generation_config.json": json.dumps(generation).encode(),
    }


def plain_entries() -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: entry(array) for name, array in hf_tensors(config()).items()}


def folder(entries: Entries | None = None, **changes: Any) -> Files:
    weights = safetensors_file(plain_entries() if entries is None else entries)
    return {"config.json": json.dumps(config(**changes)).encode(), "model.safetensors": weights, **sidecars()}


def sharded() -> Files:
    entries = plain_entries()
    names = sorted(entries)
    shards = {f"model-{i + 1:05d}-of-00003.safetensors": names[i::3] for i in range(3)}
    index = {"metadata": {"total_size": 1}, "weight_map": {n: shard for shard, part in shards.items() for n in part}}
    files = {shard: safetensors_file({name: entries[name] for name in part}) for shard, part in shards.items()}
    config_json = json.dumps(config()).encode()
    return {
        "config.json": config_json,
        "model.safetensors.index.json": json.dumps(index).encode(),
        **files,
        **sidecars(),
    }


# ---- quantized --------------------------------------------------------------------------------------------------

Made = dict[str, tuple[str, tuple[int, ...], bytes]]


class _Noise:
    """Random tensors of any type."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(1)

    def words(self, *shape: int, dtype: str = "int32") -> tuple[str, tuple[int, ...], bytes]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return entry(np.frombuffer(self.rng.bytes(size), dtype).reshape(shape))

    def scales(self, *shape: int, dtype: str = "float16") -> tuple[str, tuple[int, ...], bytes]:
        return entry((self.rng.random(shape) * 0.01).astype(dtype))

    def floats8(self, *shape: int) -> tuple[str, tuple[int, ...], bytes]:
        values = self.rng.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn)
        return entry(values.view(np.uint8), "F8_E4M3")


def _gptq(noise: _Noise, n: int, k: int) -> Made:
    order = entry((np.arange(k) // 32).astype(np.int32))
    return {
        "qweight": noise.words(k // 8, n),
        "qzeros": noise.words(k // 32, n // 8),
        "scales": noise.scales(k // 32, n),
        "g_idx": order,
    }


def _awq(noise: _Noise, n: int, k: int) -> Made:
    words = (noise.words(k, n // 8), noise.words(k // 32, n // 8))
    return {"qweight": words[0], "qzeros": words[1], "scales": noise.scales(k // 32, n)}


def _fp8(noise: _Noise, n: int, k: int) -> Made:
    return {"weight": noise.floats8(n, k), "weight_scale_inv": noise.scales(n // 32, k // 32, dtype="float32")}


def _nf4(noise: _Noise, n: int, k: int) -> Made:
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "shape": [n, k], "dtype": "float16"}).encode()
    return {
        "weight": noise.words(n * k // 2, 1, dtype="uint8"),
        "weight.absmax": noise.scales(n * k // 64, dtype="float32"),
        "weight.quant_map": entry(np.linspace(-1, 1, 16, dtype=np.float32)),
        "weight.quant_state.bitsandbytes__nf4": entry(np.frombuffer(state, np.uint8)),
    }


def _int8(noise: _Noise, n: int, k: int) -> Made:
    return {"weight": noise.words(n, k, dtype="int8"), "SCB": noise.scales(n, dtype="float32")}


def _compressed(noise: _Noise, n: int, k: int) -> Made:
    shape = entry(np.array([n, k], np.int64))
    packed, scale = noise.words(n, k // 8), noise.scales(n, k // 32)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}


def _hqq(noise: _Noise, n: int, k: int) -> Made:
    numbers = {"nbits": 4, "axis": 1, "group_size": 64}
    return {
        "W_q": noise.words(n * k // 128, 64, dtype="uint8"),
        "scale": noise.scales(n * k // 64, 1),
        "zero": noise.scales(n * k // 64, 1),
        "shape": entry(np.array([n, k], np.int64)),
        **{name: entry(np.array(value, np.int32)) for name, value in numbers.items()},
    }


def _afq(noise: _Noise, n: int, k: int) -> Made:
    grids = noise.scales(n, k // 64), noise.scales(n, k // 64)
    return {"weight": noise.words(n, k // 8, dtype="uint32"), "scales": grids[0], "biases": grids[1]}


_COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32, "symmetric": True}}},
}
QUANTIZED: Mapping[str, tuple[dict[str, Any], Callable[[_Noise, int, int], Made]]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}, _gptq),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, _awq),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}, _fp8),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, _nf4),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, _int8),
    "compressed": (_COMPRESSED, _compressed),
    "hqq": ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}, _hqq),
    "afq": ({"bits": 4, "group_size": 64}, _afq),
}


def quantized(method: str) -> Files:
    """A folder whose layer's matrices are quantized by `method`."""
    settings, make = QUANTIZED[method]
    noise, entries = _Noise(), {}
    for name, (dtype, shape, data) in plain_entries().items():
        if "_proj." not in name:
            entries[name] = (dtype, shape, data)
            continue
        module = name.removesuffix("weight")
        entries |= {f"{module}{part}": made for part, made in make(noise, *shape).items()}
    return folder(entries, **{"quantization" if method == "afq" else "quantization_config": settings})


def _uqff_parts(noise: _Noise, number: int, n: int, k: int) -> Made:
    """The tensors of a module in one of UQFF's formats, below `weight`."""

    def count(value: Any, dtype: str = "uint8") -> tuple[str, tuple[int, ...], bytes]:
        return entry(np.array(value, dtype))

    shape = {".shape": count([n, k], "uint32")}
    if number == 0:
        q8 = _gguf_tensor(noise.rng.standard_normal((n, k)), 8).data
        return {"": entry(np.frombuffer(q8, np.uint8)), ".dtype": count(8, "uint32"), **shape}
    if number == 2:
        made = _hqq(noise, n, k)
        flags = {".bits": count(4), ".axis": count(1), ".round_zeros": count(0), ".channel_wise": count(1)}
        sizes = {".group_size": count(64, "uint32"), ".optimization_steps": count(10, "uint32"), **shape}
        return {"": made["W_q"], ".scales": made["scale"], ".zeros": made["zero"], **flags, **sizes}
    if number == 3:
        scale = count(0.01, "float32")
        extra = {".dequant_w_scale": scale, ".dequant_x_scale": scale, ".quant_scale": count(100.0, "float32")}
        return {"": noise.floats8(n, k), **extra, ".dtype": count(0, "uint32")}
    if number == 4:
        made = _afq(noise, n, k)
        return {
            "": made["weight"],
            ".scales": made["scales"],
            ".biases": made["biases"],
            ".bits": count(4),
            ".group_size": count(64),
        }
    if number == 5:
        return {"": noise.words(n * k // 32 * 33, dtype="uint8"), ".num_blocks": count(n * k // 32, "uint32"), **shape}
    if number == 6:
        return {"": noise.words(n, k // 2, dtype="uint8"), ".scales": noise.words(n, k // 32, dtype="uint8")}
    return {"": noise.scales(n, k, dtype="float32")}


def uqff(shards: int = 2) -> Files:
    """Each matrix of the layer in another of the seven formats; the rest beside them, or all in one shard."""
    noise = _Noise()
    residual: Made = {}
    layer: Made = {f"uqff.version.{part}": entry(np.array(n, np.uint32)) for part, n in _VERSION.items()}
    number = 0
    for name, (dtype, shape, data) in plain_entries().items():
        if "_proj." not in name:
            residual[name] = (dtype, shape, data)
            continue
        layer[f"{name}.format"] = entry(np.array(number, np.uint8))
        layer |= {f"{name}{part}": made for part, made in _uqff_parts(noise, number, *shape).items()}
        number += 1
    config_json = json.dumps(config()).encode()
    if shards == 1:
        return {"config.json": config_json, "model-0.uqff": safetensors_file({**layer, **residual}), **sidecars()}
    first = dict(list(layer.items())[: len(layer) // 2])
    second = {name: made for name, made in layer.items() if name not in first}
    return {
        "config.json": config_json,
        "model-0.uqff": safetensors_file(first),
        "model-1.uqff": safetensors_file(second),
        "residual.safetensors": safetensors_file(residual),
        **sidecars(),
    }


_VERSION = {"major": 1, "minor": 2, "patch": 0}


# ---- other tokenizers -------------------------------------------------------------------------------------------


def with_tokenizer(name: str) -> Files:
    """The plain folder with another file for its tokenizer."""
    files = folder()
    del files["tokenizer.json"]
    return {**files, name: sentencepiece_model(2 if name == "tokenizer.model" else 1)}


def mistral() -> Files:
    """Mistral's own layout: other names, other settings, tekken's tokenizer."""
    vocab = 272
    params: dict[str, Any] = {
        "dim": HIDDEN,
        "n_layers": 1,
        "head_dim": HIDDEN // HEADS,
        "hidden_dim": 64,
        "n_heads": HEADS,
    }
    params |= {"n_kv_heads": KV_HEADS, "vocab_size": vocab, "norm_eps": 1e-5, "max_seq_len": CONTEXT}
    tensors = llama_tensors(vocab, hidden=HIDDEN, inner=64, heads=HEADS, kv_heads=KV_HEADS, layers=1)
    return {
        "params.json": json.dumps(params).encode(),
        "consolidated.safetensors": safetensors_file({name: entry(array) for name, array in tensors.items()}),
        "tekken.json": tekken_file(),
    }


SOUND: Mapping[str, Callable[[], Files]] = {
    "gguf": lambda: gguf("llama"),
    "gguf-bpe": lambda: gguf("gpt2"),
    "ggjt": ggjt,
    "folder": folder,
    "sharded": sharded,
    **{method: partial(quantized, method) for method in QUANTIZED},
    "uqff": uqff,
    **{name: partial(with_tokenizer, name) for name in ("tokenizer.model", "spiece.model")},
    "mistral": mistral,
}
