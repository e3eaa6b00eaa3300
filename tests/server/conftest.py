from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="the extra 'server' is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")

from tests.server.live import Live, live
from tramontane.backends.mock import MockBackend


@pytest.fixture(scope="module")
def mock() -> Iterator[Live]:
    """A server over a mock backend that says the same to everything."""
    with live(MockBackend("The wind is up.")) as running:
        yield running
