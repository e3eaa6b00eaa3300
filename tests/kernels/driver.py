"""Kernels on machines without Python: builds tests/native/driver.cpp, gives it cases, and judges what it computed.

Expectations come from the oracles, in float64, and from what formats say of their blocks.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.kernels import oracles
from tests.kernels.test_attention import KINDS, LATENT, Paged
from tramontane.kernels import BLOCKS
from tramontane.kernels.blocks import dequantize
from tramontane.kernels.tables import LEVELS, table

ROOT = Path(__file__).parents[2]
DENSE: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
CACHES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "E4M3": "fp8"}
FAST, UNIFORM, EXACT = range(3)

Arrays = Sequence[NDArray[Any] | None]


@dataclass
class Case:
    """One call: see driver.cpp. `want` is compared within `bound`, which is 0 where the result must be equal."""

    op: str
    of: str
    ints: Sequence[int]
    floats: Sequence[float]
    arrays: Arrays
    want: NDArray[Any]
    bound: NDArray[Any] | float = 0.0

    def __post_init__(self) -> None:
        if self.want.dtype == np.float64:
            self.want = self.want.astype(np.float32)

    def encoded(self) -> bytes:
        arrays = [b"" if a is None else np.ascontiguousarray(a).tobytes() for a in self.arrays]
        parts = [_listed(self.op.encode()), _listed(self.of.encode())]
        parts += [struct.pack(f"<q{len(self.ints)}q", len(self.ints), *self.ints)]
        parts += [struct.pack(f"<q{len(self.floats)}f", len(self.floats), *self.floats)]
        parts += [struct.pack("<q", len(arrays)), *map(_listed, arrays), struct.pack("<q", self.want.nbytes)]
        return b"".join(parts)

    def judge(self, result: NDArray[Any]) -> str:
        """What is wrong with a result; empty where nothing is."""
        error = np.abs(result.astype(np.float64) - self.want.astype(np.float64))
        wrong = ~(error <= self.bound)
        if not wrong.any():
            return ""
        return f"{self.op} {self.of} {list(self.ints)}: {wrong.sum()} of {wrong.size} wrong, by up to {np.max(error)}"


def _listed(data: bytes) -> bytes:
    return struct.pack("<q", len(data)) + data


def build(name: str, *settings: str) -> Path:
    """The driver as CMake builds it with these settings, in a directory that later runs find again."""
    where = ROOT / "build" / f"driver-{name}"
    launcher = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
    configure = ["cmake", "-S", str(ROOT), "-B", str(where), "-DTRAMONTANE_DRIVER=ON", *launcher, *settings]
    for command in (configure, ["cmake", "--build", str(where), "--parallel"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return where / "driver"


def instruction_sets(command: Sequence[str]) -> list[str]:
    """What a driver, with the emulator's words in front, says that it can be held to."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def run(command: Sequence[str], isa: str, cases: Sequence[Case], directory: Path) -> list[str]:
    """What was wrong with the results of all cases on one instruction set. Fails where the driver does."""
    given, taken = directory / "cases", directory / "results"
    given.write_bytes(b"".join(case.encoded() for case in cases))
    done = subprocess.run([*command, isa, str(given), str(taken)], capture_output=True, text=True)
    assert done.returncode == 0, f"{isa}: {done.returncode}\n{done.stderr[-4000:]}"
    results, at, wrong = taken.read_bytes(), 0, []
    for case in cases:
        result = np.frombuffer(results, case.want.dtype, case.want.size, at).reshape(case.want.shape)
        at += case.want.nbytes
        wrong.append(case.judge(result))
    assert at == len(results)
    return [words for words in wrong if words]


# ---- cases


def all_cases(rng: np.random.Generator) -> list[Case]:
    nothing = np.empty(0, np.float32)
    tables = [Case("table", name, (), (), (table(name).astype(np.float32),), nothing) for name in LEVELS]
    parts = (_matrices(rng), _layers(rng), _attention(rng))
    return [*tables, *(case for part in parts for case in part)]


