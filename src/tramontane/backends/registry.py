"""Which backends there are, and which of them answers for a model: as asked for, by the model's name, or by default.

Owns the names of backends, ours and those that other packages add, and the order in which one is chosen. Must not
know: what a backend does with its model. Imports a backend only where that one, or all of them, are asked about.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tramontane.backends.base import Backend
from tramontane.backends.declared import Declared, Opening, Progress
from tramontane.config import ALIASES
from tramontane.errors import InvalidRequest, TramontaneError
from tramontane.types import SamplingParams

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from tramontane.loading.sources import ModelSource

BUILT_IN = ("native", "mistralrs", "transformers", "mock")
"""Each the module `tramontane.backends.NAME`, which declares itself in `DECLARED`."""
DEFAULT = "native"
VARIABLE = "TRAMONTANE_BACKEND"
"""The environment variable that names a backend where nothing else does."""
GROUP = "tramontane.backends"
"""Entry points of this group add backends: NAME = package.module:DECLARED."""

_NAME = re.compile(r"[\w-]+")


def open_backend(
    model: str | Path | ModelSource | None,
    options: Mapping[str, Any],
    sampling: SamplingParams,
    *,
    backend: str | None = None,
    chat_template: str | Path | None = None,
    progress: Progress | None = None,
) -> Backend:
    """Load `model` (None: the demo model) with the backend that `choose` finds.

    `options`: the backend's own; None leaves one at its default. `sampling`: the model-level defaults.
    `chat_template`: a Jinja template, or a Path to one.
    Raises InvalidRequest for an option or a backend that there is not, MissingExtra, and what loading raises.
    """
    chosen, model = choose(model, backend)
    own = _own_options(options, chosen)
    template = _template(chat_template)
    chosen.require()
    return chosen.open(Opening(model, own, sampling, template, progress))


def choose(
    model: str | Path | ModelSource | None, backend: str | None = None
) -> tuple[Declared, str | Path | ModelSource]:
    """The backend asked for, else the one in front of the model's name, else the one that TRAMONTANE_BACKEND names,
    else native; and the model without a backend's name.

    `NAME/...` at the front of a string names a backend; write a folder of such a name as `./NAME/...`.
    Raises InvalidRequest for an unknown name, and where two that differ are asked for.
    """
    name, field = backend, "backend"
    if isinstance(model, str):
        front, _, rest = model.partition("/")
        if _is_name(front) and (rest or not declared(front).takes_model):
            if backend not in (None, front):
                raise InvalidRequest("backend", f"{backend!r} is asked for, while the model's name says {front!r}")
            name, model = front, rest
    if name is None:
        name, field = os.environ.get(VARIABLE) or DEFAULT, VARIABLE
    chosen = declared(name, field)
    if model is None and chosen.takes_model:
        from tramontane.loading.sources import DEMO_MODEL

        model = DEMO_MODEL
    return chosen, model or ""


def names() -> list[str]:
    """Of all backends: ours, then those that other packages add."""
    return [*BUILT_IN, *_added()]


def declared(name: str, field: str = "backend") -> Declared:
    """What the backend of this name declares. Raises InvalidRequest(`field`) where there is none, or its package does
    not hold what its entry point says."""
    if name in BUILT_IN:
        ours: Declared = import_module(f"tramontane.backends.{name}").DECLARED
        return ours
    entry = _added().get(name)
    if entry is None:
        raise InvalidRequest(field, f"{name!r} is unknown", f"Use one of: {', '.join(names())}.")
    try:
        found = entry.load()
    except Exception as error:
        raise InvalidRequest(field, f"{name!r} ({entry.value}) does not load: {error!r}") from error
    if not isinstance(found, Declared):
        raise InvalidRequest(field, f"{name!r} ({entry.value}) is no tramontane.backends.declared.Declared")
    return found


def all_declared() -> dict[str, Declared | TramontaneError]:
    """What each backend declares, or why that of another package does not load, by name."""
    found: dict[str, Declared | TramontaneError] = {}
    for name in names():
        try:
            found[name] = declared(name)
        except TramontaneError as error:
            found[name] = error
    return found


def those_that(can: Callable[[Declared], bool]) -> list[str]:
    """The names of the backends of which that is true. One that does not load counts as one that cannot."""
    return [name for name, one in all_declared().items() if isinstance(one, Declared) and can(one)]


def _added() -> dict[str, EntryPoint]:
    return _added_by(tuple((place, _changed(place)) for place in sys.path))


@lru_cache(maxsize=1)
def _added_by(places: tuple[tuple[str, int], ...]) -> dict[str, EntryPoint]:
    """The entry points of what is installed in those places, as it was when they were last changed: to read them takes
    as long as a refusal may."""
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in BUILT_IN}


def _changed(place: str) -> int:
    try:
        return os.stat(place or ".").st_mtime_ns
    except OSError:  # a place that is not there, or inside an archive
        return 0


def _is_name(front: str) -> bool:
    return front in BUILT_IN or (_NAME.fullmatch(front) is not None and front in _added())


def _own_options(given: Mapping[str, Any], chosen: Declared) -> dict[str, Any]:
    """The options by the backend's own names. Raises InvalidRequest for one that it has not, or that is given twice."""
    own: dict[str, Any] = {}
    for told, value in given.items():
        name = told if told in chosen.options else ALIASES.get(told, told)
        if name not in chosen.options:
            raise InvalidRequest(told, f"the {chosen.name} backend has no such option", _options_of(chosen, name))
        if value is None:
            continue
        if name in own:
            raise InvalidRequest(told, f"{name} is already given under another name", "Give one of them.")
        own[name] = value
    return own


def _options_of(chosen: Declared, wanted: str) -> str:
    elsewhere = those_that(lambda one: wanted in one.options)
    if elsewhere:
        return f"Leave it out, or use a backend that has it: {', '.join(elsewhere)}."
    return f"Options are: {', '.join(sorted(chosen.options)) or 'none'}; besides, all sampling fields."


def _template(given: str | Path | None) -> str | None:
    if not isinstance(given, Path):
        return given
    try:
        return given.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest("chat_template", f"cannot read {given}: {error}") from error
