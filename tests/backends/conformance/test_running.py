"""Running: many at once, readers that leave, what cannot be done, and closing."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from tests.backends.conformance.subjects import EXAMPLES, PROMPT, Subject
from tramontane.backends.base import REQUEST_FIELDS, HasStats
from tramontane.errors import ContextLengthExceeded, EngineClosed, InvalidRequest, TramontaneError
from tramontane.gather import closing_after
from tramontane.types import Chunk, ImagePart, Message

PROMPTS = [f"{PROMPT} number {i}" for i in range(8)]


def test_many_at_once_are_answered_as_each_alone(subject: Subject) -> None:
    alone = [subject.ask(prompt).text for prompt in PROMPTS]
    assert [result.text for result in subject.answers([subject.request(prompt) for prompt in PROMPTS])] == alone


def test_from_several_threads_each_with_a_loop_of_its_own(subject: Subject) -> None:
    wanted = [subject.ask(prompt).text for prompt in PROMPTS[:4]]
    found: list[str] = [""] * 4

    def ask(index: int) -> None:
        found[index] = subject.ask(PROMPTS[index]).text

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == wanted


# ---- leaving


def at_rest(subject: Subject) -> bool:
    return not isinstance(subject.backend, HasStats) or subject.backend.stats().running == 0


def test_a_reader_that_leaves_cancels_its_request_alone(subject: Subject) -> None:
    async def play() -> str:
        leaving = subject.backend.generate(subject.request(max_tokens=100))
        staying = subject.backend.generate(subject.request(PROMPTS[1]))
        async with closing_after(leaving) as chunks:
            await chunks.__anext__()
        return "".join([chunk.text async for chunk in staying])

    wanted = subject.ask(PROMPTS[1]).text
    assert asyncio.run(play()) == wanted
    deadline = time.monotonic() + 60
    while not at_rest(subject) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert at_rest(subject)


def test_a_cancelled_task_cancels_its_request(subject: Subject) -> None:
    async def play() -> None:
        begun = asyncio.Event()

        async def read() -> None:
            async with closing_after(subject.backend.generate(subject.request(max_tokens=100))) as chunks:
                async for _ in chunks:
                    begun.set()

        task = asyncio.ensure_future(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(play())
    assert subject.ask().text


def test_closing_ends_what_is_open_and_refuses_what_comes(subject: Subject) -> None:
    backend = subject.open()
    seen: list[Chunk] = []

    async def play() -> None:
        async for chunk in backend.generate(subject.request(max_tokens=100)):
            if not seen:
                await asyncio.to_thread(backend.close)
            seen.append(chunk)

    asyncio.run(play())
    backend.close()
    assert [chunk.finish_reason for chunk in seen if chunk.finish_reason] in (["cancelled"], ["length"], ["stop"])
    with pytest.raises(EngineClosed):
        asyncio.run(backend.generate(subject.request()).__anext__())  # type: ignore[arg-type]


# ---- errors


def test_a_prompt_that_does_not_fit_is_refused_whole(subject: Subject) -> None:
    longest = subject.can.context_length
    if longest > 10_000:
        pytest.skip("the context is long")
    with pytest.raises(ContextLengthExceeded) as caught:
        subject.answer(subject.request("wind " * longest))
    assert caught.value.context_length == longest
    assert caught.value.prompt_tokens >= longest
    assert subject.ask().text


def test_what_is_no_prompt_is_refused(subject: Subject) -> None:
    with pytest.raises(InvalidRequest):
        subject.answer(subject.request(ids=()))
    with pytest.raises(InvalidRequest):
        subject.answer(subject.request(ids=(1 << 30,)))
    with pytest.raises(InvalidRequest):
        subject.answer(subject.request(messages=(Message("user", (ImagePart("a.png"),)),)))


def test_a_processor_that_fails_ends_its_own_request_alone(subject: Subject) -> None:
    def broken(prompt: object, output: object, logits: object) -> object:
        raise ValueError("out of order")

    async def play() -> tuple[list[Chunk], str]:
        failing = subject.backend.generate(subject.request(logits_processors=(broken,)))
        other = subject.backend.generate(subject.request())
        failed, text = await asyncio.gather(collect(failing), collect(other))
        return failed, "".join(chunk.text for chunk in text)

    subject.needs("logits_processors")
    failed, text = asyncio.run(play())
    assert [chunk.finish_reason for chunk in failed] == ["error"]
    assert isinstance(failed[0].error, TramontaneError)
    assert "out of order" in str(failed[0].error)
    assert text == subject.ask().text


async def collect(chunks: Any) -> list[Chunk]:
    return [chunk async for chunk in chunks]


def test_native_refuses_no_field(subject: Subject) -> None:
    if subject.name != "native":
        pytest.skip("another backend")
    assert subject.can.sampling_fields >= set(EXAMPLES)
    assert subject.can.request_fields >= REQUEST_FIELDS - {"adapter"}
