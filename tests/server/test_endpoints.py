"""/v1/completions, /v1/embeddings, /v1/rerank, /tokenize, /detokenize, and bodies that are no JSON."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
from pydantic import ValidationError

from tests.server.live import HELLO, Live, events, live
from tests.server.scripted import Scripted, says
from tramontane.backends.mock import BOS_ID, PROMPT_LOGPROB, MockBackend, hashed
from tramontane.server.schemas.completions import CompletionReply, CompletionRequest
from tramontane.server.schemas.reading import EmbeddingsReply, RerankReply
from tramontane.server.schemas.tokens import TokenizeReply
from tramontane.server.wire import decode, encode


def refused(answer: Any, param: str | None) -> None:
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


# ---- completions


def test_prompts_in_every_form(mock: Live) -> None:
    ids = [ord(char) for char in "ab"]
    for prompt, count in (("ab", 1), (ids, 1), (["ab", "c"], 2), ([ids, ids, ids], 3)):
        choices = mock.complete(prompt=prompt, max_tokens=3, echo=True).json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(count))
        assert choices[0]["text"] == "abThe"


def test_sixteen_tokens_unless_told_otherwise() -> None:
    with live(MockBackend("x" * 100)) as server:
        for body, length in (({}, 16), ({"max_tokens": None}, 16), ({"max_tokens": 20}, 20), ({"max_tokens": 0}, 0)):
            assert server.complete(**body).json()["usage"]["completion_tokens"] == length


def test_streams_of_several_prompts_keep_their_indices() -> None:
    def answer(request: Any) -> Any:
        return says(f"to {request.prompt}")

    with live(Scripted(answer, pause=0.001)) as server:
        texts, ends = {}, []
        options = {"include_usage": True}
        *chunks, last = events(server.complete(prompt=["a", "b", "c"], stream=True, stream_options=options).text)
        assert last == "[DONE]"
        for chunk in map(json.loads, chunks):
            CompletionReply.model_validate(chunk, strict=True)
            for choice in chunk["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
                ends += [choice["index"]] * (choice["finish_reason"] == "stop")
    assert texts == {0: "to a", 1: "to b", 2: "to c"}
    assert sorted(ends) == [0, 1, 2]
    usage = json.loads(chunks[-1])
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12
    assert usage["usage"]["prompt_tokens"] == 9


def test_one_prompt_that_fails_ends_all() -> None:
    def answer(request: Any) -> Any:
        if request.prompt == "b":
            raise ValueError("no")
        return says("x" * 1000)

    backend = Scripted(answer, pause=0.001)
    with live(backend) as server:
        assert server.complete(prompt=["a", "b"]).status_code == 500
        assert server.service.open_requests == 0
    assert backend.open == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 2])
def test_echo_with_logprobs_is_what_harnesses_score_by(mock: Live, stream: bool, max_tokens: int) -> None:
    body = {"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": max_tokens, "n": 2, "stream": stream}
    answer = mock.complete(**body)
    assert answer.status_code == 200, answer.text
    if stream:
        lists: list[dict[str, list[Any]]] = [{}, {}]
        for chunk in map(json.loads, events(answer.text)[:-1]):
            (choice,) = chunk["choices"]
            for name, values in choice["logprobs"].items():
                lists[choice["index"]].setdefault(name, []).extend(values)
    else:
        CompletionReply.model_validate(answer.json(), strict=True)
        lists = [choice["logprobs"] for choice in answer.json()["choices"]]
    generated = list("Th")[:max_tokens]
    for logprobs in lists:
        assert logprobs["tokens"] == [chr(BOS_ID), "a", "b", *generated]
        assert logprobs["token_logprobs"] == [None, PROMPT_LOGPROB, PROMPT_LOGPROB, *(0.0 for _ in generated)]
        assert logprobs["top_logprobs"][:2] == [None, {"a": PROMPT_LOGPROB}]
        assert logprobs["text_offset"] == list(range(3 + max_tokens))


def test_completions_refuse_by_name(mock: Live) -> None:
    for body, param in (
        ({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of"), ({"logprobs": 21}, "logprobs"),
        ({"prompt": []}, "prompt"), ({"guided_regex": "a"}, "guided_regex"),
        ({"prompt": [[]]}, "prompt[0]"), ({"prompt": [1, "a"]}, "prompt[1]"), ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [2**31 - 1]}, "prompt"), ({"prompt": None}, "prompt"), ({"echo": "yes"}, "echo"),
        ({"messages": HELLO}, "messages"), ({"stream_options": {}}, "stream_options"),
    ):  # fmt: skip
        refused(mock.complete(**body), param)
    refused(mock.post("/v1/completions", {}), "prompt")
    assert mock.complete(suffix="", best_of=1, logprobs=None, user="u").status_code == 200


# ---- embeddings and ranking


def test_embeddings(mock: Live) -> None:
    floats = mock.post("/v1/embeddings", {"input": "a", "model": "mock", "user": "u"})
    packed = mock.post("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"})
    EmbeddingsReply.model_validate(floats.json(), strict=True)
    EmbeddingsReply.model_validate(packed.json(), strict=True)
    (one,) = floats.json()["data"]
    raw = base64.b64decode(packed.json()["data"][0]["embedding"])
    assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(one["embedding"], abs=1e-6)
    assert len(one["embedding"]) == len(hashed("a"))
    assert [entry["index"] for entry in packed.json()["data"]] == [0, 1]
    assert floats.json()["usage"] == {"prompt_tokens": 2, "total_tokens": 2}


def test_embeddings_of_token_ids_in_few_dimensions(mock: Live) -> None:
    by_text = mock.post("/v1/embeddings", {"input": "ab", "dimensions": 4}).json()
    by_ids = mock.post("/v1/embeddings", {"input": [97, 98], "dimensions": 4}).json()
    several = mock.post("/v1/embeddings", {"input": [[97, 98], [97]], "dimensions": 4}).json()
    assert len(by_text["data"][0]["embedding"]) == 4
    assert by_text["data"] == by_ids["data"] == several["data"][:1]


def test_texts_are_not_cut_unless_asked() -> None:
    with live(MockBackend(context_length=10)) as server:
        answer = server.post("/v1/embeddings", {"input": "x" * 50})
        refused(answer, "input")
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert server.post("/v1/embeddings", {"input": "x" * 50, "truncate": True}).status_code == 200
        documents = {"query": "a", "documents": ["x" * 50]}
        assert server.post("/v1/rerank", documents).status_code == 400
        assert server.post("/v1/rerank", {**documents, "truncate": True}).status_code == 200


def test_embeddings_refuse_by_name(mock: Live) -> None:
    for body, param in (
        ({"encoding_format": "int8"}, "encoding_format"), ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 99}, "dimensions"), ({"input": []}, "input"), ({"input": None}, "input"),
        ({"input": [["a"]]}, "input[0][0]"),
        ({"prompt_name": "query"}, "prompt_name"), ({"odd": 1}, "odd"),
    ):  # fmt: skip
        refused(mock.post("/v1/embeddings", {"input": "a", **body}), param)


def test_ranking(mock: Live) -> None:
    documents = ["nothing", {"text": "the wind blows"}, "wind"]
    answer = mock.post("/v1/rerank", {"query": "the wind", "documents": documents, "top_n": 2})
    RerankReply.model_validate(answer.json(), strict=True)
    assert [(one["index"], one["document"]["text"]) for one in answer.json()["results"]] == [
        (1, "the wind blows"),
        (2, "wind"),
    ]
    bare = mock.post("/v1/rerank", {"query": "the wind", "documents": documents, "return_documents": False})
    assert all("document" not in one for one in bare.json()["results"])
    assert [one["relevance_score"] for one in bare.json()["results"]] == [1.0, 0.5, 0.0]
    refused(mock.post("/v1/rerank", {"query": "a", "documents": []}), "documents")


def test_a_model_that_cannot_says_so() -> None:
    with live(Scripted(says("hi"))) as server:
        for path, body in (
            ("/v1/embeddings", {"input": "a"}),
            ("/v1/rerank", {"query": "a", "documents": ["b"]}),
            ("/tokenize", {"prompt": "a"}),
            ("/detokenize", {"tokens": [1]}),
        ):
            answer = server.post(path, body)
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "unsupported_by_model"


# ---- tokens


def test_tokens_there_and_back(mock: Live) -> None:
    answer = mock.post("/tokenize", {"prompt": "ab", "return_token_strs": True}).json()
    TokenizeReply.model_validate(answer, strict=True)
    assert answer == {
        "count": 3,
        "max_model_len": 4096,
        "tokens": [BOS_ID, 97, 98],
        "token_strs": [chr(BOS_ID), "a", "b"],
    }
    bare = mock.post("/tokenize", {"prompt": "ab", "add_special_tokens": False}).json()
    assert bare["tokens"] == [97, 98]
    assert bare["token_strs"] is None
    assert mock.post("/detokenize", {"tokens": [97, 98]}).json() == {"prompt": "ab"}
    chat = mock.post("/tokenize", {"messages": HELLO}).json()["tokens"]
    assert mock.post("/detokenize", {"tokens": chat}).json() == {"prompt": "user: Hello\nassistant: "}
    assert mock.chat().json()["usage"]["prompt_tokens"] == len(chat) + 1  # the mock puts a beginning in front


def test_tokens_refuse_by_name(mock: Live) -> None:
    refused(mock.post("/tokenize", {}), "prompt")
    refused(mock.post("/tokenize", {"prompt": "a", "messages": HELLO}), "prompt")
    refused(mock.post("/tokenize", {"prompt": "a", "chat_template_kwargs": {"x": 1}}), "chat_template_kwargs")
    refused(mock.post("/tokenize", {"messages": HELLO, "chat_template_kwargs": {"x": 1}}), "chat_template_kwargs")
    refused(mock.post("/detokenize", {"tokens": [2**31 - 1]}), "tokens")
    refused(mock.post("/detokenize", {"tokens": ["a"]}), "tokens[0]")


# ---- bodies

MALFORMED = [
    b"{", b"", b"null", b"[]", b'"text"', b"\xff\xfe", b"\xef\xbb\xbf{}", b'{"prompt": "\xff"}', b'{"prompt": NaN}',
    b'{"prompt": "a", "seed": Infinity}', b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"a":' * 100_000,
    b'{"prompt": "a", "logit_bias": ' + b"[" * 150 + b"]" * 150 + b"}", b'{"prompt": "\\ud800"}', b'{"\\udfff": 1}',
    b'{"prompt": ' + b"[" + b"[]," * 120_000 + b"[]]}", b'{"prompt": ["a"' + b',"a"' * 120_000 + b"]}",
    b'{"prompt": "a"} {}', b'{"prompt": "a",}', b"{'prompt': 'a'}", b'{"prompt": "a" "b"}',
]  # fmt: skip


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: repr(body[:40]))
def test_what_is_no_json_is_refused_and_harms_nobody(mock: Live, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize"):
        answer = mock.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["message"]
    assert mock.complete().status_code == 200


@pytest.mark.parametrize("text", ["[{," * 200_000, '"' * 400_000, '\\"' * 200_000, "\\" * 400_001, "[" * 300_000 + '"'])
def test_what_a_text_holds_is_no_part_of_the_json(text: str) -> None:
    body = encode({"prompt": text, "ids": [*range(100_000)]})
    assert decode(body)["prompt"] == text


@pytest.mark.parametrize(
    "extra",
    [
        {"prompt": [0.5] * 10_000}, {"prompt": [["a"]] * 10_000}, {"prompt": ["a", *[1] * 10_000]},
        {"stop": [1] * 10_000}, {"bad_words": [""] * 10_000}, {f"x{i}": 1 for i in range(10_000)},
        {"logit_bias": {f"x{i}": 1 for i in range(10_000)}}, {"stream_options": {f"x{i}": 1 for i in range(10_000)}},
    ],
    ids=lambda extra: next(iter(extra)),
)  # fmt: skip
def test_a_thousand_mistakes_are_complained_of_once(extra: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"prompt": "a", **extra})
    assert caught.value.error_count() < 10


def test_whole_surrogate_pairs_are_characters(mock: Live) -> None:
    body = b'{"prompt": "\\ud83d\\ude00", "echo": true, "max_tokens": 0}'
    answer = mock.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.json()["choices"][0]["text"] == "\U0001f600"


def test_paths_and_methods_that_are_not_there(mock: Live) -> None:
    assert mock.get("/v1/nothing").status_code == 404
    assert mock.get("/v1/nothing").json()["error"]["code"] == "not_found"
    wrong = mock.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["code"] == "method_not_allowed"
