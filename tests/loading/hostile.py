"""Damage to files, by a seed: what readers must survive with a typed error, in little memory."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tramontane.errors import TramontaneError

_LIES_32 = (0, 1, 8, 9, 255, 1 << 16, (1 << 31) - 1, (1 << 32) - 1)
_LIES_64 = (0, 1, 1 << 20, 1 << 32, 1 << 40, 1 << 63, (1 << 64) - 1)

Files = Mapping[str, bytes]


def mutate(content: bytes, rng: random.Random, order: str = "<", header: int = 3000) -> bytes:
    """Damage of one kind: cut, flipped bits, or a count or size replaced by an extreme one. Mostly in the header."""
    damaged = bytearray(content)
    header = min(len(damaged), header)
    kind = rng.choice(("cut", "flip", "flip", "lie32", "lie64", "move", "grow"))
    at = rng.randrange(header)
    if kind == "cut":
        return bytes(damaged[: rng.randrange(len(damaged))])
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 2, 8))):
            damaged[rng.randrange(header)] ^= 1 << rng.randrange(8)
    elif kind == "lie32":
        damaged[at : at + 4] = struct.pack(f"{order}I", rng.choice(_LIES_32))
    elif kind == "lie64":
        damaged[at : at + 8] = struct.pack(f"{order}Q", rng.choice(_LIES_64))
    elif kind == "move":
        length = rng.randrange(1, 64)
        damaged[at : at + length] = damaged[rng.randrange(header) :][:length]
    else:
        damaged[at:at] = rng.randbytes(rng.randrange(1, 64))
    return bytes(damaged)


def mutate_set(files: Files, rng: random.Random, order: str = "<") -> dict[str, bytes]:
    """The same on one file of several; or one goes missing, stands for another, or swaps places with it."""
    damaged = dict(files)
    one, other = rng.sample(sorted(files), 2)
    kind = rng.choice(("file", "file", "file", "missing", "twice", "swap"))
    if kind == "file":
        damaged[one] = mutate(files[one], rng, order)
    elif kind == "missing":
        del damaged[one]
    elif kind == "twice":
        damaged[one] = files[other]
    else:
        damaged[one], damaged[other] = files[other], files[one]
    return damaged


def read_all(open_file: Callable[[Path], Any], path: Path) -> bool:
    """Open and take every tensor. False where that ends in a typed error; any other error passes through."""
    try:
        with open_file(path) as file:
            for name in file.tensors:
                file.data(name).tobytes()
    except TramontaneError:
        return False
    return True


def survivors(
    files: Files, open_file: Callable[[Path], Any], folder: Path, cases: int, seed: int, order: str = "<"
) -> tuple[int, int]:
    """How many of `cases` damaged sets still opened, and the most bytes that Python held meanwhile."""
    rng = random.Random(seed)
    read = 0
    tracemalloc.start()
    for _ in range(cases):
        if len(files) > 1:
            damaged = mutate_set(files, rng, order)
        else:
            damaged = {name: mutate(content, rng, order) for name, content in files.items()}
        for name in files:
            (folder / name).unlink(missing_ok=True)
        for name, content in damaged.items():
            (folder / name).write_bytes(content)
        read += read_all(open_file, folder / min(damaged))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return read, peak
