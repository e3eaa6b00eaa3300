"""MockBackend: what it documents, as a backend that anything above can be tested with."""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace
from typing import Any

import pytest

from tramontane.backends.base import Backend, Embedder, HasStats, Reranker, Tokenizing
from tramontane.backends.mock import BOS_ID, PROMPT_LOGPROB, MockBackend
from tramontane.errors import ContextLengthExceeded, EngineClosed, InvalidRequest, RequestTimeout, TramontaneError
from tramontane.gather import joined_calls
from tramontane.types import Chunk, ImagePart, Message, Request, SamplingParams, Tool


def collect(backend: MockBackend, request: Request) -> list[Chunk]:
    async def read() -> list[Chunk]:
        return [chunk async for chunk in backend.generate(request)]

    return asyncio.run(read())


def ask(backend: MockBackend, prompt: str = "hi", **sampling: Any) -> list[Chunk]:
    return collect(backend, Request(prompt=prompt, sampling=SamplingParams(**sampling)))


def text(chunks: list[Chunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


def test_it_is_a_backend_with_abilities() -> None:
    backend = MockBackend()
    assert isinstance(backend, Backend)
    assert isinstance(backend, Tokenizing)
    assert isinstance(backend, HasStats)
    assert isinstance(backend, Embedder)
    assert isinstance(backend, Reranker)
    assert backend.capabilities().sampling_fields < {f.name for f in fields(SamplingParams)}


def test_the_script_is_the_answer_a_character_a_token() -> None:
    chunks = ask(MockBackend("Salut!"))
    assert [chunk.text for chunk in chunks] == list("Salut!")
    assert [chunk.token_ids for chunk in chunks] == [(ord(char),) for char in "Salut!"]
    assert [chunk.finish_reason for chunk in chunks] == [None] * 5 + ["stop"]
    assert chunks[0].prompt_ids == (BOS_ID, ord("h"), ord("i"))
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 6)
    assert len({chunk.request_id for chunk in chunks}) == 1


def test_scripts_take_turns_and_a_seed_picks() -> None:
    backend = MockBackend(["a", "b", "c"])
    assert [text(ask(backend)) for _ in range(4)] == ["a", "b", "c", "a"]
    assert [text(ask(backend, seed=seed)) for seed in (2, 2, 0)] == ["c", "c", "a"]
    chunks = ask(backend, seed=1, n=3)
    assert [text(chunks, i) for i in range(3)] == ["b", "c", "a"]
    assert [chunk.prompt_ids is not None for chunk in chunks] == [True, False, False]


def test_a_script_can_be_a_function_of_the_request() -> None:
    backend = MockBackend(lambda request: (request.prompt or "").upper())
    assert text(ask(backend, "loud")) == "LOUD"
    with pytest.raises(InvalidRequest, match="script"):
        ask(backend, "")


@pytest.mark.parametrize("script", ["", [], ["a", ""]])
def test_an_empty_script_is_refused(script: Any) -> None:
    with pytest.raises(InvalidRequest, match="script"):
        MockBackend(script)


def test_lengths() -> None:
    backend = MockBackend("abc")
    assert (text(c := ask(backend, max_tokens=2)), c[-1].finish_reason) == ("ab", "length")
    assert (text(c := ask(backend, max_tokens=3)), c[-1].finish_reason) == ("abc", "length")
    assert (text(c := ask(backend, min_tokens=5)), c[-1].finish_reason) == ("abcab", "stop")
    assert (text(c := ask(backend, ignore_eos=True, max_tokens=7)), c[-1].finish_reason) == ("abcabca", "length")
    small = MockBackend("abc", context_length=5)
    assert (text(c := ask(small, ignore_eos=True)), c[-1].finish_reason) == ("ab", "length")


def test_stops() -> None:
    backend = MockBackend("one, two, three")
    chunks = ask(backend, stop=("o, th", "wo"))
    assert (text(chunks), chunks[-1].finish_reason, chunks[-1].stop_reason) == ("one, t", "stop", "wo")
    assert text(ask(backend, stop=("wo",), include_stop=True)) == "one, two"
    assert text(ask(backend, stop=("never",))) == "one, two, three"
    assert text(ask(backend, stop=("o",), min_tokens=5)) == "one, tw"
    chunks = ask(backend, stop_token_ids=(ord(","),))
    assert (text(chunks), chunks[-1].stop_reason, chunks[-1].token_ids) == ("one", ord(","), (ord(","),))
    # what is held back while it may still become a stop string comes out at the end
    assert text(ask(backend, stop=("three!",))) == "one, two, three"


def test_echo_and_logprobs() -> None:
    chunks = ask(MockBackend("xy"), "ab", echo=True, logprobs=1, prompt_logprobs=0)
    assert text(chunks) == "abxy"
    assert [info.logprob for chunk in chunks for info in chunk.logprobs] == [0.0, 0.0]
    assert chunks[0].logprobs[0].top == ((ord("x"), "x", 0.0),)
    of_prompt = chunks[0].prompt_logprobs
    assert of_prompt is not None
    assert [None if info is None else (info.text, info.logprob) for info in of_prompt] == [
        None,
        ("a", PROMPT_LOGPROB),
        ("b", PROMPT_LOGPROB),
    ]
    assert chunks[1].prompt_logprobs is None


def test_defaults_lie_under_the_request() -> None:
    backend = MockBackend("abcdef", sampling=SamplingParams(max_tokens=2))
    assert text(ask(backend)) == "ab"
    assert text(ask(backend, max_tokens=4)) == "abcd"


def test_messages_are_rendered() -> None:
    backend = MockBackend("ok")
    messages = (Message("system", "Be brief."), Message("user", "Hi"))
    assert backend.render(messages) == "system: Be brief.\nuser: Hi\nassistant: "
    chunks = collect(backend, Request(messages=messages))
    assert backend.detokenize(chunks[0].prompt_ids or ()) == backend.render(messages)
    with pytest.raises(InvalidRequest, match="ImagePart"):
        collect(backend, Request(messages=(Message("user", (ImagePart("a.png"),)),)))
    with pytest.raises(InvalidRequest, match="tools"):
        collect(backend, Request(messages=messages, template_kwargs={"tools": []}))


def test_what_it_cannot_do_is_refused_by_name() -> None:
    backend = MockBackend(context_length=10)
    wrong: dict[str, Any] = {"logit_bias": {1: 1.0}, "logits_processors": lambda p, o, x: x}
    for field, value in wrong.items():
        with pytest.raises(InvalidRequest) as caught:
            ask(backend, **{field: value})
        assert caught.value.field == field
        assert field not in backend.capabilities().sampling_fields
    with pytest.raises(ContextLengthExceeded):
        ask(backend, "0123456789")
    with pytest.raises(InvalidRequest, match="no token"):
        collect(backend, Request(prompt_ids=()))
    with pytest.raises(InvalidRequest, match="ids"):
        collect(backend, Request(prompt_ids=(1 << 30,)))
    assert backend.stats().running == 0


def test_failures_end_each_choice_once() -> None:
    backend = MockBackend(["ab", "abcdef"], fail_after=3)
    chunks = ask(backend, n=2)
    ends = {chunk.index: chunk for chunk in chunks if chunk.finish_reason}
    assert text(chunks, 1) == "abc"
    assert (ends[0].finish_reason, ends[1].finish_reason) == ("stop", "error")
    assert isinstance(ends[1].error, TramontaneError)
    assert sum(chunk.finish_reason is not None for chunk in chunks) == 2
    assert (backend.stats().requests_failed, backend.stats().running) == (1, 0)
    assert [chunk.finish_reason for chunk in ask(MockBackend(fail_after=0))] == ["error"]


def test_time_runs_out() -> None:
    backend = MockBackend("abc", delay=3600.0)
    chunks = collect(backend, Request(prompt="x", sampling=SamplingParams(n=2), timeout=0.01))
    assert [(chunk.index, chunk.finish_reason, type(chunk.error)) for chunk in chunks] == [
        (0, "error", RequestTimeout),
        (1, "error", RequestTimeout),
    ]
    assert (backend.stats().requests_failed, backend.stats().running) == (1, 0)


def test_closing_ends_what_is_open_as_cancelled() -> None:
    backend = MockBackend("abc", delay=3600.0)

    async def play() -> list[Chunk]:
        async def read() -> list[Chunk]:
            return [chunk async for chunk in backend.generate(Request(prompt="x", sampling=SamplingParams(n=2)))]

        reading = asyncio.ensure_future(read())
        while not backend.stats().running:
            await asyncio.sleep(0)
        backend.close()
        backend.close()
        return await reading

    chunks = asyncio.run(play())
    assert [(chunk.index, chunk.finish_reason) for chunk in chunks] == [(0, "cancelled"), (1, "cancelled")]
    assert (backend.stats().requests_cancelled, backend.stats().running) == (1, 0)
    with pytest.raises(EngineClosed):
        ask(backend)


def test_leaving_early_cancels() -> None:
    backend = MockBackend("abc")

    async def play() -> None:
        chunks = backend.generate(Request(prompt="x"))
        await chunks.__anext__()
        assert backend.stats().running == 1
        await chunks.aclose()

    asyncio.run(play())
    assert (backend.stats().requests_cancelled, backend.stats().running) == (1, 0)


def test_one_id_runs_once_at_a_time() -> None:
    backend = MockBackend("abc")

    async def play() -> None:
        chunks = backend.generate(Request(prompt="x", id="mine"))
        assert (await chunks.__anext__()).request_id == "mine"
        with pytest.raises(InvalidRequest, match="mine"):
            await backend.generate(Request(prompt="x", id="mine")).__anext__()
        await chunks.aclose()
        assert (await backend.generate(Request(prompt="x", id="mine")).__anext__()).request_id == "mine"

    asyncio.run(play())


def test_tokens_go_round() -> None:
    backend = MockBackend()
    ids = backend.tokenize("où ça ?")
    assert ids[0] == BOS_ID
    assert backend.detokenize(ids) == "où ça ?"
    assert backend.detokenize(ids, skip_special_tokens=False) == "\x02où ça ?"
    assert backend.tokenize("a", add_special_tokens=False) == [ord("a")]


def test_scripts_think_and_call() -> None:
    backend = MockBackend('<think>Hm.</think>So: <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>')
    request = Request(messages=(Message("user", "hi"),), tools=(Tool("f"),))
    chunks = collect(backend, request)
    assert (text(chunks), "".join(chunk.reasoning for chunk in chunks)) == ("So:", "Hm.")
    (call,) = joined_calls(delta for chunk in chunks for delta in chunk.tool_calls)
    assert (call.name, call.arguments) == ("f", '{"x": 1}')
    assert chunks[-1].finish_reason == "tool_calls"
    said = text(collect(backend, replace(request, tool_choice="none")))
    assert said.startswith("So: <tool_call>")
    assert text(collect(backend, Request(prompt="hi"))).startswith("<think>")
    with pytest.raises(InvalidRequest, match="what its script says"):
        collect(backend, replace(request, tool_choice="required"))
