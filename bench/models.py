"""Models with random weights: speed needs no trained ones.

    python -m bench.models rand135m rand1b --tokenizer SmolLM2.gguf --llama-quantize PATH/TO/llama-quantize

Writes NAME-f16.gguf, NAME-{q4_0,q8_0,q4_k_m,bf16}.gguf (by llama.cpp, from the first) and NAME-bf16/, the folder of
the same shape for engines that read no GGUF. What is there already stays. The tokenizer is that of the given GGUF,
filled up with unused tokens. Tensors are drawn and written one at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

FOLDER = Path(os.environ.get("TRAMONTANE_BENCH_MODELS", Path.home() / ".cache" / "tramontane-bench"))
QUANTIZATIONS = ("Q4_0", "Q8_0", "Q4_K_M", "BF16")
_CONTEXT = 40960
_EPS = 1e-5
_THETA = 100000.0
_CHUNK = 1 << 24
"""Elements drawn at once."""


@dataclass(frozen=True)
class Shape:
    """A Llama with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    head: int = 64

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name in GGUF, name in a Hugging Face folder, shape."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        yield "token_embd", "embed_tokens", (self.vocab, self.hidden)
        for i in range(self.layers):
            a, b = f"blk.{i}", f"layers.{i}"
            yield f"{a}.attn_norm", f"{b}.input_layernorm", (self.hidden,)
            yield f"{a}.attn_q", f"{b}.self_attn.q_proj", (q, self.hidden)
            yield f"{a}.attn_k", f"{b}.self_attn.k_proj", (kv, self.hidden)
            yield f"{a}.attn_v", f"{b}.self_attn.v_proj", (kv, self.hidden)
            yield f"{a}.attn_output", f"{b}.self_attn.o_proj", (self.hidden, q)
            yield f"{a}.ffn_norm", f"{b}.post_attention_layernorm", (self.hidden,)
            yield f"{a}.ffn_gate", f"{b}.mlp.gate_proj", (self.ffn, self.hidden)
            yield f"{a}.ffn_up", f"{b}.mlp.up_proj", (self.ffn, self.hidden)
            yield f"{a}.ffn_down", f"{b}.mlp.down_proj", (self.hidden, self.ffn)
        yield "output_norm", "norm", (self.hidden,)


SHAPES = {
    "rand135m": Shape(hidden=576, layers=30, heads=9, kv_heads=3, ffn=1536, vocab=49152),
    "rand1b": Shape(hidden=2048, layers=16, heads=32, kv_heads=8, ffn=8192, vocab=128256),
}


def values(index: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """The tensor with this index: ones for a norm, else small normal numbers, always the same."""
    out = np.ones(shape, np.float32 if dtype == np.float16 and len(shape) == 1 else dtype)
    if len(shape) > 1:
        rng, flat = np.random.default_rng([20, index]), out.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            part = flat[start : start + _CHUNK]
            part[:] = rng.standard_normal(part.size, dtype=np.float32) * np.float32(0.02)
    return out


def write_gguf(path: Path, name: str, shape: Shape, tokenizer: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_block_count(shape.layers)
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(_EPS)
    writer.add_rope_freq_base(_THETA)
    writer.add_rope_dimension_count(shape.head)
    writer.add_vocab_size(shape.vocab)
    copy_tokenizer(writer, tokenizer, shape.vocab)
    for tensor, _, size in shape.tensors():
        kind = np.dtype(np.float16 if len(size) > 1 else np.float32)
        writer.add_tensor_info(f"{tensor}.weight", size, kind, int(np.prod(size)) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for i, (_, _, size) in enumerate(shape.tensors()):
        writer.write_tensor_data(values(i, size, np.float16))
    writer.close()


def copy_tokenizer(writer: gguf.GGUFWriter, source: Path, vocab: int) -> None:
    """The tokenizer's fields, with unused tokens behind its own up to `vocab`."""
    for field in gguf.GGUFReader(source).fields.values():
        if not field.name.startswith("tokenizer."):
            continue
        value = field.contents()
        if field.name == "tokenizer.ggml.tokens":
            value = [*value, *(f"[unused {i}]" for i in range(len(value), vocab))]
        elif field.name == "tokenizer.ggml.token_type":
            value = [*value, *[int(gguf.TokenType.UNUSED)] * (vocab - len(value))]
        kind, *rest = field.types
        writer.add_key_value(field.name, value, kind, rest[0] if rest else None)


def write_folder(path: Path, shape: Shape) -> None:
    """config.json and model.safetensors in bfloat16: for engines that are given token ids."""
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "vocab_size": shape.vocab,
        "max_position_embeddings": _CONTEXT,
        "rms_norm_eps": _EPS,
        "rope_theta": _THETA,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    header: dict[str, Any] = {}
    end = 0
    for _, name, size in shape.tensors():
        start, end = end, end + int(np.prod(size)) * 2
        header[f"model.{name}.weight"] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for i, (_, _, size) in enumerate(shape.tensors()):
            file.write(values(i, size, ml_dtypes.bfloat16).tobytes())
    (path / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=SHAPES)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a GGUF with a tokenizer")
    parser.add_argument("--llama-quantize", required=True)
    parser.add_argument("--kinds", nargs="+", default=QUANTIZATIONS, help="quantizations, by llama-quantize's names")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        shape, plain = SHAPES[name], args.folder / f"{name}-f16.gguf"
        if not plain.exists():
            write_gguf(plain, name, shape, args.tokenizer)
        if not (args.folder / f"{name}-bf16" / "config.json").exists():
            write_folder(args.folder / f"{name}-bf16", shape)
        for kind in args.kinds:
            out = args.folder / f"{name}-{kind.lower()}.gguf"
            if not out.exists():
                subprocess.run([args.llama_quantize, plain, out, kind], check=True, capture_output=True)
    for path in sorted(args.folder.iterdir()):
        print(f"{path.stat().st_size / 1e6:8.0f} MB  {path.name}" if path.is_file() else f"{'folder':>11}  {path.name}")


if __name__ == "__main__":
    main()
