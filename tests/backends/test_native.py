"""The native backend on a tiny model: text, ends, refusals, cancelling, threads and event loops, failing, closing."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.engine import checkpoints
from tests.engine.checkpoints import BOS, CONTEXT, END, EOS, VOCAB
from tramontane.backends import shared
from tramontane.backends.base import Backend, HasStats, Listening, Tokenizing
from tramontane.backends.mailbox import Mailbox, wake
from tramontane.backends.native import NativeBackend
from tramontane.config import CacheConfig, EngineConfig, SchedulerConfig
from tramontane.engine.runner import Runner
from tramontane.engine.scheduler import Scheduler
from tramontane.engine.step import Step, StepResult
from tramontane.errors import (
    ContextLengthExceeded,
    CorruptCheckpoint,
    DeviceNotAvailable,
    EngineClosed,
    InvalidRequest,
    MissingExtra,
    ModelNotFound,
    OutOfMemory,
    Overloaded,
    RequestTimeout,
    TramontaneError,
)
from tramontane.kernels import device
from tramontane.llm import LLM
from tramontane.text.tokenizer import Tokenizer
from tramontane.types import AudioPart, Chunk, ImagePart, Message, Request, SamplingParams, TextPart

CONFIG = EngineConfig(
    CacheConfig(block_size=4, num_blocks=400),
    SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64),
    device="cpu",
    kernels="reference",
    threads=1,
    deterministic=True,
)


@pytest.fixture
def backend(checkpoint: Path) -> Iterator[NativeBackend]:
    opened = NativeBackend(checkpoint, CONFIG)
    yield opened
    opened.close()


def forced(*token_ids: int) -> Callable[..., Any]:
    """A processor that makes the answer these tokens, and then ends."""

    def processor(prompt_ids: Any, output_ids: Any, logits: Any) -> Any:
        at = len(output_ids)
        row = np.full_like(logits, -np.inf)
        row[token_ids[at] if at < len(token_ids) else EOS] = 0.0
        return row

    return processor


def spelled(text: str, *ends: int) -> tuple[int, ...]:
    """The tokens of a text, by the checkpoint's own alphabet."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return (*(alphabet.index(letter) for piece, _ in letters for letter in piece), *ends)


def ask(prompt: str | None = "Hi", id: str = "", prompt_ids: Any = None, **params: Any) -> Request:
    return Request(
        prompt=None if prompt_ids else prompt, prompt_ids=prompt_ids, sampling=SamplingParams(**params), id=id
    )


def say(text: str, *ends: int, prompt: str = "Hi", **params: Any) -> Request:
    """A request whose answer will be `text`."""
    return ask(prompt, logits_processors=(forced(*spelled(text, *ends)),), **params)


async def chunks_of(backend: NativeBackend, request: Request) -> list[Chunk]:
    return [chunk async for chunk in backend.generate(request)]


def chunks(backend: NativeBackend, request: Request) -> list[Chunk]:
    return asyncio.run(chunks_of(backend, request))


