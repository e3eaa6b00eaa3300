"""The compiled ops, on numpy arrays: thin wrappers that hand arguments to `tramontane._native`.

Owns where buffers lie in memory and the choice of an instruction set: the best that the machine has, or the one that
`TRAMONTANE_ISA` names (amx, avx512_bf16, avx512_vnni, avx512, avx2_vnni, avx2; neon_i8mm, neon_dotprod, neon; plain;
amx_emulated for tests). The compiled module checks dtypes, shapes, contiguity and ids, and lets other Python threads
run during all but the shortest ops. Must not know: weights, layers, models.

Threads. Each `CpuOps` keeps a pool of `threads` threads, the calling one included; they start with the first op that
is worth sharing, spin for some 60 microseconds after each (a model's ops follow one another closely), then sleep.
With `processors` each is bound to one; the first is for the calling thread, whose owner binds it (`platform.Pin`).
Results do not depend on their number: every element is computed by one thread, in one order of accumulation. It is the
same for one row and for many, except that where neither `deterministic` nor `exact` forbids it AMX multiplies many rows
in bfloat16 or bytes, and attention on AMX and avx512_bf16 in bfloat16, but for a cache of float32.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tramontane import platform
from tramontane.errors import InvalidRequest
from tramontane.kernels.arena import Arena
from tramontane.kernels.base import BLOCKS, Array, BlockLayout
from tramontane.kernels.cells import numpy_dtype
from tramontane.kernels.coded import GRIDS, Coded, turn
from tramontane.kernels.recurrence import RecurrentOps
from tramontane.kernels.tables import LEVELS, table

__all__ = ["CpuOps", "available", "isas"]

_CACHE_LINE = 64
_PAGE = 4096
_SMALL = 1 << 20
"""Bytes at the start of an array of zeros that lie in small pages: what few sequences use of a layer's cache would take
a whole large page, or two, in each. They are read no slower; numpy would ask for large ones."""
_BYTES = np.dtype(np.uint8)
_TILES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": numpy_dtype("bfloat16"),
}
"""What tiles are of, where it is not bytes."""

_GROWING = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
"""Formats of which tiles take more than rows of blocks do, which are left while memory is short."""


def available() -> bool:
    """Whether the compiled module is installed."""
    return importlib.util.find_spec("tramontane._native") is not None


def isas(emulated: bool = False) -> list[str]:
    """The instruction sets that this machine can be held to, best first; with `emulated`, then those that it has not
    and can imitate, slowly, for tests."""
    from tramontane import _native

    return [*_native.instruction_sets(), *(_native.instruction_sets(emulated=True) if emulated else ())]


def trouble() -> str:
    """Why this processor's best instruction set is not among them; empty where it is."""
    from tramontane import _native

    return _native.instruction_set_trouble()


