"""Writers of GGUF and safetensors that write whatever they are told, however false."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
_LAYOUTS = {0: "B", 1: "b", 2: "H", 3: "h", U32: "I", 5: "i", F32: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Raw:
    """A GGUF value as bytes: a type number and what follows it."""

    kind: int
    data: bytes


@dataclass(frozen=True)
class Tensor:
    """A GGUF tensor; `dims` as in the file (columns first). `offset` None: where it belongs."""

    dims: tuple[int, ...]
    kind: int
    data: bytes
    offset: int | None = None


def text(value: str | bytes) -> bytes:
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def gguf_value(value: Any, depth: int = 0) -> Raw:
    """The value in the type that suits it; what no type suits becomes a string."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, bool):
        return Raw(BOOL, bytes([value]))
    if isinstance(value, int):
        for kind in (U32, 5, 11, 10):
            try:
                return Raw(kind, struct.pack(f"<{_LAYOUTS[kind]}", value))
            except struct.error:
                continue
        return gguf_value(str(value)[:1000])
    if isinstance(value, float):
        kind = F32 if abs(value) < 3e38 or value != value else 12
        return Raw(kind, struct.pack(f"<{_LAYOUTS[kind]}", value))
    if isinstance(value, list):
        kinds = {type(item) for item in value}
        if kinds == {int, float}:
            value = [float(item) for item in value]
        elif len(kinds) > 1:
            value = [str(item) for item in value]
        items = [gguf_value(item if depth < 50 else "deep", depth + 1) for item in value]
        kind = items[0].kind if items else STRING
        if kind not in (STRING, ARRAY, BOOL) and any(item.kind != kind for item in items):
            kind, items = STRING, [Raw(STRING, text(str(item)[:1000])) for item in value]
        return Raw(ARRAY, struct.pack("<IQ", kind, len(items)) + b"".join(item.data for item in items))
    return Raw(STRING, text(value if isinstance(value, str) else json.dumps(value)))


def gguf_file(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """`counts`: tensors and metadata entries that the header claims, where it should lie."""
    out = bytearray(b"GGUF" + struct.pack("<I", version))
    out += struct.pack("<QQ", *(counts or (len(tensors), len(metadata))))
    for key, value in metadata.items():
        raw = gguf_value(value)
        out += text(key) + struct.pack("<I", raw.kind) + raw.data
    body = bytearray()
    for name, tensor in tensors.items():
        body += bytes(-len(body) % alignment)
        offset = len(body) if tensor.offset is None else tensor.offset
        out += text(name) + struct.pack("<I", len(tensor.dims)) + struct.pack(f"<{len(tensor.dims)}Q", *tensor.dims)
        out += struct.pack("<IQ", tensor.kind, offset)
        body += tensor.data
    out += bytes(-len(out) % alignment)
    return bytes(out + body)


Entries = Mapping[str, tuple[str, tuple[int, ...], bytes]]
"""Name -> safetensors' dtype, shape, bytes."""

_NAMES = {"float32": "F32", "float16": "F16", "int32": "I32", "uint32": "U32", "uint8": "U8", "int8": "I8"}
_NAMES |= {"int64": "I64", "float64": "F64", "bool": "BOOL"}


def entry(array: NDArray[Any], dtype: str | None = None) -> tuple[str, tuple[int, ...], bytes]:
    """An array as safetensors stores it; `dtype`: what its bytes are called instead."""
    return dtype or _NAMES[array.dtype.name], array.shape, np.ascontiguousarray(array).tobytes()


def safetensors_header(entries: Entries) -> dict[str, Any]:
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape, data) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    return header


def safetensors_file(entries: Entries, header: Any = None, size: int | None = None) -> bytes:
    """`header`: another than the true one (JSON, or bytes); `size`: another than the header's."""
    header = safetensors_header(entries) if header is None else header
    raw = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    data = b"".join(data for _, _, data in entries.values())
    return struct.pack("<Q", len(raw) if size is None else size) + raw + data
