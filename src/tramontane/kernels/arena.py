"""Memory for weights: taken from the system in large pieces, so that it can be had in large pages.

Owns where packed matrices lie. Must not know: what they are.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tramontane import platform

__all__ = ["Arena"]

_CHUNK = 256 << 20
_LINE = 64


class Arena:
    """Hands out arrays, one behind the other. A piece of memory goes back to the system with the last array in it.

    Memory that is read once a token, gigabytes of it, is read a third slower in pages of 4 KiB than in pages of 2 MiB.
    """

    def __init__(self) -> None:
        self._chunk: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array with any values, on a cache line of its own."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._used + nbytes > len(self._chunk):
            whole = max(nbytes, _CHUNK) if nbytes < _CHUNK // 2 else nbytes
            chunk = np.frombuffer(platform.large_pages(max(whole, 1)), np.uint8)
            if whole == nbytes:
                return chunk.view(dtype).reshape(shape)
            self._chunk, self._used = chunk, 0
        start = self._used
        self._used = -(-(start + nbytes) // _LINE) * _LINE
        return self._chunk[start : start + nbytes].view(dtype).reshape(shape)
