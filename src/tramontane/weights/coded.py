"""Coded weights: codes, a value table and scales, for every quantization that is groups of codes.

Owns the tensors that a coded matrix is stored as, and the check of what they must be. Must not know: layers, models,
files, which method wrote the codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tramontane.kernels import Array, Ops
from tramontane.kernels.coded import GRIDS, Coded, check_coded, decode_host, turn_back
from tramontane.weights.base import Weight

BITS: Mapping[str, int] = {
    **{f"INT{bits}": bits for bits in range(1, 9)},
    "FP8": 8,
    "NF4": 4,
    "FP4": 4,
}
"""Coded formats and the width of their codes. FP8 is e4m3 or e5m2, FP4 is e2m1 or bitsandbytes' own: the table says."""

_ARRAYS = ("codes", "table", "scales", "scale_table", "zeros", "offsets", "order")
_NEEDED = {"codes", "table", "scales", "layout"}


class CodedWeight(Weight):
    """A matrix [N, K] of codes: the arrays of `kernels.coded.Coded` under their names, `layout` int32 [group,
    row_block], and where it is not one `factor` float32 [1]."""

    def __init__(self, ops: Ops, format: str, shape: tuple[int, int], coded: Coded, nbytes: int) -> None:
        self.ops = ops
        self.format = format
        self.shape = shape
        self._coded = coded
        self._nbytes = nbytes

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def matmul(self, out: Array, x: Array, bias: Array | None = None) -> None:
        self.ops.matmul_coded(out, x, self._coded, bias)

    def rows(self, out: Array, ids: Array) -> None:
        self.ops.rows_coded(out, ids, self._coded)

    def dequantize(self) -> NDArray[Any]:
        arrays: dict[str, Any] = {"codes": self._codes(), **self._grids()}
        host = dataclasses.replace(self._coded, **arrays)
        values = decode_host(host, range(self.shape[0]))
        if host.order is None:
            return np.ascontiguousarray(values)
        out = np.empty_like(values)
        out[:, host.order] = values
        return out

    def tensors(self) -> Mapping[str, NDArray[Any]]:
        return {"codes": self._codes(), **self._small()}

    def _codes(self) -> NDArray[Any]:
        return self.ops.unpack_codes(self._coded, self.shape[0])

    def _grids(self) -> dict[str, NDArray[Any]]:
        """All arrays but the codes, as they were given."""
        arrays = {name: getattr(self._coded, name) for name in _ARRAYS if name != "codes"}
        host = {name: self.ops.to_host(array) for name, array in arrays.items() if array is not None}
        return {name: turn_back(array, self.shape[0]) if name in GRIDS else array for name, array in host.items()}

    def _small(self) -> dict[str, NDArray[Any]]:
        """All tensors but the codes."""
        tensors = {**self._grids(), "layout": np.array([self._coded.group, self._coded.row_block], np.int32)}
        if self._coded.factor != 1.0:
            tensors["factor"] = np.array([self._coded.factor], np.float32)
        return tensors

    @classmethod
    def from_tensors(
        cls, ops: Ops, format: str, shape: tuple[int, int], tensors: Mapping[str, NDArray[Any]]
    ) -> CodedWeight:
        tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        host = _coded(format, shape, tensors)
        moved = {name: ops.from_host(tensors[name]) for name in _ARRAYS if name in tensors}
        nbytes = sum(array.nbytes for array in tensors.values())
        return cls(ops, format, shape, ops.pack_codes(dataclasses.replace(host, **moved), shape[0]), nbytes)

    @property
    def packed(self) -> Mapping[str, Array]:
        """What `tensors` gives, but the codes as its ops packed them; empty where they left them."""
        if self._coded.codes.ndim != 3:
            return {}
        return {**self._small(), "codes": self._coded.codes}

    @classmethod
    def rooms(
        cls, ops: Ops, format: str, shape: tuple[int, int], stored: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, Array]:
        """Arrays for `packed` that a file has stored: the codes' with any values, the others with their own.

        Raises ValueError where these make no matrix of which the ops pack the codes. At the codes it does not look.
        """
        arrays = {name: np.array(array) for name, array in stored.items() if name != "codes"}
        host = _coded(format, shape, {**arrays, "codes": _no_codes(format, shape)})
        if host.order is not None and not np.array_equal(np.sort(host.order), np.arange(shape[1])):
            raise ValueError(f"{format}: the order of {shape[1]} columns is no permutation")
        codes = ops.room_codes(host, shape[0])
        if codes is None:
            raise ValueError(f"{format}: codes in groups of {host.group} are not packed")
        return {**arrays, "codes": codes}

    @classmethod
    def from_packed(cls, ops: Ops, format: str, shape: tuple[int, int], arrays: Mapping[str, Array]) -> CodedWeight:
        """The weight of such arrays, once they are filled."""
        host = _coded(format, shape, {**arrays, "codes": _no_codes(format, shape)})
        nbytes = host.codes.nbytes + sum(array.nbytes for name, array in arrays.items() if name != "codes")
        coded = ops.pack_codes(dataclasses.replace(host, codes=arrays["codes"]), shape[0])
        return cls(ops, format, shape, coded, nbytes)


def _coded(format: str, shape: tuple[int, int], tensors: Mapping[str, NDArray[Any]]) -> Coded:
    """The matrix that these tensors make up. Raises ValueError where they make none of this format and shape."""
    if format not in BITS:
        raise ValueError(f"{format!r} is not a coded format ({', '.join(BITS)})")
    if not _NEEDED <= set(tensors) <= {*_ARRAYS, "layout", "factor"}:
        raise ValueError(f"a coded weight is {', '.join(sorted(_NEEDED))} and more, not {sorted(tensors)}")
    layout, factor = tensors["layout"], tensors.get("factor", np.ones(1, np.float32))
    if layout.shape != (2,) or layout.dtype != np.int32 or factor.shape != (1,) or factor.dtype != np.float32:
        raise ValueError(f"{format}: layout must be int32 [2] and factor float32 [1]")
    host = Coded(
        **{name: tensors[name] for name in _ARRAYS if name in tensors},
        bits=BITS[format],
        columns=shape[1],
        group=int(layout[0]),
        row_block=int(layout[1]),
        factor=float(factor[0]),
    )
    check_coded(format, host)
    if host.shape[0] != shape[0]:
        raise ValueError(f"{format} weight {list(shape)} has codes of {host.shape[0]} rows")
    return host


def _no_codes(format: str, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """What has the shape of a matrix's codes, and of which nobody touches the memory."""
    return np.empty((shape[0], -(-shape[1] * BITS.get(format, 8) // 8)), np.uint8)


def select_coded_rows(
    tensors: Mapping[str, NDArray[Any]], rows: slice | NDArray[np.int64], total: int
) -> dict[str, NDArray[Any]]:
    """The tensors of some rows of a coded matrix of `total` rows. Scales of several rows are repeated for each."""
    group, row_block = tensors["layout"].tolist()
    chosen = dict(tensors)
    chosen["codes"] = tensors["codes"][rows]
    for name in ("scales", "zeros", "offsets"):
        if name in tensors and len(tensors[name]) > 1:
            grid = tensors[name]
            whole = row_block == 1 and len(grid) == total
            chosen[name] = grid[rows if whole else np.arange(total)[rows] // row_block % len(grid)]
    chosen["layout"] = np.array([group, 1], np.int32)
    return chosen
