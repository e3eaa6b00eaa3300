"""GGUF files, versions 1 to 3, of either byte order, whole or in parts: metadata and tensors of mapped files.

Owns the layout of the container. Every count, length, offset and product is held against the file before memory is
spent on it. Must not know: architectures, tokenizers, how a block format is computed. Sources: ggml's GGUF
specification (docs/gguf.md in the ggml repository); for parts, llama.cpp's gguf-split.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tramontane.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from tramontane.loading.cursor import Cursor
from tramontane.loading.ggml_types import BY_NAME, GGML_TYPES, swappable, swapped
from tramontane.loading.mapped import Array, MappedFile, looks_like
from tramontane.records import dataclass


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies. `shape` has rows first (ggml's dimensions reversed); `offset` counts from the file's start.

    `format` is the name in `GGML_TYPES`, or `ggml type N` for a type newer than that table, whose `nbytes` is unknown
    and given as 0. `part` counts the files of a split model from 0.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    offset: int
    nbytes: int
    part: int = 0


@dataclass(frozen=True)
class _Part:
    """One file, checked by itself."""

    file: MappedFile
    version: int
    big_endian: bool
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    @classmethod
    def open(cls, path: Path) -> _Part:
        file = MappedFile(path)
        cursor = Cursor(str(path), file.map, file.size)
        version = _read_version(cursor)
        tensor_count, entry_count = cursor.count(), cursor.count()
        cursor.expect(entry_count, 9, "metadata entries", _MAX_ENTRIES)
        metadata = _unique(cursor, "metadata key", (_read_entry(cursor) for _ in range(entry_count)))
        cursor.expect(tensor_count, 24, "tensors", _MAX_TENSORS)
        infos = _unique(cursor, "tensor", (_read_info(cursor) for _ in range(tensor_count)))
        tensors = _place(cursor, infos, metadata.get("general.alignment", 32))
        return cls(file, version, cursor.order == ">", metadata, tensors)


class GGUFFile:
    """An open GGUF file, or all files of a split one; a context manager.

    `metadata` maps keys to bool, int, float, str and lists of those; of a split model it is that of the first part. A
    string that stands alone is UTF-8 or the file is corrupt; strings in arrays (tokens) may be any bytes: what is not
    UTF-8 becomes lone surrogates, and `text.encode("utf-8", "surrogateescape")` gives the bytes back.
    """

    def __init__(self, path: Path, parts: Sequence[_Part]) -> None:
        self.path = path
        self.version = parts[0].version
        self.metadata = parts[0].metadata
        self.tensors: dict[str, GGUFTensor] = {}
        for number, part in enumerate(parts):
            for name, tensor in part.tensors.items():
                if name in self.tensors:
                    raise CorruptCheckpoint(str(part.file.path), f"tensor {name!r} is in another part too")
                self.tensors[name] = replace(tensor, part=number)
        self._parts = [replace(part, metadata={}) for part in parts]

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Map and check the file; any part of a split model opens all of them.

        Raises `ModelNotFound` (naming the parts that are missing), `CorruptCheckpoint`, and `UnsupportedModel` for
        other versions.
        """
        path = Path(path)
        part = _Part.open(path)
        count = part.metadata.get("split.count", 0)
        if type(count) is int and count <= 1:  # merged files keep the key
            return cls(path, [part])
        return cls(path, _open_parts(path, part))

    @property
    def container(self) -> str:
        """What kind of file it is, for people."""
        order = ", big-endian" if self._parts[0].big_endian else ""
        return f"GGUF version {self.version}{order}{f', {len(self._parts)} parts' if len(self._parts) > 1 else ''}"

    def data(self, name: str) -> Array:
        """The tensor as a read-only view on the map.

        Plain numbers come in their dtype (F16 as float16, BF16 as `ml_dtypes.bfloat16`) and the tensor's shape;
        block formats as uint8 of shape (..., bytes of a row). From a big-endian file it is a copy, turned around.
        Raises KeyError for a name that is not there and `UnsupportedModel` for a type this build cannot measure, or
        cannot turn around.
        """
        tensor = self.tensors[name]
        part = self._parts[tensor.part]
        kind = BY_NAME.get(tensor.format)
        if kind is None:
            raise UnsupportedModel(
                f"Tensor {name!r} of {self.path} has {tensor.format}, which this build does not know.",
                "Use a file in another quantization, such as Q4_K_M or Q8_0.",
            )
        if kind.dtype is not None:
            data = part.file.view(tensor.offset, kind.dtype, tensor.shape)
        else:
            row_bytes = tensor.shape[-1] // kind.block * kind.nbytes
            data = part.file.view(tensor.offset, np.uint8, (*tensor.shape[:-1], row_bytes))
        if not part.big_endian:
            return data
        if not swappable(kind):
            raise UnsupportedModel(
                f"Tensor {name!r} of the big-endian file {self.path} has {kind.name}, whose byte order is not defined.",
                "Use the little-endian file, or one in another quantization, such as Q4_K_M or Q8_0.",
            )
        data = swapped(kind, data)
        data.setflags(write=False)
        return data

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system (once it was repacked); views on it stay valid."""
        tensor = self.tensors[name]
        self._parts[tensor.part].file.release(tensor.offset, tensor.nbytes)

    def release_all(self) -> None:
        """The same of everything, the head included."""
        for part in self._parts:
            part.file.release(0, part.file.size)

    def prefetch(self, name: str) -> None:
        """Have the tensor read ahead from the disk."""
        tensor = self.tensors[name]
        self._parts[tensor.part].file.prefetch(tensor.offset, tensor.nbytes)

    def close(self) -> None:
        """Let go of the files. Views given out stay valid; `data` no longer works."""
        for part in self._parts:
            part.file.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ---- parts ------------------------------------------------------------------------------------------------------

_PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def _open_parts(path: Path, opened: _Part) -> list[_Part]:
    """All parts in order, of which one is open already."""
    number, count = opened.metadata.get("split.no"), opened.metadata["split.count"]
    name = _PART_NAME.fullmatch(path.name)
    if name is None or type(count) is not int or (int(name[2]) - 1, int(name[3])) != (number, count):
        raise CorruptCheckpoint(
            str(path),
            f"it says that it is part {number!r}, from 0, of {count!r}, which its name does not say",
            "Give each part back its name, such as MODEL-00001-of-00003.gguf.",
        )
    paths = [path.with_name(f"{name[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [other.name for other in paths if not other.is_file()]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ModelNotFound(
            str(path),
            f"of its {count} parts there is no {', '.join(missing[:4])}{more}",
            "Fetch all parts into one folder, and pass the path of any.",
        )
    parts = [opened if other == path else _Part.open(other) for other in paths]
    for i, part in enumerate(parts):
        said = (part.metadata.get("split.no"), part.metadata.get("split.count"))
        if said != (i, count):
            raise CorruptCheckpoint(str(paths[i]), f"it says that it is part {said[0]!r}, from 0, of {said[1]!r}")
    total, found = parts[0].metadata.get("split.tensors.count"), sum(len(part.tensors) for part in parts)
    if total is not None and total != found:
        raise CorruptCheckpoint(str(path), f"its parts have {found} tensors together where the first says {total!r}")
    return parts


# ---- reading --------------------------------------------------------------------------------------------------

_MAX_DIMENSIONS = 4  # ggml's own limit
_MAX_NESTING = 4
_MAX_ENTRIES = 1 << 16
_MAX_TENSORS = 1 << 18
# All array elements of the metadata together. The largest vocabularies with merges hold about two million; a Python
# list takes up to ten times what the file spends on an element.
_MAX_ELEMENTS = 1 << 24

_SCALARS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9


def _read_version(cursor: Cursor) -> int:
    """The version; sets the cursor's byte order and size."""
    head = cursor.data[:512]
    if head[:4] != b"GGUF":
        raise CorruptCheckpoint(
            cursor.path, f"not a GGUF file but {looks_like(head)}", "Fetch the .gguf file itself and pass its path."
        )
    cursor.at = 4
    raw = cursor.take(4)
    version = int.from_bytes(raw, "little")
    if int.from_bytes(raw, "big") in (1, 2, 3):
        version, cursor.order = int.from_bytes(raw, "big"), ">"
    if version not in (1, 2, 3):
        raise UnsupportedModel(
            f"{cursor.path} has GGUF version {version}; this build reads 1, 2 and 3.", "Convert the model again."
        )
    if version == 1:
        cursor.size = "I"
    return version