class CpuOps(RecurrentOps):
    """`Ops` of this processor. `isa` forces an instruction set; an absent one raises InvalidRequest.

    Ops of states are not compiled: numpy computes them, a row like any other.
    """

    device = "cpu"

    def __init__(
        self,
        threads: int = 1,
        deterministic: bool = False,
        isa: str | None = None,
        exact: bool = False,
        processors: Sequence[int] = (),
    ) -> None:
        from tramontane import _native

        field, chosen = ("isa", isa) if isa else ("TRAMONTANE_ISA", os.environ.get("TRAMONTANE_ISA", ""))
        if chosen and chosen not in isas(emulated=True):
            raise InvalidRequest(field, f"{chosen!r} is not available here", f"Use one of {', '.join(isas())}.")
        if threads < 1:
            raise InvalidRequest("threads", f"{threads} is less than 1", "Use at least one thread.")
        _set_tables()
        self._native = _native.Cpu(threads, chosen, exact, deterministic)
        if processors:
            self._native.pin(list(processors[1:]))
        self._spoil = _native.spoil
        self._arena = Arena()
        self._noted: list[tuple[Array, Array, str]] | None = None
        self.name = f"cpu-{self._native.isa}"
        self.threads, self.processors = threads, processors
        self.deterministic = deterministic

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return _aligned(np.empty, shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        kind, count = numpy_dtype(dtype), math.prod(shape)
        if count * kind.itemsize <= _SMALL:
            return _aligned(np.zeros, shape, dtype)
        return np.frombuffer(platform.large_pages(count * kind.itemsize, _SMALL), kind).reshape(shape)

    def from_host(self, array: NDArray[Any]) -> Array:
        self._spoil()
        return np.ascontiguousarray(array)

    def to_host(self, array: Array) -> NDArray[Any]:
        self._spoil()
        host: NDArray[Any] = array
        return host

    def pack(self, matrix: Array, format: str) -> Array:
        elements = BLOCKS[format] if format in BLOCKS else BlockLayout(1, matrix.itemsize)
        columns = matrix.shape[1] * matrix.itemsize // elements.nbytes * elements.elements
        tiles = self.room(format, (matrix.shape[0], columns))
        if tiles is None:
            return matrix
        stored = np.ascontiguousarray(matrix)
        if self._noted is None:
            self._native.pack(tiles, stored, format)
        else:
            self._noted.append((tiles, stored, format))
        return tiles

    @contextmanager
    def packing(self) -> Iterator[None]:
        # Each call of the compiled module may wait milliseconds for Python's lock, where another thread runs.
        self._noted = []
        try:
            yield
            self._pack_noted()
        finally:
            self._noted = None

    def _pack_noted(self) -> None:
        if self._noted:
            self._native.pack_all(self._noted)
            self._noted = []

    def room(self, format: str, shape: tuple[int, int]) -> Array | None:
        from tramontane import _native

        tiles = tuple(_native.tiles_shape(format, *shape)) if math.prod(shape) else ()
        if format in _GROWING and platform.available_memory() < platform.total_memory() // 4:
            return None
        return self._arena.empty(tiles, _TILES.get(format, _BYTES)) if tiles else None

    def unpack(self, packed: Array, format: str, shape: tuple[int, int]) -> NDArray[Any]:
        if packed.ndim != 3:
            return self.to_host(packed)
        self._pack_noted()
        columns = shape[1]
        if format in BLOCKS:
            columns = columns // BLOCKS[format].elements * BLOCKS[format].nbytes
        stored = np.empty((shape[0], columns), packed.dtype)
        self._native.unpack(stored, packed, format)
        return stored

    def pack_codes(self, coded: Coded, rows: int) -> Coded:
        codes, bits = coded.codes, coded.bits
        if codes.ndim == 2:
            exact = codes.shape[1] == coded.columns * bits // 8
            panels = self.room_codes(coded, rows) if exact else None
            if panels is None:
                return coded
            self._native.pack_codes(panels, np.ascontiguousarray(codes), bits)
            coded = dataclasses.replace(coded, codes=panels)
        if coded.row_block != 1 or coded.scales.shape[0] != rows:
            return coded
        grids = {name: getattr(coded, name) for name in GRIDS}
        turned: dict[str, Any] = {name: turn(grid) for name, grid in grids.items() if grid is not None}
        return dataclasses.replace(coded, **turned)

    def room_codes(self, coded: Coded, rows: int) -> Array | None:
        bits = coded.bits
        # Tables of other numbers become floats, as do groups that are no vectors: from their rows.
        integers = bits == 4 or (bits == 8 and np.array_equal(np.rint(coded.table), coded.table))
        vectors = coded.group % 16 == 0 or coded.scales.shape[1] == 1
        if not integers or not vectors or coded.columns % 32:
            return None
        return self._arena.empty((-(-rows // 16), coded.columns // 32, bits * 64), _BYTES)

    def unpack_codes(self, coded: Coded, rows: int) -> NDArray[Any]:
        if coded.codes.ndim != 3:
            return self.to_host(coded.codes)
        codes = np.empty((rows, coded.columns * coded.bits // 8), np.uint8)
        self._native.unpack_codes(codes, coded.codes, coded.bits)
        return codes

    def view(self, array: Array, shape: tuple[int, ...]) -> Array:
        return array.reshape(-1)[: math.prod(shape)].reshape(shape)

    def synchronize(self) -> None:
        """Nothing to wait for: an op returns when it has computed."""

    def record(self, compute: Callable[[], None]) -> Callable[[], None] | None:
        from tramontane import _native

        plan = _native.Plan()
        plan.begin()
        try:
            compute()
        finally:
            whole = plan.end()
        return plan.run if whole else None

    def _sequences(
        self, state: Array, places: Array, query_start: Array, context_lens: Array
    ) -> Iterator[tuple[int, int, Array]]:
        self._spoil()  # what numpy computes is in no plan
        return super()._sequences(state, places, query_start, context_lens)

    def free_memory(self) -> int | None:
        return None

    def matmul(self, out: Array, x: Array, weight: Array, bias: Array | None = None) -> None:
        self._native.matmul(out, x, weight, bias)

    def matmul_blocks(self, out: Array, x: Array, blocks: Array, format: str, bias: Array | None = None) -> None:
        self._native.matmul_blocks(out, x, blocks, format, bias)

    def matmul_together(
        self,
        outs: Sequence[Array],
        x: Array,
        weights: Sequence[Array],
        format: str | None,
        biases: Sequence[Array | None],
    ) -> None:
        self._native.matmul_together(tuple(outs), x, tuple(weights), format or "", tuple(biases))

    def rows(self, out: Array, ids: Array, weight: Array) -> None:
        self._native.rows(out, ids, weight)

    def rows_blocks(self, out: Array, ids: Array, blocks: Array, format: str) -> None:
        self._native.rows_blocks(out, ids, blocks, format)

    def matmul_coded(self, out: Array, x: Array, coded: Coded, bias: Array | None = None) -> None:
        _check_columns("matmul_coded", coded, x)
        self._native.matmul_coded(out, x, bias, *_arrays(coded))

    def rows_coded(self, out: Array, ids: Array, coded: Coded) -> None:
        _check_columns("rows_coded", coded, out)
        self._native.rows_coded(out, ids, *_arrays(coded))

    def matmul_experts(
        self,
        out: Array,
        x: Array,
        offsets: Array | None,
        weights: Sequence[Array],
        format: str | None,
        bias: Array | None = None,
    ) -> None:
        self._native.matmul_experts(out, x, offsets, tuple(weights), format or "", bias)

    def rms_norm(self, out: Array, x: Array, weight: Array | None, eps: float) -> None:
        self._native.rms_norm(out, x, weight, eps)

    def layer_norm(self, out: Array, x: Array, weight: Array | None, bias: Array | None, eps: float) -> None:
        self._native.layer_norm(out, x, weight, bias, eps)

    def add(self, out: Array, x: Array, factor: float = 1.0) -> None:
        self._native.add(out, x, factor)

    def add_gated(self, out: Array, x: Array, gate: Array) -> None:
        self._native.add_gated(out, x, gate)

    def multiply(self, out: Array, x: Array) -> None:
        self._native.multiply(out, x)

    def scale(self, x: Array, factor: float) -> None:
        self._native.scale(x, factor)

    def clip(self, x: Array, limit: float) -> None:
        self._native.clip(x, limit)

    def softcap(self, x: Array, cap: float) -> None:
        self._native.softcap(x, cap)

    def shift(self, x: Array, by: Array) -> None:
        self._native.shift(x, by)

    def place(self, out: Array, x: Array, to: int, start: int, width: int) -> None:
        self._native.place(out, x, to, start, width)

    def swap(self, out: Array, x: Array, to: int, start: int, width: int) -> None:
        self._native.swap(out, x, to, start, width)

    def copy(self, out: Array, x: Array) -> None:
        self._native.copy(out, x)

    def part(self, array: Array, start: int, stop: int) -> Array:
        return array[start:stop]

    def rope_angles(self, cos: Array, sin: Array, positions: Array, inv_freq: Array, scale: float) -> None:
        self._native.rope_angles(cos, sin, positions, inv_freq, scale)

    def rope(self, x: Array, cos: Array, sin: Array, interleaved: bool, offset: int = 0) -> None:
        self._native.rope(x, cos, sin, interleaved, offset)

    def write_cache(self, k_cache: Array, v_cache: Array, k: Array, v: Array, slots: Array) -> None:
        self._native.write_cache(k_cache, v_cache, k, v, slots)

    def read_cache(self, k: Array, v: Array, k_cache: Array, v_cache: Array, table: Array, first: int) -> None:
        self._native.read_cache(k, v, k_cache, v_cache, table, first)

    def copy_blocks(self, cache: Array, source: Array, target: Array) -> None:
        self._native.copy_blocks(cache, source, target)

    def attention(
        self,
        out: Array,
        q: Array,
        k_cache: Array,
        v_cache: Array,
        block_tables: Array,
        query_start: Array,
        context_lens: Array,
        scale: float,
        window: int = 0,
        causal: bool = True,
        softcap: float = 0.0,
        sinks: Array | None = None,
        slopes: Array | None = None,
        latent: bool = False,
        totals: Array | None = None,
        joins: bool = False,
    ) -> None:
        arrays = (out, q, k_cache, v_cache, block_tables, query_start, context_lens)
        self._native.attention(*arrays, scale, window, causal, softcap, sinks, slopes, latent, totals, joins)

    def activation(self, out: Array, x: Array, kind: str) -> None:
        self._native.activation(out, x, kind)

    def gated_activation(self, out: Array, gate: Array, up: Array, kind: str, limit: float = 0.0) -> None:
        self._native.gated_activation(out, gate, up, kind, limit)

    def route(
        self,
        weights: Array,
        experts: Array,
        logits: Array,
        correction: Array | None,
        score: str,
        normalize: bool,
        scale: float,
        groups: int = 1,
        top_groups: int = 1,
        group_score: str = "max",
        jitter: float = 0.0,
    ) -> None:
        arrays = (weights, experts, logits, correction)
        self._native.route(*arrays, score, normalize, scale, groups, top_groups, group_score, jitter)

    def group_rows(self, rows: Array, slots: Array, offsets: Array, experts: Array) -> None:
        self._native.group_rows(rows, slots, offsets, experts)

    def combine(self, out: Array, x: Array, slots: Array, weights: Array) -> None:
        self._native.combine(out, x, slots, weights)

    def take_rows(self, out: Array, x: Array, rows: Array) -> None:
        self._native.take_rows(out, x, rows)

    def apply_edits(self, logits: Array, rows: Array, ids: Array, penalties: Array, biases: Array) -> None:
        self._native.apply_edits(logits, rows, ids, penalties, biases)

    def mask(self, logits: Array, rows: Array, masks: Array) -> None:
        self._native.mask(logits, rows, masks)

    def log_softmax(self, out: Array, logits: Array) -> None:
        self._native.log_softmax(out, logits)

    def sample(
        self,
        tokens: Array,
        logits: Array,
        temperature: Array,
        top_k: Array,
        top_p: Array,
        min_p: Array,
        uniform: Array,
        typical_p: Array | None = None,
        xtc_threshold: Array | None = None,
    ) -> None:
        self._native.sample(tokens, logits, temperature, top_k, top_p, min_p, uniform, typical_p, xtc_threshold)


@cache
def _set_tables() -> None:
    """Give the compiled module, which keeps no copy in its source, what the codes of lookup formats stand for."""
    from tramontane import _native

    for name in LEVELS:
        _native.set_table(name, table(name))


def _check_columns(op: str, coded: Coded, rows: Array) -> None:
    """The compiled module takes the columns from the rows that it is given, for codes that may have bytes to spare."""
    if rows.ndim != 2 or rows.shape[1] != coded.columns:
        raise ValueError(f"{op}: rows of {list(rows.shape)[1:]} elements for a matrix of {coded.columns} columns")


def _arrays(coded: Coded) -> tuple[Any, ...]:
    arrays = (coded.codes, coded.table, coded.scales, coded.scale_table, coded.zeros, coded.offsets, coded.order)
    return (*arrays, coded.bits, coded.group, coded.row_block, coded.factor)


def _aligned(make: Any, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """An array of `make` (numpy.empty or zeros) that starts on a cache line, or on a page where it is large."""
    kind = numpy_dtype(dtype)
    nbytes = math.prod(shape) * kind.itemsize
    alignment = _PAGE if nbytes >= 16 * _PAGE else _CACHE_LINE
    memory: NDArray[np.uint8] = make(nbytes + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + nbytes].view(kind).reshape(shape)
