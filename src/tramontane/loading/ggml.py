"""GGML's llama files from before GGUF (`.bin`: ggjt, ggmf and unversioned ggml), told in GGUF's terms.

Owns the layout of these files, and which of their tensor types are laid out as today's. Must not know: how a model is
computed, tokenizers: it says what a GGUF file of the same model would. Sources: llama.cpp's llama.cpp of summer 2023
and its convert_llama_ggml_to_gguf.py.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tramontane.errors import UnsupportedModel
from tramontane.loading.cursor import Cursor
from tramontane.loading.ggml_types import BY_NAME, GGML_TYPES
from tramontane.loading.gguf import GGUFTensor
from tramontane.loading.mapped import Array, MappedFile

log = logging.getLogger("tramontane")

_CONVERT = "Use a GGUF file of the model, or convert its original weights with llama.cpp's convert_hf_to_gguf.py."

# First bytes -> name, versions. The numbers are little endian, so the letters stand backwards.
_KINDS: Mapping[bytes, tuple[str, tuple[int, ...]]] = {
    b"lmgg": ("ggml", ()),
    b"fmgg": ("ggmf", (1,)),
    b"tjgg": ("ggjt", (1, 2, 3)),
}
# The first ggjt version whose blocks are today's; plain numbers have always been.
_SINCE = {"Q5_0": 2, "Q5_1": 2, **dict.fromkeys(("Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), 3)}
_PLAIN = ("F32", "F16")

_WORDS = 259
"""The first token that is neither special nor a byte."""
_MAX_VOCABULARY = 1 << 20
_MAX_TENSORS = 1 << 16
_ALIGNMENT = 32

_FIXED = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
_LAYER = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


def is_old_ggml(path: Path) -> bool:
    """Whether a file begins as one of these; a missing or unreadable one does not."""
    try:
        with open(path, "rb") as file:
            return file.read(4) in _KINDS
    except OSError:
        return False


class GGMLFile:
    """An open file; a context manager. The same face as `GGUFFile`: GGUF's metadata keys and tensor names.

    The files leave two numbers out: the context length is taken as 2048 and the norm's epsilon as 5e-6 (between those
    of LLaMA 1 and 2), as llama.cpp did; where keys and values have fewer heads it is LLaMA 2 70B, 4096 and 1e-5.
    """

    def __init__(self, file: MappedFile, metadata: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]) -> None:
        self.path = file.path
        self.metadata = metadata
        self.tensors = tensors
        self._file = file

    @classmethod
    def open(cls, path: str | Path) -> GGMLFile:
        """Map and check the file.

        Raises `ModelNotFound`, `CorruptCheckpoint`, and `UnsupportedModel` for blocks of older layouts, models in
        several files and models other than llama.
        """
        path = Path(path)
        file = MappedFile(path)
        cursor = Cursor(str(path), file.map, file.size)
        cursor.size = "I"
        kind, version = _read_kind(cursor)
        if kind != "ggjt" and path.with_name(path.name + ".1").exists():
            raise UnsupportedModel(f"{path} is the first of several {kind} files of one model.", _CONVERT)
        vocabulary, hidden, _, heads, layers, rotated, _ = (cursor.count() for _ in range(7))
        cursor.expect(vocabulary, 4 if kind == "ggml" else 8, "tokens", _MAX_VOCABULARY)
        tokens, scores = _read_vocabulary(cursor, vocabulary, with_scores=kind != "ggml")
        tensors: dict[str, GGUFTensor] = {}
        while cursor.at < cursor.end:
            tensor = _read_tensor(cursor, kind, version)
            if tensor.name in tensors:
                cursor.fail(f"tensor {tensor.name!r} occurs twice")
            tensors[tensor.name] = tensor
            if len(tensors) > _MAX_TENSORS:
                cursor.fail(f"more than {_MAX_TENSORS} tensors")
        metadata = {
            "general.architecture": "llama",
            "general.name": path.stem,
            "general.description": f"{kind}{f' version {version}' if version else ''}, from before GGUF",
            "llama.block_count": layers,
            "llama.embedding_length": hidden,
            "llama.vocab_size": vocabulary,
            "llama.rope.dimension_count": rotated,
            "llama.attention.head_count": heads,
            **_from_shapes(cursor, tensors, hidden, heads),
            **_tokenizer(tokens, scores),
        }
        return cls(file, metadata, tensors)

    @property
    def container(self) -> str:
        """What kind of file it is, for people."""
        said: str = self.metadata["general.description"]
        return said

    def data(self, name: str) -> Array:
        """The tensor as a read-only view on the map, as `GGUFFile.data`."""
        tensor = self.tensors[name]
        kind = BY_NAME[tensor.format]
        if kind.dtype is not None:
            return self._file.view(tensor.offset, kind.dtype, tensor.shape)
        row_bytes = tensor.shape[-1] // kind.block * kind.nbytes
        return self._file.view(tensor.offset, np.uint8, (*tensor.shape[:-1], row_bytes))

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system; views on it stay valid."""
        self._file.release(self.tensors[name].offset, self.tensors[name].nbytes)

    def release_all(self) -> None:
        """The same of everything, the head included."""
        self._file.release(0, self._file.size)

    def prefetch(self, name: str) -> None:
        """Have the tensor read ahead from the disk."""
        self._file.prefetch(self.tensors[name].offset, self.tensors[name].nbytes)

    def close(self) -> None:
        """Let go of the file. Views given out stay valid; `data` no longer works."""
        self._file.close()

    def __enter__(self) -> GGMLFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_kind(cursor: Cursor) -> tuple[str, int]:
    magic = cursor.take(4)
    if magic not in _KINDS:
        cursor.fail("not one of ggml's old files")
    kind, versions = _KINDS[magic]
    if not versions:
        return kind, 0
    version = cursor.count()
    if version not in versions:
        raise UnsupportedModel(f"{cursor.path} is {kind} version {version}, which llama files never had.", _CONVERT)
    return kind, version


