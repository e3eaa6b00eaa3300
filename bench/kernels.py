"""Matrix products alone, a format and a number of rows at a time: one row reads memory, many rows multiply.

    python -m bench.kernels [--formats Q4_0 BF16 ...] [--rows 1 16 512] [--isa avx512 avx2] [--threads 1]

Prints GB/s of weights, TOPS, and the share of the roof: the least time that reading the weights and multiplying would
take on this machine, as measured in the same run, over the time taken. The JSON comes last. Weights are random, and
so many that they come from memory. TRAMONTANE_ISA holds everything to one instruction set, as does --isa.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from tests.kernels.oracles import random_blocks

from bench.roof import Roof, build_cpu_clock, measure_roof, wide_peak
from tramontane.kernels import BLOCKS
from tramontane.kernels.coded import TABLES
from tramontane.kernels.cpu import CpuOps, isas
from tramontane.weights import FORMATS, Weight, make_weight
from tramontane.weights.coded import BITS

DENSE = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
USUAL = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ2_XS",
    "IQ3_S",
    "IQ4_XS",
    "MXFP4",
    "INT4",
    "INT8",
)
_TABLES = {"FP8": "E4M3", "NF4": "E2M1", "FP4": "E2M1"}
_GROUP = 128


def tensors(format: str, shape: tuple[int, int]) -> Mapping[str, NDArray[Any]]:
    """A random matrix as a checkpoint stores it. Coded ones have scales and zero points for groups of 128."""
    rng = np.random.default_rng(5)
    rows, columns = shape
    if format in DENSE:
        return {"weight": rng.standard_normal(shape, dtype=np.float32).astype(DENSE[format])}
    if format in BLOCKS:  # some rows, repeated: drawing all of them takes longer than what is measured
        return {"blocks": np.tile(random_blocks(rng, format, 64, columns), (-(-rows // 64), 1))[:rows]}
    bits = BITS[format]
    grid = (rows, columns // _GROUP)
    coded: dict[str, NDArray[Any]] = {
        "codes": rng.integers(0, 64, (rows, columns * bits // 8), dtype=np.uint8),  # below the codes that are NaN
        "table": TABLES[_TABLES.get(format, f"U{bits}")],
        "scales": rng.random(grid, dtype=np.float32).astype(np.float16),
        "layout": np.array([_GROUP, 1], np.int32),
    }
    if format not in _TABLES:
        coded["zeros"] = rng.integers(0, 2**bits, grid, dtype=np.uint8)
    return coded


def seconds(ops: CpuOps, weights: list[Weight], rows: int, rounds: int, clock: Callable[[], float]) -> float:
    """Of one product, the median of rounds over all the weights in turn, with enough of them to be timed."""
    count, columns = weights[0].shape
    out = ops.empty((rows, count), "float32")
    x = ops.from_host(np.random.default_rng(6).standard_normal((rows, columns), dtype=np.float32))
    weights[0].matmul(out, x)
    times = []
    for _ in range(rounds):
        began, done = clock(), 0
        while clock() - began < 0.05:
            weights[done % len(weights)].matmul(out, x)
            done += 1
        times.append((clock() - began) / done)
    return statistics.median(times)


def measure(ops: CpuOps, format: str, args: argparse.Namespace, roof: Roof) -> list[dict[str, Any]]:
    """One line for each number of rows."""
    shape = (args.outputs, args.inputs)
    stored = tensors(format, shape)
    nbytes = sum(array.nbytes for name, array in stored.items() if name not in ("table", "layout"))
    copies = max(1, -(-args.memory * 1_000_000 // nbytes))
    weights = [
        make_weight(ops, format, shape, {name: array.copy() for name, array in stored.items()}) for _ in range(copies)
    ]
    lines = []
    clock = time.process_time if args.cpu_time else time.perf_counter
    for rows in args.rows:
        took = seconds(ops, weights, rows, args.rounds, clock)
        work = 2.0 * rows * shape[0] * shape[1]
        least = max(nbytes / (roof["read_gb_s"] * 1e9), work / wide_peak(roof, format not in DENSE))
        line = {"format": format, "isa": ops.name, "rows": rows, "us": took * 1e6, "gb_s": nbytes / took / 1e9}
        lines.append({**line, "tops": work / took / 1e12, "roof_share": least / took})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[*DENSE, *USUAL], metavar="FORMAT")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 512])
    parser.add_argument("--isa", nargs="+", choices=isas(), default=[None])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--outputs", type=int, default=2048)
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--memory", type=int, default=128, help="MB of weights, more than the caches hold")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the time computed: for a busy machine, one thread"
    )
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time needs --threads 1")
    with tempfile.TemporaryDirectory() as folder:
        roof = measure_roof(args.threads, build_cpu_clock(Path(folder)) if args.cpu_time else {})
    print(f"roof: {dict(roof)}")
    print(f"{'format':<8}{'isa':<16}{'rows':>5}{'us':>12}{'GB/s':>8}{'TOPS':>8}{'roof':>7}", flush=True)
    lines = []
    for isa in args.isa:
        ops = CpuOps(threads=args.threads, isa=isa)
        for format in args.formats:
            for line in measure(ops, format, args, roof):
                print(
                    "{format:<8}{isa:<16}{rows:>5}{us:>12.1f}{gb_s:>8.2f}{tops:>8.3f}{roof_share:>7.0%}".format(**line)
                )
                lines.append(line)
    shape = [args.outputs, args.inputs]
    print(json.dumps({"roof": dict(roof), "threads": args.threads, "shape": shape, "products": lines}))


if __name__ == "__main__":
    main()
