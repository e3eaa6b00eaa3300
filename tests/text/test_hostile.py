"""Mutated files and templates end in a typed error, within two gibibytes; see `hostile`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.text.hostile import CASES

ROOT = Path(__file__).parents[2]


def run(kind: str, count: int, folder: Path) -> None:
    command = [sys.executable, "-m", "tests.text.hostile", kind, str(count), str(folder)]
    # The limit is for what would never end; a case takes milliseconds.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("kind", CASES)
def test_a_few_mutations(tmp_path: Path, kind: str) -> None:
    run(kind, 25, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_many_mutations(tmp_path: Path, kind: str) -> None:
    run(kind, 400, tmp_path)
