"""Text and where it ends: greedy answers, stops, lengths, seeds, choices, and each sampling field by itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.backends.conformance.subjects import EXAMPLES, PROMPT, Subject
from tramontane.backends.base import REQUEST_FIELDS
from tramontane.errors import InvalidRequest
from tramontane.inputs import SAMPLING_FIELDS
from tramontane.types import Message, Request, Tool

HALF = "�"
"""What an answer cut in the middle of a character ends with."""


def test_greedy_answers_repeat(subject: Subject) -> None:
    first = subject.ask()
    assert first.text
    assert first.finish_reason in ("length", "stop")
    assert subject.ask().text == first.text
    assert subject.ask(top_k=1, temperature=1.0).text == first.text


@pytest.mark.parametrize("field", ["top_p", "min_p"])
def test_the_narrowest_choice_is_greedy(subject: Subject, field: str) -> None:
    narrow = {"top_p": 1e-6, "min_p": 1.0}[field]
    assert subject.ask(temperature=1.0, **{field: narrow}).text == subject.ask().text


@pytest.mark.parametrize("field", sorted(SAMPLING_FIELDS))
def test_each_field_is_honoured_or_refused_by_name(subject: Subject, field: str) -> None:
    assert subject.ask(**{field: EXAMPLES[field]}).finish_reason in ("stop", "length")


@pytest.mark.parametrize("field", sorted(REQUEST_FIELDS))
def test_each_field_of_a_request_is_known_or_refused_by_name(subject: Subject, field: str) -> None:
    if field in subject.can.request_fields:
        return  # each has tests of its own
    tools = (Tool("wind"),)
    values = {"tools": tools, "tool_choice": "none", "thinking": True, "reasoning_effort": "low", "priority": 1}
    value = values.get(field, "someone")
    request = replace(Request(messages=(Message("user", "Hi"),)), **{field: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest) as caught:
        subject.first(request)
    assert caught.value.field == field
    pytest.skip(f"refused by capability: {field}")


# ---- stops


def middle(subject: Subject, length: int = 4) -> tuple[str, str, int]:
    """The greedy answer, a piece from its middle, and where that first occurs."""
    text = subject.ask().text.rstrip(HALF)
    assert len(text) > 2 * length, text
    piece = text[len(text) // 2 : len(text) // 2 + length]
    return text, piece, text.index(piece)


def test_a_stop_string_ends_the_answer_before_it(subject: Subject) -> None:
    text, stop, at = middle(subject)
    result = subject.ask(stop=(stop,))
    assert (result.text, result.finish_reason, result.choices[0].stop_reason) == (text[:at], "stop", stop)


def test_a_stop_string_is_kept_where_asked(subject: Subject) -> None:
    text, stop, at = middle(subject)
    assert subject.ask(stop=(stop,), include_stop=True).text == text[: at + len(stop)]


def test_of_several_stop_strings_the_first_to_be_complete_ends(subject: Subject) -> None:
    text, stop, at = middle(subject)
    result = subject.ask(stop=(text[at : at + len(stop) + 2], stop, "never to be seen"))
    assert (result.text, result.choices[0].stop_reason) == (text[:at], stop)


def test_what_might_have_become_a_stop_string_comes_out(subject: Subject) -> None:
    text = subject.ask().text
    result = subject.ask(stop=(text.rstrip(HALF)[-4:] + "never to be seen", "never to be seen"))
    assert (result.text, result.finish_reason) == (text, subject.ask().finish_reason)


def test_a_stop_token_ends_the_answer(subject: Subject) -> None:
    ids = subject.ask().token_ids
    if not ids and "stop_token_ids" in subject.can.sampling_fields:
        pytest.fail("it honours stop_token_ids and tells no ids")
    stop = ids[len(ids) // 2] if ids else 3
    result = subject.ask(stop_token_ids=(stop,))
    assert result.token_ids == ids[: ids.index(stop) + 1]
    assert (result.finish_reason, result.choices[0].stop_reason) == ("stop", stop)


# ---- lengths


def test_max_tokens(subject: Subject) -> None:
    whole, short = subject.ask(), subject.ask(max_tokens=5)
    assert (short.finish_reason, subject.chunks(subject.request(max_tokens=5))[-1].finish_reason) == ("length",) * 2
    assert whole.text.startswith(short.text.rstrip(HALF))
    assert len(short.text) < len(whole.text)
    assert short.usage.completion_tokens == 5


def test_no_tokens_at_all(subject: Subject) -> None:
    result = subject.ask(max_tokens=0)
    assert (result.text, result.finish_reason, result.usage.completion_tokens) == ("", "length", 0)
    assert result.usage.prompt_tokens > 0


def test_min_tokens_hold_off_the_end(subject: Subject) -> None:
    subject.needs("min_tokens", "stop_token_ids")
    first = subject.ask().token_ids[0]
    assert subject.ask(stop_token_ids=(first,)).usage.completion_tokens == 1
    assert subject.ask(stop_token_ids=(first,), min_tokens=6).usage.completion_tokens >= 6


def test_the_end_is_ignored_where_asked(subject: Subject) -> None:
    result = subject.ask(ignore_eos=True, max_tokens=120)
    assert (result.finish_reason, result.usage.completion_tokens) == ("length", 120)


def test_the_end_of_the_context_is_an_end(subject: Subject) -> None:
    if subject.can.context_length > 1000:
        pytest.skip("the context is long")
    result = subject.ask(ignore_eos=True, max_tokens=None)
    assert result.finish_reason == "length"
    more = 1 if subject.name == "mistralrs" else 0  # the wheel draws one token that it could not read any more
    assert result.usage.total_tokens == subject.can.context_length + more


# ---- seeds and choices


def test_a_seed_repeats_and_others_differ(subject: Subject) -> None:
    texts = [subject.ask(seed=seed, temperature=1.0, top_p=1.0, top_k=0).text for seed in range(6)]
    assert [subject.ask(seed=seed, temperature=1.0, top_p=1.0, top_k=0).text for seed in range(6)] == texts
    assert len(set(texts)) > 1


def test_choices(subject: Subject) -> None:
    result = subject.ask(n=3, seed=5, temperature=1.0)
    assert [choice.index for choice in result.choices] == [0, 1, 2]
    assert len({choice.text for choice in result.choices}) > 1
    assert result.text == subject.ask(seed=5, temperature=1.0).text
    again = subject.ask(n=3, seed=5, temperature=1.0)
    assert [choice.text for choice in again.choices] == [choice.text for choice in result.choices]


def test_echo_puts_the_prompt_before_the_answer(subject: Subject) -> None:
    assert subject.ask(echo=True).text == PROMPT + subject.ask().text


# ---- what bends probabilities


def test_a_bias_forbids_and_forces(subject: Subject) -> None:
    subject.needs("logit_bias")
    first = subject.ask().token_ids[0]
    assert subject.ask(logit_bias={first: -math.inf}).token_ids[0] != first
    other = first + 1 if first else 1
    assert subject.ask(logit_bias={other: 1000.0}, max_tokens=3, ignore_eos=True).token_ids == (other,) * 3


@pytest.mark.parametrize(
    ("field", "value"), [("repetition_penalty", 100.0), ("presence_penalty", 2.0), ("frequency_penalty", 2.0)]
)
def test_penalties_are_against_what_was_said(subject: Subject, field: str, value: float) -> None:
    subject.needs(field)
    if not subject.thinks:
        pytest.skip("a script is certain")
    forced = {"logit_bias": {40: 1.5}} if "logit_bias" in subject.can.sampling_fields else {}
    plain = subject.ask(max_tokens=40, ignore_eos="ignore_eos" in subject.can.sampling_fields or None, **forced)
    bent = subject.ask(max_tokens=40, ignore_eos=bool(forced) or None, **forced, **{field: value})
    assert repeated(bent.token_ids or bent.text) <= repeated(plain.token_ids or plain.text)


def repeated(items: object) -> int:
    """How many of them were there before."""
    listed = list(items)  # type: ignore[call-overload]
    return len(listed) - len(set(listed))


def test_a_processor_has_the_last_word(subject: Subject) -> None:
    def only(prompt: object, output: object, logits: object) -> object:
        row = logits.copy()  # type: ignore[attr-defined]
        row[:] = -1e9
        row[40] = 0.0
        return row

    result = subject.ask(logits_processors=(only,), max_tokens=4)
    assert result.token_ids == (40,) * 4
