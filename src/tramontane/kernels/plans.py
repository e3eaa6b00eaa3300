"""Plans: computations of fixed shapes, recorded once and replayed in one call each.

Owns which are kept. Must not know: what they compute, batches, models.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from tramontane.kernels.base import Array, Ops

MOST = 32
"""Kept, the latest used: one is some hundred kilobytes for a model of 30 layers."""


class Plans:
    """What ops compute for one shape after another. Not thread-safe: one runner owns it.

    A computation under one key calls the same ops on arrays in the same places, whatever the values in them.
    """

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._kept: OrderedDict[Hashable, tuple[Callable[[], None] | None, Array]] = OrderedDict()

    def run(self, key: Hashable, compute: Callable[[], Array]) -> Array:
        """What `compute` returns: the same array each time, if its ops can be replayed. Else it is called again."""
        kept = self._kept.get(key)
        if kept is None:
            return self._record(key, compute)
        self._kept.move_to_end(key)
        replay, result = kept
        if replay is None:
            return compute()
        replay()
        return result

    def _record(self, key: Hashable, compute: Callable[[], Array]) -> Array:
        results: list[Array] = []
        replay = self._ops.record(lambda: results.append(compute()))
        self._kept[key] = replay, results[0]
        if len(self._kept) > MOST:
            self._kept.popitem(last=False)
        return results[0]
