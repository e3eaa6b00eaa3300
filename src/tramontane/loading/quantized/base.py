"""What the quantization methods of safetensors checkpoints share: modules, matrices, and the errors of what is off.

Owns `Module` (the tensors of one module, hostile until checked), `Matrix` (what they become) and `Method`. Must not
know: any method, how a checkpoint finds its files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tramontane.errors import CorruptCheckpoint, UnsupportedModel
from tramontane.loading.tensors import TensorEntry
from tramontane.records import dataclass

Array = NDArray[Any]

FLOATS = ("F32", "F16", "BF16")
_SMALL = 1 << 22
"""Bytes of a tensor that may be read before loading: shapes, settings, the order of columns."""
_MAX_SIZE = 1 << 31
REMEDY = "Use a GGUF file of the model, or its unquantized version."


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix [N, K], or [E, N, K] of experts, planned: what it will take, and how to make it."""

    shape: tuple[int, ...]
    format: str
    nbytes: int
    """Of the tensors that `load` makes."""
    load: Callable[[], dict[str, Array]] = field(repr=False)
    """Reads the module's tensors and returns those of its weight, of experts one below the other; see
    `Weight.from_tensors`."""
    sources: tuple[str, ...] = ()
    """The tensors that it is made of; `collect` fills them in."""


