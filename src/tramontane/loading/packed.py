"""Packed weights kept on disk: what one start made of a model's matrices, for the next ones to read.

Owns the files, where they lie, and what tells that one is of this model as it is now. They are safetensors files, so
that the reader which trusts no header reads them too; a note of theirs, `identity`, stands for all that the bytes
depend on. Must not know: how matrices are packed, what they are for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tramontane import platform
from tramontane.errors import CorruptCheckpoint, TramontaneError
from tramontane.loading.safetensors import DTYPES, SafetensorsFolder
from tramontane.records import dataclass

log = logging.getLogger("tramontane")

_SUFFIX = ".packed"
_SAMPLE = 1 << 16
"""Bytes of a file's beginning and of its end that are looked at, beside its size and time."""
_LINE = 64
_SHARD = re.compile(r"\d+(-of-\d+)?$")

_NAMES = {np.dtype(DTYPES[name]): name for name in ("U8", "I32", "F32", "F16", "BF16")}

Rooms = Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]
"""Of the arrays that a file has, mapped, those to be filled with them. Raises ValueError where they are of no use."""


def stamps(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of each file of the model at a path: what changes when one of them does."""
    return [_stamp(file) for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.suffix != _SUFFIX]


def _stamp(file: Path) -> tuple[str, int, int]:
    try:
        stat = file.stat()
    except OSError:  # a link to nowhere, say: no file, until it leads somewhere
        return file.name, -1, 0
    return file.name, stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class KeptWeights:
    """The packed matrices of one model, loaded one way. `places`: where they may lie, best first."""

    places: tuple[Path, ...]
    identity: str

    @classmethod
    def of(cls, model: Path, where: bool | str, kind: str, depends: Iterable[object]) -> KeptWeights:
        """`where`: True is beside the model, or in our cache where that cannot be written to; else a folder. `kind`: of
        several ways to load a model, each of which has a file. `depends`: what the bytes depend on besides the model's
        own."""
        digest = hashlib.sha256(os.path.abspath(model).encode(errors="surrogateescape"))
        name = f"{model.name}-{digest.hexdigest()[:12]}.{kind}{_SUFFIX}"
        places = [Path(str(where)) / name]
        if where is True:
            beside = model / f"weights.{kind}" if model.is_dir() else model.with_name(f"{model.name}.{kind}")
            places = [beside.with_name(beside.name + _SUFFIX), platform.cache_dir() / "packed" / name]
        return cls(tuple(places), _identity(model, depends))

    def read(self, rooms: Rooms) -> Mapping[str, NDArray[Any]]:
        """The arrays of `rooms`, filled; none where nothing is kept, or (and that is logged) nothing that fits."""
        for place in self.places:
            if place.is_file():
                try:
                    return self._read(place, rooms)
                except TramontaneError as error:
                    log.warning("packed weights are made anew: %s", error)
        return {}

    def _read(self, place: Path, rooms: Rooms) -> Mapping[str, NDArray[Any]]:
        with SafetensorsFolder.of(place, {place: None}) as file:
            if file.metadata.get("identity") != self.identity:
                raise CorruptCheckpoint(str(place), "it is of another state of the model, or of another version")
            stored = {name: file.data(name) for name in file.tensors}
            try:
                wanted = rooms(stored)
            except ValueError as error:
                raise CorruptCheckpoint(str(place), str(error)) from error
            if {name: (array.dtype, array.shape) for name, array in stored.items()} != {
                name: (room.dtype, room.shape) for name, room in wanted.items()
            }:
                raise CorruptCheckpoint(str(place), "it does not hold the matrices that the model has")

            def fill(name: str) -> None:
                file.prefetch(name)
                np.copyto(wanted[name], stored[name])
                file.release(name)

            with ThreadPoolExecutor(platform.cpu_count()) as pool:
                list(pool.map(fill, wanted))
        return wanted

    def write(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep these, in the first place that can be written to; where none can, that is logged."""
        troubles = []
        for place in self.places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                _write(place, arrays, self.identity)
                return
            except OSError as error:
                troubles.append(f"{place}: {error.strerror or error}")
        log.warning("packed weights cannot be kept: %s", "; ".join(troubles))


def _identity(model: Path, depends: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for file in _files(model):
        digest.update(repr(_stamp(file)).encode())
        if file.is_file():
            with open(file, "rb") as opened:
                digest.update(opened.read(_SAMPLE))
                opened.seek(-min(_SAMPLE, os.fstat(opened.fileno()).st_size), os.SEEK_END)
                digest.update(opened.read(_SAMPLE))
    for one in (*_code(), *depends):
        digest.update(repr(one).encode() + b"\0")
    return digest.hexdigest()


def _files(model: Path) -> list[Path]:
    """All files of a folder; a file, and those beside it that may be parts of the same model."""
    stem = _SHARD.sub("", model.stem)
    found = model.iterdir() if model.is_dir() else model.parent.iterdir()
    return sorted(
        file
        for file in found
        if file.suffix != _SUFFIX
        and (model.is_dir() or (file.suffix == model.suffix and _SHARD.sub("", file.stem) == stem))
    )


def _code() -> list[tuple[str, int, int]]:
    """Stamps of the modules that say which rows of which tensors a matrix is made of, and what is kept of it."""
    ours = Path(__file__).parents[1]
    return [_stamp(file) for part in ("loading", "models", "weights") for file in sorted((ours / part).rglob("*.py"))]


def _write(place: Path, arrays: Mapping[str, NDArray[Any]], identity: str) -> None:
    """A whole file or none, and no other process ever sees a part of it. Raises OSError."""
    entries: dict[str, Any] = {"__metadata__": {"identity": identity}}
    at = 0
    for name, array in arrays.items():
        offsets = [at, at + array.nbytes]
        entries[name] = {"dtype": _NAMES[array.dtype], "shape": array.shape, "data_offsets": offsets}
        at += array.nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-(8 + len(header)) % _LINE)
    partial = place.with_name(f"{place.name}.{secrets.token_hex(4)}{_SUFFIX}")
    try:
        with open(partial, "xb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for array in arrays.values():
                file.write(array.reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())  # a machine that fails now must not leave zeros under a sound header
        os.replace(partial, place)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
