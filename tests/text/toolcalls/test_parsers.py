"""Parsers of calls and reasoning against published answers, however they are cut."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.toolcalls.samples import SAMPLES, TOOLS, Sample, same
from tramontane.text.reasoning import KINDS, read_reasoning
from tramontane.text.toolcalls.formats import FORMATS
from tramontane.text.toolcalls.output import Output
from tramontane.text.toolcalls.parser import AnswerParser
from tramontane.text.toolcalls.reader import Reader, Reading
from tramontane.types import ToolCall, ToolCallDelta


class Said:
    """All that a parser gave out, checked as it comes."""

    def __init__(self) -> None:
        self.text = self.reasoning = ""
        self.calls: list[ToolCall] = []

    def add(self, text: str, reasoning: str, calls: Iterable[ToolCallDelta]) -> None:
        self.text += text
        self.reasoning += reasoning
        for delta in calls:
            if delta.index == len(self.calls):
                assert delta.id
                assert delta.name
                self.calls.append(ToolCall(delta.id, delta.name, delta.arguments))
            else:  # of the last call: calls never mix
                assert delta.index == len(self.calls) - 1
                assert delta.id is None
                assert delta.name is None
                last = self.calls[-1]
                self.calls[-1] = ToolCall(last.id, last.name, last.arguments + delta.arguments)


def parser(format_: str, kind: str | None = None, opened: bool = False, single: bool = False) -> AnswerParser:
    numbers = count()

    def read(reader: Reader, out: Output) -> Reading[None]:
        if kind is not None:
            yield from read_reasoning(reader, out, KINDS[kind], opened)
        yield from FORMATS[format_].parse(reader, out, TOOLS)

    return AnswerParser(read, Output(lambda: f"id{next(numbers)}", single))


def read(pieces: Iterable[str], by: AnswerParser) -> Said:
    said = Said()
    for text in pieces:
        piece = by.push(text)
        said.add(piece.text, piece.reasoning, piece.calls)
    piece = by.push("", ended=True)
    said.add(piece.text, piece.reasoning, piece.calls)
    return said


def of(sample: Sample, single: bool = False) -> AnswerParser:
    return parser(sample.format, sample.kind, sample.opened, single)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: f"{s.format}-{s.written[:30]}")
@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_published_answers(sample: Sample, size: int) -> None:
    pieces = [sample.written[i : i + size] for i in range(0, len(sample.written), size)]
    said = read(pieces, of(sample))
    assert [call.name for call in said.calls] == [name for name, _ in sample.calls]
    for call, (_, wanted) in zip(said.calls, sample.calls, strict=True):
        assert same(call.arguments, wanted)
    assert said.text == sample.text
    assert said.reasoning == sample.reasoning
    assert len({call.id for call in said.calls}) == len(said.calls)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_text_says_the_same_however_it_is_cut(data: st.DataObject) -> None:
    sample = data.draw(st.sampled_from(SAMPLES))
    marks = [*FORMATS[sample.format].marks, "[TOOL_CALLS]", "```json", "</think>", "(", "{", '"', "]", "}", "\\"]
    scrap = st.one_of(st.sampled_from(marks), st.text("ab \n{}[]\"'\\,:()1", max_size=6))
    written = "".join(data.draw(st.lists(scrap, max_size=3))) + sample.written
    at = data.draw(st.integers(0, len(written)))
    written = written[:at] + "".join(data.draw(st.lists(scrap, max_size=3))) + written[at:]
    written = written[: data.draw(st.integers(0, len(written) * 2))]
    single = data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(written)), max_size=12)))
    pieces = [written[a:b] for a, b in zip([0, *cuts], [*cuts, len(written)], strict=True)]
    whole, cut, chars = (read(p, of(sample, single)) for p in ([written], pieces, written))
    assert (whole.text, whole.reasoning, whole.calls) == (cut.text, cut.reasoning, cut.calls)
    assert (whole.text, whole.reasoning, whole.calls) == (chars.text, chars.reasoning, chars.calls)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.text("abc <>|_{}[]\"'\n:,", max_size=60))
def test_nothing_of_what_is_no_call_is_lost(format_: str, written: str) -> None:
    said = read(written, parser(format_))
    if not said.calls:
        assert said.text == written


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_arguments_that_are_whole_parse(data: st.DataObject) -> None:
    leaf = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()
    )
    values = st.recursive(
        leaf, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3), max_leaves=8
    )
    arguments = data.draw(st.dictionaries(st.text(min_size=1), values, max_size=4))
    written = json.dumps(arguments, ensure_ascii=data.draw(st.booleans()))
    said = read(f'<tool_call>\n{{"name": "add", "arguments": {written}}}\n</tool_call>', parser("hermes"))
    assert json.loads(said.calls[0].arguments) == arguments


def test_names_come_first_and_arguments_as_they_come() -> None:
    by = parser("hermes")
    assert by.push('<tool_call>\n{"name": "add", "argum').calls == ()
    (first,) = by.push('ents": {"numbers": [1,').calls
    assert (first.name, first.arguments) == ("add", '{"numbers": [1,')
    (second,) = by.push(" 2]").calls
    assert (second.name, second.arguments) == (None, " 2]")
    (third,) = by.push("}}\n</tool_call>").calls
    assert third.arguments == "}"


def test_arguments_that_break_off_are_kept_as_they_are() -> None:
    said = read(['<tool_call>{"name": "add", "arguments": {"x": oops}}</tool_call>!'], parser("hermes"))
    assert said.calls[0].arguments == '{"x": oops}}'
    assert said.text == "!"


def test_raw_line_breaks_in_strings_become_escapes() -> None:
    said = read(['{"name": "add", "parameters": {"x": "a\nb\t"}}'], parser("llama3"))
    assert json.loads(said.calls[0].arguments) == {"x": "a\nb\t"}


def test_names_that_cannot_be_written_are_none() -> None:
    for name in ("\\ud800", "a\\nb", " ", ""):
        written = f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>'
        assert read([written], parser("hermes")).text == written


def test_one_call_at_most() -> None:
    for sample in SAMPLES:
        said = read(sample.written, of(sample, single=True))
        assert [call.name for call in said.calls] == [name for name, _ in sample.calls[:1]]
    by = parser("hermes", single=True)
    by.push('<tool_call>{"name": "add"}')
    assert by.done
    assert by.push("more").text == ""


def test_a_call_that_the_end_cuts_off_is_not_the_one_made() -> None:
    seen = 0
    for sample in SAMPLES:
        written = "".join(sample.written)
        ways = [(_done(sample, written[:n]), _done(sample, written[:n], ended=True)) for n in range(len(written) + 1)]
        assert all(open_ == ended for open_, ended in ways)
        seen += ways[-1][0]
    assert seen > 5


def _done(sample: Sample, written: str, ended: bool = False) -> bool:
    by = of(sample, single=True)
    by.push(written, ended)
    return by.done


def test_mistrals_ids_are_kept_and_made() -> None:
    said = read(["[TOOL_CALLS]get_time[CALL_ID]abc123XYZ[ARGS]{}[TOOL_CALLS]get_time[ARGS]{}"], parser("mistral_args"))
    assert said.calls[0].id == "abc123XYZ"
    made = FORMATS["mistral"].ids()
    assert len(made) == 9
    assert made.isalnum()
    assert FORMATS["hermes"].ids() != FORMATS["hermes"].ids()


def test_long_answers_take_linear_time() -> None:
    """A hundred thousand pieces: quadratic work would take minutes."""
    by = parser("hermes")
    text = "".join(by.push("word < ").text for _ in range(100_000)) + by.push("", ended=True).text
    assert len(text) == 700_000
