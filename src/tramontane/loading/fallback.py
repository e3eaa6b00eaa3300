"""From a checkpoint that no ModelSpec describes to a model that runs through transformers' own layers.

Owns which checkpoints may go that way, and how their tensors get there. Must not know: how such a model runs.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from tramontane import platform
from tramontane.errors import MissingExtra, UnsupportedModel
from tramontane.kernels import Ops
from tramontane.loading import memory
from tramontane.loading.checkpoint import Checkpoint, SafetensorsCheckpoint
from tramontane.loading.converting import NUMPY, converted
from tramontane.loading.tensors import TensorEntry
from tramontane.records import dataclass
from tramontane.weights import FORMATS, Weight, make_weight, select_rows

if TYPE_CHECKING:
    from tramontane.models.fallback import FallbackModel

log = logging.getLogger("tramontane")

_GENERATIVE = ("ForCausalLM", "LMHeadModel", "WithLMHead", "ForConditionalGeneration", "GenerationDecoder")
"""Ends of the names of classes that continue texts."""


def refusal_of(checkpoint: Checkpoint, architecture: str = "auto") -> UnsupportedModel | None:
    """Why this build has no decoder for a checkpoint that may run through transformers; None where it has one.

    Raises UnsupportedModel where transformers is no way either: for other layouts, for what is no language model, and
    where an architecture was named.
    """
    try:
        checkpoint.spec(architecture)
    except UnsupportedModel as refusal:
        if architecture != "auto" or type(checkpoint) is not SafetensorsCheckpoint:
            raise
        checkpoint.check_readable()
        classes = checkpoint.config.get("architectures") or []
        if not isinstance(classes, list) or not all(str(kind).endswith(_GENERATIVE) for kind in classes):
            raise
        return refusal.with_traceback(None)  # which would keep what its callers load alive
    return None


def can_be_tried(checkpoint: Checkpoint) -> bool:
    """Whether transformers is installed and knows the model."""
    if not _installed():
        return False
    from tramontane.models.fallback.build import knows

    return knows(checkpoint.config)


@dataclass(frozen=True)
class Fallback:
    """What was loaded; see `loading.build.LoadedModel`."""

    model: FallbackModel
    formats: dict[str, str]
    nbytes: int
    dtype: str


def load_fallback(checkpoint: Checkpoint, ops: Ops, dtype: str, refusal: UnsupportedModel) -> Fallback:
    """The model on the device of `ops`.

    `refusal`: why the model is none of this build's own. Raises UnsupportedModel that says so, and why transformers
    does not help or what to install; OutOfMemory or CorruptCheckpoint.
    """
    if not _installed():
        install = MissingExtra("transformers", "transformers").remedy
        raise UnsupportedModel(refusal.message, f"{refusal.remedy} Or run it through transformers: {install}")
    from tramontane.models.fallback import FallbackModel

    formats = _formats(checkpoint, dtype)
    entries = checkpoint.tensors
    needed = sum(_nbytes(entry, formats.get(name, "F32")) for name, entry in entries.items())
    if ops.device == "cpu":
        memory.check_weights_fit(needed, platform.available_memory())
    tensors: dict[str, NDArray[Any]] = {}
    weights: dict[str, list[Weight]] = {}
    for name, entry in entries.items():
        if entry.format in FORMATS and entry.format not in NUMPY:
            weights[name] = _weights(checkpoint, ops, name, entry)
        else:
            array = checkpoint.array(name)
            tensors[name] = converted(checkpoint, name, array, NUMPY[formats[name]]) if name in formats else array
    try:
        model = FallbackModel(checkpoint.config, tensors, weights, ops, str(checkpoint.path))
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{refusal.message} {error.message}", error.remedy or refusal.remedy) from error
    log.warning("%s Running it through transformers' own layers, %s: slower.", refusal.message, model.way.name)
    return Fallback(model, formats, needed, _dense_dtype(checkpoint, formats))


def _dense_dtype(checkpoint: Checkpoint, formats: Mapping[str, str]) -> str:
    sizes: Counter[str] = Counter()
    for name, format in formats.items():
        if format in memory.DENSE:
            sizes[memory.DENSE[format]] += _nbytes(checkpoint.tensors[name], format)
    return sizes.most_common(1)[0][0] if sizes else "float32"


def _installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def _formats(checkpoint: Checkpoint, dtype: str) -> dict[str, str]:
    """The format that each matrix, and each stack of matrices, is kept in."""
    wanted = {name: format for format, name in memory.DENSE.items()}.get(dtype)
    stored = {name: entry.format for name, entry in checkpoint.tensors.items() if len(entry.shape) > 1}
    return {
        name: wanted if wanted and format in NUMPY else format for name, format in stored.items() if format in FORMATS
    }


def _nbytes(entry: TensorEntry, format: str) -> int:
    return entry.nbytes if entry.format == format else math.prod(entry.shape) * memory.ITEMSIZE[memory.DENSE[format]]


def _weights(checkpoint: Checkpoint, ops: Ops, name: str, entry: TensorEntry) -> list[Weight]:
    """A quantized matrix, or those of a stack."""
    *stack, rows, columns = entry.shape
    count, parts = math.prod(stack), checkpoint.parts(name)
    if stack:
        parts = {part: array.reshape(-1, array.shape[-1]) for part, array in parts.items()}
    each = (
        [select_rows(parts, slice(e * rows, (e + 1) * rows), count * rows) for e in range(count)] if stack else [parts]
    )
    return [make_weight(ops, entry.format, (rows, columns), one) for one in each]
