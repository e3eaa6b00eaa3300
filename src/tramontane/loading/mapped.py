"""A checkpoint file mapped into memory, read only: checked byte ranges, array views, page advice.

Owns the errors of opening a file that is missing, unreadable or plainly something else.
Must not know: any checkpoint format beyond the first bytes that tell them apart.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from tramontane import platform
from tramontane.errors import CorruptCheckpoint, ModelNotFound

Array = npt.NDArray[Any]

_BEGINNINGS = (
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself (run `git lfs pull`)"),
    (b"PK\x03\x04", "a zip archive, such as a PyTorch checkpoint or a wheel"),
    (b"\x80", "a Python pickle, such as an old PyTorch checkpoint"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"lmgg", "a ggml file from before GGUF"),
    (b"fmgg", "a ggml file from before GGUF"),
    (b"tjgg", "a ggml file from before GGUF"),
    (b"{", "JSON text"),
)


def looks_like(head: bytes) -> str:
    """What a file that begins with `head` (some 512 bytes) seems to be, as a phrase for an error message."""
    if not head:
        return "an empty file"
    for start, kind in _BEGINNINGS:
        if head.startswith(start):
            return kind
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page (an error page saved by a download?)"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "a safetensors file"
    if not any(head):
        return "nothing but zeros (an unfinished download?)"
    return f"an unknown kind of file, beginning with {head[:8].hex(' ')}"


def read_small(path: Path, most: int) -> bytes:
    """All of a file that is small by its nature. Raises ModelNotFound where it cannot be read, and CorruptCheckpoint
    for one of more than `most` bytes, which are not read."""
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise ModelNotFound(str(path), error.strerror or str(error)) from error
    if len(content) > most:
        raise CorruptCheckpoint(str(path), f"more than {most} bytes are too many for what it should be")
    return content


class MappedFile:
    """A file's bytes, mapped read only. Views keep the map alive, so closing while views exist is safe.

    Raises `ModelNotFound` for what cannot be opened and `CorruptCheckpoint` for an empty file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                file.seek(0, 2)
                self.size = file.tell()
                if self.size == 0:
                    raise CorruptCheckpoint(str(path), "the file is empty")
                self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelNotFound(str(path), error.strerror or str(error)) from error

    @property
    def map(self) -> mmap.mmap:
        """The map itself. ValueError once the file was closed."""
        if self._map is None:
            raise ValueError(f"{self.path} is closed")
        return self._map

    def view(self, offset: int, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> Array:
        """A read-only array on the map, without a copy, its element order C.

        The range must have been checked against `size`. Only where the file keeps the numbers at odd addresses,
        which compiled code may not read, is the array an aligned copy.
        """
        flat: Array = np.frombuffer(self.map, dtype=dtype, count=math.prod(shape), offset=offset)
        if not flat.flags.aligned:
            flat = flat.copy()
            flat.flags.writeable = False
        return flat.reshape(shape)

    def release(self, offset: int, nbytes: int) -> None:
        """Give the pages of this range back to the system; views stay valid and are read again on use."""
        platform.release_pages(self.map, offset, nbytes)

    def prefetch(self, offset: int, nbytes: int) -> None:
        """Have the system read this range ahead."""
        platform.prefetch_pages(self.map, offset, nbytes)

    def close(self) -> None:
        """Let go of the map. The memory is unmapped when the last view is gone."""
        self._map = None

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
