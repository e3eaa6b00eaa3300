"""From a checkpoint to a decoder on a device: `load_model`.

Owns which tensors are converted and how, and the memory that loading takes. Must not know: file formats, families,
requests.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tramontane import platform
from tramontane.errors import InvalidRequest, UnsupportedModel
from tramontane.kernels import Array, Ops
from tramontane.loading import memory
from tramontane.loading.binding import Binding, Piece
from tramontane.loading.checkpoint import Checkpoint, open_checkpoint
from tramontane.loading.converting import NUMPY, converted, unit_rows
from tramontane.loading.fallback import load_fallback, refusal_of
from tramontane.loading.memory import Plan
from tramontane.loading.packed import KeptWeights
from tramontane.models.decoder import Decoder
from tramontane.models.parameters import Parameter, check_parameters
from tramontane.models.spec import ModelSpec
from tramontane.records import dataclass
from tramontane.weights import FORMATS, Experts, Weight, make_weight, select_rows
from tramontane.weights.packed import Packed, packed_arrays, packed_rooms, packed_sample, packed_weight

if TYPE_CHECKING:
    from tramontane.loading.pypi import Progress
    from tramontane.models.fallback import FallbackModel

_VECTORS = (*memory.DENSE, "F64", "I8", "I16", "I32")
"""Numbers that vectors, which become float32, may be stored as."""
_MANY = ("experts", "heads")
"""Kinds of parameters that are several matrices."""

_LONG = 1.0
"""Seconds of a load that go by without a word of progress."""

_TOGETHER = 8 << 20
"""Bytes in files of the parameters that are packed together."""

_NOT_KEPT = "Leave keep_packed out, or load the model with the CPU's kernels."


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to compute. `checkpoint` stays open: its tokenizer, template and metadata are read from it."""

    spec: ModelSpec
    decoder: Decoder | FallbackModel
    ops: Ops
    checkpoint: Checkpoint
    weight_bytes: int
    """Of all parameters, mapped or allocated."""
    dtype: str
    """Of most dense matrices by bytes; "float32" where all are quantized."""
    formats: Mapping[str, str]
    """Format of each matrix by canonical name."""
    bindings: Mapping[str, Binding]
    """Where each parameter comes from."""

    def cache_dtype(self, choice: str = "auto") -> str:
        """The dtype of the cache that a configured one means for this model."""
        return memory.resolve_cache_dtype(choice, self.formats.values())


