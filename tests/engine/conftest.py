from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import checkpoints


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model with windows."""
    return checkpoints.write(tmp_path_factory.mktemp("tiny") / "model")
