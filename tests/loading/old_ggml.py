"""A writer of GGML's llama files from before GGUF, by their layout in llama.cpp of summer 2023."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Tensors = Mapping[str, tuple[int, tuple[int, ...], bytes]]
"""Name -> ggml's type number, shape (rows first), bytes."""


def vocabulary(words: Sequence[str] = ("▁the", "▁a", "er", "in", "▁", "e", "t", "h", "a")) -> list[tuple[bytes, float]]:
    """Pieces and scores as llama's: three special ones, 256 bytes, then words by rank."""
    special = [(" ⁇ ".encode(), 0.0), (b"", 0.0), (b"", 0.0)]
    numbers = [(bytes([i]), 0.0) for i in range(256)]
    return special + numbers + [(word.replace("▁", " ").encode(), -float(i)) for i, word in enumerate(words)]


def llama_tensors(
    vocab: int, hidden: int = 64, inner: int = 96, heads: int = 4, kv_heads: int = 4, layers: int = 2, seed: int = 0
) -> dict[str, NDArray[np.float32]]:
    """Random float32 parameters under Meta's names."""
    rng = np.random.default_rng(seed)
    kv = hidden // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings": (vocab, hidden),
        "norm": (hidden,),
        "output": (vocab, hidden),
    }
    for i in range(layers):
        shapes |= {
            f"layers.{i}.attention.wq": (hidden, hidden),
            f"layers.{i}.attention.wk": (kv, hidden),
            f"layers.{i}.attention.wv": (kv, hidden),
            f"layers.{i}.attention.wo": (hidden, hidden),
            f"layers.{i}.attention_norm": (hidden,),
            f"layers.{i}.feed_forward.w1": (inner, hidden),
            f"layers.{i}.feed_forward.w2": (hidden, inner),
            f"layers.{i}.feed_forward.w3": (inner, hidden),
            f"layers.{i}.ffn_norm": (hidden,),
        }
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) * 0.1 for name, shape in shapes.items()}


def plain(tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """Matrices as F16, vectors as F32."""
    return {
        name: (1, a.shape, a.astype(np.float16).tobytes()) if a.ndim == 2 else (0, a.shape, a.tobytes())
        for name, a in tensors.items()
    }


def write(
    tensors: Tensors,
    tokens: Sequence[tuple[bytes, float]],
    kind: str = "ggjt",
    version: int = 3,
    hidden: int = 64,
    heads: int = 4,
    layers: int = 2,
) -> bytes:
    """The file's bytes."""
    out = bytearray(kind.encode()[::-1])
    if kind != "ggml":
        out += struct.pack("<I", version)
    out += struct.pack("<7I", len(tokens), hidden, 256, heads, layers, hidden // heads, 1)
    for text, score in tokens:
        out += struct.pack("<I", len(text)) + text
        if kind != "ggml":
            out += struct.pack("<f", score)
    for name, (number, shape, data) in tensors.items():
        out += struct.pack("<3I", len(shape), len(name), number) + struct.pack(f"<{len(shape)}I", *shape[::-1])
        out += name.encode()
        if kind == "ggjt":
            out += bytes(-len(out) % 32)
        out += data
    return bytes(out)
