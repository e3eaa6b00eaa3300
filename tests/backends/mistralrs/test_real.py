"""The real wheel: sources, quantization, adapters, grammars, many at once, held to the wheel called directly or to
transformers."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.backends.mistralrs import models
from tests.conftest import data_path
from tests.engine import checkpoints
from tests.loading import old_ggml
from tramontane.backends.mistralrs.backend import MistralRSBackend
from tramontane.errors import ContextLengthExceeded, InvalidRequest, TramontaneError, UnsupportedModel
from tramontane.gather import answer_all
from tramontane.llm import LLM
from tramontane.types import Choice, Grammar, Message, Request, Result, SamplingParams, Tool

pytestmark = pytest.mark.slow
pytest.importorskip("mistralrs", reason="mistralrs is not installed")

FRANCE = "The capital of France is"
Opened = Callable[..., LLM]


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> Iterator[LLM]:
    with LLM(f"mistralrs/{smollm2}") as llm:
        yield llm


@pytest.fixture
def loaded() -> Iterator[Opened]:
    """Opens models and closes them in the end."""
    llms: list[LLM] = []

    def load(model: Path, **options: Any) -> LLM:
        llms.append(LLM(str(model), backend="mistralrs", **options))
        return llms[-1]

    yield load
    for llm in llms:
        llm.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "tiny"
    return models.llama(folder, hidden=64, heads=4, kv_heads=2, layers=2, inner=96, context=2048)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the attention of SmolLM-135M, which the real adapters fit."""
    folder = tmp_path_factory.mktemp("llama") / "wide"
    return models.llama(folder, hidden=576, heads=9, kv_heads=3, layers=30, inner=64)


def greedy(llm: LLM, prompt: str = "Once upon a time", tokens: int = 6, **fields: Any) -> str:
    return llm.generate(prompt, temperature=0.0, max_tokens=tokens, **fields).text


def logprobs(result: Result) -> list[float]:
    return [one.logprob for one in result.choices[0].logprobs]


DIRECTLY = """
import sys
from mistralrs import CompletionRequest, Runner, Which
folder, name = sys.argv[1:3]
runner = Runner(Which.GGUF(quantized_model_id=folder, quantized_filename=name))
asked = CompletionRequest(prompt=sys.argv[3], model="default", max_tokens=12, temperature=0.0)
open(sys.argv[4], "w").write(runner.send_completion_request(asked).choices[0].text)
"""


