"""open_backend: the backend that a name asks for, or a refusal that says which there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tramontane.backends.mock import MockBackend
from tramontane.backends.registry import open_backend
from tramontane.config import CacheConfig, EngineConfig
from tramontane.errors import InvalidRequest, ModelNotFound, UnsupportedModel
from tramontane.types import SamplingParams


def opened(model: str | Path | None, config: EngineConfig | None = None, **options: Any) -> Any:
    return open_backend(model, config or EngineConfig(), SamplingParams(), **options)


@pytest.mark.parametrize(("model", "backend"), [("mock", None), ("mock", "mock"), (None, "mock"), ("mock/", None)])
def test_mock(model: str | None, backend: str | None) -> None:
    assert isinstance(opened(model, backend=backend), MockBackend)


def test_the_mock_takes_what_it_can_honour() -> None:
    assert opened("mock", EngineConfig(context_length=77)).capabilities().context_length == 77
    for wrong in (
        {"config": EngineConfig(threads=2)},
        {"config": EngineConfig(cache=CacheConfig(block_size=8))},
        {"chat_template": "{{ messages }}"},
    ):
        with pytest.raises(InvalidRequest):
            opened("mock", **wrong)
    with pytest.raises(InvalidRequest, match="model"):
        opened("mock/some-model")


@pytest.mark.parametrize("name", ["mistralrs", "transformers"])
def test_backends_that_are_not_here_are_refused_by_name(name: str) -> None:
    for model, backend in ((f"{name}/org/model", None), ("org/model", name), (None, name)):
        with pytest.raises(UnsupportedModel, match=f"{name}.*not in this build.*native"):
            opened(model, backend=backend)


def test_an_unknown_backend_and_two_that_differ_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="llamafile"):
        opened("a.gguf", backend="llamafile")
    with pytest.raises(InvalidRequest, match=r"native.*mock"):
        opened("mock", backend="native")


@pytest.mark.parametrize("model", ["native/./no/such.gguf", "./no/such.gguf", Path("no/such.gguf")])
def test_native_is_the_default(model: str | Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no/such\.gguf") as caught:
        opened(model)
    assert "native" not in str(caught.value)


def test_a_path_is_never_read_as_a_backend() -> None:
    with pytest.raises(ModelNotFound):
        opened(Path("mistralrs/model.gguf"))


def test_a_template_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"chat_template.*none\.jinja"):
        opened("mock", chat_template=tmp_path / "none.jinja")
