"""Our `dataclass` against the standard library's: the same class bodies, made by both, behave alike."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, field
from typing import Any

import numpy as np
import pytest

from tramontane.records import dataclass

Make = Callable[..., Any]


def point(make: Make) -> Any:
    @make(frozen=True)
    class Point:
        """A place."""

        x: int
        y: float = 0.5
        names: list[str] = field(default_factory=list)
        secret: str = field(default="", repr=False)
        note: object = field(default=None, compare=False)

        def __post_init__(self) -> None:
            if self.x < 0:
                raise ValueError("x")

    return Point


def single(make: Make) -> Any:
    @make(frozen=True)
    class Single:
        value: Any

        def __hash__(self) -> int:
            return 7

    return Single


def same(make: Make) -> Any:
    @make(frozen=True, eq=False)
    class Same:
        value: int = 1

    return Same


def changing(make: Make) -> Any:
    @make
    class Changing:
        value: int = 1

    return Changing


def empty(make: Make) -> Any:
    @make(frozen=True)
    class Empty:
        pass

    return Empty


@dataclass(frozen=True)
class Pickled:
    value: int
    rest: tuple[int, ...] = ()


def outcome(act: Callable[[], object]) -> object:
    try:
        return act()
    except (TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


BODIES = [point, single, same, changing, empty]


@pytest.mark.parametrize("body", BODIES)
def test_what_describes_a_class_is_the_same(body: Callable[[Make], Any]) -> None:
    ours, theirs = body(dataclass), body(dataclasses.dataclass)
    assert [(f.name, f.type, f.default) for f in dataclasses.fields(ours)] == [
        (f.name, f.type, f.default) for f in dataclasses.fields(theirs)
    ]
    parameters = [inspect.signature(one).parameters.values() for one in (ours, theirs)]
    assert [[(p.name, p.kind, p.annotation) for p in one] for one in parameters[:1]] == [
        [(p.name, p.kind, p.annotation) for p in one] for one in parameters[1:]
    ]
    assert ours.__init__.__qualname__ == theirs.__init__.__qualname__
    assert ours.__match_args__ == theirs.__match_args__


@pytest.mark.parametrize(
    ("body", "arguments", "named"),
    [
        (point, (1,), {}),
        (point, (1, 2.0, ["a"]), {"note": 3, "secret": "s"}),
        (point, (), {"x": 4, "y": 1}),
        (single, ("v",), {}),
        (single, ((1, [2]),), {}),
        (same, (), {}),
        (changing, (3,), {}),
        (empty, (), {}),
    ],
)
def test_instances_behave_alike(body: Callable[[Make], Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    made = []
    for cls in (body(dataclass), body(dataclasses.dataclass)):
        one, again = cls(*arguments, **named), cls(*arguments, **named)
        first = next(iter(dataclasses.fields(cls)), None)
        acts: list[Callable[[], object]] = [
            lambda one=one, again=again: hash(one) == hash(again),  # type: ignore[misc]
            lambda one=one: setattr(one, "value", 1),  # type: ignore[misc]
            lambda one=one: delattr(one, "x"),  # type: ignore[misc]
        ]
        other = dataclasses.replace(one, **{first.name: 9}) if first else one
        outcomes = [outcome(act) for act in acts]
        made.append((repr(one), one == again, one != again, one == 1, outcomes, dataclasses.asdict(other)))
        assert other == copy.deepcopy(other) or body is same
    ours, theirs = made
    assert ours == theirs


def test_mistaken_calls_and_what_a_class_refuses() -> None:
    for cls in (point(dataclass), point(dataclasses.dataclass)):
        for arguments, named, error in (((), {}, TypeError), ((1,), {"z": 2}, TypeError), ((-1,), {}, ValueError)):
            with pytest.raises(error):
                cls(*arguments, **named)
        assert cls(1).names is not cls(1).names
        assert cls(1, note=1) == cls(1, note=2)
    with pytest.raises(TypeError, match="order"):
        dataclass(order=True)  # what is not there


def test_fields_that_are_arrays_are_compared_as_they_are() -> None:
    array, cls = np.arange(3), single(dataclass)
    assert cls(array) == cls(array)  # the same one, as in a tuple


def test_pickles_and_copies() -> None:
    one = Pickled(1, (2,))
    assert pickle.loads(pickle.dumps(one)) == copy.copy(one) == one
    assert hash(one) == hash(Pickled(1, (2,)))
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'value'"):
        one.value = 2  # type: ignore[misc]


def test_a_documented_class_keeps_its_words_and_another_has_none() -> None:
    assert point(dataclass).__doc__ == "A place."
    assert empty(dataclass).__doc__ is None
