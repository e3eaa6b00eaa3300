"""From a checkpoint to a decoder on a device: `load_model`.

Owns which tensors are converted and how, and the memory that loading takes. Must not know: file formats, families,
requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tramontane import platform
from tramontane.errors import InvalidRequest, UnsupportedModel
from tramontane.kernels import Ops
from tramontane.loading import memory
from tramontane.loading.checkpoint import Checkpoint, open_checkpoint
from tramontane.models.decoder import Decoder, Parameter, check_parameters
from tramontane.models.spec import ModelSpec
from tramontane.weights import FORMATS, make_weight

_NUMPY: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_VECTORS = (*memory.DENSE, "F64", "I8", "I16", "I32")
"""Numbers that vectors, which become float32, may be stored as."""
_SLICE = 4 << 20
"""Bytes of a tensor converted at a time: what loading takes beyond what it keeps."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to compute. `checkpoint` stays open: its tokenizer, template and metadata are read from it."""

    spec: ModelSpec
    decoder: Decoder
    ops: Ops
    checkpoint: Checkpoint
    weight_bytes: int
    """Of all parameters, mapped or allocated."""
    dtype: str
    """Of most dense matrices by bytes; "float32" where all are quantized."""
    formats: Mapping[str, str]
    """Format of each matrix by canonical name."""

    def cache_dtype(self, choice: str = "auto") -> str:
        """The dtype of the cache that a configured one means for this model."""
        return memory.resolve_cache_dtype(choice, self.formats.values())


def load_model(path: str | Path, ops: Ops, *, dtype: str = "auto", architecture: str = "auto") -> LoadedModel:
    """Load a checkpoint onto the device of `ops`.

    Matrices are used where they are mapped if the device can; `dtype` (float32, float16, bfloat16) converts dense
    ones, quantized ones stay as they are; vectors become float32. Peak memory is what stays, and a few megabytes.
    Raises ModelNotFound, CorruptCheckpoint, UnsupportedModel, OutOfMemory or InvalidRequest.
    """
    if dtype != "auto" and dtype not in memory.ITEMSIZE:
        raise InvalidRequest("dtype", f"{dtype!r} is not a dtype", f"Use auto, {', '.join(memory.ITEMSIZE)}.")
    checkpoint = open_checkpoint(path)
    spec = checked_spec(checkpoint, architecture)
    tensors = checkpoint.parameters
    formats = memory.stored_formats(checkpoint, dtype)
    needed = memory.weight_bytes(checkpoint, formats)
    if ops.device == "cpu":
        memory.check_weights_fit(needed, platform.available_memory())
    parameters = {name: _parameter(ops, checkpoint, tensor, formats.get(name)) for name, tensor in tensors.items()}
    decoder = Decoder(spec, parameters, ops)
    return LoadedModel(spec, decoder, ops, checkpoint, needed, _dense_dtype(checkpoint, formats), formats)


def checked_spec(checkpoint: Checkpoint, architecture: str = "auto") -> ModelSpec:
    """The checkpoint's spec, after everything was checked that can be without reading weights.

    Raises CorruptCheckpoint or UnsupportedModel: what `load_model` would.
    """
    spec = checkpoint.spec(architecture)
    shapes = {name: checkpoint.tensors[tensor].shape for name, tensor in checkpoint.parameters.items()}
    check_parameters(spec, shapes)
    _check_formats(checkpoint)
    return spec


def _parameter(ops: Ops, checkpoint: Checkpoint, tensor: str, format: str | None) -> Parameter:
    """One parameter on the device; `format` is what a matrix is to be kept as, None for a vector."""
    parts = checkpoint.parts(tensor)
    if format in _NUMPY or format is None:
        parts = {"weight": _converted(checkpoint, tensor, parts["weight"], _NUMPY[format or "F32"])}
    if format is None:
        parameter: Parameter = ops.from_host(parts["weight"])
    else:
        rows, columns = checkpoint.tensors[tensor].shape
        parameter = make_weight(ops, format, (rows, columns), parts)
    # What was read to copy it to the device is not needed here any more; where it was not read this changes nothing.
    checkpoint.release(tensor)
    return parameter


def _converted(checkpoint: Checkpoint, tensor: str, array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
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


def _check_formats(checkpoint: Checkpoint) -> None:
    """Refuse parameters in a format that this build does not compute with, naming the first."""
    for tensor in checkpoint.parameters.values():
        entry = checkpoint.tensors[tensor]
        known = FORMATS if len(entry.shape) == 2 else _VECTORS
        if entry.format not in known:
            raise UnsupportedModel(
                f"Tensor {tensor} of {checkpoint.path} is stored as {entry.format}, which this build does not load.",
                f"It loads {', '.join(known)}: use the model in one of them.",
            )


def _dense_dtype(checkpoint: Checkpoint, formats: Mapping[str, str]) -> str:
    sizes: Counter[str] = Counter()
    for name, format in formats.items():
        if format in memory.DENSE:
            entry = checkpoint.tensors[checkpoint.parameters[name]]
            sizes[memory.DENSE[format]] += memory.parameter_bytes(entry, format)
    return sizes.most_common(1)[0][0] if sizes else "float32"
