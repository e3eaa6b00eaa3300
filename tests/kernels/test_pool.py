"""The pool of threads alone, in a program of its own: every item once, and no race that a sanitizer sees."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels.driver import ROOT


def shares_out(folder: Path, *flags: str) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no c++: the program that drives the pool has to be compiled")
    program = str(folder / "pool")
    sources = [str(ROOT / "tests/native/pool.cpp"), str(ROOT / "csrc/pool.cpp")]
    subprocess.run([compiler, "-std=c++20", "-O1", "-pthread", *flags, *sources, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_item_is_done_once(tmp_path: Path) -> None:
    shares_out(tmp_path)


@pytest.mark.slow
def test_threads_race_for_nothing(tmp_path: Path) -> None:
    shares_out(tmp_path, "-fsanitize=thread", "-g1")
