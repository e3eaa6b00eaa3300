"""The kernel modules under test, one a parameter: those of tests/kernels."""

from __future__ import annotations

from tests.kernels.conftest import ops, rng

__all__ = ["ops", "rng"]