def test_the_same_text_as_the_wheels_own(smol: LLM, smollm2: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", DIRECTLY, str(smollm2.parent), smollm2.name, FRANCE, str(tmp_path / "text")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert greedy(smol, FRANCE, 12) == (tmp_path / "text").read_text()


def test_streams_chat_and_tokens(smol: LLM) -> None:
    whole = smol.generate(FRANCE, temperature=0.0, max_tokens=8, logprobs=2)
    pieces = list(smol.stream(FRANCE, temperature=0.0, max_tokens=8))
    assert "".join(chunk.text for chunk in pieces) == whole.text == smol.detokenize(whole.token_ids)
    assert whole.text.startswith(" Paris")
    assert whole.usage.prompt_tokens == len(smol.tokenize(FRANCE))
    assert whole.usage.completion_tokens == len(whole.token_ids) == 8
    assert all(one.rank == 1 and one.top[0][0] == one.token_id for one in whole.choices[0].logprobs)
    chat = smol.chat([{"role": "user", "content": "Say hi."}], temperature=0.0, max_tokens=4)
    assert chat.text
    assert chat.usage.prompt_tokens > 20  # the template's own words
    again = smol.generate(smol.tokenize(FRANCE), temperature=0.0, max_tokens=8)
    assert again.text == whole.text


def test_what_a_special_token_or_a_grammar_ends(smol: LLM) -> None:
    (end,) = smol.tokenize("<|im_end|>", add_special_tokens=False)
    assert smol.generate("hello", logit_bias={end: 100.0}, temperature=0.0, max_tokens=5).finish_reason == "stop"
    for grammar, texts in (
        (Grammar("choice", ("yes", "no")), {"yes", "no"}),
        (Grammar("regex", "(red|blue)"), {"red", "blue"}),
        (Grammar("lark", 'start: "🎉é"'), {"🎉é"}),
    ):
        result = smol.generate("Answer:", grammar=grammar, temperature=0.0, max_tokens=20)
        assert (result.text in texts, result.finish_reason) == (True, "stop")
    with pytest.raises(InvalidRequest, match="grammar"):
        smol.generate("x", grammar=Grammar("regex", "(a"), max_tokens=2)


def test_tools_and_reasoning(smol: LLM, smollm2: Path, loaded: Opened) -> None:
    """What the model would write is fixed by a grammar; what the wheel makes of it is looked at."""

    def written(llm: LLM, text: str, **fields: Any) -> Choice:
        sampling = SamplingParams(temperature=0.0, max_tokens=60, grammar=Grammar("choice", (text,)))
        request = Request(messages=(Message("user", "hi"),), sampling=sampling, **fields)
        return asyncio.run(answer_all(llm.backend, [request], None))[0].choices[0]

    tools = (Tool("weather", "of a city", {"type": "object", "properties": {"city": {"type": "string"}}}),)
    asked = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    choice = written(smol, asked, tools=tools)
    assert (choice.text, choice.finish_reason) == ("", "tool_calls")
    assert [(call.name, json.loads(call.arguments)) for call in choice.tool_calls] == [("weather", {"city": "Oslo"})]
    assert written(smol, "no call", tools=tools).text == "no call"
    thinker = loaded(smollm2, chat_template="{{ messages[0].content }}{% if false %}<think></think>{% endif %}")
    choice = written(thinker, "<think>\nhmm\n</think>\n\nyes", thinking=True)
    assert (choice.reasoning.strip(), choice.text.strip()) == ("hmm", "yes")


def test_sampling_settings_reach_the_wheel(smol: LLM) -> None:
    (paris,) = smol.tokenize(" Paris")
    assert paris not in smol.generate(FRANCE, temperature=0.0, max_tokens=3, logit_bias={paris: -math.inf}).token_ids
    assert greedy(smol, FRANCE, 4) == smol.generate(FRANCE, temperature=5.0, top_k=1, max_tokens=4).text
    assert greedy(smol, FRANCE, 4) == smol.generate(FRANCE, temperature=5.0, top_p=1e-6, max_tokens=4).text
    assert greedy(smol, FRANCE, 4) == smol.generate(FRANCE, temperature=5.0, min_p=1.0, max_tokens=4).text
    echoing = greedy(smol, "a a a a a a a a a a", 4)
    assert greedy(smol, "a a a a a a a a a a", 4, repetition_penalty=2.0) != echoing
    cat = "The cat sat on the mat and slept. The cat sat on the"
    assert greedy(smol, cat, 1) == " mat"
    assert greedy(smol, cat, 1, dry_multiplier=50.0) != " mat"
    assert greedy(smol, "a a a a a a a a a a", 4, presence_penalty=2.0, frequency_penalty=2.0) != echoing


def test_refusals_are_ours(smol: LLM) -> None:
    with pytest.raises(ContextLengthExceeded):
        smol.generate("a b c d " * 3000)
    for name, value in (("seed", 1), ("min_tokens", 2), ("prompt_logprobs", 1)):
        with pytest.raises(InvalidRequest) as caught:
            smol.generate("x", **{name: value})
        assert caught.value.field == name
    assert greedy(smol, FRANCE, 1) == " Paris"


def test_thirty_two_at_once(smol: LLM) -> None:
    """Each answer begins as it does alone; the wheel's arithmetic for several rows may part from it later."""
    prompts = [f"{FRANCE} {word}" for word in ("Paris", "the", "a big", "called") for _ in range(8)]
    alone = {prompt: greedy(smol, prompt, 1) for prompt in dict.fromkeys(prompts)}
    with ThreadPoolExecutor(16) as threads:
        half = list(threads.map(lambda prompt: greedy(smol, prompt, 4), prompts[::2]))
    rest = smol.generate(prompts[1::2], temperature=0.0, max_tokens=4)
    for prompt, text in zip(prompts[::2] + prompts[1::2], [*half, *(one.text for one in rest)], strict=True):
        assert text.startswith(alone[prompt])
    assert all(one.usage.completion_tokens == 4 for one in rest)


def test_several_choices(smol: LLM) -> None:
    result = smol.generate(FRANCE, n=3, temperature=0.0, max_tokens=3)
    assert [choice.text for choice in result.choices] == [greedy(smol, FRANCE, 3)] * 3


def test_leaving_frees_the_wheel(smol: LLM) -> None:
    for chunk in smol.stream(FRANCE, ignore_eos=True):
        assert chunk.text is not None
        break
    for thread in [t for t in threading.enumerate() if t.name == "tramontane-mistralrs"]:
        thread.join(60)
        assert not thread.is_alive()
    assert greedy(smol, FRANCE, 1) == " Paris"


def test_an_unused_backend_goes_by_itself(tiny: Path) -> None:
    llm = LLM(str(tiny), backend="mistralrs")
    assert greedy(llm)
    streams = llm.backend._streams  # type: ignore[attr-defined]
    del llm
    gc.collect()
    with pytest.raises(TramontaneError, match="closed"):
        streams.runner.call("list_models")


# ---- safetensors: reference, quantization, UQFF


def test_a_folder_agrees_with_transformers(tiny: Path, loaded: Opened) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    result = loaded(tiny).generate("hello", temperature=0.0, max_tokens=4, logprobs=0)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    ids = list(result.prompt_ids or ())
    for token, logprob in zip(result.token_ids, logprobs(result), strict=True):
        scores = torch.log_softmax(reference(torch.tensor([ids])).logits[0, -1].double(), -1)
        assert int(scores.argmax()) == token
        assert float(scores[token]) == pytest.approx(logprob, abs=0.02)  # its cache holds float16
        ids.append(token)


@pytest.mark.parametrize("quantization", ["Q8_0", "Q4_K", "q6k", 5, "HQQ8", "FP8", "F8Q8"])
def test_quantization_in_place(quantization: str | int, tiny: Path, loaded: Opened) -> None:
    plain = loaded(tiny).generate("hello", temperature=0.0, max_tokens=1, logprobs=0)
    coarse = loaded(tiny, quantization=quantization).generate("hello", temperature=0.0, max_tokens=1, logprobs=0)
    assert coarse.prompt_ids == plain.prompt_ids
    assert logprobs(coarse) != logprobs(plain)
    assert logprobs(coarse)[0] == pytest.approx(logprobs(plain)[0], abs=1.5)


def test_uqff_is_written_and_read_back(stories15m: Path, loaded: Opened, tmp_path: Path) -> None:
    first = loaded(stories15m, isq="Q4K", write_uqff=tmp_path / "model.uqff").generate(
        "Once", temperature=0.0, max_tokens=4, logprobs=0
    )
    assert (tmp_path / "model-0.uqff").exists()
    back = loaded(tmp_path).generate("Once", temperature=0.0, max_tokens=4, logprobs=0)
    assert (back.token_ids, logprobs(back)) == (first.token_ids, pytest.approx(logprobs(first), abs=1e-4))
    file = loaded(tmp_path / "model-0.uqff").generate("Once", temperature=0.0, max_tokens=4)
    assert file.token_ids == first.token_ids


def test_topology_calibration_and_imatrix(tiny: Path, loaded: Opened, tmp_path: Path) -> None:
    topology = tmp_path / "topology.yml"
    topology.write_text("0-1:\n  isq: Q8_0\n1-2:\n  isq: Q4_0\n")
    mixed = loaded(tiny, topology=topology).generate("hello", temperature=0.0, max_tokens=1, logprobs=0)
    plain = loaded(tiny).generate("hello", temperature=0.0, max_tokens=1, logprobs=0)
    assert logprobs(mixed) != logprobs(plain)
    llm = loaded(tiny, quantization="Q4K")
    backend = llm.backend
    assert isinstance(backend, MistralRSBackend)
    assert backend.begin_calibration().collecting
    for i in range(3):
        greedy(llm, f"some text to learn from, {i}")
    assert backend.calibration_status().total_rows > 0
    backend.apply_calibration(tmp_path / "found.cimatrix")
    assert greedy(llm)
    backend.requantize("Q8_0")
    assert greedy(llm)
    assert greedy(loaded(tiny, quantization="Q4K", imatrix=tmp_path / "found.cimatrix"))
    (tmp_path / "text.txt").write_text("words of all kinds " * 400)
    assert greedy(loaded(tiny, quantization="Q4K", calibration_file=tmp_path / "text.txt"))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"architecture": "Llama"},
        {"kv_cache": False},
        {"engine_seed": 3, "prefix_caching": False, "max_num_seqs": 2},
        {"adapters": {}},
    ],
)
def test_other_options(options: dict[str, Any], tiny: Path, loaded: Opened) -> None:
    assert greedy(loaded(tiny, **options))