class Module:
    """The tensors of one module by their names below it, such as "qweight"."""

    def __init__(
        self, source: str, name: str, tensors: Mapping[str, TensorEntry], read: Callable[[str], Array]
    ) -> None:
        """`source`: the checkpoint, for errors. `read(name below the module)`: the tensor, mapped."""
        self.source = source
        self.name = name
        self.tensors = tensors
        self.read = read

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.tensors

    def corrupt(self, detail: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(self.source, f"module {self.name!r}: {detail}")

    def unsupported(self, detail: str, remedy: str = REMEDY) -> UnsupportedModel:
        return UnsupportedModel(f"Module {self.name!r} of {self.source} {detail}.", remedy)

    def format(self, tensor: str) -> str:
        """The element type of a tensor, "" where there is none."""
        return self.tensors[tensor].format if tensor in self.tensors else ""

    def entry(self, tensor: str) -> TensorEntry:
        """A tensor that must be there."""
        if tensor not in self.tensors:
            raise self.corrupt(f"it has no {tensor}")
        return self.tensors[tensor]

    def need(self, tensor: str, formats: tuple[str, ...], *shapes: tuple[int | None, ...]) -> tuple[int, ...]:
        """The shape of a tensor that must be there, in one of these element types and shapes (None: any size)."""
        entry = self.entry(tensor)
        if entry.format not in formats:
            raise self.corrupt(f"{tensor} is {entry.format}, not {' or '.join(formats)}")
        fits = [
            len(shape) == len(entry.shape) and all(w in (None, h) for w, h in zip(shape, entry.shape, strict=True))
            for shape in shapes
        ]
        if shapes and not any(fits):
            wanted = " or ".join(str(["any" if size is None else size for size in shape]) for shape in shapes)
            raise self.corrupt(f"{tensor} has shape {list(entry.shape)}, not {wanted}")
        if 0 in entry.shape:
            raise self.corrupt(f"{tensor} is empty")
        return entry.shape

    def small(self, tensor: str) -> Array:
        """The values of a small tensor, read now."""
        if self.tensors[tensor].nbytes > _SMALL:
            raise self.corrupt(f"{tensor} takes {self.tensors[tensor].nbytes} bytes, too many for what it should be")
        return self.read(tensor)

    def number(self, tensor: str, formats: tuple[str, ...]) -> int:
        """The integer in a tensor of one element."""
        self.need(tensor, formats, (), (1,))
        return int(self.small(tensor).reshape(-1)[0])

    def sizes(self, tensor: str, formats: tuple[str, ...]) -> tuple[int, int]:
        """A matrix's shape stored as a tensor of two."""
        self.need(tensor, formats, (2,))
        rows, columns = (int(size) for size in self.small(tensor))
        if not (0 < rows < _MAX_SIZE and 0 < columns < _MAX_SIZE):
            raise self.corrupt(f"{tensor} says {rows} x {columns}")
        return rows, columns


@dataclass(frozen=True)
class Method:
    """A way to store quantized modules."""

    label: str
    """For people, such as "gptq, 4 bits"."""
    tensors: tuple[str, ...]
    """Names below a module that the method may use. Those of unquantized modules stay what they are."""
    quantized: Callable[[Module], bool]
    plan: Callable[[Module], Matrix | None]
    """Raises CorruptCheckpoint or UnsupportedModel. None: the module's `weight` is plain after all."""
    ignored: tuple[str, ...] = ()
    """Names below any module of tensors that say how to quantize activations or caches, which stay floats here."""
    joints: tuple[str, ...] = (".",)
    """What may stand between a module's name and those of its tensors."""
    zero_biases: bool = False
    """Whether modules may have biases of zeros that their model has not."""


# ---- tensors of coded weights ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Where a matrix's scales lie: a grid [lines, groups]; see `kernels.coded.Coded`."""

    lines: int
    groups: int
    group: int
    row_block: int = 1

    @property
    def layout(self) -> Array:
        return np.array([self.group, self.row_block], np.int32)

    def array(self, values: Array) -> Array:
        return values.reshape(self.lines, self.groups)


def scale_grid(
    module: Module, tensor: str, shape: tuple[int, int], block: tuple[int, int] | None = None, group: int | None = None
) -> Grid:
    """How a tensor of scales lies over a matrix: one, one a row, one a block of `block`, or one a group of a row.

    `block` and `group` are what the settings say; groups that they do not fit divide the rows evenly.
    """
    rows, columns = shape
    stored = module.tensors[tensor].shape
    if math.prod(stored) == 1:
        return Grid(1, 1, columns)
    if stored in ((rows,), (rows, 1)):
        return Grid(rows, 1, columns)
    if len(stored) == 2 and block is not None and min(block) > 0:
        lines, groups = -(-rows // block[0]), -(-columns // block[1])
        if stored == (lines, groups):
            return Grid(lines, groups, block[1], block[0])
    if len(stored) == 2 and stored[0] == rows:
        return Grid(rows, stored[1], group_size(module, tensor, columns, stored[1], group))
    raise module.corrupt(f"{tensor} of shape {list(stored)} does not fit a weight of {rows} x {columns}")


def group_size(module: Module, tensor: str, columns: int, groups: int, configured: int | None = None) -> int:
    """The group size of rows of `columns` in `groups` groups: what the settings say where it fits."""
    if configured is not None and configured > 0 and -(-columns // configured) == groups:
        return configured
    if columns % groups:
        raise module.corrupt(f"{tensor} has {groups} groups, which rows of {columns} do not divide into")
    return columns // groups


def configured_group(*values: object) -> int | None:
    """The first of these settings that is a group size; None where none is, as with -1 for whole rows."""
    return next((value for value in values if isinstance(value, int) and value > 1), None)


def flat_grid(shape: tuple[int, int], block: int) -> Grid:
    """The grid for one value a run of `block` weights, where runs are counted over the whole matrix.

    Where runs cross rows, groups are what divides both.
    """
    group = math.gcd(shape[1], block)
    return Grid(shape[0], shape[1] // group, group)


def flat_values(values: Array, grid: Grid, block: int) -> Array:
    """Values of runs of `block` weights on their `flat_grid`."""
    values = values.reshape(-1)
    if grid.group != block:
        values = np.repeat(values, block // grid.group)[: grid.lines * grid.groups]
    return grid.array(values)


def coded_bytes(codes: int, bits: int, *grids: int, scale_table: bool = False, order: int = 0) -> int:
    """What a coded weight of so many bytes of codes and of grids takes, with its tables and the order of `order`
    columns."""
    return codes + (4 << bits) + sum(grids) + 8 + (1024 if scale_table else 0) + 4 * order
