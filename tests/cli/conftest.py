from __future__ import annotations

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from tramontane.backends.base import Backend
from tramontane.cli.app import app
from tramontane.llm import LLM

Shell = Callable[..., Result]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Runs the command in this process: shell("run", "-m", "mock", "hi")."""
    for name in ("NO_COLOR", "MISTRALRS_NO_STREAM", "TRAMONTANE_DEBUG"):
        monkeypatch.delenv(name, raising=False)

    def invoke(*arguments: str, stdin: bytes | str | None = None) -> Result:
        return CliRunner().invoke(app, [*arguments], input=stdin, prog_name="tramontane")

    return invoke


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Backend], None]:
    """Puts a backend behind every command, whatever --model says."""

    def use(backend: Backend) -> None:
        monkeypatch.setattr(backend, "close", lambda: None)  # the next command finds it open
        for module in ("run", "bench", "evaluate"):
            monkeypatch.setattr(f"tramontane.cli.{module}.open_llm", lambda *a, **k: LLM.from_backend(backend))

    return use
