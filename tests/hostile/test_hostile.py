"""Hostile models end in a typed error or a sound reading: no other exception, crash, hang, nor two gibibytes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.cases import COUNT, make, name_of, write
from tests.hostile.opening import open_model, target
from tests.hostile.sound import SOUND

ROOT = Path(__file__).parents[2]
# Threads claim address space, which is what the worker limits.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src"), *sys.path]),
}
STUCK = 300
"""Seconds without a word after which a worker that uses no processor is ended."""


def outcomes(first: int, step: int) -> Iterator[tuple[int, str]]:
    """What became of every step-th case, a new worker taking over where one died."""
    while first < COUNT:
        for number, said in _work(first, step):
            yield number, said
            first = number + step


def _work(first: int, step: int) -> Iterator[tuple[int, str]]:
    """What one worker tells, up to its end or its death, which is the last case's outcome."""
    command = [sys.executable, "-m", "tests.hostile.worker", str(first), str(COUNT), str(step)]
    worker = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, errors="replace"
    )
    assert worker.stdout is not None
    began: int | None = None
    watch = threading.Timer(STUCK, worker.kill)
    try:
        for line in worker.stdout:
            watch.cancel()
            watch = threading.Timer(STUCK, worker.kill)
            watch.start()
            said = line.split(maxsplit=2)
            if said[0] == "begin":
                began = int(said[1])
            elif said[0] == "end":
                began = None
                yield int(said[1]), said[2]
    finally:
        watch.cancel()
        worker.kill()
        code = worker.wait()
    if began is not None:
        yield began, f"killed the process, which ended with {code}"
    elif code:
        raise AssertionError(f"the worker ended with {code}")


def check(step: int) -> None:
    counts: Counter[str] = Counter()
    failures = []
    for number, said in outcomes(0, step):
        counts[said.split()[0]] += 1
        if not said.startswith(("sound", "refused")):
            failures.append(f"{name_of(number)} (case {number}): {said}")
    assert not failures, "\n".join(failures)
    assert sum(counts.values()) == len(range(0, COUNT, step))
    assert counts["sound"] > sum(counts.values()) // 20, "else what is damaged may never have been sound"


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits on workers are Linux's")


def test_a_sample_of_cases() -> None:
    check(step=14)


@pytest.mark.slow
def test_all_cases() -> None:
    assert COUNT == 2000
    check(step=1)


@pytest.mark.parametrize("kind", SOUND)
def test_what_is_damaged_was_sound(kind: str, tmp_path: Path) -> None:
    files = SOUND[kind]()
    write(files, tmp_path)
    assert open_model(target(tmp_path, files)) == []


def test_reference_packages_read_them(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
    for kind, make_files in SOUND.items():
        for name, content in make_files().items():
            if name.endswith((".safetensors", ".uqff")):
                assert safetensors.deserialize(content)
            elif name.endswith(".gguf"):
                (tmp_path / kind).write_bytes(content)
                reader = gguf.GGUFReader(tmp_path / kind)
                assert {tensor.name for tensor in reader.tensors} >= {"token_embd.weight", "blk.0.ffn_down.weight"}


def test_cases_are_the_same_each_time() -> None:
    for number in range(0, COUNT, 97):
        assert make(number) == make(number)
