"""`dataclass` for the frozen classes of this package, which are quick to make: importing us makes more than a hundred.

Of six methods the standard library's decorator compiles for each class, this one compiles the constructor alone; the
others read the fields. Instances behave alike, and so do `fields`, `replace` and `asdict`. Must not know: any class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import MISSING, Field, FrozenInstanceError
from operator import attrgetter
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any

__all__ = ["dataclass"]


def _dataclass(cls: type | None = None, /, *, frozen: bool = False, eq: bool = True) -> Any:
    if cls is None:
        return lambda cls: _dataclass(cls, frozen=frozen, eq=eq)
    if not frozen:
        return dataclasses.dataclass(eq=eq)(cls)
    own, told = vars(cls), cls.__doc__
    methods = {"__repr__": _repr, "__setattr__": _refuse, "__delattr__": _refuse_deleting}
    made: type = dataclasses.dataclass(init=False, repr=False, eq=False)(cls)
    made.__doc__ = told  # else a signature that this one has not
    methods["__init__"] = _constructor(made)
    if eq:
        methods |= _comparison([field.name for field in dataclasses.fields(made) if field.compare])
    for name, method in methods.items():
        if name not in own:
            setattr(made, name, method)
    return made


def _constructor(cls: Any) -> Callable[..., None]:
    """`__init__`, compiled: it is called often, and takes arguments by name and place."""
    names: dict[str, Any] = {"__name__": cls.__module__, "set_": object.__setattr__, "missing_": MISSING}
    fields = dataclasses.fields(cls)
    lines = [f"set_(self, {field.name!r}, {_value(field, names)})" for field in fields]
    lines += ["self.__post_init__()"] if hasattr(cls, "__post_init__") else []
    head = ", ".join(["self", *(_parameter(field, names) for field in fields)])
    exec(f"def __init__({head}):\n " + "\n ".join(lines or ["pass"]), names)
    made: Callable[..., None] = names["__init__"]
    made.__qualname__ = f"{cls.__qualname__}.__init__"
    made.__annotations__ = {field.name: field.type for field in fields} | {"return": None}
    return made


def _parameter(field: Field[Any], names: dict[str, Any]) -> str:
    if field.default is not MISSING:
        names[f"default_{field.name}"] = field.default
        return f"{field.name}=default_{field.name}"
    return field.name if field.default_factory is MISSING else f"{field.name}=missing_"


def _value(field: Field[Any], names: dict[str, Any]) -> str:
    if field.default_factory is MISSING:
        return field.name
    names[f"make_{field.name}"] = field.default_factory
    return f"make_{field.name}() if {field.name} is missing_ else {field.name}"


def _comparison(names: list[str]) -> dict[str, Callable[..., Any]]:
    """`__eq__` and `__hash__` of what has these fields."""
    get = attrgetter(*names) if names else lambda self: ()
    values = get if len(names) != 1 else lambda self: (get(self),)

    def equal(self: object, other: object) -> bool:
        return values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented

    def hashed(self: object) -> int:
        return hash(values(self))

    return {"__eq__": equal, "__hash__": hashed}


@recursive_repr()
def _repr(self: Any) -> str:
    shown = [field.name for field in dataclasses.fields(self) if field.repr]
    return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


def _refuse(self: object, name: str, value: object) -> None:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_deleting(self: object, name: str) -> None:
    raise FrozenInstanceError(f"cannot delete field {name!r}")


if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass  # what checkers know
else:
    dataclass = _dataclass
