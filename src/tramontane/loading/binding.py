"""Bindings: which rows of which tensors of a checkpoint make up each parameter of a decoder.

Owns the way from a NameMap to pieces of tensors. Must not know: files, values, families.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tramontane.errors import UnsupportedModel
from tramontane.loading.tensors import TensorEntry
from tramontane.models.names import NameMap, Target
from tramontane.models.parameters import Wanted, wanted_parameters
from tramontane.models.spec import DeltaSpec, ModelSpec
from tramontane.records import dataclass

Rows = slice | NDArray[np.int64] | None
"""Of the matrix's rows (of each expert's, where a tensor holds all of them); of a vector's last axis. None: all."""


@dataclass(frozen=True)
class Piece:
    """A part of one tensor."""

    tensor: str
    rows: Rows = None
    transposed: bool = False
    """The tensor is stored [..., inputs, outputs]; rows are those of its transpose."""
    turned: bool = False
    """The rows are those of a matrix a head, each stored [inputs, outputs]."""


@dataclass(frozen=True)
class Binding:
    """A parameter's pieces, one after the other."""

    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]
    """What the pieces make; what the spec wants may be another, and is then refused."""
    kind: str
    """As of `Wanted`."""
    nbytes: int
    """Of the pieces as they are stored."""
    shifted: bool = False
    """What is stored is the value less one."""
    unit_rows: bool = False
    """Rows are divided by their lengths."""

    @property
    def tensor(self) -> str:
        """The first tensor, for messages and formats."""
        return self.pieces[0].tensor


_Found = tuple[int, str, Target, int]
"""A tensor that holds rows of a parameter: its number among the parameter's pieces, name and target, and which of the
target's parts the parameter is."""


def bind(names: NameMap, tensors: Mapping[str, TensorEntry], spec: ModelSpec, source: str) -> dict[str, Binding]:
    """Canonical name -> what makes up the parameter. Raises UnsupportedModel for tensors that nobody knows; names that
    the spec does not want are bound too, for `check_parameters` to tell."""
    wanted, names = wanted_parameters(spec), names.of(tensors)
    shifted = re.compile(names.shifted)
    bindings = {}
    for part, pieces in _gathered(names, tensors, len(spec.layers), source).items():
        parameter = wanted.get(part)
        if parameter is None:  # not the model's: told by what there is of it
            entry = tensors[pieces[0][1]]
            bindings[part] = Binding((Piece(pieces[0][1]),), entry.shape, "vector", entry.nbytes)
            continue
        numbered = _numbered(part, pieces, source)
        bound = [
            _piece(tensors[name], name, target, index, wanted, spec, names.skipped.get(part, 0))
            for _, name, target, index in pieces
        ]
        bindings[part] = Binding(
            tuple(piece for piece, _, _ in bound),
            _joined([shape for _, shape, _ in bound], parameter, numbered, bound[0][0].turned),
            parameter.kind,
            sum(nbytes for _, _, nbytes in bound),
            shifted=shifted.fullmatch(part) is not None,
            unit_rows=part in names.unit_rows,
        )
    return bindings


def _gathered(
    names: NameMap, tensors: Mapping[str, TensorEntry], num_layers: int, source: str
) -> dict[str, list[_Found]]:
    """The tensors of each parameter, in the order of their numbers. Raises UnsupportedModel for those nobody knows."""
    found: dict[str, list[_Found]] = {}
    ignored, unknown = re.compile(names.ignored), []
    spare = range(num_layers, num_layers + names.spare_layers)
    for name in tensors:
        if ignored.fullmatch(name) or names.layer_of(name) in spare:
            continue
        target = names.target(name)
        if target is None:
            unknown.append(name)
            continue
        for index, part in enumerate(target.parts):
            found.setdefault(part, []).append((target.number or 0, name, target, index))
    if unknown:
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        raise UnsupportedModel(
            f"{source} has tensors that this build does not know: {', '.join(unknown[:4])}{more}.",
            "Use another model, or this model in its plain form (adapters merged, no extra heads).",
        )
    return {part: sorted(pieces, key=lambda piece: piece[0]) for part, pieces in found.items()}