def _matrix(rng: np.random.Generator, format: str, rows: int, columns: int) -> tuple[NDArray[Any], NDArray[np.float32]]:
    if format in DENSE:
        dense = rng.standard_normal((rows, columns)).astype(DENSE[format])
        return dense, dense.astype(np.float32)
    blocks = oracles.random_blocks(rng, format, rows, columns)
    return blocks, dequantize(format, blocks)


def _matrices(rng: np.random.Generator) -> Iterator[Case]:
    for format in (*DENSE, *BLOCKS):
        yield from _products(rng, format, 3, 9, 512, tiled=False)
        if format in (*DENSE, *oracles.TILED):
            for tokens, rows, columns in ((1, 1, 256), (5, 35, 768), (17, 50, 256), (300, 16, 256)):
                yield from _products(rng, format, tokens, rows, columns, tiled=True)
    for format in DENSE:
        for columns in (1, 5, 31, 33, 127):
            for tiled in (False, True):
                yield from _products(rng, format, 18, 19, columns, tiled)


def _products(
    rng: np.random.Generator, format: str, tokens: int, rows: int, columns: int, tiled: bool
) -> Iterator[Case]:
    stored, values = _matrix(rng, format, rows, columns)
    x, bias = rng.standard_normal((tokens, columns), np.float32), rng.standard_normal(rows, np.float32)
    want = (x.astype(np.float64) @ values.astype(np.float64).T + bias).astype(np.float32)
    summed = np.abs(x) @ np.abs(values).T + np.abs(bias)
    for arithmetic in (FAST, UNIFORM, EXACT):
        in_float = arithmetic == EXACT or (format in DENSE and not tiled)
        bound = (3e-6 if in_float else 1e-2) * summed
        yield Case("matmul", format, (tokens, rows, columns, tiled, arithmetic), (), (x, stored, bias), want, bound)
    ids = rng.integers(0, rows, 4).astype(np.int32)
    yield Case("rows", format, (4, rows, columns, tiled), (), (ids, stored), values[ids])


