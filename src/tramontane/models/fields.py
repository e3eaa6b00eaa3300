"""Reading a checkpoint's settings: typed, ranged, and refused by key where they are not what they must be.

Owns the checks of single values. Must not know: which keys a family has or what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from tramontane.errors import CorruptCheckpoint, UnsupportedModel

SIZE = 1 << 24
"""No width, head count or vocabulary of a sound model reaches this."""
POSITIONS = (1 << 31) - 1
"""Positions are int32."""


class Fields:
    """A mapping from outside, read by key. `source` names it in errors, `prefix` stands before every key.

    A key that is absent, or null, takes its default; without one it is missing, and the checkpoint corrupt.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        source: str,
        prefix: str = "",
        names: Mapping[str, str] = {},
        defaults: Mapping[str, Any] = {},
    ) -> None:
        """`names`: key -> what the mapping calls it (or calls it too); `defaults`: of keys, before those of a read."""
        self.values = values
        self.source = source
        self.prefix = prefix
        self.names = names
        self.defaults = defaults

    def told(self, names: Mapping[str, str] = {}, defaults: Mapping[str, Any] = {}, **more: Any) -> Fields:
        """The same mapping, read with these names and defaults as well."""
        merged = {**self.names, **names}, {**self.defaults, **defaults, **more}
        return Fields(self.values, self.source, self.prefix, *merged)

    def changed(self, **values: Any) -> Fields:
        """The same mapping with other values."""
        return Fields({**self.values, **values}, self.source, self.prefix, self.names, self.defaults)

    def corrupt(self, key: str, problem: str) -> CorruptCheckpoint:
        """The error for this key, to be raised by the caller."""
        return CorruptCheckpoint(self.source, f"{self._name(key)} {problem}", "Correct the value or fetch it again.")

    def unsupported(self, key: str, remedy: str = "") -> UnsupportedModel:
        """The error for a sound value that this build does not honour."""
        name = self._name(key)
        return UnsupportedModel(
            f"{self.source} sets {name} to {_shown(self.values.get(name))}, which this build does not have.",
            remedy or "Use another model.",
        )

    def stated(self, key: str) -> bool:
        """Whether the mapping has the key, null or not."""
        return self._name(key) in self.values

    def get(self, key: str) -> Any:
        value = self.values.get(self._name(key))
        return self.defaults.get(key) if value is None else value

    def _name(self, key: str) -> str:
        """What the mapping calls the key."""
        other = self.names.get(key)
        plain = self.prefix + key
        return plain if other is None or (plain in self.values and other not in self.values) else other

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = SIZE) -> int:
        value = self._or_default(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.corrupt(key, f"is {_shown(value)}, not an integer from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None, low: float = 0.0, high: float = 1e12) -> float:
        """A finite number above `low`, at most `high`."""
        value = self._or_default(key, default)
        if type(value) not in (int, float) or not low < value <= high or not math.isfinite(value):
            raise self.corrupt(key, f"is {_shown(value)}, not a number above {low:g} and at most {high:g}")
        return float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of numbers, each as in `number`."""
        values = self.get(key)
        if not isinstance(values, list) or len(values) > SIZE:
            raise self.corrupt(key, f"is {_shown(values)}, not a list of numbers")
        return tuple(Fields({key: value}, self.source).number(key) for value in values)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._or_default(key, default)
        if type(value) is not bool:
            raise self.corrupt(key, f"is {_shown(value)}, not a boolean")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._or_default(key, default)
        if not isinstance(value, str):
            raise self.corrupt(key, f"is {_shown(value)}, not a string")
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self._or_default(key, {})
        if not isinstance(value, Mapping):
            raise self.corrupt(key, f"is {_shown(value)}, not an object")
        return value

    def only(self, **expected: Any) -> None:
        """Refuse each key that is present with another value than the only one this build honours."""
        for key, value in expected.items():
            if self.get(key) is not None and self.get(key) != value:
                raise self.unsupported(key)

    def known(self, keys: Iterable[str]) -> None:
        """Refuse every key below the prefix that is not among these: what is not understood cannot be honoured."""
        known = set(keys)
        for key in self.values:
            name = key[len(self.prefix) :]
            if key.startswith(self.prefix) and name not in known and self.values[key] is not None:
                raise self.unsupported(name)

    def _or_default(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.corrupt(key, "is missing")
        return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
