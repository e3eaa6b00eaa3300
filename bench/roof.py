"""What the machine at hand can do at most: see roof.cpp."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from bench.process import run

Roof = Mapping[str, float]
"""read_gb_s, fp32_tflops, and where the processor has the instructions bf16_tflops and int8_tops."""


def measure_roof(threads: int, environment: Mapping[str, str]) -> Roof:
    """The best of some rounds; needs a C++ compiler ($CXX, or c++)."""
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "roof")
        source = str(Path(__file__).with_name("roof.cpp"))
        flags = ["-O3", "-march=native", "-std=c++20", "-pthread"]
        run([os.environ.get("CXX", "c++"), *flags, source, "-o", program], timeout=120)
        roof: Roof = json.loads(run([program, str(threads)], timeout=120, environment=environment).stdout)
    return roof


def wide_peak(roof: Roof, quantized: bool) -> float:
    """Operations a second that many rows could reach: int8 for quantized weights, bfloat16 or float32 for others."""
    names = ("int8_tops", "fp32_tflops") if quantized else ("bf16_tflops", "fp32_tflops")
    return next(roof[name] for name in names if name in roof) * 1e12


def build_cpu_clock(folder: Path) -> dict[str, str]:
    """An environment in which the programs of one thread measure with their own time: see cpu_clock.c."""
    library = str(folder / "cpu_clock.so")
    source = str(Path(__file__).with_name("cpu_clock.c"))
    run([os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", source, "-o", library], timeout=60)
    return {"LD_PRELOAD": library}