def test_the_engines_seed_repeats_a_run(tiny: Path, loaded: Opened) -> None:
    one, other = (loaded(tiny, engine_seed=11).generate("hello", max_tokens=12).token_ids for _ in range(2))
    assert one == other


def test_a_chat_template_of_the_users(tiny: Path, loaded: Opened) -> None:
    llm = loaded(tiny, chat_template="{% for m in messages %}<{{ m.content }}>{% endfor %}")
    assert llm.chat([{"role": "user", "content": "x"}], max_tokens=1).usage.prompt_tokens == 3


def test_a_gguf_file_is_quantized_further(smollm2: Path, loaded: Opened) -> None:
    assert greedy(loaded(smollm2, quantization="Q8_0"), FRANCE, 1)


def test_what_the_wheel_cannot_load(tiny: Path, loaded: Opened, smollm2: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"mistral\.rs"):
        loaded(tiny, kind="embedding")
    with pytest.raises(UnsupportedModel, match="LoRA"):
        loaded(smollm2, adapters={})  # which says why: the file's heads are permuted


def test_a_panic_ends_the_request_alone(loaded: Opened, tmp_path: Path) -> None:
    """The wheel reads ggjt files and panics at the first request, whatever it is: on a thread of its own."""
    tokens = old_ggml.vocabulary()
    tensors = old_ggml.plain(old_ggml.llama_tensors(len(tokens), hidden=256, inner=512))
    (tmp_path / "llama.bin").write_bytes(old_ggml.write(tensors, tokens, hidden=256))
    checkpoints.write(tmp_path / "words")
    llm = loaded(tmp_path / "llama.bin", tokenizer=tmp_path / "words" / "tokenizer.json")
    for _ in range(2):
        with pytest.raises(TramontaneError, match="panicked"):
            llm.generate("hello", max_tokens=1)


