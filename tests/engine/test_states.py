"""Models with states in the engine: what a request gets does not depend on who else is there, on what is remembered, on
where its prompt is cut."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.engine.checkpoints import Rig, load, request, rig
from tests.kernels.modules import make
from tests.models.tiny import TinyModels, tokens
from tramontane.config import CacheConfig, EngineConfig, SchedulerConfig
from tramontane.engine.encoder import Encoder, Task, Text
from tramontane.engine.sequence import EngineRequest
from tramontane.kernels.workspace import Workspace
from tramontane.loading.build import LoadedModel

BLOCK = 4  # states are remembered every 16 tokens


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["lfm2", "mamba2"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def config(tokens_a_step: int = 96, prefix_caching: bool = True, seats: int = 24, paged: bool = True) -> EngineConfig:
    cache = CacheConfig(block_size=BLOCK, prefix_caching=prefix_caching, paged_attention=paged)
    return EngineConfig(cache, SchedulerConfig(seats, tokens_a_step))


def requests() -> list[EngineRequest]:
    """Three beginnings of 40 tokens, that go on apart; some with several choices."""
    return [
        request(
            f"{number}",
            (*tokens(40, number % 3)[: 40 - number % 5], *tokens(1 + 3 * number % 17, 10 + number)),
            seed=number,
            max_tokens=5 + number % 19,
            n=1 + number % 3 // 2 * 2,
            temperature=0.0 if number % 2 else 0.9,
            logprobs=2,
        )
        for number in range(24)
    ]


def blocks(loaded: LoadedModel, count: int) -> int:
    return count if loaded.spec.attentions else 0


def assert_same(one: Rig, other: Rig) -> None:
    assert one.tokens == other.tokens
    assert {key: end.finish_reason for key, end in one.ends.items()} == {
        key: end.finish_reason for key, end in other.ends.items()
    }


@pytest.mark.parametrize("module", ["reference/deterministic", "cpu/deterministic"])
def test_together_as_alone_with_few_states_and_blocks(module: str, name: str, tiny: TinyModels) -> None:
    loaded = load(tiny.get(name).path, make(module))
    alone = rig(loaded, config(prefix_caching=False), blocks(loaded, 400), num_states=3)
    for one in requests():
        alone.run([one])
    crowded = rig(loaded, config(), blocks(loaded, 70), num_states=24).run(requests())
    assert_same(crowded, alone)
    stats = crowded.engine.stats()
    assert stats.preemptions > 2 or not loaded.spec.attentions
    roomy = rig(loaded, config(23, seats=6), blocks(loaded, 300), num_states=60).run(requests())
    assert_same(roomy, alone)
    assert roomy.engine.stats().cached_tokens > 200, "states are remembered every 16 tokens"


def test_a_state_that_is_remembered_ends_where_states_are(name: str, tiny: TinyModels) -> None:
    loaded = load(tiny.get(name).path, make("reference/deterministic"))
    engine = rig(loaded, config(), blocks(loaded, 100), num_states=8)
    prompt = tokens(50, 1)
    engine.run([request("first", prompt, max_tokens=20, temperature=0.0, ignore_eos=True)])
    answer = engine.ids("first")
    longer = [*prompt, *answer, *tokens(5, 2)]
    engine.run([request("prompt again", (*prompt, 1, 2), max_tokens=1), request("all again", longer, max_tokens=1)])
    # 16, 32 and 48 are reached while the prompt is computed, though only the last of them ends a step; then 64
    assert engine.ends["prompt again", 0].cached_tokens == 48
    assert engine.ends["all again", 0].cached_tokens == 64


def test_without_paged_attention(name: str, tiny: TinyModels) -> None:
    loaded = load(tiny.get(name).path, make("reference/deterministic"))
    paged = rig(loaded, config(), blocks(loaded, 400), num_states=60).run(requests())
    whole = rig(loaded, config(31, seats=5, paged=False), blocks(loaded, 200), num_states=5).run(requests())
    assert_same(whole, paged)


def test_the_engine_says_what_transformers_says(name: str, tiny: TinyModels) -> None:
    model = tiny.get(name)
    loaded = load(model.path, make("cpu"))
    asked = [request(f"{length}", tokens(length, length), max_tokens=12, temperature=0.0) for length in (3, 17, 34)]
    engine = rig(loaded, config(20), blocks(loaded, 200), num_states=9).run(asked)
    for one in asked:
        assert engine.ids(one.id) == model.greedy(one.prompt_ids, 12)


def test_texts_are_read_without_states_of_their_own(name: str, tiny: TinyModels) -> None:
    loaded = load(tiny.get(name).path, make("reference"))

    def read(texts: list[Text], tokens_a_step: int) -> NDArray[np.float32]:
        sizes = {"block_size": BLOCK, "context_length": 128, "max_num_batched_tokens": tokens_a_step}
        workspace = Workspace(loaded.ops, tokens_a_step)
        encoder = Encoder(loaded.decoder, workspace, cache_dtype="float32", max_num_seqs=4, **sizes)
        task = Task(texts, ("lasttoken",))
        encoder.add(task)
        while encoder.has_work:
            encoder.step()
        return np.array(task.future.result())

    texts = [Text(tuple(tokens(length, length))) for length in (9, 50, 14)]
    together = read(texts, 32)  # the second in two pieces
    alone = np.concatenate([read([text], 64) for text in texts])
    assert np.abs(together - alone).max() < 1e-4
