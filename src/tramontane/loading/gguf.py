"""GGUF files, versions 2 and 3, little endian: metadata and tensors of a mapped file, without copies.

Owns the layout of the container and the table of ggml's tensor types. Every count, length, offset and product is
held against the file before memory is spent on it. Must not know: architectures, tokenizers, how a block format is
computed. Source: ggml's GGUF specification (docs/gguf.md in the ggml repository).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tramontane.errors import CorruptCheckpoint, UnsupportedModel
from tramontane.loading.mapped import Array, MappedFile, looks_like


@dataclass(frozen=True)
class GGMLType:
    """One of ggml's tensor types: `block` elements of a row take `nbytes` bytes.

    `dtype` is what `GGUFFile.data` gives: the number type of plain tensors, None for blocks (given as bytes).
    """

    name: str
    block: int
    nbytes: int
    dtype: npt.DTypeLike | None = None


_K = 256  # elements in a super-block of the k-quants and i-quants

GGML_TYPES: Mapping[int, GGMLType] = {
    0: GGMLType("F32", 1, 4, np.dtype("<f4")),
    1: GGMLType("F16", 1, 2, np.dtype("<f2")),
    2: GGMLType("Q4_0", 32, 18),
    3: GGMLType("Q4_1", 32, 20),
    6: GGMLType("Q5_0", 32, 22),
    7: GGMLType("Q5_1", 32, 24),
    8: GGMLType("Q8_0", 32, 34),
    9: GGMLType("Q8_1", 32, 40),
    10: GGMLType("Q2_K", _K, 84),
    11: GGMLType("Q3_K", _K, 110),
    12: GGMLType("Q4_K", _K, 144),
    13: GGMLType("Q5_K", _K, 176),
    14: GGMLType("Q6_K", _K, 210),
    15: GGMLType("Q8_K", _K, 292),
    16: GGMLType("IQ2_XXS", _K, 66),
    17: GGMLType("IQ2_XS", _K, 74),
    18: GGMLType("IQ3_XXS", _K, 98),
    19: GGMLType("IQ1_S", _K, 50),
    20: GGMLType("IQ4_NL", 32, 18),
    21: GGMLType("IQ3_S", _K, 110),
    22: GGMLType("IQ2_S", _K, 82),
    23: GGMLType("IQ4_XS", _K, 136),
    24: GGMLType("I8", 1, 1, np.dtype("i1")),
    25: GGMLType("I16", 1, 2, np.dtype("<i2")),
    26: GGMLType("I32", 1, 4, np.dtype("<i4")),
    27: GGMLType("I64", 1, 8, np.dtype("<i8")),
    28: GGMLType("F64", 1, 8, np.dtype("<f8")),
    29: GGMLType("IQ1_M", _K, 56),
    30: GGMLType("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
    34: GGMLType("TQ1_0", _K, 54),
    35: GGMLType("TQ2_0", _K, 66),
    39: GGMLType("MXFP4", 32, 17),
    40: GGMLType("NVFP4", 64, 36),
    41: GGMLType("Q1_0", 128, 18),
}

_BY_NAME = {kind.name: kind for kind in GGML_TYPES.values()}


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies. `shape` has rows first (ggml's dimensions reversed); `offset` counts from the file's start.

    `format` is the name in `GGML_TYPES`, or `ggml type N` for a type newer than this table, whose `nbytes` is
    unknown and given as 0.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    offset: int
    nbytes: int


class GGUFFile:
    """An open GGUF file; a context manager.

    `metadata` maps keys to bool, int, float, str and lists of those. A string that stands alone is UTF-8 or the file
    is corrupt; strings in arrays (tokens) may be any bytes: what is not UTF-8 becomes lone surrogates, and
    `text.encode("utf-8", "surrogateescape")` gives the bytes back.
    """

    def __init__(
        self, file: MappedFile, version: int, metadata: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]
    ) -> None:
        self.path = file.path
        self.version = version
        self.metadata = metadata
        self.tensors = tensors
        self._file = file

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Map and check the file.

        Raises `ModelNotFound`, `CorruptCheckpoint`, and `UnsupportedModel` for big-endian files, other versions
        and files that are one part of a split model.
        """
        file = MappedFile(path)
        cursor = _Cursor(str(path), file.map, file.size)
        version = _read_version(cursor)
        tensor_count, entry_count = cursor.integer("<Q"), cursor.integer("<Q")
        cursor.expect(entry_count, 13, "metadata entries")
        metadata = _unique(cursor, "metadata key", (_read_entry(cursor) for _ in range(entry_count)))
        _refuse_split(cursor.path, metadata)
        cursor.expect(tensor_count, 32, "tensors")
        infos = _unique(cursor, "tensor", (_read_info(cursor) for _ in range(tensor_count)))
        return cls(file, version, metadata, _place(cursor, infos, metadata.get("general.alignment", 32)))

    def data(self, name: str) -> Array:
        """The tensor as a read-only view on the map.

        Plain numbers come in their dtype (F16 as float16, BF16 as `ml_dtypes.bfloat16`) and the tensor's shape;
        block formats as uint8 of shape (..., bytes of a row). Raises KeyError for a name that is not there and
        `UnsupportedModel` for a type this build cannot measure.
        """
        tensor = self.tensors[name]
        kind = _BY_NAME.get(tensor.format)
        if kind is None:
            raise UnsupportedModel(
                f"Tensor {name!r} of {self.path} has {tensor.format}, which this build does not know.",
                "Use a file in another quantization, such as Q4_K_M or Q8_0.",
            )
        if kind.dtype is not None:
            return self._file.view(tensor.offset, kind.dtype, tensor.shape)
        row_bytes = tensor.shape[-1] // kind.block * kind.nbytes
        return self._file.view(tensor.offset, np.uint8, (*tensor.shape[:-1], row_bytes))

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system (once it was repacked); views on it stay valid."""
        tensor = self.tensors[name]
        self._file.release(tensor.offset, tensor.nbytes)

    def prefetch(self, name: str) -> None:
        """Have the tensor read ahead from the disk."""
        tensor = self.tensors[name]
        self._file.prefetch(tensor.offset, tensor.nbytes)

    def close(self) -> None:
        """Let go of the file. Views given out stay valid; `data` no longer works."""
        self._file.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ---- reading --------------------------------------------------------------------------------------------------

_MAX_DIMENSIONS = 4  # ggml's own limit
_MAX_NAME_BYTES = 65535  # the specification's limit for keys
_MAX_NESTING = 4
# All array elements of the metadata together. The largest vocabularies with merges hold about two million; a Python
# list takes up to ten times what the file spends on an element.
_MAX_ELEMENTS = 1 << 24

_SCALARS: Mapping[int, str] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9


class _Cursor:
    """A position in the mapped file that never moves beyond its end."""

    def __init__(self, path: str, data: mmap.mmap, end: int) -> None:
        self.path = path
        self.data = data
        self.end = end
        self.at = 0
        self.elements = 0

    def fail(self, detail: str) -> NoReturn:
        raise CorruptCheckpoint(self.path, f"{detail} (at byte {self.at})")

    def take(self, count: int) -> bytes:
        if count > self.end - self.at:
            self.fail(f"{count} bytes wanted where the file has {self.end - self.at} left")
        self.at += count
        return self.data[self.at - count : self.at]

    def expect(self, count: int, least: int, what: str) -> None:
        """Refuse a count whose items, at `least` bytes each, cannot be in the rest of the file."""
        if count * least > self.end - self.at:
            self.fail(f"{count} {what} cannot be in the {self.end - self.at} bytes left")

    def integer(self, layout: str) -> int:
        return int(struct.unpack(layout, self.take(struct.calcsize(layout)))[0])

    def name(self, what: str) -> str:
        length = self.integer("<Q")
        if not 0 < length <= _MAX_NAME_BYTES:
            self.fail(f"a {what} of {length} bytes")
        return self.text(length, what)

    def text(self, length: int, what: str) -> str:
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            self.fail(f"a {what} that is not UTF-8")

    def strings(self, count: int) -> list[str]:
        """An array of strings, in one tight loop: a vocabulary has hundreds of thousands."""
        data, at, end = self.data, self.at, self.end
        length_at: Callable[..., tuple[int]] = struct.Struct("<Q").unpack_from
        out: list[str] = []
        for _ in range(count):
            if end - at < 8:
                self.fail(f"an array of {count} strings ends after {len(out)}")
            (length,) = length_at(data, at)
            at += 8
            if length > end - at:
                self.fail(f"string {len(out)} of an array claims {length} bytes")
            out.append(data[at : at + length].decode("utf-8", "surrogateescape"))
            at += length
        self.at = at
        return out


def _read_version(cursor: _Cursor) -> int:
    head = cursor.data[:512]
    if head[:4] != b"GGUF":
        raise CorruptCheckpoint(
            cursor.path, f"not a GGUF file but {looks_like(head)}", "Fetch the .gguf file itself and pass its path."
        )
    cursor.at = 4
    raw = cursor.take(4)
    version, swapped = int.from_bytes(raw, "little"), int.from_bytes(raw, "big")
    if swapped in (2, 3):
        raise UnsupportedModel(
            f"{cursor.path} is a big-endian GGUF file.",
            "Use the little-endian file, or convert it with `gguf-convert-endian FILE little` of the gguf package.",
        )
    if version not in (2, 3):
        raise UnsupportedModel(
            f"{cursor.path} has GGUF version {version}; this build reads 2 and 3.", "Convert the model again."
        )
    return version


def _read_entry(cursor: _Cursor) -> tuple[str, Any]:
    key = cursor.name("metadata key")
    return key, _read_value(cursor, cursor.integer("<I"), key, 0)


def _read_value(cursor: _Cursor, kind: int, key: str, depth: int) -> Any:
    if kind == _STRING:
        return cursor.text(cursor.integer("<Q"), f"string in {key!r}")
    if kind == _ARRAY:
        return _read_array(cursor, key, depth + 1)
    if kind not in _SCALARS:
        cursor.fail(f"{key!r} has value type {kind}, which GGUF does not define")
    layout = _SCALARS[kind]
    raw = cursor.take(struct.calcsize(layout))
    if kind == _BOOL and raw not in (b"\0", b"\1"):
        cursor.fail(f"{key!r} is a boolean of value {raw[0]}")
    return struct.unpack(layout, raw)[0]


def _read_array(cursor: _Cursor, key: str, depth: int) -> list[Any]:
    kind, count = cursor.integer("<I"), cursor.integer("<Q")
    cursor.elements += count
    if depth > _MAX_NESTING:
        cursor.fail(f"{key!r} nests arrays more than {_MAX_NESTING} deep")
    if cursor.elements > _MAX_ELEMENTS:
        cursor.fail(f"the metadata has more than {_MAX_ELEMENTS} array elements, the last in {key!r}")
    if kind == _STRING:
        cursor.expect(count, 8, f"strings in {key!r}")
        return cursor.strings(count)
    if kind == _ARRAY:
        cursor.expect(count, 12, f"arrays in {key!r}")
        return [_read_array(cursor, key, depth + 1) for _ in range(count)]
    if kind not in _SCALARS:
        cursor.fail(f"{key!r} is an array of value type {kind}, which GGUF does not define")
    dtype = np.dtype(_SCALARS[kind])
    cursor.expect(count, dtype.itemsize, f"numbers in {key!r}")
    raw = cursor.take(count * dtype.itemsize)
    if kind == _BOOL and raw.strip(b"\0\1"):
        cursor.fail(f"{key!r} is an array of booleans of other values than 0 and 1")
    values: list[Any] = np.frombuffer(raw, dtype).tolist()
    return values


def _read_info(cursor: _Cursor) -> tuple[str, GGUFTensor]:
    """A tensor's entry, its offset still relative to the data section."""
    name = cursor.name("tensor name")
    dimensions = cursor.integer("<I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        cursor.fail(f"tensor {name!r} has {dimensions} dimensions")
    shape = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))[::-1]
    type_id, offset = cursor.integer("<I"), cursor.integer("<Q")
    kind = GGML_TYPES.get(type_id)
    if not all(shape):
        cursor.fail(f"tensor {name!r} has shape {shape}")
    if kind is None:
        return name, GGUFTensor(name, shape, f"ggml type {type_id}", offset, 0)
    if shape[-1] % kind.block:
        cursor.fail(f"rows of tensor {name!r} have {shape[-1]} elements, not a multiple of {kind.name}'s {kind.block}")
    return name, GGUFTensor(name, shape, kind.name, offset, math.prod(shape) // kind.block * kind.nbytes)


def _unique(cursor: _Cursor, what: str, items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, item in items:
        if name in out:
            cursor.fail(f"{what} {name!r} occurs twice")
        out[name] = item
    return out


def _place(cursor: _Cursor, infos: Mapping[str, GGUFTensor], alignment: Any) -> dict[str, GGUFTensor]:
    """The tensors with offsets from the file's start, each inside the file and none over another."""
    # The specification asks for a multiple of 8, ggml for a power of two.
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        cursor.fail(f"general.alignment is {alignment!r}, not a power of two from 8")
    start = -(-cursor.at // alignment) * alignment
    placed = {}
    for name, info in infos.items():
        offset = start + info.offset
        if info.offset % alignment:
            cursor.fail(f"tensor {name!r} begins at {info.offset}, not a multiple of {alignment}")
        if offset + info.nbytes > cursor.end:
            cursor.fail(
                f"tensor {name!r} takes bytes {offset} to {offset + info.nbytes}, the file has {cursor.end}: "
                "it is truncated or its header lies"
            )
        placed[name] = replace(info, offset=offset)
    in_order = sorted(placed.values(), key=lambda tensor: (tensor.offset, tensor.nbytes))
    for before, after in pairwise(in_order):
        if before.offset + before.nbytes > after.offset:
            cursor.fail(f"tensors {before.name!r} and {after.name!r} overlap")
    return placed


def _refuse_split(path: str, metadata: Mapping[str, Any]) -> None:
    parts = metadata.get("split.count", 1)
    if type(parts) is int and parts > 1:
        raise UnsupportedModel(
            f"{path} is one of {parts} parts of a split GGUF model; split files are not read yet.",
            "Merge them into one file with llama.cpp's `llama-gguf-split --merge FIRST_PART OUT` and pass that.",
        )
