"""LLM over the native backend: a tiny random model, and SmolLM2 where it is at hand."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.engine import checkpoints
from tests.engine.checkpoints import BOS, CONTEXT
from tests.kernels.modules import make
from tramontane import (
    LLM,
    AsyncLLM,
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    OutOfMemory,
    SamplingParams,
)
from tramontane.evaluate.perplexity import perplexity

OPTIONS: dict[str, Any] = {
    "kernels": "reference",
    "threads": 1,
    "block_size": 4,
    "num_blocks": 200,
    "deterministic": True,
}
PROMPTS = ["", "a", "The tramontane", "is a wind from the north that " * 3, "Nord, nord-ouest."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, max_tokens=12, seed=3, **OPTIONS) as llm:
        yield llm


def test_it_tells_the_defaults_that_hold(folder: Path, tmp_path: Path) -> None:
    advised = checkpoints.write(tmp_path / "model")
    (advised / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 7}')
    with LLM(advised, top_k=3, **OPTIONS) as llm:
        assert llm.capabilities().defaults == SamplingParams(temperature=0.5, top_k=3)
    with LLM(folder, **OPTIONS) as llm:
        assert llm.capabilities().defaults == SamplingParams()


def test_a_step_that_memory_cannot_hold_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tramontane.platform.available_memory", lambda: 1 << 20)
    with pytest.raises(OutOfMemory, match="max_num_batched_tokens"):
        LLM(folder, max_num_batched_tokens=1 << 20, **OPTIONS)


def test_a_list_equals_its_prompts_alone(llm: LLM) -> None:
    alone = [llm.generate(prompt) for prompt in PROMPTS]
    together = llm.generate(PROMPTS)
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert [r.text for r in together] == [r.text for r in alone]
    assert all(r.prompt_ids == tuple(llm.tokenize(prompt)) for prompt, r in zip(PROMPTS, together, strict=True))
    assert len({r.text for r in together}) > 1


def test_every_way_of_asking_gives_the_same_text(llm: LLM) -> None:
    prompt = PROMPTS[2]
    expected = llm.generate(prompt).text
    heard: list[str] = []
    llm.generate(prompt, on_token=lambda chunk: heard.append(chunk.text))
    assert "".join(heard) == expected
    assert "".join(chunk.text for chunk in llm.stream(prompt)) == expected
    assert "".join(chunk.text for chunk in llm.stream(llm.tokenize(prompt))) == expected

    async def play() -> tuple[str, str]:
        other = AsyncLLM.from_backend(llm.backend)
        return (await other.generate(prompt)).text, "".join([chunk.text async for chunk in other.stream(prompt)])

    assert asyncio.run(play()) == (expected, expected)
    with ThreadPoolExecutor(4) as pool:
        assert {result.text for result in pool.map(llm.generate, [prompt] * 8)} == {expected}


def test_choices_differ_and_repeat(llm: LLM) -> None:
    first, second = (llm.generate("a", n=3) for _ in range(2))
    assert [choice.text for choice in first.choices] == [choice.text for choice in second.choices]
    assert len({choice.token_ids for choice in first.choices}) == 3
    assert first.usage.completion_tokens == sum(len(choice.token_ids) for choice in first.choices)


def test_chat_uses_the_template(llm: LLM, folder: Path) -> None:
    result = llm.chat([{"role": "user", "content": "hi"}])
    assert (
        llm.detokenize(result.prompt_ids, skip_special_tokens=False) == "<|start|>user: hi<|end|><|start|>assistant: "
    )
    with LLM(folder, chat_template="{{ messages[0].content }}!", **OPTIONS) as other:
        assert other.detokenize(other.chat([{"role": "user", "content": "hi"}], max_tokens=1).prompt_ids) == "hi!"


def test_scores_are_the_log_probabilities_that_generation_reports(llm: LLM) -> None:
    result = llm.generate("The north", temperature=0, logprobs=0, max_tokens=20)
    score = llm.score([*result.prompt_ids, *result.token_ids])
    generated = [entry.logprob for entry in result.choices[0].logprobs]
    assert score.logprobs[0] is None
    assert score.logprobs[len(result.prompt_ids) :] == pytest.approx(generated, abs=1e-4)


def test_a_text_that_fills_the_context_is_scored_to_its_end(folder: Path, llm: LLM) -> None:
    ids = [BOS, *(i % 200 for i in range(CONTEXT - 1))]
    whole = llm.score(ids)
    assert whole.token_ids == tuple(ids)
    assert None not in whole.logprobs[1:]
    with LLM(folder, context_length=100, **OPTIONS) as short:
        shorter, *others = short.score([ids[:100], ids[:99], ids[:2]])
        assert shorter.logprobs[1:] == pytest.approx(whole.logprobs[1:100], abs=1e-4)
        assert [len(other.logprobs) for other in others] == [99, 2]
        with pytest.raises(ContextLengthExceeded) as caught:
            short.score(ids[:101])
        assert caught.value.prompt_tokens == 101
        text = "wind " * 60
        measured = perplexity(short, text)
    windows = [[BOS, *llm.tokenize(text[at : at + 99], add_special_tokens=False)] for at in range(0, 300, 99)]
    assert (measured.tokens, measured.windows) == (300, 4)
    assert measured.nll == pytest.approx(-sum(score.total for score in llm.score(windows)), rel=1e-5)


def test_no_tokens_at_all(llm: LLM) -> None:
    result = llm.generate("wind", max_tokens=0, prompt_logprobs=1, n=2, echo=True)
    assert [(c.token_ids, c.finish_reason, c.text) for c in result.choices] == [((), "length", "wind")] * 2
    assert result.usage.completion_tokens == 0
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == len(result.prompt_ids)
    assert llm.generate("wind", max_tokens=0).prompt_logprobs is None


def test_errors_leave_it_usable(llm: LLM) -> None:
    with pytest.raises(ContextLengthExceeded):
        llm.generate(["a", "x" * CONTEXT, "b"])
    with pytest.raises(InvalidRequest, match="vocabulary"):
        llm.generate([[1], [10_000]])
    with pytest.raises(ModelNotFound, match="nowhere"):
        LLM(Path("nowhere"))
    assert llm.generate("a").finish_reason in ("stop", "length")


class Ledger:
    """Blocks that each sequence holds, by what the listener hears."""

    def __init__(self) -> None:
        self.held: Counter[tuple[str, int]] = Counter()
        self.most = 0

    def allocated(self, request_id: str, index: int, blocks: int) -> None:
        self.held[(request_id, index)] += blocks
        self.most = max(self.most, sum(self.held.values()))

    def released(self, request_id: str, index: int, blocks: int) -> None:
        self.held[(request_id, index)] -= blocks


def test_leaving_gives_back_every_block(llm: LLM) -> None:
    ledger = Ledger()
    llm.add_allocation_listener(ledger)
    stream = llm.stream("the north wind", ignore_eos=True, max_tokens=100)
    next(stream)
    stream.close()
    llm.generate(PROMPTS, on_token=lambda chunk: False)
    deadline = time.monotonic() + 60
    while +ledger.held:
        assert time.monotonic() < deadline, f"never given back: {+ledger.held}"
        time.sleep(0.001)
    assert ledger.most > 0
    assert not -ledger.held


def test_a_forgotten_llm_ends_its_threads(folder: Path) -> None:
    before = set(threading.enumerate())
    forgotten = LLM(folder, **OPTIONS)
    forgotten.generate("a", max_tokens=1)
    own = {thread for thread in threading.enumerate() if thread not in before and thread.name != "tramontane-loop"}
    assert own
    del forgotten
    gc.collect()
    for thread in own:
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_the_interpreter_exits_with_answers_open(folder: Path, kernels: str) -> None:
    make(kernels)  # skips where it is not there
    options = f"{str(folder)!r}, kernels={kernels!r}, num_blocks=200, device='cpu'"
    script = f"""
from tramontane import LLM
llm = LLM({options})
stream = llm.stream("a", ignore_eos=True)
next(stream)
waiting = LLM({options}).stream("b", ignore_eos=True)
next(waiting)
print("bye")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "bye\n", "")


@pytest.mark.slow
def test_smollm2_answers(smollm2: Path) -> None:
    with LLM(smollm2, context_length=512, temperature=0) as llm:
        question = "What is the name of the capital city of {}?"
        asked = [[{"role": "user", "content": question.format(name)}] for name in ("France", "Japan")]
        paris, tokyo = llm.chat(asked, max_tokens=24)
        assert "Paris" in paris.text
        assert "Tokyo" in tokyo.text
        assert paris.finish_reason == "stop"
        right, wrong = llm.score(["The capital of France is Paris.", "The capital of France is potato."])
        assert right.perplexity < wrong.perplexity
