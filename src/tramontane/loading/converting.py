"""Tensors of a checkpoint in another dtype or scale. Must not know: what they are for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tramontane.errors import UnsupportedModel
from tramontane.loading.checkpoint import Checkpoint

NUMPY: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Dense formats."""
_SLICE = 4 << 20
"""Bytes of a tensor converted at a time: what loading takes beyond what it keeps."""


def converted(checkpoint: Checkpoint, tensor: str, array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The array in another dtype, slice by slice, so that source and result are never both in memory."""
    if array.dtype == dtype:
        return array
    result = np.empty(array.shape, dtype)
    rows = max(1, _SLICE // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        part = array[start : start + rows]
        with np.errstate(over="ignore"):
            result[start : start + rows] = part
        finite = np.isfinite(result[start : start + rows])
        if not finite.all() and np.isfinite(part[~finite]).any():
            raise UnsupportedModel(
                f"Tensor {tensor} of {checkpoint.path} has values beyond the range of {dtype.name}.",
                "Load it with dtype='bfloat16' or dtype='auto'.",
            )
        checkpoint.release(tensor)
    return result


def unit_rows(matrix: NDArray[Any]) -> NDArray[Any]:
    """A copy of a dense matrix whose rows have length one, made slice by slice."""
    result, step = np.empty_like(matrix), max(1, _SLICE // max(1, matrix[:1].nbytes))
    for start in range(0, len(matrix), step):
        rows = matrix[start : start + step].astype(np.float32)
        result[start : start + step] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return result
