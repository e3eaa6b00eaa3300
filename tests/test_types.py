"""The data of the front door: ranges named, natural spellings taken, defaults in order, picklable."""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from tramontane.errors import ContextLengthExceeded, InvalidRequest
from tramontane.types import (
    SAMPLING_DEFAULTS,
    AudioPart,
    Chunk,
    ImagePart,
    Message,
    Request,
    SamplingParams,
    Score,
    TextPart,
    Usage,
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("seed", 2**64),
        ("seed", "x"),
        ("n", 0),
        ("n", 10**400),
        ("logprobs", -1),
        ("prompt_logprobs", 1001),
        ("min_tokens", -1),
        ("max_tokens", -1),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 5),
        ("stop", [5]),
        ("stop_token_ids", "ab"),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {4.2: 1.0}),
        ("logit_bias", {"x": 1.0}),
        ("logit_bias", {1: "x"}),
        ("logit_bias", {1: 10**400}),
        ("logit_bias", {1: 1e39}),
        ("logit_bias", {1: -1e39}),
        ("logit_bias", [1, 2]),
        ("typical_p", 0.0),
        ("typical_p", 1.1),
        ("xtc_probability", 1.1),
        ("xtc_threshold", -0.1),
        ("dry_multiplier", -1),
        ("dry_base", 0.5),
        ("dry_allowed_length", 0),
        ("dry_range", -1),
        ("dry_sequence_breakers", [""]),
        ("dry_sequence_breakers", 3),
        ("bad_words", [()]),
        ("bad_words", [[1, "x"]]),
        ("bad_words", [1]),
        ("bad_words", [[True]]),
        ("best_of", 0),
        ("beam_width", 0),
        ("length_penalty", "long"),
        ("early_stopping", "soon"),
        ("early_stopping", 1),
        ("allowed_token_ids", ()),
        ("allowed_token_ids", [-1]),
        ("allowed_token_ids", ["x"]),
        ("logits_processors", 3),
        ("logits_processors", [3]),
        ("include_stop", 1),
        ("ignore_eos", "yes"),
        ("echo", 0),
        ("skip_special_tokens", "no"),
    ],
)
def test_what_is_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.field == name


def test_edges_are_in_range() -> None:
    SamplingParams(temperature=0, top_k=0, top_p=1, min_p=1, repetition_penalty=0.01, presence_penalty=-2, seed=-1)
    SamplingParams(temperature=100.0, top_k=10**400, frequency_penalty=2, seed=2**64 - 1, n=1, max_tokens=1)


def test_natural_spellings_are_taken() -> None:
    def processor(prompt_ids: Any, output_ids: Any, logits: Any) -> Any:
        return logits

    params = SamplingParams(
        stop="end",  # type: ignore[arg-type]
        stop_token_ids=7,  # type: ignore[arg-type]
        logit_bias={"5": -math.inf, 6: 1},  # type: ignore[dict-item]
        logits_processors=processor,  # type: ignore[arg-type]
    )
    assert params.stop == ("end",)
    assert params.stop_token_ids == (7,)
    assert params.logit_bias == {5: -math.inf, 6: 1.0}
    assert params.logits_processors == (processor,)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    words = SamplingParams(bad_words=["one", [1, 2]], dry_sequence_breakers="\n")  # type: ignore[arg-type,list-item]
    assert words.bad_words == ("one", (1, 2))
    assert words.dry_sequence_breakers == ("\n",)


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    with pytest.raises(InvalidRequest, match="min_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)
    with pytest.raises(InvalidRequest, match="min_tokens"):
        SamplingParams(max_tokens=4).over(SamplingParams(min_tokens=5))


def test_the_best_are_not_more_than_there_are() -> None:
    for name in ("best_of", "beam_width"):
        with pytest.raises(InvalidRequest) as caught:
            SamplingParams(n=3, **{name: 2})
        assert caught.value.field == name
        SamplingParams(n=2, **{name: 2})
    SamplingParams(n=3, beam_width=1)


def test_what_is_set_goes_over_defaults_even_when_empty_or_zero() -> None:
    over = SamplingParams(temperature=0.0, stop=(), echo=False).over(
        SamplingParams(temperature=0.7, stop=("x",), echo=True, top_k=5)
    )
    assert (over.temperature, over.stop, over.echo, over.top_k, over.n) == (0.0, (), False, 5, None)


def test_the_defaults_leave_open_only_what_has_no_value() -> None:
    open_fields = {f.name for f in fields(SamplingParams) if getattr(SAMPLING_DEFAULTS, f.name) is None}
    assert open_fields == {
        *("allowed_token_ids", "best_of", "logit_bias", "seed", "logprobs", "prompt_logprobs"),
        *("max_tokens", "grammar"),
    }


def test_a_request_asks_for_one_thing() -> None:
    with pytest.raises(InvalidRequest, match="exactly one"):
        Request()
    with pytest.raises(InvalidRequest, match="exactly one"):
        Request(prompt="a", prompt_ids=(1,))
    with pytest.raises(InvalidRequest) as caught:
        Request(prompt="a", template_kwargs={"x": 1})
    assert caught.value.field == "template_kwargs"


def test_messages_are_checked() -> None:
    message = Message("user", (TextPart("see "), ImagePart("a.png"), TextPart("this"), AudioPart("b.wav")))
    assert message.text == "see this"
    with pytest.raises(InvalidRequest, match="role"):
        Message("robot")  # type: ignore[arg-type]
    for content in (None, 5, ["a"], ("a",)):
        with pytest.raises(InvalidRequest, match="content"):
            Message("user", content)  # type: ignore[arg-type]


def test_all_is_frozen_and_picklable() -> None:
    request = Request(messages=(Message("user", "hi"),), sampling=SamplingParams(stop=("x",), logit_bias={1: 2.0}))
    assert pickle.loads(pickle.dumps(request)) == request
    chunk = Chunk("r", finish_reason="error", usage=Usage(3, 4), error=ContextLengthExceeded(9, 8))
    assert str(pickle.loads(pickle.dumps(chunk)).error) == str(chunk.error)
    assert Usage(3, 4).total_tokens == 7
    with pytest.raises(FrozenInstanceError):
        request.prompt = "x"  # type: ignore[misc]


def test_score_sums_what_was_scored() -> None:
    score = Score((1, 2, 3), (None, -1.0, -3.0))
    assert score.total == -4.0
    assert score.perplexity == pytest.approx(math.exp(2.0))
    with pytest.raises(InvalidRequest, match="fewer than two"):
        _ = Score((1,), (None,)).perplexity