def _layers(rng: np.random.Generator) -> Iterator[Case]:
    for rows, columns in ((1, 1), (3, 37), (5, 256)):
        x = rng.standard_normal((rows, columns), np.float32)
        weight, bias = rng.standard_normal((2, columns), np.float32)
        yield Case("norm", "", (0, rows, columns), (1e-5,), (x, weight, None), oracles.rms_norm(x, weight, 1e-5), 1e-5)
        centred = oracles.layer_norm(x, weight, bias, 1e-5)
        yield Case("norm", "", (1, rows, columns), (1e-5,), (x, weight, bias), centred, 1e-4)
        wide = x.astype(np.float64)
        softened = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
        yield Case("log_softmax", "", (rows, columns), (), (x,), softened, 1e-5)
    x, up = rng.standard_normal((2, 77), np.float32) * 4
    silu = x / (1 + np.exp(-x.astype(np.float64)))
    yield Case("activation", "silu", (77,), (), (x,), silu, 1e-5)
    yield Case("activation", "relu", (77,), (), (x,), np.maximum(x, 0))
    yield Case("gated_activation", "silu", (77,), (), (x, up), silu * up, 5e-5)
    for interleaved in (False, True):
        for half in (5, 16):
            x = rng.standard_normal((3, 2, 40), np.float32)
            positions, speeds = np.array([0, 7, 900]), (1 / np.arange(1, half + 1)).astype(np.float32)
            angles = positions.astype(np.float32)[:, None] * speeds
            arrays = (x, np.cos(angles), np.sin(angles))
            want = oracles.rope(x, positions, speeds, interleaved)
            yield Case("rope", "", (3, 2, 40, half, interleaved), (), arrays, want, 1e-4)
    for format, dtype in DENSE.items():
        cache, slots = rng.standard_normal((3, 2, 4, 37)).astype(dtype), np.array([9, 0, 3], np.int32)
        x = rng.standard_normal((3, 2, 37), np.float32)
        want = cache.copy()
        want[slots // 4, :, slots % 4] = x.astype(dtype)
        yield Case("write_cache", format, (3, 2, 37, 4, 0), (), (cache, x, slots), want)
        keys, wanted = (np.ascontiguousarray(each.swapaxes(2, 3)) for each in (cache, want))
        yield Case("write_cache", format, (3, 2, 37, 4, 1), (), (keys, x, slots), wanted)


def _attention(rng: np.random.Generator) -> Iterator[Case]:
    for format in DENSE:
        for kind in KINDS.values():
            for window, sizes in ((0, (4, 2, 32, 16)), (5, (3, 1, 17, 4))):
                query_heads, heads, width, block = sizes
                paged = Paged(rng, (1, 9, 21), query_heads, heads, width, block, CACHES[format], value_width=width + 3)
                yield from _attended(paged, format, kind, window)
    for format, cells in CACHES.items():
        for (query_heads, heads), (width, value_width), block in LATENT:
            paged = Paged(rng, (1, 9, 70), query_heads, heads, width, block, cells, 0, value_width, latent=True)
            yield from _attended(paged, format, KINDS["all"], 0)
        for latent in (False, True):
            paged = Paged(rng, (40, 70), 6, 1, 48, 16, cells, value_width=32, latent=latent)
            yield from _attended(paged, format, KINDS["sinks"], 0, rows=8, cut=32)
            yield from _attended(paged, format, KINDS["sinks"], 0, rows=1)
        yield from _read(paged, format)


def _attended(
    paged: Paged, format: str, kind: dict[str, Any], window: int, rows: int | None = None, cut: int = 0
) -> Iterator[Case]:
    """The last `rows` of each sequence, or all; `cut`: in two calls, of the tokens from there on, and of the others."""
    sinks = paged.sinks if kind.get("sinks") else None
    slopes = paged.slopes if kind.get("slopes") else None
    causal, softcap, scale = kind.get("causal", True), kind.get("softcap", 0.0), 0.3
    how = {"window": window, "causal": causal, "softcap": softcap, "sinks": sinks, "slopes": slopes}
    queries = [q[-rows:] if rows else q for q in paged.q]
    want = np.concatenate(
        [oracles.attention(*each, scale, **how) for each in zip(queries, paged.k, paged.v, strict=True)]
    )
    lists = paged.tables, np.cumsum([0, *map(len, queries)]).astype(np.int32), np.array([*map(len, paged.k)], np.int32)
    arrays = (np.concatenate(queries), paged.k_cache, paged.v_cache, *lists, sinks, slopes)
    widths = (paged.q[0].shape[1], paged.k[0].shape[1], paged.q[0].shape[2], paged.v[0].shape[2])
    ints = (*paged.tables.shape, *widths, paged.size, window, causal, paged.latent, cut)
    for arithmetic in (FAST, EXACT):
        bound = 2e-5 if arithmetic == EXACT or format == "F32" or paged.latent else 0.03
        yield Case("attention", format, (*ints, arithmetic), (scale, softcap), arrays, want.astype(np.float32), bound)


def _read(paged: Paged, format: str) -> Iterator[Case]:
    """What a latent cache holds of the second sequence, from its fourth token on."""
    table, first, (keys, values) = paged.tables[1], 3, (paged.k[1], paged.v[1])
    parts = (paged.k_cache, values, 1), (paged.v_cache, keys[..., values.shape[2] :], 0)
    for cache, held, turned in parts:
        want = np.ascontiguousarray(held[first:])
        ints = (first, *want.shape, paged.size, turned)
        yield Case("read_cache", format, ints, (), (cache, table), want, 2e-6)
