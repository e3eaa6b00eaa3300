"""Chunks: streaming equals not streaming, one final chunk a choice, usage, log probabilities."""

from __future__ import annotations

import pytest

from tests.backends.conformance.subjects import PROMPT, Subject
from tramontane.types import Message

TALK = (Message("system", "Be brief."), Message("user", "Which wind is cold?"))


def test_a_stream_is_the_answer_in_pieces(subject: Subject) -> None:
    result, chunks = subject.ask(), subject.chunks(subject.request())
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert tuple(id_ for chunk in chunks for id_ in chunk.token_ids) == result.token_ids
    assert chunks[-1].finish_reason == result.finish_reason
    assert len({chunk.request_id for chunk in chunks}) == 1


def test_each_choice_ends_once_with_its_usage(subject: Subject) -> None:
    many = {"n": 3, "seed": 1, "temperature": 1.0} if {"n", "seed"} <= subject.can.sampling_fields else {}
    chunks = subject.chunks(subject.request(**many))
    for index in range(3 if many else 1):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert [chunk.finish_reason is not None for chunk in own] == [False] * (len(own) - 1) + [True]
        usage = own[-1].usage
        assert usage is not None
        assert usage.prompt_tokens > 0
        assert 0 < usage.completion_tokens <= 24
        assert usage.completion_tokens == sum(len(chunk.token_ids) for chunk in own) or not own[0].token_ids
        assert all(chunk.usage is None for chunk in own[:-1])
        assert all(chunk.error is None for chunk in own)


def test_the_prompt_is_told_once(subject: Subject) -> None:
    chunks = subject.chunks(subject.request())
    told = [chunk.prompt_ids for chunk in chunks if chunk.prompt_ids is not None]
    expected = tuple(subject.tokenizer.tokenize(PROMPT))
    assert told == [expected]
    assert chunks[0].prompt_ids is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == len(expected)


# ---- log probabilities


def test_logprobs_of_a_greedy_answer_are_those_of_the_likeliest(subject: Subject) -> None:
    result = subject.ask(logprobs=3)
    infos = result.choices[0].logprobs
    assert len(infos) == result.usage.completion_tokens
    assert not result.token_ids or tuple(info.token_id for info in infos) == result.token_ids
    for info in infos:
        assert info.logprob <= 0
        assert info.rank == 1
        assert info.top[0] == (info.token_id, info.text, info.logprob)
        assert [logprob for _, _, logprob in info.top] == sorted((p for _, _, p in info.top), reverse=True)
        assert len(info.top) == (3 if subject.thinks else 1)
    assert result.text == subject.ask().text


def test_logprobs_without_alternatives(subject: Subject) -> None:
    result = subject.ask(logprobs=0, max_tokens=3)
    assert [info.top for info in result.choices[0].logprobs] == [()] * 3


def test_a_prompt_is_scored_as_the_answer_was(subject: Subject) -> None:
    subject.needs("prompt_logprobs", "logprobs")
    answer = subject.ask(logprobs=0)
    prompt = subject.tokenizer.tokenize(PROMPT)
    request = subject.request(ids=[*prompt, *answer.token_ids], prompt_logprobs=2, max_tokens=0)
    scored = subject.answer(request).prompt_logprobs
    assert scored is not None
    assert len(scored) == len(prompt) + len(answer.token_ids)
    assert scored[0] is None
    found = [info.logprob for info in scored[1:] if info is not None]
    assert len(found) == len(scored) - 1
    if subject.thinks:
        generated = [info.logprob for info in answer.choices[0].logprobs]
        assert found[len(prompt) - 1 :] == pytest.approx(generated, abs=0.05)


# ---- prompts


def test_a_conversation_goes_through_the_template(subject: Subject) -> None:
    if not subject.can.chat:
        pytest.skip("the model has no chat template")
    result = subject.answer(subject.request(messages=TALK))
    assert result.text == subject.answer(subject.request(messages=TALK)).text
    rendered = subject.tokenizer.render(TALK)  # type: ignore[attr-defined]
    assert "Which wind is cold?" in rendered
    ids = subject.tokenizer.tokenize(rendered, add_special_tokens=False)
    whole = tuple(ids) if subject.thinks else result.prompt_ids
    assert result.usage.prompt_tokens == len(whole)
    if "echo" not in subject.can.sampling_fields or result.prompt_ids:
        assert result.prompt_ids == whole
        assert subject.answer(subject.request(ids=whole)).text == result.text


TEXTS = ("naïve café", "風が強い。", "ريح الشمال", "👩‍👩‍👧‍👦🙂", "x\u030c\u0301 and \u200d", "tab\tand\nline", "  two")


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_is_a_prompt_and_comes_back(subject: Subject, text: str) -> None:
    subject.ask(text, max_tokens=4)
    ids = subject.tokenizer.tokenize(text, add_special_tokens=False)
    assert subject.tokenizer.detokenize(ids).lstrip(" ") == text.lstrip(" ")


def test_the_text_is_that_of_the_tokens(subject: Subject) -> None:
    """However a character is spread over tokens."""
    request = subject.request("風", max_tokens=40, ignore_eos=True) if subject.thinks else subject.request()
    result = subject.answer(request)
    whole = subject.tokenizer.detokenize([*result.prompt_ids, *result.token_ids])
    assert whole.endswith(result.text)
    assert "".join(chunk.text for chunk in subject.chunks(request)) == result.text


def test_a_long_prompt(subject: Subject) -> None:
    longest = min(subject.can.context_length, 700)
    words = subject.tokenizer.tokenize("wind and snow " * longest)[: longest - 8]
    result = subject.answer(subject.request(ids=words, max_tokens=4))
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (longest - 8, 4)
    assert result.text == subject.answer(subject.request(ids=words, max_tokens=4)).text
