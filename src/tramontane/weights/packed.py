"""What ops packed of weights: taken out to be kept, and the same weights made of it again.

Owns which arrays that takes of each kind of weight. Must not know: where they are kept, layers, models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tramontane.kernels import BLOCKS, Array, Ops
from tramontane.kernels.coded import Coded
from tramontane.weights import FORMATS, BlockWeight, CodedWeight, DenseWeight, Weight
from tramontane.weights.coded import BITS
from tramontane.weights.dense import DTYPES

Packed = Mapping[str, Array]
"""The arrays of one weight by name: the one of a dense matrix or of blocks, or codes with their tables and grids."""

_ONE = "tiles"


def packed_arrays(weight: Weight) -> Packed:
    """What the weight's ops packed, with all else that it takes; empty where it is as it is stored."""
    if isinstance(weight, CodedWeight):
        return weight.packed
    # What is left as it is stored has two dimensions, not a tile's three.
    return {_ONE: weight.single[0]} if weight.single is not None and weight.single[0].ndim == 3 else {}


def packed_rooms(ops: Ops, format: str, shape: tuple[int, int], stored: Mapping[str, NDArray[Any]]) -> Packed:
    """Arrays like those that `packed_arrays` gives of a matrix, to be filled with what is `stored` of one.

    Empty where the ops pack none such; of codes, whether they do follows from their grids, so that it is empty where
    none are stored. Raises ValueError where what is stored cannot be of one.
    """
    if format in BITS:
        return CodedWeight.rooms(ops, format, shape, stored) if stored else {}
    room = ops.room(format, shape)
    return {} if room is None else {_ONE: room}


def packed_weight(ops: Ops, format: str, shape: tuple[int, int], arrays: Packed) -> Weight:
    """The weight of arrays that `packed_arrays` gave, or `packed_rooms`, filled."""
    if format in BITS:
        return CodedWeight.from_packed(ops, format, shape, arrays)
    kind: Callable[[Ops, str, tuple[int, int], Array], Weight] = BlockWeight if format in BLOCKS else DenseWeight
    return kind(ops, format, shape, arrays[_ONE])


def packed_sample(ops: Ops, format: str) -> bytes | None:
    """What the ops make of a small matrix, which tells layouts of tiles apart; None where they leave it."""
    if format in BITS:
        return _coded_sample(ops, format)
    stored = _bytes(FORMATS[format].nbytes((512,))).view(DTYPES.get(format, np.uint8))
    packed = ops.pack(stored, format)
    return None if packed is stored else ops.to_host(packed).tobytes()


def _coded_sample(ops: Ops, format: str) -> bytes | None:
    bits = BITS[format]
    table = np.arange(2**bits, dtype=np.float32) / (1 if format.startswith("INT") else 4)
    coded = ops.pack_codes(Coded(_bytes(64 * bits), bits, 512, table, np.ones((17, 1), np.float32), 512), 17)
    return ops.to_host(coded.codes).tobytes() if coded.codes.ndim == 3 else None


def _bytes(row: int) -> NDArray[np.uint8]:
    return (np.arange(17 * row) % 251).astype(np.uint8).reshape(17, row)
