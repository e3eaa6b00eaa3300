"""Safetensors checkpoints, one file or a folder of shards: tensors of mapped files, without copies.

Owns the layout of the container and of the shard index. The header, JSON from a stranger, is held against the file
before memory is spent on what it claims. Must not know: architectures or what a tensor means.
Source: the format's description in the safetensors repository (README, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tramontane.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from tramontane.loading.mapped import Array, MappedFile, looks_like, read_small
from tramontane.records import dataclass

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES: Mapping[str, npt.DTypeLike] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    "C64": np.dtype("<c8"),
}
# Types whose elements are no whole bytes: listed, measured, not given as arrays. Bits of an element.
_PACKED = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

_MAX_HEADER = 100_000_000  # the reference implementation's limit, bytes
_MAX_INDEX = 256_000_000
_MAX_NAME = 255  # bytes of a shard's; systems have no longer ones


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, and its offset in bytes from that file's start."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path
    offset: int


class SafetensorsFolder:
    """The tensors of one checkpoint; a context manager.

    `metadata` is the header's `__metadata__`, of all shards together.
    """

    def __init__(
        self, path: Path, files: Mapping[Path, MappedFile], tensors: Mapping[str, TensorInfo], metadata: dict[str, str]
    ) -> None:
        self.path = path
        self.tensors = tensors
        self.metadata = metadata
        self._files = files

    @classmethod
    def open(cls, path: str | Path) -> SafetensorsFolder:
        """Open a `.safetensors` file, or a folder.

        In a folder: `model.safetensors`, else the shards that `model.safetensors.index.json` names, else the only
        `.safetensors` file. Raises `ModelNotFound`, `CorruptCheckpoint`, and `UnsupportedModel` for several files
        without an index and for element types this build does not know.
        """
        path = Path(path)
        return cls.of(path, _files_of(path))

    @classmethod
    def of(cls, path: Path, wanted: Mapping[Path, list[str] | None]) -> SafetensorsFolder:
        """Open these files as one checkpoint, of each the tensors named (None: all). Raises as `open`."""
        files: dict[Path, MappedFile] = {}
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        for file, names in wanted.items():
            files[file] = MappedFile(file)
            infos, notes = _read_header(files[file])
            metadata.update(notes)
            for name in infos if names is None else names:
                if name not in infos:
                    raise CorruptCheckpoint(str(path), f"the index puts tensor {name!r} in {file.name}, which lacks it")
                if name in tensors:
                    both = f"{tensors[name].file.name} and {file.name}"
                    raise CorruptCheckpoint(str(path), f"tensor {name!r} is in {both}")
                tensors[name] = infos[name]
        return cls(path, files, tensors, metadata)

    def data(self, name: str) -> Array:
        """The tensor as a read-only view on the map, in its shape; BF16 and 8-bit floats as ml_dtypes types.

        Raises KeyError for a name that is not there, `UnsupportedModel` for 4- and 6-bit elements.
        """
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise UnsupportedModel(
                f"Tensor {name!r} of {info.file} has element type {info.dtype}, which this build does not load.",
                "Use the checkpoint in bfloat16, float16 or float32.",
            )
        return self._files[info.file].view(info.offset, DTYPES[info.dtype], info.shape)

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system (once it was repacked); views on it stay valid."""
        info = self.tensors[name]
        self._files[info.file].release(info.offset, info.nbytes)

    def prefetch(self, name: str) -> None:
        """Have the tensor read ahead from the disk."""
        info = self.tensors[name]
        self._files[info.file].prefetch(info.offset, info.nbytes)

    def close(self) -> None:
        """Let go of the files. Views given out stay valid; `data` no longer works."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ---- which files ----------------------------------------------------------------------------------------------


def _files_of(path: Path) -> dict[Path, list[str] | None]:
    """The files to open, each with the tensors to take from it (None: all)."""
    if not path.is_dir():
        return {path: None}
    if (path / SINGLE_FILE).is_file():
        return {path / SINGLE_FILE: None}
    if (path / INDEX_FILE).is_file():
        return _read_index(path / INDEX_FILE)
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise ModelNotFound(str(path), "no .safetensors file in this folder")
    if len(found) > 1:
        raise UnsupportedModel(
            f"{path} holds {len(found)} .safetensors files and no {INDEX_FILE}.",
            f"Add the checkpoint's {INDEX_FILE}, or pass one of the files.",
        )
    return {found[0]: None}


def _read_index(path: Path) -> dict[Path, list[str] | None]:
    wanted = read_index(path)
    missing = [shard for shard in wanted if not (path.parent / shard).is_file()]
    if missing:
        names = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        detail = f"{len(missing)} of {len(wanted)} shards are not there: {names}"
        raise CorruptCheckpoint(str(path.parent), detail, "Fetch the missing files into the folder.")
    return {path.parent / shard: names for shard, names in wanted.items()}


def read_index(path: Path) -> dict[str, list[str]]:
    """The shards that an index names, files beside it, each with its tensors. Raises CorruptCheckpoint."""
    index = _parse_json(str(path), read_small(path, _MAX_INDEX))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpoint(str(path), "the index has no weight_map")
    wanted: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        # A shard is a plain name, so that an index cannot reach outside its folder.
        plain = (
            isinstance(shard, str)
            and len(shard.encode(errors="replace")) <= _MAX_NAME
            and not set(shard) & set('/\\:\0"')
        )
        if not plain or not shard.endswith(".safetensors"):
            raise CorruptCheckpoint(str(path), f"tensor {tensor!r} is said to be in {shard!r}, no file of the folder")
        wanted.setdefault(shard, []).append(tensor)
    return wanted


# ---- one file -------------------------------------------------------------------------------------------------


def _read_header(file: MappedFile) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    path = str(file.path)
    size = int.from_bytes(file.map[:8], "little")
    if file.size < 8 or size > file.size - 8 or file.map[8:9] != b"{":
        raise CorruptCheckpoint(
            path,
            f"not a complete safetensors file: {file.size} bytes, a header of {size} announced, "
            f"looks like {looks_like(file.map[:512])}",
        )
    if size > _MAX_HEADER:
        raise CorruptCheckpoint(path, f"a header of {size} bytes, more than the format's {_MAX_HEADER}")
    header = _parse_json(path, file.map[8 : 8 + size])
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise CorruptCheckpoint(path, "__metadata__ is not a map of strings")
    infos = {name: _read_info(file, 8 + size, name, entry) for name, entry in header.items()}
    _check_cover(file, 8 + size, infos.values())
    return infos, notes


def _read_info(file: MappedFile, start: int, name: str, entry: Any) -> TensorInfo:
    path = str(file.path)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptCheckpoint(path, f"the entry of tensor {name!r} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or not isinstance(dtype, str):
        raise CorruptCheckpoint(path, f"tensor {name!r} has an ill-formed entry")
    if dtype in DTYPES:
        bits = 8 * np.dtype(DTYPES[dtype]).itemsize
    elif dtype in _PACKED:
        bits = _PACKED[dtype]
    else:
        raise UnsupportedModel(
            f"Tensor {name!r} of {path} has element type {dtype[:40]!r}, which this build does not know.",
            "Use the checkpoint in bfloat16, float16 or float32.",
        )
    # 32 is numpy's limit. Ones for zeros: an empty tensor must not smuggle in dimensions numpy cannot hold.
    if len(shape) > 32 or math.prod(max(size, 1) for size in shape) * bits > max(file.size, 1 << 20) * 8:
        raise CorruptCheckpoint(path, f"tensor {name!r} of {len(shape)} dimensions is larger than the file")
    begin, end = offsets
    if math.prod(shape) * bits != (end - begin) * 8:
        raise CorruptCheckpoint(
            path, f"tensor {name!r} of shape {shape} in {dtype} is said to take {end - begin} bytes"
        )
    return TensorInfo(name, tuple(shape), dtype, end - begin, file.path, start + begin)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(file: MappedFile, start: int, infos: Iterable[TensorInfo]) -> None:
    """The format wants the tensors to fill the data exactly: no overlap, no hole, nothing beyond."""
    in_order = sorted(infos, key=lambda info: (info.offset, info.nbytes))
    at = start
    for info in in_order:
        if info.offset != at:
            kind = "overlaps the one before it" if info.offset < at else "leaves a hole before it"
            raise CorruptCheckpoint(str(file.path), f"the data of tensor {info.name!r} {kind}")
        at += info.nbytes
    if at != file.size:
        raise CorruptCheckpoint(
            str(file.path), f"the header describes {at} bytes, the file has {file.size}: it is truncated or too long"
        )


def _parse_json(path: str, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a key occurs twice")
        return out

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(path, f"its JSON cannot be read ({str(error)[:200]})") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(path, f"its JSON is a {type(value).__name__}, not an object")
    return value
