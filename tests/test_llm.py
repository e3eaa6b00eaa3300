"""LLM and AsyncLLM over the mock backend: shapes, order, callbacks, threads, loops, cancellation, errors."""

from __future__ import annotations

import asyncio
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tramontane import (
    LLM,
    AsyncLLM,
    Chunk,
    ContextLengthExceeded,
    EngineClosed,
    InvalidRequest,
    Message,
    Request,
    RequestCancelled,
    Result,
    SamplingParams,
    Score,
    TramontaneError,
    UnsupportedModel,
    Usage,
)
from tramontane.backends.base import Capabilities
from tramontane.backends.mock import BOS_ID, PROMPT_LOGPROB, MockBackend

FOREVER = 3600.0


def shout(request: Request) -> str:
    return (request.prompt or "-").upper()


def until(condition: Callable[[], bool]) -> None:
    """Wait for another thread to get there; a minute means that it never will."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for a minute"
        time.sleep(0.001)


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM.from_backend(MockBackend(shout)) as llm:
        yield llm


class Slow:
    """An LLM whose answers never come, and a way to see what runs."""

    def __init__(self) -> None:
        self.backend = MockBackend("never", delay=FOREVER)
        self.llm = LLM.from_backend(self.backend)

    def running(self, count: int) -> None:
        until(lambda: self.backend.stats().running == count)


# ---- shapes


@pytest.mark.parametrize("on_token", [None, lambda chunk: None], ids=["plain", "callback"])
class TestShapes:
    def test_one_in_one_out(self, llm: LLM, on_token: Any) -> None:
        result = llm.generate("abc", on_token=on_token)
        assert isinstance(result, Result)
        assert (result.text, result.finish_reason) == ("ABC", "stop")
        assert result.prompt_ids == (BOS_ID, *map(ord, "abc"))
        assert result.token_ids == tuple(map(ord, "ABC"))
        assert result.usage == Usage(4, 3)

    def test_a_list_in_a_list_in_order_out(self, llm: LLM, on_token: Any) -> None:
        prompts = ["x" * (20 - i) for i in range(20)]
        results = llm.generate(prompts, on_token=on_token)
        assert [result.text for result in results] == [prompt.upper() for prompt in prompts]

    def test_token_ids(self, llm: LLM, on_token: Any) -> None:
        assert llm.generate([1, 2, 3], on_token=on_token).prompt_ids == (1, 2, 3)
        results = llm.generate([[1, 2], (3,), "ab"], on_token=on_token)
        assert [result.prompt_ids for result in results] == [(1, 2), (3,), (BOS_ID, 97, 98)]

    def test_an_empty_list(self, llm: LLM, on_token: Any) -> None:
        prompts: list[str] = []
        assert llm.generate(prompts, on_token=on_token) == []

    def test_choices(self, on_token: Any) -> None:
        with LLM.from_backend(MockBackend(["one", "three"])) as llm:
            result = llm.generate("?", n=2, seed=0, on_token=on_token)
        assert [(choice.index, choice.text) for choice in result.choices] == [(0, "one"), (1, "three")]
        assert result.usage == Usage(2, 8)

    def test_logprobs(self, llm: LLM, on_token: Any) -> None:
        result = llm.generate("ab", logprobs=1, prompt_logprobs=0, on_token=on_token)
        assert [entry.text for entry in result.choices[0].logprobs] == ["A", "B"]
        assert result.prompt_logprobs is not None
        assert [entry and entry.logprob for entry in result.prompt_logprobs] == [None, PROMPT_LOGPROB, PROMPT_LOGPROB]


def test_numpy_ids_are_ids(llm: LLM) -> None:
    np = pytest.importorskip("numpy", reason="numpy is not installed")
    assert llm.generate(np.arange(3, 6)).prompt_ids == (3, 4, 5)
    assert [r.prompt_ids for r in llm.generate(np.arange(4).reshape(2, 2))] == [(0, 1), (2, 3)]


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (5, "prompt"),
        (b"bytes", "prompt"),
        ([["a"]], "prompt"),
        ([[]], "prompt"),
        ([-1, 2], "prompt"),
        ([1.5], "prompt"),
        ([True], "prompt"),
        ([{"role": "user", "content": "hi"}], "prompt"),
        ([[{"role": "user", "content": "hi"}]], "prompt"),
    ],
)
def test_what_is_no_prompt_is_refused(llm: LLM, prompt: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llm.generate(prompt)
    assert caught.value.field == field


# ---- sampling and options


def test_fields_go_over_sampling_which_goes_over_the_constructor(llm: LLM) -> None:
    with LLM("mock", max_tokens=3, context_length=64) as defaulted:
        assert defaulted.capabilities().context_length == 64
        assert len(defaulted.generate("a").token_ids) == 3
        assert len(defaulted.generate("a", SamplingParams(max_tokens=4)).token_ids) == 4
        assert len(defaulted.generate("a", SamplingParams(max_tokens=4), max_tokens=5).token_ids) == 5
        assert len(defaulted.generate("a", SamplingParams(max_tokens=4), max_tokens=None).token_ids) == 4


def test_each_prompt_can_have_its_own_sampling(llm: LLM) -> None:
    results = llm.generate(["abc", "def"], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2)])
    assert [result.text for result in results] == ["A", "DE"]
    wrong: list[tuple[Any, Any]] = [
        (["a", "b"], [SamplingParams()]),
        ("a", [SamplingParams()]),
        ("a", {"max_tokens": 1}),
    ]
    for prompts, sampling in wrong:
        with pytest.raises(InvalidRequest) as caught:
            llm.generate(prompts, sampling)
        assert caught.value.field == "sampling"


def test_unknown_names_are_named(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"temprature.*temperature"):
        llm.generate("a", temprature=1)
    with pytest.raises(InvalidRequest, match=r"blok_size.*context_length.*sampling fields") as caught:
        LLM("mock", blok_size=1)
    assert caught.value.field == "blok_size"
    with pytest.raises(InvalidRequest, match="temperature"):
        LLM("mock", temperature=-1)
    with pytest.raises(InvalidRequest, match="num_blocks"):
        LLM("no/such.gguf", max_pages=0)


class Adapted(MockBackend):
    """Answers with the adapter that it is asked for, of those that are loaded."""

    def __init__(self) -> None:
        super().__init__(lambda request: str(request.adapter))
        self.loaded: dict[str, str] = {}

    def capabilities(self) -> Capabilities:
        own = super().capabilities()
        return replace(own, request_fields=own.request_fields | {"adapter"})

    def load_adapter(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        if name in self.loaded and not replace:
            raise InvalidRequest("adapter", f"{name!r} is already loaded")
        self.loaded[name] = str(path)

    def unload_adapter(self, name: str) -> None:
        del self.loaded[name]

    def adapters(self) -> list[str]:
        return sorted(self.loaded)


def test_an_adapter_by_request() -> None:
    hello = [{"role": "user", "content": "Hello"}]
    with LLM.from_backend(Adapted()) as llm:
        assert llm.generate("a", adapter="mine").text == "mine"
        assert [result.text for result in llm.generate(["a", "b"], adapter="mine")] == ["mine"] * 2
        assert llm.chat(hello, adapter="mine").text == "mine"
        for prompt in ("a", [1, 2], hello):
            assert "".join(chunk.text for chunk in llm.stream(prompt, adapter="mine")) == "mine"
        assert llm.generate("a", adapter=None).text == "None"
        with pytest.raises(InvalidRequest, match="adapter"):
            llm.generate("a", adapter=3)
        llm.load_adapter("mine", "folder")
        assert llm.adapters() == ["mine"]
        llm.unload_adapter("mine")
        assert llm.adapters() == []

    async def play() -> None:
        async with AsyncLLM.from_backend(Adapted()) as llm:
            assert (await llm.generate("a", adapter="mine")).text == "mine"
            assert (await llm.chat(hello, adapter="mine")).text == "mine"
            assert "".join([chunk.text async for chunk in llm.stream("ab", adapter="mine")]) == "mine"

    asyncio.run(play())


def test_a_backend_without_adapters_says_who_has_them(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"adapter.*mock.*does: mistralrs"):
        llm.generate("a", adapter="mine")
    for call in (lambda: llm.load_adapter("mine", "folder"), lambda: llm.unload_adapter("mine"), llm.adapters):
        with pytest.raises(UnsupportedModel, match=r"mock.*Backends that do: mistralrs"):
            call()


# ---- chat


def test_chat(llm: LLM) -> None:
    hello = {"role": "user", "content": "Hello"}
    assert llm.detokenize(llm.chat([hello]).prompt_ids) == "user: Hello\nassistant: "
    system = Message("system", "Be brief.")
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}
    results = llm.chat([[hello], (system, parts)], on_token=lambda chunk: None)
    assert llm.detokenize(results[1].prompt_ids) == "system: Be brief.\nuser: ab\nassistant: "


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "data:x"}}, "ImagePart"),
        ({"type": "image", "image": "a.png"}, "ImagePart"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, "AudioPart"),
        ({"type": "audio_url", "audio_url": "a.wav"}, "AudioPart"),
    ],
)
def test_media_reach_the_backend_which_refuses_them_by_name(llm: LLM, part: Any, kind: str) -> None:
    with pytest.raises(InvalidRequest, match=kind):
        llm.chat([{"role": "user", "content": [part]}])


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ("Hello", "messages"),
        ([[]], "messages"),
        (["Hello"], "messages"),
        ([{"role": "robot", "content": "x"}], "role"),
        ([{"content": "x"}], "role"),
        ([{"role": "user"}], "messages.content"),
        ([{"role": "user", "content": 5}], "messages.content"),
        ([{"role": "user", "content": [{"type": "video", "video": "x"}]}], "messages.content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.content"),
        ([{"role": "user", "content": [{"type": ["text"]}]}], "messages.content"),
        ([{"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}], "messages.tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "messages.tool_calls"),
        ([{"role": "user", "content": "x", "refusal": "no"}], "messages.refusal"),
    ],
)
def test_what_is_no_conversation_is_refused(llm: LLM, messages: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llm.chat(messages)
    assert caught.value.field == field


def test_template_variables_reach_the_template(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="tools"):
        llm.chat([Message("user", "a")], template_kwargs={"tools": []})
    with pytest.raises(InvalidRequest, match="template_kwargs"):
        llm.stream("a", template_kwargs={"tools": []})


# ---- streams and callbacks


def test_streams(llm: LLM) -> None:
    chunks = list(llm.stream("abc", max_tokens=2))
    assert [chunk.text for chunk in chunks] == ["A", "B"]
    assert chunks[-1].finish_reason == "length"
    assert "".join(chunk.text for chunk in llm.stream([Message("user", "a")])) == "-"
    assert next(llm.stream([7, 8])).prompt_ids == (7, 8)
    with pytest.raises(InvalidRequest):  # at once, not when first read
        llm.stream("abc", max_tokens=-1)
    with pytest.raises(InvalidRequest):
        llm.stream(["a", "b"])  # type: ignore[arg-type]


def test_leaving_a_stream_cancels_and_the_llm_goes_on() -> None:
    backend = MockBackend("abc" * 1000)
    with LLM.from_backend(backend) as llm:
        stream = llm.stream("x")
        next(stream)
        stream.close()
        until(lambda: backend.stats().requests_cancelled == 1)
        for _ in llm.stream("x"):
            break
        until(lambda: backend.stats().requests_cancelled == 2)
        assert backend.stats().running == 0
        assert llm.generate("x", max_tokens=1).text == "a"


def test_a_stream_goes_no_faster_than_its_reader() -> None:
    backend = MockBackend("abc" * 1000)
    with LLM.from_backend(backend) as llm:
        stream = llm.stream("x")
        for _ in range(3):
            next(stream)
        assert backend.stats().generated_tokens <= 4
        stream.close()


def test_callbacks_run_on_the_callers_thread_in_order(llm: LLM) -> None:
    heard: list[tuple[int, str]] = []
    result = llm.generate("abc", on_token=lambda chunk: heard.append((threading.get_ident(), chunk.text)))
    assert heard == [(threading.get_ident(), char) for char in "ABC"]
    assert result.text == "ABC"


def test_a_callback_may_ask_the_llm(llm: LLM) -> None:
    inner: list[str] = []
    llm.generate("ab", on_token=lambda chunk: inner.append(llm.generate(chunk.text + "!").text))
    assert inner == ["A!", "B!"]


def test_returning_false_cancels_that_request_alone() -> None:
    backend = MockBackend(shout)
    stopped: set[str] = set()

    def on_token(chunk: Chunk) -> bool:
        if chunk.text == "C":
            stopped.add(chunk.request_id)
            return False
        return True

    with LLM.from_backend(backend) as llm:
        first, second = llm.generate(["abcdef", "uvwxyz"], on_token=on_token)
        assert (first.text, first.finish_reason, first.usage) == ("ABC", "cancelled", Usage(7, 3))
        assert (second.text, second.finish_reason) == ("UVWXYZ", "stop")
        assert stopped == {first.request_id}
    assert backend.stats().requests_cancelled == 1


@pytest.mark.parametrize("error", [ZeroDivisionError, StopIteration, KeyboardInterrupt])
def test_what_a_callback_raises_comes_out_and_cancels(error: type[BaseException]) -> None:
    backend = MockBackend("abc" * 1000)

    def on_token(chunk: Chunk) -> None:
        raise error

    with LLM.from_backend(backend) as llm:
        with pytest.raises(error):
            llm.generate(["a", "b"], on_token=on_token)
        until(lambda: backend.stats().requests_cancelled == 2)


# ---- scores, tokens, stats


def test_scores(llm: LLM) -> None:
    assert llm.score("ab") == Score((BOS_ID, 97, 98), (None, PROMPT_LOGPROB, PROMPT_LOGPROB))
    assert [score.token_ids for score in llm.score(["a", [7, 8]])] == [(BOS_ID, 97), (7, 8)]
    assert llm.score([7]) == Score((7,), (None,))
    assert llm.score("ab").perplexity == pytest.approx(math.e)


def test_defaults_do_not_bend_scores() -> None:
    with LLM("mock", n=3, echo=True, min_tokens=5, prompt_logprobs=4, stop="a", ignore_eos=True) as llm:
        assert llm.score("ab").logprobs == (None, PROMPT_LOGPROB, PROMPT_LOGPROB)
        assert llm.stats().generated_tokens == 0


def test_tokens_and_stats(llm: LLM) -> None:
    assert llm.detokenize(llm.tokenize("déjà vu")) == "déjà vu"
    assert llm.tokenize("a", add_special_tokens=False) == [97]
    assert llm.detokenize([BOS_ID, 97], skip_special_tokens=False) == "\x02a"
    llm.generate(["a", "b"])
    assert (llm.stats().requests_finished, llm.stats().generated_tokens) == (2, 2)


class Bare:
    """A backend without any ability, that plays back chunks."""

    def __init__(self, *chunks: Chunk) -> None:
        self.chunks = chunks

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        for chunk in self.chunks:
            yield chunk

    def capabilities(self) -> Capabilities:
        return Capabilities("bare", "none", 10, frozenset(), chat=False)

    def close(self) -> None:
        self.chunks = ()


def test_what_a_backend_cannot_do_is_said() -> None:
    llm = LLM.from_backend(Bare())
    for call in (
        lambda: llm.tokenize("a"),
        lambda: llm.detokenize([1]),
        lambda: llm.stats(),
        lambda: llm.add_allocation_listener(None),  # type: ignore[arg-type]
        lambda: llm.score("a"),
    ):
        with pytest.raises(UnsupportedModel, match="bare"):
            call()


def test_a_backend_that_breaks_its_word_is_found_out() -> None:
    for chunks in ((), (Chunk("r", text="a"),), (Chunk("r", finish_reason="stop"), Chunk("r", index=1))):
        with pytest.raises(TramontaneError, match="without saying why"):
            LLM.from_backend(Bare(*chunks)).generate("a")
    with pytest.raises(TramontaneError, match="failed without a reason"):
        LLM.from_backend(Bare(Chunk("r", finish_reason="error"))).generate("a")
    with pytest.raises(TramontaneError, match="did not score"):
        LLM.from_backend(Bare(Chunk("r", finish_reason="length"))).score([1, 2])
    with pytest.raises(RequestCancelled):
        LLM.from_backend(Bare(Chunk("r", finish_reason="cancelled"))).score([1, 2])


# ---- errors


def test_the_first_error_cancels_the_rest_and_the_llm_goes_on() -> None:
    backend = MockBackend(lambda request: "x" * 10_000, context_length=9_000)
    with LLM.from_backend(backend) as llm:
        with pytest.raises(ContextLengthExceeded) as caught:
            llm.generate(["a", "b" * 9_000, "c"])
        assert caught.value.prompt_tokens == 9_001
        assert backend.stats().running == 0
        assert backend.stats().requests_cancelled == 2
        assert llm.generate("a", max_tokens=1).text == "x"


def test_a_failure_midway_is_raised() -> None:
    llm = LLM.from_backend(MockBackend("abc", fail_after=2))
    with pytest.raises(TramontaneError, match="after 2 tokens"):
        llm.generate("a")
    got: list[Chunk] = []
    with pytest.raises(TramontaneError, match="after 2 tokens"):
        got.extend(llm.stream("a"))
    assert [chunk.text for chunk in got] == ["a", "b"]


def test_closed() -> None:
    llm = LLM("mock")
    llm.close()
    llm.close()
    with pytest.raises(EngineClosed):
        llm.generate("a")
    with pytest.raises(EngineClosed):
        next(llm.stream("a"))


def test_closing_ends_what_another_thread_waits_for() -> None:
    slow = Slow()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(slow.llm.generate, ["a", "b"])
        slow.running(2)
        slow.llm.close()
        assert [result.finish_reason for result in waiting.result(60)] == ["cancelled", "cancelled"]


# ---- threads, loops, interruption


def test_a_list_is_submitted_at_once() -> None:
    slow = Slow()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(slow.llm.generate, ["a"] * 40)
        slow.running(40)
        slow.llm.close()
        waiting.result(60)


def test_several_threads(llm: LLM) -> None:
    def ask(name: str) -> tuple[str, str, list[str]]:
        streamed = "".join(chunk.text for chunk in llm.stream(name))
        return llm.generate(name).text, streamed, [r.text for r in llm.generate([name, name + "!"])]

    names = [f"thread {i}" for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, names))
    assert answers == [(n.upper(), n.upper(), [n.upper(), n.upper() + "!"]) for n in names]


def test_inside_a_running_loop(llm: LLM) -> None:
    async def notebook_cell() -> tuple[str, str]:
        return llm.generate("a").text, "".join(chunk.text for chunk in llm.stream("bc"))

    assert asyncio.run(notebook_cell()) == ("A", "BC")


def test_inside_the_backends_own_loop_it_says_so() -> None:
    asked: list[LLM] = []
    asked.append(LLM.from_backend(MockBackend(lambda request: asked[0].generate("b").text)))
    with pytest.raises(TramontaneError, match="AsyncLLM"):
        asked[0].generate("a")


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="there is no pthread_kill here")
@pytest.mark.parametrize(
    "ask",
    [
        lambda llm: llm.generate("a"),
        lambda llm: llm.generate("a", on_token=lambda chunk: None),
        lambda llm: list(llm.stream("a")),
    ],
    ids=["generate", "callback", "stream"],
)
def test_ctrl_c_cancels_the_request_and_leaves_the_llm_usable(ask: Callable[[LLM], object]) -> None:
    slow = Slow()

    def interrupt() -> None:
        slow.running(1)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        ask(slow.llm)
    slow.running(0)
    assert slow.backend.stats().requests_cancelled == 1
    slow.backend._delay = 0.0
    assert slow.llm.generate("a").text == "never"


def test_the_interpreter_exits_with_everything_open() -> None:
    script = """
