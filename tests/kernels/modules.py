"""Every kernel module that can be built here, by name, and a way to call its ops with numpy arrays."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tramontane.kernels import Ops
from tramontane.kernels.reference import ReferenceOps


def _compiled() -> list[str]:
    """The compiled module once for each instruction set that it can be held to, or once."""
    if importlib.util.find_spec("tramontane.kernels.cpu") is None:
        return ["cpu"]
    from tramontane.kernels import cpu

    if not cpu.available() or "isa" not in inspect.signature(cpu.CpuOps).parameters:
        return ["cpu"]
    return [f"cpu-{isa}" for isa in cpu.isas()]


_KINDS = ["reference", *_compiled(), "torch", "cuda"]
FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
DETERMINISTIC = [
    pytest.param(f"{kind}/deterministic", marks=[pytest.mark.cuda] if kind == "cuda" else []) for kind in _KINDS
]
MODULES = [*(pytest.param(kind, marks=[pytest.mark.cuda] if kind == "cuda" else []) for kind in _KINDS), *DETERMINISTIC]


def make(name: str, threads: int = 1, exact: bool = True) -> Ops:
    """The ops of a module name of `MODULES`; skips, saying why, where they cannot be had.

    They compute exactly, as references do, unless compiled ones are told not to; what kernels that round activations
    are held to is in test_tiles.py.
    """
    kind, _, mode = name.partition("/")
    deterministic = mode == "deterministic"
    if kind == "reference":
        return ReferenceOps(threads=threads, deterministic=deterministic)
    if kind in ("torch", "cuda"):
        torch = pytest.importorskip("torch")
        if kind == "cuda" and not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        from tramontane.kernels.torch_ops import TorchOps

        return TorchOps("cpu" if kind == "torch" else "cuda", threads=threads, deterministic=deterministic)
    cpu = pytest.importorskip("tramontane.kernels.cpu")
    if not cpu.available():
        pytest.skip("the compiled module is not built")
    isa = kind.partition("-")[2]
    ops: Ops = cpu.CpuOps(threads, deterministic, isa or None, exact)
    return ops


def call(ops: Ops, op: str, *arguments: Any, written: int = 1) -> Any:
    """Call an op with numpy arrays; the first `written` arguments are copied and returned, the others read-only."""
    moved: list[Any] = []
    for i, argument in enumerate(arguments):
        if not isinstance(argument, np.ndarray):
            moved.append(argument)
        elif i < written:
            moved.append(ops.from_host(argument.copy()))
        else:
            argument = np.ascontiguousarray(argument).view()
            argument.setflags(write=False)
            moved.append(ops.from_host(argument))
    getattr(ops, op)(*moved)
    ops.synchronize()
    results = [ops.to_host(array) for array in moved[:written]]
    return results[0] if written == 1 else results


def unset(*shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    """A destination full of NaN (or of -1): an op that adds to it, or leaves a part of it, shows."""
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else -1, dtype)


def normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape, dtype=np.float32)


def ints(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)