def text(found: list[Chunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in found if chunk.index == index)


def ids(found: list[Chunk], index: int = 0) -> list[int]:
    return [id_ for chunk in found if chunk.index == index for id_ in chunk.token_ids]


def idle(backend: NativeBackend) -> None:
    """Wait until the engine has nothing left and holds nothing."""
    for _ in range(2000):
        stats = backend.stats()
        if not (stats.running or stats.waiting or stats.blocks_used):
            return
        time.sleep(0.005)
    pytest.fail(f"the engine does not come to rest: {backend.stats()}")


def run_python(script: str, *arguments: str) -> str:
    """What a script prints in an interpreter of its own."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=root,
        # the very package that is tested here: the sources of an installed one have no compiled module
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- text


def test_it_is_what_it_says(backend: NativeBackend) -> None:
    assert all(isinstance(backend, protocol) for protocol in (Backend, Tokenizing, HasStats, Listening))
    abilities = backend.capabilities()
    assert (abilities.name, abilities.context_length, abilities.chat) == ("native", CONTEXT, True)
    assert "min_p" in abilities.sampling_fields
    assert backend.tokenize("Hi") == [BOS, *spelled("Hi")]
    assert backend.detokenize(backend.tokenize("Hi")) == "Hi"
    assert backend.render([Message("user", "Hi")]) == "<|start|>user: Hi<|end|><|start|>assistant: "


def test_an_answer_ends_once_with_its_usage(backend: NativeBackend) -> None:
    found = chunks(backend, say("Grüße 🌍!"))
    assert text(found) == "Grüße 🌍!"
    assert [chunk.finish_reason for chunk in found].count(None) == len(found) - 1
    last = found[-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", None)
    assert ids(found) == [*spelled("Grüße 🌍!"), EOS]
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, len(ids(found)))
    assert {chunk.request_id for chunk in found} == {last.request_id} != {""}


def test_stop_strings(backend: NativeBackend) -> None:
    """One that spans tokens ends the answer at once; half of one comes out at the end."""
    found = chunks(backend, say("one STOP two", stop=["STOP", "never"]))
    assert (text(found), found[-1].finish_reason, found[-1].stop_reason) == ("one ", "stop", "STOP")
    assert ids(found) == list(spelled("one STOP"))
    assert text(chunks(backend, say("one STOP two", stop="STOP", include_stop=True))) == "one STOP"
    assert text(chunks(backend, say("one STO", stop="STOP"))) == "one STO"
    late = chunks(backend, say("STOP two STOP", stop="STOP", min_tokens=6))
    assert text(late) == "STOP two "
    idle(backend)


def test_what_an_answer_leaves_unfinished_is_its_text_too(backend: NativeBackend) -> None:
    half = forced(*spelled("a"), spelled("é")[0])
    found = chunks(backend, ask(logits_processors=(half,), max_tokens=2))
    assert (text(found), found[-1].finish_reason) == ("a\ufffd", "length")
    found = chunks(backend, ask(logits_processors=(half,), max_tokens=2, stop="\ufffd"))
    assert (text(found), found[-1].finish_reason, found[-1].stop_reason) == ("a", "stop", "\ufffd")


def test_stop_tokens_and_special_tokens(backend: NativeBackend) -> None:
    found = chunks(backend, say("one.two", stop_token_ids=spelled(".")))
    assert (text(found), found[-1].stop_reason) == ("one", spelled(".")[0])
    assert text(chunks(backend, say("one.two", stop_token_ids=spelled("."), include_stop=True))) == "one."
    assert text(chunks(backend, say("a", END, skip_special_tokens=False))) == "a<|end|></s>"
    assert text(chunks(backend, say("a", END))) == "a"


def test_echo(backend: NativeBackend) -> None:
    assert text(chunks(backend, say("b", prompt="a <|end|>", echo=True))) == "a <|end|>b"
    begun = spelled("é")
    given = ask(prompt_ids=(BOS, *spelled("a"), begun[0]), echo=True, logits_processors=(forced(begun[1]),))
    assert text(chunks(backend, given)) == "aé"


def test_choices(backend: NativeBackend) -> None:
    found = chunks(backend, ask(n=3, seed=4, max_tokens=7, ignore_eos=True))
    assert sorted(chunk.index for chunk in found if chunk.finish_reason == "length") == [0, 1, 2]
    assert len({tuple(ids(found, index)) for index in range(3)}) == 3
    assert ids(chunks(backend, ask(n=1, seed=4, max_tokens=7, ignore_eos=True))) == ids(found)


def test_one_choice_stops_and_the_others_go_on(backend: NativeBackend) -> None:
    ends = chunks(backend, ask(n=3, seed=4, max_tokens=30, ignore_eos=True))
    letter = text(ends, 1)[3]
    found = chunks(backend, ask(n=3, seed=4, max_tokens=30, ignore_eos=True, stop=letter))
    for index in range(3):
        assert text(found, index) == text(ends, index).split(letter)[0]
    idle(backend)


def test_logprobs(backend: NativeBackend) -> None:
    found = chunks(backend, ask("Hello", logprobs=2, prompt_logprobs=1, max_tokens=4, seed=1, ignore_eos=True))
    infos = [info for chunk in found for info in chunk.logprobs]
    assert [info.token_id for info in infos] == ids(found)
    assert all(len(info.top) == 2 and info.top[0][2] >= info.logprob - 1e-6 for info in infos)
    assert [chunk.prompt_logprobs is not None for chunk in found] == [True] + [False] * (len(found) - 1)
    prompt = found[0].prompt_logprobs or ()
    assert prompt[0] is None
    assert [info.text for info in prompt[1:] if info is not None] == list("Hello")


def test_cached_tokens_are_counted_and_salts_keep_apart(backend: NativeBackend) -> None:
    request = ask("the same long prompt", max_tokens=2, temperature=0.0)
    cached = []
    for salt in ("", "", "other"):
        usage = chunks(backend, replace(request, cache_salt=salt))[-1].usage
        assert usage is not None
        cached.append(usage.cached_tokens)
    assert cached == [0, 20, 0]
    assert backend.stats().cached_tokens == 20


def test_chat(backend: NativeBackend) -> None:
    parts = (TextPart("H"), TextPart("i"))
    whole, in_parts = (
        chunks(backend, Request(messages=(Message("user", content),), sampling=SamplingParams(seed=1, max_tokens=4)))
        for content in ("Hi", parts)
    )
    rendered = backend.tokenize(backend.render([Message("user", "Hi")]), add_special_tokens=False)
    assert whole[-1].usage is not None
    assert whole[-1].usage.prompt_tokens == len(rendered)
    assert ids(whole) == ids(in_parts)


def test_order_of_defaults(checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "model")
    settings = {"eos_token_id": [EOS, END], "temperature": 0.5, "top_k": 1, "repetition_penalty": 1.5, "min_p": None}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    opened = NativeBackend(folder, CONFIG, SamplingParams(repetition_penalty=1.0, max_tokens=3))
    params = opened._preparer.prepare(ask(top_k=7)).request.params
    assert (params.temperature, params.top_k, params.repetition_penalty) == (0.5, 7, 1.0)
    assert (params.max_tokens, params.top_p) == (3, 1.0)
    assert (chunks(opened, say("a", END))[-1]).finish_reason == "stop"
    opened.close()
    (folder / "generation_config.json").write_text(json.dumps({"temperature": -1}))
    with pytest.raises(CorruptCheckpoint, match="temperature"):
        NativeBackend(folder, CONFIG)


def longest_repeat(tokens: list[int]) -> int:
    places = range(len(tokens))
    return max(
        n
        for n in range(len(tokens))
        if len({tuple(tokens[i : i + n]) for i in places[: len(tokens) - n + 1]}) < len(tokens) - n + 1 or not n
    )


def test_words_that_may_not_be_said_are_not_said(backend: NativeBackend) -> None:
    plain = ask(max_tokens=40, ignore_eos=True, temperature=0.0)
    said = ids(chunks(backend, plain))
    for length in (1, 2, 3):
        word = tuple(said[5 : 5 + length])
        sampling = replace(plain.sampling, bad_words=(word,))
        found = ids(chunks(backend, replace(plain, sampling=sampling)))
        history = [*backend.tokenize("Hi"), *found]
        assert word not in {tuple(history[i : i + length]) for i in range(len(history) - length + 1)}
    likely = replace(plain.sampling, logit_bias=dict.fromkeys(spelled("q"), 50.0))
    assert text(chunks(backend, replace(plain, sampling=likely))) == "q" * 40
    twice = replace(likely, bad_words=("qq",), skip_special_tokens=False)
    assert "qq" not in text(chunks(backend, replace(plain, sampling=twice)))
    assert "q" not in text(chunks(backend, replace(plain, sampling=replace(likely, bad_words=("q",)))))


def test_a_breaker_is_every_token_that_holds_it(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(checkpoint / "tokenizer.json")
    assert spelled(":")[0] in tokenizer.holding(":")
    assert all(":" in tokenizer.token_text(id_) for id_ in tokenizer.holding(":"))
    assert not tokenizer.holding("no token is as long as this")


def test_dry_ends_a_loop(backend: NativeBackend) -> None:
    plain = ask("abcabcabcabc", max_tokens=60, ignore_eos=True, temperature=0.0)
    looping = ids(chunks(backend, plain))
    how = replace(plain.sampling, dry_multiplier=50.0, dry_allowed_length=3, dry_sequence_breakers=())
    found = ids(chunks(backend, replace(plain, sampling=how)))
    assert longest_repeat(found) <= 4 < longest_repeat(looping)
    everywhere = tuple((i,) for i in range(VOCAB))
    broken = replace(plain, sampling=replace(how, dry_sequence_breakers=everywhere))
    assert ids(chunks(backend, broken)) == looping, "nothing reaches over a breaker"


def test_the_best_of_many_are_the_likeliest(backend: NativeBackend) -> None:
    settings: dict[str, Any] = {"max_tokens": 8, "seed": 3, "temperature": 1.5, "prompt_logprobs": 0}
    many = chunks(backend, ask(n=6, logprobs=0, **settings))
    means = {
        index: sum(info.logprob for c in many if c.index == index for info in c.logprobs) / len(ids(many, index))
        for index in range(6)
    }
    order = sorted(means, key=lambda index: -means[index])[:2]
    found = chunks(backend, ask(n=2, best_of=6, **settings))
    assert [chunk.index for chunk in found] == [0, 1], "a chunk each, at the end"
    assert [list(chunk.token_ids) for chunk in found] == [ids(many, index) for index in order]
    assert [chunk.score for chunk in found] == pytest.approx([means[index] for index in order])
    assert all(chunk.finish_reason and not chunk.logprobs for chunk in found)
    assert found[0].prompt_ids == tuple(backend.tokenize("Hi"))
    assert found[0].prompt_logprobs is not None
    assert found[1].prompt_ids is None
    usages = [chunk.usage.completion_tokens for chunk in found if chunk.usage is not None]
    assert usages[0] == len(found[0].token_ids)
    assert sum(usages) == sum(len(ids(many, index)) for index in range(6)), "what is not told was drawn all the same"
    assert chunks(backend, ask(n=1, best_of=3, logprobs=1, max_tokens=2, seed=1))[0].logprobs

    async def leave() -> None:
        stream = backend.generate(ask(best_of=4, max_tokens=150, ignore_eos=True))
        task = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    idle(backend)


def test_beams_come_at_the_end_a_chunk_each(backend: NativeBackend) -> None:
    found = chunks(backend, ask(beam_width=4, n=3, max_tokens=10, echo=True, logprobs=0, length_penalty=0.0))
    assert [chunk.index for chunk in found] == [0, 1, 2]
    assert len({chunk.token_ids for chunk in found}) == 3
    scores = [chunk.score or 0.0 for chunk in found]
    assert scores == sorted(scores, reverse=True)
    for chunk in found:
        assert sum(info.logprob for info in chunk.logprobs) == pytest.approx(chunk.score, abs=1e-4)
        assert chunk.text.startswith("Hi")
        assert chunk.usage is not None
        assert chunk.usage.completion_tokens == len(chunk.token_ids)
    choices = LLM.from_backend(backend).generate("Hi", beam_width=4, n=3, max_tokens=10, length_penalty=0.0).choices
    assert [choice.token_ids for choice in choices] == [chunk.token_ids for chunk in found]
    assert [choice.score for choice in choices] == pytest.approx(scores)


@pytest.mark.parametrize(
    "beside",
    [
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.1},
        {"typical_p": 0.5},
        {"xtc_probability": 0.5},
        {"stop": "x"},
        {"logits_processors": (forced(1),)},
    ],
    ids=lambda beside: next(iter(beside)),
)
def test_what_means_nothing_beside_beams_is_refused(backend: NativeBackend, beside: dict[str, Any]) -> None:
    (name,) = beside
    with pytest.raises(InvalidRequest) as caught:
        chunks(backend, ask(beam_width=2, max_tokens=3, **beside))
    assert caught.value.field == name
    with pytest.raises(InvalidRequest, match="best_of"):
        chunks(backend, ask(beam_width=2, best_of=2))


def test_only_allowed_tokens_come(backend: NativeBackend) -> None:
    allowed = tuple(sorted(spelled("xyz")))
    found = chunks(backend, ask(max_tokens=30, ignore_eos=True, allowed_token_ids=allowed, typical_p=0.9, seed=3))
    assert set(ids(found)) <= set(allowed)
    assert set(text(found)) <= set("xyz")


def test_every_way_of_choosing_repeats_with_its_seed_alone_and_among_others(backend: NativeBackend) -> None:
    ways: list[dict[str, Any]] = [
        {"typical_p": 0.5},
        {"xtc_probability": 0.5, "xtc_threshold": 0.01},
        {"dry_multiplier": 1.0, "temperature": 0.7},
        {"bad_words": ("a", "the"), "top_k": 20},
    ]
    asked = [ask(max_tokens=25, ignore_eos=True, seed=seed, **way) for seed, way in enumerate(ways)]
    alone = [ids(chunks(backend, one)) for one in asked]

    async def together() -> list[list[Chunk]]:
        return list(await asyncio.gather(*(chunks_of(backend, one) for one in asked)))

    assert [ids(found) for found in asyncio.run(together())] == alone


# ---- refusals


@pytest.mark.parametrize(
    ("request_", "error", "field"),
    [
        (ask(stop_token_ids=[VOCAB]), InvalidRequest, "stop_token_ids"),
        (ask(logit_bias={VOCAB: 1.0}), InvalidRequest, "logit_bias"),
        (ask(allowed_token_ids=[VOCAB]), InvalidRequest, "allowed_token_ids"),
        (ask(allowed_token_ids=[3], logit_bias={3: -math.inf}), InvalidRequest, "allowed_token_ids"),
        (ask(allowed_token_ids=[3, 4], bad_words=[[3], [5, 4]]), InvalidRequest, "allowed_token_ids"),
        (ask(bad_words=[[i] for i in range(VOCAB)]), InvalidRequest, "bad_words"),
        (ask(bad_words=[[VOCAB]]), InvalidRequest, "bad_words"),
        (ask(dry_sequence_breakers=[[-1]]), InvalidRequest, "dry_sequence_breakers"),
        (ask(logit_bias=dict.fromkeys(range(VOCAB), -math.inf)), InvalidRequest, "logit_bias"),
        (
            ask(logit_bias=dict.fromkeys(range(VOCAB - 1), -math.inf), min_tokens=1, stop_token_ids=[VOCAB - 1]),
            InvalidRequest,
            "logit_bias",
        ),
        (ask(prompt_ids=(VOCAB,)), InvalidRequest, "prompt_ids"),
        (ask(prompt_ids=("a",)), InvalidRequest, "prompt_ids"),
        (Request(prompt_ids=()), InvalidRequest, "prompt_ids"),
        (ask(n=9), InvalidRequest, "n"),
        (ask("x" * CONTEXT), ContextLengthExceeded, "prompt"),
        (ask("x" * 30_000), ContextLengthExceeded, "prompt"),
        (ask("x" * 3_000_000), InvalidRequest, "prompt"),  # without tokenizing it
        (Request(messages=(Message("user", (ImagePart("a.png"),)),)), InvalidRequest, "messages"),
        (Request(messages=(Message("user", (AudioPart("a.wav"),)),)), InvalidRequest, "messages"),
        (Request(prompt=7), InvalidRequest, "prompt"),  # type: ignore[arg-type]
    ],
)
def test_refusals_name_the_field(
    backend: NativeBackend, request_: Request, error: type[InvalidRequest], field: str
) -> None:
    with pytest.raises(error) as raised:
        chunks(backend, request_)
    assert raised.value.field == field
    assert text(chunks(backend, say("still here"))) == "still here"


@pytest.mark.parametrize("defaults", [SamplingParams(stop_token_ids=(VOCAB,)), SamplingParams(logit_bias={VOCAB: 1})])
def test_defaults_that_no_request_could_use_are_refused_at_once(checkpoint: Path, defaults: SamplingParams) -> None:
    with pytest.raises(InvalidRequest, match=f"{VOCAB} is outside"):
        NativeBackend(checkpoint, CONFIG, defaults)


def test_a_cache_that_cannot_serve_is_refused(checkpoint: Path) -> None:
    small = replace(CONFIG, cache=CacheConfig(block_size=4, num_blocks=10))
    with pytest.raises(InvalidRequest, match="num_blocks"):
        NativeBackend(checkpoint, replace(small, context_length=100))
    with pytest.raises(OutOfMemory):
        NativeBackend(checkpoint, replace(CONFIG, cache=CacheConfig(num_blocks=2**40)))


def test_a_context_nobody_asked_for_shrinks_to_the_cache(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened = NativeBackend(checkpoint, replace(CONFIG, cache=CacheConfig(block_size=4, num_blocks=30)))
    longest = opened.capabilities().context_length
    assert 4 <= longest < 160
    assert f"the cache holds {longest} tokens of the model's context of 160" in caplog.text
    answer = chunks(opened, say("a", max_tokens=None, ignore_eos=True))
    assert answer[-1].finish_reason == "length"
    assert answer[-1].usage is not None
    assert answer[-1].usage.total_tokens == longest
    opened.close()


def test_a_context_of_texts_that_are_only_read_shrinks_too(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen2Model"], "max_position_embeddings": 2_000_000_000}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensors[name] for name in tensors if name != "lm_head.weight"}, folder / "model.safetensors")
    opened = NativeBackend(folder, replace(CONFIG, cache=CacheConfig(block_size=4, memory_bytes=1 << 20)))
    assert opened.capabilities().context_length < 100_000
    opened.close()


def test_without_a_template_only_chat_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "model", template=None)
    opened = NativeBackend(folder, CONFIG)
    assert not opened.capabilities().chat
    with pytest.raises(InvalidRequest, match="chat_template="):
        chunks(opened, Request(messages=(Message("user", "Hi"),)))
    assert text(chunks(opened, say("a"))) == "a"
    opened.close()
    given = NativeBackend(folder, CONFIG, chat_template="{{ bos_token }}{{ messages[0].content }}")
    assert given.render([Message("user", "Hi")]) == "<s>Hi"
    given.close()


def test_what_cannot_be_loaded(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="context_length"):
        NativeBackend(checkpoint, replace(CONFIG, context_length=CONTEXT + 1))
    with pytest.raises(ModelNotFound):
        NativeBackend(tmp_path / "nothing", CONFIG)
    folder = checkpoints.write(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json"):
        NativeBackend(folder, CONFIG)


# ---- many at once


def test_together_as_alone(backend: NativeBackend) -> None:
    everyone = [ask("x" * (1 + n % 9), seed=n, max_tokens=4 + n % 7, temperature=n % 2) for n in range(40)]
    alone = [ids(chunks(backend, one)) for one in everyone]

    async def together() -> list[list[Chunk]]:
        return await asyncio.gather(*(chunks_of(backend, one) for one in everyone))

    assert [ids(found) for found in asyncio.run(together())] == alone


def test_several_threads_and_event_loops(backend: NativeBackend) -> None:
    results: dict[int, list[list[Chunk]]] = {}

    async def some(number: int) -> list[list[Chunk]]:
        return await asyncio.gather(*(chunks_of(backend, say(f"answer {number}.{n}")) for n in range(4)))

    def work(number: int) -> None:
        results[number] = asyncio.run(some(number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert [text(found) for found in results[number]] == [f"answer {number}.{n}" for n in range(4)]
    idle(backend)


def test_a_late_reader_gets_coalesced_text_and_stalls_nobody(backend: NativeBackend) -> None:
    async def late() -> tuple[list[Chunk], list[Chunk]]:
        slow = backend.generate(say("a long answer for a slow reader", logprobs=0))
        first = [await anext(slow)]
        other = await chunks_of(backend, say("quick"))
        while backend.stats().running:
            await asyncio.sleep(0.005)
        return first + [chunk async for chunk in slow], other

    slow, quick = asyncio.run(late())
    assert text(quick) == "quick"
    assert text(slow) == "a long answer for a slow reader"
    assert len(slow) < 10
    assert [info.token_id for chunk in slow for info in chunk.logprobs] == ids(slow)


def test_closing_the_iterator_cancels(backend: NativeBackend) -> None:
    async def leave(after: int) -> None:
        stream = backend.generate(ask("y" * 50, max_tokens=100, ignore_eos=True, n=2))
        for _ in range(after):
            await anext(stream)
        await stream.aclose()

    for after in range(1, 6):
        asyncio.run(leave(after))
    idle(backend)
    assert backend.stats().requests_cancelled == 5


def test_cancelling_the_task_cancels_the_request(backend: NativeBackend) -> None:
    async def interrupted() -> None:
        task = asyncio.create_task(chunks_of(backend, ask(max_tokens=100, ignore_eos=True)))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(interrupted())
    idle(backend)


def test_an_event_loop_that_closes_takes_its_requests_along(backend: NativeBackend) -> None:
    closed = threading.Event()

    def hold(prompt: Sequence[int], output: Sequence[int], logits: Any) -> Any:
        if len(output) == 2:  # the engine stands still until there is no loop any more
            assert closed.wait(60)
        return logits

    loop = asyncio.new_event_loop()
    stream = backend.generate(ask(max_tokens=150, ignore_eos=True, logits_processors=(hold,)))
    waiting = loop.create_task(anext(stream))
    while True:  # until the reader waits for a chunk that is not there yet
        loop.run_until_complete(asyncio.sleep(0.001))
        if not waiting.done():
            break
        waiting = loop.create_task(anext(stream))
    loop.close()  # not the way to treat a task; the engine must not care
    closed.set()
    idle(backend)
    assert backend.stats().requests_cancelled == 1
    del waiting, stream
    assert text(chunks(backend, say("on"))) == "on"


def test_who_leaves_is_in_no_later_step(backend: NativeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Runner.run
    sizes: list[int] = []
    held, left = threading.Event(), threading.Event()

    def recorded(runner: Runner, step: Step) -> StepResult:
        sizes.append(len(step.sequences))
        return run(runner, step)

    def hold(prompt: Sequence[int], output: Sequence[int], logits: Any) -> Any:
        if len(output) == 3:
            held.set()
            assert left.wait(60)
        return logits

    async def leave() -> int:
        leaver = backend.generate(ask("y" * 40, max_tokens=100, ignore_eos=True))
        await anext(leaver)
        stays = asyncio.create_task(chunks_of(backend, ask(max_tokens=12, ignore_eos=True, logits_processors=(hold,))))
        assert await asyncio.to_thread(held.wait, 60)
        during = len(sizes)
        await leaver.aclose()
        left.set()
        await stays
        return during

    monkeypatch.setattr(Runner, "run", recorded)
    during = asyncio.run(leave())
    assert sizes[during - 1] == 2
    assert set(sizes[during:]) == {1}
    idle(backend)


def test_time_runs_out_as_an_error_of_its_own(backend: NativeBackend) -> None:
    def slow(prompt: Sequence[int], output: Sequence[int], logits: Any) -> Any:
        time.sleep(0.01)
        return logits

    asked = ask(max_tokens=100, ignore_eos=True, logits_processors=(slow,), n=2)
    found = chunks(backend, replace(asked, timeout=0.1))
    final = [chunk for chunk in found if chunk.finish_reason]
    assert [(chunk.finish_reason, type(chunk.error)) for chunk in final] == [("error", RequestTimeout)] * 2
    assert len(ids(found)) < 100
    idle(backend)


def test_a_full_line_refuses(checkpoint: Path) -> None:
    scheduler = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64, max_waiting=1)
    held, tried = threading.Event(), threading.Event()

    def hold(prompt: Sequence[int], output: Sequence[int], logits: Any) -> Any:
        held.set()
        assert tried.wait(60)
        return logits

    async def crowd(backend: NativeBackend) -> None:
        first = asyncio.create_task(chunks_of(backend, ask(max_tokens=2, logits_processors=(hold,))))
        assert await asyncio.to_thread(held.wait, 60)
        second, third = (asyncio.create_task(chunks_of(backend, ask(max_tokens=2))) for _ in range(2))
        await asyncio.sleep(0)
        tried.set()
        with pytest.raises(Overloaded) as caught:
            await third
        assert caught.value.retry_after >= 1.0
        assert (await first)[-1].finish_reason
        assert (await second)[-1].finish_reason

    backend = NativeBackend(checkpoint, replace(CONFIG, scheduler=scheduler))
    asyncio.run(crowd(backend))
    backend.close()


def test_priorities_and_tenants_reach_the_engine(checkpoint: Path) -> None:
    config = replace(CONFIG, scheduler=SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64))
    held, asked = threading.Event(), threading.Event()
    order: list[str] = []

    def hold(prompt: Sequence[int], output: Sequence[int], logits: Any) -> Any:
        held.set()
        assert asked.wait(60)
        return logits

    async def one(backend: NativeBackend, request: Request) -> None:
        found = await chunks_of(backend, request)
        order.append(found[-1].request_id)

    async def all_(backend: NativeBackend) -> None:
        first = replace(ask(max_tokens=2, ignore_eos=True, logits_processors=(hold,), id="first"), tenant="x")
        tasks = [asyncio.create_task(one(backend, first))]
        assert await asyncio.to_thread(held.wait, 60)
        for id, priority, tenant in (("late", 1, "y"), ("again", 0, "x"), ("other", 0, "y"), ("urgent", -1, "x")):
            later = replace(ask(max_tokens=2, ignore_eos=True, id=id), priority=priority, tenant=tenant)
            tasks.append(asyncio.create_task(one(backend, later)))
        await asyncio.sleep(0)
        asked.set()
        await asyncio.gather(*tasks)

    backend = NativeBackend(checkpoint, config)
    asyncio.run(all_(backend))
    backend.close()
    # "urgent" takes the seat of "first", which goes on after it
    assert order[0] == "urgent"
    assert order[-1] == "late"
    assert sorted(order) == ["again", "first", "late", "other", "urgent"]


def test_a_request_id_serves_one_open_request_at_a_time(backend: NativeBackend) -> None:
    async def twice() -> None:
        first = backend.generate(ask(id="same", max_tokens=120, ignore_eos=True))
        await anext(first)
        with pytest.raises(InvalidRequest, match="same"):
            await chunks_of(backend, ask(id="same"))
        await anext(first)
        await first.aclose()

    asyncio.run(twice())
    idle(backend)
    assert chunks(backend, ask(id="same", max_tokens=1))[-1].request_id == "same"


def test_allocation_listeners_hear_of_each_request(backend: NativeBackend) -> None:
    held: dict[str, int] = {}

    class Listener:
        def allocated(self, request_id: str, index: int, blocks: int) -> None:
            held[request_id] = held.get(request_id, 0) + blocks

        def released(self, request_id: str, index: int, blocks: int) -> None:
            held[request_id] -= blocks

    backend.add_allocation_listener(Listener())
    chunks(backend, ask(id="one", max_tokens=9))
    idle(backend)
    assert held == {"one": 0}


# ---- what goes wrong


@pytest.mark.parametrize("wrong", [lambda prompt, output, logits: logits[:3], lambda *_: 1 // 0])
def test_a_failing_processor_fails_its_own_request(backend: NativeBackend, wrong: Any) -> None:
    async def both() -> list[list[Chunk]]:
        return await asyncio.gather(
            chunks_of(backend, ask(logits_processors=(wrong,), n=2)), chunks_of(backend, say("unharmed"))
        )

    failed, other = asyncio.run(both())
    assert [(chunk.index, chunk.finish_reason) for chunk in failed] == [(0, "error"), (1, "error")]
    assert all(isinstance(chunk.error, TramontaneError) for chunk in failed)
    assert text(other) == "unharmed"
    idle(backend)


def test_a_failing_step_is_reported_and_the_engine_lives(
    backend: NativeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(self: Runner, step: Step) -> StepResult:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "run", out_of_memory)
        failed = chunks(backend, ask("Hi", echo=True))
    assert (text(failed), failed[-1].finish_reason) == ("Hi", "error")
    assert isinstance(failed[-1].error, OutOfMemory)
    assert text(chunks(backend, say("alive"))) == "alive"


def test_a_broken_engine_ends_everything_and_says_so(
    backend: NativeBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Scheduler) -> Step:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Scheduler, "schedule", broken)
    with caplog.at_level(logging.CRITICAL, "tramontane"):
        failed = chunks(backend, ask(n=2))
    assert [chunk.finish_reason for chunk in failed] == ["error", "error"]
    assert isinstance(failed[0].error, EngineClosed)
    for _ in range(2):
        with pytest.raises(EngineClosed, match="a bug"):
            chunks(backend, ask())
    backend.close()


def test_close_ends_open_requests_as_cancelled(checkpoint: Path) -> None:
    opened = NativeBackend(checkpoint, CONFIG)

    async def closed_midway() -> list[Chunk]:
        stream = opened.generate(ask(max_tokens=150, ignore_eos=True))
        first = await anext(stream)
        await asyncio.to_thread(opened.close)
        return [first, *[chunk async for chunk in stream]]

    found = asyncio.run(closed_midway())
    assert [chunk.finish_reason for chunk in found if chunk.finish_reason] == ["cancelled"]
    opened.close()
    with pytest.raises(EngineClosed):
        chunks(opened, ask())
    stats = opened.stats()
    assert (stats.cache_bytes, stats.running, stats.blocks_used, stats.requests_cancelled) == (0, 0, 0, 1)


# ---- memory, sharing, exit


def test_what_comes_while_it_closes_is_refused(checkpoint: Path) -> None:
    """Queued behind the word to stop: nobody may wait for it for ever."""
    opened, gate = NativeBackend(checkpoint, CONFIG), threading.Event()
    opened._loop.call(lambda: None if gate.wait(60) else pytest.fail("nobody opened"))
    closer = threading.Thread(target=opened._loop.stop)

    async def late() -> list[Chunk]:
        task = asyncio.create_task(chunks_of(opened, ask()))
        while opened._loop._commands.qsize() < 2:
            await asyncio.sleep(0.001)
        gate.set()
        return await asyncio.wait_for(task, 60)

    while opened._loop._commands.qsize():  # the gate is being waited at
        time.sleep(0.001)
    closer.start()
    while opened._loop._commands.qsize() < 1:
        time.sleep(0.001)
    with pytest.raises(EngineClosed):
        asyncio.run(late())
    closer.join()
    opened.close()


def test_equal_models_share_weights_and_let_go_of_them(checkpoint: Path) -> None:
    first, second = NativeBackend(checkpoint, CONFIG), NativeBackend(str(checkpoint), CONFIG)
    other = NativeBackend(checkpoint, replace(CONFIG, dtype="float16"))
    assert first._shared is second._shared is not other._shared
    assert first._shared is not None
    weights = weakref.ref(first._shared.loaded.decoder)

    async def both() -> list[list[Chunk]]:
        return await asyncio.gather(chunks_of(first, say("first")), chunks_of(second, say("second")))

    assert [text(found) for found in asyncio.run(both())] == ["first", "second"]
    first.close()
    assert text(chunks(second, say("still"))) == "still"
    second.close()
    gc.collect()
    assert weights() is None
    other.close()
    assert not [model for key, model in shared._models.items() if key[0] == checkpoint.resolve()]


def test_who_shares_a_model_takes_turns(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, inside, together = Runner.run, threading.Semaphore(1), []

    def alone(self: Runner, step: Step) -> StepResult:
        together.append(not inside.acquire(blocking=False))
        try:
            time.sleep(0.001)  # so that the other's step could begin
            return real(self, step)
        finally:
            inside.release()

    monkeypatch.setattr(Runner, "run", alone)
    first, second = NativeBackend(checkpoint, CONFIG), NativeBackend(checkpoint, CONFIG)
    asks = [ask(max_tokens=20, ignore_eos=True) for _ in range(2)]

    async def both() -> None:
        await asyncio.gather(chunks_of(first, asks[0]), chunks_of(second, asks[1]))

    asyncio.run(both())
    first.close()
    second.close()
    assert len(together) >= 40
    assert not any(together)


def test_a_forgotten_backend_ends_its_thread(checkpoint: Path) -> None:
    opened = NativeBackend(checkpoint, CONFIG)
    thread = opened._loop._thread
    chunks(opened, ask(max_tokens=2))
    del opened
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_memory_is_what_the_configuration_says(checkpoint: Path) -> None:
    per_block = 2 * 4 * 2 * 8 * 4  # keys and values, tokens, heads, head size, float32
    budget = 300 * per_block + 17
    opened = NativeBackend(checkpoint, replace(CONFIG, cache=CacheConfig(block_size=4, memory_bytes=budget)))
    chunks(opened, ask(max_tokens=5, logprobs=1, prompt_logprobs=1))
    stats = opened.stats()
    assert budget - per_block < stats.cache_bytes <= budget
    assert stats.blocks_total == 300
    assert stats.workspace_bytes > 0
    assert stats.weight_bytes > 0
    opened.close()


def test_the_interpreter_exits_in_the_middle_of_an_answer(checkpoint: Path) -> None:
    script = (
        "import asyncio, sys\n"
        "from tests.backends.test_native import CONFIG, NativeBackend, ask\n"
        "backend = NativeBackend(sys.argv[1], CONFIG)\n"
        "stream = backend.generate(ask(max_tokens=150, ignore_eos=True))\n"
        "print(len(asyncio.new_event_loop().run_until_complete(anext(stream)).token_ids))\n"
    )
    assert int(run_python(script, str(checkpoint))) >= 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_is_told_so(backend: NativeBackend) -> None:
    real, backend._pid = backend._pid, -1
    with pytest.raises(EngineClosed, match="fork"):
        chunks(backend, ask())
    backend._pid = real


# ---- parts


def test_a_mailbox_wakes_its_reader_and_survives_its_absence() -> None:
    box = Mailbox()

    async def read_twice() -> list[Chunk]:
        task = asyncio.create_task(box.read())
        await asyncio.sleep(0)
        reader = box.put(Chunk("r", text="a"))
        assert reader is not None
        assert wake([reader]) == set()
        first = await task
        abandoned = asyncio.create_task(box.read())
        await asyncio.sleep(0)
        abandoned.cancel()
        wake([box.put(Chunk("r", text="b", prompt_logprobs=(None,))) or reader])
        box.put(Chunk("r", index=1, text="c"))
        box.put(Chunk("r", text="d", finish_reason="stop"))
        return [*first, *await box.read()]

    found = asyncio.run(read_twice())
    assert [chunk.text for chunk in found] == ["a", "bd", "c"]
    assert [chunk.prompt_logprobs for chunk in found] == [None, (None,), None]


def test_a_missing_device(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises((DeviceNotAvailable, MissingExtra)):
        device.resolve_device("cuda:97")
    with caplog.at_level(logging.WARNING, "tramontane"):
        found = device.resolve_device("cuda:97", fallback=True)
    assert found == device.resolve_device("auto")
    assert f"Falling back to {found}" in caplog.text


def test_choosing_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="device"):
        device.resolve_device("gpu")
    assert device.resolve_device("cpu") == "cpu"
    assert device.resolve_device("auto", kernels="reference") == "cpu"
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(device, "for_device", lambda *args, **kwargs: pytest.fail("torch must not be asked"))
    assert device.resolve_device("auto") == "cpu"
    monkeypatch.undo()
    monkeypatch.setattr(device, "_torch_may_have_gpu", lambda: True)
    monkeypatch.setattr(device, "for_device", lambda *args, **kwargs: None)
    monkeypatch.setattr(device.sys, "platform", "linux")
    assert device.resolve_device("auto") == "cuda"
    monkeypatch.setattr(device.sys, "platform", "darwin")
    assert device.resolve_device("auto") == "metal"


# ---- a real model


@pytest.mark.slow
def test_smollm2_answers_many_within_its_memory(smollm2: Path) -> None:
    """Every request together as alone, out of a pool too small for all, in the memory that was configured."""
    script = (
        "import asyncio, json, sys\n"
        "from tests.backends.test_native import *\n"
        "from tramontane import platform\n"
        "cache = CacheConfig(memory_bytes=24 << 20)\n"
        "scheduler = SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=128)\n"
        "backend = NativeBackend(sys.argv[1], EngineConfig(cache, scheduler, 'cpu', context_length=512, threads=2,\n"
        "                        deterministic=True))\n"
        "def one(n):\n"
        "    message = Message('user', f'Tell me something about the number {n}. ' * (1 + n % 5))\n"
        "    params = SamplingParams(seed=n, temperature=n % 2, max_tokens=8 + 5 * (n % 4))\n"
        "    return Request(messages=(message,), sampling=params)\n"
        "async def all_of(numbers):\n"
        "    return await asyncio.gather(*(chunks_of(backend, one(n)) for n in numbers))\n"
        "asyncio.run(all_of(range(64, 68)))\n"
        "before = platform.current_rss()\n"
        "together = asyncio.run(all_of(range(32)))\n"
        "grown = platform.peak_rss() - before\n"
        "alone = [asyncio.run(all_of([n]))[0] for n in range(32)]\n"
        "stats = backend.stats()\n"
        "question = Message('user', 'What is the name of the capital city of France?')\n"
        "greedy = SamplingParams(temperature=0, max_tokens=12)\n"
        "paris = chunks(backend, Request(messages=(question,), sampling=greedy))\n"
        "print(json.dumps({'same': [text(a) for a in together] == [text(b) for b in alone], 'grown': grown,\n"
        "  'answer': text(paris), 'cache': stats.cache_bytes, 'workspace': stats.workspace_bytes}))\n"
    )
    found = json.loads(run_python(script, str(smollm2)))
    assert found["same"]
    assert "Paris" in found["answer"]
    assert found["cache"] <= 24 << 20
    # What grows is the cache, the buffers, and some megabytes of prompts and answers; weights may be read in too.
    assert found["grown"] <= found["cache"] + found["workspace"] + smollm2.stat().st_size