def _read_entry(cursor: Cursor) -> tuple[str, Any]:
    key = cursor.name("metadata key")
    return key, _read_value(cursor, cursor.number("I"), key, 0)


def _read_value(cursor: Cursor, kind: int, key: str, depth: int) -> Any:
    if kind == _STRING:
        return cursor.text(cursor.count(), f"string in {key!r}")
    if kind == _ARRAY:
        return _read_array(cursor, key, depth + 1)
    if kind not in _SCALARS:
        cursor.fail(f"{key!r} has value type {kind}, which GGUF does not define")
    if kind != _BOOL:
        return cursor.number(_SCALARS[kind])
    value = cursor.number("B")
    if value > 1:
        cursor.fail(f"{key!r} is a boolean of value {value}")
    return bool(value)


def _read_array(cursor: Cursor, key: str, depth: int) -> list[Any]:
    kind, count = cursor.number("I"), cursor.count()
    cursor.elements += count
    if depth > _MAX_NESTING:
        cursor.fail(f"{key!r} nests arrays more than {_MAX_NESTING} deep")
    if cursor.elements > _MAX_ELEMENTS:
        cursor.fail(f"the metadata has more than {_MAX_ELEMENTS} array elements, the last in {key!r}")
    if kind == _STRING:
        cursor.expect(count, 4, f"strings in {key!r}")
        return cursor.strings(count)
    if kind == _ARRAY:
        cursor.expect(count, 8, f"arrays in {key!r}")
        return [_read_array(cursor, key, depth + 1) for _ in range(count)]
    if kind not in _SCALARS:
        cursor.fail(f"{key!r} is an array of value type {kind}, which GGUF does not define")
    dtype = np.dtype(cursor.order + _SCALARS[kind])
    cursor.expect(count, dtype.itemsize, f"numbers in {key!r}")
    raw = cursor.take(count * dtype.itemsize)
    if kind == _BOOL and raw.strip(b"\0\1"):
        cursor.fail(f"{key!r} is an array of booleans of other values than 0 and 1")
    values: list[Any] = np.frombuffer(raw, dtype).tolist()
    return values


def _read_info(cursor: Cursor) -> tuple[str, GGUFTensor]:
    """A tensor's entry, its offset still relative to the data section."""
    name = cursor.name("tensor name")
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        cursor.fail(f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple(cursor.count() for _ in range(dimensions))[::-1]
    type_id, offset = cursor.number("I"), cursor.number("Q")
    kind = GGML_TYPES.get(type_id)
    if not all(shape):
        cursor.fail(f"tensor {name!r} has shape {shape}")
    if kind is None:
        return name, GGUFTensor(name, shape, f"ggml type {type_id}", offset, 0)
    if shape[-1] % kind.block:
        cursor.fail(f"rows of tensor {name!r} have {shape[-1]} elements, not a multiple of {kind.name}'s {kind.block}")
    return name, GGUFTensor(name, shape, kind.name, offset, math.prod(shape) // kind.block * kind.nbytes)


def _unique(cursor: Cursor, what: str, items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, item in items:
        if name in out:
            cursor.fail(f"{what} {name!r} occurs twice")
        out[name] = item
    return out


def _place(cursor: Cursor, infos: Mapping[str, GGUFTensor], alignment: Any) -> dict[str, GGUFTensor]:
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