def _numbered(part: str, pieces: Sequence[_Found], source: str) -> bool:
    """Whether the pieces of a parameter are tensors with numbers. Raises UnsupportedModel where some are missing, or
    where two claim to be the same."""
    numbers = [number for number, _, target, _ in pieces if target.number is not None]
    if len(set(numbers)) == len(pieces) and numbers != list(range(len(pieces))):
        there = ", ".join(map(str, numbers[:8]))
        raise UnsupportedModel(
            f"{source} has {len(pieces)} of the tensors that make up {part}, numbered {there}: some are missing.",
            "Fetch the model again.",
        )
    if len(pieces) > 1 and len(set(numbers)) < len(pieces):
        raise UnsupportedModel(
            f"{source} has several tensors for {part}: {', '.join(name for _, name, _, _ in pieces[:4])}.",
            "Remove all but one of them, or fetch the model again.",
        )
    return bool(numbers)


def _joined(shapes: list[tuple[int, ...]], wanted: Wanted, numbered: bool, turned: bool) -> tuple[int, ...]:
    """The shape that pieces make. Vectors may lie in any shape of the same size, matrices a head above the other."""
    shape = shapes[0]
    if any(other != shape for other in shapes):
        return (len(shapes), 0)  # of no parameter
    if numbered:
        shape = (len(shapes), *shape)
    if wanted.kind == "vector" and math.prod(shape) == math.prod(wanted.shape):
        return wanted.shape
    if wanted.kind == "heads" and len(shape) == 2 and shape[0] % wanted.shape[0] == 0:
        heads, each = wanted.shape[0], shape[0] // wanted.shape[0]
        return (heads, shape[1], each) if turned else (heads, each, shape[1])
    return shape


def _piece(
    entry: TensorEntry,
    name: str,
    target: Target,
    index: int,
    wanted: Mapping[str, Wanted],
    spec: ModelSpec,
    skipped: int,
) -> tuple[Piece, tuple[int, ...], int]:
    """The piece, its shape and its bytes."""
    shape = entry.shape
    if not shape:  # has no rows to be cut: told by its shape
        return Piece(name), shape, entry.nbytes
    if target.transposed and len(shape) >= 2:
        shape = (*shape[:-2], shape[-1], shape[-2])
    axis = -1 if ".bias" in target.parts[index] or len(shape) < 2 else -2
    if skipped and shape[axis] > skipped:
        rest = (shape[axis] - skipped, *shape[1:])
        return Piece(name, slice(skipped, None), target.transposed), rest, entry.nbytes * rest[0] // shape[axis]
    if len(target.parts) == 1:
        return Piece(name, None, target.transposed), shape, entry.nbytes
    sizes = [_outputs(wanted.get(part), turned) for part, turned in zip(target.parts, target.turned, strict=True)]
    if sum(sizes) != shape[axis] or not sizes[index]:
        return Piece(name, None, target.transposed), shape, entry.nbytes  # does not fit: told by its shape
    rows = _rows(target.layout, sizes, index, _groups(target, spec))
    cut = (*shape[:axis], sizes[index], *shape[axis:][1:])
    piece = Piece(name, rows, target.transposed, target.turned[index])
    return piece, cut, entry.nbytes * sizes[index] // shape[axis]


def _outputs(wanted: Wanted | None, turned: bool) -> int:
    """Rows of a tensor that are the parameter's."""
    if wanted is None:
        return 0
    if wanted.kind == "heads":
        return wanted.shape[0] * wanted.shape[2 if turned else 1]
    return wanted.shape[-2] if wanted.kind != "vector" else wanted.shape[-1]


def _groups(target: Target, spec: ModelSpec) -> int:
    """Groups of rows: mostly those of heads that share a key, of the layer that a target lies in."""
    if target.layout != "grouped" or target.groups:
        return target.groups or 1
    layer = spec.layers[int(target.parts[0].split(".")[1])]
    if isinstance(layer.state, DeltaSpec):
        return layer.state.num_key_heads
    return layer.attention.num_kv_heads if layer.attention else 1


def _rows(layout: str, sizes: list[int], index: int, groups: int) -> slice | NDArray[np.int64]:
    """Which of sum(sizes) rows are those of part `index`."""
    if layout == "alternating":
        return slice(index, None, len(sizes))
    start, stop = sum(sizes[:index]), sum(sizes[: index + 1])
    if layout == "stacked":
        return slice(start, stop)
    every = np.arange(sum(sizes)).reshape(groups, -1)
    return every[:, start // groups : stop // groups].reshape(-1)