def test_embeddings_agree_with_ours(loaded: Opened, tmp_path: Path) -> None:
    folder = models.embedder(tmp_path / "embedder")
    llm, ours = loaded(folder), LLM(str(folder), kernels="reference")
    for ids in ((71, 72), tuple(range(20))):
        vector, wanted = llm.embed(ids).vector, ours.embed(ids).vector
        assert math.hypot(*vector) == pytest.approx(1)
        assert sum(a * b for a, b in zip(vector, wanted, strict=True)) == pytest.approx(1, abs=1e-4)
    long = llm.embed("x" * 600)
    assert (long.truncated, long.usage.prompt_tokens) == (True, 512)
    assert len(llm.embed(["a", "b"])) == 2
    with pytest.raises(UnsupportedModel):
        llm.generate("x")


def test_images_reach_the_model(loaded: Opened, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    llm = loaded(models.vision(tmp_path / "vision"))
    assert llm.capabilities().chat

    def seen(colour: str, *, inline: bool = False) -> tuple[Result, list[float]]:
        path = tmp_path / f"{colour}.png"
        image.new("RGB", (56, 56), colour).save(path)
        url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" if inline else str(path)
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
        result = llm.chat([{"role": "user", "content": parts}], temperature=0.0, max_tokens=2, logprobs=0)
        return result, logprobs(result)

    red, numbers = seen("red")
    assert red.usage.prompt_tokens > len("user what? assistant")  # four of them stand for the image
    assert seen("red", inline=True)[1] == numbers
    assert seen("blue")[1] != numbers
    assert greedy(llm, "hello", 2)


# ---- adapters


def test_lora_adapters_by_request(wide: Path, loaded: Opened, tmp_path: Path) -> None:
    medical, other = (data_path(f"adapters/{name}") for name in ("medai-final", "medai-checkpoint-1000"))
    llm = loaded(wide, adapters={"medical": medical})
    llm.load_adapter("other", other)
    assert llm.adapters() == ["medical", "other"]
    sampling = SamplingParams(temperature=0.0, max_tokens=1, logprobs=1)

    def scored(adapter: str | None) -> tuple[int, float]:
        (one,) = llm.generate("What is a", sampling, adapter=adapter).choices[0].logprobs
        return one.token_id, one.logprob

    for name, adapter in (("medical", medical), ("other", other)):
        whole = LLM(str(models.merged(wide, adapter, tmp_path / name)), backend="mistralrs")
        (wanted,) = whole.generate("What is a", sampling).choices[0].logprobs
        whole.close()
        assert scored(name) == (wanted.token_id, pytest.approx(wanted.logprob, abs=0.05))
        assert scored(name) != scored(None)
    llm.unload_adapter("medical")
    assert llm.adapters() == ["other"]
    with pytest.raises(InvalidRequest, match="medical"):
        scored("medical")
    with pytest.raises(InvalidRequest, match="already loaded"):
        llm.load_adapter("other", medical)
    llm.load_adapter("other", medical, replace=True)


def test_xlora(tiny: Path, loaded: Opened, tmp_path: Path) -> None:
    """The wheel reads prompts of one token with X-LoRA, and fails at longer ones, which is told as a failure."""
    folder = models.xlora(tmp_path / "xlora", tiny)
    llm = loaded(tiny, xlora=folder, xlora_order=folder / "order.json")
    start = llm.detokenize([checkpoints.BOS], skip_special_tokens=False)
    mixed = llm.generate(start, temperature=0.0, max_tokens=3, logprobs=0)
    plain = loaded(tiny).generate(start, temperature=0.0, max_tokens=3, logprobs=0)
    assert mixed.usage.prompt_tokens == plain.usage.prompt_tokens == 1
    assert logprobs(mixed) != logprobs(plain)
    with pytest.raises(TramontaneError, match="RoPE positions"):
        llm.generate("hello", max_tokens=1)
    assert llm.generate(start, temperature=0.0, max_tokens=3).token_ids == mixed.token_ids


def test_no_line_of_the_wheels_is_printed(tiny: Path) -> None:
    code = f"from tramontane import LLM\nLLM({str(tiny)!r}, backend='mistralrs').generate('x', max_tokens=2)"
    environment = {name: value for name, value in os.environ.items() if name != "RUST_LOG"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=300, check=True)
    assert (run.stdout, run.stderr) == (b"", b"")