def load_model(
    source: str | Path | Checkpoint,
    ops: Ops,
    *,
    dtype: str = "auto",
    architecture: str = "auto",
    keep_packed: bool | str = False,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a checkpoint, or the one at a path, onto the device of `ops`.

    Matrices are used where they are mapped if the device can; `dtype` (float32, float16, bfloat16) converts dense
    ones, quantized ones stay as they are; vectors become float32. Peak memory is what stays, and some 8 megabytes.
    A language model that no family of this build's describes runs through transformers' layers, where installed.
    `keep_packed`: as of `EngineConfig`. `progress` hears of loads that take longer than a second.
    Raises ModelNotFound, CorruptCheckpoint, UnsupportedModel, OutOfMemory or InvalidRequest.
    """
    if dtype != "auto" and dtype not in memory.ITEMSIZE:
        raise InvalidRequest("dtype", f"{dtype!r} is not a dtype", f"Use auto, {', '.join(memory.ITEMSIZE)}.")
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    refusal = refusal_of(checkpoint, architecture)
    if refusal is not None:
        if keep_packed:
            raise InvalidRequest("keep_packed", "this model runs through transformers' layers", _NOT_KEPT)
        found = load_fallback(checkpoint, ops, dtype, refusal)
        spec, formats = found.model.spec, found.formats
        return LoadedModel(spec, found.model, ops, checkpoint, found.nbytes, found.dtype, formats, {})
    plan = checked_plan(checkpoint, architecture)
    formats = plan.formats(dtype)
    needed, turned = plan.weight_bytes(formats), 0 if ops.deterministic else plan.turned_bytes(formats)
    if ops.device == "cpu":
        memory.check_weights_fit(needed + turned, platform.available_memory())
    kept = _kept(ops, checkpoint, plan, formats, keep_packed, (dtype, architecture)) if keep_packed else None
    packed = _by_matrix(kept.read(partial(_rooms, ops, plan, formats))) if kept else {}
    hear = _heard(progress, needed, f"loading {checkpoint.path.name}")
    parameters: dict[str, Parameter] = {}
    for portion in _portions(checkpoint, plan.bindings):
        with ops.packing():
            for name, binding in portion.items():
                keys = _keys(name, binding)
                ready = [packed[key] for key in keys] if all(key in packed for key in keys) else []
                parameters[name] = load_parameter(ops, checkpoint, binding, formats.get(name), ready)
        for name, binding in portion.items():
            _release(checkpoint, binding)
            hear(parameters[name].nbytes)
    if kept and not packed:
        kept.write(_packed(parameters))
    decoder = Decoder(plan.spec, parameters, ops)
    dense, nbytes = plan.dense_dtype(formats), needed + turned
    return LoadedModel(plan.spec, decoder, ops, checkpoint, nbytes, dense, formats, plan.bindings)


def checked_plan(checkpoint: Checkpoint, architecture: str = "auto") -> Plan:
    """What the checkpoint will become, after everything was checked that can be without reading weights.

    (A head that is stored beside the embedding it is tied to is read, slice by slice, to be compared with it.)

    Raises CorruptCheckpoint or UnsupportedModel: what `load_model` would.
    """
    spec = checkpoint.spec(architecture)
    plan = Plan(spec, checkpoint.bindings(spec, architecture), checkpoint.tensors)
    check_parameters(spec, {name: binding.shape for name, binding in plan.bindings.items()})
    _check_formats(checkpoint, plan)
    return plan


def _heard(progress: Progress | None, total: int, label: str) -> Callable[[int], None]:
    """What takes the bytes of each parameter, and tells `progress` of all so far once loading takes long."""
    begun, done = time.monotonic(), 0

    def hear(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None and time.monotonic() - begun > _LONG:
            progress(done, total, label)

    return hear


def load_parameter(
    ops: Ops, checkpoint: Checkpoint, binding: Binding, format: str | None, packed: Sequence[Packed] = ()
) -> Parameter:
    """One parameter on the device; `format` is what a matrix is to be kept as, None for a vector. `packed`: what the
    ops made of each of its matrices before, where it is at hand."""
    if format is None:
        vectors = [_vector(checkpoint, piece) for piece in binding.pieces]
        # Copied: one page of the file that is read in every step has its neighbours in memory, too.
        values = np.concatenate([vector.reshape(-1) for vector in vectors])
        if binding.shifted:
            values = values + np.float32(1)
        parameter: Parameter = ops.from_host(values.reshape(binding.shape))
    elif packed:
        rows, columns = binding.shape[-2:]
        weights = [packed_weight(ops, format, (rows, columns), one) for one in packed]
        parameter = Experts(ops, weights) if binding.kind in _MANY else weights[0]
    elif binding.kind == "experts":
        count, rows, columns = binding.shape
        stacked = count if len(binding.pieces) < count else 1
        each = (one for piece in binding.pieces for one in _matrices(checkpoint, piece, format, stacked))
        parameter = Experts(ops, [make_weight(ops, format, (rows, columns), one) for one in each])
    elif binding.kind == "heads":
        _, rows, columns = binding.shape
        heads = _heads(ops, checkpoint, binding, format)
        parameter = Experts(ops, [make_weight(ops, format, (rows, columns), one) for one in heads])
    else:
        rows, columns = binding.shape
        one = next(_matrices(checkpoint, binding.pieces[0], format))
        if binding.unit_rows:
            one = {"weight": unit_rows(one["weight"])}
        parameter = make_weight(ops, format, (rows, columns), one)
    return parameter


def _portions(checkpoint: Checkpoint, bindings: Mapping[str, Binding]) -> Iterator[Mapping[str, Binding]]:
    """The parameters in their order, so many at a time as are packed together."""
    portion: dict[str, Binding] = {}
    nbytes = 0
    for name, binding in bindings.items():
        portion[name] = binding
        nbytes += sum(checkpoint.tensors[piece.tensor].nbytes for piece in binding.pieces)
        if nbytes >= _TOGETHER:
            yield portion
            portion, nbytes = {}, 0
    yield portion


def _release(checkpoint: Checkpoint, binding: Binding) -> None:
    """What was read to be copied to the device is not needed here any more; what was not read is not changed."""
    for piece in binding.pieces:
        checkpoint.release(piece.tensor)


def _vector(checkpoint: Checkpoint, piece: Piece) -> NDArray[Any]:
    array = converted(checkpoint, piece.tensor, checkpoint.parts(piece.tensor)["weight"], NUMPY["F32"])
    return array if piece.rows is None else array[..., piece.rows]


def _heads(ops: Ops, checkpoint: Checkpoint, binding: Binding, format: str) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The tensors of each head's weight. What is stored turned, and not dense, is dequantized to be turned back."""
    count, rows, columns = binding.shape
    piece, entry = binding.pieces[0], checkpoint.tensors[binding.tensor]
    if not piece.turned:
        stacked = math.prod(entry.shape[:-2])
        matrices = list(_matrices(checkpoint, piece, format, stacked))
        for head in range(count):
            own = slice(head * rows, (head + 1) * rows)
            yield matrices[head] if stacked > 1 else select_rows(matrices[0], own, count * rows)
        return
    stored = format if entry.format in memory.DENSE else entry.format
    tensors = next(_matrices(checkpoint, piece, stored))
    if stored != format:
        tensors = {"weight": make_weight(ops, stored, (count * columns, rows), tensors).dequantize()}
    for matrix in tensors["weight"].reshape(count, columns, rows):
        yield {"weight": np.ascontiguousarray(matrix.T)}


def _matrices(
    checkpoint: Checkpoint, piece: Piece, format: str, count: int = 1
) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The tensors of the weight of each of the `count` matrices that a piece's tensor holds, its rows alone."""
    parts, total = checkpoint.parts(piece.tensor), math.prod(checkpoint.tensors[piece.tensor].shape[:-1])
    if "blocks" in parts:
        parts = {"blocks": parts["blocks"].reshape(-1, parts["blocks"].shape[-1])}
    if "weight" in parts:
        for array in parts["weight"].reshape(count, *parts["weight"].shape[-2:]):
            array = array.T if piece.transposed else array
            array = array if piece.rows is None else array[piece.rows]
            yield {"weight": np.ascontiguousarray(converted(checkpoint, piece.tensor, array, NUMPY[format]))}
        return
    for start in range(0, total, total // count):
        one = parts if count == 1 else select_rows(parts, slice(start, start + total // count), total)
        yield one if piece.rows is None else select_rows(one, piece.rows, total // count)


# ---- packed matrices, kept for the next start -----------------------------------------------------------------


def _kept(
    ops: Ops,
    checkpoint: Checkpoint,
    plan: Plan,
    formats: Mapping[str, str],
    where: bool | str,
    options: tuple[str, str],
) -> KeptWeights:
    """The kept matrices of a model loaded with `options` (dtype, architecture). Raises InvalidRequest for ops that pack
    none of them."""
    samples = [packed_sample(ops, format) for format in sorted(set(formats.values()))]
    if not any(samples):
        raise InvalidRequest("keep_packed", f"{ops.name} packs no matrix of this model", _NOT_KEPT)
    depends = (options, samples, plan.bindings, sorted(formats.items()))
    return KeptWeights.of(checkpoint.path, where, options[0], depends)


def _keys(name: str, binding: Binding) -> list[str]:
    """What the matrices of a parameter are kept under: each expert's by itself."""
    return [f"{name}/{i}" for i in range(binding.shape[0] if binding.kind in _MANY else 1)]


def _by_matrix(arrays: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Kept arrays by the key of their matrix, and by their own name."""
    found: dict[str, dict[str, Array]] = {}
    for name, array in arrays.items():
        key, _, own = name.rpartition("/")
        found.setdefault(key, {})[own] = array
    return found


def _rooms(ops: Ops, plan: Plan, formats: Mapping[str, str], stored: Mapping[str, NDArray[Any]]) -> dict[str, Array]:
    """Arrays for all matrices that the ops pack, as far as what is `stored` may be of them. Raises ValueError."""
    by_matrix, rooms = _by_matrix(stored), {}
    for name, format in formats.items():
        binding = plan.bindings[name]
        shape = (binding.shape[-2], binding.shape[-1])
        for key in _keys(name, binding):
            found = packed_rooms(ops, format, shape, by_matrix.get(key, {}))
            rooms.update({f"{key}/{own}": room for own, room in found.items()})
    return rooms


def _packed(parameters: Mapping[str, Parameter]) -> dict[str, Array]:
    """The matrices that the ops packed."""
    packed = {}
    for name, parameter in parameters.items():
        weights = parameter.weights if isinstance(parameter, Experts) else [parameter]
        for i, weight in enumerate(weights):
            if isinstance(weight, Weight):
                packed.update({f"{name}/{i}/{own}": array for own, array in packed_arrays(weight).items()})
    return packed


def _check_formats(checkpoint: Checkpoint, plan: Plan) -> None:
    """Refuse parameters in a format that this build does not compute with, naming the first."""
    for binding in plan.bindings.values():
        formats = {checkpoint.tensors[piece.tensor].format for piece in binding.pieces}
        known = _VECTORS if binding.kind == "vector" else FORMATS
        for format in formats:
            if format not in known:
                raise UnsupportedModel(
                    f"Tensor {binding.tensor} of {checkpoint.path} is stored as {format}, which this build does not "
                    "load.",
                    f"It loads {', '.join(known)}: use the model in one of them.",
                )
            if format not in memory.DENSE and binding.unit_rows:
                raise UnsupportedModel(
                    f"Tensor {binding.tensor} of {checkpoint.path} is quantized ({format}), and its rows must be "
                    "brought to length one.",
                    "Use the model with an unquantized head.",
                )
            if format not in memory.DENSE and any(piece.transposed for piece in binding.pieces):
                raise UnsupportedModel(
                    f"Tensor {binding.tensor} of {checkpoint.path} is quantized along its outputs ({format}).",
                    "Use a GGUF file of the model, or its unquantized version.",
                )
        if len(formats) > 1 and binding.kind == "experts":
            raise UnsupportedModel(
                f"The experts of {binding.tensor} of {checkpoint.path} are stored in {', '.join(sorted(formats))}.",
                "Use the model with its experts in one format.",
            )