from tramontane import LLM
from tramontane.backends.mock import MockBackend
llm = LLM.from_backend(MockBackend("abc", delay=0.001))
stream = llm.stream("a", ignore_eos=True)
other = llm.stream("a", ignore_eos=True)
print(next(stream).text, next(other).text)
"""
    done = subprocess.run([sys.executable, "-X", "dev", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a a\n", "")


# ---- AsyncLLM


def test_async_shapes() -> None:
    async def play() -> None:
        heard: list[str] = []
        async with AsyncLLM.from_backend(MockBackend(shout)) as llm:
            assert (await llm.generate("a")).text == "A"
            results = await llm.generate(["a", "bc"], on_token=lambda chunk: heard.append(chunk.text))
            assert [result.text for result in results] == ["A", "BC"]
            assert sorted(heard) == ["A", "B", "C"]
            cancelled = await llm.generate("abc", on_token=lambda chunk: False)
            assert (cancelled.text, cancelled.finish_reason) == ("A", "cancelled")
            assert (await llm.chat([{"role": "user", "content": "a"}])).text == "-"
            assert [chunk.text async for chunk in llm.stream("ab")] == ["A", "B"]
            assert (await llm.score("a")).logprobs == (None, PROMPT_LOGPROB)
            assert len(await llm.score(["a", "b"])) == 2
            prompts: list[str] = []
            assert await llm.generate(prompts) == []
        with pytest.raises(EngineClosed):
            await llm.generate("a")

    asyncio.run(play())


def test_cancelling_the_task_cancels_the_request() -> None:
    backend = MockBackend("never", delay=FOREVER)
    llm = AsyncLLM.from_backend(backend)

    async def read() -> None:
        async for _ in llm.stream("a"):
            pass

    async def play() -> None:
        for work in (llm.generate(["a", "b"]), read()):
            task = asyncio.ensure_future(work)
            while not backend.stats().running:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert backend.stats().running == 0

    asyncio.run(play())
    assert backend.stats().requests_cancelled == 3


def test_closing_an_async_stream_cancels() -> None:
    backend = MockBackend("abc")
    llm = AsyncLLM.from_backend(backend)

    async def play() -> None:
        stream = llm.stream("a")
        await stream.__anext__()
        await stream.aclose()
        assert backend.stats().requests_cancelled == 1

    asyncio.run(play())


def test_async_errors() -> None:
    backend = MockBackend(lambda request: "x" * 10_000, context_length=9_000)

    async def play() -> None:
        with pytest.raises(ContextLengthExceeded):
            await AsyncLLM.from_backend(backend).generate(["a", "b" * 9_000])
        assert backend.stats().running == 0
        with pytest.raises(TramontaneError, match="after 1"):
            async for _ in AsyncLLM.from_backend(MockBackend("ab", fail_after=1)).stream("a"):
                pass

    asyncio.run(play())


def test_several_event_loops() -> None:
    llm = AsyncLLM.from_backend(MockBackend(shout))

    async def ask(name: str) -> list[str]:
        return [result.text for result in await llm.generate([name, name + "?"])]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: asyncio.run(ask(f"loop {i}")), range(8)))
    assert answers == [[f"LOOP {i}", f"LOOP {i}?"] for i in range(8)]
