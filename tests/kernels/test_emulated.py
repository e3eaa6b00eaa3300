"""The kernels on processors that this machine is not, under qemu, and under sanitizers: no illegal instruction, no byte
beyond an array, the results of the oracles. Each test builds a driver first: minutes. `.ci/machines` installs what they
need; without it they are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.kernels import driver

pytestmark = pytest.mark.slow

CROSS = (
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
)
QUICK = ("-DCMAKE_BUILD_TYPE=None", "-DTRAMONTANE_OPTIMIZATION=-O1")
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
# A processor with each instruction set and, but for the last, none of the next.
ARMS = {"neon": "cortex-a72", "neon_dotprod": "neoverse-n1", "neon_i8mm": "max"}


def need(*programs: str) -> None:
    absent = [program for program in programs if shutil.which(program) is None]
    if absent:
        pytest.skip(f"{', '.join(absent)} not installed: see .ci/machines")


def on_haswell(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python, as it runs here, on an emulated processor."""
    command = ["qemu-x86_64", "-cpu", "Haswell", os.path.realpath(sys.executable), *arguments]
    paths = os.pathsep.join([str(driver.ROOT), *(path for path in sys.path if path)])
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})


@pytest.fixture(scope="module")
def cases() -> list[driver.Case]:
    return driver.all_cases(np.random.default_rng(20))


def test_neon_computes_what_it_should_on_processors_that_just_have_it(cases: list[driver.Case], tmp_path: Path) -> None:
    need("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64")
    program = str(driver.build("aarch64", *CROSS, *QUICK))
    had = ["plain"]
    for isa, processor in ARMS.items():
        had.insert(0, isa)
        command = ["qemu-aarch64", "-cpu", processor, "-L", "/usr/aarch64-linux-gnu", program]
        assert driver.instruction_sets(command) == had
        assert driver.run(command, isa, cases, tmp_path) == []
    assert driver.run(command, "plain", cases, tmp_path) == []


@pytest.mark.parametrize(("processor", "had"), [("Haswell", ["avx2", "plain"]), ("Nehalem", ["plain"])])
def test_an_older_processor_meets_no_instruction_that_it_has_not(
    processor: str, had: list[str], cases: list[driver.Case], tmp_path: Path
) -> None:
    need("cmake", "c++", "qemu-x86_64")
    command = ["qemu-x86_64", "-cpu", processor, str(driver.build("x86_64"))]
    assert driver.instruction_sets(command) == had
    for isa in had:
        assert driver.run(command, isa, cases, tmp_path) == []


def test_the_module_chooses_for_an_older_processor_too() -> None:
    need("qemu-x86_64")
    code = (
        "from tramontane.kernels import cpu; print(cpu.CpuOps().name, *cpu.isas(emulated=True)); import numpy as np\n"
        "ops, out = cpu.CpuOps(2), np.empty((40, 64), np.float32)\n"
        "ops.matmul(out, np.ones((40, 64), np.float32), ops.pack(np.ones((64, 64), np.float32), 'F32'))\n"
        "print((out == 64).all())"
    )
    done = on_haswell("-c", code)
    assert done.stdout.split() == ["cpu-avx2", "avx2", "plain", "True"], done.stderr


def test_the_tests_of_tiles_pass_on_an_older_processor() -> None:
    need("qemu-x86_64")
    done = on_haswell("-m", "pytest", "-q", "-p", "no:cacheprovider", str(driver.ROOT / "tests/kernels/test_tiles.py"))
    assert done.returncode == 0, done.stdout


def test_sanitizers_find_nothing(cases: list[driver.Case], tmp_path: Path) -> None:
    need("cmake", "c++")
    program = str(driver.build("sanitized", *QUICK, f"-DCMAKE_CXX_FLAGS={SANITIZE}"))
    for isa in driver.instruction_sets([program]):
        assert driver.run([program], isa, cases, tmp_path) == [], isa
