"""Workspace: the fixed buffers that a step's ops write into.

Owns named buffers, each allocated once at its largest size. Must not know: what they are used for.
"""

from __future__ import annotations

import math

from tramontane.kernels.base import Array, Ops


class Workspace:
    """Named buffers of at most `max_rows` rows on one device. Not thread-safe: one runner owns it."""

    def __init__(self, ops: Ops, max_rows: int) -> None:
        self.ops = ops
        self.max_rows = max_rows
        self.nbytes = 0
        self._buffers: dict[tuple[str, tuple[int, ...], str], Array] = {}

    def take(self, name: str, rows: int, *tail: int, dtype: str = "float32") -> Array:
        """The first `rows` rows of the buffer `name`, as [rows, *tail]; what it held before is undefined.

        A name with one tail and dtype is one buffer: taking it again gives the same memory.
        """
        if rows > self.max_rows:
            raise ValueError(f"{name}: {rows} rows exceed the workspace's {self.max_rows}")
        return self.ops.view(self._buffer(name, (self.max_rows, *tail), dtype), (rows, *tail))

    def fixed(self, name: str, *shape: int, dtype: str = "float32") -> Array:
        """A buffer of one shape, however many rows a step has; else as `take`."""
        return self._buffer(name, shape, dtype)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: str) -> Array:
        key = (name, shape, dtype)
        if key not in self._buffers:
            self._buffers[key] = self.ops.empty(shape, dtype)
            self.nbytes += math.prod(shape) * (2 if dtype in ("float16", "bfloat16") else 4)
        return self._buffers[key]
