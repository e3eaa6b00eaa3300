"""The backend over a scripted wheel: texts, ends, failures, many at once, and what is left when it is closed."""

from __future__ import annotations

import asyncio
import logging
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Told
from typing import Any

import pytest

from tests.backends.mistralrs.conftest import Open
from tests.backends.mistralrs.fake import Panic, Script, Wheel, call, chunk, spoken
from tramontane.backends.base import AdapterHost, Backend, Embedder, Tokenizing
from tramontane.backends.mistralrs.backend import MistralRSBackend
from tramontane.errors import (
    ContextLengthExceeded,
    EngineClosed,
    InvalidRequest,
    ModelNotFound,
    OutOfMemory,
    RequestTimeout,
    TramontaneError,
)
from tramontane.llm import LLM
from tramontane.types import Chunk, EmbedRequest, Message, Request, SamplingParams, Tool

IDS = (71, 72)
"""The tokens of "hi"."""


def ask(backend: MistralRSBackend, request: Request | None = None, **sampling: Any) -> list[Chunk]:
    asked = request or Request(prompt="hi", sampling=SamplingParams(**sampling))

    async def read() -> list[Chunk]:
        return [chunk async for chunk in backend.generate(asked)]

    return asyncio.run(read())


def text(chunks: list[Chunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


def listed(*chunks: Any) -> Script:
    def script(_: dict[str, Any]) -> Iterator[Any]:
        for one in chunks:
            if isinstance(one, BaseException):
                raise one
            yield one

    return script


def test_it_is_a_backend_with_abilities(opened: Open) -> None:
    backend, _ = opened()
    for protocol in (Backend, Tokenizing, Embedder, AdapterHost):
        assert isinstance(backend, protocol)
    assert backend.capabilities().context_length == 160
    assert backend.tokenize("hi") == [256, *IDS]
    assert backend.detokenize([256, *IDS]) == "hi"


def test_a_model_of_the_hub_is_found_by_our_own_loader(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here first, without a network; the wheel gets a folder of this machine and asks nobody."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    home, commit = tmp_path / "models--org--tiny", "a" * 40
    shutil.copytree(checkpoint, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    wheel = Wheel(checkpoint)
    monkeypatch.setitem(sys.modules, "mistralrs", wheel)  # type: ignore[arg-type]
    with LLM.from_backend(MistralRSBackend("org/tiny")) as llm:
        assert wheel.opened["which"].kwargs["model_id"] == str(home / "snapshots" / commit)
        assert wheel.opened["token_source"] == "none"
        assert llm.generate("hi").text == " Hello"
        assert llm.capabilities().model == "org/tiny"


def test_an_answer_has_its_first_space_its_tokens_and_one_end(opened: Open) -> None:
    chunks = ask(opened(spoken(" hi"))[0])
    assert text(chunks) == " hi"
    assert chunks[0].prompt_ids == (256, *IDS)
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 3
    assert [id_ for chunk in chunks for id_ in chunk.token_ids] == [220, *IDS]


@pytest.mark.parametrize(
    ("chunks", "wanted"),
    [
        ([chunk("", b"\n"), chunk("\n", b"\n"), chunk("a", b"a")], "\n\na"),
        ([chunk("", b"\xf0\x9f"), chunk("", b"\x8e"), chunk("\U0001f389", b"\x89")], "\U0001f389"),
        ([chunk("Paris", b" Paris"), chunk(" x", b" x")], " Paris x"),
        ([chunk("", None), chunk("a", b"a")], "a"),  # a special token, which the wheel does not show
    ],
)
def test_white_space_before_the_first_word(opened: Open, chunks: list[Any], wanted: str) -> None:
    assert text(ask(opened(listed(*chunks, chunk("", finish="stop")))[0])) == wanted


def test_stop_strings_end_the_wheels_work(opened: Open) -> None:
    backend, wheel = opened(spoken("one, two, three", finish="length"))
    chunks = ask(backend, stop=["two"])
    assert (text(chunks), chunks[-1].finish_reason, chunks[-1].stop_reason) == ("one, ", "stop", "two")
    assert text(ask(backend, stop=["two"], include_stop=True)) == "one, two"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len("one, two")
    assert "stop_seqs" not in wheel.asked[0]  # it would stop at some occurrences and not at others


def test_stop_tokens(opened: Open) -> None:
    backend, wheel = opened(spoken("abc"))
    chunks = ask(backend, stop_token_ids=[65])
    assert (text(chunks), chunks[-1].stop_reason) == ("a", 65)
    assert text(ask(backend, stop_token_ids=[65], include_stop=True)) == "ab"
    wheel.script = listed(chunk("a", b"a"), chunk("", finish="stop", stop_sequence="<|end|>"))
    chunks = ask(backend, stop_token_ids=[259])
    assert wheel.asked[-1]["stop_seqs"] == ["<|end|>"]
    assert (text(chunks), chunks[-1].stop_reason) == ("a", 259)
    assert text(ask(backend, stop_token_ids=[259], include_stop=True)) == "a<|end|>"


def test_logprobs(opened: Open) -> None:
    top = ((IDS[0], -0.2, "h"), (IDS[1], -1.5, "i"))
    told = [chunk("i", b"i", logprob=-1.5, top=top), chunk("z", b"z", logprob=-9.0, top=top), chunk("", finish="stop")]
    backend, wheel = opened(listed(*told))
    reports = [report for chunk in ask(backend, logprobs=2) for report in chunk.logprobs]
    assert [(r.token_id, r.text, r.logprob, r.rank) for r in reports] == [(IDS[1], "i", -1.5, 2), (89, "z", -9.0, 0)]
    assert reports[0].top == ((IDS[0], "h", -0.2), (IDS[1], "i", -1.5))
    assert wheel.asked[0]["top_logprobs"] == 2
    assert all(not chunk.logprobs for chunk in ask(backend))


def test_tool_calls_and_reasoning(opened: Open) -> None:
    told = [
        chunk(None, b"x", reasoning="hmm"),
        chunk(None, finish="tool_calls", calls=[call("weather", '{"city": "Oslo"}'), call("time", "{}")]),
    ]
    chunks = ask(opened(listed(*told))[0])
    assert "".join(chunk.reasoning for chunk in chunks) == "hmm"
    calls = [call for chunk in chunks for call in chunk.tool_calls]
    assert [(call.index, call.id, call.name, call.arguments) for call in calls] == [
        (0, "call-1", "weather", '{"city": "Oslo"}'),
        (1, "call-1", "time", "{}"),
    ]
    assert chunks[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("pieces", "finish", "wanted"),
    [
        (["so: <", "tool", "_call>\n", None], "tool_calls", "so: "),
        (["a <", "b, <tool_call>{", "x"], "stop", "a <b, <tool_call>{x"),
        (["1 < 2", " <tool"], "length", "1 < 2 <tool"),
    ],
)
def test_what_begins_a_call_is_no_text(opened: Open, pieces: list[str | None], finish: str, wanted: str) -> None:
    calls = [call("weather", "{}")] if finish == "tool_calls" else None
    told = [chunk(piece, (piece or "{").encode()) for piece in pieces]
    backend, _ = opened(listed(*told, chunk(None, finish=finish, calls=calls)))
    request = Request(messages=(Message("user", "hi"),), tools=(Tool("weather"),))
    assert text(ask(backend, request)) == wanted


def test_choices_echo_and_no_tokens(opened: Open) -> None:
    backend, wheel = opened(spoken("ok"))
    chunks = ask(backend, n=3, echo=True)
    assert [text(chunks, i) for i in range(3)] == ["hiok"] * 3
    assert [chunk.prompt_ids is not None for chunk in chunks].count(True) == 1
    assert len(wheel.asked) == 3  # the wheel fails at several choices of one request
    none = ask(backend, max_tokens=0, n=2)
    assert [(chunk.finish_reason, chunk.text) for chunk in none] == [("length", "")] * 2
    assert len(wheel.asked) == 3


def test_one_chunk_where_streaming_is_off(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRALRS_NO_STREAM", "1")
    chunks = ask(opened(spoken("hello"))[0], n=2)
    assert [(chunk.index, chunk.text, chunk.finish_reason) for chunk in chunks] == [
        (0, "hello", "stop"),
        (1, "hello", "stop"),
    ]


@pytest.mark.parametrize("failure", [ValueError("broken\n   0: <candle>::bt"), Panic("index out of bounds")])
def test_a_failure_in_the_middle_ends_that_answer_and_the_next_one_works(opened: Open, failure: BaseException) -> None:
    backend, wheel = opened(listed(chunk("a", b"a"), failure))
    chunks = ask(backend)
    assert (text(chunks), chunks[-1].finish_reason) == ("a", "error")
    assert isinstance(chunks[-1].error, TramontaneError)
    assert "bt" not in str(chunks[-1].error)
    assert chunks[-1].error.__class__ is TramontaneError
    with pytest.raises(TramontaneError, match=r"broken|panicked"):
        LLM.from_backend(backend).generate("hi")
    wheel.script = spoken("fine")
    assert text(ask(backend)) == "fine"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("Prompt sequence length is greater than 160, perhaps", ContextLengthExceeded),
        ("Received an empty prompt.", InvalidRequest),
        ("Invalid grammar. unclosed group", InvalidRequest),
        ("adapter alias `x` is not registered.", InvalidRequest),
        ("CUDA_ERROR_OUT_OF_MEMORY", OutOfMemory),
    ],
)
def test_what_the_wheel_refuses_is_refused(opened: Open, words: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        ask(opened(listed(ValueError(words)))[0])


def test_an_end_without_a_reason_is_a_failure(opened: Open) -> None:
    chunks = ask(opened(listed(chunk("a", b"a")))[0])
    assert chunks[-1].finish_reason == "error"
    assert [chunk.finish_reason for chunk in ask(opened(listed())[0])] == ["error"]


def test_many_threads_never_meet_the_wheels_borrowing(opened: Open) -> None:
    backend, _ = opened(lambda asked: spoken(asked["messages"][0]["content"] * 2)(asked))
    llm = LLM.from_backend(backend)

    def one(i: int) -> str:
        llm.tokenize(f"text {i}")
        return llm.generate(f"<{i}>").text

    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(one, range(48))) == [f"<{i}>" * 2 for i in range(48)]

    async def together() -> list[list[Chunk]]:
        async def read(i: int) -> list[Chunk]:
            return [chunk async for chunk in backend.generate(Request(prompt=f"<{i}>"))]

        return await asyncio.gather(*(read(i) for i in range(32)))

    assert [text(chunks) for chunks in asyncio.run(together())] == [f"<{i}>" * 2 for i in range(32)]


def endless(gate: threading.Event | None = None) -> Script:
    def script(_: dict[str, Any]) -> Iterator[Any]:
        yield chunk("a", b"a")
        while True:
            if gate is not None:
                gate.wait(10)
            yield chunk("b", b"b")

    return script


def test_leaving_gives_up_the_wheels_stream(opened: Open) -> None:
    backend, wheel = opened(endless())

    async def leave() -> None:
        stream = backend.generate(Request(prompt="hi"))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    for thread in [t for t in threading.enumerate() if t.name == "tramontane-mistralrs"]:
        thread.join(10)
    assert wheel.closed_streams == 1
    wheel.script = spoken("next")
    assert text(ask(backend)) == "next"


def test_a_request_ends_when_its_time_is_over(opened: Open) -> None:
    gate = threading.Event()
    backend, _ = opened(endless(gate))
    chunks = ask(backend, Request(prompt="hi", timeout=0.2, sampling=SamplingParams(n=2)))
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["error", "error"]
    assert isinstance(chunks[-1].error, RequestTimeout)
    gate.set()


def test_closing_ends_what_is_open(opened: Open) -> None:
    backend, _ = opened(endless())

    async def read() -> list[Chunk]:
        seen = []
        async for one in backend.generate(Request(prompt="hi")):
            if not seen:
                threading.Thread(target=backend.close).start()
            seen.append(one)
        return seen

    assert asyncio.run(read())[-1].finish_reason == "cancelled"
    backend.close()
    with pytest.raises(EngineClosed):
        ask(backend)
    with pytest.raises(EngineClosed):
        backend.tokenize("x")


def test_the_wheels_log_is_ours(opened: Open, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    with caplog.at_level(logging.INFO, "tramontane.mistralrs"):
        opened()
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("WARNING", "mistralrs_core::x: loading")]
    assert capfd.readouterr().out == "plain\n"


def test_adapters(opened: Open, tmp_path: Any) -> None:
    backend, wheel = opened(adapters={})
    backend.load_adapter("mine", tmp_path)
    assert backend.adapters() == ["a", "b"]
    backend.load_adapter("taken", tmp_path, replace=True)
    for wrong in (lambda: backend.load_adapter("taken", tmp_path), lambda: backend.unload_adapter("x")):
        with pytest.raises(InvalidRequest, match="adapter"):
            wrong()
    with pytest.raises(ModelNotFound):
        backend.load_adapter("x", tmp_path / "nothing")
    ask(backend, Request(prompt="hi", adapter="mine"))
    assert wheel.asked[-1]["adapter"] == "mine"
    llm = LLM.from_backend(backend)
    for asking in (lambda: llm.generate("hi", adapter="a"), lambda: llm.chat([Message("user", "hi")], adapter="a")):
        asking()
        assert wheel.asked[-1]["adapter"] == "a"
    llm.generate("hi")
    assert wheel.asked[-1]["adapter"] is None
    assert llm.adapters() == ["a", "b"]
    plain, _ = opened()
    with pytest.raises(InvalidRequest, match="adapters="):
        ask(plain, Request(prompt="hi", adapter="mine"))
    assert plain.adapters() == []


def test_quantizing_anew_needs_quantization(opened: Open) -> None:
    with pytest.raises(InvalidRequest, match="quantization"):
        opened()[0].requantize("Q4K")


def test_embeddings(opened: Open) -> None:
    backend, _ = opened(kind="embedding")
    assert backend.capabilities().embeds

    def embed(**fields: Any) -> Any:
        return asyncio.run(backend.embed(replace(EmbedRequest(("one", IDS)), **fields)))

    assert [one.vector for one in embed()] == [(0.6, 0.8, 0.0)] * 2
    assert [one.usage.prompt_tokens for one in embed()] == [4, 2]
    assert embed(dimensions=1)[0].vector == (1.0,)
    for name, value in (("pooling", "mean"), ("prompt_name", "query"), ("normalize", False), ("dimensions", 9)):
        with pytest.raises(InvalidRequest) as caught:
            embed(**{name: value})
        assert caught.value.field == name
    assert embed(inputs=("x" * 200,))[0].truncated
    with pytest.raises(ContextLengthExceeded):
        embed(inputs=("x" * 200,), truncate=False)


def test_usage_tells_what_was_cached(opened: Open) -> None:
    usage = Told(prompt_tokens=5, completion_tokens=1, prompt_tokens_details=Told(cached_tokens=4))
    chunks = ask(opened(listed(chunk("a", b"a", "length", usage=usage)))[0])
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.cached_tokens == 4
