"""Which backend answers for a model: from the model's name, or as asked for.

Owns the names of backends and how each is opened. Must not know: what a backend does with its model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tramontane.backends.base import Backend
from tramontane.config import EngineConfig
from tramontane.errors import InvalidRequest, UnsupportedModel
from tramontane.types import SamplingParams

if TYPE_CHECKING:
    from tramontane.loading.sources import ModelSource

Progress = Callable[[int, "int | None", str], None]
"""Called while a model is fetched: bytes done, bytes in all where known, and what they are of."""


@dataclass(frozen=True)
class Opening:
    """All that opens a backend."""

    model: str | Path | ModelSource
    config: EngineConfig
    sampling: SamplingParams
    chat_template: str | None = None
    progress: Progress | None = None


def open_backend(
    model: str | Path | ModelSource | None,
    config: EngineConfig,
    sampling: SamplingParams,
    *,
    backend: str | None = None,
    chat_template: str | Path | None = None,
    progress: Progress | None = None,
) -> Backend:
    """Load `model` (None: the demo model) with the backend asked for, else the one in front of its name, else native.

    `NAME/...` at the front of a string names a backend; write a folder of such a name as `./NAME/...`.
    `sampling`: the model-level defaults. `chat_template`: a Jinja template, or a Path to one.
    Raises UnsupportedModel for a backend that this build lacks, and what loading raises.
    """
    name, model = _choose(model, backend)
    if name not in _OPENERS:
        raise UnsupportedModel(
            f"The backend {name!r} is not in this build.", f"Use one of: {', '.join(_OPENERS)}; native is the default."
        )
    return _OPENERS[name](Opening(model, config, sampling, _template(chat_template), progress))


def _choose(model: str | Path | ModelSource | None, backend: str | None) -> tuple[str, str | Path | ModelSource]:
    if backend is not None and backend not in (*_OPENERS, *_KNOWN):
        raise InvalidRequest("backend", f"{backend!r} is unknown", f"Use one of: {', '.join(_OPENERS)}.")
    if isinstance(model, str):
        front, _, rest = model.partition("/")
        if front in (*_OPENERS, *_KNOWN) and (rest or front == "mock"):
            if backend not in (None, front):
                raise InvalidRequest("backend", f"{backend!r} is asked for, while the model's name says {front!r}")
            return front, rest
    if model is None and backend in (None, "native"):
        from tramontane.loading.sources import DEMO_MODEL

        model = DEMO_MODEL
    return backend or "native", model or ""


def _template(given: str | Path | None) -> str | None:
    if not isinstance(given, Path):
        return given
    try:
        return given.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest("chat_template", f"cannot read {given}: {error}") from error


def _native(opening: Opening) -> Backend:
    from tramontane.backends.native import NativeBackend

    return NativeBackend(
        opening.model,
        opening.config,
        opening.sampling,
        progress=opening.progress,
        chat_template=opening.chat_template,
    )


def _mock(opening: Opening) -> Backend:
    from tramontane.backends.mock import MockBackend

    if opening.model:
        raise InvalidRequest("model", f"the mock backend loads none, not {opening.model!r}", "Pass 'mock' alone.")
    if opening.chat_template is not None:
        raise InvalidRequest("chat_template", "the mock backend has its own", "Leave it out.")
    if replace(opening.config, context_length=None) != EngineConfig():
        raise InvalidRequest("options", "of the engine's, the mock backend takes context_length alone")
    return MockBackend(context_length=opening.config.context_length or 4096, sampling=opening.sampling)


_OPENERS: dict[str, Callable[[Opening], Backend]] = {"native": _native, "mock": _mock}
_KNOWN = ("mistralrs", "transformers")
"""Backends that Tramontane has elsewhere, refused here by name."""
