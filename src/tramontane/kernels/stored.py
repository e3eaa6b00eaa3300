"""The ops of modules that keep matrices as they are stored and compute op by op.

Owns what of `Ops` is there for modules that have something faster, in terms of the other ops. Must not know: weights,
layers, models, other kernel modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from tramontane.kernels.base import Array, Ops
from tramontane.kernels.checks import check_together

if TYPE_CHECKING:
    from tramontane.kernels.coded import Coded


class StoredOps:
    """The part of `Ops` that packs, records, and multiplies several matrices at once: nothing of it is done here."""

    def pack(self, matrix: Array, format: str) -> Array:
        return matrix

    def packing(self) -> AbstractContextManager[object]:
        return nullcontext()

    def room(self, format: str, shape: tuple[int, int]) -> Array | None:
        return None

    def unpack(self: Ops, packed: Array, format: str, shape: tuple[int, int]) -> NDArray[Any]:
        return self.to_host(packed)

    def pack_codes(self, coded: Coded, rows: int) -> Coded:
        return coded

    def room_codes(self, coded: Coded, rows: int) -> Array | None:
        return None

    def unpack_codes(self: Ops, coded: Coded, rows: int) -> NDArray[Any]:
        return self.to_host(coded.codes)

    def record(self, compute: Callable[[], None]) -> Callable[[], None] | None:
        compute()
        return None

    def matmul_together(
        self: Ops,
        outs: Sequence[Array],
        x: Array,
        weights: Sequence[Array],
        format: str | None,
        biases: Sequence[Array | None],
    ) -> None:
        check_together(outs, weights, biases)
        for out, weight, bias in zip(outs, weights, biases, strict=True):
            if format is None:
                self.matmul(out, x, weight, bias)
            else:
                self.matmul_blocks(out, x, weight, format, bias)
