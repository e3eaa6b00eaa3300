"""When Python looks for garbage among a command's objects: not while it starts.

What starts makes some hundred thousand objects that stay, and a tenth of a start went to looking through them.
"""

from __future__ import annotations

import gc

__all__ = ["look_again", "put_off"]

_USUAL = gc.get_threshold()
_MANY = 1 << 20
"""Objects that may be made before Python looks: more than a start makes, few enough for what never calls it over."""


def put_off() -> None:
    """The process starts."""
    gc.set_threshold(_MANY)


def look_again() -> None:
    """The process has started, where it said that it does: what it has made by now is never looked at again."""
    if gc.get_threshold()[0] == _MANY:
        gc.freeze()
        gc.set_threshold(*_USUAL)
