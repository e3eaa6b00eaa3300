"""What a backend says of itself before it is opened, and all that opens it.

Owns `Declared` and `Opening`, which a backend of another package is made of too. Must not know: any one backend.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tramontane.config import EngineConfig
from tramontane.errors import MissingExtra
from tramontane.records import dataclass
from tramontane.types import SamplingParams

if TYPE_CHECKING:
    from tramontane.backends.base import Backend
    from tramontane.loading.sources import ModelSource

Progress = Callable[[int, "int | None", str], None]
"""Called while a model is fetched, and while it is loaded if that takes long: bytes done, bytes in all where known, and
what they are of, which begins with "loading " for the latter."""

Ability = Literal["generate", "chat", "tokenize", "embed", "rerank", "stats", "listen", "adapt"]
"""What a backend may be asked for: answers to texts and to conversations, then the optional protocols of `base`."""


@dataclass(frozen=True)
class Opening:
    """All that opens a backend."""

    model: str | Path | ModelSource
    """As it was named, without the backend's name in front; "" where none was and the backend needs none."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Only such as the backend declares, by the names that it declares, none of them None."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """The model-level defaults."""
    chat_template: str | None = None
    """A Jinja template that replaces the model's."""
    progress: Progress | None = None

    def config(self) -> EngineConfig:
        """The options as those of our engine. Raises InvalidRequest."""
        return EngineConfig.from_options(self.options)


@dataclass(frozen=True)
class Declared:
    """A backend as it is known without being opened: what it can at best, and how it is opened.

    Importing what declares a backend must not import what the backend needs: that is for `open` to do. What an opened
    backend can do with its model, its `capabilities()` say.
    """

    name: str
    summary: str
    """One line for people."""
    open: Callable[[Opening], Backend]
    sampling_fields: frozenset[str]
    """Of `SamplingParams`."""
    request_fields: frozenset[str]
    """Of `base.REQUEST_FIELDS`."""
    abilities: frozenset[Ability]
    options: frozenset[str]
    """Names of the options that it takes besides sampling defaults; any other is refused by name."""
    modules: tuple[str, ...] = ()
    """What must be importable for it to open."""
    extra: str = ""
    """Of tramontane's, which installs those modules."""
    takes_model: bool = True
    """False: it has none, and opens without one being named."""

    def missing(self) -> list[str]:
        """Those of its modules that are not installed."""
        return [name for name in self.modules if importlib.util.find_spec(name) is None]

    def require(self) -> None:
        """Raises MissingExtra unless all its modules are installed."""
        if missing := self.missing():
            raise MissingExtra(self.extra or missing[0], f"The backend {self.name!r}")
