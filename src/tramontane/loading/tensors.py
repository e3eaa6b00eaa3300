"""TensorEntry: what a checkpoint says of one of its tensors. Must not know: files, formats."""

from __future__ import annotations

from tramontane.records import dataclass


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as it is stored: rows first; `format` as in `weights.FORMATS` where this build computes with it.

    A matrix that several tensors make up is one entry; `nbytes` is then what it takes once loaded.
    """

    shape: tuple[int, ...]
    format: str
    nbytes: int
