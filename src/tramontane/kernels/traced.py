"""Ops that say how long each of them took.

Owns the wrapping of a module of ops. Must not know: what the ops compute, who calls them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

from tramontane.kernels.base import Ops
from tramontane.tracing import Trace

_QUICK = frozenset({"view", "part"})
"""They move no data."""


def traced(ops: Ops, trace: Trace) -> Ops:
    """The same ops, each call of which the trace shows, with the shapes of its arrays."""
    return cast(Ops, _Traced(ops, trace))


class _Traced:
    def __init__(self, ops: Ops, trace: Trace) -> None:
        self._ops, self._trace = ops, trace

    def record(self, compute: Callable[[], None]) -> Callable[[], None] | None:
        """None: what is replayed as a whole does not say how long its ops take."""
        compute()
        return None

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._ops, name)
        if not callable(found) or name in _QUICK:
            return found
        timed = self._timed(name, found)
        setattr(self, name, timed)  # so that it is found at once from now on
        return timed

    def _timed(self, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        trace = self._trace

        def run(*arguments: Any, **named: Any) -> Any:
            begun = time.perf_counter_ns()
            try:
                return op(*arguments, **named)
            finally:
                ended = time.perf_counter_ns()
                shapes = [list(one.shape) for one in arguments if hasattr(one, "shape")]
                trace.add(name, "op", begun, ended, {"shapes": shapes})

        return run
