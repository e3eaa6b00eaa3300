from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.backends.mistralrs.fake import Script, Wheel
from tramontane.backends.mistralrs.backend import MistralRSBackend

# The wheel's threads wait for each other; on a busy machine one is faster than two. Read when it is first used.
os.environ.setdefault("RAYON_NUM_THREADS", "1")

Open = Callable[..., tuple[MistralRSBackend, Wheel]]


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MISTRALRS_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def opened(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens the tiny model with a wheel that follows a script; closes it in the end."""
    backends = []

    def open_it(script: Script | None = None, **options: Any) -> tuple[MistralRSBackend, Wheel]:
        wheel = Wheel(checkpoint, script)
        monkeypatch.setitem(sys.modules, "mistralrs", wheel)  # type: ignore[arg-type]
        backends.append(MistralRSBackend(checkpoint, options))
        return backends[-1], wheel

    yield open_it
    for backend in backends:
        backend.close()
