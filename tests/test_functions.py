"""Functions as tools: transformers' own reading of signatures and docstrings is the reference."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Optional

import pytest

from tramontane import NamedTool, Tool
from tramontane.errors import InvalidRequest
from tramontane.functions import choice_of, tool_of, tools_of


def search(query: str, limit: int, tags: list[str], exact: bool = False, unit: Literal["a", "b"] = "a") -> str:
    """Search the archive
    for documents.

    Args:
        query: What to look for,
            in plain words.
        limit: How many.
        tags: All of these.
        exact: Word by word.
        unit: Which one.

    Returns:
        The documents.
    """
    return query


def scale(x: float, by: dict[str, float]) -> float:
    """Scale.

    Args:
        x: A number.
        by: Factors.
    """
    return x


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@pytest.mark.parametrize("function", [search, scale])
def test_schemas_are_those_of_transformers(function: Any) -> None:
    utils = pytest.importorskip("transformers.utils", reason="transformers is the reference")
    theirs = utils.get_json_schema(function)["function"]
    ours = tool_of(function)
    assert (ours.name, ours.description) == (theirs["name"], " ".join(theirs["description"].split()))
    assert ours.parameters == theirs["parameters"]


def test_what_is_beyond_transformers() -> None:
    def paint(
        colour: Colour,
        where: Annotated[str, "A room."],
        layers: Optional[int] = None,  # noqa: UP045 - as users write it
        mixed: int | str = 1,
        parts: Sequence[Any] = (),
    ) -> None:
        """Paint."""

    # its annotations name what is local to this module
    tool = tool_of(paint)
    assert tool.parameters == {
        "type": "object",
        "properties": {
            "colour": {"type": "string", "enum": ["red", "blue"]},
            "where": {"type": "string", "description": "A room."},
            "layers": {"type": "integer"},
            "mixed": {"type": ["integer", "string"]},
            "parts": {"type": "array", "items": {}},
        },
        "required": ["colour", "where"],
    }


def test_what_cannot_be_a_tool_is_refused() -> None:
    def untyped(x):  # type: ignore[no-untyped-def]
        return x

    def starred(*names: str) -> None: ...
    def odd(x: complex) -> None: ...

    for function, words in ((untyped, "no type"), (starred, "cannot be given by name"), (odd, "no JSON Schema")):
        with pytest.raises(InvalidRequest, match=words):
            tool_of(function)
    for given in ({"type": "web_search"}, {"name": ""}, {"name": "f", "extra": 1}, 3, {"name": "f", "parameters": "x"}):
        with pytest.raises(InvalidRequest, match="tools"):
            tools_of([given])  # type: ignore[list-item]
    with pytest.raises(InvalidRequest, match="not a list"):
        tools_of({"name": "f"})  # type: ignore[arg-type]


def test_spellings() -> None:
    inner = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    wanted = Tool("f", "d", {"type": "object"}, strict=True)
    assert tools_of([wanted, inner, {"type": "function", "function": inner}]) == (wanted,) * 3
    assert choice_of({"type": "function", "function": {"name": "f"}}) == NamedTool("f")
    assert [choice_of(word) for word in ("auto", "none", "required")] == ["auto", "none", "required"]
    with pytest.raises(InvalidRequest, match="tool_choice"):
        choice_of("any")