def _read_vocabulary(cursor: Cursor, count: int, *, with_scores: bool) -> tuple[list[bytes], list[float]]:
    """Pieces and their scores. Without scores in the file they are what LLaMA's are: minus the rank among the words."""
    tokens: list[bytes] = []
    scores: list[float] = []
    for number in range(count):
        tokens.append(cursor.take(cursor.count()))
        score = cursor.number("f") if with_scores else -float(max(0, number - _WORDS))
        if not math.isfinite(score):
            cursor.fail(f"the score of token {number} is {score}")
        scores.append(score)
    return tokens, scores


def _read_tensor(cursor: Cursor, kind: str, version: int) -> GGUFTensor:
    dimensions, length, type_id = cursor.count(), cursor.count(), cursor.count()
    if dimensions not in (1, 2) or not 0 < length < 256:
        cursor.fail(f"a tensor of {dimensions} dimensions and a name of {length} bytes")
    shape = tuple(cursor.count() for _ in range(dimensions))[::-1]
    stored = cursor.text(length, "tensor name")
    if kind == "ggjt":
        cursor.at = -(-cursor.at // _ALIGNMENT) * _ALIGNMENT
    known = GGML_TYPES.get(type_id)
    format = known.name if known else f"ggml type {type_id}"
    since = 0 if format in _PLAIN else _SINCE.get(format)
    if known is None or since is None:
        raise UnsupportedModel(f"Tensor {stored!r} of {cursor.path} has {format}, unknown to {kind}.", _CONVERT)
    if version < since or (since and kind != "ggjt"):
        raise UnsupportedModel(
            f"{cursor.path} is {kind}{f' version {version}' if version else ''}; the layout of its {format} tensors "
            f"({stored!r}) was given up with ggjt version {since}.",
            _CONVERT,
        )
    if not all(shape) or shape[-1] % known.block:
        cursor.fail(f"tensor {stored!r} of {format} has shape {shape}")
    nbytes = math.prod(shape) // known.block * known.nbytes
    offset = cursor.at
    if nbytes > cursor.end - offset:
        cursor.fail(f"tensor {stored!r} takes {nbytes} bytes, the file has {max(0, cursor.end - offset)} left")
    cursor.at += nbytes
    return GGUFTensor(_gguf_name(stored), shape, format, offset, nbytes)


def _gguf_name(stored: str) -> str:
    """What GGUF calls a tensor; an unknown name stays as it is."""
    module, _, kind = stored.rpartition(".")
    if kind == "weight" and module in _FIXED:
        return f"{_FIXED[module]}.weight"
    numbered = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
    if kind == "weight" and numbered and numbered[2] in _LAYER:
        return f"blk.{numbered[1]}.{_LAYER[numbered[2]]}.weight"
    return stored


def _from_shapes(cursor: Cursor, tensors: Mapping[str, GGUFTensor], hidden: int, heads: int) -> dict[str, Any]:
    """What the header does not say."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    gate, keys = shapes.get("blk.0.ffn_gate.weight"), shapes.get("blk.0.attn_k.weight")
    if gate is None or keys is None:
        raise UnsupportedModel(f"{cursor.path} is not of a llama model: it has no layers.0.attention.wk.", _CONVERT)
    if not heads or not hidden or hidden % heads or keys[0] % (hidden // heads):
        cursor.fail(f"{heads} heads do not divide {hidden} elements, or keys of {keys[0]}")
    kv_heads = keys[0] // (hidden // heads)
    context, epsilon = (2048, 5e-6) if kv_heads == heads else (4096, 1e-5)
    log.info("%s does not say them: a context of %d tokens, an epsilon of %g", cursor.path, context, epsilon)
    return {
        "llama.feed_forward_length": gate[0],
        "llama.attention.head_count_kv": kv_heads,
        "llama.context_length": context,
        "llama.attention.layer_norm_rms_epsilon": epsilon,
    }


def _tokenizer(tokens: list[bytes], scores: list[float]) -> dict[str, Any]:
    """The SentencePiece vocabulary of llama: ids 0 to 2 have their fixed meanings, the next 256 are bytes."""
    texts, types = [], []
    for number, token in enumerate(tokens):
        if number < 3:
            text, kind = (("<unk>", 2), ("<s>", 3), ("</s>", 3))[number]
        elif number < _WORDS and len(token) == 1:
            text, kind = f"<0x{token[0]:02X}>", 6
        else:
            text, kind = token.decode("utf-8", "surrogateescape").replace(" ", "▁"), 1 if token else 3
        texts.append(text)
        types.append(kind)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
    }
