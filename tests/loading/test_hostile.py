"""Damaged files of GGML's kinds: every case ends in a typed error or a sound reading, in little memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loading.hostile import Files, survivors
from tests.loading.old_ggml import llama_tensors, plain, vocabulary, write
from tests.loading.test_gguf import write_model
from tramontane.loading.ggml import GGMLFile
from tramontane.loading.gguf import GGUFFile

CASES = {"whole": 500, "parts": 200, "big-endian": 200, "ggjt": 200, "ggmf": 100}


def kinds(folder: Path) -> dict[str, Files]:
    """Sound files of each kind, by name."""
    import gguf

    write_model(folder / "model.gguf")
    write_model(folder / "split.gguf", options={"split_max_tensors": 5})
    write_model(folder / "big.gguf", options={"endianess": gguf.GGUFEndian.BIG})
    parts = sorted(folder.glob("split-*.gguf"))
    words = vocabulary()
    tensors = plain(llama_tensors(len(words), hidden=16, inner=32, layers=1))
    return {
        "whole": {"model.gguf": (folder / "model.gguf").read_bytes()},
        "parts": {path.name: path.read_bytes() for path in parts},
        "big-endian": {"big.gguf": (folder / "big.gguf").read_bytes()},
        "ggjt": {"old.bin": write(tensors, words, hidden=16, layers=1)},
        "ggmf": {"older.bin": write(tensors, words, "ggmf", 1, hidden=16, layers=1)},
    }


def run(kind: str, folder: Path, cases: int, seed: int) -> tuple[int, int]:
    (folder / "sound").mkdir()
    (folder / "damaged").mkdir()
    files = kinds(folder / "sound")[kind]
    open_file = GGMLFile.open if kind.startswith("gg") else GGUFFile.open
    return survivors(files, open_file, folder / "damaged", cases, seed, ">" if kind == "big-endian" else "<")


@pytest.mark.parametrize("kind", CASES)
def test_damage_is_survived(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    read, peak = run(kind, tmp_path, CASES[kind], seed=2)
    assert CASES[kind] // 20 < read < CASES[kind] * 3 // 4
    assert peak < 4 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
@pytest.mark.parametrize("kind", CASES)
def test_damage_is_survived_in_two_gigabytes(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    code = f"""
import resource, pathlib
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from tests.loading.test_hostile import run
print(run({kind!r}, pathlib.Path({str(tmp_path)!r}), 40, seed=3)[0])
"""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, sys.path)])
    limited = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a BLAS thread claims address space
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **limited, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40
