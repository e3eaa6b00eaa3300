"""StopMatcher against a search of the whole text, however the text is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tramontane.errors import InvalidRequest
from tramontane.text.stops import StopMatcher


def oracle(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The stop completed first, the longest of several completed together."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end if include else end - len(stop)], stop


@settings(max_examples=1000)
@given(
    text=st.text("abc🙂", max_size=40),
    stops=st.lists(st.text("abc🙂", min_size=1, max_size=6), max_size=4),
    cuts=st.lists(st.integers(0, 40), max_size=10),
    include=st.booleans(),
)
def test_equals_a_search_of_the_whole(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    matcher = StopMatcher(stops, include)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    shown, found = "", None
    for start, end in itertools.pairwise(edges):
        safe, found = matcher.push(text[start:end])
        shown += safe
        expected, _ = oracle(text, stops, include)
        assert expected.startswith(shown)
        if found:
            assert matcher.push("abc") == ("", found)
            break
    assert (shown + matcher.flush(), found) == oracle(text, stops, include)


def test_holds_back_only_what_may_become_a_stop() -> None:
    matcher = StopMatcher(["</s>", "STOP"])
    assert matcher.push("text</") == ("text", None)
    assert matcher.push("b> ST") == ("</b> ", None)
    assert matcher.push("OP and more") == ("", "STOP")
    assert matcher.flush() == ""


def test_flush_gives_what_was_held_and_starts_anew() -> None:
    matcher = StopMatcher(["abab"])
    assert matcher.push("xaba") == ("x", None)
    assert matcher.flush() == "aba"
    assert matcher.push("b") == ("b", None)


def test_no_stops_holds_nothing() -> None:
    assert StopMatcher([]).push("anything") == ("anything", None)


def test_empty_stop_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="stop"):
        StopMatcher(["a", ""])
