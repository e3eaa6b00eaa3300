"""What fuzzing found, read again; and the seeds, which must be sound."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, read

FOUND = sorted(path for path in (Path(__file__).parent / "found").glob("*/*") if path.is_file())


@pytest.mark.parametrize("target", TARGETS)
def test_a_seed_is_sound(target: str) -> None:
    assert all(read(target, seed) for seed in TARGETS[target].seeds())


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_found_inputs_end_in_a_typed_error(path: Path) -> None:
    read(path.parent.name, path.read_bytes())
